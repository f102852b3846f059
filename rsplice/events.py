# SPDX-License-Identifier: MIT
"""What tracers tell the ledger: counters read from the kernel, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from rsplice.audit import Endpoint, PageCounts


@dataclass(frozen=True)
class Tally:
    """Calls of one process that look alike, added up in the kernel.

    A *leg* is a half of a sendfile or copy_file_range (legs 0 and 1, in the order of the data)
    and the whole of any other operation (leg 0). ``nbytes`` crossed each of the legs.
    """

    process: int  #: key of the process; pids are reused, keys are not
    source: Endpoint
    destination: Endpoint
    via: str  #: as strace prints it ("pread64"), or "io_uring read", "fuse reply"
    flags: frozenset[str]  #: see FLAGS
    operations: int
    nbytes: int  #: bytes carried by each leg
    #: bytes whose pages were seen at both ends: (leg, disposition) -> bytes
    identity: dict[tuple[int, str], int] = field(default_factory=dict)
    #: the same, counted by the kernel's copying functions
    measured: dict[tuple[int, str], int] = field(default_factory=dict)
    #: the same, from the kernel's own notifications
    declared: dict[tuple[int, str], int] = field(default_factory=dict)
    #: bytes counted where the kernel copies beyond those carried, since copied twice, by leg
    extra: dict[int, int] = field(default_factory=dict)


#: What a tally's flags may hold.
FLAGS = {
    "compat": "the caller is a 32-bit process: arguments are not looked at",
    "zerocopy": "MSG_ZEROCOPY on a socket with SO_ZEROCOPY, or io_uring send_zc",
    "loopback": "the zerocopy data left through the loopback device",
    "trunc": "recv with MSG_TRUNC",
    "peek": "recv with MSG_PEEK: the data stays queued",
    "move": "splice with SPLICE_F_MOVE",
    "gift": "vmsplice with SPLICE_F_GIFT",
    "remap": "the call asked for shared extents (FICLONE, FICLONERANGE)",
    "errqueue": "recv with MSG_ERRQUEUE",
    "rsplice": "made inside a call of librsplice",
}


@dataclass(frozen=True)
class Mark:
    """A USDT probe of librsplice that a process ran through, added up."""

    process: int  #: key of the process
    probe: str  #: see MARKS
    detail: int  #: of "fill" how (see HOWS), of "fallback" why (see WHYS), else 0
    calls: int
    nbytes: tuple[int, ...]  #: as many numbers of bytes as MARKS names


#: The probes (csrc/probes.h), and what their numbers of bytes are.
MARKS = {
    "reserve": ("reserved",),
    "fill": ("filled",),
    "publish": ("moved", "shared", "direct", "copied", "unknown"),
    "fallback": ("copied",),
    "abort": ("aborted",),
}

#: enum rsplice_how of csrc/probes.h; any other is unknown.
HOWS = ("direct", "reference", "copied", "generated", "unknown")

#: RSPLICE_WHY_* of csrc/rsplice.h by bit, as sentences show them.
WHYS = (
    "the source cannot be read with O_DIRECT",
    "not aligned to a block or page",
    "less than a whole page or block",
    "out of socket buffers",
    "out of a pipe's pages",
    "the CPU makes the bytes of this source",
    "more pages than a pipe has slots",
    "may carry the mark of the next readahead",
)


@dataclass(frozen=True)
class ProcessSeen:
    """A followed process; seen again under the same key it replaces what was known."""

    key: int
    pid: int
    comm: str
    pages: PageCounts = field(default_factory=PageCounts)


@dataclass(frozen=True)
class LentFile:
    """A file whose cached pages were spliced, sent or copied.

    :param filesystem: its kind, as paths of an audit name it
    :param device: the kernel's dev_t
    """

    filesystem: str
    device: int
    inode: int
    generation: int
