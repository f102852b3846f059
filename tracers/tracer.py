# SPDX-License-Identifier: MIT
"""The probes: which there are, what each is for, and attaching them."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsplice.audit import MissingProbe
from rsplice.errors import RspliceError
from rsplice.events import LentFile
from rsplice.tracers import contents, operations, providers, usdt
from rsplice.tracers import layout as layouts
from rsplice.tracers.btf import RUNNING, Btf
from rsplice.tracers.copies import Copies
from rsplice.tracers.counters import Counters, map_sizes
from rsplice.tracers.findings import NAMES, SIZES, Findings, learn
from rsplice.tracers.journey import Follower
from rsplice.tracers.program import BpfError, Program, possible_cpus, source_text
from rsplice.tracers.providers import Serves

_LENT = struct.Struct("=QIIQ")  # bpf/lent.h
LEAK_COST = "leaked pages are not seen"
IDENTITY = {"off": 0, "sample": 1, "all": 2}


@dataclass(frozen=True)
class Probe:
    """One program and the raw tracepoint it attaches to.

    :param tracepoint: its name; the program is ``tp_<name>``
    :param cost: what the reader loses without it
    :param feature: the layout feature that it needs
    :param required: whether there is no audit without it
    :param identity: whether it serves page comparison only
    :param marks: whether it serves the probes of librsplice only
    :param counts: the PageCounts that nobody counts without it
    :param older: the tracepoint's name on older kernels, with the same first argument
    :param findings: those that nobody sees without it
    """

    tracepoint: str
    cost: str
    feature: str = "core"
    required: bool = False
    identity: bool = False
    older: str = ""
    counts: str = ""
    marks: bool = False
    findings: tuple[str, ...] = ()

    def name_on(self, btf: Btf) -> str | None:
        """The tracepoint's name on this kernel, None where it has none that fits."""
        if btf.tracepoint_id(self.tracepoint) is not None:
            return self.tracepoint
        # Before 5.19 io_uring_submit_sqe had the ring in front of the request.
        arguments = btf.tracepoint_args(self.older) if self.older else None
        return self.older if arguments and arguments[0] == "struct io_kiocb *" else None


PROBES = (
    Probe("sys_exit", "no system call is seen", required=True),
    Probe("sched_process_fork", "children are not followed", required=True),
    Probe("sched_process_exec", "processes keep the name they had before exec"),
    Probe("sched_process_exit", "the end of a process is not seen", required=True),
    Probe(
        "mm_filemap_add_to_page_cache",
        "page-cache inserts are not counted",
        counts="inserted_pages",
    ),
    Probe(
        "mm_filemap_delete_from_page_cache",
        "page-cache removals are not counted",
        counts="removed_pages",
    ),
    Probe(
        "mm_filemap_map_pages",
        "pages mapped by fault-around are not counted",
        counts="mapped_pages",
    ),
    Probe("page_fault_user", "page faults are not counted", counts="faults"),
    Probe("skb_copy_datagram_iovec", "copies out of socket buffers are inferred, not measured"),
    Probe("net_dev_start_xmit", layouts.FEATURES["network"], "network", identity=True),
    Probe("sys_enter", layouts.FEATURES["findings"], "findings", identity=True, findings=NAMES[1:]),
    Probe("signal_deliver", LEAK_COST, "findings", identity=True, marks=True, findings=("leaked",)),
    Probe("fuse_request_send", layouts.FEATURES["fuse"], "fuse", identity=True),
    Probe("fuse_request_end", layouts.FEATURES["fuse"], "fuse"),
    Probe(
        "io_uring_submit_req",
        "multishot completions are not seen",
        "io_uring",
        older="io_uring_submit_sqe",
    ),
    Probe("io_uring_complete", layouts.FEATURES["io_uring"], "io_uring"),
)


@dataclass(frozen=True)
class Tail:
    """A program that others end in.

    :param array: the prog array they find it in, and its index there
    :param tracepoint: the one that the others are attached to
    :param findings: those that nobody sees without it
    """

    array: str
    index: int
    function: str
    tracepoint: str
    cost: str
    findings: tuple[str, ...] = ()


EXIT = "sched_process_exit"
SUBMIT = "io_uring_submit_req"
URING_COST = "findings of io_uring's requests are not seen"
TAILS = (
    Tail("exit_programs", 1, "tp_messages", "sys_exit", "sendmmsg and recvmmsg are not counted"),
    Tail("exit_programs", 2, "tp_walk", "sys_exit", layouts.FEATURES["identity"]),
    Tail("exit_programs", 3, "tp_notification", "sys_exit", "MSG_ZEROCOPY is inferred"),
    Tail("exit_programs", 4, "tp_reply_end", "sys_exit", "notifications are not findings"),
    Tail("exit_programs", 5, "tp_contents", "sys_exit", contents.COST),
    Tail("enter_programs", 0, "tp_buffers", "sys_enter", layouts.FEATURES["findings"], NAMES[1:]),
    Tail("enter_programs", 1, "tp_compare", "sys_enter", contents.COST),
    Tail("enter_programs", 2, "tp_offer", "sys_enter", "missed moves of FUSE replies are not seen"),
    Tail("exit_task_programs", 0, "tp_stranded", EXIT, "no pipe is seen stranded", ("stranded",)),
    Tail("exit_task_programs", 1, "tp_leaked", EXIT, LEAK_COST, ("leaked",)),
    Tail("fuse_programs", 0, "tp_fuse_judge", "fuse_request_end", "missed moves are not explained"),
    Tail("fuse_programs", 1, "tp_fuse_tail", "fuse_request_end", contents.COST),
    Tail("uring_submit_programs", 0, "tp_uring_buffers", SUBMIT, URING_COST),
    Tail("uring_submit_programs", 1, "tp_uring_compare", SUBMIT, contents.COST),
    Tail("uring_programs", 1, "tp_uring_contents", "io_uring_complete", contents.COST),
    Tail("uring_programs", 0, "tp_uring_walk", "io_uring_complete", layouts.FEATURES["identity"]),
)


class Tracer:
    """The probes of one run. Closing it, or dying, detaches everything.

    :param identity: how many calls have their pages compared: "all", "sample" (1 in 17) or "off"
    :param follow_all: follow every process of the machine but this one
    :param direct: how kernel memory is read (bpf/access.h); None takes the faster that works
    :param files: with probes of librsplice, as usdt.find() returned them; they are closed
    :param journeys: the pages to be followed, if any; closed with the tracer
    :param integrity: whether the contents of queued pages are compared too; takes identity "all"
    :param verify: whether the files are noted whose pages are lent; takes identity "all"
    :param traces: for an Engine (rsplice/engine.py): threads and files can be set aside, and the
        probes taken off and put on again
    :param owner: whose processes are followed; what is no more theirs after exec is let go.
        None for anybody's
    """

    def __init__(
        self,
        identity: str = "all",
        follow_all: bool = False,
        direct: bool | None = None,
        files: Sequence[usdt.File] = (),
        journeys: Follower | None = None,
        integrity: bool = False,
        verify: bool = False,
        traces: bool = False,
        owner: int | None = None,
    ) -> None:
        self.identity = identity
        self._integrity = integrity
        self._verify = verify
        self.attached: list[str] = []
        self.missing: list[MissingProbe] = []
        self.usdt_files: list[str] = []  #: those whose probes are attached
        #: what can be observed in several ways, and how it is; empty where none can
        self.observed: list[providers.Taken] = []
        #: why direct loads were given up though the kernel has them, in the verifier's words
        self.refused = ""
        self._files = files
        self.journeys = journeys
        self._traces = traces
        self._owner = owner
        self._sizes = map_sizes(possible_cpus())
        self._vmemmap: int | None = None
        self._page_size = 0
        try:
            self._begin(direct, follow_all)
        finally:
            for file in files:
                file.close()

    def _begin(self, direct: bool | None, follow_all: bool) -> None:
        btf = Btf()
        layout = layouts.resolve(with_fuse(btf))
        self._kernel = providers.running(
            btf,
            (p.tracepoint for p in PROBES if layout.has(p.feature) and p.name_on(btf)),
        )
        if self._owner is not None and not layout.has("owner"):
            raise RspliceError(f"whose a process is cannot be told: {layout.missing['owner']}")
        can_direct = btf.function_id("bpf_rdonly_cast") is not None
        self.direct = can_direct if direct is None else direct and can_direct
        self._program = self._start(btf, layout, follow_all)
        if self._owner is not None and "sched_process_exec" not in self.attached:
            self._program.close()
            raise RspliceError("programs that run with other rights cannot be told: no exec probe")
        self._page_size = layout.constants.get("PAGE_SIZE_OF", 0)
        has_flows = "net_dev_start_xmit" in self.attached
        self.counters = Counters(
            self._program,
            has_flows,
            self._sizes["SLOTS"],
            bool(self.usdt_files),
            layout.has("fuse"),
        )
        if self.measures:
            self.counters.copies = Copies(self._program)
        if self._program.has("learn_buffer"):
            self.counters.findings = Findings(
                self._program, self.counters.kind, layout.constants, self._vmemmap
            )
        if self.journeys:
            self.journeys.begin()

    def _start(self, btf: Btf, layout: layouts.Layout, follow_all: bool) -> Program:
        """Compiles and attaches; falls back to the slower reads where the faster are refused."""
        defines = layout.defines() + operations.defines()
        settings = {
            **self._sizes,
            **SIZES,
            "IDENTITY": IDENTITY[self.identity],
            "FOLLOW_ALL": int(follow_all),
            "SELF_PID": os.getpid() if follow_all else 0,
            "DIRECT": int(self.direct),
            "USDT": int(bool(self._files)),
            "INTEGRITY": int(self._integrity),
            "VERIFY": int(self._verify),
            "TRACES": int(self._traces),
            "OWNED": int(self._owner is not None),
            "OWNER": self._owner or 0,
            "MEASURED": int(self.measures),
            "FUSE_EVENTS": int("fuse_request_end" in self._kernel.tracepoints),
        }
        defines += "".join(f"#define {k} {v}\n" for k, v in settings.items())
        if self.journeys:
            defines += self.journeys.defines(btf, layout)
        program = Program(source_text(defines), btf, self.direct, keep=not follow_all)
        try:
            self._fill_tables(program)
            if program.has("learn_buffer"):
                self._vmemmap, missing = learn(program, layout.constants)
                self.missing += missing
                if self._integrity:
                    self.missing += contents.learn(program, self._vmemmap)
            self._attach_all(program, btf, layout)
        except BpfError as error:
            program.close()
            if not self.direct or error.errno == errno.EPERM:
                raise RspliceError(_explain(error)) from error
            self.direct = False
            self.refused = str(error)
            self.attached.clear()
            self.missing.clear()
            self.usdt_files.clear()
            self.observed.clear()
            return self._start(btf, layout, follow_all)
        return program

    @staticmethod
    def _fill_tables(program: Program) -> None:
        for name, table in (
            ("call_table", operations.call_table()),
            ("uring_table", operations.uring_table()),
        ):
            calls = program.map(name)
            for number, entry in table.items():
                calls.put(struct.pack("=I", number), struct.pack("=Q", entry))

    def _attach_all(self, program: Program, btf: Btf, layout: layouts.Layout) -> None:
        """Loads all programs side by side, then attaches them.

        sys_exit comes last: it is the one that every process of the machine pays for.
        """
        wanted = [p for p in PROBES if self.identity != "off" or not p.identity]
        wanted = [p for p in wanted if self._files or not p.marks]
        if self.identity != "all":  # a sample would count some findings
            wanted = [p for p in wanted if p.feature != "findings"]
        names = {p: name for p in wanted if (name := self._name_of(p, btf, layout))}
        named = {probe.tracepoint: name for probe, name in names.items()}
        tails = [t for t in TAILS if t.tracepoint in named and program.has(t.function)]
        with ThreadPoolExecutor() as pool:
            loads = {p: pool.submit(program.load, f"tp_{p.tracepoint}", names[p]) for p in names}
            tail_loads = [pool.submit(program.load, t.function, named[t.tracepoint]) for t in tails]
            usdt.attach(program, self._files, self.usdt_files, self.missing)
        if self.measures:
            self._observe(program)
        if self.journeys:
            probed = {each.observation.program for each in self.observed if each.candidate}
            self.journeys.attach(program, btf, self.attached, self.missing, self.direct, probed)
        for tail, load in zip(tails, tail_loads, strict=True):
            self._put_tail(program, tail, load)
        for probe in sorted(loads, key=lambda p: p.tracepoint == "sys_exit"):
            try:
                if probe.tracepoint == "sys_exit":
                    program.set_tail("exit_programs", 0, loads[probe].result())
                program.attach(loads[probe].result(), names[probe], hold=self._traces)
                self.attached.append(probe.tracepoint)
            except BpfError as error:
                if probe.required or self.direct:
                    raise
                self._miss(probe.tracepoint, str(error), probe)

    @property
    def measures(self) -> bool:
        """Whether copies are counted where the kernel makes them.

        Not between traces: those probes stay attached while these are not.
        """
        return self._kernel.measures and self.identity != "off" and not self._traces

    @property
    def unobserved(self) -> list[providers.Taken]:
        """Where nothing beyond tracepoints can be attached: what cannot be observed so."""
        return [] if self.measures else providers.unattached(self._kernel)

    @property
    def measured_at(self) -> list[str]:
        """The kernel's functions that count copies, and how: "fexit pipe_read"."""
        taken = (each.candidate for each in self.observed if each.candidate and each.copies)
        return sorted({f"{candidate.how.value} {candidate.function}" for candidate in taken})

    def _observe(self, program: Program) -> None:
        """Attaches what is more than a tracepoint; none of it is needed for a run."""
        serves = {Serves.COPIES}
        if self.identity == "all" and program.has("steal_buffer"):
            serves.add(Serves.FINDINGS)
        if self.journeys:
            serves.add(Serves.JOURNEYS)
        self.observed = providers.attach(program, self._kernel, serves)
        for taken in self.observed:
            if taken.candidate is None and taken.observation.is_idle:
                pass  # what is loaded later is inferred, and said to be
            elif taken.candidate is None:
                name, cost = taken.observation.functions[0], taken.observation.loss
                self.missing.append(MissingProbe(name, taken.reason, cost))
            elif taken.candidate.how is providers.How.TRACEPOINT:
                pass  # it is among the others
            elif taken.candidate.function not in self.attached:
                self.attached.append(taken.candidate.function)
            if taken.probes("insert_folio", "insert_page"):
                program.map("inserts_probed").put(bytes(4), struct.pack("=I", 1))
        self._forget_replaced()

    def _forget_replaced(self) -> None:
        """Corrects what it costs that a tracepoint is missing where others tell the same."""
        failed = {each.observation.stands_for for each in self.observed if not each.candidate}
        for gone in list(self.missing):
            left = providers.INSTEAD.get(gone.probe)
            if left is None or failed & {gone.probe, "fuse_request_end"}:
                continue
            gone.cost = left
            if not left:
                self.missing.remove(gone)

    def _put_tail(self, program: Program, tail: Tail, load: Future[int]) -> None:
        try:
            descriptor = load.result()
        except BpfError as error:
            if self.direct:
                raise
            self._miss(tail.function, str(error), tail)
            return
        program.set_tail(tail.array, tail.index, descriptor)
        os.close(descriptor)  # the array holds it

    def _name_of(self, probe: Probe, btf: Btf, layout: layouts.Layout) -> str | None:
        """The tracepoint to attach to; None, and noted as missing, where there is none."""
        name = probe.name_on(btf)
        reason = layout.missing.get(probe.feature)
        if reason is None and name is None:
            reason = "this kernel has no such tracepoint"
        if reason is None:
            return name
        if probe.required:
            raise RspliceError(f"cannot attach to {probe.tracepoint}: {reason}")
        self._miss(probe.tracepoint, reason, probe)
        return None

    def _miss(self, name: str, reason: str, of: Probe | Tail) -> None:
        self.missing.append(MissingProbe(name, reason, of.cost, list(of.findings)))

    @property
    def uncounted(self) -> list[str]:
        """The PageCounts that nobody counts in this run: they are unknown, not zero."""
        names = [p.counts for p in PROBES if p.counts and p.tracepoint not in self.attached]
        if "filemap_map_pages" in self.attached:
            names.remove("mapped_pages")
        return names if self.identity == "all" else [*names, "queued_mapped_pages"]

    def follow(self, pid: int) -> None:
        """Follows process *pid* (a thread group) and the children it makes from now on.

        RspliceError if there is no such process.
        """
        self.counters.follow(pid)

    def frame_of(self, page: int) -> int | None:
        """The number of a page frame, from the address of its struct page; None if not known."""
        if self._vmemmap is None or not page or not self._page_size:
            return None
        return (page - self._vmemmap) // self._page_size

    @property
    def program(self) -> Program:
        return self._program

    def lent_files(self) -> list[LentFile]:
        """The files whose cached pages were spliced, sent or copied, if they are noted."""
        if not self._verify:
            return []
        keys = [_LENT.unpack(key) for key, _ in self._program.map("lent_files").items()]
        return [
            LentFile(self.counters.kind(end), device, inode, generation)
            for inode, device, generation, end in keys
        ]

    def close(self) -> None:
        if self.journeys:
            self.journeys.close()
        self._program.close()


def with_fuse(btf: Btf) -> Btf:
    """The types of vmlinux, with those of fuse where that is a module and loaded."""
    module = Path(RUNNING).with_name("fuse")
    if btf.struct_id("fuse_req") is not None or not module.exists():
        return btf
    return Btf(str(module), btf)


def _explain(error: BpfError) -> str:
    if error.errno == errno.EPERM:
        from rsplice.tracers.capability import reason

        return reason() or f"the kernel refuses BPF: {error}"
    return f"the kernel refuses a probe: {error}"
