# SPDX-License-Identifier: MIT
"""The counters that the BPF programs keep: who is followed, and what was added up so far."""

from __future__ import annotations

import os
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from rsplice.audit import Endpoint, Finding, PageCounts
from rsplice.errors import RspliceError
from rsplice.events import MARKS, Mark, ProcessSeen, Tally
from rsplice.rules import TWO_LEGS
from rsplice.tracers import operations, usdt
from rsplice.tracers.copies import Copied, Copies, by_leg, once
from rsplice.tracers.findings import Findings, Process
from rsplice.tracers.kinds import is_filesystem, kind_name
from rsplice.tracers.program import Map, Program

# bpf/maps.h
_KEY = struct.Struct("=QQQII")
_TALLY = struct.Struct("=16Q")
_RECENT_KEY = 32
_CROWDED = 1  # bpf/processes.h
_PROCESS = struct.Struct("=II16sQQ")
_COUNTERS = 16
_PAGES = struct.Struct("=4Q")
_DECLARED = struct.Struct("=QQ")
_FLOW_KEY = 24  # the first bytes of a wish's key, which its tally's key follows
_FLOW = struct.Struct("=QII")
_WISH = struct.Struct("=QQ")
_DISPOSITIONS = ("copied", "shared", "moved", "direct", "remapped", "discarded")
_FLAGS = ("compat", "zerocopy", "loopback", "trunc", "peek", "move", "gift", "remap", "errqueue")
_SRC_DIRECT, _SRC_DAX, _DST_DIRECT, _DST_DAX = 1 << 9, 1 << 10, 1 << 11, 1 << 12
_RSPLICE = 1 << 13  # bpf/usdt.h
# bpf/usdt.c
_MARK_KEY = struct.Struct("=QII")
_MARK = struct.Struct("=6Q")

#: How often counters are read again because some of them moved meanwhile.
_READ_TRIES = 5
#: So many entries are quicker looked up than found in a walk through a map.
_FEW = 64
#: So many ended processes are worth a walk through the maps.
_RETIRE_AT = 2048


@dataclass
class Reading:
    """What the kernel has added up so far."""

    tallies: list[Tally] = field(default_factory=list)
    processes: list[ProcessSeen] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    events_lost: int = 0
    #: bytes copied in no leg, by where; None where copies are not measured
    outside: dict[str, int] | None = None


@dataclass(frozen=True)
class Started:
    """A process as the kernel side knows it (bpf/maps.h)."""

    pid: int
    ended: int  #: 0 while it is followed; LET_GO where it went on
    comm: bytes
    parent: int  #: the key of the process that started it; 0 for those that were asked for
    aside: int  #: F_ASIDE or F_OWN where that was done by a thread busy with something else


class Counters:
    """The maps of one run.

    :param program: the compiled programs, which own the maps
    :param has_flows: what leaves sockets is watched
    :param nr_slots: entries of the map "slots"
    :param has_marks: probes of librsplice are watched
    :param fuse_is_read: as for kinds.kind_name()
    """

    def __init__(
        self,
        program: Program,
        has_flows: bool,
        nr_slots: int,
        has_marks: bool = False,
        fuse_is_read: bool = True,
    ) -> None:
        self._fuse_is_read = fuse_is_read
        self._nr_slots = nr_slots
        self._tallies = program.map("tallies")
        self._processes = program.map("processes")
        self._followed = program.map("followed")
        self._slots = program.map("slots")
        self._recents = program.map("recents")
        self._moved = program.map("nr_moved")
        self._pages = program.map("page_counts")
        self._lost = program.map("lost")
        self._missed = program.missed
        self._declarations = program.map("declarations")
        self._names = program.map("filesystem_names")
        self._flows: Map | None = program.map("flows") if has_flows else None
        self._wishes: Map | None = program.map("wishes") if has_flows else None
        self._marks: Map | None = program.map("usdt_marks") if has_marks else None
        self._lost_marks: Map | None = program.map("usdt_lost") if has_marks else None
        self._filesystems: dict[int, str] = {}
        self._started = program.map("nr_started")
        self._ended = program.map("nr_ended")
        self.findings: Findings | None = None  #: where they are looked for
        self.copies: Copies | None = None  #: where they are measured
        # Of processes that have ended: taken out of the kernel's maps to make room.
        self._retired: dict[bytes, list[int]] = {}
        self._retired_pages: dict[bytes, list[int]] = {}
        self._retired_processes: dict[bytes, bytes] = {}
        self._retired_marks: dict[bytes, bytes] = {}
        # Bytes of each flow that were expected for those that have been forgotten.
        self._spent: dict[bytes, int] = {}

    def follow(self, pid: int) -> None:
        """Follows the process of *pid* and the children that it makes from now on.

        RspliceError if there is no such process.
        """
        pid, comm = identify(pid)
        self.follow_as(pid, pid << 32 | (int.from_bytes(os.urandom(4), "little")), comm)

    def follow_as(self, pid: int, key: int, comm: bytes, aside: int = 0) -> None:
        """Counts what thread group *pid* does from now on, and its children, under *key*."""
        self._processes.put(struct.pack("=Q", key), _PROCESS.pack(pid, 0, comm, 0, aside))
        self._followed.put(struct.pack("=I", pid), struct.pack("=Q", key))
        slot = struct.pack("=I", pid % self._nr_slots)
        (taken,) = struct.unpack("=Q", (self._slots.get(slot) or [bytes(8)])[0])
        mine = taken == 0 or taken >> 32 == pid
        self._slots.put(slot, struct.pack("=Q", key if mine else _CROWDED))

    def unfollow(self, pid: int) -> None:
        """Counts no more of what thread group *pid* does; it is no error if it has gone."""
        self._followed.delete(struct.pack("=I", pid))
        slot = struct.pack("=I", pid % self._nr_slots)
        (taken,) = struct.unpack("=Q", (self._slots.get(slot) or [bytes(8)])[0])
        if taken >> 32 == pid:
            self._slots.put(slot, bytes(8))

    def alive(self) -> list[int]:
        """The pids of followed processes that have not ended."""
        return list(self.followed())

    def followed(self) -> dict[int, int]:
        """The keys of followed processes that have not ended, by pid."""
        found = self._followed.items()
        return {_number(pid, "=I"): _number(values[0], "=Q") for pid, values in found}

    def started(self) -> dict[int, Started]:
        """All processes that there are counters of, by key."""
        return {
            _number(key, "=Q"): Started(*_PROCESS.unpack(values[0]))
            for key, values in self._processes.items()
        }

    def make_room(self) -> None:
        """Takes what ended processes left out of the kernel's maps, if it is worth the time.

        Call it now and then: a run may start more processes than the maps have room for.
        """
        if self._count(self._ended) - len(self._retired_processes) < _RETIRE_AT:
            return
        self.retire(
            {
                key: values[0]
                for key, values in self._processes.items()
                if _PROCESS.unpack(values[0])[1]
            }
        )

    def retire(self, gone: Mapping[bytes, bytes]) -> None:
        """Takes the counters of processes of which no more will come out of the kernel's maps.

        :param gone: what the map "processes" has of them
        """
        for key, _ in self._tallies.items():
            # Of those that are retired already: what has come back from the places in front.
            # Taken, not read and deleted: any call may send more of them back meanwhile.
            if key[:8] in gone or key[:8] in self._retired_processes:
                if values := self._tallies.take(key):
                    before = self._retired.get(key, [0] * _COUNTERS)
                    self._retired[key] = _add(before, _sum(_TALLY, values))
                if self.copies:
                    self.copies.retire(key)
        for key, _ in self._pages.items():
            if key in gone and (values := self._pages.take(key)):
                before = self._retired_pages.get(key, [0] * 4)
                self._retired_pages[key] = _add(before, _sum(_PAGES, values))
        if self._marks is not None:
            for key, values in self._marks.items():
                if key[:8] in gone:
                    self._retired_marks[key] = values[0]
                    self._marks.delete(key)
        for key, process in gone.items():
            self._retired_processes[key] = process
            self._processes.delete(key)

    def nr_started(self) -> int:
        """Processes that those which were followed have started."""
        return self._count(self._started)

    def comm_of(self, key: int) -> bytes | None:
        """The name of the process that is followed under *key*; None if it has ended."""
        values = self._processes.get(struct.pack("=Q", key))
        _, ended, comm, _, _ = _PROCESS.unpack(values[0]) if values else (0, 1, b"", 0, 0)
        return None if ended else bytes(comm)

    def has_ended(self, key: int) -> bool:
        """Whether the process that was followed under *key* has ended."""
        values = self._processes.get(struct.pack("=Q", key))
        return values is None or bool(_PROCESS.unpack(values[0])[1])

    def nr_lost(self) -> int:
        """Events that were lost so far."""
        lost = self._count(self._lost) + self._missed()
        if self._lost_marks is not None:
            lost += self._count(self._lost_marks)
        return lost

    def retire_keys(self, gone: Container[int]) -> None:
        """Retires the counters under the keys *gone*."""
        self.retire(
            {
                key: values[0]
                for key, values in self._processes.items()
                if _number(key, "=Q") in gone
            }
        )

    def forget(self, dead: Container[int]) -> None:
        """Drops the counters under the keys *dead*, and what is left of such."""
        maps = [self._tallies, self._pages, self._declarations]
        if self.findings:
            maps.append(self.findings.map)
        if self.copies:
            maps.append(self.copies.map)
        found = [(counters, [key for key, _ in counters.items()]) for counters in maps]
        wishes = self._wishes.items() if self._wishes is not None else ()
        found_wishes = [(key, _WISH.unpack(values[0])[0]) for key, values in wishes]
        # Read last: a process is noted before anything of it is counted.
        known = {_number(key, "=Q") for key, _ in self._processes.items()}
        for number in known:
            if number in dead:
                self._processes.delete(struct.pack("=Q", number))
        known.update(_number(key, "=Q") for key in self._retired_processes)

        def is_dead(key: bytes) -> bool:
            number = _number(key[:8], "=Q")
            return number in dead or number not in known

        for counters, keys in found:
            for key in filter(is_dead, keys):
                counters.delete(key)
        for retired in (self._retired, self._retired_pages, self._retired_marks):
            for key in list(filter(is_dead, retired)):
                del retired[key]
        if self.copies:
            self.copies.forget(is_dead)
        for key in list(filter(is_dead, self._retired_processes)):
            del self._retired_processes[key]
        gone = [(key, expected) for key, expected in found_wishes if is_dead(key[_FLOW_KEY:])]
        if gone:
            self._forget_wishes(gone)

    def _forget_wishes(self, gone: Sequence[tuple[bytes, int]]) -> None:
        """What is sent for them must prove nothing of others."""
        assert self._flows is not None and self._wishes is not None
        for key, expected in gone:
            flow = key[:_FLOW_KEY]
            self._spent[flow] = self._spent.get(flow, 0) + expected
            self._wishes.delete(key)
        there = {key for key, _ in self._flows.items()}
        self._spent = {key: n for key, n in self._spent.items() if key in there}

    def read(self, of: Set[int] | None = None, without: int = 0, measured: bool = True) -> Reading:
        """All tallies and processes so far: counts since the start, not differences.

        :param of: the keys of those that are wanted, all by default
        :param without: flags of calls that are not
        :param measured: whether tallies say what was counted where the kernel copies
        """
        reading = Reading()
        raw = self._raw_tallies() if of is None else self._raw_tallies_of(of, without)
        queued: dict[bytes, int] = {}
        for key, tally in raw.items():
            queued[key[:8]] = queued.get(key[:8], 0) + tally[15]
        sent = self._sent()
        declared = {k: _DECLARED.unpack(v[0]) for k, v in self._declarations.items()}
        copied = self.copies.read() if self.copies else Copied()
        for key, counts in raw.items():
            reading.tallies.append(
                self._tally(
                    key,
                    counts,
                    sent.get(key, (0, 0)),
                    declared.get(key, (0, 0)),
                    copied.legs.get(key, (0, 0)) if measured else None,
                )
            )
        reading.outside = copied.outside if self.copies else None
        pages = dict(self._retired_pages)
        for key, values in _entries(self._pages, of):
            pages[key] = _add(pages.get(key, [0] * 4), _sum(_PAGES, values))
        processes = dict(self._retired_processes)
        processes |= {key: values[0] for key, values in _entries(self._processes, of)}
        if of is not None:
            processes = {k: v for k, v in processes.items() if _number(k, "=Q") in of}
        for key, process in processes.items():
            pid, _, comm, _, _ = _PROCESS.unpack(process)
            faults, mapped, inserted, removed = pages.get(key, [0] * 4)
            counts_of = PageCounts(faults, mapped, queued.get(key, 0), inserted, removed)
            name = comm.split(b"\0")[0].decode(errors="replace")
            number = _number(key, "=Q")
            reading.processes.append(ProcessSeen(number, pid, name, counts_of))
        reading.marks = self._read_marks()
        if self.findings:
            known = {p.key: Process(p.pid, p.comm) for p in reading.processes}
            reading.findings = self.findings.read(known, of)
        reading.events_lost = self.nr_lost()
        return reading

    def _read_marks(self) -> list[Mark]:
        if self._marks is None:
            return []
        raw = self._retired_marks | {key: values[0] for key, values in self._marks.items()}
        return [_mark(key, value) for key, value in raw.items()]

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

    def _raw_tallies_of(self, of: Container[int], without: int) -> dict[bytes, list[int]]:
        """The same for some processes: only the places of their keys are looked at."""
        for _ in range(_READ_TRIES):
            moved = self._count(self._moved)
            raw: dict[bytes, list[int]] = {}
            stored = [(key, [values]) for key, values in self._retired.items()]
            stored += [
                (key, [list(_TALLY.unpack(v)) for v in values])
                for key, values in self._tallies.items()
            ]
            for key, values in stored:
                process, *_, flags = _KEY.unpack(key)
                if process in of and not flags & without:
                    for counts in values:
                        raw[key] = _add(raw.get(key, [0] * _COUNTERS), counts)
            for key in raw:
                for place in _places(key):
                    for value in self._recents.get(place) or []:
                        if value[:_RECENT_KEY] == key:
                            raw[key] = _add(raw[key], list(_TALLY.unpack(value[_RECENT_KEY:])))
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
        left = {
            key: max(0, _FLOW.unpack(values[0])[0] - self._spent.get(key, 0))
            for key, values in self._flows.items()
        }
        for key, values in self._wishes.items():
            flow, tally = key[:_FLOW_KEY], key[_FLOW_KEY:]
            expected, legs = _WISH.unpack(values[0])
            proven = min(expected, left.get(flow, 0))
            left[flow] = left.get(flow, 0) - proven
            first, second = sent.get(tally, (0, 0))
            sent[tally] = (first + proven * (legs & 1), second + proven * (legs >> 1 & 1))
        return sent

    def _tally(
        self,
        key: bytes,
        counts: list[int],
        sent: tuple[int, int],
        said: tuple[int, int],
        copied: tuple[int, int] | None,
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
        name = operations.via_name(via)
        counted = by_leg(copied, name in TWO_LEGS) if copied else {}
        # A tracepoint and a probe may have told of the same copies out of socket buffers.
        if copied is not None and counts[14] > counted.get(0, 0):
            counted[0] = counts[14]
        measured = {(leg, "copied"): min(count, nbytes) for leg, count in counted.items()}
        extra = {leg: count - nbytes for leg, count in counted.items() if count > nbytes}
        by_kernel = zip(("copied", "shared"), said, strict=True)
        declared = {(0, disposition): count for disposition, count in by_kernel if count}
        once(measured, identity)
        _clamp(nbytes, measured, identity, declared)
        return Tally(
            process,
            Endpoint(self.kind(source), bool(flags & _SRC_DIRECT), bool(flags & _SRC_DAX)),
            Endpoint(self.kind(destination), bool(flags & _DST_DIRECT), bool(flags & _DST_DAX)),
            name,
            frozenset(_flags(flags)),
            counts[0],
            nbytes,
            identity,
            measured,
            declared,
            extra,
        )

    def kind(self, end: int) -> str:
        """The name of an end (bpf/ends.h)."""
        if is_filesystem(end) and end & ~1 not in self._filesystems:
            for address, values in self._names.items():
                name = values[0].split(b"\0")[0].decode(errors="replace")
                self._filesystems[struct.unpack("=Q", address)[0]] = name
        return kind_name(end, self._filesystems, self._fuse_is_read)


def _flags(flags: int) -> Iterator[str]:
    yield from (name for i, name in enumerate(_FLAGS) if flags & 1 << i)
    if flags & _RSPLICE:
        yield "rsplice"


def _mark(key: bytes, value: bytes) -> Mark:
    process, number, detail = _MARK_KEY.unpack(key)
    calls, *nbytes = _MARK.unpack(value)
    probe = usdt.NAMES[number]
    return Mark(process, probe, detail, calls, tuple(nbytes[: len(MARKS[probe])]))


def _entries(counters: Map, of: Set[int] | None) -> Iterable[tuple[bytes, list[bytes]]]:
    """Those of a map by process: all, or at least those of the processes *of*."""
    if of is None or len(of) > _FEW:
        return counters.items()
    keys = (struct.pack("=Q", number) for number in of)
    return [(key, values) for key in keys if (values := counters.get(key)) is not None]


def _places(key: bytes) -> list[bytes]:
    """The two places of a tally in the map "recents" (recent_index() in bpf/account.h)."""
    process, source, destination, via, flags = _KEY.unpack(key)
    mix = process ^ source * 3 ^ destination * 5 ^ via * 7 ^ flags
    first = (mix * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 57 << 1
    return [struct.pack("=I", first), struct.pack("=I", first + 1)]


def _number(raw: bytes, layout: str) -> int:
    return int(struct.unpack(layout, raw)[0])


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


def map_sizes(cpus: int) -> dict[str, int]:
    """Entries of each map. Per-CPU values of many CPUs must not eat the machine: 32 MiB at most."""
    tallies = max(2048, min(8192, (32 << 20) // (_TALLY.size * cpus)))
    return {"MAX_PROCESSES": 8192, "MAX_TALLIES": tallies, "MAX_FLOWS": 8192, "SLOTS": 65536}


def identify(pid: int) -> tuple[int, bytes]:
    """The thread group that *pid* belongs to, and its name. RspliceError if there is none."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
        group = int(fields[b"Tgid"])
        with open(f"/proc/{group}/comm", "rb") as file:
            return group, file.read().rstrip(b"\n")[:15]
    except OSError as error:
        raise RspliceError(f"no process {pid}: {error.strerror}; check the pid") from error
