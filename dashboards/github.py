# SPDX-License-Identifier: MIT
"""An audit in GitHub Actions: annotations, the step's summary, and a report that commands nothing.

How a step's output is read, on standard output and standard error alike: actions/runner,
src/Runner.Common/ActionCommand.cs. A line is a command where it begins with ``::name``
(TryParseV2), and also where ``##[name]`` stands anywhere in it (TryParse).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rsplice.audit import Audit, Path
from rsplice.dashboards import phrases
from rsplice.dashboards.limits_text import failure_lines
from rsplice.dashboards.text import command_line, emit, sanitise
from rsplice.limits import Limit

#: A step's summary may have 1 MiB, and a step at most ten annotations that are shown.
_PATHS_MAX = 20
_HEADINGS = ("path", "operations", "payload", "copied", "copies per byte", "evidence", "why")


def commands(audit: Audit, limits: Sequence[Limit]) -> str:
    """A command ``::error`` for each limit that failed, and ``::warning`` if not all is known."""
    found = [
        _command("error", f"rsplice: {sanitise(limit.text)}", [lines[0], _name(audit), *lines[1:]])
        for limit in limits
        if (lines := failure_lines(audit, limit))
    ]
    if audit.accuracy.events_lost or audit.accuracy.unknown_bytes:
        told = ["more than was counted may have been copied", phrases.accuracy(audit.accuracy)]
        found.append(_command("warning", "rsplice: not all is known", told))
    return "".join(found)


def summary(audit: Audit, limits: Sequence[Limit]) -> str:
    """Markdown to append to the file that GITHUB_STEP_SUMMARY names."""
    totals = phrases.totals(audit.totals, audit.accuracy.events_lost)
    blocks = [
        [f"### rsplice: {_markdown(_name(audit))}"],
        [_outcome(audit, limit) for limit in limits],
        [_markdown(totals)],
        _table(audit.paths),
        [
            f"- {_markdown(phrases.finding(found))}: {_markdown(found.advice)}"
            for found in phrases.by_kind(audit.findings)
        ],
        [_markdown(phrases.accuracy(audit.accuracy))],
    ]
    return "".join("\n".join(lines) + "\n\n" for lines in blocks if lines)


@contextmanager
def commands_stopped(file: IO[str]) -> Iterator[None]:
    """What is written to *file* meanwhile is no command, whatever it looks like."""
    token = secrets.token_hex(16)
    # A line of its own, even where the line before was not ended.
    emit(file, f"\n::stop-commands::{token}\n")
    try:
        yield
    finally:
        emit(file, f"::{token}::\n")


def _command(kind: str, title: str, lines: Sequence[str]) -> str:
    """A workflow command. Titles and lines have been sanitised: they hold no line breaks."""
    escaped = title.replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    message = "%0A".join(line.replace("%", "%25") for line in lines)
    return f"::{kind} title={escaped}::{message}\n"


def _name(audit: Audit) -> str:
    status = f", exit status {audit.exit_status}" if audit.exit_status is not None else ""
    return (command_line(audit.command) or "running processes") + status


def _outcome(audit: Audit, limit: Limit) -> str:
    held = limit.holds(audit)
    return f"- failed: {_markdown(held)}" if held else f"- passed: {_markdown(limit.text)}"


def _table(paths: Sequence[Path]) -> list[str]:
    if not paths:
        return []
    more = len(paths) - _PATHS_MAX
    return [
        _row(_HEADINGS),
        "| :--- | ---: | ---: | ---: | ---: | :--- | :--- |",
        *(_row(_cells(path)) for path in paths[:_PATHS_MAX]),
        *([f"\nand {phrases.plural(more, 'more path')}, all in the JSON"] if more > 0 else []),
    ]


def _cells(path: Path) -> list[str]:
    counts = path.counts
    return [
        path.name,
        phrases.count(counts.operations),
        phrases.size(counts.payload_bytes),
        phrases.copied(counts),
        phrases.copies_per_byte(counts),
        counts.evidence.word,
        path.why,
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _markdown(text: str) -> str:
    """*text* as itself: no markup, no HTML, no link and nobody mentioned."""
    return re.sub(r"[!\"#$&()*+/:;<=>@\[\\\]^_`{|}~]", r"\\\g<0>", sanitise(text))
