# SPDX-License-Identifier: MIT
"""The stories of pages as text. Names come from anybody: all of them are made safe to show."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len
from rich.text import Text

from rsplice.dashboards.phrases import plural
from rsplice.dashboards.text import sanitise
from rsplice.journey import ANY_FINDING, Journeys, Step, Story

_TIME = 10  #: columns
_WHAT = 14
_MARGIN = " " * (_TIME + 2)
_DETAILS_MIN = 20
_GLUE = "\u00a0"  #: a space that no line ends at; sanitised text has none
#: Of a story in brief: steps from its beginning, and those before a finding.
_FIRST_STEPS, _STEPS_BEFORE = 4, 6


def journey_lines(journeys: Journeys | None, width: int) -> Iterator[Text]:
    """All stories, no line wider than *width*; nothing where none were asked for.

    Stories of findings are told with those, and only counted here.
    """
    if journeys is None:
        return
    yield from wrapped(f"JOURNEYS: {title(journeys)}", "", width, style="bold")
    for story in () if journeys.finding else journeys.stories:
        yield from story_lines(story, width)
    if journeys.events_lost:
        lost = plural(journeys.events_lost, "event")
        yield from wrapped(f"{lost} of journeys lost: stories may lack lines", "", width, "yellow")
    yield Text()


def title(journeys: Journeys) -> str:
    """How many pages were followed, and which."""
    pages = plural(len(journeys.stories), "page")
    if journeys.finding:
        which = "findings" if journeys.finding == ANY_FINDING else sanitise(journeys.finding)
        if journeys.stories:
            return f"{pages} of {which}, told with each finding"
        return f"no page of {which} was followed"
    if journeys.path:
        name = sanitise(journeys.path)
        return f"{pages} that entered the page cache of {name}"
    if not journeys.stories:
        return "no page was seen queued in a pipe"
    return f"{pages}, the first that were seen queued in a pipe"


def story_lines(story: Story, width: int, *, brief: bool = False) -> Iterator[Text]:
    """One story, no line wider than *width*.

    :param brief: leave out steps between its beginning and what led to a finding
    """
    yield from wrapped(heading(story), "    ", width, style="bold")
    start = story.steps[0].time_ns if story.steps else 0
    before = ""
    left_out = _left_out(story) if brief else range(0)
    for number, step in enumerate(story.steps):
        if number in left_out:
            if number == left_out[0]:
                text = f"{plural(len(left_out), 'step')} left out here, all in the JSON"
                yield from wrapped(_MARGIN + text, _MARGIN, width, style="dim")
            continue
        yield from _step_lines(step, step.time_ns - start, width)
        state = state_of(step)
        if state and state != before:
            yield from wrapped(_MARGIN + state, _MARGIN, width, style="dim")
            before = state
    if story.unkept:
        unkept = f"and {plural(story.unkept, 'event')} more, which were counted, not kept"
        yield from wrapped(_MARGIN + unkept, _MARGIN, width, style="yellow")


def _left_out(story: Story) -> range:
    whats = [step.what for step in story.steps]
    found = whats.index("finding") if "finding" in whats else len(whats)
    return range(_FIRST_STEPS, found - _STEPS_BEFORE)


def heading(story: Story) -> str:
    """Which page a story is about, and how it ended."""
    file = f" of {sanitise(story.file)}" if story.file else ""
    large = f", a folio of {story.pages} pages" if story.pages > 1 else ""
    end = "freed in the end" if story.freed else "not freed while it was followed"
    frame = "" if story.frame is None else f", frame {story.frame}"
    return f"page {story.page}{file}{frame}{large}, {end}"


def _step_lines(step: Step, after: int, width: int) -> Iterator[Text]:
    who = " " + f"[{sanitise(step.comm)} {step.pid}]".replace(" ", _GLUE) if step.pid else ""
    what = sanitise(step.what).ljust(_WHAT - 1)
    mark = "~" if step.moment == "snapshot" else ""
    line = f"{mark + elapsed(after):>{_TIME}}  {what} {sanitise(step.detail)}{who}"
    indent = " " * (_TIME + 2 + _WHAT) if width >= _TIME + _WHAT + _DETAILS_MIN else "    "
    yield from wrapped(line.rstrip(), indent, width, "bold" if step.what == "finding" else "")


def state_of(step: Step) -> str:
    """The page as it was at a step: "1 reference, in 0 page tables, ..."; "" if not known."""
    if step.refcount is None or step.mapcount is None or step.what == "freed":
        return ""
    parts = [plural(step.refcount, "reference"), f"mapped {_times(step.mapcount)}"]
    parts.append(f"mapping {sanitise(step.mapping)}")
    if step.flags:
        parts.append(sanitise(" ".join(step.flags)))
    return "(" + ", ".join(parts) + ")"


def _times(count: int) -> str:
    return "nowhere" if not count else "once" if count == 1 else f"{count} times"


def elapsed(nanoseconds: int) -> str:
    """ "0", "12.7 us", "1.234 s", since the beginning of a story."""
    if not nanoseconds:
        return "0"
    for unit, factor in (("us", 1e3), ("ms", 1e6)):
        if nanoseconds < 999.95 * factor:
            return f"{nanoseconds / factor:.1f} {unit}"
    return f"{nanoseconds / 1e9:.3f} s"


def wrapped(line: str, indent: str, width: int, style: str = "") -> Iterator[Text]:
    """*line* on as many lines as it needs, those after the first behind *indent*."""
    indent = indent if 2 * len(indent) <= width else ""
    margin = len(line) - len(line.lstrip())
    words, made = line[margin:].split(" "), line[:margin]
    empty = True
    for word in words:
        while not empty and cell_len(made) + 1 + cell_len(word) > width:
            yield _line(made, style)
            made, empty = indent, True
        made += word if empty else f" {word}"
        empty = False
        while cell_len(made) > width:  # a word that is longer than a line
            cut = max(1, _fitting(made, width))
            yield _line(made[:cut], style)
            made = indent + made[cut:]
    yield _line(made, style)


def _line(text: str, style: str) -> Text:
    return Text(text.rstrip().replace(_GLUE, " "), style=style, no_wrap=True)


def _fitting(text: str, width: int) -> int:
    """How many characters of *text* fit into *width* cells."""
    cells = 0
    for number, character in enumerate(text):
        cells += cell_len(character)
        if cells > width:
            return number
    return len(text)
