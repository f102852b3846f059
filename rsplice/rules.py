# SPDX-License-Identifier: MIT
"""The table of rules: what the kernel does with a leg's bytes where nobody saw the pages.

The first rule that holds decides. Where none holds the bytes are unknown: a kernel that is
not covered is never said to have avoided a copy. Each rule names the kernel function to read
it in. They stem from the sources of Linux 5.10, 6.1, 6.12 and 7.2; for FUSE over io_uring, ublk
and memory in a ring's table of buffers, from those of 7.3. The releases between these were not
read. Nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rsplice.audit import Endpoint

Version = tuple[int, int]  #: (major, minor) of a kernel release

#: The oldest kernel whose sources the rules stem from.
OLDEST: Version = (5, 10)

#: Operations of two legs: into a pipe inside the kernel, and out of it.
TWO_LEGS = frozenset({"sendfile", "sendfile64", "copy_file_range"})


@dataclass(frozen=True)
class Leg:
    """One leg of a call: the ends and flags are the call's, ``index`` tells which leg of it."""

    via: str
    index: int
    source: Endpoint
    destination: Endpoint
    flags: frozenset[str] = frozenset()

    @property
    def ends(self) -> tuple[Endpoint, Endpoint]:
        """The leg's own ends: sendfile and copy_file_range have a pipe in the middle."""
        if self.via not in TWO_LEGS:
            return self.source, self.destination
        pipe = Endpoint("pipe")
        return (pipe, self.destination) if self.index else (self.source, pipe)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a leg's bytes, how often the CPU copies each, and why."""

    disposition: str
    copies: int
    why: str


@dataclass(frozen=True)
class Operations:
    """A named set of operations, as in ``Tally.via``; an empty set is any operation."""

    name: str
    names: frozenset[str]

    def holds(self, via: str) -> bool:
        return not self.names or via in self.names


@dataclass(frozen=True)
class Ends:
    """A named set of endpoints; no kinds is any kind, ``x*`` any kind that begins with x."""

    name: str
    kinds: frozenset[str]
    direct: bool | None = None  #: whether the file has to be open with O_DIRECT, None: either
    dax: bool | None = None  #: whether it has to be DAX, None: either

    def holds(self, end: Endpoint) -> bool:
        return (
            self.direct in (None, end.direct)
            and self.dax in (None, end.dax)
            and (not self.kinds or self._names(end.kind))
        )

    def _names(self, kind: str) -> bool:
        return kind in self.kinds or any(
            k.endswith("*") and kind.startswith(k[:-1]) for k in self.kinds
        )


@dataclass(frozen=True)
class Rule:
    """One row of the table. ``why`` may name ``{source}`` and ``{destination}`` of the call."""

    operations: Operations
    source: Ends
    destination: Ends
    disposition: str
    why: str
    kernel_source: str  #: file:function where the kernel does so
    leg: int | None = None  #: None: either leg
    whole: bool = False  #: the ends are the call's, not the leg's
    flags: frozenset[str] = frozenset()  #: all of them have to be set
    since: Version = OLDEST
    before: Version | None = None
    bounces: int = 0  #: further copies of each byte, through buffers of the kernel

    @property
    def copies(self) -> int:
        """How often the CPU copies each byte."""
        return 1 + self.bounces if self.disposition == "copied" else 0

    def holds(self, leg: Leg, kernel: Version) -> bool:
        source, destination = (leg.source, leg.destination) if self.whole else leg.ends
        return (
            self.operations.holds(leg.via)
            and self.leg in (None, leg.index)
            and self.since <= kernel
            and (self.before is None or kernel < self.before)
            and self.flags <= leg.flags
            and self.source.holds(source)
            and self.destination.holds(destination)
        )


def classify(leg: Leg, kernel: Version) -> Verdict:
    """What *kernel*, a (major, minor), does with the bytes of *leg*.

    Unknown, with the reason, where no rule holds. ValueError if the operation has no such leg.
    """
    if leg.index not in leg_indices(leg.via):
        raise ValueError(f"{leg.via} has no leg {leg.index}")
    return _classify(leg, kernel)


def leg_indices(via: str) -> range:
    """The indices of the legs of an operation."""
    return range(2 if via in TWO_LEGS else 1)


@lru_cache(maxsize=4096)
def _classify(leg: Leg, kernel: Version) -> Verdict:
    for rule in RULES:
        if rule.holds(leg, kernel):
            why = rule.why.format(source=leg.source.kind, destination=leg.destination.kind)
            return Verdict(rule.disposition, rule.copies, why)
    return Verdict("unknown", 0, f"no rule for this combination on kernel {kernel[0]}.{kernel[1]}")


def why_seen(leg: Leg, disposition: str) -> str:
    """What it means that the pages at the ends of *leg* were compared, with this outcome."""
    source = leg.ends[0] if leg.index == 0 else leg.source
    destination = leg.ends[1]
    for outcome, from_, to, why in _SEEN:
        if outcome == disposition and from_.holds(source) and to.holds(destination):
            return why
    raise ValueError(f"{disposition!r} is not a disposition")


def _operations(name: str, names: str = "") -> Operations:
    return Operations(name, frozenset(names.split(", ")) - {""})


def _ends(name: str, kinds: str = "", direct: bool | None = None, dax: bool | None = None) -> Ends:
    return Ends(name, frozenset(kinds.split(", ")) - {""}, direct, dax)


# Operations.

_READ = (
    "read, pread64, readv, preadv, preadv2, io_uring read, io_uring readv, "
    "io_uring read_fixed, io_uring readv_fixed, io_uring read_multishot"
)
_WRITE = (
    "write, pwrite64, writev, pwritev, pwritev2, io_uring write, io_uring writev, "
    "io_uring write_fixed, io_uring writev_fixed"
)
_RECEIVE = "recv, recvfrom, recvmsg, recvmmsg, io_uring recv, io_uring recvmsg"
_SEND = (
    "send, sendto, sendmsg, sendmmsg, io_uring send, io_uring sendmsg, "
    "io_uring send_zc, io_uring sendmsg_zc"
)

ANYTHING = _operations("any")
READS = _operations("reads", _READ)
WRITES = _operations("writes", _WRITE)
RECEIVES = _operations("receives", f"{_READ}, {_RECEIVE}")
RECV_ZC = _operations("zero-copy receives", "io_uring recv_zc")
SENDS = _operations("sends", f"{_WRITE}, {_SEND}")
SPLICE = _operations("splice", "splice, io_uring splice")
SPLICES = _operations("splices", "splice, io_uring splice, sendfile, copy_file_range")
SENDFILE = _operations("sendfile", "sendfile")
COPY_FILE_RANGE = _operations("copy_file_range", "copy_file_range")
TEE = _operations("tee", "tee, io_uring tee")
VMSPLICE = _operations("vmsplice", "vmsplice")
CLONE = _operations("clone ioctls", "ioctl FICLONE, ioctl FICLONERANGE")
PROCESS_VM = _operations("process_vm", "process_vm_readv, process_vm_writev")
WRITTEN_REPLY = _operations("written replies", f"fuse reply, {_WRITE}")
RING_COMMAND = _operations("commands of a ring", "io_uring uring_cmd")
SPLICED_REPLY = _operations("spliced replies", "fuse reply, splice, io_uring splice")

# Endpoints.

_DISK = (
    "ext2, ext3, ext4, xfs, btrfs, f2fs, bcachefs, jfs, nilfs2, ocfs2, gfs2, reiserfs, zonefs, "
    "exfat, vfat, msdos, ntfs3, udf, hfs, hfsplus, erofs, block device"
)
_PAGE_CACHE = (
    f"{_DISK}, squashfs, iso9660, cramfs, romfs, ubifs, jffs2, ecryptfs, overlay, nfs, nfs4, afs, "
    "9p with a cache, ublk disk"
)
_FUSE = "fuse, fuseblk, virtiofs"
_MEMORY = "tmpfs, memfd, ramfs, devtmpfs, rootfs, hugetlbfs"
_BY_MOUNT = (
    "9p, cifs, smb3, ceph, pvfs2, fuse of unknown caching, fuseblk of unknown caching, "
    "virtiofs of unknown caching"
)

ANY = _ends("any")
UNKNOWN = _ends("unknown", "unknown")
USER = _ends("user memory", "user memory")
PIPE = _ends("pipe", "pipe, fifo")
DAX = _ends("DAX file", dax=True)
DISK_DIRECT = _ends("disk O_DIRECT", _DISK, direct=True)
BTRFS_DIRECT = _ends("btrfs O_DIRECT", "btrfs", direct=True)
OTHER_DIRECT = _ends(
    "other O_DIRECT", f"{_PAGE_CACHE}, {_FUSE}, fuse passthrough, {_BY_MOUNT}", direct=True
)
CACHED = _ends("page cache", _PAGE_CACHE, direct=False)
FUSE_CACHED = _ends("FUSE file", _FUSE, direct=False)
PASSTHROUGH = _ends("FUSE passthrough", "fuse passthrough", direct=False)
GFS2 = _ends("gfs2", "gfs2", direct=False)
MEMORY = _ends("memory file", _MEMORY)
MEMORY_DIRECT = _ends("memory file O_DIRECT", _MEMORY, direct=True)
BY_MOUNT = _ends("by mount", _BY_MOUNT)
REFLINK = _ends("reflink", "btrfs, xfs, bcachefs, ocfs2, overlay, unknown")
SERVER_COPY = _ends("server copy", f"nfs, nfs4, {_FUSE}, fuse passthrough, {_BY_MOUNT}")
GENERATED = _ends(
    "generated",
    "proc, sysfs, cgroup, cgroup2, debugfs, tracefs, configfs, securityfs, selinuxfs, bpf, "
    "efivarfs, pstore, binfmt_misc, fusectl, "
    "/dev/zero, /dev/full, /dev/random, /dev/urandom",
)
MESSAGES = _ends(
    "messages", "eventfd, timerfd, signalfd, inotify, fanotify, pidfd, mqueue, anon_inode*"
)
TTY = _ends("tty", "tty, pty, devpts, /dev/tty*, /dev/pts*, /dev/ptmx, /dev/console")
SINK = _ends("sink", "/dev/null, /dev/zero")
SOCKET = _ends("socket", "tcp, udp, udplite, unix, vsock, netlink, packet, raw, sctp, mptcp")
TCP = _ends("tcp", "tcp")
UDP = _ends("udp", "udp")
UNIX = _ends("unix", "unix")
AF_ALG = _ends("af_alg", "af_alg")
FUSE_DEVICE = _ends("fuse device", "fuse device")
UBLK_DEVICE = _ends("ublk device", "ublk device")
REGISTERED = _ends("kernel buffer", "fuse request, ublk request, kernel buffer")

_OPERATIONS = (
    *(READS, WRITES, RECEIVES, RECV_ZC, SENDS, SPLICE, SPLICES, SENDFILE, COPY_FILE_RANGE, TEE),
    *(VMSPLICE, CLONE, PROCESS_VM, WRITTEN_REPLY, RING_COMMAND, SPLICED_REPLY),
)
_ENDS = (
    *(UNKNOWN, USER, PIPE, DAX, DISK_DIRECT, BTRFS_DIRECT, OTHER_DIRECT, CACHED, FUSE_CACHED, GFS2),
    *(MEMORY, MEMORY_DIRECT, BY_MOUNT, REFLINK, SERVER_COPY, GENERATED, MESSAGES, TTY, SINK),
    *(SOCKET, TCP, UDP, UNIX, AF_ALG, FUSE_DEVICE, PASSTHROUGH, UBLK_DEVICE, REGISTERED),
)


# fmt: off
RULES: tuple[Rule, ...] = (
    # What was not looked at.
    Rule(ANYTHING, ANY, ANY, "unknown",
         "32-bit caller: its arguments are not looked at",
         "-", flags=frozenset({"compat"})),
    # Calls that may never reach a page.
    Rule(CLONE, ANY, ANY, "remapped",
         "a clone shares the extents of the file: no page is touched",
         "fs/remap_range.c:vfs_clone_file_range"),
    Rule(COPY_FILE_RANGE, ANY, SERVER_COPY, "unknown",
         "{destination} may have its server copy or fall back to splicing: which was not seen",
         "fs/read_write.c:vfs_copy_file_range", whole=True),
    Rule(COPY_FILE_RANGE, ANY, REFLINK, "unknown",
         "{destination} may share extents or fall back to copying: which was not seen",
         "fs/read_write.c:vfs_copy_file_range", whole=True),
    Rule(ANYTHING, UNKNOWN, ANY, "unknown",
         "what the data comes from was not recognised",
         "-"),
    Rule(ANYTHING, ANY, UNKNOWN, "unknown",
         "what the data goes to was not recognised",
         "-"),
    # Devices that drop what they are given.
    Rule(WRITES, USER, SINK, "discarded",
         "{destination} drops the data unread",
         "drivers/char/mem.c:write_null"),
    Rule(SPLICES, PIPE, SINK, "discarded",
         "{destination} drops the data unread",
         "drivers/char/mem.c:splice_write_null"),
    # Terminals: one copy more, through a buffer of the tty layer.
    Rule(READS, TTY, USER, "copied",
         "the tty layer copies through a buffer of its own: twice",
         "drivers/tty/tty_io.c:iterate_tty_read", bounces=1),
    Rule(WRITES, USER, TTY, "copied",
         "the tty layer copies through a buffer of its own: twice",
         "drivers/tty/tty_io.c:tty_write", bounces=1),
    Rule(SPLICES, PIPE, TTY, "copied",
         "the tty layer copies through a buffer of its own: twice",
         "drivers/tty/tty_io.c:tty_write", bounces=1),
    # DAX comes before O_DIRECT: the flag changes nothing there.
    Rule(READS, DAX, USER, "copied",
         "DAX: the CPU copies from persistent memory to user memory",
         "fs/dax.c:dax_iomap_rw"),
    Rule(WRITES, USER, DAX, "copied",
         "DAX: the CPU copies from user memory to persistent memory",
         "fs/dax.c:dax_iomap_rw"),
    Rule(SPLICES, DAX, PIPE, "copied",
         "DAX: the CPU copies from persistent memory into fresh pages",
         "fs/splice.c:generic_file_splice_read", before=(6, 5)),
    Rule(SPLICES, DAX, PIPE, "copied",
         "DAX: the CPU copies from persistent memory into fresh pages",
         "fs/splice.c:copy_splice_read", since=(6, 5)),
    Rule(SPLICES, PIPE, DAX, "copied",
         "DAX: the CPU copies from the pipe to persistent memory",
         "fs/splice.c:iter_file_splice_write"),
    # Files that live in memory: O_DIRECT opens since 6.6, there is no device to do the work.
    Rule(READS, MEMORY, USER, "copied",
         "{source} lives in memory: the kernel copies from it to user memory",
         "mm/shmem.c:shmem_file_read_iter"),
    Rule(WRITES, USER, MEMORY, "copied",
         "{destination} lives in memory: the kernel copies to it from user memory",
         "mm/filemap.c:generic_perform_write"),
    Rule(SPLICES, MEMORY_DIRECT, PIPE, "copied",
         "O_DIRECT: the kernel splices fresh pages, and copies into them as {source} has no device",
         "fs/splice.c:copy_splice_read", since=(6, 5)),
    Rule(SPLICES, MEMORY, PIPE, "shared",
         "the pipe refers to the file's own pages",
         "fs/splice.c:generic_file_splice_read", before=(6, 5)),
    Rule(SPLICES, MEMORY, PIPE, "shared",
         "the pipe refers to the file's own pages",
         "mm/shmem.c:shmem_file_splice_read", since=(6, 5)),
    # O_DIRECT. btrfs goes back to the page cache without telling.
    Rule(READS, BTRFS_DIRECT, USER, "unknown",
         "btrfs copies compressed extents in spite of O_DIRECT: which it did was not seen",
         "fs/btrfs/direct-io.c:btrfs_dio_iomap_begin"),
    Rule(SPLICES, BTRFS_DIRECT, PIPE, "unknown",
         "btrfs copies compressed extents in spite of O_DIRECT: which it did was not seen",
         "fs/btrfs/direct-io.c:btrfs_dio_iomap_begin"),
    Rule(WRITES, USER, BTRFS_DIRECT, "unknown",
         "btrfs copies for files with checksums in spite of O_DIRECT: which it did was not seen",
         "fs/btrfs/direct-io.c:btrfs_direct_write", since=(6, 2)),
    Rule(SPLICES, PIPE, BTRFS_DIRECT, "unknown",
         "btrfs copies for files with checksums in spite of O_DIRECT: which it did was not seen",
         "fs/btrfs/direct-io.c:btrfs_direct_write", since=(6, 2)),
    Rule(READS, DISK_DIRECT, USER, "direct",
         "O_DIRECT: the device fills the caller's pages",
         "fs/iomap/direct-io.c:__iomap_dio_rw"),
    Rule(WRITES, USER, DISK_DIRECT, "direct",
         "O_DIRECT: the device drains the caller's pages",
         "fs/iomap/direct-io.c:__iomap_dio_rw"),
    Rule(SPLICES, DISK_DIRECT, PIPE, "direct",
         "O_DIRECT: the device fills the fresh pages of the pipe",
         "fs/splice.c:generic_file_splice_read", before=(6, 5)),
    Rule(SPLICES, DISK_DIRECT, PIPE, "direct",
         "O_DIRECT: the device fills the fresh pages of the pipe",
         "fs/splice.c:copy_splice_read", since=(6, 5)),
    Rule(SPLICES, PIPE, DISK_DIRECT, "direct",
         "O_DIRECT: the device drains the pages of the pipe",
         "fs/splice.c:iter_file_splice_write"),
    # Memory of the kernel that a ring's table of buffers refers to (6.15).
    Rule(READS, BTRFS_DIRECT, REGISTERED, "unknown",
         "btrfs copies compressed extents in spite of O_DIRECT: which it did was not seen",
         "fs/btrfs/direct-io.c:btrfs_dio_iomap_begin", since=(6, 15)),
    Rule(WRITES, REGISTERED, BTRFS_DIRECT, "unknown",
         "btrfs copies for files with checksums in spite of O_DIRECT: which it did was not seen",
         "fs/btrfs/direct-io.c:btrfs_direct_write", since=(6, 15)),
    Rule(READS, DISK_DIRECT, REGISTERED, "direct",
         "O_DIRECT: the device fills the very pages of the {destination}",
         "io_uring/rsrc.c:io_import_kbuf", since=(6, 15)),
    Rule(WRITES, REGISTERED, DISK_DIRECT, "direct",
         "O_DIRECT: the device drains the very pages of the {source}",
         "io_uring/rsrc.c:io_import_kbuf", since=(6, 15)),
    Rule(READS, CACHED, REGISTERED, "copied",
         "the kernel copies from the page cache to the pages of the {destination}",
         "mm/filemap.c:generic_file_read_iter", since=(6, 15)),
    Rule(WRITES, REGISTERED, CACHED, "copied",
         "the kernel copies from the pages of the {source} to the page cache",
         "mm/filemap.c:generic_perform_write", since=(6, 15)),
    Rule(READS, MEMORY, REGISTERED, "copied",
         "{source} lives in memory: the kernel copies from it to the pages of the {destination}",
         "mm/shmem.c:shmem_file_read_iter", since=(6, 15)),
    Rule(WRITES, REGISTERED, MEMORY, "copied",
         "{destination} lives in memory: the kernel copies to it from the pages of the {source}",
         "mm/filemap.c:generic_perform_write", since=(6, 15)),
    # O_DIRECT where another layer decides.
    Rule(ANYTHING, OTHER_DIRECT, ANY, "unknown",
         "O_DIRECT on {source} hands the pages to another layer: what it did was not seen",
         "fs/fuse/file.c:fuse_direct_io"),
    Rule(ANYTHING, ANY, OTHER_DIRECT, "unknown",
         "O_DIRECT on {destination} hands the pages to another layer: what it did was not seen",
         "fs/fuse/file.c:fuse_direct_io"),
    # Buffered files.
    Rule(ANYTHING, BY_MOUNT, ANY, "unknown",
         "{source} uses or passes by the page cache, as it is mounted: which was not seen",
         "fs/9p/vfs_file.c:v9fs_file_read_iter"),
    Rule(ANYTHING, ANY, BY_MOUNT, "unknown",
         "{destination} uses or passes by the page cache, as it is mounted: which was not seen",
         "fs/9p/vfs_file.c:v9fs_file_write_iter"),
    Rule(READS, CACHED, USER, "copied",
         "the kernel copies from the page cache to user memory",
         "mm/filemap.c:generic_file_read_iter"),
    Rule(WRITES, USER, CACHED, "copied",
         "the kernel copies from user memory to the page cache",
         "mm/filemap.c:generic_perform_write"),
    Rule(READS, FUSE_CACHED, USER, "copied",
         "the kernel copies from the page cache of {source} to user memory",
         "fs/fuse/file.c:fuse_cache_read_iter"),
    Rule(WRITES, USER, FUSE_CACHED, "copied",
         "the kernel copies from user memory to the page cache of {destination}",
         "fs/fuse/file.c:fuse_cache_write_iter"),
    Rule(SPLICES, GFS2, PIPE, "copied",
         "gfs2 does not lend its page cache to a pipe: the kernel copies into fresh pages",
         "fs/gfs2/file.c:gfs2_file_fops", since=(6, 5)),
    Rule(SPLICES, CACHED, PIPE, "shared",
         "the pipe refers to the file's own page-cache pages",
         "fs/splice.c:generic_file_splice_read", before=(6, 5)),
    Rule(SPLICES, CACHED, PIPE, "shared",
         "the pipe refers to the file's own page-cache pages",
         "mm/filemap.c:filemap_splice_read", since=(6, 5)),
    Rule(SPLICES, FUSE_CACHED, PIPE, "unknown",
         "a FUSE file lends its page cache, or has none (direct_io): which was not seen",
         "fs/fuse/file.c:fuse_file_operations"),
    Rule(COPY_FILE_RANGE, PIPE, CACHED, "copied",
         "{destination} has no reflink: the kernel splices through a pipe and copies",
         "fs/read_write.c:vfs_copy_file_range"),
    Rule(COPY_FILE_RANGE, PIPE, MEMORY, "copied",
         "{destination} has no reflink: the kernel splices through a pipe and copies",
         "fs/read_write.c:vfs_copy_file_range"),
    Rule(SPLICES, PIPE, CACHED, "copied",
         "no file takes pages from a pipe: the kernel copies them to the page cache",
         "fs/splice.c:iter_file_splice_write"),
    Rule(SPLICES, PIPE, MEMORY, "copied",
         "no file takes pages from a pipe: the kernel copies them to the file's own",
         "fs/splice.c:iter_file_splice_write"),
    Rule(SPLICES, PIPE, FUSE_CACHED, "copied",
         "no file takes pages from a pipe: the kernel copies them to the page cache",
         "fs/fuse/file.c:fuse_file_operations"),
    # FUSE files that the kernel reads and writes another file for, without the server (6.9).
    Rule(READS, PASSTHROUGH, USER, "copied",
         "the kernel copies from the page cache of the backing file to user memory",
         "fs/fuse/passthrough.c:fuse_passthrough_read_iter", since=(6, 9)),
    Rule(WRITES, USER, PASSTHROUGH, "copied",
         "the kernel copies from user memory to the page cache of the backing file",
         "fs/fuse/passthrough.c:fuse_passthrough_write_iter", since=(6, 9)),
    Rule(SPLICES, PASSTHROUGH, PIPE, "unknown",
         "the backing file lends its page cache as its own file system does: which was not seen",
         "fs/fuse/passthrough.c:fuse_passthrough_splice_read", since=(6, 9)),
    Rule(SPLICES, PIPE, PASSTHROUGH, "copied",
         "no file takes pages from a pipe: the kernel copies them to the backing file's page cache",
         "fs/fuse/passthrough.c:fuse_passthrough_splice_write", since=(6, 9)),
    # Files without a page cache.
    Rule(READS, GENERATED, USER, "copied",
         "the kernel makes the bytes of {source} as they are read",
         "drivers/char/mem.c:read_iter_zero"),
    Rule(WRITES, USER, GENERATED, "copied",
         "the kernel copies from user memory for {destination} to read",
         "fs/kernfs/file.c:kernfs_fop_write_iter"),
    Rule(SPLICES, GENERATED, PIPE, "copied",
         "{source} has no page cache: the kernel makes its bytes in fresh pages",
         "fs/splice.c:copy_splice_read", since=(6, 5)),
    Rule(SPLICES, GENERATED, PIPE, "copied",
         "{source} has no page cache: the kernel makes its bytes in fresh pages",
         "fs/splice.c:generic_file_splice_read", before=(6, 5)),
    Rule(SPLICES, TTY, PIPE, "copied",
         "the tty layer copies through a buffer of its own into fresh pages: twice",
         "drivers/tty/tty_io.c:iterate_tty_read", bounces=1),
    Rule(READS, MESSAGES, USER, "copied",
         "the kernel copies to user memory",
         "lib/iov_iter.c:_copy_to_iter"),
    Rule(WRITES, USER, MESSAGES, "copied",
         "the kernel copies from user memory",
         "fs/eventfd.c:eventfd_write"),
    # Pipes.
    Rule(READS, PIPE, USER, "copied",
         "the kernel copies from the pipe to user memory",
         "fs/pipe.c:pipe_read"),
    Rule(WRITES, USER, PIPE, "copied",
         "the kernel copies from user memory to pages of the pipe",
         "fs/pipe.c:pipe_write"),
    Rule(SPLICE, PIPE, PIPE, "moved",
         "the pages went from pipe to pipe",
         "fs/splice.c:splice_pipe_to_pipe"),
    Rule(SENDFILE, PIPE, PIPE, "copied",
         "sendfile to a pipe writes the pages into it: the kernel copies",
         "fs/splice.c:iter_file_splice_write", leg=1, before=(5, 12)),
    Rule(SENDFILE, PIPE, PIPE, "moved",
         "sendfile puts the pages straight into the pipe",
         "fs/read_write.c:do_sendfile", leg=1, since=(5, 12)),
    Rule(TEE, PIPE, PIPE, "shared",
         "both pipes refer to the same pages",
         "fs/splice.c:link_pipe"),
    Rule(VMSPLICE, USER, PIPE, "shared",
         "the pipe refers to the caller's own pages",
         "fs/splice.c:vmsplice_to_pipe"),
    Rule(VMSPLICE, PIPE, USER, "copied",
         "vmsplice out of a pipe copies to user memory",
         "fs/splice.c:vmsplice_to_user"),
    # FUSE servers.
    Rule(READS, FUSE_DEVICE, USER, "copied",
         "the kernel copies the request to the server's memory",
         "fs/fuse/dev.c:fuse_dev_read"),
    Rule(WRITTEN_REPLY, USER, FUSE_DEVICE, "copied",
         "a reply from memory is copied: libfuse splices only if FUSE_CAP_SPLICE_WRITE is wanted",
         "fs/fuse/dev.c:fuse_dev_write"),
    Rule(RING_COMMAND, FUSE_DEVICE, USER, "copied",
         "the kernel copies the request's arguments to the server's payload buffer",
         "fs/fuse/dev_uring.c:fuse_uring_copy_to_ring", since=(6, 14)),
    Rule(SPLICED_REPLY, PIPE, FUSE_DEVICE, "unknown",
         "a spliced reply is moved page by page where possible, else copied: which was not seen",
         "fs/fuse/dev.c:fuse_dev_splice_write"),
    Rule(SPLICE, FUSE_DEVICE, PIPE, "unknown",
         "a request's pages are lent to the pipe, its headers copied: the parts were not seen",
         "fs/fuse/dev.c:fuse_dev_splice_read"),
    # ublk servers that copy by themselves (UBLK_F_USER_COPY, 6.5).
    Rule(READS, UBLK_DEVICE, USER, "copied",
         "the kernel copies from the request's pages to the server's memory",
         "drivers/block/ublk_drv.c:ublk_ch_read_iter", since=(6, 5)),
    Rule(WRITES, USER, UBLK_DEVICE, "copied",
         "the kernel copies from the server's memory to the request's pages",
         "drivers/block/ublk_drv.c:ublk_ch_write_iter", since=(6, 5)),
    # Crypto sockets.
    Rule(RECEIVES, AF_ALG, USER, "copied",
         "the cipher writes its output to user memory",
         "crypto/algif_skcipher.c:_skcipher_recvmsg"),
    Rule(SENDS, USER, AF_ALG, "unknown",
         "a cipher copies what it is sent, a hash reads it in place: which this is was not seen",
         "crypto/af_alg.c:af_alg_sendmsg"),
    Rule(SPLICES, PIPE, AF_ALG, "unknown",
         "a hash reads the pipe's pages in place, a cipher does or copies, by release: not seen",
         "crypto/af_alg.c:af_alg_sendmsg"),
    # Sockets.
    Rule(RECEIVES, SOCKET, USER, "copied",
         "the error queue's data is copied to user memory",
         "net/core/sock.c:sock_recv_errqueue", flags=frozenset({"errqueue"})),
    Rule(RECEIVES, TCP, USER, "discarded",
         "MSG_TRUNC: tcp drops the data unread",
         "net/ipv4/tcp.c:tcp_recvmsg", flags=frozenset({"trunc"})),
    Rule(RECEIVES, SOCKET, USER, "unknown",
         "MSG_TRUNC: what fits was copied, the rest dropped: the parts were not seen",
         "net/ipv4/udp.c:udp_recvmsg", flags=frozenset({"trunc"})),
    Rule(RECEIVES, SOCKET, USER, "copied",
         "MSG_PEEK: the data is copied now, and again when it is received",
         "net/core/datagram.c:skb_copy_datagram_iter", flags=frozenset({"peek"})),
    Rule(RECEIVES, SOCKET, USER, "copied",
         "the kernel copies from socket buffers to user memory",
         "net/core/datagram.c:skb_copy_datagram_iter"),
    Rule(RECV_ZC, SOCKET, USER, "unknown",
         "the device fills the receiver's memory, or the kernel copies to it: which was not seen",
         "io_uring/zcrx.c:io_zcrx_recv_skb", since=(6, 15)),
    Rule(SENDS, USER, SOCKET, "copied",
         "the loopback device hands the data to a local socket, which makes the kernel copy it",
         "include/linux/skbuff.h:skb_orphan_frags_rx", flags=frozenset({"zerocopy", "loopback"})),
    Rule(SENDS, USER, SOCKET, "shared",
         "the socket buffers refer to the caller's own pages",
         "net/core/datagram.c:__zerocopy_sg_from_iter", flags=frozenset({"zerocopy"})),
    Rule(SENDS, USER, SOCKET, "copied",
         "the kernel copies from user memory to socket buffers",
         "net/ipv4/tcp.c:tcp_sendmsg_locked"),
    Rule(SPLICES, PIPE, TCP, "shared",
         "the socket buffers refer to the pages of the pipe",
         "fs/splice.c:generic_splice_sendpage", before=(6, 5)),
    Rule(SPLICES, PIPE, TCP, "shared",
         "the socket buffers refer to the pages of the pipe",
         "fs/splice.c:splice_to_socket", since=(6, 5)),
    Rule(SPLICES, PIPE, UDP, "unknown",
         "udp over IPv4 shares the pages of the pipe, over IPv6 copies them: which was not seen",
         "net/ipv6/af_inet6.c:inet6_dgram_ops", before=(6, 5)),
    Rule(SPLICES, PIPE, UDP, "shared",
         "the socket buffers refer to the pages of the pipe",
         "fs/splice.c:splice_to_socket", since=(6, 5)),
    Rule(SPLICES, PIPE, UNIX, "shared",
         "the buffers of a unix stream socket refer to the pages of the pipe",
         "net/unix/af_unix.c:unix_stream_sendpage", before=(6, 5)),
    Rule(SPLICES, PIPE, UNIX, "shared",
         "the buffers of a unix stream socket refer to the pages of the pipe",
         "net/unix/af_unix.c:unix_stream_sendmsg", since=(6, 5)),
    Rule(SPLICE, TCP, PIPE, "shared",
         "the pipe refers to the pages of the socket buffers",
         "net/ipv4/tcp.c:tcp_splice_read"),
    Rule(SPLICE, UDP, PIPE, "copied",
         "udp does not lend its buffers to a pipe: the kernel copies into fresh pages",
         "net/socket.c:sock_splice_read"),
    Rule(SPLICE, UNIX, PIPE, "unknown",
         "unix sockets lend the pipe large messages and copy small ones: the parts were not seen",
         "net/core/skbuff.c:__skb_splice_bits"),
    # Another process.
    Rule(PROCESS_VM, USER, USER, "copied",
         "the kernel copies from one process's memory to the other's",
         "mm/process_vm_access.c:process_vm_rw_pages"),
)
# fmt: on

#: What a comparison of pages says, by outcome and by the ends that were compared.
_SEEN: tuple[tuple[str, Ends, Ends, str], ...] = (
    ("shared", PIPE, PIPE, "both pipes hold the same pages"),
    ("shared", USER, PIPE, "the pages in the pipe are the caller's own"),
    ("shared", SOCKET, PIPE, "the pages in the pipe are those of the socket buffers"),
    ("shared", ANY, PIPE, "the pages in the pipe are the file's own page-cache pages"),
    ("shared", PIPE, SOCKET, "the socket buffers hold the pages that were in the pipe"),
    ("shared", USER, SOCKET, "the socket buffers hold the caller's own pages"),
    ("shared", ANY, SOCKET, "the socket buffers hold the file's own pages"),
    ("shared", ANY, ANY, "both ends hold the same pages"),
    ("moved", PIPE, PIPE, "the pages went from pipe to pipe"),
    ("moved", ANY, FUSE_DEVICE, "the pages of the pipe became the FUSE file's page cache"),
    ("moved", ANY, ANY, "the destination has the very pages that the source had"),
    ("copied", ANY, ANY, "the two ends hold different pages"),
    ("direct", ANY, ANY, "no page cache holds the pages: the device filled or drained them"),
    ("remapped", ANY, ANY, "no page was read or written: the file shares extents"),
    ("discarded", ANY, ANY, "the data was dropped unread"),
    ("unknown", ANY, ANY, "the pages were looked at and do not tell"),
)


def table_markdown() -> str:
    """The table of rules and the names it uses, as docs/metrics.md shows them."""
    head = (
        "| operations | leg | from | to | flags | kernels | disposition | copies | why | source |"
    )
    return "\n".join(
        [
            head,
            "|" + " --- |" * head.count("| "),
            *(_row(rule) for rule in RULES),
            "",
            "| operations | are |",
            "| --- | --- |",
            *(
                f"| {o.name} | {', '.join(f'`{n}`' for n in sorted(o.names))} |"
                for o in _OPERATIONS
            ),
            "",
            "| from, to | is |",
            "| --- | --- |",
            *(f"| {e.name} | {_members(e)} |" for e in _ENDS),
            "",
        ]
    )


def _row(rule: Rule) -> str:
    ends = " of the call" if rule.whole else ""
    cells = (
        rule.operations.name,
        "any" if rule.leg is None else str(rule.leg),
        rule.source.name + ends,
        rule.destination.name + ends,
        ", ".join(sorted(rule.flags)) or "any",
        _kernels(rule),
        rule.disposition,
        str(rule.copies),
        rule.why,
        rule.kernel_source if rule.kernel_source == "-" else f"`{rule.kernel_source}`",
    )
    return "| " + " | ".join(cells) + " |"


def _kernels(rule: Rule) -> str:
    since = _dotted(rule.since)
    return f"{since} on" if rule.before is None else f"{since} to before {_dotted(rule.before)}"


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _members(ends: Ends) -> str:
    kinds = ", ".join(f"`{k}`" for k in sorted(ends.kinds)) or "any kind"
    direct = {None: "", True: ", with O_DIRECT", False: ", without O_DIRECT"}[ends.direct]
    return kinds + direct + (", DAX" if ends.dax else "")
