# SPDX-License-Identifier: MIT
"""The live dashboard: one snapshot at a time, with rates and the last minute."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Protocol, runtime_checkable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from rsplice.audit import Audit, Counts, Finding
from rsplice.dashboards import phrases
from rsplice.dashboards.findings import STYLES, detail_lines, table_header, table_row
from rsplice.dashboards.frames import Entry, Frame, ordered, path_entries, process_entries
from rsplice.dashboards.journeys import wrapped
from rsplice.dashboards.report import WIDTH, accuracy_style
from rsplice.dashboards.spark import spark
from rsplice.dashboards.table import Column, header, row
from rsplice.dashboards.terminal import Signals, cbreak, read_keys
from rsplice.dashboards.text import command_line, emit, sanitise

_SORTS = {
    "paths": ("copied", "now", "payload", "name"),
    "processes": ("copied", "now", "payload", "name"),
    "findings": ("kind", "count", "name"),
}
_VIEWS = tuple(_SORTS)
_COMMON_COLUMNS = (Column("PAYLOAD", 9), Column("COPIED", 11), Column("NOW", 11))
_PATH_COLUMNS = (*_COMMON_COLUMNS, Column("C/BYTE", 7), Column("EVIDENCE", 10, left=True))
_PROCESS_COLUMNS = (*_COMMON_COLUMNS, Column("FAULTS", 8), Column("INSERTED", 9))
_PLAIN_ROWS = 5
_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -10, "page down": 10}
_KEYS = " q quit   p pause   s sort   tab view   ? help "
_FINDINGS_KEYS = " q quit   p pause   s sort   tab view   up/down choose   enter open   ? help "
_DETAIL_KEYS = " q quit   p pause   up/down scroll   enter back   ? help "
_HELP = (
    ("q, Ctrl-C", "leave; the audit is then printed"),
    ("p", "hold the picture; counting goes on"),
    ("s", "sort the table by something else"),
    ("tab", "paths, processes, findings"),
    ("up, down", "choose a finding (also k, j); scroll an open one"),
    ("enter", "open it: all that is known, and the journey of a page; Esc: back"),
    ("?", "this page; the next key leaves it"),
    ("copied", "bytes that the CPU copied"),
    ("avoided", "what a read/write relay would have copied, less the copied"),
    ("NOW", "copied a second, since the snapshot before"),
    ("C/BYTE", "copies per byte of payload"),
    ("? >= <=", "bytes are unknown: not known, at least, at most"),
)


class Source(Protocol):
    """Where snapshots come from: a running trace or a recording."""

    @property
    def running(self) -> bool:
        """False when the next snapshot is the last."""

    def snapshot(self) -> Audit:
        """The counts so far; ``duration_s`` is the time of the snapshot."""


@runtime_checkable
class Holdable(Protocol):
    """A source whose time can stand still, as a recording's can."""

    def hold(self, still: bool) -> None:
        """Stops the source's time, or lets it go on."""


class LiveView:
    """Draws the latest snapshot, the rates since the one before, and the last minute.

    :param recorded: the snapshots come from a recording, which every screen then says
    """

    def __init__(self, *, recorded: bool = False) -> None:
        self.paused = False
        self._recorded = recorded
        self._help = False
        self._view = _VIEWS[0]
        self._sorts = dict.fromkeys(_VIEWS, 0)
        self._chosen = ("", "")  #: kind and label of the finding that is chosen
        self._open = False  #: it is looked at
        self._scroll = 0  #: so many of its lines are above the screen
        self._latest = Frame()
        self._shown = self._latest

    def feed(self, audit: Audit, at: float) -> None:
        """Takes a snapshot of the counts so far.

        :param at: its time in seconds since counting began
        """
        self._latest = self._latest.next(audit, at)
        if not self.paused:
            self._shown = self._latest

    def press(self, key: str) -> bool:
        """Obeys one key; False when it asks to leave."""
        if key == "q":
            return False
        if self._help:
            self._help = False
        elif key == "?":
            self._help = True
        elif key == "p":
            self.paused = not self.paused
            self._shown = self._latest
        elif key == "\t":
            self._view = _VIEWS[(_VIEWS.index(self._view) + 1) % len(_VIEWS)]
            self._open = False
        elif self._open:
            self._press_open(key)
        elif key == "s":
            self._sorts[self._view] += 1
        elif self._view == "findings":
            self._press_findings(key)
        return True

    def _press_findings(self, key: str) -> None:
        """A key that concerns the list of findings."""
        findings, at = self._findings()
        if key == "enter":
            self._open, self._scroll = bool(findings), 0
        elif key in _STEPS and findings:
            at = min(max(at + _STEPS[key], 0), len(findings) - 1)
            self._chosen = _identity(findings[at])

    def _press_open(self, key: str) -> None:
        """A key that concerns the finding that is looked at."""
        if key in ("enter", "escape"):
            self._open = False
        else:
            self._scroll += _STEPS.get(key, 0)

    def block(self) -> str:
        """The snapshot as some lines of plain text, for where there is no terminal."""
        audit, now = self._shown.audit, self._shown.now
        entries = ordered(path_entries(self._shown), "copied")[:_PLAIN_ROWS]
        lines = [
            self._title(),
            phrases.totals(audit.totals, audit.accuracy.events_lost),
            f"now copied {phrases.copied(now)}/s, avoided {phrases.avoided(now)}/s",
            *(text.plain for text in self._path_rows(entries, WIDTH)),
            *_rsplice_lines(audit),
            *(phrases.finding(found) for found in phrases.by_kind(audit.findings)),
            phrases.page_tables(audit.pages, audit.accuracy),
            phrases.page_cache(audit.pages, audit.accuracy),
            phrases.accuracy(audit.accuracy, details=False),
        ]
        return "\n".join(lines) + "\n\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or options.max_height
        if self._open or self._help:
            keys = _KEYS if self._help else _DETAIL_KEYS
            top, bottom = [self._title_line(width)], [Text(keys, style="reverse")]
        else:
            top = [*self._head(width, options.ascii_only), Text()]
            bottom = self._foot(console, width)
        room = max(0, height - len(top) - len(bottom))
        body = list(islice(self._body(console, width, room), room))
        body += [Text()] * (room - len(body))
        for line in [*top, *body, *bottom][:height]:
            line.truncate(width, overflow="crop")
            yield line

    def _title_line(self, width: int) -> Text:
        return Text(self._title().ljust(width), style="bold reverse")

    def _title(self) -> str:
        marks = ["RECORDED"] * self._recorded + ["PAUSED"] * self.paused
        audit = self._shown.audit
        words = [*marks, "rsplice", phrases.duration(audit.duration_s)]
        return " ".join([*words, command_line(audit.command)])

    def _head(self, width: int, ascii_only: bool) -> Iterator[Text]:
        frame = self._shown
        now, total, lost = frame.now, frame.audit.totals, frame.audit.accuracy.events_lost
        top = max((abs(sample.rate) for sample in frame.copied + frame.avoided), default=0.0)
        copied, avoided = (
            spark(samples, frame.at, max(0, width - 35), top, ascii_only)
            for samples in (frame.copied, frame.avoided)
        )
        yield self._title_line(width)
        yield Text(f"{'':9}{'now':>12}{'so far':>12}  last minute", style="bold")
        line = _head_line("copied", phrases.copied(now) + "/s", phrases.copied(total, lost))
        yield line.append(copied, style="red")
        line = _head_line("avoided", phrases.avoided(now) + "/s", phrases.avoided(total))
        yield line.append(avoided, style="green")
        payload = f"payload {phrases.size(total.payload_bytes)}"
        yield _head_line("", phrases.percent(now), phrases.percent(total)).append(payload)

    def _foot(self, console: Console, width: int) -> list[Text]:
        audit = self._shown.audit
        style = accuracy_style(audit)
        known = Text(phrases.accuracy(audit.accuracy), style)
        if known.cell_len > 2 * width:
            known = Text(phrases.accuracy(audit.accuracy, details=False), style)
        pages: tuple[str, ...] = (
            phrases.page_tables(audit.pages, audit.accuracy),
            phrases.page_cache(audit.pages, audit.accuracy),
        )
        if max(map(len, pages)) > width:
            pages = ("; ".join(pages),)
        lines = [Text(line) for line in _rsplice_lines(audit)]
        lines += [part for line in pages for part in Text(line).wrap(console, width)]
        keys = _FINDINGS_KEYS if self._view == "findings" and audit.findings else _KEYS
        return [*lines, *known.wrap(console, width), Text(keys, style="reverse")]

    def _body(self, console: Console, width: int, room: int) -> Iterator[Text]:
        if self._help:
            yield from _help_lines(console, width, self._shown.audit)
            return
        if self._open:
            yield from self._open_lines(width, room)
            return
        yield self._tabs()
        if self._view == "findings":
            yield from self._finding_lines(width, room - 1)
            return
        is_paths = self._view == "paths"
        entries = path_entries(self._shown) if is_paths else process_entries(self._shown)
        shown = ordered(entries, self._sort)
        fit = room - 2 if len(shown) <= room - 2 else room - 3
        shown = shown[: max(0, fit)]
        if is_paths:
            notes = 2 + 2 * len(entries) <= room
            yield from self._path_rows(shown, width, notes=notes)
        else:
            yield from self._process_rows(shown, width)
        if len(shown) < len(entries):
            yield Text(f"and {len(entries) - len(shown)} more", style="dim")

    @property
    def _sort(self) -> str:
        sorts = _SORTS[self._view]
        return sorts[self._sorts[self._view] % len(sorts)]

    def _tabs(self) -> Text:
        audit = self._shown.audit
        counts = (len(audit.paths), len(audit.processes), len(audit.findings))
        worst = next(iter(phrases.by_kind(audit.findings)), None)
        line = Text()
        for view, number in zip(_VIEWS, counts, strict=True):
            style = STYLES.get(worst.kind, "") if worst and view == "findings" else ""
            chosen = "reverse" if view == self._view else ""
            line.append(f" {view} {number} ", style=f"{style} {chosen}".strip())
            line.append(" ")
        if any(found.kind == "violation" for found in audit.findings):
            line.append("VIOLATION  ", style=STYLES["violation"])
        return line.append(f"by {self._sort}", style="dim")

    def _path_rows(
        self, entries: list[Entry], width: int, *, notes: bool = False
    ) -> Iterator[Text]:
        yield header("PATH", _PATH_COLUMNS, width)
        for entry in entries:
            counts = entry.counts
            last = [phrases.copies_per_byte(counts), counts.evidence.word]
            yield row(entry.name, _PATH_COLUMNS, self._cells(entry, counts) + last, width)
            if notes:
                parts = (phrases.dispositions(counts), sanitise(entry.paths[0].why))
                yield Text("  " + "; ".join(filter(None, parts)), style="dim")

    def _process_rows(self, entries: list[Entry], width: int) -> Iterator[Text]:
        yield header("PROCESS", _PROCESS_COLUMNS, width)
        for entry in entries:
            pages = entry.pages
            last = [phrases.count(pages.faults), phrases.count(pages.inserted_pages)]
            cells = self._cells(entry, entry.counts) + last
            yield row(entry.name, _PROCESS_COLUMNS, cells, width)

    def _cells(self, entry: Entry, counts: Counts) -> list[str]:
        now = phrases.copied(entry.now(self._shown.seconds)) + "/s"
        return [phrases.size(counts.payload_bytes), phrases.copied(counts), now]

    def _findings(self) -> tuple[list[Finding], int]:
        """The findings in their order, and the place of the chosen one: by default the first."""
        findings = _ordered_findings(self._shown.audit.findings, self._sort)
        known = [_identity(found) for found in findings]
        return findings, known.index(self._chosen) if self._chosen in known else 0

    def _finding_lines(self, width: int, room: int) -> Iterator[Text]:
        findings, at = self._findings()
        if not findings:
            yield Text("nothing was found")
            return
        yield table_header(width)
        fit = max(1, room - 1 if len(findings) < room else room - 2)
        start = min(max(0, at - fit // 2), max(0, len(findings) - fit))
        for number, found in enumerate(findings[start : start + fit], start=start):
            yield table_row(found, width, chosen=number == at)
        if fit < len(findings):
            yield Text(f"{start + 1} to {start + fit} of {len(findings)}", style="dim")
        yield Text()
        yield from wrapped(sanitise(findings[at].label), "", width, "bold")
        yield from wrapped(sanitise(findings[at].advice), "", width, "dim")

    def _open_lines(self, width: int, room: int) -> Iterator[Text]:
        findings, at = self._findings()
        if not findings:
            return
        lines = list(detail_lines(findings[at], self._shown.audit.journeys, width))
        self._scroll = min(max(0, self._scroll), max(0, len(lines) - room))
        yield from lines[self._scroll :]


def _rsplice_lines(audit: Audit) -> list[str]:
    """What librsplice meant and what was seen; nothing where nobody called it."""
    calls = audit.rsplice_calls
    if not calls:
        return []
    return [phrases.rsplice_calls(calls), *map(phrases.differs, calls.differences)]


def _head_line(name: str, now: str, so_far: str) -> Text:
    return Text(f"{name:9}{now:>12}{so_far:>12}  ")


def _identity(found: Finding) -> tuple[str, str]:
    return found.kind, found.label


def _ordered_findings(findings: list[Finding], sort: str) -> list[Finding]:
    """By kind, and those of one name together; or by count or name alone."""
    by_label = sorted(findings, key=lambda found: found.label)
    if sort == "count":
        return sorted(by_label, key=lambda found: -found.count)
    return by_label if sort == "name" else phrases.by_kind(by_label)


def _help_lines(console: Console, width: int, audit: Audit) -> Iterator[Text]:
    for key, meaning in _HELP:
        yield from wrapped(f"{key:10} {meaning}", " " * 11, width)
    for probe in phrases.missing_probes(audit.accuracy):
        yield from Text(f"missing {probe}", style="yellow").wrap(console, width)


def run_live(
    source: Source, console: Console, *, interval: float = 1.0, recorded: bool = False
) -> Audit:
    """Shows the snapshots of *source* until it ends, or ``q`` or Ctrl-C is pressed.

    Without a terminal on standard input and on the console it prints a block of text for each
    snapshot. The terminal is put back on every way out. Call it from the main thread.

    :param interval: seconds between two snapshots
    :param recorded: mark every screen as RECORDED
    :return: the last snapshot taken
    """
    view = LiveView(recorded=recorded)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        if not (console.is_terminal and not console.is_dumb_terminal and sys.stdin.isatty()):
            return _loop(source, view, signals, interval, lambda: emit(console.file, view.block()))
        keys = sys.stdin.fileno()
        stack.enter_context(cbreak(keys))
        live = Live(
            view,
            console=console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        stack.callback(live.stop)
        live.start()
        return _loop(source, view, signals, interval, lambda: _refresh(live), keys)


def _loop(
    source: Source,
    view: LiveView,
    signals: Signals,
    interval: float,
    draw: Callable[[], bool],
    keys: int | None = None,
) -> Audit:
    """Takes, draws and waits. *draw* says whether there still is somebody to draw for."""
    due = 0.0
    while True:
        if time.monotonic() >= due:
            running = source.running
            audit = source.snapshot()
            view.feed(audit, audit.duration_s)
            alive = view.paused or draw()
            if not (running and alive):
                return audit
            due = time.monotonic() + interval
        pressed, resized = signals.wait(due, keys)
        if signals.ending is not None:
            return audit
        if keys is not None and pressed and not _obey(read_keys(keys), view, source):
            return audit
        if keys is not None and (pressed or resized):
            draw()


def _obey(keys: list[str], view: LiveView, source: Source) -> bool:
    paused = view.paused
    stay = all(view.press(key) for key in keys)
    if view.paused != paused and isinstance(source, Holdable):
        source.hold(view.paused)
    return stay


def _refresh(live: Live) -> bool:
    try:
        live.refresh()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False  # the terminal has hung up
    return True
