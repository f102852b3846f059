# SPDX-License-Identifier: MIT
"""The ledger: tallies in, audit out. Pure: no I/O, no clock, no order of arrival."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

from rsplice.audit import (
    DISPOSITIONS,
    Accuracy,
    Amount,
    Audit,
    Counts,
    Evidence,
    Fallback,
    Filled,
    Finding,
    PageCounts,
    Path,
    Paths,
    Process,
    Published,
    RspliceCalls,
)
from rsplice.events import FLAGS, HOWS, MARKS, WHYS, Mark, ProcessSeen, Tally
from rsplice.rules import SINK, Leg, Verdict, Version, classify, leg_indices, why_seen

#: Violations are shown before hazards, and these before missed moves.
_FINDING_KINDS = ("violation", "hazard", "missed move")

_NOTHING = "nothing was carried"
_MEASURED = "counted where the kernel copies"
_DECLARED = {
    "copied": "the kernel reported that it copied in spite of MSG_ZEROCOPY",
    "shared": "the kernel reported that it sent the caller's own pages",
}


class Ledger:
    """Adds up what tracers tell about one kernel.

    The audit depends on what was added and not on its order, nor on how the tallies were split
    or spread over ledgers that were then merged.

    :param kernel: (major, minor) of the kernel that was traced
    """

    def __init__(self, kernel: Version) -> None:
        self._kernel = kernel
        self._rows: dict[tuple[int, str, str, str], _Row] = {}
        self._processes: dict[int, ProcessSeen] = {}
        self._findings: dict[tuple[str, str, str], Finding] = {}
        self._calls: dict[int, _Calls] = {}  # of librsplice, by process

    def add(self, tally: Tally) -> None:
        """Adds the bytes of *tally*; ValueError, with nothing added, if it contradicts itself."""
        _check(tally)
        path = (str(tally.source), str(tally.destination), tally.via)
        row = _row_of(tally, self._kernel)
        self._row((tally.process, *path)).add(row)
        if "rsplice" in tally.flags:
            self._calls_of(tally.process).seen.setdefault(path, _Row()).add(row)

    def mark(self, mark: Mark) -> None:
        """Adds what librsplice said; ValueError, with nothing added, if it contradicts itself."""
        _check_mark(mark)
        self._calls_of(mark.process).said.update(_sums(mark))

    def see(self, process: ProcessSeen) -> None:
        """Notes who a process is; what was known under the same key is replaced."""
        self._processes[process.key] = process

    def add_finding(self, finding: Finding) -> None:
        """Adds a finding; those of one name and reason become one, the earliest its example."""
        key = (finding.kind, finding.name, str(finding.first.get("reason", "")))
        known = self._findings.get(key)
        self._findings[key] = deepcopy(finding) if known is None else _one_finding(known, finding)

    def merge(self, other: Ledger) -> None:
        """Adds all that *other* holds; ValueError if it is of another kernel.

        A process that both know has the larger of each of its page counters.
        """
        if other._kernel != self._kernel:
            raise ValueError(f"a ledger of kernel {other._kernel} with one of {self._kernel}")
        for key, row in list(other._rows.items()):
            self._row(key).add(row)
        for number, calls in list(other._calls.items()):
            self._calls_of(number).add(calls)
        for process in list(other._processes.values()):
            known = self._processes.get(process.key)
            self.see(process if known is None else _one_process(known, process))
        for finding in list(other._findings.values()):
            self.add_finding(finding)

    def audit(
        self,
        *,
        command: Sequence[str] = (),
        exit_status: int | None = None,
        duration_s: float = 0.0,
        kernel_release: str = "",
        kernel_where: str = "running",
        accuracy: Accuracy | None = None,
    ) -> Audit:
        """The audit so far; ``accuracy.unknown_bytes`` is filled in here.

        Paths and processes come by copy_bytes, then by payload_bytes, largest first.
        """
        totals, pages = Counts(), PageCounts()
        for row in self._rows.values():
            totals.add(row.counts)
        for process in self._processes.values():
            pages.add(process.pages)
        return Audit(
            command=list(command),
            exit_status=exit_status,
            duration_s=duration_s,
            kernel_release=kernel_release,
            kernel_where=kernel_where,
            totals=totals,
            paths=Paths(_paths((key[1:], row) for key, row in self._rows.items())),
            processes=self._process_list(),
            pages=pages,
            findings=sorted((deepcopy(f) for f in self._findings.values()), key=_finding_order),
            accuracy=replace(deepcopy(accuracy or Accuracy()), unknown_bytes=totals.unknown),
            rsplice_calls=_rsplice_calls(self._calls.values()),
        )

    def _row(self, key: tuple[int, str, str, str]) -> _Row:
        return self._rows.setdefault(key, _Row())

    def _calls_of(self, process: int) -> _Calls:
        return self._calls.setdefault(process, _Calls())

    def _process_list(self) -> list[Process]:
        rows: dict[int, list[tuple[tuple[str, str, str], _Row]]] = {
            key: [] for key in (*self._processes, *self._calls)
        }
        for (process, *path), row in self._rows.items():
            rows.setdefault(process, []).append(((path[0], path[1], path[2]), row))
        processes = []
        for key in sorted(rows):
            seen = self._processes.get(key, ProcessSeen(key, 0, "?"))
            calls = _rsplice_calls([self._calls[key]] if key in self._calls else [])
            paths = _paths(rows[key])
            processes.append(Process(seen.pid, seen.comm, paths, replace(seen.pages), calls))
        return sorted(processes, key=lambda p: (*_by_size(p.counts), p.pid, p.comm))


@dataclass
class _Row:
    """The bytes of one path, and the reasons: (disposition, leg, why) -> bytes."""

    counts: Counts = field(default_factory=Counts)
    whys: Counter[tuple[str, int, str]] = field(default_factory=Counter)

    def add(self, other: _Row) -> None:
        self.counts.add(other.counts)
        self.whys.update(other.whys)

    def book(self, leg: int, verdict: Verdict, nbytes: int, evidence: Evidence) -> None:
        """Adds bytes with one disposition. Unknown bytes are evidence of nothing."""
        if not nbytes:
            return
        counts = self.counts
        setattr(counts, verdict.disposition, getattr(counts, verdict.disposition) + nbytes)
        counts.copy_bytes += verdict.copies * nbytes
        if verdict.disposition != "unknown":
            counts.evidence = max(counts.evidence, evidence)
        self.whys[verdict.disposition, leg, verdict.why] += nbytes

    @property
    def why(self) -> str:
        """The reason of most copied bytes, else of the largest disposition; the later leg's."""
        if not self.whys:
            return _NOTHING
        largest = max(DISPOSITIONS, key=lambda d: int(getattr(self.counts, d)))
        told = "copied" if self.counts.copied else largest
        reasons = ((n, leg, why) for (d, leg, why), n in self.whys.items() if d == told)
        return max(reasons)[2]


@dataclass
class _Calls:
    """Of librsplice: what it said, (probe, detail, what) -> number, and the paths inside."""

    said: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    seen: dict[tuple[str, str, str], _Row] = field(default_factory=dict)

    def add(self, other: _Calls) -> None:
        self.said.update(other.said)
        for path, row in other.seen.items():
            self.seen.setdefault(path, _Row()).add(row)

    def amount(self, probe: str, what: str) -> Amount:
        return Amount(self.said[probe, 0, "calls"], self.said[probe, 0, what])


def _sums(mark: Mark) -> dict[tuple[str, int, str], int]:
    """What a mark adds to each number of a process."""
    named = {"calls": mark.calls, **dict(zip(MARKS[mark.probe], mark.nbytes, strict=True))}
    return {(mark.probe, mark.detail, what): number for what, number in named.items()}


def _rsplice_calls(parts: Iterable[_Calls]) -> RspliceCalls:
    whole = _Calls()
    for part in parts:
        whole.add(part)
    said = whole.said
    fallbacks: dict[str, Fallback] = {}
    filled = Filled()
    for (probe, detail, what), number in said.items():
        if probe == "fallback":
            why = _why(detail)
            known = fallbacks.setdefault(why, Fallback(why, 0, 0))
            field_name = "calls" if what == "calls" else "nbytes"
            setattr(known, field_name, getattr(known, field_name) + number)
        elif probe == "fill" and what == "filled":
            how = HOWS[detail] if detail < len(HOWS) else "unknown"
            setattr(filled, how, getattr(filled, how) + number)
    return RspliceCalls(
        whole.amount("reserve", "reserved"),
        filled,
        Published(*(said["publish", 0, what] for what in ("calls", *MARKS["publish"]))),
        sorted(fallbacks.values(), key=lambda f: (-f.nbytes, f.why)),
        whole.amount("abort", "aborted"),
        _paths(whole.seen.items()),
    )


def _why(detail: int) -> str:
    """The reasons of a fallback, each a bit."""
    known = [why for bit, why in enumerate(WHYS) if detail >> bit & 1]
    if detail >> len(WHYS) or not detail:
        known.append(f"reason {detail >> len(WHYS) << len(WHYS):#x}")
    return "; ".join(known)


def _check_mark(mark: Mark) -> None:
    """ValueError if *mark* cannot come from a sound tracer."""
    if mark.probe not in MARKS or len(mark.nbytes) != len(MARKS[mark.probe]):
        raise ValueError(f"no such probe, or not its numbers, in {mark}")
    if min(mark.detail, mark.calls, *mark.nbytes) < 0:
        raise ValueError(f"negative number in {mark}")
    if mark.detail and mark.probe not in ("fill", "fallback"):
        raise ValueError(f"a detail where there is none in {mark}")


def _row_of(tally: Tally, kernel: Version) -> _Row:
    row = _Row(Counts(operations=tally.operations))
    for index in leg_indices(tally.via):
        leg = Leg(tally.via, index, tally.source, tally.destination, tally.flags)
        _book_leg(row, leg, tally, classify(leg, kernel))
    return row


def _book_leg(row: _Row, leg: Leg, tally: Tally, rule: Verdict) -> None:
    """Books what was established about one leg, and the rest by rule."""
    rest = tally.nbytes
    for evidence, known in _known(tally):
        for (index, disposition), nbytes in known.items():
            if index == leg.index:
                row.book(index, _established(leg, disposition, evidence, rule), nbytes, evidence)
                rest -= nbytes
    row.book(leg.index, rule, rest, Evidence.INFERRED)
    row.counts.copy_bytes += tally.extra.get(leg.index, 0)
    row.counts.payload_bytes += tally.nbytes
    row.counts.baseline_bytes += _baseline(leg) * tally.nbytes


def _baseline(leg: Leg) -> int:
    """Copies of each byte that write(2) or read(2) would have made in place of this leg."""
    return 0 if SINK.holds(leg.ends[1]) else 1


def _established(leg: Leg, disposition: str, evidence: Evidence, rule: Verdict) -> Verdict:
    """The verdict on bytes whose disposition was seen; a rule that agrees knows the cause."""
    if disposition == rule.disposition and disposition not in ("shared", "moved"):
        return rule
    why = why_seen(leg, disposition)
    if evidence is Evidence.MEASURED and disposition == "copied":
        why = _MEASURED
    if evidence is Evidence.DECLARED:
        why = _DECLARED.get(disposition, why)
    return Verdict(disposition, int(disposition == "copied"), why)


def _known(tally: Tally) -> tuple[tuple[Evidence, Mapping[tuple[int, str], int]], ...]:
    return (
        (Evidence.MEASURED, tally.measured),
        (Evidence.IDENTITY, tally.identity),
        (Evidence.DECLARED, tally.declared),
    )


def _check(tally: Tally) -> None:
    """ValueError if *tally* cannot come from a sound tracer."""
    if tally.operations < 0 or tally.nbytes < 0:
        raise ValueError(f"negative counter in {tally}")
    if tally.flags - FLAGS.keys():
        raise ValueError(f"flags that are not in FLAGS in {tally}")
    per_leg = dict.fromkeys(leg_indices(tally.via), 0)
    for _, known in _known(tally):
        for (index, disposition), nbytes in known.items():
            if index not in per_leg or disposition not in DISPOSITIONS or nbytes < 0:
                raise ValueError(f"no such leg, disposition or byte count in {tally}")
            per_leg[index] += nbytes
    if tally.extra.keys() - per_leg.keys() or min(tally.extra.values(), default=0) < 0:
        raise ValueError(f"no such leg or byte count in {tally}")
    if max(per_leg.values()) > tally.nbytes:
        raise ValueError(f"more bytes established than carried in {tally}")


def _paths(rows: Iterable[tuple[tuple[str, str, str], _Row]]) -> list[Path]:
    """One path per (source, destination, via), largest first."""
    merged: dict[tuple[str, str, str], _Row] = {}
    for key, row in rows:
        merged.setdefault(key, _Row()).add(row)
    paths = [Path(*key, row.counts, row.why) for key, row in merged.items()]
    return sorted(paths, key=lambda p: (*_by_size(p.counts), p.source, p.destination, p.via))


def _by_size(counts: Counts) -> tuple[int, int]:
    return -counts.copy_bytes, -counts.payload_bytes


def _finding_order(finding: Finding) -> tuple[int, int, str, str]:
    kinds = (*_FINDING_KINDS, finding.kind)
    return kinds.index(finding.kind), -finding.count, finding.name, finding.kind


def _one_process(one: ProcessSeen, other: ProcessSeen) -> ProcessSeen:
    pages = {name: max(n, getattr(other.pages, name)) for name, n in vars(one.pages).items()}
    return ProcessSeen(
        one.key, max(one.pid, other.pid), max(one.comm, other.comm), PageCounts(**pages)
    )


def _one_finding(one: Finding, other: Finding) -> Finding:
    first = min(one, other, key=_finding_age)
    return replace(deepcopy(first), count=one.count + other.count)


def _finding_age(finding: Finding) -> tuple[float, str, str]:
    """Orders examples by their time, then by their content so that the choice is always one."""
    time = finding.first.get("time", float("inf"))
    content = json.dumps(finding.first, sort_keys=True, default=str)
    return float(time), content, finding.advice
