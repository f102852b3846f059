# SPDX-License-Identifier: MIT
"""What an audit says: the data that every view shows and every program reads.

All byte counts are bytes, all times seconds unless a name ends in ``_ns``. The words are
defined in docs/metrics.md. Nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

SCHEMA = "rsplice.audit/1"

#: Every payload byte of a leg has exactly one of these.
DISPOSITIONS = ("copied", "shared", "moved", "direct", "remapped", "discarded", "unknown")


class Evidence(IntEnum):
    """How a number is known. The larger the value the weaker; the weakest wins in a total."""

    NONE = 0  #: nothing was established yet (no payload, or only unknown bytes)
    MEASURED = 1  #: counted at the kernel's copying functions or at their callers
    IDENTITY = 2  #: the same (or another) page was seen at both ends
    DECLARED = 3  #: the kernel's own word (SO_EE_CODE_ZEROCOPY_COPIED, ...)
    INFERRED = 4  #: follows from operation, flags and file types on this kernel

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Endpoint:
    """One end of a leg: its kind as a user names it, and how it was opened."""

    kind: str  #: "ext4", "pipe", "tcp", "user memory", "/dev/null", ...
    direct: bool = False  #: the file is open with O_DIRECT
    dax: bool = False  #: the inode is DAX

    def __str__(self) -> str:
        return self.kind + (" O_DIRECT" if self.direct else "") + (" DAX" if self.dax else "")


@dataclass
class Counts:
    """The byte counts of a path, of a process or of the whole run.

    The dispositions add up to ``payload_bytes``; ``copy_bytes`` counts with multiplicity.
    """

    payload_bytes: int = 0
    copy_bytes: int = 0
    baseline_bytes: int = 0
    copied: int = 0
    shared: int = 0
    moved: int = 0
    direct: int = 0
    remapped: int = 0
    discarded: int = 0
    unknown: int = 0
    operations: int = 0
    evidence: Evidence = Evidence.NONE

    @property
    def avoided_bytes(self) -> int:
        """Bytes a read/write relay would have copied and this run did not; may be negative."""
        return self.baseline_bytes - self.copy_bytes

    @property
    def copies_per_byte(self) -> float:
        """copy_bytes / payload_bytes, 0.0 where nothing was carried."""
        return self.copy_bytes / self.payload_bytes if self.payload_bytes else 0.0

    def add(self, other: Counts) -> None:
        """Adds *other*; the weaker evidence stays."""
        for f in fields(self):
            if f.name != "evidence":
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        self.evidence = max(self.evidence, other.evidence)

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(Counts) if f.name != "evidence"}
        out["avoided_bytes"] = self.avoided_bytes
        out["evidence"] = self.evidence.word
        return out

    @staticmethod
    def from_json(data: dict[str, Any]) -> Counts:
        values = {f.name: int(data[f.name]) for f in fields(Counts) if f.name != "evidence"}
        return Counts(**values, evidence=Evidence[data["evidence"].upper()])


@dataclass
class Path:
    """All legs of one kind: (source kind -> destination kind, via operation)."""

    source: str
    destination: str
    via: str
    counts: Counts = field(default_factory=Counts)
    why: str = ""  #: one sentence for a user: why bytes were copied, or how it is known

    @property
    def name(self) -> str:
        return f"{self.source} -> {self.destination} via {self.via}"

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "destination": self.destination,
            "via": self.via,
            **self.counts.to_json(),
            "why": self.why,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Path:
        return Path(
            data["source"], data["destination"], data["via"], Counts.from_json(data), data["why"]
        )


@dataclass
class PageCounts:
    """Page-table references and page-cache changes, in events and pages (of 4096 bytes)."""

    faults: int = 0  #: page faults taken in user mode
    mapped_pages: int = 0  #: page-cache pages offered to page tables by fault-around
    queued_mapped_pages: int = 0  #: pages queued in a pipe while in some page table
    inserted_pages: int = 0  #: pages added to a page cache
    removed_pages: int = 0  #: pages removed from a page cache

    def add(self, other: PageCounts) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class Process:
    """One followed process (all of its threads)."""

    pid: int
    comm: str
    paths: list[Path] = field(default_factory=list)
    pages: PageCounts = field(default_factory=PageCounts)

    @property
    def counts(self) -> Counts:
        total = Counts()
        for path in self.paths:
            total.add(path.counts)
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "comm": self.comm,
            "paths": [p.to_json() for p in self.paths],
            **_pages_to_json(self.pages),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Process:
        return Process(
            data["pid"],
            data["comm"],
            [Path.from_json(p) for p in data["paths"]],
            _pages_from_json(data),
        )


@dataclass
class Finding:
    """One lifecycle finding: a violation, a hazard or a missed move."""

    name: str
    kind: str
    count: int
    first: dict[str, Any]
    advice: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Finding:
        return Finding(**{f.name: data[f.name] for f in fields(Finding)})


@dataclass
class MissingProbe:
    """A probe that is not attached: why, and what its absence costs the reader."""

    probe: str
    reason: str
    cost: str


@dataclass
class Accuracy:
    """How far the numbers can be trusted."""

    probes_attached: list[str] = field(default_factory=list)
    probes_missing: list[MissingProbe] = field(default_factory=list)
    events_lost: int = 0
    unknown_bytes: int = 0
    identity: str = "all"  #: "all", "sample" or "off": how many calls had their pages compared
    uncounted: list[str] = field(default_factory=list)  #: PageCounts that nobody counted: not zero

    def to_json(self) -> dict[str, Any]:
        return {
            "probes_attached": self.probes_attached,
            "probes_missing": [dict(vars(m)) for m in self.probes_missing],
            "events_lost": self.events_lost,
            "unknown_bytes": self.unknown_bytes,
            "identity": self.identity,
            "uncounted": self.uncounted,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Accuracy:
        return Accuracy(
            list(data["probes_attached"]),
            [MissingProbe(**m) for m in data["probes_missing"]],
            data["events_lost"],
            data["unknown_bytes"],
            data.get("identity", "all"),
            list(data.get("uncounted", [])),
        )


@dataclass
class Audit:
    """One audit, or one snapshot of an audit that is still running (counts so far)."""

    command: list[str] = field(default_factory=list)
    exit_status: int | None = None  #: None while running, and for -p and --all
    duration_s: float = 0.0
    kernel_release: str = ""
    kernel_where: str = "running"  #: "running" or "vm"
    totals: Counts = field(default_factory=Counts)
    paths: list[Path] = field(default_factory=list)  #: by copy_bytes, largest first
    processes: list[Process] = field(default_factory=list)  #: by copy_bytes, largest first
    pages: PageCounts = field(default_factory=PageCounts)
    findings: list[Finding] = field(default_factory=list)
    accuracy: Accuracy = field(default_factory=Accuracy)

    def to_json(self) -> dict[str, Any]:
        """The document of schema rsplice.audit/1."""
        from rsplice import __version__

        return {
            "schema": SCHEMA,
            "rsplice": __version__,
            "command": self.command,
            "exit_status": self.exit_status,
            "duration_s": round(self.duration_s, 6),
            "kernel": {"release": self.kernel_release, "where": self.kernel_where},
            "totals": self.totals.to_json(),
            "paths": [p.to_json() for p in self.paths],
            "processes": [p.to_json() for p in self.processes],
            **_pages_to_json(self.pages),
            "findings": [f.to_json() for f in self.findings],
            "accuracy": self.accuracy.to_json(),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Audit:
        """The audit of a document that to_json() made. KeyError or ValueError if it is not one."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema is {data.get('schema')!r}, not {SCHEMA!r}")
        return Audit(
            list(data["command"]),
            data["exit_status"],
            data["duration_s"],
            data["kernel"]["release"],
            data["kernel"]["where"],
            Counts.from_json(data["totals"]),
            [Path.from_json(p) for p in data["paths"]],
            [Process.from_json(p) for p in data["processes"]],
            _pages_from_json(data),
            [Finding.from_json(f) for f in data["findings"]],
            Accuracy.from_json(data["accuracy"]),
        )


def _pages_to_json(pages: PageCounts) -> dict[str, Any]:
    return {
        "page_tables": {
            "faults": pages.faults,
            "mapped_pages": pages.mapped_pages,
            "queued_mapped_pages": pages.queued_mapped_pages,
        },
        "page_cache": {
            "inserted_pages": pages.inserted_pages,
            "removed_pages": pages.removed_pages,
        },
    }


def _pages_from_json(data: dict[str, Any]) -> PageCounts:
    return PageCounts(**data["page_tables"], **data["page_cache"])
