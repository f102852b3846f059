# SPDX-License-Identifier: MIT
"""What can be observed in several ways, and which of them a kernel offers.

Each thing to observe lists its candidates, the best first. One is chosen at run time: what this
kernel cannot have is passed over, what then cannot be attached gives way to the next, and where
nothing is left the run goes on without. Where nothing beyond tracepoints can be attached at all,
as on kernels without kprobes, none of this is compiled in.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rsplice.tracers.btf import Btf
from rsplice.tracers.program import KPROBE_TYPE, BpfError, Program, can_fexit

#: The tracepoint of the module rsplice_copies, and where the module is seen to be loaded.
MODULE_TRACEPOINT = "rsplice_copied"
_MODULE = Path("/sys/module/rsplice_copies")


class How(Enum):
    """Ways to be told of something, as doctor names them."""

    TRACEPOINT = "tracepoint"  #: one that tells the same, and more: nothing else is attached
    MODULE = "module"  #: a kprobe that the module rsplice_copies registers
    FEXIT = "fexit"  #: a BPF trampoline at the function's return: arguments and result
    KRETPROBE = "kretprobe"  #: a breakpoint at its return: the result alone


@dataclass(frozen=True)
class Kernel:
    """What decides which candidates a kernel offers.

    :param arguments: how many arguments a function of vmlinux has, None where BTF has none
    :param tracepoints: those whose programs have all that they need here
    """

    arguments: Callable[[str], int | None]
    fexit: bool = False
    kprobes: bool = False
    module: bool = False
    tracepoints: frozenset[str] = frozenset()

    @property
    def measures(self) -> bool:
        """Whether anything beyond tracepoints can be attached."""
        return self.fexit or self.kprobes or self.module


@dataclass(frozen=True)
class Candidate:
    """One way to observe something: a function of the kernel, and the BPF program for it."""

    how: How
    function: str
    program: str


@dataclass(frozen=True)
class Observation:
    """A thing to observe.

    :param name: what is told of, in the words of doctor
    :param functions: names of the kernel's function, newest kernel first
    :param program: "in" and "out" count what a function returns as bytes copied out of the source
        or into the destination; else a program of bpf/copies.c, for that number of *arguments*
    :param arguments: how many the program knows of; 0 for "in" and "out", which take any
    :param by_iterator: the copying is done by lib/iov_iter.c, where the module counts it too
    :param outside: of vmlinux: its functions may be a module's, of which vmlinux's BTF is silent
    :param tracepoint: one that makes this unnecessary
    :param cost: what the reader loses without it, in words; "" for copies
    :param result: "in" or "out": how a kretprobe counts the result, where *program* looks closer
    """

    name: str
    functions: tuple[str, ...]
    program: str
    arguments: int = 0
    by_iterator: bool = True
    outside: bool = False
    tracepoint: str = ""
    cost: str = ""
    result: str = ""

    @property
    def loss(self) -> str:
        """What the reader loses without it."""
        return self.cost or f"{self.name} are inferred, not measured"


def _of(name: str, functions: str, program: str, arguments: int = 0) -> Observation:
    return Observation(name, tuple(functions.split()), program, arguments)


#: Copies of payload. No function here calls another one: what is copied is counted once.
COPIES: tuple[Observation, ...] = (
    # mm/filemap.c; generic_file_buffered_read before 5.12
    _of("copies out of a page cache", "filemap_read generic_file_buffered_read", "filemap_read", 3),
    # mm/shmem.c, fs/hugetlbfs/inode.c
    _of("copies out of tmpfs", "shmem_file_read_iter", "read_iter", 2),
    _of("copies out of hugetlbfs", "hugetlbfs_read_iter", "read_iter", 2),
    # fs/pipe.c; the anon_ names are those of 6.15
    _of("copies out of a pipe", "anon_pipe_read pipe_read", "in"),
    _of("copies into a pipe", "anon_pipe_write pipe_write", "out"),
    # fs/splice.c: vmsplice out of a pipe
    _of("copies of vmsplice", "pipe_to_user", "in"),
    # fs/eventfd.c, fs/timerfd.c (timerfd_read_iter since 6.10)
    _of("counts read from eventfds", "eventfd_read", "in"),
    _of("expirations of timers", "timerfd_read_iter timerfd_read", "in"),
    Observation("counts added to eventfds", ("eventfd_write",), "out", by_iterator=False),
    # drivers/char/mem.c, drivers/char/random.c, fs/seq_file.c, fs/kernfs/file.c,
    # fs/proc/proc_sysctl.c
    Observation("bytes read from /dev/zero", ("read_zero",), "in", by_iterator=False),
    Observation("bytes spliced from /dev/zero", ("read_iter_zero",), "in", by_iterator=False),
    _of("bytes of /dev/urandom", "get_random_bytes_user", "in"),
    _of("copies out of generated files", "seq_read_iter", "in"),
    _of("copies into sysfs and cgroup files", "kernfs_fop_write_iter", "out"),
    _of("copies out of sysctl files", "proc_sys_read", "in"),
    _of("copies into sysctl files", "proc_sys_write", "out"),
    # mm/filemap.c, fs/iomap/buffered-io.c
    _of("copies into a page cache", "generic_perform_write", "out"),
    _of("copies into a page cache by iomap", "iomap_file_buffered_write", "out"),
    # net/core/datagram.c, net/ipv4/ip_output.c, net/ipv4/tcp.c
    _of("copies out of socket buffers", "simple_copy_to_iter", "in"),
    _of(
        "copies into unix sockets",
        "skb_copy_datagram_from_iter",
        "skb_copy_datagram_from_iter",
        4,
    ),
    _of("copies into udp sockets", "ip_generic_getfrag", "ip_generic_getfrag", 6),
    _of("copies into tcp sockets", "tcp_sendmsg_locked", "tcp_sendmsg_locked", 3),
    # mm/process_vm_access.c
    _of("copies between processes", "process_vm_rw", "in"),
    # fs/fuse/file.c: writes that a server gets at once, through the page cache
    Observation("copies of FUSE writes", ("fuse_perform_write",), "out", outside=True),
    # fs/btrfs/file.c
    Observation(
        "copies into btrfs",
        ("btrfs_buffered_write", "btrfs_buffered_write.isra.0"),
        "out",
        outside=True,
    ),
    # fs/fuse/dev.c: memcpy(), which no module can probe either
    Observation(
        "copies of FUSE messages",
        ("fuse_copy_do",),
        "fuse_copy_do",
        3,
        by_iterator=False,
        outside=True,
        result="out",
    ),
    # drivers/block/ublk_drv.c: what a server reads and writes by itself
    Observation(
        "copies of ublk requests",
        ("ublk_copy_user_pages", "ublk_copy_user_pages.isra.0"),
        "in",
        outside=True,
    ),
    # net/core/skbuff.c
    Observation("copies of zero-copy packets", ("skb_copy_ubufs",), "skb_copy_ubufs", 2, False),
)

#: Not a copy: whose the copies of an io_uring's thread are (io_uring/io_uring.c).
REQUESTS = Observation(
    "requests of an io_uring",
    ("io_issue_sqe",),
    "request",
    by_iterator=False,
    cost="copies of io_uring requests that run side by side are mixed up",
)


def _other(
    name: str, functions: str, program: str, arguments: int, tracepoint: str, cost: str
) -> Observation:
    return Observation(
        name, tuple(functions.split()), program, arguments, False, False, tracepoint, cost
    )


_NO_REASON = "moves of such pages that were refused are not explained"
#: What becomes of pages, where no tracepoint tells.
PAGES: tuple[Observation, ...] = (
    # fs/pipe.c, fs/splice.c
    *(
        _other(
            f"refused moves of {kind} buffers",
            f"{name}_pipe_buf_try_steal",
            "steal_filled" if name == "generic" else "steal_buffer",
            2,
            "fuse_request_end",
            _NO_REASON,
        )
        for kind, name in (
            ("anonymous", "anon"),
            ("page-cache", "page_cache"),
            ("user", "user_page"),
            ("filled", "generic"),
        )
    ),
    # mm/filemap.c
    _other(
        "moves into a page cache",
        "replace_page_cache_folio replace_page_cache_page",
        "move_page",
        0,
        "fuse_request_end",
        "whether a FUSE reply moves pages is not seen",
    ),
    _other(
        "pages mapped by fault-around",
        "filemap_map_pages",
        "map_pages",
        3,
        "mm_filemap_map_pages",
        "pages mapped by fault-around are not counted",
    ),
)
#: What is still lost without a tracepoint where all that stands in for it is attached; "": nothing.
INSTEAD = {
    "fuse_request_send": "",
    "fuse_request_end": "of FUSE replies only pages that the kernel asked for tell why they stayed",
    "mm_filemap_map_pages": "",
}
ALL: tuple[Observation, ...] = (*COPIES, REQUESTS, *PAGES)

#: Programs that return the bytes of a function, by the number of its arguments.
RETURNS = {"in": (1, 2, 3, 4, 7), "out": (2, 3, 4, 5)}


@dataclass
class Taken:
    """What became of an observation.

    :param candidate: the one that is attached, None where nothing is
    :param lost: why better candidates were passed over or failed
    """

    observation: Observation
    candidate: Candidate | None
    lost: list[str]

    @property
    def copies(self) -> bool:
        """Whether it counts copied bytes."""
        return self.observation in COPIES

    @property
    def reason(self) -> str:
        """Why nothing is attached, for a user."""
        return "; ".join(self.lost) or "not tried"


def running(btf: Btf, tracepoints: Iterable[str] = ()) -> Kernel:
    """What the kernel that runs here offers.

    :param tracepoints: as for Kernel
    """
    known = (btf.function_id(name) for each in COPIES for name in each.functions)
    first = next((number for number in known if number is not None), None)
    return Kernel(
        btf.function_arguments,
        fexit=first is not None and can_fexit(first),
        kprobes=KPROBE_TYPE.exists(),
        module=_MODULE.exists(),
        tracepoints=frozenset(tracepoints),
    )


def candidates(observation: Observation, kernel: Kernel) -> tuple[list[Candidate], list[str]]:
    """The candidates that *kernel* may have, best first, and why others are none.

    Nothing is attached here: kprobes on functions that BTF says nothing of have to be tried.
    """
    found: list[Candidate] = []
    reasons: list[str] = []
    if observation.tracepoint in kernel.tracepoints:
        return [Candidate(How.TRACEPOINT, observation.tracepoint, "")], []
    if kernel.module and observation.by_iterator:
        found.append(Candidate(How.MODULE, MODULE_TRACEPOINT, "copied_module"))
    for name in observation.functions:
        arguments = kernel.arguments(name)
        if arguments is None and not observation.outside:
            reasons.append(f"this kernel has no {name}")
            continue
        if arguments is not None:
            program = _fexit_program(observation, arguments)
            if program is None:
                reasons.append(f"{name} has {arguments} arguments here")
                continue
            if kernel.fexit:
                found.append(Candidate(How.FEXIT, name, program))
        by_result = _kretprobe_program(observation)
        if kernel.kprobes and by_result:
            found.append(Candidate(How.KRETPROBE, name, by_result))
    return found, reasons


def _fexit_program(observation: Observation, arguments: int) -> str | None:
    if observation.program in RETURNS:
        counted = arguments in RETURNS[observation.program]
        return f"copied_{observation.program}_{arguments}" if counted else None
    if observation.arguments not in (0, arguments):
        return None
    return observation.program if observation in PAGES else f"copied_{observation.program}"


def _kretprobe_program(observation: Observation) -> str | None:
    side = observation.result or observation.program
    return f"copied_{side}_ax" if side in RETURNS else None


def attach(program: Program, kernel: Kernel) -> list[Taken]:
    """Attaches the best of every observation that can be; what fails gives way to the next."""
    module = None
    if kernel.module:
        module = _first(program, [Candidate(How.MODULE, MODULE_TRACEPOINT, "copied_module")], [])
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda each: _take(program, each, kernel, module), ALL))


def _take(
    program: Program, observation: Observation, kernel: Kernel, module: Candidate | None
) -> Taken:
    if module and observation.by_iterator:
        return Taken(observation, module, [])  # it is attached once, for all of them
    found, lost = candidates(observation, kernel)
    found = [candidate for candidate in found if candidate.how is not How.MODULE]
    return Taken(observation, _first(program, found, lost), lost)


def _first(program: Program, found: list[Candidate], lost: list[str]) -> Candidate | None:
    """Attaches the first candidate that lets itself be; the failures are added to *lost*."""
    for candidate in found:
        try:
            _attach(program, candidate)
            return candidate
        except BpfError as error:
            lost.append(f"{candidate.how.value} at {candidate.function}: {_words(error)}")
    return None


def _attach(program: Program, candidate: Candidate) -> None:
    """BpfError if the kernel refuses it."""
    if candidate.how is How.TRACEPOINT:
        return  # tracer.py attaches it
    if not program.has(candidate.program):
        raise BpfError(errno.ENOENT, "not part of this kernel's programs")
    if candidate.how is How.MODULE:
        program.attach_raw(candidate.program, candidate.function)
    elif candidate.how is How.FEXIT:
        program.attach_fexit(candidate.program, candidate.function)
    else:
        program.attach_kretprobe(candidate.program, candidate.function)


def _words(error: BpfError) -> str:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return "the kernel has no such function, or its module is not loaded"
    return str(error)
