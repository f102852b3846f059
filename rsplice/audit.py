# SPDX-License-Identifier: MIT
"""What an audit says: the data that every view shows and every program reads.

All byte counts are bytes, all times seconds unless a name ends in ``_ns``. The words are
defined in docs/metrics.md. Nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, SupportsIndex, overload

from rsplice.journey import Journeys

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

    @property
    def payload_bytes(self) -> int:
        return self.counts.payload_bytes

    @property
    def copy_bytes(self) -> int:
        return self.counts.copy_bytes

    @property
    def avoided_bytes(self) -> int:
        return self.counts.avoided_bytes

    @property
    def copied(self) -> int:
        return self.counts.copied

    @property
    def shared(self) -> int:
        return self.counts.shared

    @property
    def moved(self) -> int:
        return self.counts.moved

    @property
    def direct(self) -> int:
        return self.counts.direct

    @property
    def remapped(self) -> int:
        return self.counts.remapped

    @property
    def discarded(self) -> int:
        return self.counts.discarded

    @property
    def unknown(self) -> int:
        return self.counts.unknown

    @property
    def operations(self) -> int:
        return self.counts.operations

    @property
    def evidence(self) -> Evidence:
        return self.counts.evidence

    @property
    def fills_pipe(self) -> bool:
        """Whether data comes out of a file or socket into a pipe."""
        pipes = ("pipe", "fifo")
        return self.destination in pipes and self.source not in (*pipes, "user memory")

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


class Paths(list[Path]):
    """Paths in their order; one of them also by its name, "ext4 -> pipe via splice"."""

    @overload
    def __getitem__(self, which: SupportsIndex) -> Path: ...
    @overload
    def __getitem__(self, which: slice) -> list[Path]: ...
    @overload
    def __getitem__(self, which: str) -> Path: ...
    def __getitem__(self, which: SupportsIndex | slice | str) -> Path | list[Path]:
        """A path by name or number. KeyError with the names that there are."""
        if not isinstance(which, str):
            return super().__getitem__(which)
        for path in self:
            if path.name == which:
                return path
        names = ", ".join(repr(path.name) for path in self)
        raise KeyError(f"no path {which!r}; there are {names or 'none'}")


@dataclass
class Amount:
    """Probes that were hit, and the bytes that they told of."""

    calls: int = 0
    nbytes: int = 0

    def to_json(self) -> dict[str, int]:
        return {"calls": self.calls, "bytes": self.nbytes}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Amount:
        return Amount(data["calls"], data["bytes"])


@dataclass
class Filled:
    """Bytes by how they came into their pages."""

    direct: int = 0  #: a device wrote them: O_DIRECT
    reference: int = 0  #: in pages of the source itself
    copied: int = 0  #: by the CPU
    generated: int = 0  #: made by the CPU
    unknown: int = 0

    @property
    def nbytes(self) -> int:
        return self.direct + self.reference + self.copied + self.generated + self.unknown


@dataclass
class Published:
    """Bytes by what the library says became of them; the words are those of a leg."""

    calls: int = 0
    moved: int = 0
    shared: int = 0
    direct: int = 0
    copied: int = 0
    unknown: int = 0

    @property
    def nbytes(self) -> int:
        return self.moved + self.shared + self.direct + self.copied + self.unknown


@dataclass
class Fallback:
    """Bytes that the library had to have copied, for one reason."""

    why: str
    calls: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        return {"why": self.why, "calls": self.calls, "bytes": self.nbytes}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Fallback:
        return Fallback(data["why"], data["calls"], data["bytes"])


#: struct fuse_out_header, which the library puts in front of a reply: no payload of its calls.
_REPLY_HEADER = 16


@dataclass
class RspliceCalls:
    """Calls of librsplice: what it meant to do, by its USDT probes, and what was seen in them."""

    reserved: Amount = field(default_factory=Amount)
    filled: Filled = field(default_factory=Filled)
    published: Published = field(default_factory=Published)
    fallbacks: list[Fallback] = field(default_factory=list)  #: most bytes first
    aborted: Amount = field(default_factory=Amount)
    seen: list[Path] = field(default_factory=list)  #: the legs made inside these calls

    def __bool__(self) -> bool:
        return self != RspliceCalls()

    @property
    def seen_counts(self) -> Counts:
        """The sum of what was seen. A byte that came and went by a pipe was in two legs."""
        total = Counts()
        for path in self.seen:
            total.add(path.counts)
        return total

    @property
    def differences(self) -> list[str]:
        """Where intention and fate differ, a sentence each; what nobody saw is no difference."""
        said, seen = self.published, self.seen_counts
        # Filled, and then the consumer failed, or has not been given them yet.
        filled, pending = self.filled, max(0, self.filled.nbytes - said.nbytes)
        by_cpu = min(pending, filled.copied + filled.generated + filled.unknown)
        by_reference = min(pending, filled.reference + filled.unknown)
        headers = _REPLY_HEADER * self.reserved.calls
        lent = sum(path.counts.shared for path in self.seen if path.fills_pipe)
        most = seen.copy_bytes + seen.unknown
        sentences = []
        if seen.payload_bytes < said.nbytes:
            sentences.append(f"{said.nbytes} bytes handed on, {seen.payload_bytes} seen")
        elif said.copied > most:
            sentences.append(f"{said.copied} bytes copied, no more than {most} seen copied")
        if seen.copy_bytes > said.copied + said.unknown + by_cpu + headers:
            sentences.append(f"{said.copied} bytes copied, {seen.copy_bytes} seen copied")
        if lent > said.shared + said.copied + said.unknown + by_reference + seen.discarded:
            sentences.append(f"{said.shared} bytes shared, {lent} seen shared with the source")
        return [f"by the library's word {sentence}" for sentence in sentences]

    def to_json(self) -> dict[str, Any]:
        return {
            "reserved": self.reserved.to_json(),
            "filled": dict(vars(self.filled)),
            "published": dict(vars(self.published)),
            "fallbacks": [f.to_json() for f in self.fallbacks],
            "aborted": self.aborted.to_json(),
            "seen": [p.to_json() for p in self.seen],
            "differences": self.differences,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> RspliceCalls:
        return RspliceCalls(
            Amount.from_json(data["reserved"]),
            Filled(**data["filled"]),
            Published(**data["published"]),
            [Fallback.from_json(f) for f in data["fallbacks"]],
            Amount.from_json(data["aborted"]),
            [Path.from_json(p) for p in data["seen"]],
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
    rsplice_calls: RspliceCalls = field(default_factory=RspliceCalls)

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
            **({"rsplice_calls": self.rsplice_calls.to_json()} if self.rsplice_calls else {}),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Process:
        return Process(
            data["pid"],
            data["comm"],
            [Path.from_json(p) for p in data["paths"]],
            _pages_from_json(data),
            _calls_from_json(data),
        )


@dataclass
class Finding:
    """One lifecycle finding: a violation, a hazard or a missed move."""

    name: str
    kind: str
    count: int
    first: dict[str, Any]
    advice: str

    @property
    def label(self) -> str:
        """Its name and, if it has one, its reason: "steal-refused: large folio"."""
        return finding_label(self.name, str(self.first.get("reason", "")))

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Finding:
        return Finding(**{f.name: data[f.name] for f in fields(Finding)})


def finding_label(name: str, reason: str) -> str:
    """What tells findings apart in one audit, and names them in stories of pages."""
    return f"{name}: {reason}" if reason else name


@dataclass
class MissingProbe:
    """A probe that is not attached: why, and what its absence costs the reader."""

    probe: str
    reason: str
    cost: str
    findings: list[str] = field(default_factory=list)  #: names of those that nobody sees without it


@dataclass
class Accuracy:
    """How far the numbers can be trusted."""

    probes_attached: list[str] = field(default_factory=list)
    probes_missing: list[MissingProbe] = field(default_factory=list)
    events_lost: int = 0
    unknown_bytes: int = 0
    identity: str = "all"  #: "all", "sample" or "off": how many calls had their pages compared
    uncounted: list[str] = field(default_factory=list)  #: PageCounts that nobody counted: not zero
    usdt_files: list[str] = field(default_factory=list)  #: whose probes of librsplice are attached
    measured_at: list[str] = field(default_factory=list)  #: kernel functions that count copies
    #: bytes copied in no leg, by where: no entry is made where nothing counts them
    outside: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "probes_attached": self.probes_attached,
            "probes_missing": [dict(vars(m)) for m in self.probes_missing],
            "events_lost": self.events_lost,
            "unknown_bytes": self.unknown_bytes,
            "identity": self.identity,
            "uncounted": self.uncounted,
            "usdt_files": self.usdt_files,
            "measured_at": self.measured_at,
            "outside": self.outside,
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
            list(data.get("usdt_files", [])),
            list(data.get("measured_at", [])),
            dict(data.get("outside", {})),
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
    paths: Paths = field(default_factory=Paths)  #: by copy_bytes, largest first
    processes: list[Process] = field(default_factory=list)  #: by copy_bytes, largest first
    pages: PageCounts = field(default_factory=PageCounts)
    findings: list[Finding] = field(default_factory=list)
    accuracy: Accuracy = field(default_factory=Accuracy)
    rsplice_calls: RspliceCalls = field(default_factory=RspliceCalls)  #: of all processes
    journeys: Journeys | None = None  #: of pages, if they were asked for

    @property
    def copy_bytes(self) -> int:
        """Bytes the CPU copied, with multiplicity."""
        return self.totals.copy_bytes

    @property
    def avoided_bytes(self) -> int:
        """Bytes that a read/write relay would have copied, less those that were (can be < 0)."""
        return self.totals.avoided_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes that crossed the legs."""
        return self.totals.payload_bytes

    @property
    def copies_per_byte(self) -> float:
        """copy_bytes / payload_bytes, 0.0 where nothing was carried."""
        return self.totals.copies_per_byte

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
            "rsplice_calls": self.rsplice_calls.to_json(),
            "findings": [f.to_json() for f in self.findings],
            **({"journeys": self.journeys.to_json()} if self.journeys else {}),
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
            Paths(Path.from_json(p) for p in data["paths"]),
            [Process.from_json(p) for p in data["processes"]],
            _pages_from_json(data),
            [Finding.from_json(f) for f in data["findings"]],
            Accuracy.from_json(data["accuracy"]),
            _calls_from_json(data),
            Journeys.from_json(data["journeys"]) if data.get("journeys") else None,
        )


def _calls_from_json(data: dict[str, Any]) -> RspliceCalls:
    """Audits of before librsplice was traced have none."""
    calls = data.get("rsplice_calls")
    return RspliceCalls() if calls is None else RspliceCalls.from_json(calls)


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
