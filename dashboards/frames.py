# SPDX-License-Identifier: MIT
"""From successive snapshots to what one picture shows: totals so far, rates, the last minute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from math import ceil

from rsplice.audit import Audit, Counts, PageCounts, Path
from rsplice.dashboards import phrases
from rsplice.dashboards.spark import WINDOW, Sample
from rsplice.dashboards.text import sanitise


@dataclass(frozen=True)
class Frame:
    """A snapshot with the one before it. Rates are in bytes per second."""

    audit: Audit = field(default_factory=Audit)
    before: Audit = field(default_factory=Audit)
    at: float = 0.0  #: time of the snapshot in seconds
    seconds: float = 1.0  #: between the two
    copied: tuple[Sample, ...] = ()  #: rates of the last minute
    avoided: tuple[Sample, ...] = ()

    @property
    def now(self) -> Counts:
        """What a second brought, between the two snapshots."""
        return rate(self.before.totals, self.audit.totals, self.seconds)

    def next(self, audit: Audit, at: float) -> Frame:
        """The frame of the snapshot after this one; rates stay when no time has passed."""
        if at <= self.at:
            return Frame(audit, self.before, self.at, self.seconds, self.copied, self.avoided)
        seconds = at - self.at
        now = rate(self.audit.totals, audit.totals, seconds)
        copied = (*_recent(self.copied, at), Sample(self.at, at, now.copy_bytes))
        avoided = (*_recent(self.avoided, at), Sample(self.at, at, now.avoided_bytes))
        return Frame(audit, self.audit, at, seconds, copied, avoided)


def rate(before: Counts, after: Counts, seconds: float) -> Counts:
    """The difference a second, rounded up so that what happened does not look like nothing."""
    names = (f.name for f in fields(Counts) if f.name != "evidence")
    per_second = {n: ceil((getattr(after, n) - getattr(before, n)) / seconds) for n in names}
    return Counts(**per_second, evidence=after.evidence)


def _recent(samples: Iterable[Sample], at: float) -> Iterable[Sample]:
    return (sample for sample in samples if sample.end > at - WINDOW)


@dataclass(frozen=True)
class Entry:
    """A row of a table: a path, or a process with all of its paths."""

    name: str  #: safe to show
    paths: list[Path]
    before: list[Path]  #: the same in the snapshot before
    pages: PageCounts = field(default_factory=PageCounts)

    @property
    def counts(self) -> Counts:
        """The counts so far."""
        return _sum(self.paths)

    def now(self, seconds: float) -> Counts:
        """The counts per second since the snapshot before."""
        return rate(_sum(self.before), self.counts, seconds)

    def weight(self, what: str) -> int:
        """What to sort by: "copied", "now" (copied since the snapshot before) or "payload"."""
        if what == "payload":
            return sum(path.counts.payload_bytes for path in self.paths)
        copied = sum(path.counts.copy_bytes for path in self.paths)
        if what == "copied":
            return copied
        return copied - sum(path.counts.copy_bytes for path in self.before)


def path_entries(frame: Frame) -> list[Entry]:
    """The rows of the table of paths."""
    before = {path.name: [path] for path in frame.before.paths}
    return [
        Entry(sanitise(path.name), [path], before.get(path.name, [])) for path in frame.audit.paths
    ]


def process_entries(frame: Frame) -> list[Entry]:
    """The rows of the table of processes."""
    before = {(p.pid, p.comm): p.paths for p in frame.before.processes}
    return [
        Entry(phrases.process_name(p), p.paths, before.get((p.pid, p.comm), []), p.pages)
        for p in frame.audit.processes
    ]


def ordered(entries: list[Entry], sort: str) -> list[Entry]:
    """*entries* by name, or by a weight, largest first."""
    if sort == "name":
        return sorted(entries, key=lambda entry: entry.name)
    return sorted(entries, key=lambda entry: -entry.weight(sort))


def _sum(paths: Iterable[Path]) -> Counts:
    total = Counts()
    for path in paths:
        total.add(path.counts)
    return total
