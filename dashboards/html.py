# SPDX-License-Identifier: MIT
"""The report of an audit as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from rsplice.audit import (
    DISPOSITIONS,
    Accuracy,
    Audit,
    Counts,
    Finding,
    Path,
    Process,
    RspliceCalls,
)
from rsplice.dashboards import phrases
from rsplice.dashboards.findings import facts, stories_of, when
from rsplice.dashboards.journeys import elapsed, heading, state_of, title
from rsplice.dashboards.text import command_line, sanitise
from rsplice.journey import Journeys, Step, Story

_COLORS = {
    "copied": "#d9534f",
    "shared": "#3c9d5b",
    "moved": "#2f7fb8",
    "direct": "#5b6fc0",
    "remapped": "#7d55a8",
    "discarded": "#9aa0a6",
    "unknown": "#e0a030",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
h1 { font-size: 1.3em; overflow-wrap: anywhere; } h2 { font-size: 1.1em; margin-top: 2em; }
.totals { font-size: 1.15em; font-weight: 600; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .3em .6em; border-top: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.why { color: #555; font-size: .92em; }
table.text td, table.text th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts th { width: 8em; font-weight: 400; color: #555; }
h3 { font-size: 1em; margin: 1.5em 0 .4em; } summary { cursor: pointer; margin: .6em 0; }
.bar { display: flex; height: .5em; margin-top: .3em; background: #eee; }
.key i { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
.violation { color: #b02a26; font-weight: 600; } .hazard { color: #946200; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181a1b; } .why, table.facts th { color: #aaa; }
  th, td { border-color: #444; } .bar { background: #333; } .violation { color: #ff8078; }
  .hazard { color: #e6b450; } }
"""
_HEADINGS = ("Operations", "Payload", "Copied", "Copies per byte", "Evidence")


def render_html(audit: Audit) -> str:
    """The page; nothing in it is loaded from elsewhere, and nothing in it can run."""
    body = "\n".join(_body(audit))
    title = _safe(f"rsplice: {command_line(audit.command)}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _body(audit: Audit) -> Iterator[str]:
    totals, lost = audit.totals, audit.accuracy.events_lost
    yield f"<h1>{_safe(command_line(audit.command) or 'rsplice')}</h1>"
    yield f"<p>{_safe(_run(audit))}</p>"
    yield f'<p class="totals">{_safe(phrases.totals(totals, lost))}</p>'
    yield _bar(totals) + _key()
    yield "<h2>Paths</h2>" + _table("Path", map(_path_row, audit.paths))
    if audit.rsplice_calls:
        yield "<h2>librsplice</h2>" + _calls_table(audit)
    if audit.findings:
        yield "<h2>Findings</h2>"
        for found in phrases.by_kind(audit.findings):
            yield _finding(found, audit.journeys)
    if audit.journeys:
        yield from _journeys(audit.journeys)
    if len(audit.processes) > 1:
        rows = (_process_row(process, audit.accuracy) for process in audit.processes)
        yield "<h2>Processes</h2>" + _table("Process", rows)
    yield f"<h2>Pages</h2><p>{_safe(phrases.page_tables(audit.pages, audit.accuracy))}<br>"
    yield f"{_safe(phrases.page_cache(audit.pages, audit.accuracy))}</p>"
    yield f"<h2>Accuracy</h2><p>{_safe(phrases.accuracy(audit.accuracy))}</p>"


def _safe(text: str) -> str:
    return escape(sanitise(text))


def _run(audit: Audit) -> str:
    status = "" if audit.exit_status is None else f"exit status {audit.exit_status}, "
    where = " in a VM" if audit.kernel_where == "vm" else ""
    return f"{status}{phrases.duration(audit.duration_s)}, Linux {audit.kernel_release}{where}"


def _table(name: str, rows: Iterable[str]) -> str:
    headings = "".join(f"<th>{heading}</th>" for heading in (name, *_HEADINGS))
    return f"<table><tr>{headings}</tr>{''.join(rows)}</table>"


def _path_row(path: Path) -> str:
    notes = "<br>".join(
        _safe(note) for note in (phrases.dispositions(path.counts), path.why) if note
    )
    why = f'<div class="why">{notes}</div>'
    return _row(_safe(path.name) + why + _bar(path.counts), path.counts)


def _process_row(process: Process, known: Accuracy) -> str:
    pages = (
        f"{phrases.page_tables(process.pages, known)}; {phrases.page_cache(process.pages, known)}"
    )
    name = _safe(phrases.process_name(process))
    return _row(f'{name}<div class="why">{_safe(pages)}</div>', process.counts)


def _calls_table(audit: Audit) -> str:
    """What librsplice meant to do, beside what became of it."""
    callers = [(phrases.process_name(p), p.rsplice_calls) for p in audit.processes]
    callers = [(name, calls) for name, calls in callers if calls]
    if len(callers) != 1:
        callers = [("all", audit.rsplice_calls), *callers]
    headings = ("Process", "Calls", "Bytes", "Intended", "Seen")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return f"<table><tr>{head}</tr>{''.join(_calls_row(*c) for c in callers)}</table>"


def _calls_row(name: str, calls: RspliceCalls) -> str:
    differs = "".join(
        f'<div class="violation">{_safe(phrases.differs(sentence))}</div>'
        for sentence in calls.differences
    )
    why = f'<div class="why">{_safe(phrases.ways(calls))}</div>'
    nbytes = calls.published.nbytes
    seen = "<br>".join(map(_safe, phrases.seen(calls))) or "nothing"
    return (
        f"<tr><td>{_safe(name)}{why}{differs}</td><td>{calls.reserved.calls}</td>"
        f'<td title="{nbytes} bytes">{_safe(phrases.size(nbytes))}</td>'
        f"<td>{_safe(phrases.intended(calls))}</td><td>{seen}</td></tr>"
    )


def _row(name: str, counts: Counts) -> str:
    cells: Sequence[tuple[str, str]] = (
        (str(counts.operations), ""),
        (phrases.size(counts.payload_bytes), f"{counts.payload_bytes} bytes"),
        (phrases.copied(counts), f"{counts.copy_bytes} bytes seen"),
        (phrases.copies_per_byte(counts), ""),
        (counts.evidence.word, ""),
    )
    tds = "".join(f'<td title="{_safe(exact)}">{_safe(text)}</td>' for text, exact in cells)
    return f"<tr><td>{name}</td>{tds}</tr>"


def _bar(counts: Counts) -> str:
    """The dispositions of the payload, as wide as their shares."""
    parts = (
        f'<span title="{name} {getattr(counts, name)} bytes" '
        f'style="flex: {getattr(counts, name)} 0 0; background: {color}"></span>'
        for name, color in _COLORS.items()
        if getattr(counts, name) > 0
    )
    return f'<div class="bar">{"".join(parts)}</div>'


def _key() -> str:
    items = (f'<i style="background: {_COLORS[name]}"></i>{name}' for name in DISPOSITIONS)
    return f'<p class="key">{"".join(items)}</p>'


def _finding(found: Finding, journeys: Journeys | None) -> str:
    """Its details, and the journeys of its pages where those were asked for."""
    kind = found.kind if found.kind in ("violation", "hazard") else "move"
    times = f"first after {when(found, 'time')}, last after {when(found, 'last')}"
    rows = "".join(
        f"<tr><th>{_safe(label)}</th><td>{_safe(sentence)}</td></tr>"
        for label, sentence in facts(found)
    )
    stories = stories_of(found, journeys if journeys and journeys.finding else None)
    return (
        f'<h3><span class="{kind}">{_safe(phrases.finding(found))}</span>, {_safe(times)}</h3>'
        f'<table class="text facts">{rows}</table>{"".join(map(_story, stories))}'
    )


def _journeys(journeys: Journeys) -> Iterator[str]:
    yield f"<h2>Journeys</h2><p>{_safe(title(journeys))}</p>"
    if not journeys.finding:
        yield from map(_story, journeys.stories)
    if journeys.events_lost:
        yield f"<p>{_safe(phrases.plural(journeys.events_lost, 'event'))} lost</p>"


def _story(story: Story) -> str:
    start = story.steps[0].time_ns if story.steps else 0
    rows = "".join(_step(step, step.time_ns - start) for step in story.steps)
    more = f"<p>and {_safe(phrases.plural(story.unkept, 'event'))} more, not kept</p>"
    head = "".join(f"<th>{name}</th>" for name in ("After", "What", "", "Who", "Page"))
    return (
        f"<details><summary>{_safe(heading(story))}</summary>"
        f'<table class="text"><tr>{head}</tr>{rows}</table>{more if story.unkept else ""}</details>'
    )


def _step(step: Step, after: int) -> str:
    who = f"{step.comm} {step.pid}" if step.pid else ""
    cells = (elapsed(after), step.what, step.detail, who, state_of(step).strip("()"))
    return f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in cells)}</tr>"
