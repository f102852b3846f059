# SPDX-License-Identifier: MIT
"""Programs whose pages have known journeys, and a twin that is not followed.

Two audits serve all tests: of the first pages that are queued in a pipe, and of a file's.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rsplice.journey import PAGES_MAX, SHARE, Request
from rsplice.tracers.journey import HOOKS, Follower
from rsplice.tracers.tracer import Tracer
from tests.support.filesystems import Scratch
from tests.support.run import RSPLICE, Result, audit, process

pytestmark = pytest.mark.privileged

PAGE = 4096
READER_PAGES = 4
HOT = 211

# Each is a process of its own, by whose name its pages are told apart.
COMMON = """
import ctypes, mmap, os, sys
open("/proc/self/comm", "w").write(sys.argv[1])
"""

#: The same page of a file through a pipe into /dev/null, so many times.
AGAIN = (
    COMMON
    + """
import time
file, null = os.open(sys.argv[2], os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
out, into = os.pipe()
for _ in range(int(sys.argv[3])):
    assert os.splice(file, into, 4096, offset_src=0) == 4096
    assert os.splice(out, null, 4096) == 4096
    time.sleep(float(sys.argv[4]))
"""
)

#: A page of a file to a socket.
SEND = (
    COMMON
    + """
import socket
file, (one, other) = os.open(sys.argv[2], os.O_RDONLY), (socket.socket(), socket.socket())
one.bind(("127.0.0.1", 0))
one.listen()
other.connect(one.getsockname())
peer, _ = one.accept()
for _ in range(2):
    assert os.sendfile(other.fileno(), file, 0, 4096) == 4096
    assert len(peer.recv(4096, socket.MSG_WAITALL)) == 4096
"""
)

#: A page of memory that is given away, read by somebody else, and unmapped.
GIFT = (
    COMMON
    + """
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
memory = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"x" * 4096
view = (ctypes.c_char * 4096).from_buffer(memory)
with open("/proc/self/pagemap", "rb") as table:
    table.seek(ctypes.addressof(view) // 4096 * 8)
    entry = int.from_bytes(table.read(8), "little")
open(sys.argv[2], "w").write(str(entry & (1 << 55) - 1))
out, into = os.pipe()
vector = Vector(ctypes.addressof(view), 4096)
assert ctypes.CDLL(None).vmsplice(into, ctypes.byref(vector), 1, 8) == 4096
assert os.read(out, 4096) == b"x" * 4096
del view
memory.close()
"""
)

#: What is written to a pipe and read: freed by the reader within its call, or soon after.
WRITE = (
    COMMON
    + """
out, into = os.pipe()
assert os.write(into, b"x" * 4096) == 4096
assert os.read(out, 4096) == b"x" * 4096
os.close(out)
os.close(into)
"""
)

#: Reads a file of FUSE through a mapping.
MAPPED = (
    COMMON
    + """
file = os.open(sys.argv[2], os.O_RDONLY)
memory = mmap.mmap(file, 0, mmap.MAP_SHARED, mmap.PROT_READ)
assert sum(memory[at] for at in range(0, len(memory), 4096)) >= 0
memory.close()
"""
)

#: All that may happen to a page of a page cache.
CACHED = (
    COMMON
    + """
file = os.open(sys.argv[2], os.O_RDWR)
assert len(os.read(file, 4096)) == 4096
os.pwrite(file, b"x" * 4096, 0)
os.fsync(file)
memory = mmap.mmap(file, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
assert memory[0] == ord("x")
memory.close()
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
"""
)

#: A page that is to go on an LRU list waits in a list of its CPU's, which refers to it
#: (folio_add_lru(), mm/swap.c): nobody knows until when. move_pages(2) empties these lists of all
#: CPUs first (do_pages_move(), mm/migrate.c), even if it has no pages to move.
SETTLE = (
    COMMON
    + """
none = (ctypes.c_int * 1)()
if os.uname().machine == "x86_64":
    ctypes.CDLL(None).syscall(279, 0, 0, none, none, none, 0)
"""
)

SERVE = """
{rsplice} workload fuse --mode rsplice --source {source} --mount {mount} >/dev/null &
server=$!
while ! [ -e {mount}/whole ]; do sleep 0.02; done
{reader}
kill $server
wait $server
{settle}
"""

Story = dict[str, Any]


def python(script: str, *arguments: str | Path) -> list[str]:
    # Not a wrapper: it may have pipes of its own.
    return [os.path.realpath(sys.executable), "-Sc", script, *map(str, arguments)]


def shell(script: str, *arguments: str | Path) -> str:
    import shlex

    return shlex.join(python(script, *arguments)) + "\n"


#: What kernels with fentry alone tell; test_moments.py looks at it more closely.
MOMENTS = ("asked", "released")
_OTHERS = ("librsplice", "listed", *MOMENTS)


def told(story: Story, *, without: tuple[str, ...] = _OTHERS) -> list[str]:
    return [step["what"] for step in story["steps"] if step["what"] not in without]


def step(story: Story, what: str) -> dict[str, Any]:
    """The first step of that name."""
    found: dict[str, Any] = next(s for s in story["steps"] if s["what"] == what)
    return found


def once_around(stories: list[Story]) -> list[str]:
    """The steps of a page that goes through a pipe into /dev/null once, on this kernel."""
    released = any(s["what"] == "released" for story in stories for s in story["steps"])
    return ["queued", *(["released"] if released else []), "dropped"]


@dataclass
class Told:
    result: Result
    trace: list[dict[str, Any]]
    frame: int = 0  #: of the page that was given away, by the process's own page table

    @property
    def stories(self) -> list[Story]:
        stories: list[Story] = self.result.json["journeys"]["stories"]
        return stories

    def of(self, comm: str) -> list[Story]:
        """The stories of pages that process *comm* queued. Others may put them on an LRU list."""
        return [
            story
            for story in self.stories
            if comm in {s["comm"] for s in story["steps"] if s["what"] == "queued"}
        ]


def cold(file: Path) -> None:
    """Has the page cache forget a file."""
    with file.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module")
def queued(ext4: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """One audit of all programs that use pipes, with a twin beside them that is not followed."""
    directory = tmp_path_factory.mktemp("journey")
    scratch = Scratch(ext4, "ext4")
    twice, hot, twin, sent = (scratch.file(f, PAGE) for f in ("twice", "hot", "twin", "sent"))
    source, mount = ext4 / "source", directory / "mount"
    source.mkdir(exist_ok=True)
    mount.mkdir()
    cold(Scratch(source, "ext4").file("whole", READER_PAGES * PAGE))
    trace, frame = directory / "trace.json", directory / "frame"
    script = shell(AGAIN, "j-twice", twice, "2", "0") + shell(AGAIN, "j-hot", hot, str(HOT), "0")
    script += shell(GIFT, "j-gift", frame) + shell(WRITE, "j-write") + shell(SEND, "j-send", sent)
    script += SERVE.format(
        rsplice=" ".join(RSPLICE), source=source, mount=mount,
        reader=shell(MAPPED, "j-mapped", mount / "whole"), settle=shell(SETTLE, "j-settle"),
    )  # fmt: skip
    with process(python(AGAIN, "j-twin", twin, str(10**9), "0.005")) as unfollowed:
        result = audit(
            ["/bin/sh", "-ec", script], f"--journey={PAGES_MAX}", "--journey-json", str(trace)
        )
        assert unfollowed.poll() is None
    assert result.status == 0, result.stderr
    return Told(result, json.loads(trace.read_text()), int(frame.read_text()))


@pytest.fixture(scope="module")
def cached(ext4: Path) -> Told:
    """One audit of a program that does all there is to a page of one file."""
    file = Scratch(ext4, "ext4").file("cached", PAGE)
    cold(file)
    result = audit(python(CACHED, "j-cached", file), "--journey-file", str(file))
    assert result.status == 0, result.stderr
    return Told(result, [])


def test_a_page_of_a_file_is_queued_twice_and_lives_on(queued: Told) -> None:
    (story,) = queued.of("j-twice")
    assert told(story) == ["found", "queued", "dropped", "queued", "dropped"]
    assert not story["freed"]
    assert step(story, "queued")["detail"] == "in a pipe, from ext4 by splice"
    assert step(story, "queued")["mapping"] == "twice"
    assert "uptodate" in step(story, "queued")["flags"]
    assert step(story, "dropped")["detail"] == "into /dev/null by splice"
    queue, drop = step(story, "queued"), step(story, "dropped")
    assert queue["refcount"] == drop["refcount"] + 1, "the pipe holds a reference"


def test_a_busy_page_does_not_crowd_out_others(queued: Told) -> None:
    (story,) = queued.of("j-hot")
    around = once_around(queued.stories)
    assert told(story, without=("listed",))[1:] == (around * SHARE)[:SHARE]
    assert story["unkept"] == len(around) * HOT - SHARE


def test_a_page_that_sendfile_sends(queued: Told) -> None:
    (story,) = queued.of("j-send")
    # It may have to come from the disk once more, where memory is reclaimed proactively.
    steps = [what for what in told(story)[1:] if what != "filled"]
    assert sorted(steps) == ["queued", "queued", "sent"]
    assert step(story, "queued")["detail"] == "in the pipe within sendfile, from ext4"
    assert step(story, "sent")["mapping"] == "sent"


def test_a_gift_is_still_mapped_when_it_is_queued(queued: Told) -> None:
    (story,) = [s for s in queued.of("j-gift") if step(s, "queued")["comm"] == "j-gift"]
    assert told(story, without=(*_OTHERS, "mapped"))[:5] == [
        "allocated", "queued", "finding", "copied", "unmapped"
    ]  # fmt: skip
    assert step(story, "finding")["detail"] == "gift-still-mapped"
    queue = step(story, "queued")
    assert (queue["mapcount"], queue["mapping"]) == (1, "anonymous memory")
    assert "swapbacked" in queue["flags"]
    assert step(story, "unmapped")["mapcount"] == 0
    assert story["frame"] == queued.frame > 0
    unmapped = step(story, "unmapped")
    if unmapped["moment"] == "snapshot":
        assert unmapped["pid"] == 0, "whoever notices need not have done it"
    else:
        assert unmapped["pid"] == queue["pid"]


def test_what_is_written_to_a_pipe_is_freed_after_it_was_read(queued: Told) -> None:
    (story,) = [s for s in queued.of("j-write") if step(s, "queued")["comm"] == "j-write"]
    assert told(story) == ["allocated", "queued", "copied", "freed"]
    assert story["freed"]
    assert step(story, "queued")["refcount"] == 1
    assert step(story, "queued")["mapping"] == "none"


def test_a_page_that_a_fuse_reply_moves(queued: Told) -> None:
    """From the device's hands to a reader's page table, and all the way to its end."""
    stories = [s for s in queued.of("rsplice-fuse") if "stolen" in told(s)]
    assert len(stories) == READER_PAGES
    for story in stories:
        words = told(story, without=("listed", "unmapped", *MOMENTS))
        pages = [w for w in words if w != "librsplice"]
        assert pages == [
            "allocated", "filled", "queued", "queued", "stolen", "mapped", "removed", "freed"
        ], story["steps"]  # fmt: skip
        marks = [s["detail"] for s in story["steps"] if s["what"] == "librsplice"]
        assert [mark.split()[0] for mark in marks] == ["reserved", "filled", "published"]
        assert words[0] == "librsplice", "the call reserves first"
        assert len({mark[mark.index("(") :] for mark in marks}) == 1, "all of one call"
        assert step(story, "filled")["detail"] == "by a device"
        assert step(story, "queued")["detail"] == "in a pipe, from ext4 O_DIRECT by splice"
        assert step(story, "queued")["mapping"] == "none"
        assert step(story, "queued")["refcount"] == 1
        stolen = step(story, "stolen")
        # At that very moment it is not in the file's page cache yet: afterwards it is.
        assert stolen["mapping"] == ("none" if stolen["moment"] == "exact" else "whole")
        assert step(story, "mapped")["comm"] == "j-mapped"
        assert step(story, "mapped")["mapcount"] == 1


def test_a_process_that_is_not_followed_has_no_pages(queued: Told) -> None:
    assert queued.of("j-twin") == []
    assert "twin" not in {s["mapping"] for story in queued.stories for s in story["steps"]}


def test_nothing_was_lost(queued: Told, cached: Told) -> None:
    for audited in (queued, cached):
        journeys = audited.result.json["journeys"]
        assert journeys["events_lost"] == 0
        unkept = len(once_around(queued.stories)) * HOT - SHARE
        assert [s["unkept"] for s in journeys["stories"] if s["unkept"]] in ([], [unkept])
        missing = audited.result.json["accuracy"]["probes_missing"]
        assert [m for m in missing if m["probe"].startswith("journey")] == []


def test_each_story_is_in_order_with_one_beginning(queued: Told, cached: Told) -> None:
    stories = queued.stories + cached.stories
    assert len({s["page"] for s in queued.stories}) == len(queued.stories)
    for story in stories:
        times = [s["time_ns"] for s in story["steps"]]
        assert times == sorted(times)
        assert sum(s["what"] in ("allocated", "found") for s in story["steps"]) == 1
        assert told(story).count("freed") == int(story["freed"])


def test_the_trace_has_a_track_for_each_page(queued: Told) -> None:
    names = [e for e in queued.trace if e["name"] == "thread_name"]
    assert [e["tid"] for e in names] == [story["page"] for story in queued.stories]
    for story in queued.stories:
        track = [e for e in queued.trace if e["tid"] == story["page"] and e["ph"] != "M"]
        assert len(track) == len(story["steps"])
        assert [e["ts"] for e in track] == sorted(e["ts"] for e in track)
        assert all(e.keys() >= {"name", "ph", "ts", "pid", "tid"} for e in track)


def test_the_report_tells_the_stories(queued: Told) -> None:
    report = queued.result.stderr
    assert f"JOURNEYS: {len(queued.stories)} pages, the first that were seen queued" in report
    assert "into the reader's page cache by a FUSE reply" in report
    assert all(len(line) <= 80 for line in report.splitlines() if "/" not in line)


def test_the_page_cache_of_a_file(cached: Told) -> None:
    (story,) = cached.stories
    words = told(story, without=("listed", "unmapped"))
    assert words == [
        "allocated", "inserted", "filled", "dirtied", "written back", "mapped", "removed", "freed"
    ]  # fmt: skip
    assert {s["comm"] for s in story["steps"] if s["what"] != "listed"} == {"j-cached", ""}
    assert step(story, "inserted")["mapping"] == "cached"
    assert "dirty" in step(story, "dirtied")["flags"]
    assert step(story, "mapped")["mapcount"] == 1
    assert step(story, "freed")["mapping"] == "none"
    assert cached.result.json["journeys"]["path"].endswith("/cached")


def test_without_the_option_nothing_is_compiled_or_attached_for_it() -> None:
    tracer = Tracer(identity="sample")
    try:
        assert tracer.attached and not [p for p in tracer.attached if p.startswith("journey")]
        assert not tracer._program.has("jt_sys_exit")
    finally:
        tracer.close()


@pytest.mark.parametrize("finding", ["", "any"])
def test_older_kernels_slower_reads_do_as_well(finding: str, scratch: Scratch) -> None:
    file = None if finding else str(scratch.file("a", PAGE))
    tracer = Tracer(direct=False, journeys=Follower(Request(1, file, finding)))
    try:
        assert not tracer.direct
        missing = {m.probe for m in tracer.missing if m.probe.startswith("journey")}
        attached = {p for p in tracer.attached if p.startswith("journey")}
        probed = {each.observation.program for each in tracer.observed if each.candidate}
        instead = {
            f"journey {hook.tracepoint}" for hook in HOOKS if {hook.probed, hook.instead} & probed
        }
        assert missing | attached | instead == {f"journey {hook.tracepoint}" for hook in HOOKS}
        assert not missing & (attached | instead)
    finally:
        tracer.close()
