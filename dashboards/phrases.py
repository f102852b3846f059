# SPDX-License-Identifier: MIT
"""The numbers of an audit in words, the same in every view. All results are safe to show."""

from __future__ import annotations

from rsplice.audit import (
    DISPOSITIONS,
    Accuracy,
    Counts,
    Finding,
    PageCounts,
    Path,
    Process,
    RspliceCalls,
)
from rsplice.dashboards.text import sanitise

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_KINDS = ("violation", "hazard", "missed move")


def size(nbytes: int) -> str:
    """*nbytes* in at most eight characters, nine if negative: "1023 B", "1.50 MiB"."""
    if nbytes < 0:
        return "-" + size(-nbytes)
    if nbytes < 1024:
        return f"{nbytes} B"
    value = nbytes / 1024
    for unit in _UNITS:
        if round(value) < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def count(number: int) -> str:
    """*number* in at most six characters: "999999", "1.50 M"."""
    if number < 1_000_000:
        return str(number)
    value, unit = (number / 1e6, "M") if number < 999.5e6 else (number / 1e9, "G")
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def plural(number: int, noun: str) -> str:
    """ "1 probe", "2 probes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """ "0.42 s", "12.3 s", "1:02", "1:02:03"."""
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def copied(counts: Counts, lost: int = 0) -> str:
    """The bytes copied: "?" where none was seen but some cannot be known, ">=" where more may be.

    :param lost: events lost, which may have been copies
    """
    if not (counts.unknown or lost):
        return size(counts.copy_bytes)
    return f">={size(counts.copy_bytes)}" if counts.copy_bytes else "?"


def avoided(counts: Counts) -> str:
    """The bytes avoided: "?" where all are unknown, "<=" where some are."""
    return _at_most(counts, size(counts.avoided_bytes))


def percent(counts: Counts) -> str:
    """The share of the baseline that was avoided, never overstated; "-" without a baseline."""
    hundredfold, baseline = 100 * counts.avoided_bytes, counts.baseline_bytes
    if not baseline:
        return "-"
    if counts.unknown:
        return _at_most(counts, f"{-(-hundredfold // baseline)} %")
    return "<1 %" if 0 < hundredfold < baseline else f"{hundredfold // baseline} %"


def _at_most(counts: Counts, text: str) -> str:
    if not counts.unknown:
        return text
    return "?" if counts.unknown >= counts.payload_bytes else f"<={text}"


def copies_per_byte(counts: Counts) -> str:
    """Copies per byte of payload, with the marks of :func:`copied`; "-" without payload."""
    if not counts.payload_bytes:
        return "-"
    if counts.unknown and not counts.copy_bytes:
        return "?"
    ratio = counts.copies_per_byte
    text = "<0.01" if 0 < ratio < 0.01 else f"{ratio:.2f}"
    return f">={text.lstrip('<')}" if counts.unknown and ratio >= 0.01 else text


def dispositions(counts: Counts) -> str:
    """What became of the bytes that were not copied: "shared 1.00 MiB, unknown 3 B"."""
    others = (name for name in DISPOSITIONS if name != "copied" and getattr(counts, name))
    return ", ".join(f"{name} {size(getattr(counts, name))}" for name in others)


def totals(counts: Counts, lost: int = 0) -> str:
    """The line of totals: payload, copied, avoided, per cent."""
    return (
        f"payload {size(counts.payload_bytes)}, copied {copied(counts, lost)}, "
        f"avoided {avoided(counts)} ({percent(counts)})"
    )


def intended(calls: RspliceCalls) -> str:
    """What librsplice says became of the bytes: "moved 1.00 MiB, copied 3 B"."""
    published = vars(calls.published).items()
    told = (f"{name} {size(nbytes)}" for name, nbytes in published if nbytes and name != "calls")
    return ", ".join(told) or "nothing handed on"


def seen(calls: RspliceCalls) -> list[str]:
    """What the kernel was seen to do in the calls of librsplice, a phrase for each path."""
    return [f"{sanitise(path.name)}: {_all_dispositions(path)}" for path in calls.seen]


def _all_dispositions(path: Path) -> str:
    counts = path.counts
    copied_ = [f"copied {size(counts.copy_bytes)}"] if counts.copy_bytes else []
    return ", ".join([*copied_, *filter(None, [dispositions(counts)])])


def ways(calls: RspliceCalls) -> str:
    """How librsplice filled, why it fell back, what it aborted; "" if there is nothing of these."""
    filled = ", ".join(f"{how} {size(n)}" for how, n in vars(calls.filled).items() if n)
    fell_back = ", ".join(f"{size(f.nbytes)} ({sanitise(f.why)})" for f in calls.fallbacks)
    aborted = size(calls.aborted.nbytes) if calls.aborted.calls else ""
    parts = {"filled": filled, "fell back": fell_back, "aborted": aborted}
    return "; ".join(f"{name} {text}" for name, text in parts.items() if text)


def differs(sentence: str) -> str:
    """A difference between what librsplice says and what was seen."""
    return f"DIFFERS: {sanitise(sentence)}"


def rsplice_calls(calls: RspliceCalls) -> str:
    """All of it in one line: calls, bytes, intended, seen copied."""
    return (
        f"rsplice: {plural(calls.reserved.calls, 'call')}, intended {intended(calls)}; "
        f"seen copied {copied(calls.seen_counts)}"
    )


def page_tables(pages: PageCounts, known: Accuracy) -> str:
    """The page-table references; "?" for what was not counted."""
    return (
        f"page tables: {_counted('faults', pages, known, 'fault')}, "
        f"{_counted('mapped_pages', pages, known, 'page')} mapped by fault-around, "
        f"{_counted('queued_mapped_pages', pages, known)} queued while mapped"
    )


def page_cache(pages: PageCounts, known: Accuracy) -> str:
    """The changes of the page cache; "?" for what was not counted."""
    return (
        f"page cache: {_counted('inserted_pages', pages, known, 'page')} inserted, "
        f"{_counted('removed_pages', pages, known)} removed"
    )


def _counted(name: str, pages: PageCounts, known: Accuracy, noun: str = "") -> str:
    if name in known.uncounted:
        return f"? {noun}s" if noun else "?"
    number: int = getattr(pages, name)
    return plural(number, noun) if noun else str(number)


def process_name(process: Process) -> str:
    """ "cp[123]"."""
    return f"{sanitise(process.comm)}[{process.pid}]"


def by_kind(findings: list[Finding]) -> list[Finding]:
    """Violations first, then hazards, then missed moves."""
    order = {kind: rank for rank, kind in enumerate(_KINDS)}
    return sorted(findings, key=lambda f: order.get(f.kind, len(order)))


def finding(found: Finding) -> str:
    """ "violation: double-owner, 3 times"."""
    times = "once" if found.count == 1 else f"{found.count} times"
    return f"{sanitise(found.kind)}: {sanitise(found.name)}, {times}"


def first_seen(found: Finding) -> str:
    """The first occurrence of a finding: "pid 7, comm cp"; "" if nothing is known of it."""
    known = ((key, value) for key, value in found.first.items() if value not in ("", None))
    return sanitise(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known))


#: Where bytes were copied that belong to no leg.
_OUTSIDE = {
    "other_calls": "in other calls",
    "kernel_threads": "by kernel threads",
    "packets": "of zero-copy packets",
}


def accuracy(known: Accuracy, *, details: bool = True) -> str:
    """The accuracy line: how far the numbers can be trusted.

    :param details: name each missing probe with the reason and what its absence costs
    """
    missing = f"{len(known.probes_missing)} missing"
    if details and known.probes_missing:
        missing += f" ({'; '.join(missing_probes(known))})"
    line = (
        f"accuracy: {plural(len(known.probes_attached), 'probe')} attached, {missing}, "
        f"{plural(known.events_lost, 'event')} lost, {plural(known.unknown_bytes, 'byte')} unknown"
    )
    if known.usdt_files:
        line += f", librsplice in {plural(len(known.usdt_files), 'file')}"
    if known.measured_at:
        line += f", copies measured at {plural(len(known.measured_at), 'function')}"
    if told := ", ".join(f"{size(n)} {_OUTSIDE[k]}" for k, n in known.outside.items() if n):
        line += f"; copied in none of these calls: {told}"
    checked = {
        "sample": ", pages of some calls compared, no findings looked for",
        "off": ", no pages compared, no findings looked for",
    }
    return line + checked.get(known.identity, "")


def missing_probes(known: Accuracy) -> list[str]:
    """ "probe: reason -> cost" for each probe that is not attached."""
    return [sanitise(f"{m.probe}: {m.reason} -> {m.cost}") for m in known.probes_missing]
