# SPDX-License-Identifier: MIT
"""Findings one by one: a row in a table, and all that is known of one. Safe to show."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.text import Text

from rsplice.audit import Finding
from rsplice.dashboards import phrases
from rsplice.dashboards.journeys import story_lines, wrapped
from rsplice.dashboards.table import Column, header, row
from rsplice.dashboards.text import sanitise
from rsplice.journey import Journeys, Story

STYLES = {"violation": "bold red", "hazard": "yellow", "missed move": "cyan"}
COLUMNS = (Column("COUNT", 7), Column("FIRST", 8), Column("LAST", 8))
_KIND = 13
_LABEL = 13
#: What stands elsewhere: in the first line, or together under one label.
_TOLD = ("pid", "comm", "time", "last", "file_offset")
_HOW_TO_FOLLOW = "not followed; rsplice live --journey and rsplice record --journey follow pages"


def facts(found: Finding) -> Iterator[tuple[str, str]]:
    """What is known of the first occurrence, and what to do: labels and sentences."""
    first = found.first
    if "reason" in first:
        yield "reason", sanitise(str(first["reason"]))
    if "comm" in first or "pid" in first:
        yield "process", sanitise(f"{first.get('comm', '?')}[{first.get('pid', '?')}]")
    for key, value in first.items():
        if key in (*_TOLD, "reason") or value in ("", None):
            continue
        text = str(value)
        if key == "file" and "file_offset" in first:
            text += f", at {first['file_offset']}"
        yield sanitise(key.replace("_", " ")), sanitise(text)
    if found.advice:
        yield "advice", sanitise(found.advice)


def when(found: Finding, key: str) -> str:
    """The "time" of the first occurrence, or of the "last"; "-" where it is not known."""
    value = found.first.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return "-"
    return phrases.duration(value)


def table_header(width: int) -> Text:
    """The titles of the columns of :func:`table_row`."""
    return header("  " + "KIND".ljust(_KIND) + "FINDING", COLUMNS, width)


def table_row(found: Finding, width: int, *, chosen: bool) -> Text:
    """One line: kind, name and reason, how often, when first, when last."""
    name = f"{'>' if chosen else ' '} {sanitise(found.kind):{_KIND}}{sanitise(found.label)}"
    cells = [phrases.count(found.count), when(found, "time"), when(found, "last")]
    line = row(name, COLUMNS, cells, width)
    line.stylize(f"{STYLES.get(found.kind, '')} reverse" if chosen else STYLES.get(found.kind, ""))
    return line


def detail_lines(found: Finding, journeys: Journeys | None, width: int) -> Iterator[Text]:
    """All that is known of a finding, and the journey of a page that it is about."""
    style = STYLES.get(found.kind, "")
    times = f"first after {when(found, 'time')}, last after {when(found, 'last')}"
    yield from wrapped(f"{phrases.finding(found)}, {times}", "    ", width, style)
    for label, sentence in facts(found):
        yield from wrapped(f"  {label:{_LABEL}}{sentence}", " " * (_LABEL + 2), width)
    yield Text()
    stories = stories_of(found, journeys)
    for story in stories:
        yield from story_lines(story, width)
    if not stories:
        yield from wrapped(f"  {'journey':{_LABEL}}{_absent(journeys)}", " " * (_LABEL + 2), width)


def stories_of(found: Finding, journeys: Journeys | None) -> list[Story]:
    """The journeys of pages that a finding is about."""
    return journeys.of_finding(found.label, found.first.get("page_frame")) if journeys else []


def _absent(journeys: Journeys | None) -> str:
    if journeys is None:
        return _HOW_TO_FOLLOW
    return "none: no page that was followed is one of this finding"
