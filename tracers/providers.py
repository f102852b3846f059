# SPDX-License-Identifier: MIT
"""What can be observed in several ways, and which of them a kernel offers.

Each thing to observe lists its candidates, the best first. One is chosen at run time: what this
kernel cannot have is passed over, what then cannot be attached gives way to the next, and where
nothing is left the run goes on without. Where nothing beyond tracepoints can be attached at all,
as on kernels without kprobes, none of this is compiled in.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from rsplice.tracers.btf import Btf
from rsplice.tracers.program import KPROBE_TYPE, BpfError, Program, can_fexit

#: Why nothing is observed on kernels that have tracepoints alone.
NEITHER = "this kernel has neither fentry nor kprobes for BPF"
#: The tracepoint of the module rsplice_copies, and where the module is seen to be loaded.
MODULE_TRACEPOINT = "rsplice_copied"
_MODULES = Path("/sys/module")
_MODULE = _MODULES / "rsplice_copies"
#: "Y" where FUSE may go over io_uring (6.14).
_FUSE_RING = _MODULES / "fuse/parameters/enable_uring"


class How(Enum):
    """Ways to be told of something, as doctor names them."""

    TRACEPOINT = "tracepoint"  #: one that tells the same, and more: nothing else is attached
    MODULE = "module"  #: a kprobe that the module rsplice_copies registers
    FENTRY = "fentry"  #: a BPF trampoline at the function's entry: its arguments
    FEXIT = "fexit"  #: the same at its return: arguments and result
    KPROBE = "kprobe"  #: a breakpoint at its entry: arguments in registers
    KRETPROBE = "kretprobe"  #: a breakpoint at its return: the result alone


class Serves(Enum):
    """What of a run an observation is for: it is attached where that was asked for."""

    COPIES = "copies"
    FINDINGS = "findings"
    JOURNEYS = "journeys"


@dataclass(frozen=True)
class Kernel:
    """What decides which candidates a kernel offers.

    :param arguments: how many arguments a function of vmlinux has, None where BTF has none
    :param tracepoints: those whose programs have all that they need here
    :param fuse_ring: whether FUSE may go over io_uring
    """

    arguments: Callable[[str], int | None]
    fexit: bool = False
    kprobes: bool = False
    module: bool = False
    tracepoints: frozenset[str] = frozenset()
    fuse_ring: bool = False

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
    entry: str = ""  #: at a kretprobe: the program at the entry that keeps the arguments for it


@dataclass(frozen=True)
class Observation:
    """A thing to observe.

    :param name: what is told of, in the words of doctor
    :param functions: names of the kernel's function, newest kernel first
    :param program: "in" and "out" count what a function returns as bytes copied out of the source
        or into the destination; else a program of bpf/copies.c or bpf/moments.c, for that number
        of *arguments*
    :param arguments: how many the program knows of; 0 for "in" and "out", which take any
    :param others: functions of another shape, each with its program and the number of arguments
    :param at_entry: looked at before the function changes anything, not at its return
    :param serves: what it is for
    :param by_iterator: the copying is done by lib/iov_iter.c, where the module counts it too
    :param outside: of vmlinux: its functions may be a module's, of which vmlinux's BTF is silent
    :param tracepoint: one that makes this unnecessary
    :param stands_for: one that some kernels lack, and whose loss this makes up for
    :param fallback: one that is attached anyway, and tells less
    :param also: functions that do the same for other pages, probed too where the kernel has them
    :param cost: what the reader loses without it, in words; "" for copies
    :param module: that has the functions, where most kernels do without it
    :param result: "in" or "out": how a kretprobe counts the result, where *program* looks closer
    """

    name: str
    functions: tuple[str, ...]
    program: str
    arguments: int = 0
    by_iterator: bool = True
    outside: bool = False
    tracepoint: str = ""
    stands_for: str = ""
    fallback: str = ""
    cost: str = ""
    result: str = ""
    module: str = ""
    also: tuple[str, ...] = ()
    others: tuple[tuple[str, str, int], ...] = ()
    at_entry: bool = False
    serves: Serves = Serves.COPIES

    def program_at(self, function: str) -> tuple[str, int]:
        """The program for one of the functions, and how many arguments it knows of."""
        own = ((program, number) for name, program, number in self.others if name == function)
        return next(own, (self.program, self.arguments))

    @property
    def is_idle(self) -> bool:
        """Whether the module whose functions these are is not loaded: it copies nothing."""
        return bool(self.module) and not (_MODULES / self.module).exists()

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
    # drivers/block/ublk_drv.c: what a server reads and writes by itself (UBLK_F_USER_COPY)
    Observation(
        "copies out of ublk requests", ("ublk_ch_read_iter",), "in", outside=True, module="ublk_drv"
    ),
    Observation(
        "copies into ublk requests", ("ublk_ch_write_iter",), "out", outside=True, module="ublk_drv"
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
REQUEST_BEGINS = Observation(
    "begins of an io_uring's requests",
    ("io_issue_sqe",),
    "request_begins",
    by_iterator=False,
    at_entry=True,
    cost="copies of io_uring requests that another thread completes are mixed up",
)


_TOLD_LATER = "why pages were not moved is told from what was seen before the reply, or not at all"
#: What becomes of pages, where no tracepoint tells, or none at that very moment.
PAGES: tuple[Observation, ...] = (
    # fs/pipe.c, fs/splice.c
    *(
        Observation(
            f"refused moves of {kind} buffers",
            (f"{name}_pipe_buf_try_steal",),
            "steal_filled" if name == "generic" else "steal_buffer",
            2,
            by_iterator=False,
            stands_for="fuse_request_end",
            cost=_TOLD_LATER,
            serves=Serves.FINDINGS,
        )
        for kind, name in (
            ("anonymous", "anon"),
            ("page-cache", "page_cache"),
            ("user", "user_page"),
            ("filled", "generic"),
        )
    ),
    # mm/filemap.c
    Observation(
        "moves into a page cache",
        ("replace_page_cache_folio", "replace_page_cache_page"),
        "move_page",
        by_iterator=False,
        stands_for="fuse_request_end",
        cost="pages that are moved into a page cache are looked at afterwards, or not at all",
        at_entry=True,
    ),
    Observation(
        "inserts into a page cache",
        ("__filemap_add_folio",),
        "insert_folio",
        by_iterator=False,
        others=(("__add_to_page_cache_locked", "insert_page", 0),),
        fallback="mm_filemap_add_to_page_cache",
        cost="pages that enter a page cache while in use are told of FUSE replies alone",
        at_entry=True,
        serves=Serves.FINDINGS,
    ),
    # mm/memory.c; alloc_set_pte before 5.12
    Observation(
        "mappings of pages that are in pipes",
        ("set_pte_range",),
        "map_range",
        5,
        by_iterator=False,
        others=(("do_set_pte", "map_page", 3), ("alloc_set_pte", "map_page", 2)),
        cost="that a queued page is mapped to be written to is not told",
        serves=Serves.FINDINGS,
    ),
    Observation(
        "pages mapped by fault-around",
        ("filemap_map_pages",),
        "map_pages",
        3,
        by_iterator=False,
        tracepoint="mm_filemap_map_pages",
        stands_for="mm_filemap_map_pages",
        cost="pages mapped by fault-around are not counted",
    ),
)


def _rmap(name: str, function: str, program: str, older: str, cost: str, also: str) -> Observation:
    """Of mm/rmap.c, where functions take folios since 6.8.

    :param older: the function that takes a page
    """
    return Observation(
        name,
        (function,),
        program,
        by_iterator=False,
        cost=cost,
        also=(also,) if also else (),
        others=((older, f"{program}_page", 0),),
        serves=Serves.JOURNEYS,
    )


_BY_NOW = "what is mapped or unmapped is seen afterwards in journeys, and not by whom"
#: What happens to pages that are followed, at the moment when it does.
MOMENTS: tuple[Observation, ...] = (
    _rmap(
        "page-table references",
        "folio_add_file_rmap_ptes",
        "jm_mapped",
        "page_add_file_rmap",
        _BY_NOW,
        "folio_add_file_rmap_pmd",
    ),
    _rmap(
        "ends of page-table references",
        "folio_remove_rmap_ptes",
        "jm_unmapped",
        "page_remove_rmap",
        _BY_NOW,
        "folio_remove_rmap_pmd",
    ),
    _rmap(
        "page-table references of new memory",
        "folio_add_new_anon_rmap",
        "jm_born",
        "page_add_new_anon_rmap",
        "when memory was first mapped is not told in journeys",
        "",
    ),
    # fs/pipe.c, fs/splice.c: the release() of each class of buffers
    *(
        Observation(
            f"releases of {kind} buffers",
            (f"{name}_pipe_buf_release",),
            "jm_released",
            by_iterator=False,
            cost="when pipes let go of such pages is not told in journeys",
            at_entry=True,
            serves=Serves.JOURNEYS,
        )
        for kind, name in (
            ("anonymous", "anon"),
            ("page-cache and user", "page_cache"),
            ("filled", "generic"),
        )
    ),
)
#: What is still lost without a tracepoint where all that stands in for it is attached; "": nothing.
INSTEAD = {
    "fuse_request_send": "",
    "fuse_request_end": "of FUSE replies only pages that the kernel asked for tell why they stayed",
    "mm_filemap_map_pages": "",
}
ALL: tuple[Observation, ...] = (*COPIES, REQUEST_BEGINS, REQUESTS, *PAGES, *MOMENTS)

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

    def probes(self, *programs: str) -> bool:
        """Whether one of *programs*, or its twin for breakpoints, is attached."""
        if self.candidate is None:
            return False
        return re.sub("_(regs|return)$", "", self.candidate.program) in programs

    @property
    def reason(self) -> str:
        """Why nothing is attached, for a user: what failed for one reason is told together."""
        places: dict[str, list[str]] = {}
        for each in self.lost:
            place, colon, words = each.partition(": ")
            places.setdefault(colon + words, []).append(place)
        return "; ".join(", ".join(at) + words for words, at in places.items()) or "not tried"


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
        fuse_ring=_FUSE_RING.exists() and _FUSE_RING.read_text().strip() == "Y",
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
    for name in (*observation.functions, *(each[0] for each in observation.others)):
        arguments = kernel.arguments(name)
        if arguments is None and not observation.outside:
            if not found:  # else it has a better one
                reasons.append(f"this kernel has no {name}")
            continue
        if arguments is not None:
            program = _program(observation, name, arguments)
            if program is None:
                reasons.append(f"{name} has {arguments} arguments here")
                continue
            if kernel.fexit:
                how = How.FENTRY if observation.at_entry else How.FEXIT
                found.append(Candidate(how, name, program))
            if kernel.kprobes and observation.at_entry:
                found.append(Candidate(How.KPROBE, name, f"{program}_regs"))
            elif kernel.kprobes and observation.program not in RETURNS:
                by = f"{program}_return", f"{program}_entry"
                found.append(Candidate(How.KRETPROBE, name, *by))
        by_result = _kretprobe_program(observation)
        if observation.result and kernel.fuse_ring:
            reasons.append(f"the result of {name} does not tell what went over a ring")
        elif kernel.kprobes and by_result:
            found.append(Candidate(How.KRETPROBE, name, by_result))
    if observation.fallback in kernel.tracepoints:
        found.append(Candidate(How.TRACEPOINT, observation.fallback, ""))
    return found, reasons


def _program(observation: Observation, function: str, arguments: int) -> str | None:
    """The program for a function that has so many arguments; None if there is none for that."""
    program, known = observation.program_at(function)
    if program in RETURNS:
        return f"copied_{program}_{arguments}" if arguments in RETURNS[program] else None
    if known not in (0, arguments):
        return None
    own = observation in PAGES or observation in MOMENTS
    return program if own else f"copied_{program}"


def _kretprobe_program(observation: Observation) -> str | None:
    side = observation.result or observation.program
    return f"copied_{side}_ax" if side in RETURNS else None


def attach(program: Program, kernel: Kernel, serves: Container[Serves]) -> list[Taken]:
    """Attaches the best of every observation that can be; what fails gives way to the next.

    :param serves: what the run is to tell of
    """
    module = None
    if kernel.module:
        module = _first(program, [Candidate(How.MODULE, MODULE_TRACEPOINT, "copied_module")], [])
    wanted = [each for each in ALL if each.serves in serves]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda each: _take(program, each, kernel, module), wanted))


def unattached(kernel: Kernel) -> list[Taken]:
    """The observations of a kernel where nothing beyond tracepoints can be attached."""
    return [_without(each, kernel) for each in ALL]


def _without(observation: Observation, kernel: Kernel) -> Taken:
    found, _ = candidates(observation, kernel)
    return Taken(observation, found[0] if found else None, [NEITHER])


def _take(
    program: Program, observation: Observation, kernel: Kernel, module: Candidate | None
) -> Taken:
    if module and observation.by_iterator:
        return Taken(observation, module, [])  # it is attached once, for all of them
    if observation.is_idle:
        return Taken(observation, None, [f"the module {observation.module} is not loaded"])
    found, lost = candidates(observation, kernel)
    found = [candidate for candidate in found if candidate.how is not How.MODULE]
    taken = Taken(observation, _first(program, found, lost), lost)
    if taken.candidate:
        _attach_also(program, observation.also, taken.candidate, kernel, lost)
    return taken


def _attach_also(
    program: Program, functions: Iterable[str], like: Candidate, kernel: Kernel, lost: list[str]
) -> None:
    """Attaches what *like* is to further functions that this kernel has."""
    for name in functions:
        if kernel.arguments(name) is not None:
            _first(program, [replace(like, function=name)], lost)


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
    elif candidate.how in (How.FENTRY, How.FEXIT):
        at_return = candidate.how is How.FEXIT
        program.attach_trampoline(candidate.program, candidate.function, at_return)
    else:
        at_return = candidate.how is How.KRETPROBE
        program.attach_kprobe(candidate.program, candidate.function, at_return)
        if candidate.entry:
            program.attach_kprobe(candidate.entry, candidate.function, at_return=False)


def _words(error: BpfError) -> str:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return "the kernel has no such function, or its module is not loaded"
    return str(error)
