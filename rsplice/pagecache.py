# SPDX-License-Identifier: MIT
"""One file as the page cache has it and as the disk has it, looked at without changing either.

The cached bytes come through a mapping, and only of pages that mincore(2) reports: a read(2), even
with RWF_NOWAIT, starts read-ahead where a page is missing (mm/filemap.c:filemap_get_pages, 5.9 on).
They are copied out by process_vm_readv(2): a page that a truncation took away is then a short
count, where touching the mapping would be SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from array import array
from collections.abc import Iterator
from contextlib import suppress

PAGE = mmap.PAGESIZE

#: Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h).
_UPTODATE, _DIRTY, _WRITEBACK, _HEAD, _TAIL = 1 << 3, 1 << 4, 1 << 8, 1 << 15, 1 << 16
_STATE = _UPTODATE | _DIRTY | _WRITEBACK
_HEAD_DISTANCE = 512  # no folio of a page cache is larger than a PMD
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1  # of /proc/self/pagemap

#: Flags of an extent (include/uapi/linux/fiemap.h).
_UNKNOWN, _DELALLOC, _ENCODED, _ENCRYPTED, _UNWRITTEN = 0x2, 0x4, 0x8, 0x80, 0x800
_PACKED = 0x100 | 0x200 | 0x400  # not aligned, inline, tail
_FIEMAP = 0xC020660B
_FIEMAP_HEADER, _FIEMAP_EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQQQIIII")
_EXTENTS = 64

_MADV_RANDOM = 1
_SECTOR = 512
_TMPFS = 0x01021994  # statfs(2)'s type of a memfd, which is mounted nowhere

#: Filesystems without a disk of this machine below them.
# fmt: off
MEMORY = frozenset((
    "tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "proc", "sysfs", "cgroup", "cgroup2", "debugfs",
    "tracefs", "securityfs", "bpf", "pstore", "configfs", "efivarfs", "mqueue", "devpts",
    "binfmt_misc", "selinuxfs", "fusectl", "autofs", "nsfs", "rpc_pipefs",
))
NETWORK = frozenset((
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "ncpfs", "coda",
    "gfs2", "ocfs2", "virtiofs",
))
# fmt: on

_LOWEST_BIT = bytes(value & 1 for value in range(256))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class Unchecked(Exception):
    """Something cannot be checked; the message says why."""


class FromCache(Unchecked):
    """The filesystem has answered a read of the disk from the page cache, or the file was changed
    between the look at its extents and the read."""


class Unreadable(Unchecked):
    """One of the blocks cannot be read."""


class Kind:
    """What a page has on disk."""

    ZERO = 0  #: nothing: a hole, or blocks that were never written, which read as zeros
    DATA = 1  #: blocks
    LATER = 2  #: nothing yet: it waits for its place (delayed allocation)
    COMPRESSED = 3
    ENCRYPTED = 4
    PACKED = 5
    UNKNOWN = 6


#: Why pages of a kind have no blocks to compare them with.
REFUSED = {
    Kind.COMPRESSED: "compressed: no block holds a page's bytes as they are",
    Kind.ENCRYPTED: "encrypted: no block holds a page's bytes as they are",
    Kind.PACKED: "inline: the bytes lie among the filesystem's own data",
    Kind.UNKNOWN: "the filesystem does not know where the blocks are",
}


def kind_of(flags: int) -> int:
    """The kind of the pages of an extent with these flags of FIEMAP."""
    for flag, kind in (
        (_ENCODED, Kind.COMPRESSED),
        (_ENCRYPTED, Kind.ENCRYPTED),
        (_PACKED, Kind.PACKED),
        (_DELALLOC, Kind.LATER),
        (_UNKNOWN, Kind.UNKNOWN),
        (_UNWRITTEN, Kind.ZERO),
    ):
        # An encrypted or inline extent may be marked encoded as well: the narrower word is said.
        if flags & flag and not (flag == _ENCODED and flags & (_ENCRYPTED | _PACKED)):
            return kind
    return Kind.DATA


def busy(flags: int) -> bool:
    """Whether a page with these kpageflags is being written or read: it may rightly differ."""
    return bool(flags & (_DIRTY | _WRITEBACK)) or not flags & _UPTODATE


class Kernel:
    """The files below /proc that tell of page frames; opened once.

    :raises Unchecked: they may not be read
    """

    def __init__(self) -> None:
        try:
            self._flags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
            self._map = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unchecked(
                f"{error.filename}: {error.strerror}: clean pages cannot be told from dirty ones "
                "without it; it needs root (CAP_SYS_ADMIN)"
            ) from error

    def frames(self, address: int, count: int) -> list[int]:
        """The page frames of *count* mapped pages from *address* on; 0 where none is mapped."""
        entries = array("Q", os.pread(self._map, 8 * count, address // PAGE * 8))
        return [entry & _FRAME if entry & _PRESENT else 0 for entry in entries]

    def flags(self, frames: list[int]) -> list[int]:
        """The kpageflags of each of *frames*; 0, which is not even up to date, for frame 0."""
        found: list[int] = []
        while len(found) < len(frames):
            begin = len(found)
            end = begin + 1
            while end < len(frames) and frames[end] == frames[end - 1] + 1:
                end += 1
            found += self._flags_from(frames[begin], end - begin) if frames[begin] else [0]
        return self._as_folios(frames, found)

    def _as_folios(self, frames: list[int], flags: list[int]) -> list[int]:
        """*flags* with those of its folio for each tail page.

        Before 6.10 a tail page does not show them (fs/proc/page.c:stable_page_flags).
        """
        states = flags.copy()
        for number, frame in enumerate(frames):
            if not flags[number] & _TAIL:
                continue
            before = number - 1
            if before >= 0 and frames[before] == frame - 1 and flags[before] & (_HEAD | _TAIL):
                states[number] |= states[before] & _STATE
            else:
                states[number] |= self._of_head(frame)
        return states

    def _flags_from(self, frame: int, count: int) -> list[int]:
        flags = array("Q", os.pread(self._flags, 8 * count, 8 * frame))
        return [*flags, *[0] * (count - len(flags))]

    def _of_head(self, frame: int) -> int:
        """The state of the folio that the tail page *frame* is in."""
        first = max(0, frame - _HEAD_DISTANCE)
        for flags in reversed(self._flags_from(first, frame - first)):
            if flags & _HEAD:
                return flags & _STATE
            if not flags & _TAIL:
                break
        return _DIRTY  # it has just been split or freed: nothing is known


class Buffer:
    """Page-aligned zeros, all of them in memory.

    btrfs answers an O_DIRECT read into pages that have yet to be faulted in from the page cache
    (fs/btrfs/direct-io.c:btrfs_direct_read).
    """

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.memory.write(bytes(size))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def page(self, number: int) -> bytes:
        return self.memory[number * PAGE : (number + 1) * PAGE]


def same(first: Buffer, second: Buffer, offset: int, length: int) -> bool:
    """Whether *length* bytes at *offset* of both are the same."""
    at = ctypes.c_void_p(first.address + offset), ctypes.c_void_p(second.address + offset)
    return not _libc.memcmp(*at, ctypes.c_size_t(length))


class Window:
    """A part of a file, mapped. Only pages that are resident are touched."""

    def __init__(self, fd: int, offset: int, pages: int) -> None:
        self.pages = pages
        shared_read = (mmap.PROT_READ, mmap.MAP_SHARED)
        length = ctypes.c_size_t(pages * PAGE)
        address = _libc.mmap(None, length, *shared_read, fd, ctypes.c_long(offset))
        if address in (None, ctypes.c_void_p(-1).value):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.address: int = address
        # No read-ahead, should a page leave the cache before it is touched.
        _libc.madvise(ctypes.c_void_p(address), length, _MADV_RANDOM)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.pages * PAGE))

    def resident(self) -> bytes:
        """One byte a page: 1 if it is cached and up to date."""
        states = ctypes.create_string_buffer(self.pages)
        length = ctypes.c_size_t(self.pages * PAGE)
        if _libc.mincore(ctypes.c_void_p(self.address), length, states):
            return bytes(self.pages)
        return states.raw.translate(_LOWEST_BIT)

    def copy(self, first: int, count: int, to: Buffer) -> int:
        """Copies *count* cached pages from *first* on to their places; how many there were."""
        at, one = first * PAGE, ctypes.c_ulong(1)
        local = _Vector(to.address + at, count * PAGE)
        remote = _Vector(self.address + at, count * PAGE)
        got = _libc.process_vm_readv(
            os.getpid(), ctypes.byref(local), one, ctypes.byref(remote), one, ctypes.c_ulong(0)
        )
        return max(0, int(got)) // PAGE


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class CachedFile:
    """A regular file, open for looking: no access time changes, no lease is waited for.

    :param path: where it is; a link of /proc/PID/map_files will do
    :raises Unchecked: it cannot be looked at
    """

    def __init__(self, path: str | bytes) -> None:
        self._direct: int | None = None
        self.fd = _open_regular(path)
        try:
            self.filesystem = _filesystem(self.fd)
            self.refused = self._refused()
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> CachedFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        if self._direct is not None:
            os.close(self._direct)

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    @property
    def stamp(self) -> tuple[int, int, int]:
        """What differs once the file was written or cut; the kernel's clock is coarse."""
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @property
    def in_memory(self) -> bool:
        """Whether there is no disk below."""
        return self.filesystem in MEMORY

    def _refused(self) -> str | None:
        """Why no page of this file can be compared, None if it can be tried."""
        kind = self.filesystem
        if _is_swap(self.fd):
            return "in use as swap, which is written around the page cache"
        if self.in_memory:
            return f"{kind} has no disk below it"
        if kind in NETWORK or kind.startswith("fuse"):
            return f"{kind}: what it caches is another's to change"
        try:
            flags = os.O_RDONLY | os.O_DIRECT | os.O_NOATIME | os.O_NONBLOCK | os.O_CLOEXEC
            self._direct = os.open(f"/proc/self/fd/{self.fd}", flags)
            list(self.extents(0, PAGE))
        except OSError as error:
            what = "FIEMAP" if self._direct is not None else "O_DIRECT"
            return f"{kind} has no {what} ({error.strerror})"
        return None

    def cached(self, offset: int, pages: int) -> bool:
        """Whether any page of a range is cached.

        cachestat(2) will not do: of a file of overlayfs it sees none, they are another file's.
        """
        with self.window(offset, pages) as window:
            return 1 in window.resident()

    def window(self, offset: int, pages: int) -> Window:
        return Window(self.fd, offset, pages)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The extents in a range, as (begin, end, kind). OSError.

        Without FIEMAP_FLAG_SYNC, which would write dirty pages out.
        """
        end, seen = offset + length, offset
        while seen < end:
            request = bytearray(_FIEMAP_HEADER.size + _EXTENTS * _FIEMAP_EXTENT.size)
            _FIEMAP_HEADER.pack_into(request, 0, seen, end - seen, 0, 0, _EXTENTS, 0)
            fcntl.ioctl(self.fd, _FIEMAP, request)
            count = _FIEMAP_HEADER.unpack_from(request)[3]
            for number in range(count):
                at = _FIEMAP_HEADER.size + number * _FIEMAP_EXTENT.size
                begin, _, size, _, _, flags, *_ = _FIEMAP_EXTENT.unpack_from(request, at)
                yield begin, begin + size, kind_of(flags)
                seen = max(seen, begin + size)
            if count < _EXTENTS:
                return

    def disk(self, offset: int, length: int, written: int, to: Buffer, at: int) -> int:
        """Reads the disk, around the page cache, to *at* in *to*; the bytes there were.

        :param length: the bytes that are wanted; the rest of the last page is read as well
        :param written: how many of these are on disk; at least so many must have been read
            from it, or else the filesystem has answered from the page cache
        :raises FromCache: less was read from the disk
        :raises Unreadable: the disk, or its checksums, forbid it
        :raises Unchecked: it cannot be read so
        """
        assert self._direct is not None
        before = _read_from_disk()
        try:
            whole = memoryview(to.memory)[at : at + -(-length // PAGE) * PAGE]
            got = os.preadv(self._direct, [whole], offset)
        except OSError as error:
            why = f"{self.filesystem} does not read the disk around the page cache"
            if error.errno == errno.EIO:
                raise Unreadable("the disk cannot be read, or a checksum is wrong") from error
            raise Unchecked(f"{why} ({error.strerror})") from error
        # Sectors that are wanted in part are read whole: less than a sector is no evidence.
        if got >= length and _read_from_disk() - before < written - written % _SECTOR:
            raise FromCache(f"{self.filesystem} answers O_DIRECT reads of it from the page cache")
        return got


def _read_from_disk() -> int:
    """The bytes that this thread has had read from disks."""
    try:
        with open("/proc/thread-self/io", "rb", buffering=0) as file:
            return int(file.read(4096).partition(b"\nread_bytes: ")[2].split()[0])
    except (OSError, IndexError) as error:
        why = "this kernel does not count what is read from disks (CONFIG_TASK_IO_ACCOUNTING)"
        raise Unchecked(why) from error


def _open_regular(path: str | bytes) -> int:
    """Opens *path* if it is a regular file: opening a device may do something to it."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise Unchecked(getattr(error, "strerror", None) or "no such name is possible") from error
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise Unchecked("not a regular file")
        flags = os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{place}", flags)
    except OSError as error:
        lease = error.errno == errno.EWOULDBLOCK
        why = "another process has a lease on it" if lease else error.strerror
        raise Unchecked(f"it cannot be opened: {why}") from error
    finally:
        os.close(place)


def _is_swap(fd: int) -> bool:
    with suppress(OSError), open("/proc/swaps", "rb") as file:
        for line in file.readlines()[1:]:
            name = line.split()[0].decode("unicode_escape").encode("latin-1")
            with suppress(OSError):
                if os.path.samestat(os.stat(name), os.fstat(fd)):
                    return True
    return False


def _filesystem(fd: int) -> str:
    """The type of the filesystem that *fd* is on. "unknown" for one that is mounted nowhere."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        number = next((line.split()[1] for line in file if line.startswith("mnt_id:")), "")
    for mount, _, kind in mounts():
        if mount == number:
            return kind
    status = (ctypes.c_long * 32)()
    tmpfs = not _libc.fstatfs(fd, status) and status[0] == _TMPFS
    return "tmpfs" if tmpfs else "an unmounted filesystem"


def mounts() -> list[tuple[str, bytes, str]]:
    """The id, the mount point and the filesystem's type of each mount that this process sees."""
    with open("/proc/self/mountinfo", "rb") as file:
        lines = [line.partition(b" - ") for line in file]
    found = []
    for left, _, right in lines:
        words = left.split(b" ")
        point = words[4].decode("unicode_escape").encode("latin-1")
        found.append((words[0].decode(), point, right.split(b" ")[0].decode(errors="replace")))
    return found
