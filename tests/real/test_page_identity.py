# SPDX-License-Identifier: MIT
"""The pages that the device filled are the pages in the page cache of the FUSE file.

Every one of them: the frames that lay in the server's pipe before each reply are, page by page, the
frames in a reader's page tables. The audit says the same by its counts, and of some pages by their
journeys.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from tests.support.attached import descendants_of
from tests.support.patience import DEADLINE
from tests.support.pipe_frames import Answer, PipeFrames, frames_of, pipe_frames
from tests.support.run import RSPLICE, Result, Running, process

pytestmark = pytest.mark.privileged

PAGE = 4096
PAGES, TAIL = 16384, 101  # 64 MiB
TWIN_PAGES = 211
SMALL_READ_PAGES = 2053
HEADER = 16  # struct fuse_out_header
FOLLOWED = 31


@dataclass
class Served:
    """A file that was read through a mapping of a FUSE server's file, and what was seen of it."""

    audit: Result
    answers: list[Answer]  #: of the server, with what lay in its pipe before
    frames: list[int]  #: in the reader's page tables


@pytest.fixture(scope="module")
def source(ext4: Path) -> Iterator[Path]:
    """An empty directory to be served, on a disk."""
    if not importlib.util.find_spec("rsplice._fuse"):
        pytest.skip("rsplice was built without libfuse3")
    with tempfile.TemporaryDirectory(dir=ext4) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mnt")


def make_file(path: Path, pages: int) -> None:
    with open(path, "wb") as file:
        file.write((os.urandom(1 << 20) * (pages * PAGE // (1 << 20) + 1))[: pages * PAGE])
        file.write(b"x" * TAIL)
        file.flush()
        os.fsync(file.fileno())


def command(mode: str, source: Path, mount: Path, *more: str) -> list[str | Path]:
    options = ["--mode", mode, "--threads", "2", *more]
    return [*RSPLICE, "workload", "fuse", *options, "--source", source, "--mount", mount]


def read_watched(
    probes: PipeFrames, running: Popen[bytes], source: Path, mount: Path, first: int = 0
) -> list[int]:
    """The frames of the mount's file, of a server whose replies are noted from the first on.

    :param first: bytes that are read at a time from start to end before the file is mapped, if any
    """
    until = time.monotonic() + DEADLINE
    while not os.path.ismount(mount):
        assert time.monotonic() < until and running.poll() is None, "not mounted"
        time.sleep(0.02)
    (server,) = [
        pid
        for pid in descendants_of(running.pid)
        if Path(f"/proc/{pid}/comm").read_text().strip() == "rsplice-fuse"
    ]
    probes.watch(server)
    with (
        open(mount / "file", "rb", buffering=0) as shown,
        mmap.mmap(shown.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping,
    ):
        while first and shown.read(first):
            pass
        frames = frames_of(mapping, str(mount / "file"))
        assert mapping[:] == (source / "file").read_bytes()
    return frames


def frames_before(answers: list[Answer], pages: int) -> list[int]:
    """The frame that each whole page of the file had in the server's pipe, in file order."""
    frames: dict[int, int] = {}
    for answer in answers:
        header, *payload = answer.buffers
        assert header.length == HEADER
        assert answer.offset % PAGE == 0
        for number, buffer in enumerate(payload, answer.offset // PAGE):
            if number < pages:
                assert (buffer.offset, buffer.length) == (0, PAGE)
                assert number not in frames, "read twice"
                frames[number] = buffer.frame
    assert sorted(frames) == list(range(pages)), "not every page went through a reply"
    return [frames[number] for number in range(pages)]


@pytest.fixture(scope="module")
def served(source: Path, mount: Path) -> Served:
    make_file(source / "file", PAGES)
    with pipe_frames() as probes:
        running = Running(command("rsplice", source, mount), f"--journey={FOLLOWED}")
        frames = read_watched(probes, running.process, source, mount)
        return Served(running.stop(), probes.answers(), frames)


def test_each_page_is_the_very_page_that_lay_in_the_servers_pipe(served: Served) -> None:
    assert frames_before(served.answers, PAGES) == served.frames[:PAGES]


def test_each_page_has_a_frame_of_its_own(served: Served) -> None:
    assert len(served.frames) == len(set(served.frames)) == PAGES + 1


def test_the_tail_is_copied_into_another_page(served: Served) -> None:
    last = served.answers[-1].buffers[-1]
    assert last.length == TAIL
    assert last.frame != served.frames[-1]


def test_pages_that_are_copied_are_other_pages(source: Path, mount: Path) -> None:
    """The twin: pages of the source's page cache that are mapped cannot be moved."""
    make_file(source / "file", TWIN_PAGES)
    with (
        open(source / "file", "rb") as original,
        mmap.mmap(original.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping,
        pipe_frames() as probes,
        process(command("splice", source, mount), stdout=subprocess.DEVNULL) as running,
    ):
        lent = frames_of(mapping, str(source / "file"))
        shown = read_watched(probes, running, source, mount)
        answers = probes.answers()
        running.terminate()
        assert running.wait(DEADLINE) == 0
    assert frames_before(answers, TWIN_PAGES) == lent[:TWIN_PAGES]
    assert not set(lent) & set(shown)


def read_on(source: Path, mount: Path, *options: str) -> tuple[list[Answer], list[int]]:
    """A file that is read from start to end by small reads: the replies, and the frames."""
    make_file(source / "file", SMALL_READ_PAGES)
    with (
        pipe_frames() as probes,
        process(command("rsplice", source, mount, *options), stdout=subprocess.DEVNULL) as running,
    ):
        shown = read_watched(probes, running, source, mount, 16 * PAGE)
        answers = probes.answers()
        running.terminate()
        assert running.wait(DEADLINE) == 0
    return answers, shown


def test_reading_ahead_copies_a_few_pages_and_moves_all_others(source: Path, mount: Path) -> None:
    """With the mark of readahead left in place READs grow; the twin loses it with each page."""
    answers, shown = read_on(source, mount, "--readahead", "512K")
    before = frames_before(answers, SMALL_READ_PAGES)
    copied = {n for n, (one, other) in enumerate(zip(before, shown, strict=False)) if one != other}
    marked = {answer.offset // PAGE + n for answer in answers for n in marked_pages(answer)}
    assert copied == {n for n in marked if n < SMALL_READ_PAGES}
    assert 0 < len(copied) < SMALL_READ_PAGES // 8
    twin, shown = read_on(source, mount)
    assert frames_before(twin, SMALL_READ_PAGES) == shown[:-1]
    assert len(answers) < len(twin) // 2


def marked_pages(answer: Answer) -> set[int]:
    """The pages of a reply that may carry the mark: see RSPLICE_F_READAHEAD in rsplice(3)."""
    pages = len(answer.buffers) - 1
    powers = {1 << n for n in range(pages.bit_length())}
    found = {0, pages - pages // 2, pages - pages // 4} | powers
    return {page for page in found if page < pages}


def test_every_whole_page_is_moved_and_the_tail_alone_is_copied(served: Served) -> None:
    reply = served.audit.path("pipe", "fuse device", "fuse reply")
    assert reply["payload_bytes"] == PAGES * PAGE + TAIL
    assert (reply["moved"], reply["copied"]) == (PAGES * PAGE, TAIL)
    assert reply["evidence"] == "identity"
    filled = served.audit.path("ext4 O_DIRECT", "pipe", "splice")
    assert filled["direct"] >= PAGES * PAGE + TAIL


def test_a_page_is_filled_queued_moved_in_and_mapped_without_a_copy(served: Served) -> None:
    stories: list[dict[str, Any]] = served.audit.json["journeys"]["stories"]
    moved = [
        [step["what"] for step in story["steps"]]
        for story in stories
        if any(step["what"] == "stolen" for step in story["steps"])
    ]
    assert len(moved) >= FOLLOWED // 2, json.dumps(stories)[:2000]
    for steps in moved:
        order = [steps.index(what) for what in ("filled", "queued", "stolen", "mapped")]
        assert order == sorted(order), steps
        assert "copied" not in steps
