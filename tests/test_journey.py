# SPDX-License-Identifier: MIT
"""Stories out of events: complete, in order, and shown safely."""

from __future__ import annotations

import io
import json
import os
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from rsplice.audit import Audit
from rsplice.cli import main
from rsplice.dashboards.journeys import elapsed, journey_lines, story_lines
from rsplice.dashboards.report import print_report
from rsplice.errors import RspliceError
from rsplice.journey import (
    MARKS,
    PAGES_MAX,
    SHARE,
    STEPS,
    Event,
    Journeys,
    Request,
    Step,
    Story,
    chrome_trace,
    tell,
    without_candidates,
)
from rsplice.recording import parse_audit
from rsplice.tracers import journey as tracer
from rsplice.tracers.btf import RUNNING, Btf
from rsplice.tracers.findings import NAMES
from tests.support.kernel_btf import SUITES
from tests.test_layouts import read
from tests.test_report import EVIL, EVIL_SHOWN

PAGE_STEPS = [step for step in STEPS if step not in ("freed", "mark", "finding")]
LABELS = ("stranded", "steal-refused: dirty", "steal-refused: large folio")


def event(time: int, step: str, page: int = 0, **fields: Any) -> Event:
    return Event(time, page, step, **{"pid": 7, "tid": 7, "comm": "cp", **fields})


def whats(story: Story) -> list[str]:
    return [step.what for step in story.steps]


# --- from events to stories -----------------------------------------------------------------------


@st.composite
def lives(draw: st.DrawFn) -> list[Event]:
    """Events of some pages, each of which is freed once at most; in any order."""
    events: list[Event] = []
    for page in range(draw(st.integers(0, 4))):
        times = sorted(
            draw(st.lists(st.integers(1000, 5000), min_size=1, max_size=12, unique=True))
        )
        steps = draw(st.lists(st.sampled_from(PAGE_STEPS), min_size=len(times),
                              max_size=len(times)))  # fmt: skip
        calls = draw(st.lists(st.integers(0, 2), min_size=len(times), max_size=len(times)))
        own = [
            event(t, s, page, call=c, call_time=900 * bool(c), refcount=draw(st.integers(-1, 3)))
            for t, s, c in zip(times, steps, calls, strict=True)
        ]
        own[0] = replace(own[0], first=True, born=draw(st.sampled_from([0, 700, 1000])))
        for label in draw(st.lists(st.sampled_from(LABELS), max_size=2, unique=True)):
            time = 5001 + LABELS.index(label)  # unlike those of others
            own.append(event(time, "finding", page, finding=label))
        if draw(st.booleans()):
            own.append(event(draw(st.integers(1000, 5000)), "freed", page))
        events += own
    for time in draw(st.lists(st.integers(900, 6000), max_size=4)):
        call = draw(st.integers(1, 3))
        word = draw(st.sampled_from(MARKS[1:]))
        events.append(event(time, word, call=call, call_time=900, is_mark=True, nbytes=5))
    return list(draw(st.permutations(events)))


@given(lives())
def test_each_page_has_one_story_that_begins_and_ends_once(events: list[Event]) -> None:
    stories = tell(events).stories
    assert [s.page - 1 for s in stories] == sorted({e.page for e in events if not e.is_mark})
    for story in stories:
        told = [what for what in whats(story) if what != "librsplice"]
        assert told[0] in ("allocated", "found")
        assert sum(what in ("allocated", "found") for what in told) == 1
        assert story.freed == (told.count("freed") == 1)
        assert "freed" not in whats(story)[:-1]


@given(lives())
def test_stories_are_in_the_order_of_time(events: list[Event]) -> None:
    for story in tell(events).stories:
        times = [step.time_ns for step in story.steps]
        assert times == sorted(times)


@given(lives())
def test_no_event_is_lost_and_none_invented(events: list[Event]) -> None:
    words = {"taken": "copied", "moved": "stolen"}
    for story in tell(events).stories:
        own = [e for e in events if not e.is_mark and e.page == story.page - 1]
        told = Counter(w for w in whats(story) if w not in ("allocated", "found", "librsplice"))
        assert told == Counter(words.get(e.step, e.step) for e in own)
        calls = {e.call for e in own if e.call_time}
        marks = [e for e in events if e.is_mark and e.call in calls]
        assert whats(story).count("librsplice") == len(calls) + len(marks)


@given(lives())
def test_the_order_of_arrival_does_not_matter(events: list[Event]) -> None:
    def key(journeys: Journeys) -> list[list[str]]:
        return [sorted(map(str, story.steps)) for story in journeys.stories]

    assert key(tell(events)) == key(tell(events[::-1]))


@given(lives())
def test_stories_of_findings_are_those_and_no_others(events: list[Event]) -> None:
    everything = tell(events).stories
    journeys = tell(events, Request(1, finding="any"))
    found = [e.page for e in events if e.finding]
    assert [s.steps for s in journeys.stories] == [
        s.steps for s in everything if s.page - 1 in found
    ]
    assert [s.page for s in journeys.stories] == [*range(1, len(journeys.stories) + 1)]
    for story in everything:
        own = [e for e in events if e.finding and e.page == story.page - 1]
        assert set(story.findings) == {e.finding for e in own}
        told = [step.detail for step in story.steps if step.what == "finding"]
        assert sorted(told) == sorted(e.finding for e in own)


@given(lives(), st.data())
def test_candidates_are_forgotten_and_nothing_else(
    events: list[Event], data: st.DataObject
) -> None:
    """Read in several parts, with pages that end in between: stories are those of one reading."""
    # A mark is told only once a page of its call has been.
    told = {e.call: e.time for e in sorted(events, key=lambda e: -e.time) if not e.is_mark}
    events = [e for e in events if not e.is_mark or e.time > told.get(e.call, e.time)]
    in_time = sorted(events, key=lambda e: e.time)
    kept: list[Event] = []
    at = 0
    while at < len(in_time):
        # What is still to come of a page comes while it is followed.
        live = {e.page for e in in_time[at:] if not e.is_mark}
        until = data.draw(st.integers(at + 1, len(in_time)))
        kept = without_candidates(kept, in_time[at:until], live)
        at = until
    request = Request(1, finding="any")
    assert tell(kept, request) == tell(events, request)
    left = {e.page for e in without_candidates(kept, [], set()) if not e.is_mark}
    assert left == {e.page for e in events if e.finding}


@given(lives(), st.integers(1, 3), st.integers(0, 40))
def test_a_finding_has_the_stories_of_its_pages(
    events: list[Event], asked: int, frame: int
) -> None:
    framed = [replace(e, frame=10 * e.page, pages=4) for e in events]
    journeys = tell(framed, Request(asked, finding="any"))
    for label in LABELS:
        own = {e.page for e in framed if e.finding == label}
        stories = journeys.of_finding(label, frame)
        assert len(stories) == min(asked, len(own))
        assert {story.frame for story in stories} <= {10 * page for page in own}
        if frame // 10 in own and frame % 10 < 4:
            assert stories[0].frame == frame // 10 * 10, "that of the first occurrence"
    assert journeys.of_finding("other") == []
    assert all(s.has_frame(s.frame) and not s.has_frame(None) for s in journeys.stories)


def test_what_a_call_took_comes_before_the_end_that_it_led_to() -> None:
    """It is told when the call returns: by then the page has been freed."""
    taken = event(2050, "taken", end="user memory", via="read")
    (story,) = tell([event(1000, "queued", first=True), event(2000, "freed"), taken]).stories
    assert whats(story) == ["found", "queued", "copied", "freed"]
    assert [s.time_ns for s in story.steps] == [1000, 1000, 2000, 2000]


def test_what_was_before_the_page_was_chosen() -> None:
    first = event(1000, "queued", first=True, born=400, filled=600, born_pid=3, born_comm="dd")
    (story,) = tell([first]).stories
    assert whats(story) == ["allocated", "filled", "queued"]
    assert [s.time_ns for s in story.steps] == [400, 600, 1000]
    assert (story.steps[0].pid, story.steps[0].comm) == (3, "dd")
    assert story.steps[0].detail.startswith("by then")
    (story,) = tell([replace(first, born_exact=True)]).stories
    assert story.steps[0].detail == ""


def test_marks_are_those_of_the_calls_that_the_page_was_in() -> None:
    inside = {"call": 9, "call_time": 500}
    events = [
        event(1000, "queued", first=True, born=600, **inside),
        event(1100, "filled", is_mark=True, nbytes=4096, **inside),
        event(1300, "published", is_mark=True, nbytes=4096, **inside),
        event(1200, "published", is_mark=True, nbytes=1, call=8, call_time=500),
        event(1250, "published", is_mark=True, nbytes=2, tid=8, **inside),
    ]
    (story,) = tell(events).stories
    assert [(s.what, s.detail) for s in story.steps if s.what == "librsplice"] == [
        ("librsplice", "reserved (call 9)"),
        ("librsplice", "filled 4096 bytes (call 9)"),
        ("librsplice", "published 4096 bytes (call 9)"),
    ]
    assert whats(story)[0] == "librsplice"


def test_each_step_says_whether_it_was_seen_at_that_moment() -> None:
    events = [
        event(1000, "queued", first=True, born=600, born_exact=True, born_mapped=700, filled=800),
        event(1100, "mapped", exact=True),
        event(1200, "unmapped"),
        event(1300, "freed", exact=True),
    ]
    (story,) = tell(events).stories
    assert [(step.what, step.moment, step.time_ns) for step in story.steps] == [
        ("allocated", "exact", 600),
        ("mapped", "exact", 700),
        ("filled", "exact", 800),
        ("queued", "snapshot", 1000),
        ("mapped", "exact", 1100),
        ("unmapped", "snapshot", 1200),
        ("freed", "exact", 1300),
    ]
    lines = [str(line) for line in story_lines(story, 80) if "(" not in str(line)]
    assert [line.split()[0].startswith("~") for line in lines[1:8]] == [
        step.moment == "snapshot" for step in story.steps
    ]


def test_steps_of_older_recordings_have_no_moment() -> None:
    old = Step(5, "freed").to_json()
    del old["moment"]
    assert Step.from_json(old) == Step(5, "freed")


def test_a_call_that_outlives_the_page_is_told_before_its_end() -> None:
    inside = {"call": 9, "call_time": 500}
    events = [
        event(1000, "queued", first=True, **inside),
        event(1200, "freed", **inside),
        event(1300, "published", is_mark=True, **inside),
    ]
    (story,) = tell(events).stories
    assert whats(story)[-2:] == ["librsplice", "freed"]
    assert story.steps[-2].detail.endswith("after the page was freed")


@pytest.mark.parametrize(
    ("fields", "word", "part"),
    [
        ({"step": "queued", "end": "ext4", "via": "splice"}, "queued", "from ext4 by splice"),
        ({"step": "queued", "end": "user memory", "via": "write"}, "queued", "copied from user"),
        ({"step": "queued", "end": "user memory", "via": "vmsplice"}, "queued", "from user memory"),
        ({"step": "queued", "how": "teed", "via": "tee"}, "queued", "second pipe too by tee"),
        ({"step": "queued", "how": "internal", "via": "sendfile"}, "queued", "within sendfile"),
        ({"step": "queued", "end": "ext4", "via": "splice", "slots": 1}, "queued", "by splice"),
        ({"step": "queued", "end": "ext4", "via": "splice", "slots": 7}, "queued", "ce, 7 buffers"),
        ({"step": "taken", "end": "ext4", "via": "read", "slots": 7}, "copied", "read, 7 buffers"),
        ({"step": "taken", "end": "/dev/null", "via": "splice"}, "dropped", "/dev/null"),
        ({"step": "taken", "end": "tcp", "via": "splice"}, "lent", "buffers of tcp"),
        ({"step": "taken", "end": "ext4", "via": "splice"}, "copied", "to ext4 by splice"),
        ({"step": "taken", "end": "tmpfs", "how": "kept"}, "stolen", "page cache of tmpfs"),
        ({"step": "taken", "end": "fuse device", "via": "fuse reply"}, "copied", "fuse reply"),
        ({"step": "moved", "via": "fuse reply"}, "stolen", "the reader's page cache"),
        ({"step": "moved"}, "stolen", "in the place of another page"),
        ({"step": "asked", "how": "granted"}, "asked", "and given"),
        ({"step": "asked"}, "asked", "and refused"),
        ({"step": "released"}, "released", "by a pipe"),
        ({"step": "unmapped"}, "unmapped", "by now"),
        ({"step": "unmapped", "exact": True}, "unmapped", "from the last page table"),
        ({"step": "unmapped", "exact": True, "mapcount": 1}, "unmapped", "from a page table"),
        ({"step": "filled", "how": "reply"}, "filled", "copied out of a FUSE reply"),
        ({"step": "filled", "how": "device"}, "filled", "by a device"),
        ({"step": "inserted", "index": 3}, "inserted", "page 3 of the file"),
    ],
)
def test_words(fields: dict[str, Any], word: str, part: str) -> None:
    (story,) = tell([event(1, **fields)]).stories
    assert story.steps[-1].what == word
    assert part in story.steps[-1].detail


def test_states() -> None:
    cached = {"refcount": 2, "cached": True, "inode": 12, "device": 8 << 20 | 1}
    events = [
        event(1, "queued", refcount=1),
        event(2, "queued", refcount=3, mapcount=1, anonymous=True, flags=("dirty",)),
        event(3, "queued", name="a", **cached),
        event(4, "queued", **cached),
        event(5, "queued"),
    ]
    steps = tell(events).stories[0].steps[1:]
    assert [step.mapping for step in steps] == [
        "none", "anonymous memory", "a", "inode 12 of device 8:1", ""
    ]  # fmt: skip
    assert (steps[1].refcount, steps[1].mapcount, steps[1].flags) == (3, 1, ["dirty"])
    assert steps[4].refcount is None
    assert tell(events).stories[0].file == "a", "the name that it had"
    assert tell(events[3:]).stories[0].file == "inode 12 of device 8:1"


# --- JSON, recordings, Perfetto -------------------------------------------------------------------


@given(lives())
def test_a_document_gives_back_the_stories(events: list[Event]) -> None:
    audit = Audit(journeys=tell(events, Request(3, "a"), {0: 5}, 2))
    document = json.loads(json.dumps(audit.to_json()))
    assert parse_audit(document).journeys == audit.journeys
    assert all(s.unkept == (5 if s.page == 1 else 0) for s in audit.journeys.stories)  # type: ignore[union-attr]


def test_audits_without_journeys_have_none() -> None:
    document = Audit().to_json()
    assert "journeys" not in document
    assert parse_audit(document).journeys is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"asked": "4", "path": "", "stories": [], "events_lost": 0},
        {"asked": 4, "path": "", "stories": [{}], "events_lost": 0},
        {"asked": 4},
        [],
        "x",
    ],
)
def test_a_damaged_document_is_one_error(wrong: Any) -> None:
    with pytest.raises(ValueError):
        parse_audit({**Audit().to_json(), "journeys": wrong or [1]})


@given(lives())
def test_the_trace_is_one_that_perfetto_reads(events: list[Event]) -> None:
    journeys = tell(events)
    trace = json.loads(json.dumps(chrome_trace(journeys)))
    assert isinstance(trace, list)
    for entry in trace:
        assert entry.keys() >= {"name", "ph", "ts", "pid", "tid"}
        assert entry["ph"] in ("M", "X", "i") and entry["name"]
        assert entry["ph"] != "X" or entry["dur"] >= 0
        assert entry["ph"] != "i" or entry["s"] == "t"
    names = {e["tid"]: e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert names.keys() == {story.page for story in journeys.stories}
    for story in journeys.stories:
        track = [e for e in trace if e["tid"] == story.page and e["ph"] != "M"]
        assert len(track) == len(story.steps)
        assert [e["ts"] for e in track] == sorted(e["ts"] for e in track)
        moments = [e for e in track if e["ph"] == "i"]
        assert {e["cat"] for e in moments} <= {"librsplice", "finding", "asked"}
        slices = [e for e in track if e["ph"] == "X"]
        for one, other in zip(slices, slices[1:], strict=False):
            assert one["ts"] + one["dur"] == pytest.approx(other["ts"], abs=1e-3)


# --- as text --------------------------------------------------------------------------------------


def evil_journeys() -> Journeys:
    steps = [
        Step(0, "found", EVIL),
        Step(1500, "queued", EVIL * 3, 7, EVIL, 1, 2, [EVIL], EVIL),
        Step(2_000_000, "freed"),
    ]
    return Journeys(4, EVIL, [Story(1, steps, 4, True, 9)], 3)


@pytest.mark.parametrize("width", [64, 80, 132])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    wide = Story(2, [Step(0, "queued", "界" * 100, 7, "界" * 15, 1, 0, [], "界" * 31)])
    journeys = evil_journeys()
    journeys.stories.append(wide)
    lines = [line.plain for line in journey_lines(journeys, width)]
    assert all(cell_len(line) <= width for line in lines), lines


def test_names_are_never_control_characters_or_markup() -> None:
    text = io.StringIO()
    print_report(Audit(journeys=evil_journeys()), text, width=80)
    shown = text.getvalue()
    assert "\x1b" not in shown and all(c.isprintable() or c == "\n" for c in shown)
    flat = "".join(shown.split())
    assert "".join(EVIL_SHOWN.split()) in flat
    assert "9eventsmore" in flat and "3eventsofjourneyslost" in flat


def test_a_story_as_it_is_printed() -> None:
    steps = [
        Step(1000, "allocated", "", 7, "cp"),
        Step(13_700, "queued", "in a pipe, from ext4 by splice", 7, "cp", 2, 1, ["lru"], "a"),
        Step(1_001_000, "freed", "", 7, "cp", 0, 0, [], "none"),
    ]
    journeys = Journeys(4, "", [Story(1, steps, 1, True, frame=4711)])
    assert [line.plain for line in journey_lines(journeys, 80)] == [
        "JOURNEYS: 1 page, the first that were seen queued in a pipe",
        "page 1 of a, frame 4711, freed in the end",
        "         0  allocated      [cp 7]",
        "   12.7 us  queued        in a pipe, from ext4 by splice [cp 7]",
        "            (2 references, mapped once, mapping a, lru)",
        "    1.0 ms  freed          [cp 7]",
        "",
    ]


def test_a_long_story_in_brief_has_its_beginning_and_what_led_to_the_finding() -> None:
    steps = [Step(0, "found"), *(Step(n, "queued", f"step {n}") for n in range(1, 40))]
    steps += [Step(40, "finding", "stranded"), Step(41, "freed")]
    story = Story(1, steps, findings=["stranded"])
    lines = [line.plain for line in story_lines(story, 80, brief=True)]
    assert [line.split()[-1] for line in lines if " step " in line] == [
        *"123", *map(str, range(34, 40))
    ]  # fmt: skip
    assert "            30 steps left out here, all in the JSON" in lines
    assert len(list(story_lines(story, 80))) == 1 + len(steps)
    short = Story(1, steps[:8] + steps[40:])
    assert len(list(story_lines(short, 80, brief=True))) == 1 + len(short.steps)


def test_a_process_is_not_torn_apart() -> None:
    story = Story(1, [Step(0, "queued", "x" * 50, 7, "a b")])
    lines = [line.plain for line in story_lines(story, 80)][1:]
    assert lines == ["         0  queued        " + "x" * 50, " " * 26 + "[a b 7]"]


def test_without_pages_it_says_so() -> None:
    assert next(journey_lines(Journeys(), 80)).plain.endswith("no page was seen queued in a pipe")
    assert list(journey_lines(None, 80)) == []


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [(0, "0"), (999_949, "999.9 us"), (999_951, "1.0 ms"), (1_234_567_890, "1.235 s")],
)
def test_times(nanoseconds: int, shown: str) -> None:
    assert elapsed(nanoseconds) == shown


# --- options, and this kernel ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--journey=0"], f"from 1 to {PAGES_MAX}"),
        (["--journey=33"], f"from 1 to {PAGES_MAX}"),
        (["--journey", "true"], "the command behind --"),
        (["--journey=2", "--identity", "off"], "leave out --identity off"),
        (["--json", "-", "--journey-json", "-"], "cannot both go to standard output"),
        (["--journey-json", "/nonexistent/a"], "there is no directory"),
        (["--journey-finding", "any", "--journey-file", "a"], "cannot be combined"),
        (["--journey-finding", "any", "--identity", "sample"], "leave out --identity"),
        (
            ["--journey-finding", EVIL],
            f"no finding is called {EVIL_SHOWN}; there are steal-refused, ",
        ),
    ],
)
def test_options_that_cannot_be(
    options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["audit", *options, "--", "true"]))
    assert ended.value.code == 125
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("command", [["live"], ["record", "-o", "/nonexistent/a"]])
@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--journey=33"], f"from 1 to {PAGES_MAX}"),
        (["--journey", "--identity", "sample"], "leave out --identity"),
    ],
)
def test_options_of_live_and_record_that_cannot_be(
    command: list[str], options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([*command, *options, "--", "true"]))
    assert ended.value.code == 125
    assert part in capsys.readouterr().err


def test_each_finding_has_a_bit_of_its_own() -> None:
    bits = [tracer.finding_bits(name) for name in NAMES[1:]]
    assert len({*bits}) == len(bits) and all(bit.bit_count() == 1 for bit in bits)
    assert tracer.finding_bits("any") == sum(bits)
    assert tracer.finding_bits("") == 0
    assert tracer.finding_bits("leaked") == 1 << NAMES.index("leaked")


def test_a_file_that_has_no_page_cache_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "absent"), str(tmp_path), "/dev/null"):
        with pytest.raises(RspliceError) as error:
            tracer.Follower(Request(1, path))
        assert str(error.value).startswith("--journey-file: ")


@pytest.mark.skipif(not Path(RUNNING).exists(), reason=f"this kernel has no {RUNNING}")
def test_what_journeys_need_of_this_kernel() -> None:
    constants, missing = tracer._resolve(Btf())
    assert "journey" not in missing
    assert constants.keys() >= {field.name for field in tracer.FIELDS}


#: What older kernels lack.
NO_TRACEPOINT = {
    "5.10": {"mm_filemap_map_pages", "mm_filemap_fault", "fuse_request_end"},
    "6.1": {"mm_filemap_map_pages", "mm_filemap_fault", "fuse_request_end"},
}


@pytest.mark.timeout(600)  # the first test that needs a kernel waits for the downloads of all
@pytest.mark.parametrize("series", SUITES)
def test_what_journeys_need_of_other_kernels(series: str) -> None:
    kernel = read(series)
    if isinstance(kernel, str):
        pytest.skip(kernel)
    _, missing = tracer._resolve(kernel.btf)
    older = NO_TRACEPOINT.get(series, set())
    assert missing.keys() == ({"fuse"} if older else set())
    lacking = {hook.tracepoint for hook in tracer.HOOKS if not hook.name_on(kernel.btf)}
    assert lacking == older
    for field in tracer.FIELDS:
        places = [place for path in field.paths if (place := kernel.walker.place(path))]
        assert not places or tracer._resolve(kernel.btf)[0][field.name] == places[0][0]


@pytest.mark.parametrize("pages", [1, 4, PAGES_MAX])
def test_the_ring_has_room_for_all_that_is_kept(pages: int) -> None:
    size = tracer.ring_pages(pages)
    assert size & (size - 1) == 0
    assert size * 4096 >= pages * (SHARE + 2) * (tracer._EVENT.size + 8)


def test_the_ring_gives_each_complete_record_once(tmp_path: Path) -> None:
    """A file laid out as the kernel maps a ring, but that its data are not there twice."""
    path = tmp_path / "ring"
    path.write_bytes(bytes(4 * 4096))
    busy, discarded = 1 << 31, 1 << 30
    with path.open("r+b") as file:
        ring = tracer.Ring(file.fileno(), 1)

        def put(at: int, head: int, data: bytes, end: int) -> None:
            os.pwrite(file.fileno(), struct.pack("=II", head, 0) + data, 2 * 4096 + at)
            os.pwrite(file.fileno(), struct.pack("=Q", end), 4096)

        try:
            assert ring.drain() == []
            put(0, 5, b"first", 16)
            put(16, 8 | discarded, b"unwanted", 32)
            put(32, 3 | busy, b"???", 48)
            assert ring.drain() == [b"first"]
            assert ring.drain() == []
            put(32, 3, b"end", 48)
            assert ring.drain() == [b"end"]
            assert os.pread(file.fileno(), 8, 0) == struct.pack("=Q", 48)
        finally:
            ring.close()
