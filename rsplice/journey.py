# SPDX-License-Identifier: MIT
"""Page journeys: events of chosen pages in, the story of each page out.

Nothing here does I/O. What the words mean is told in docs/journeys.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PAGES_DEFAULT = 4
PAGES_MAX = 32
FINDING_PAGES_DEFAULT = 1  #: of each finding, where pages of findings are followed
ANY_FINDING = "any"
#: Events that are kept of one page; those beyond are counted, but for its end.
SHARE = 128

#: What may happen to a page, and the marks of librsplice, in the order of tracers/bpf/journey.c.
STEPS = ("queued", "taken", "moved", "filled", "inserted", "removed", "mapped", "unmapped",
         "dirtied", "written back", "listed", "sent", "freed", "mark", "finding", "released",
         "asked")  # fmt: skip
HOWS = ("", "device", "reply", "internal", "onward", "teed", "kept", "granted")
#: Steps that are told by whatever does them, and not by a look afterwards.
AT_ONCE = ("inserted", "removed", "dirtied", "written back", "listed", "sent", "freed", "mark",
           "finding", "released", "asked")  # fmt: skip
MARKS = ("reserved", "filled", "published", "fell back", "aborted")

_MARK = "librsplice"
_FINDING = "finding"
_ASKED = "asked"
_MOMENTS = (_MARK, _FINDING, _ASKED)  #: what leaves the page in the state that it was in
_SINKS = ("/dev/null", "/dev/zero")
_SOCKETS = ("tcp", "udp", "unix", "udplite", "mptcp", "sctp", "vsock", "af_alg")


@dataclass(frozen=True)
class Request:
    """What is to be followed.

    :param pages: so many pages at most; with *finding* so many of each finding and reason
    :param file: those that enter this file's page cache, instead of the first queued in a pipe
    :param finding: those that findings of this name are about, or with "any" of any name
    """

    pages: int = PAGES_DEFAULT
    file: str | None = None
    finding: str = ""


@dataclass(frozen=True)
class Event:
    """One thing that happened to a page, or a mark of librsplice, as the kernel side tells it."""

    time: int  #: CLOCK_MONOTONIC, ns
    page: int  #: number of the page, from 0; of a mark meaningless
    step: str  #: one of STEPS, of a mark one of MARKS
    how: str = ""  #: one of HOWS
    via: str = ""  #: the operation, as in a path
    end: str = ""  #: the kind of the call's other end
    pid: int = 0  #: 0 where it is not known who
    tid: int = 0
    comm: str = ""
    call: int = 0  #: the call of librsplice that the thread is in
    call_time: int = 0  #: when that began; 0 for no call
    call_filled: int = 0  #: when that told of a fill, 0 if it has not
    nbytes: int = 0  #: of a mark
    is_mark: bool = False
    finding: str = ""  #: its label, of the step of that name
    refcount: int = -1  #: -1 where the state is not known
    mapcount: int = 0
    flags: tuple[str, ...] = ()
    anonymous: bool = False
    cached: bool = False  #: it is in a file's page cache
    inode: int = 0
    device: int = 0  #: the kernel's dev_t
    name: str = ""  #: last part of the file's name
    index: int = 0
    pages: int = 1  #: of its folio
    slots: int = 0  #: of a pipe, one behind the other, that a call filled with it or emptied
    frame: int | None = None  #: number of the page frame, None where it is not known
    first: bool = False  #: the first event of its page, which also tells of its birth:
    born: int = 0  #: when it was allocated, 0 if that was not seen
    born_pid: int = 0
    born_comm: str = ""
    born_exact: bool = False  #: False: allocated by then
    filled: int = 0  #: when a device filled it, 0 if that was not seen
    born_mapped: int = 0  #: when it was first put into a page table, 0 if that was not seen
    exact: bool = False  #: told at that very moment; else by a look afterwards


@dataclass
class Step:
    """One line of a story."""

    time_ns: int  #: CLOCK_MONOTONIC
    what: str  #: "allocated", "queued", ..., or "librsplice"
    detail: str = ""
    pid: int = 0  #: 0 where it is not known who
    comm: str = ""
    refcount: int | None = None  #: None where the page's state is not known
    mapcount: int | None = None
    flags: list[str] = field(default_factory=list)
    mapping: str = ""  #: the file whose page cache it is in, or "none"; "" if not known
    moment: str = ""  #: "exact", or "snapshot": it was seen by a look afterwards; "" if not known

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Step:
        return Step(**{name: data[name] for name in Step.__dataclass_fields__ if name in data})


@dataclass
class Story:
    """All that was seen of one page, in order."""

    page: int  #: from 1
    steps: list[Step] = field(default_factory=list)
    pages: int = 1  #: of its folio
    freed: bool = False  #: the last step is its end
    unkept: int = 0  #: events beyond its share: they were counted, not kept
    frame: int | None = None  #: number of the page frame, None where it is not known
    findings: list[str] = field(default_factory=list)  #: labels of those that are about the page

    @property
    def file(self) -> str:
        """The last file whose page cache it was in, the last with a name if any; "" if none."""
        files = [s.mapping for s in self.steps if s.mapping not in ("", "none", _ANONYMOUS)]
        named = [file for file in files if not file.startswith(_NAMELESS)]
        return next(reversed(named or files), "")

    def has_frame(self, frame: object) -> bool:
        """Whether the page frame of that number is the page's, or one of its folio."""
        if self.frame is None or not isinstance(frame, int):
            return False
        return self.frame <= frame < self.frame + self.pages

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "steps": [step.to_json() for step in self.steps]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Story:
        steps = [Step.from_json(step) for step in data["steps"]]
        findings = list(data.get("findings", []))
        return Story(
            data["page"],
            steps,
            data["pages"],
            data["freed"],
            data["unkept"],
            data["frame"],
            findings,
        )


@dataclass
class Journeys:
    """The stories of a run."""

    asked: int = PAGES_DEFAULT  #: so many pages were to be followed at most
    path: str = ""  #: of the file whose pages were asked for; "" for the first in a pipe
    stories: list[Story] = field(default_factory=list)
    events_lost: int = 0  #: a story may lack a line if this is not 0
    finding: str = ""  #: the name of the finding whose pages were asked for, or "any"

    def of_finding(self, label: str, frame: object = None) -> list[Story]:
        """The stories of pages that a finding is about, as many as were asked for at most.

        :param label: of the finding
        :param frame: the page frame of its first occurrence, whose story comes first
        """
        told = [story for story in self.stories if label in story.findings]
        return sorted(told, key=lambda story: not story.has_frame(frame))[: self.asked]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "stories": [story.to_json() for story in self.stories]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Journeys:
        stories = [Story.from_json(story) for story in data["stories"]]
        return Journeys(
            data["asked"], data["path"], stories, data["events_lost"], data.get("finding", "")
        )


_ANONYMOUS = "anonymous memory"
_NAMELESS = "inode "  #: begins what stands for a file that was deleted


def tell(
    events: Iterable[Event],
    request: Request | None = None,
    unkept: Mapping[int, int] | None = None,
    lost: int = 0,
) -> Journeys:
    """The stories that *events*, in any order, add up to: one for each page.

    Where pages of findings were asked for, candidates that none is about have no story.

    :param unkept: events beyond its share, by page
    :param lost: events that nobody has
    """
    request = request or Request()
    pages: dict[int, list[Event]] = defaultdict(list)
    marks: dict[tuple[int, ...], list[Event]] = defaultdict(list)
    for event in events:
        if event.is_mark:
            marks[_call_of(event)].append(event)
        else:
            pages[event.page].append(event)
    if request.finding:
        pages = {page: own for page, own in pages.items() if any(e.finding for e in own)}
    stories = []
    for number, page in enumerate(sorted(pages), start=1):
        story = _story(number if request.finding else page + 1, pages[page], marks)
        story.unkept = (unkept or {}).get(page, 0)
        stories.append(story)
    return Journeys(request.pages, request.file or "", stories, lost, request.finding)


def without_candidates(
    kept: Sequence[Event], fresh: Sequence[Event], live: Container[int]
) -> list[Event]:
    """*kept* and *fresh*, less the events of pages that no finding will ever be about.

    :param kept: events that were read before
    :param fresh: those read now
    :param live: pages that were followed still, just before *fresh* was read
    """
    events = [*kept, *fresh]
    wanted = {e.page for e in events if e.finding} | {e.page for e in fresh}
    own = [e for e in events if not e.is_mark and (e.page in wanted or e.page in live)]
    calls = {_call_of(e) for e in own if e.call_time}
    return own + [e for e in events if e.is_mark and _call_of(e) in calls]


def _call_of(event: Event) -> tuple[int, ...]:
    return event.pid, event.tid, event.call, event.call_time


def _story(number: int, events: list[Event], marks: Mapping[tuple[int, ...], list[Event]]) -> Story:
    ends = [event.time for event in events if event.step == "freed"]
    end = min(ends) if ends else None
    # What a call took is told when it returns. By then it may have freed the page.
    ordered = sorted(events, key=lambda e: _when(e, end))
    steps = _births(ordered, _when(ordered[0], end)[0])
    steps += [(_when(event, end), _step(event, _when(event, end)[0])) for event in ordered]
    steps += _marks(ordered, marks, end)
    steps.sort(key=lambda pair: pair[0])
    return Story(
        number,
        [step for _, step in steps],
        max(event.pages for event in events),
        end is not None,
        frame=events[0].frame,
        findings=list(dict.fromkeys(event.finding for event in ordered if event.finding)),
    )


#: Where a step belongs: its time, its rank among those of that time, and when it was told.
_Place = tuple[int, int, int]


def _when(event: Event, end: int | None) -> _Place:
    """Where an event belongs: what is told after the end of a page was before it."""
    if end is None or event.time < end:
        return event.time, 3, event.time
    return end, 5 if event.step == "freed" else 3, event.time


def _births(ordered: Sequence[Event], start: int) -> list[tuple[_Place, Step]]:
    """How the story begins: with the page's allocation if that was seen, else as it is found.

    :param start: when the first of the other events was
    """
    first = next((event for event in ordered if event.first), None)
    if first is None or not first.born:
        begin = Step(start, "found", "it had been allocated before", **_state(ordered[0]))
    else:
        detail = "" if first.born_exact else "by then: its allocation passes no tracepoint"
        born = min(first.born, start)
        begin = Step(born, "allocated", detail, first.born_pid, first.born_comm)
        begin.moment = _moment(first.born_exact)
    steps = [((begin.time_ns, 0, 0), begin)]
    if first is not None:
        for when, what, detail in (
            (first.born_mapped, "mapped", "into a page table, as new memory"),
            (first.filled, "filled", "by a device"),
        ):
            time = min(max(when, begin.time_ns), start)
            if when:
                steps.append(((time, 1, 0), Step(time, what, detail, moment=_moment(True))))
    return steps


def _moment(exact: bool) -> str:
    return "exact" if exact else "snapshot"


def _marks(
    ordered: Sequence[Event], marks: Mapping[tuple[int, ...], list[Event]], end: int | None
) -> list[tuple[_Place, Step]]:
    """What librsplice told of the calls that the page was in."""
    calls = {_call_of(event): event for event in ordered if event.call_time}
    fills = {(_call_of(e), e.call_filled): e for e in ordered if e.call_time and e.call_filled}
    steps = [_mark(event, event.call_time, "reserved", end) for event in calls.values()]
    steps += [_mark(event, event.call_filled, "filled", end) for event in fills.values()]
    for call, event in calls.items():
        for mark in marks.get(call, []):
            steps.append(_mark(event, mark.time, mark.step, end, mark.nbytes))
    return steps


def _mark(
    event: Event, time: int, word: str, end: int | None, nbytes: int | None = None
) -> tuple[_Place, Step]:
    size = "" if nbytes is None else f" {nbytes} bytes"
    step = Step(time, _MARK, f"{word}{size} (call {event.call})", event.pid, event.comm)
    step.moment = _moment(True)
    # A story ends with its page: that the call goes on is told at the end, not behind it.
    if end is not None and time > end:
        step.detail += ", after the page was freed"
        return (end, 4, time), Step(**{**vars(step), "time_ns": end})
    return (time, 2, time), step


def _step(event: Event, time: int) -> Step:
    what, detail = _words(event)
    moment = _moment(event.exact)
    return Step(time, what, detail, event.pid, event.comm, **_state(event), moment=moment)


def _state(event: Event) -> dict[str, Any]:
    """The page as it was; nothing where it could not be looked at any more."""
    if event.refcount < 0:
        return {}
    return {
        "refcount": event.refcount,
        "mapcount": event.mapcount,
        "flags": list(event.flags),
        "mapping": _mapping(event),
    }


def _mapping(event: Event) -> str:
    if event.anonymous:
        return _ANONYMOUS
    if not event.cached:
        return "none"
    if event.name:
        return event.name
    return f"{_NAMELESS}{event.inode} of device {event.device >> 20}:{event.device & 0xFFFFF}"


def _words(event: Event) -> tuple[str, str]:
    """What happened, in a word, and the rest of the sentence."""
    by = f" by {event.via}" if event.via else ""
    if event.slots > 1:
        by += f", {event.slots} buffers"
    if event.step == "queued":
        return "queued", _queued(event, by)
    if event.step == "taken":
        return _taken(event, by)
    if event.step == "finding":
        return _FINDING, event.finding
    if event.step == "moved" and event.via != "fuse reply":
        return "stolen", "into a page cache, in the place of another page"
    if event.step == "moved":
        return "stolen", "into the reader's page cache by a FUSE reply"
    if event.step == "asked":
        answer = "given" if event.how == "granted" else "refused"
        return _ASKED, f"for by a FUSE reply, and {answer}"
    if event.step == "unmapped":
        return "unmapped", _unmapped(event)
    if event.step == "filled":
        return "filled", "copied out of a FUSE reply" if event.how == "reply" else "by a device"
    places = {
        "inserted": f"page {event.index} of the file",
        "removed": "from the page cache",
        "mapped": "into a page table",
        "released": "by a pipe",
        "listed": "on an LRU list",
        "sent": "by a network device",
    }
    return event.step, places.get(event.step, "")


def _unmapped(event: Event) -> str:
    if not event.exact:
        return "from the page tables, by now"
    return "from a page table" if event.mapcount else "from the last page table"


def _queued(event: Event, by: str) -> str:
    if event.how == "internal":
        return f"in the pipe within {event.via}, from {event.end}"
    if event.how == "onward":
        return f"in another pipe{by}"
    if event.how == "teed":
        return f"in a second pipe too{by}"
    if event.end == "user memory" and event.via != "vmsplice":
        return f"in a pipe, the bytes copied from user memory{by}"
    return f"in a pipe, from {event.end}{by}"


def _taken(event: Event, by: str) -> tuple[str, str]:
    if event.how == "kept":
        return "stolen", f"into the page cache of {event.end}{by}"
    if event.end in _SINKS:
        return "dropped", f"into {event.end}{by}"
    if event.end in _SOCKETS:
        return "lent", f"to buffers of {event.end}{by}"
    if event.end == "fuse device":
        return "copied", f"out of a {event.via}"
    return "copied", f"to {event.end}{by}"


def chrome_trace(journeys: Journeys) -> list[dict[str, Any]]:
    """Chrome trace events (the JSON array format), one track for each page.

    A page is in a state from one step to the next: that is a slice. Times are microseconds since
    the first event of all.
    """
    times = [step.time_ns for story in journeys.stories for step in story.steps]
    start = min(times, default=0)
    trace = [_named("process_name", 0, "pages")]
    for story in journeys.stories:
        title = f"page {story.page}" + (f" of {story.file}" if story.file else "")
        trace.append(_named("thread_name", story.page, title))
        states = [step for step in story.steps if step.what not in _MOMENTS]
        ends = [step.time_ns for step in states[1:]] + [states[-1].time_ns] if states else []
        until = {id(step): end for step, end in zip(states, ends, strict=True)}
        for step in story.steps:
            trace.append(_slice(story, step, start, until.get(id(step))))
    return trace


def _named(what: str, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "ts": 0, "pid": 1, "tid": tid, "args": {"name": name}}


def _slice(story: Story, step: Step, start: int, until: int | None) -> dict[str, Any]:
    known = {k: v for k, v in vars(step).items() if k not in ("time_ns", "what") and v is not None}
    event = {
        "name": f"{step.what}: {step.detail}" if until is None else step.what,
        "cat": step.what if until is None else "page",
        "ts": (step.time_ns - start) / 1000,
        "pid": 1,
        "tid": story.page,
        "args": known,
    }
    if until is None:
        return {**event, "ph": "i", "s": "t"}
    return {**event, "ph": "X", "dur": (until - step.time_ns) / 1000}
