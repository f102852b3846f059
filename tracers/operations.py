# SPDX-License-Identifier: MIT
"""The operations that carry payload: system calls and io_uring opcodes, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Shape(IntEnum):
    """Where a system call's two ends stand among its arguments. Known to bpf/syscalls.c."""

    READ = 1  #: fd(arg 0) -> user memory
    WRITE = 2  #: user memory -> fd(arg 0)
    SPLICE = 3  #: fd(arg 0) -> fd(arg 2)
    TEE = 4  #: fd(arg 0) -> fd(arg 1)
    VMSPLICE = 5  #: user memory -> fd(arg 0), or back where fd is a pipe's read end
    SENDFILE = 6  #: fd(arg 1) -> fd(arg 0), two legs
    COPY_FILE_RANGE = 7  #: fd(arg 0) -> fd(arg 2), two legs
    RECVFROM = 8  #: socket(arg 0) -> user memory, flags in arg 3, length in arg 2
    RECVMSG = 9  #: socket(arg 0) -> user memory, flags in arg 2
    RECVMMSG = 10  #: as RECVMSG, returns messages: bytes are in the message headers
    SENDTO = 11  #: user memory -> socket(arg 0), flags in arg 3
    SENDMSG = 12  #: user memory -> socket(arg 0), flags in arg 2
    SENDMMSG = 13  #: as SENDMSG, returns messages
    USER_TO_USER = 14  #: user memory -> user memory
    IOCTL = 15  #: FICLONE and FICLONERANGE
    SOCKETCALL = 16  #: i386 only
    CLOSE = 17  #: carries nothing, but ends what a pipe still holds
    COMMAND = 18  #: a command of io_uring, which FUSE sends requests by


@dataclass(frozen=True)
class Syscall:
    """One system call: its name as strace prints it, its shape and its numbers.

    :param native: its number on x86-64
    :param compat: its number on i386, None where a 32-bit caller has no such call of this kind
    """

    name: str
    shape: Shape
    native: int | None
    compat: int | None


#: arch/x86/entry/syscalls/syscall_{64,32}.tbl
SYSCALLS = (
    Syscall("read", Shape.READ, 0, 3),
    Syscall("write", Shape.WRITE, 1, 4),
    Syscall("pread64", Shape.READ, 17, 180),
    Syscall("pwrite64", Shape.WRITE, 18, 181),
    Syscall("readv", Shape.READ, 19, 145),
    Syscall("writev", Shape.WRITE, 20, 146),
    Syscall("preadv", Shape.READ, 295, 333),
    Syscall("pwritev", Shape.WRITE, 296, 334),
    Syscall("preadv2", Shape.READ, 327, 378),
    Syscall("pwritev2", Shape.WRITE, 328, 379),
    Syscall("splice", Shape.SPLICE, 275, 313),
    Syscall("tee", Shape.TEE, 276, 315),
    Syscall("vmsplice", Shape.VMSPLICE, 278, 316),
    Syscall("sendfile", Shape.SENDFILE, 40, 187),
    Syscall("sendfile64", Shape.SENDFILE, None, 239),
    Syscall("copy_file_range", Shape.COPY_FILE_RANGE, 326, 377),
    Syscall("recvfrom", Shape.RECVFROM, 45, 371),
    Syscall("recv", Shape.RECVFROM, None, 291),
    Syscall("recvmsg", Shape.RECVMSG, 47, 372),
    Syscall("recvmmsg", Shape.RECVMMSG, 299, 337),
    Syscall("sendto", Shape.SENDTO, 44, 369),
    Syscall("sendmsg", Shape.SENDMSG, 46, 370),
    Syscall("sendmmsg", Shape.SENDMMSG, 307, 345),
    Syscall("process_vm_readv", Shape.USER_TO_USER, 310, 347),
    Syscall("process_vm_writev", Shape.USER_TO_USER, 311, 348),
    Syscall("ioctl FICLONE", Shape.IOCTL, 16, None),
    Syscall("ioctl FICLONERANGE", Shape.IOCTL, None, None),
    Syscall("socketcall", Shape.SOCKETCALL, None, 102),
)

#: enum io_uring_op (include/uapi/linux/io_uring.h) -> name and shape
URING_OPS = {
    1: ("readv", Shape.READ),
    2: ("writev", Shape.WRITE),
    4: ("read_fixed", Shape.READ),
    5: ("write_fixed", Shape.WRITE),
    9: ("sendmsg", Shape.SENDMSG),
    10: ("recvmsg", Shape.RECVMSG),
    22: ("read", Shape.READ),
    23: ("write", Shape.WRITE),
    26: ("send", Shape.SENDTO),
    27: ("recv", Shape.RECVFROM),
    30: ("splice", Shape.SPLICE),
    33: ("tee", Shape.TEE),
    46: ("uring_cmd", Shape.COMMAND),
    47: ("send_zc", Shape.SENDTO),
    48: ("sendmsg_zc", Shape.SENDMSG),
    49: ("read_multishot", Shape.READ),
    58: ("recv_zc", Shape.RECVFROM),
    60: ("readv_fixed", Shape.READ),
    61: ("writev_fixed", Shape.WRITE),
}

#: Operation numbers in BPF keys: position in SYSCALLS, or these.
VIA_FUSE_REPLY = 100
VIA_EXIT = 101  #: of findings: the end of a process
VIA_PACKET = 102  #: of findings: a packet that leaves
VIA_CLOSE = 103  #: of findings: the end of a descriptor
VIA_RSPLICE = 104  #: of findings: a call of librsplice
VIA_INSERT = 105  #: of findings: a page enters a page cache
VIA_URING = 128  #: plus the io_uring opcode

_EVENTS = {VIA_EXIT: "exit", VIA_PACKET: "packet", VIA_CLOSE: "close", VIA_RSPLICE: "rsplice",
           VIA_INSERT: "insert"}  # fmt: skip

#: System calls that close a descriptor: arg 0 of the first, arg 1 of the others.
_CLOSING = {"close": 3, "dup2": 33, "dup3": 292}
_EXITS = {"exit": 60, "exit_group": 231}

#: Entries of the kernel's table of calls; x32 calls have bit 30 set and are masked into it.
TABLE_SIZE = 1024


def via_name(via: int) -> str:
    """The name of operation *via* of a BPF key."""
    if via == VIA_FUSE_REPLY:
        return "fuse reply"
    if via in _EVENTS:
        return _EVENTS[via]
    if via >= VIA_URING:
        return f"io_uring {URING_OPS[via - VIA_URING][0]}"
    return SYSCALLS[via].name


#: Marks a table entry of a call that returns messages, not bytes.
MANY_MESSAGES = 1 << 16


def call_table() -> dict[int, int]:
    """System call number -> (via << 8 | shape), native in the low and i386 in the high 32 bits."""
    table: dict[int, int] = {}
    for via, call in enumerate(SYSCALLS):
        entry = via << 8 | call.shape
        if call.shape in (Shape.RECVMMSG, Shape.SENDMMSG):
            entry |= MANY_MESSAGES
        if call.native is not None:
            table[call.native] = table.get(call.native, 0) | entry
        if call.compat is not None:
            table[call.compat] = table.get(call.compat, 0) | entry << 32
    for number in _CLOSING.values():
        table[number] = table.get(number, 0) | VIA_CLOSE << 8 | Shape.CLOSE
    return table


def uring_table() -> dict[int, int]:
    """io_uring opcode -> (via << 8 | shape)."""
    return {op: (VIA_URING + op) << 8 | shape for op, (_, shape) in URING_OPS.items()}


def defines() -> str:
    """The numbers that the BPF text shares with this module, as C text."""
    lines = [f"#define SHAPE_{s.name} {s.value}" for s in Shape]
    for via, call in enumerate(SYSCALLS):
        lines.append(f"#define VIA_{call.name.replace(' ', '_').upper()} {via}")
    lines.append(f"#define VIA_FUSE_REPLY {VIA_FUSE_REPLY}")
    lines += [f"#define VIA_{name.upper()} {via}" for via, name in _EVENTS.items()]
    lines += [f"#define NR_{name.upper()} {n}" for name, n in (_CLOSING | _EXITS).items()]
    lines += [f"#define TABLE_SIZE {TABLE_SIZE}"]
    lines.append(f"#define MANY_MESSAGES {MANY_MESSAGES}")
    return "\n".join(lines) + "\n"
