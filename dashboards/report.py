# SPDX-License-Identifier: MIT
"""The report of an audit as text, for a terminal or a file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import IO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from rsplice.audit import Audit, Counts, PageCounts, Path, RspliceCalls
from rsplice.dashboards import phrases
from rsplice.dashboards.findings import STYLES, stories_of
from rsplice.dashboards.journeys import journey_lines, story_lines
from rsplice.dashboards.table import Column, header, tall_row
from rsplice.dashboards.text import command_line, emit, sanitise

WIDTH = 80  #: columns where there is no terminal to ask
_WIDTH_MIN = 64  #: narrower terminals wrap the table themselves
_PROCESSES_MAX = 20
_INDENT = "    "
_COLUMNS = (
    Column("OPS", 7),
    Column("PAYLOAD", 9),
    Column("COPIED", 11),
    Column("COPIES/B", 9),
    Column("EVIDENCE", 10, left=True),
)
_CALL_COLUMNS = (Column("CALLS", 7), Column("BYTES", 9))
_SEEN_MAX = 8


class Report:
    """Draws an audit: totals, paths, librsplice, findings, processes, pages, accuracy."""

    def __init__(self, audit: Audit, *, recorded: bool = False) -> None:
        self._audit = audit
        self._recorded = recorded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines(options.max_width):
            yield from _wrapped(line, console, options.max_width)

    def _lines(self, width: int) -> Iterator[Text]:
        audit = self._audit
        yield Text(_title(audit, self._recorded), style="bold")
        yield Text(phrases.totals(audit.totals, audit.accuracy.events_lost), style="bold")
        yield Text()
        yield from _path_lines(audit.paths, width)
        yield Text()
        yield from _rsplice_lines(audit, width)
        yield from _finding_lines(audit, width)
        yield from journey_lines(audit.journeys, width)
        if len(audit.processes) > 1:
            yield from _process_lines(audit, width)
            yield Text()
        yield Text(phrases.page_tables(audit.pages, audit.accuracy))
        yield Text(phrases.page_cache(audit.pages, audit.accuracy))
        yield Text(phrases.accuracy(audit.accuracy), style=accuracy_style(audit))


def render_report(audit: Audit, *, recorded: bool = False) -> Report:
    """The report as something that rich can print at any width.

    :param recorded: the audit comes from a recording, which the first line then says
    """
    return Report(audit, recorded=recorded)


def print_report(
    audit: Audit,
    file: IO[str],
    width: int | None = None,
    color: bool | None = None,
    *,
    recorded: bool = False,
) -> None:
    """Prints the report to *file*; a reader that has gone away is no error.

    :param width: columns; by default those of the terminal, 80 where *file* is none
    :param color: by default only on a terminal without NO_COLOR; without it the text is plain
    :raises RspliceError: the report cannot be written
    """
    if color is None:
        color = wants_color(file)
    text = io.StringIO()
    console = Console(
        file=text,
        width=width or _terminal_width(file),
        force_terminal=color,
        color_system="auto" if color else None,
        force_jupyter=False,
        legacy_windows=False,
    )
    console.print(render_report(audit, recorded=recorded))
    emit(file, text.getvalue())


def wants_color(file: IO[str]) -> bool:
    """Whether *file* is a terminal that is to get colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return file.isatty() and not plain


def accuracy_style(audit: Audit) -> str:
    """The style of the accuracy line: it stands out where something is not known."""
    known = audit.accuracy
    return "yellow" if known.probes_missing or known.events_lost or known.unknown_bytes else "dim"


def _terminal_width(file: IO[str]) -> int:
    try:
        # A terminal that nobody has told its size has 0 columns.
        return max(_WIDTH_MIN, os.get_terminal_size(file.fileno()).columns or WIDTH)
    except OSError:
        return WIDTH


def _title(audit: Audit, recorded: bool) -> str:
    parts = [command_line(audit.command)] if audit.command else []
    if audit.exit_status is not None:
        parts.append(f"exit status {audit.exit_status}")
    parts.append(phrases.duration(audit.duration_s))
    if audit.kernel_release:
        where = " in a VM" if audit.kernel_where == "vm" else ""
        parts.append(f"Linux {sanitise(audit.kernel_release)}{where}")
    return ("RECORDED " if recorded else "") + "rsplice: " + ", ".join(parts)


def _cells(counts: Counts) -> list[str]:
    return [
        phrases.count(counts.operations),
        phrases.size(counts.payload_bytes),
        phrases.copied(counts),
        phrases.copies_per_byte(counts),
        counts.evidence.word,
    ]


def _path_lines(paths: list[Path], width: int) -> Iterator[Text]:
    if not paths:
        yield Text("no call that carries payload was seen")
        return
    yield header("PATH", _COLUMNS, width)
    for path in sorted(paths, key=lambda p: -p.counts.copy_bytes):
        yield from tall_row(sanitise(path.name), _COLUMNS, _cells(path.counts), width)
        yield from _notes(phrases.dispositions(path.counts), path.why)


def _rsplice_lines(audit: Audit, width: int) -> Iterator[Text]:
    """What librsplice meant to do, beside what became of it."""
    callers = [process for process in audit.processes if process.rsplice_calls]
    if not audit.rsplice_calls:
        return
    yield header("LIBRSPLICE", _CALL_COLUMNS, width)
    if len(callers) != 1:
        yield from _call_lines("all", audit.rsplice_calls, width)
    for process in callers[:_PROCESSES_MAX]:
        yield from _call_lines(phrases.process_name(process), process.rsplice_calls, width)
    if len(callers) > _PROCESSES_MAX:
        yield Text(f"and {len(callers) - _PROCESSES_MAX} more, all in the JSON")
    yield Text()


def _call_lines(name: str, calls: RspliceCalls, width: int) -> Iterator[Text]:
    cells = [phrases.count(calls.reserved.calls), phrases.size(calls.published.nbytes)]
    yield from tall_row(name, _CALL_COLUMNS, cells, width)
    yield from _notes(f"intended: {phrases.intended(calls)}")
    seen = phrases.seen(calls)
    yield from _notes(*(f"seen:     {path}" for path in seen[:_SEEN_MAX] or ["nothing"]))
    if len(seen) > _SEEN_MAX:
        yield from _notes(f"and {len(seen) - _SEEN_MAX} more paths, all in the JSON")
    yield from _notes(phrases.ways(calls))
    for sentence in calls.differences:
        yield Text(_INDENT + phrases.differs(sentence), style=STYLES["violation"])


def _finding_lines(audit: Audit, width: int) -> Iterator[Text]:
    """Each finding, with the journeys of its pages where those were asked for."""
    journeys = audit.journeys if audit.journeys and audit.journeys.finding else None
    for found in phrases.by_kind(audit.findings):
        yield Text(phrases.finding(found), style=STYLES.get(found.kind, ""))
        first = phrases.first_seen(found)
        yield from _notes(first and f"first: {first}", found.advice)
        for story in stories_of(found, journeys):
            yield from story_lines(story, width, brief=True)
    if audit.findings:
        yield Text()


def _process_lines(audit: Audit, width: int) -> Iterator[Text]:
    processes, known = audit.processes, audit.accuracy
    yield header("PROCESS", _COLUMNS, width)
    for process in processes[:_PROCESSES_MAX]:
        name = phrases.process_name(process)
        yield from tall_row(name, _COLUMNS, _cells(process.counts), width)
        if process.pages != PageCounts():
            yield from _notes(
                phrases.page_tables(process.pages, known), phrases.page_cache(process.pages, known)
            )
    more = len(processes) - _PROCESSES_MAX
    if more > 0:
        yield Text(f"and {more} more, all in the JSON")


def _notes(*sentences: str) -> Iterator[Text]:
    for sentence in filter(None, sentences):
        yield Text(_INDENT + sanitise(sentence))


def _wrapped(line: Text, console: Console, width: int) -> Iterator[Text]:
    """*line* on as many lines as it needs, those after the first indented."""
    if line.no_wrap or line.cell_len <= width:
        yield line
        return
    indented = line.plain.startswith(_INDENT)
    body = line[len(_INDENT) :] if indented else line
    for number, part in enumerate(body.wrap(console, width - len(_INDENT))):
        part.rstrip()
        yield Text(_INDENT if indented or number else "").append_text(part)
