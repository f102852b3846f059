# SPDX-License-Identifier: MIT
"""Findings that the BPF programs have added up (bpf/findings.h), as what an audit says of them.

Also what those programs must be told first: the addresses of the kernel's tables of pipe buffer
operations, by which they tell the classes of buffers. No file shows them on every kernel, so one
buffer of each class is made here, and looked at.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cffi import FFI

from rsplice.audit import Finding, MissingProbe
from rsplice.tracers import operations
from rsplice.tracers.program import BpfError, Map, Program

# bpf/judgements.h
NAMES = (
    "", "steal-refused", "gift-still-mapped", "truncated-in-flight", "changed-in-flight",
    "stranded", "merge-flag-on-page-cache", "shared-frag-lost", "published-while-mapped",
    "published-while-referenced", "published-activated", "double-owner", "leaked",
    "stale-content-exposed",
)  # fmt: skip
CLASSES = ("anonymous", "page cache", "user memory", "filled for splice", "no-steal")
#: When the page of a finding was looked at (enum moment of bpf/judgements.h).
MOMENTS = ("snapshot", "at the steal", "at the insert", "at the map")
_USER_CLASS = CLASSES.index("user memory")
_CACHE_CLASS = CLASSES.index("page cache")
# bpf/findings.h
_KEY = struct.Struct("=QQQIIII")
_VALUE = struct.Struct("=QQQ QQQIiIIIIII QQII32s QI4x16s 16sI4x")
LEARNED = struct.Struct("=QQQ")
_PAGE = 4096

#: Entries of the map of findings, of that of replies under way, of that of
#: queued contents, and of that of files to be verified.
SIZES = {"MAX_FINDINGS": 2048, "MAX_OFFERS": 128, "MAX_CONTENTS": 16384, "MAX_LENT": 4096}


@dataclass(frozen=True)
class Meaning:
    """What a finding, or a reason of it, means to a user."""

    kind: str
    expected: str
    advice: str
    reason: str = ""


_MOVE_EXPECTED = "the page is moved, not copied"


def _missed(reason: str, advice: str) -> Meaning:
    return Meaning("missed move", _MOVE_EXPECTED, advice, reason)


#: Why pages were not moved, and what else a finding's name leaves open, in the order of enum
#: reason; "{}" is the destination.
REASONS = (
    None,
    _missed(
        "still mapped",
        "The page is in a page table: unmap it before the splice, or read with O_DIRECT into the "
        "pipe.",
    ),
    _missed(
        "extra reference",
        "Somebody else refers to the page: splice from a pipe that was not tee()d, and close or "
        "drain its copy first.",
    ),
    _missed(
        "swap-backed",
        "Anonymous, shmem and memfd pages never enter a FUSE page cache, SPLICE_F_GIFT or not: "
        "splice from a file opened with O_DIRECT, or write(2) whole pages into the pipe.",
    ),
    _missed("dirty", "The page is not written back yet: fsync(2) the source first."),
    _missed(
        "large folio",
        "Only single pages are moved, and the source's page cache keeps larger ones: open the "
        "source with O_DIRECT and splice from that, which gives fresh single pages.",
    ),
    _missed(
        "not yet on the LRU",
        "The page was read in just now and waits in a batch of its CPU, which refers to it: open "
        "the source with O_DIRECT and splice from that.",
    ),
    _missed(
        "partial page",
        "Only whole pages are moved: fill each pipe buffer with a full page.",
    ),
    _missed(
        "payload at an odd offset",
        "Only whole pages are moved: start each splice into the pipe at a multiple of 4096 in the "
        "source.",
    ),
    _missed(
        "no-steal buffer",
        "Pages of a socket are never given away: read(2) from it into aligned memory, or use "
        "librsplice's recvpage.",
    ),
    _missed(
        "not a gift",
        "vmsplice(2) without SPLICE_F_GIFT keeps the memory the caller's, and FUSE takes no "
        "anonymous pages even as a gift: splice from a file opened with O_DIRECT.",
    ),
    _missed(
        "the page has left its file",
        "The file was truncated, or the page evicted, while it waited in the pipe: splice again.",
    ),
    _missed(
        "direct_io",
        "FOPEN_DIRECT_IO (or the client's O_DIRECT) goes past the client's page cache, so there is "
        "none to move pages into: leave the flag out (libfuse: direct_io = 0).",
    ),
    _missed(
        "large folio of the client",
        "The client's page cache waits for more than a single page: only single pages are moved.",
    ),
    _missed(
        "header shares a buffer with payload",
        "Write the 16 bytes of the reply's header into the pipe by themselves, before the payload.",
    ),
    _missed(
        "payload not aligned to buffers",
        "A buffer before was no whole page, so that no page begins with a buffer: fill each pipe "
        "buffer with a full page.",
    ),
    _missed(
        "partial page",
        "The last page of a file that does not end with a page is always copied; nothing to do.",
    ),
    _missed(
        "notification",
        "FUSE_NOTIFY_STORE always copies: let the kernel ask with READ, and splice the reply.",
    ),
    _missed(
        "a destination that never moves pages",
        "Writing into a file of {} copies whatever the flag says (iter_file_splice_write, "
        "fs/splice.c): SPLICE_F_MOVE has an effect into a FUSE READ reply alone. Use "
        "copy_file_range(2), O_DIRECT on both files, or FUSE passthrough.",
    ),
    Meaning(
        "violation",
        "a page that librsplice offers for a move (SPLICE_F_MOVE) is in no page table",
        "Unmap gifted memory before it is published: its old owner can still write to it.",
        "offered by librsplice",
    ),
    Meaning(
        "hazard",
        "queued memory does not change until it is read",
        "The sender can still write to memory that it has vmspliced, and the reader would see "
        "it. That is legal, and libfuse relies on it: leave the buffer alone until the reader is "
        "done.",
        "could change",
    ),
    Meaning(
        "hazard",
        "a queued page does not change until it is read",
        "The reader gets other bytes than were queued: do not write to memory that was "
        "vmspliced, or to a file that was spliced, before the reader is done; or write(2) a copy.",
        "did change",
    ),
    Meaning(
        "hazard",
        "a page given with SPLICE_F_GIFT is not written to any more",
        "What is written to a gift reaches its reader: unmap gifted memory, or do not touch it "
        "again.",
        "written later",
    ),
    Meaning(
        "hazard",
        "a queued page does not change until it is read",
        "While the page waited in a pipe, its file was mapped with MAP_SHARED and PROT_WRITE: what "
        "is written there before the reader is done, the reader gets. Wait with it, or write(2) a "
        "copy into the pipe.",
        "mapped to be written to",
    ),
    _missed(
        "not known",
        "Nothing forbade the move, neither before the reply nor after it: somebody referred to the "
        "page for a moment, as a lookup does. Where they are many, please report it with the "
        "kernel's release.",
    ),
)  # fmt: skip

_HAZARDS = {
    "gift-still-mapped": Meaning(
        "hazard",
        "a page given with SPLICE_F_GIFT is in no page table any more",
        "Unmap gifted memory, or do not touch it again: what is written later reaches the reader.",
    ),
    "truncated-in-flight": Meaning(
        "hazard",
        "a queued page belongs to its file until it is read",
        "The file was truncated or the page invalidated meanwhile: the reader gets what was "
        "there before. Lock the file, or copy.",
    ),
    "stranded": Meaning(
        "hazard",
        "a pipe is empty when its last reader exits",
        "Drain the pipe before exit: what is left in it is lost to everybody.",
    ),
}


def _violation(expected: str) -> Meaning:
    return Meaning(
        "violation",
        expected,
        "The kernel broke an invariant: its page cache may be corrupt. Keep the report, update "
        "the kernel, and compare files with rsplice verify.",
    )


_VIOLATIONS = {
    "merge-flag-on-page-cache": _violation("no writer may append to a page of a page cache"),
    "shared-frag-lost": _violation("a packet that holds page-cache pages says so"),
    "published-while-mapped": _violation("a page that enters a page cache is in no page table"),
    "published-while-referenced": _violation("a page that enters a page cache is nobody else's"),
    "published-activated": _violation(
        "a page that enters a page cache is not dirty, under writeback or swap-backed"
    ),
    "double-owner": _violation("a page is in one page cache at a time"),
    "leaked": Meaning(
        "violation",
        "what a call of librsplice has reserved is published or aborted before its thread exits",
        "A way out of the call forgets its pages: publish or abort on every one of them.",
    ),
    "stale-content-exposed": Meaning(
        "violation",
        "what lies behind the bytes that a page was filled with is zero",
        "Others can read what is left in the page: clear the rest of it before it is published.",
    ),
}
_MEANINGS = _HAZARDS | _VIOLATIONS


def meaning(name: str, reason: int, destination: str) -> Meaning:
    """What a finding means.

    :param reason: as in enum reason, 0 for none
    :param destination: where the bytes went, as a user names it
    """
    if not reason:
        return _MEANINGS[name]
    known = REASONS[reason] if reason < len(REASONS) else None
    known = known or REASONS[-1]
    assert known is not None
    return replace(known, advice=known.advice.format(destination))


@dataclass(frozen=True)
class Process:
    """Who a finding is about."""

    pid: int
    comm: str


class Findings:
    """The findings of one run.

    :param program: the compiled programs, which own the map
    :param kind: names an end (bpf/ends.h)
    :param constants: of the layout
    :param vmemmap: the address of the first struct page; None where it is not known
    """

    def __init__(
        self,
        program: Program,
        kind: Callable[[int], str],
        constants: Mapping[str, int],
        vmemmap: int | None,
    ) -> None:
        self.map = program.map("findings")
        self._kind = kind
        self._constants = constants
        self._vmemmap = vmemmap
        self._began = time.monotonic_ns()
        self._paths: dict[tuple[int, int], str] = {}  # of files seen by device and inode

    def read(
        self, processes: Mapping[int, Process], of: Container[int] | None = None
    ) -> list[Finding]:
        """All findings so far, or those of the processes *of*, each with its count."""
        return [
            self._finding(key, values[0], processes)
            for key, values in self.map.items()
            if of is None or _KEY.unpack(key)[0] in of
        ]

    def _finding(self, key: bytes, value: bytes, processes: Mapping[int, Process]) -> Finding:
        process, source, destination, number, reason, via, _ = _KEY.unpack(key)
        count, first, last, *seen = _VALUE.unpack(value)
        name = NAMES[number]
        means = meaning(name, reason, self._kind(destination))
        who = processes.get(process, Process(process >> 32, "?"))
        page = _Page(*seen)
        known: dict[str, Any] = {"reason": means.reason} if means.reason else {}
        known |= {"pid": who.pid, "comm": who.comm, "operation": self._operation(key)}
        if (frame := self._frame(page.address)) is not None:
            known["page_frame"] = frame
        if page.inode:
            known["file"] = self._file(page, who.pid)
            if page.is_cached:
                known["file_offset"] = page.index * _PAGE
        if page.mapper:
            known["mapped_by"] = _who(page.mapper, page.mapper_comm)
        if page.deed_time:
            known["by"] = _who(page.deed_pid, page.deed_comm)
            known["since"] = round((page.deed_time - self._began) / 1e9, 6)
        known["moment"] = MOMENTS[page.moment]
        known["time"] = round((first - self._began) / 1e9, 6)
        known["last"] = round((last - self._began) / 1e9, 6)
        known["expected"] = means.expected
        known["seen"] = self._seen(name, means.reason, page)
        return Finding(name, means.kind, count, known, means.advice)

    def _operation(self, key: bytes) -> str:
        _, source, destination, _, _, via, _ = _KEY.unpack(key)
        name = operations.via_name(via)
        if via == operations.VIA_EXIT:
            return f"{name} with a {self._kind(source)} open"
        if via == operations.VIA_CLOSE:
            return f"{name} of a {self._kind(source)}"
        if via == operations.VIA_INSERT:
            return f"{name} into the page cache of {self._kind(destination)}"
        return f"{self._kind(source)} -> {self._kind(destination)} via {name}"

    def _frame(self, address: int) -> int | None:
        if self._vmemmap is None or not address:
            return None
        return (address - self._vmemmap) // self._constants["PAGE_SIZE_OF"]

    def _seen(self, name: str, reason: str, page: _Page) -> str:
        """The state of the page, in words."""
        if name == "leaked":
            return f"{page.length} bytes reserved, neither published nor aborted"
        if name == "stale-content-exposed":
            return f"bytes behind the first {page.offset} of the page are not zero"
        if page.kind < len(CLASSES):
            parts = [f"{CLASSES[page.kind]} buffer of {page.length} bytes at {page.offset}"]
        elif MOMENTS[page.moment] == "at the insert":
            parts = ["a page that is about to enter a page cache"]
        else:
            return "the page was copied"
        parts.append("1 reference" if page.references == 1 else f"{page.references} references")
        parts.append("in a page table" if page.mapcount >= 0 else "in no page table")
        if page.pages > 1:
            parts.append(f"a folio of {page.pages} pages")
        parts += [
            word
            for flag, word in (
                ("LRU", "on the LRU"),
                ("DIRTY", "dirty"),
                ("WRITEBACK", "under writeback"),
                ("SWAPBACKED", "swap-backed"),
            )
            if page.flags >> self._constants[f"PG_{flag}_BIT"] & 1
        ]
        if page.kind == _CACHE_CLASS and not page.mapping:
            parts.append("of no file any more")
        if page.buffer_flags & 0x04:
            parts.append("a gift")
        if page.buffer_flags & 0x10:
            parts.append("may be appended to")
        if reason in ("did change", "written later"):
            parts.append("other content than was queued")
        return ", ".join(parts)

    def _file(self, page: _Page, pid: int) -> str:
        """The path where a process has it open, else its last part, else device and inode."""
        key = (page.device, page.inode)
        if key not in self._paths and (path := _open_path(pid, *key)):
            self._paths[key] = path
        return self._paths.get(key) or page.name or _numbers(*key)


@dataclass(frozen=True)
class _Page:
    """The first occurrence: struct facts, and the file."""

    address: int
    mapping: int
    flags: int
    references: int
    mapcount: int
    pages: int
    kind: int
    buffer_flags: int
    offset: int
    length: int
    moment: int
    inode: int
    index: int
    device: int
    tid: int
    raw_name: bytes
    deed_time: int
    deed_pid: int
    deed_comm: bytes
    mapper_comm: bytes
    mapper: int

    @property
    def is_cached(self) -> bool:
        return bool(self.mapping) and not self.mapping & 3

    @property
    def name(self) -> str:
        name = self.raw_name.split(b"\0")[0].decode(errors="replace")
        return "" if name == "/" else name


def _who(pid: int, comm: bytes) -> str:
    return f"{comm.split(bytes(1))[0].decode(errors='replace')}[{pid}]"


def _numbers(device: int, inode: int) -> str:
    return f"device {device >> 20}:{device & 0xFFFFF} inode {inode}"


def _open_path(pid: int, device: int, inode: int) -> str:
    """The path of a file that process *pid* has open; "" if it has not, or has gone."""
    folder = f"/proc/{pid}/fd"
    number = os.makedev(device >> 20, device & 0xFFFFF)
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            with contextlib.suppress(OSError):
                found = os.stat(f"{folder}/{entry}")
                if (found.st_dev, found.st_ino) == (number, inode):
                    return os.readlink(f"{folder}/{entry}")
    return ""


# --- what the programs must be told ---------------------------------------------------------------


def learn(program: Program, constants: Mapping[str, int]) -> tuple[int | None, list[MissingProbe]]:
    """Tells the programs the classes of buffers.

    :return: the address of the first struct page if it is known, and what could not be learnt
    """
    learned = program.map("learned")
    missing: list[MissingProbe] = []
    tables: list[int] = []
    vmemmap: int | None = None
    for number, name in enumerate(CLASSES):
        page, table, frame = 0, 0, 0
        try:
            with _buffer(number) as (descriptor, address):
                program.run_once("learn_buffer", descriptor, number)
                page, table, _ = LEARNED.unpack(one(learned, number))
                frame = frame_of(address) if address else 0
        except (OSError, BpfError) as error:
            cost = f"findings about {name} buffers are not seen"
            missing.append(MissingProbe(f"{name} buffers", str(error), cost))
        # A table of nobody's: no buffer is of this class.
        tables.append(table or number + 1)
        if number == _USER_CLASS and frame and page:
            vmemmap = page - frame * constants["PAGE_SIZE_OF"]
    if vmemmap is None:
        reason = "/proc/self/pagemap shows none"
        missing.append(MissingProbe("page frame numbers", reason, "findings name no page frame"))
    classes = program.map("buffer_classes")
    classes.put(struct.pack("=I", 0), struct.pack(f"={len(tables)}Q", *tables))
    return vmemmap, missing


def one(learned: Map, number: int) -> bytes:
    return (learned.get(struct.pack("=I", number)) or [bytes(LEARNED.size)])[0]


@contextlib.contextmanager
def _buffer(number: int) -> Iterator[tuple[int, int]]:
    """A pipe whose first buffer is of that class: its descriptor, and where its page is mapped."""
    with contextlib.ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        address = _FILLERS[number](writer, stack)
        yield writer, address


def _fill_anonymous(writer: int, stack: contextlib.ExitStack) -> int:
    return os.write(writer, b"x") - 1


def _fill_cache(writer: int, stack: contextlib.ExitStack) -> int:
    file = os.memfd_create("rsplice", os.MFD_CLOEXEC)
    stack.callback(os.close, file)
    os.write(file, bytes(_PAGE))
    return os.splice(file, writer, _PAGE, offset_src=0) - _PAGE


def _fill_user(writer: int, stack: contextlib.ExitStack) -> int:
    ffi = FFI()
    ffi.cdef("struct iovec { void *base; size_t length; }; long vmsplice(int, void *, long, int);")
    memory = stack.enter_context(contextlib.closing(mmap.mmap(-1, _PAGE)))
    memory[:1] = b"x"
    view = ffi.from_buffer(memory)
    stack.callback(ffi.release, view)
    vector = ffi.new("struct iovec *", (view, _PAGE))
    libc: Any = ffi.dlopen(None)
    if libc.vmsplice(writer, vector, 1, 0) != _PAGE:
        raise OSError(ffi.errno, f"vmsplice: {os.strerror(ffi.errno)}")
    return int(ffi.cast("uintptr_t", view))


def _fill_filled(writer: int, stack: contextlib.ExitStack) -> int:
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, zero)
    try:
        os.splice(zero, writer, _PAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # /dev/zero can be spliced since 6.5 alone (drivers/char/mem.c).
        mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, mounts)
        os.splice(mounts, writer, _PAGE)
    return 0


def _fill_nosteal(writer: int, stack: contextlib.ExitStack) -> int:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    ours.send(b"x")
    return os.splice(theirs.fileno(), writer, _PAGE) - 1


_FILLERS = (_fill_anonymous, _fill_cache, _fill_user, _fill_filled, _fill_nosteal)


def frame_of(address: int) -> int:
    """The page frame that is mapped at *address*; 0 where the kernel does not tell."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // _PAGE * 8)
        (entry,) = struct.unpack("=Q", pagemap.read(8))
    return int(entry & ((1 << 55) - 1)) if entry >> 63 else 0
