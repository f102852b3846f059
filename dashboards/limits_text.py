# SPDX-License-Identifier: MIT
"""What to say of a limit that failed, to somebody who sees nothing else of the audit."""

from __future__ import annotations

from collections.abc import Iterator

from rsplice.audit import Audit, Path
from rsplice.dashboards import phrases
from rsplice.dashboards.text import sanitise
from rsplice.limits import Limit

_PATHS_MAX = 10
_FINDINGS_MAX = 10
_PROCESSES_MAX = 3
_INDENT = "    "


def failure_lines(audit: Audit, limit: Limit) -> list[str]:
    """Why *limit* failed *audit*: what held, where, how that is known, why, what to change.

    :return: lines that are safe to show, the first one the reason in short and the last one the
        accuracy line; [] if the limit does not hold
    """
    held = limit.holds(audit)
    if held is None:
        return []
    paths, findings = limit.paths(audit), phrases.by_kind(limit.findings(audit))
    lines = [sanitise(held)]
    for path in paths[:_PATHS_MAX]:
        lines += _path_lines(audit, path)
    lines += _more(len(paths) - _PATHS_MAX, "path")
    for found in findings[:_FINDINGS_MAX]:
        first = phrases.first_seen(found)
        lines += [phrases.finding(found), *_notes(first and f"first: {first}", found.advice)]
    lines += _more(len(findings) - _FINDINGS_MAX, "finding")
    return [*lines, phrases.accuracy(audit.accuracy)]


def _path_lines(audit: Audit, path: Path) -> Iterator[str]:
    counts = path.counts
    yield (
        f"{sanitise(path.name)}: payload {phrases.size(counts.payload_bytes)}, "
        f"copied {phrases.copied(counts)}, {phrases.copies_per_byte(counts)} copies per byte, "
        f"{counts.evidence.word}"
    )
    yield from _notes(phrases.dispositions(counts), path.why, _by(audit, path))


def _by(audit: Audit, path: Path) -> str:
    """Whose path it is, most bytes first; "" where there is one process or none."""
    if len(audit.processes) < 2:
        return ""
    shares = [
        (-own.counts.copy_bytes, -own.counts.payload_bytes, phrases.process_name(process))
        for process in audit.processes
        for own in process.paths
        if own.name == path.name
    ]
    names = [name for *_, name in sorted(shares)]
    others = len(names) - _PROCESSES_MAX
    named = ", ".join(names[:_PROCESSES_MAX]) + (f" and {others} more" if others > 0 else "")
    return named and f"by {named}"


def _more(number: int, noun: str) -> list[str]:
    return [f"and {phrases.plural(number, f'more {noun}')}, all in the JSON"] if number > 0 else []


def _notes(*sentences: str) -> list[str]:
    return [_INDENT + sanitise(sentence) for sentence in sentences if sentence]
