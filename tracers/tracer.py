# SPDX-License-Identifier: MIT
"""Attaches the probes, says who is followed, and reads what the kernel added up."""

from __future__ import annotations

import errno
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rsplice.audit import Endpoint, MissingProbe, PageCounts
from rsplice.errors import RspliceError
from rsplice.events import ProcessSeen, Tally
from rsplice.tracers import layout as layouts
from rsplice.tracers import operations
from rsplice.tracers.btf import Btf
from rsplice.tracers.kinds import is_filesystem, kind_name
from rsplice.tracers.program import BpfError, Map, Program, possible_cpus, source_text

IDENTITY = {"off": 0, "sample": 1, "all": 2}


@dataclass(frozen=True)
class Probe:
    """One program and the raw tracepoint it attaches to.

    :param tracepoint: its name; the program is ``tp_<name>``
    :param cost: what the reader loses without it
    :param feature: the layout feature that it needs
    :param required: whether there is no audit without it
    :param identity: whether it serves page comparison only
    :param older: the tracepoint's name on older kernels, with the same first argument
    """

    tracepoint: str
    cost: str
    feature: str = "core"
    required: bool = False
    identity: bool = False
    older: str = ""

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
    Probe("mm_filemap_add_to_page_cache", "page-cache inserts are not counted"),
    Probe("mm_filemap_delete_from_page_cache", "page-cache removals are not counted"),
    Probe("mm_filemap_map_pages", "pages mapped by fault-around are not counted"),
    Probe("page_fault_user", "page faults are not counted"),
    Probe("skb_copy_datagram_iovec", "copies out of socket buffers are inferred, not measured"),
    Probe("net_dev_start_xmit", layouts.FEATURES["network"], "network", identity=True),
    Probe("fuse_request_send", layouts.FEATURES["fuse"], "fuse", identity=True),
    Probe("fuse_request_end", layouts.FEATURES["fuse"], "fuse", identity=True),
    Probe(
        "io_uring_submit_req",
        "multishot completions are not seen",
        "io_uring",
        older="io_uring_submit_sqe",
    ),
    Probe("io_uring_complete", layouts.FEATURES["io_uring"], "io_uring"),
)

# bpf/maps.h
_KEY = struct.Struct("=QQQII")
_TALLY = struct.Struct("=16Q")
_RECENT_KEY = 32
_SLOTS, _CROWDED = 65536, 1  # bpf/processes.h
_PROCESS = struct.Struct("=II16s")
_COUNTERS = 16
_PAGES = struct.Struct("=4Q")
_DECLARED = struct.Struct("=QQ")
_FLOW_KEY = 24  # the first bytes of a wish's key, which its tally's key follows
_FLOW = struct.Struct("=QII")
_WISH = struct.Struct("=QQ")
_DISPOSITIONS = ("copied", "shared", "moved", "direct", "remapped", "discarded")
_FLAGS = ("compat", "zerocopy", "loopback", "trunc", "peek", "move", "gift", "remap", "errqueue")
_SRC_DIRECT, _SRC_DAX, _DST_DIRECT, _DST_DAX = 1 << 9, 1 << 10, 1 << 11, 1 << 12

#: How often counters are read again because some of them moved meanwhile.
_READ_TRIES = 5
#: So many ended processes are worth a walk through the maps.
_RETIRE_AT = 2048


@dataclass
class Reading:
    """What the kernel has added up so far."""

    tallies: list[Tally] = field(default_factory=list)
    processes: list[ProcessSeen] = field(default_factory=list)
    events_lost: int = 0


class Tracer:
    """The probes of one run. Closing it, or dying, detaches everything.

    :param identity: how many calls have their pages compared: "all", "sample" (1 in 16) or "off"
    :param follow_all: follow every process of the machine but this one
    :param direct: how kernel memory is read (bpf/access.h); None takes the faster that works
    """

    def __init__(
        self, identity: str = "all", follow_all: bool = False, direct: bool | None = None
    ) -> None:
        self.identity = identity
        self.attached: list[str] = []
        self.missing: list[MissingProbe] = []
        btf = Btf()
        layout = layouts.resolve(btf)
        can_direct = btf.function_id("bpf_rdonly_cast") is not None
        self.direct = can_direct if direct is None else direct and can_direct
        self._program = self._start(btf, layout, follow_all)
        self._tallies = self._program.map("tallies")
        self._processes = self._program.map("processes")
        self._followed = self._program.map("followed")
        self._slots = self._program.map("slots")
        self._recents = self._program.map("recents")
        self._moved = self._program.map("nr_moved")
        self._pages = self._program.map("page_counts")
        self._lost = self._program.map("lost")
        self._declarations = self._program.map("declarations")
        self._names = self._program.map("filesystem_names")
        has_flows = "net_dev_start_xmit" in self.attached
        self._flows: Map | None = self._program.map("flows") if has_flows else None
        self._wishes: Map | None = self._program.map("wishes") if has_flows else None
        self._filesystems: dict[int, str] = {}
        self._ended = self._program.map("nr_ended")
        # Of processes that have ended: taken out of the kernel's maps to make room.
        self._retired: dict[bytes, list[int]] = {}
        self._retired_pages: dict[bytes, list[int]] = {}
        self._retired_processes: dict[bytes, bytes] = {}

    def _start(self, btf: Btf, layout: layouts.Layout, follow_all: bool) -> Program:
        """Compiles and attaches; falls back to the slower reads where the faster are refused."""
        sizes = _map_sizes(possible_cpus())
        defines = layout.defines() + operations.defines()
        settings = {
            **sizes,
            "IDENTITY": IDENTITY[self.identity],
            "FOLLOW_ALL": int(follow_all),
            "SELF_PID": os.getpid(),
            "DIRECT": int(self.direct),
        }
        defines += "".join(f"#define {k} {v}\n" for k, v in settings.items())
        program = Program(source_text(defines), btf, self.direct)
        try:
            self._fill_tables(program)
            self._attach_all(program, btf, layout)
        except BpfError as error:
            program.close()
            if not self.direct or error.errno == errno.EPERM:
                raise RspliceError(_explain(error)) from error
            self.direct = False
            self.attached.clear()
            self.missing.clear()
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
        with ThreadPoolExecutor() as pool:
            loads = [
                (p, name, pool.submit(program.load, f"tp_{p.tracepoint}", name))
                for p in wanted
                if (name := self._name_of(p, btf, layout))
            ]
        loads.sort(key=lambda load: load[0].tracepoint == "sys_exit")
        for probe, name, load in loads:
            try:
                program.attach(load.result(), name)
                self.attached.append(probe.tracepoint)
            except BpfError as error:
                if probe.required or self.direct:
                    raise
                self.missing.append(MissingProbe(probe.tracepoint, str(error), probe.cost))

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
        self.missing.append(MissingProbe(probe.tracepoint, reason, probe.cost))
        return None

    def follow(self, pid: int) -> None:
        """Follows process *pid* (a thread group) and the children it makes from now on."""
        comm = _comm_of(pid)
        key = pid << 32 | (int.from_bytes(os.urandom(4), "little"))
        self._processes.put(struct.pack("=Q", key), _PROCESS.pack(pid, 0, comm))
        self._followed.put(struct.pack("=I", pid), struct.pack("=Q", key))
        slot = struct.pack("=I", pid % _SLOTS)
        (taken,) = struct.unpack("=Q", (self._slots.get(slot) or [bytes(8)])[0])
        mine = taken == 0 or taken >> 32 == pid
        self._slots.put(slot, struct.pack("=Q", key if mine else _CROWDED))

    def alive(self) -> list[int]:
        """The pids of followed processes that have not ended."""
        return [struct.unpack("=I", key)[0] for key, _ in self._followed.items()]

    def make_room(self) -> None:
        """Takes what ended processes left out of the kernel's maps, if it is worth the time.

        Call it now and then: a run may start more processes than the maps have room for.
        """
        if self._count(self._ended) - len(self._retired_processes) < _RETIRE_AT:
            return
        gone = {
            key: values[0]
            for key, values in self._processes.items()
            if _PROCESS.unpack(values[0])[1]
        }
        for key, values in self._tallies.items():
            if key[:8] in gone:
                before = self._retired.get(key, [0] * _COUNTERS)
                self._retired[key] = _add(before, _sum(_TALLY, values))
                self._tallies.delete(key)
        for key, values in self._pages.items():
            if key in gone:
                before = self._retired_pages.get(key, [0] * 4)
                self._retired_pages[key] = _add(before, _sum(_PAGES, values))
                self._pages.delete(key)
        for key, process in gone.items():
            self._retired_processes[key] = process
            self._processes.delete(key)

    def read(self) -> Reading:
        """All tallies and processes so far: counts since the start, not differences."""
        reading = Reading()
        raw = self._raw_tallies()
        queued: dict[bytes, int] = {}
        for key, tally in raw.items():
            queued[key[:8]] = queued.get(key[:8], 0) + tally[15]
        sent = self._sent()
        declared = {k: _DECLARED.unpack(v[0]) for k, v in self._declarations.items()}
        for key, counts in raw.items():
            reading.tallies.append(
                self._tally(key, counts, sent.get(key, (0, 0)), declared.get(key, (0, 0)))
            )
        pages = dict(self._retired_pages)
        for key, values in self._pages.items():
            pages[key] = _add(pages.get(key, [0] * 4), _sum(_PAGES, values))
        processes = dict(self._retired_processes)
        processes |= {key: values[0] for key, values in self._processes.items()}
        for key, process in processes.items():
            pid, _, comm = _PROCESS.unpack(process)
            faults, mapped, inserted, removed = pages.get(key, [0] * 4)
            counts_of = PageCounts(faults, mapped, queued.get(key, 0), inserted, removed)
            name = comm.split(b"\0")[0].decode(errors="replace")
            (number,) = struct.unpack("=Q", key)
            reading.processes.append(ProcessSeen(number, pid, name, counts_of))
        reading.events_lost = self._count(self._lost)
        return reading

    def _raw_tallies(self) -> dict[bytes, list[int]]:
        """Key -> counters, from wherever they stand: retired, in the hash, in front of it."""
        for _ in range(_READ_TRIES):
            moved = self._count(self._moved)
            raw = dict(self._retired)
            for key, values in self._tallies.items():
                raw[key] = _add(raw.get(key, [0] * _COUNTERS), _sum(_TALLY, values))
            for _, values in self._recents.items():
                for value in values:
                    key = value[:_RECENT_KEY]
                    if any(key[:8]):
                        counts = list(_TALLY.unpack(value[_RECENT_KEY:]))
                        raw[key] = _add(raw.get(key, [0] * _COUNTERS), counts)
            if self._count(self._moved) == moved:
                break
        return raw

    @staticmethod
    def _count(counters: Map) -> int:
        """The sum of all values of a map of numbers."""
        return sum(struct.unpack("=Q", v)[0] for _, values in counters.items() for v in values)

    def _sent(self) -> dict[bytes, tuple[int, int]]:
        """Bytes of each tally whose page-cache pages were seen leaving a socket, by leg."""
        sent: dict[bytes, tuple[int, int]] = {}
        if self._flows is None or self._wishes is None:
            return sent
        left = {key: _FLOW.unpack(values[0])[0] for key, values in self._flows.items()}
        for key, values in self._wishes.items():
            flow, tally = key[:_FLOW_KEY], key[_FLOW_KEY:]
            expected, legs = _WISH.unpack(values[0])
            proven = min(expected, left.get(flow, 0))
            left[flow] = left.get(flow, 0) - proven
            first, second = sent.get(tally, (0, 0))
            sent[tally] = (first + proven * (legs & 1), second + proven * (legs >> 1 & 1))
        return sent

    def _tally(
        self, key: bytes, counts: list[int], sent: tuple[int, int], said: tuple[int, int]
    ) -> Tally:
        process, source, destination, via, flags = _KEY.unpack(key)
        nbytes = counts[1]
        identity: dict[tuple[int, str], int] = {}
        for leg in (0, 1):
            for i, disposition in enumerate(_DISPOSITIONS):
                if counts[2 + 6 * leg + i]:
                    identity[leg, disposition] = counts[2 + 6 * leg + i]
            if sent[leg]:
                identity[leg, "shared"] = identity.get((leg, "shared"), 0) + sent[leg]
        measured = {(0, "copied"): counts[14]} if counts[14] else {}
        by_kernel = zip(("copied", "shared"), said, strict=True)
        declared = {(0, disposition): count for disposition, count in by_kernel if count}
        _clamp(nbytes, measured, identity, declared)
        return Tally(
            process,
            Endpoint(self._kind(source), bool(flags & _SRC_DIRECT), bool(flags & _SRC_DAX)),
            Endpoint(self._kind(destination), bool(flags & _DST_DIRECT), bool(flags & _DST_DAX)),
            operations.via_name(via),
            frozenset(name for i, name in enumerate(_FLAGS) if flags & 1 << i),
            counts[0],
            nbytes,
            identity,
            measured,
            declared,
        )

    def _kind(self, end: int) -> str:
        if is_filesystem(end) and end & ~1 not in self._filesystems:
            for address, values in self._names.items():
                name = values[0].split(b"\0")[0].decode(errors="replace")
                self._filesystems[struct.unpack("=Q", address)[0]] = name
        return kind_name(end, self._filesystems)

    def close(self) -> None:
        self._program.close()


def _add(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _sum(layout: struct.Struct, values: list[bytes]) -> list[int]:
    """Adds up the values of all CPUs."""
    return [sum(column) for column in zip(*(layout.unpack(v) for v in values), strict=True)]


def _clamp(nbytes: int, *known: dict[tuple[int, str], int]) -> None:
    """Takes back what is known twice, so that no leg knows more bytes than it carried.

    The stronger kind of evidence comes first and keeps its bytes.
    """
    left = {0: nbytes, 1: nbytes}
    for evidence in known:
        for (leg, disposition), count in list(evidence.items()):
            kept = min(count, left[leg])
            left[leg] -= kept
            if kept:
                evidence[leg, disposition] = kept
            else:
                del evidence[leg, disposition]


def _map_sizes(cpus: int) -> dict[str, int]:
    """Entries of each map. Per-CPU values of many CPUs must not eat the machine: 32 MiB at most."""
    tallies = max(2048, min(8192, (32 << 20) // (_TALLY.size * cpus)))
    return {"MAX_PROCESSES": 8192, "MAX_TALLIES": tallies, "MAX_FLOWS": 8192}


def _comm_of(pid: int) -> bytes:
    """The process's name. RspliceError if there is no such process."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().rstrip(b"\n")[:15]
    except OSError as error:
        raise RspliceError(f"no process {pid}: {error.strerror}; check the pid") from error


def _explain(error: BpfError) -> str:
    if error.errno == errno.EPERM:
        from rsplice.tracers.capability import reason

        return reason() or f"the kernel refuses BPF: {error}"
    return f"the kernel refuses a probe: {error}"
