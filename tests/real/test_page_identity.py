# SPDX-License-Identifier: MIT
"""The pages that the device filled are the pages in the page cache of the FUSE file.

All of them by the audit, which compares what the kernel waited for with what it has after each
reply; some of them one by one, by their journeys, and by the frames in a reader's page tables.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.run import Result, Running

pytestmark = pytest.mark.privileged

PAGE = 4096
PAGES, TAIL = 16384, 101  # 64 MiB
FOLLOWED = 31
FRAME = (1 << 55) - 1  # Documentation/admin-guide/mm/pagemap.rst
PRESENT = 1 << 63


def frames(file: mmap.mmap, path: Path) -> list[int]:
    """The page frame numbers of a mapped file, every page of which is touched first."""
    assert sum(file[at] for at in range(0, len(file), PAGE)) > 0
    (line,) = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    pages = -(-len(file) // PAGE)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(int(line.split("-")[0], 16) // PAGE * 8)
        entries = struct.unpack(f"{pages}Q", pagemap.read(pages * 8))
    assert all(entry & PRESENT for entry in entries)
    return [entry & FRAME for entry in entries]


@pytest.fixture(scope="module")
def served(
    ext4: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Result, list[int]]]:
    """An audit of a server whose one file is read through a mapping, and the frames seen there."""
    if not importlib.util.find_spec("rsplice._fuse"):
        pytest.skip("rsplice was built without libfuse3")
    source, mount = ext4 / "identity", tmp_path_factory.mktemp("mnt")
    source.mkdir()
    with open(source / "file", "wb") as file:
        file.write(os.urandom(1 << 20) * (PAGES * PAGE >> 20) + b"x" * TAIL)
        file.flush()
        os.fsync(file.fileno())
    workload = [sys.executable, "-m", "rsplice", "workload", "fuse", "--mode", "rsplice"]
    running = Running(
        [*workload, "--source", source, "--mount", mount, "--threads", "2"],
        f"--journey={FOLLOWED}",
    )
    until = time.monotonic() + 30.0
    while not os.path.ismount(mount):
        assert time.monotonic() < until and running.process.poll() is None, "not mounted"
        time.sleep(0.02)
    with open(mount / "file", "rb") as shown:
        mapping = mmap.mmap(shown.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        seen = frames(mapping, mount / "file")
        with open(source / "file", "rb") as original:
            assert mapping[:] == original.read()
        mapping.close()
    yield running.stop(), seen
    shutil.rmtree(source)


def test_every_whole_page_is_moved_and_the_tail_alone_is_copied(
    served: tuple[Result, list[int]],
) -> None:
    reply = served[0].path("pipe", "fuse device", "fuse reply")
    assert reply["payload_bytes"] == PAGES * PAGE + TAIL
    assert (reply["moved"], reply["copied"]) == (PAGES * PAGE, TAIL)
    assert reply["evidence"] == "identity"
    filled = served[0].path("ext4 O_DIRECT", "pipe", "splice")
    assert filled["direct"] >= PAGES * PAGE + TAIL


def test_each_page_has_a_frame_of_its_own(served: tuple[Result, list[int]]) -> None:
    _, seen = served
    assert len(seen) == len(set(seen)) == PAGES + 1


def test_a_page_is_filled_queued_moved_in_and_mapped_without_a_copy(
    served: tuple[Result, list[int]],
) -> None:
    stories: list[dict[str, Any]] = served[0].json["journeys"]["stories"]
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
