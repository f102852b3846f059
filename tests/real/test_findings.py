# SPDX-License-Identifier: MIT
"""Findings on the running kernel: each is provoked a known number of times, and has a twin.

What provokes one does nothing else that is found, so that a process has one finding or, where a
page was refused for being at risk too, two.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.run import Driver, audit
from tests.support.watch import COUNT, Seen, Watch

pytestmark = pytest.mark.privileged

PAGES = 64  # two READs
STEAL, REPLY = "steal-refused", "pipe -> fuse device via fuse reply"

#: Mode of the FUSE server -> what is found: (name, reason) -> how often.
MODES: dict[str, dict[tuple[str, str], int]] = {
    "splice-mapped": {(STEAL, "still mapped"): PAGES},
    "direct-io": {(STEAL, "direct_io"): PAGES},
    "teed": {(STEAL, "extra reference"): PAGES},
    "memfd": {(STEAL, "swap-backed"): PAGES},
    "gift": {(STEAL, "still mapped"): PAGES, ("gift-still-mapped", ""): PAGES},
    "gift-unmapped": {(STEAL, "swap-backed"): PAGES},
    "vmspliced": {(STEAL, "not a gift"): PAGES, ("changed-in-flight", ""): PAGES},
    "halves": {(STEAL, "partial page"): PAGES},
    "odd": {
        (STEAL, "payload at an odd offset"): 2,
        (STEAL, "payload not aligned to buffers"): PAGES - 2,
    },
    "socket": {(STEAL, "no-steal buffer"): PAGES},
    "together": {(STEAL, "header shares a buffer with payload"): PAGES},
    "dirty": {(STEAL, "dirty"): PAGES},
    "notify": {(STEAL, "notification"): 2},
    # The twins: they do what the advice says, or ask for no move.
    "splice": {},
    "splice-copy": {},
    "whole": {},
    "fresh": {},
    "write": {},
}


@pytest.fixture(scope="module", params=[None, False], ids=["direct loads", "probe reads"])
def watch(request: pytest.FixtureRequest) -> Iterator[Watch]:
    watch = Watch(request.param)
    assert watch.tracer.missing == []
    yield watch
    watch.tracer.close()


def serve(watch: Watch, driver: Driver, directory: Path, mode: str, tail: int = 0) -> Seen:
    server = driver.program.with_name("fuse_server")
    return watch.run(server, mode, "-n", PAGES, "-t", tail, "-d", directory)


@pytest.mark.parametrize("mode", MODES)
def test_each_page_that_was_refused_is_told_with_the_reason(
    mode: str, watch: Watch, driver: Driver, ext4: Path
) -> None:
    seen = serve(watch, driver, ext4, mode)
    assert seen.counts == MODES[mode]
    # What the comparison of pages says, which is another program of the tracer's.
    copied = sum(t.identity.get((0, "copied"), 0) for t in seen.replies)
    refused = sum(count for (name, _), count in seen.counts.items() if name == STEAL)
    if mode not in ("splice-copy", "write", "notify"):
        assert refused * 4096 == copied


def test_a_large_folio_is_refused_where_the_filesystem_makes_them(
    watch: Watch, driver: Driver, ext4: Path
) -> None:
    seen = serve(watch, driver, ext4, "large")
    if not seen.counts:
        pytest.skip("this kernel's ext4 keeps single pages")
    assert seen.counts == {(STEAL, "large folio"): PAGES}
    assert "a folio of" in seen.only(STEAL).first["seen"]


def test_a_last_page_that_is_no_whole_one_is_told_once(
    watch: Watch, driver: Driver, ext4: Path
) -> None:
    seen = serve(watch, driver, ext4, "splice", tail=101)
    assert seen.counts == {(STEAL, "partial page"): 1}
    assert "nothing to do" in seen.only(STEAL).advice


def test_a_finding_says_who_where_what_and_when(watch: Watch, driver: Driver, ext4: Path) -> None:
    seen = serve(watch, driver, ext4, "splice-mapped")
    finding = seen.only(STEAL)
    first = finding.first
    assert finding.kind == "missed move"
    assert (first["pid"], first["comm"]) == (seen.pid, "splice-mapped")
    assert first["operation"] == REPLY
    assert first["page_frame"] > 0
    assert first["file"] and first["file_offset"] % 4096 == 0
    assert 0 < first["time"] <= first["last"]
    assert first["expected"] == "the page is moved, not copied"
    assert "in a page table" in first["seen"] and "page cache buffer of 4096" in first["seen"]
    assert finding.advice


# --- pipes without FUSE ---------------------------------------------------------------------------


def test_move_into_a_file_is_told_once_a_call(watch: Watch, tmp_path: Path) -> None:
    body = "for _ in range(COUNT):\n"
    body += " os.splice(source, w, 8192, offset_src=0)\n"
    moving = watch.script(tmp_path, body + " os.splice(r, output, 8192, flags=1)\n")
    assert moving.counts == {(STEAL, "a destination that never moves pages"): COUNT}
    first = moving.only(STEAL).first
    assert Path(first["file"]).name == "output"
    plain = watch.script(tmp_path, body + " os.splice(r, output, 8192)\n")
    assert plain.counts == {}


def test_gifts_that_stay_mapped_are_told_until_they_are_unmapped(
    watch: Watch, tmp_path: Path
) -> None:
    body = "for _ in range(COUNT):\n"
    body += " memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    body += " memory[:4] = b'gift'\n vmsplice(memory, 8)\n"
    mapped = watch.script(tmp_path, body + " os.read(r, PAGE)\n")
    assert mapped.counts == {("gift-still-mapped", ""): COUNT}
    assert "a gift" in mapped.only("gift-still-mapped").first["seen"]
    legal = watch.script(
        tmp_path, body + " import gc; gc.collect(); memory.close()\n os.read(r, PAGE)\n"
    )
    assert legal.counts == {}


def test_what_was_vmspliced_and_stays_mapped_could_change(watch: Watch, tmp_path: Path) -> None:
    body = "memory = mmap.mmap(-1, PAGE)\nmemory[:4] = b'mine'\n"
    body += "for _ in range(COUNT):\n vmsplice(memory, 0)\n os.splice(r, null, PAGE)\n"
    result = watch.script(tmp_path, body)
    assert result.counts == {("changed-in-flight", ""): COUNT}
    assert result.only("changed-in-flight").kind == "hazard"
    copied = watch.script(
        tmp_path, "for _ in range(COUNT):\n os.write(w, bytes(PAGE))\n os.read(r, PAGE)"
    )
    assert copied.counts == {}


def test_pages_that_leave_their_file_in_the_pipe_are_told_once(
    watch: Watch, tmp_path: Path
) -> None:
    """Each is read by halves: what is met twice counts once."""
    body = (
        "for i in range(COUNT):\n os.ftruncate(source, PAGE)\n os.pwrite(source, b'x' * PAGE, 0)\n"
    )
    body += " os.splice(source, w, PAGE, offset_src=0)\n{}"
    body += " os.read(r, 2048)\n os.read(r, 2048)\n"
    truncated = watch.script(tmp_path, body.format(" os.ftruncate(source, 0)\n"))
    assert truncated.counts == {("truncated-in-flight", ""): COUNT}
    assert watch.script(tmp_path, body.format("")).counts == {}


def test_payload_that_nobody_will_read_is_told(watch: Watch, tmp_path: Path) -> None:
    left = watch.script(tmp_path, "os.write(w, b'left')\n")
    assert left.counts == {("stranded", ""): 1}
    assert "4 bytes" in left.only("stranded").first["seen"]
    drained = watch.script(tmp_path, "os.write(w, b'left')\nos.read(r, 4)\n")
    assert drained.counts == {}


def test_a_pipe_that_another_process_reads_is_not_stranded(watch: Watch, tmp_path: Path) -> None:
    body = "os.write(w, b'left')\n"
    body += "if os.fork() == 0:\n os.close(w)\n import time; time.sleep(.3); os.read(r, 4)\n"
    assert watch.script(tmp_path, body).counts == {}


@pytest.mark.parametrize(
    "close",
    ["os.close(r)", "os.dup2(null, r)", "os.dup2(null, r, inheritable=False)"],
    ids=["close", "dup2", "dup3"],
)
def test_a_reader_that_closes_before_it_exits_strands_payload_too(
    watch: Watch, tmp_path: Path, close: str
) -> None:
    body = "for _ in range(COUNT):\n r, w = os.pipe()\n os.write(w, b'left')\n {}\n"
    left = watch.script(tmp_path, body.format(close))
    assert left.counts == {("stranded", ""): COUNT}
    assert left.only("stranded").first["operation"] == "close of a pipe"
    drained = watch.script(tmp_path, body.format(f"os.read(r, 4); {close}"))
    assert drained.counts == {}


def test_a_pipe_that_can_still_be_read_is_not_stranded_by_a_close(
    watch: Watch, tmp_path: Path
) -> None:
    """Another descriptor, a writer's end, one that is closed by nobody, a pipe with a name."""
    body = (
        "for i in range(COUNT):\n"
        " r, w = os.pipe()\n os.write(w, b'left')\n"
        " other = os.dup(r)\n os.close(r)\n os.close(w)\n os.dup2(other, other)\n"
        " os.read(other, 4)\n"
        f" name = {str(tmp_path / 'fifo')!r} + str(i)\n os.mkfifo(name)\n"
        " r = os.open(name, os.O_RDONLY | os.O_NONBLOCK)\n w = os.open(name, os.O_WRONLY)\n"
        " os.write(w, b'left')\n os.close(r)\n"
        " r = os.open(name, os.O_RDONLY)\n assert os.read(r, 4) == b'left'\n"
        "try:\n os.dup2(999, other)\nexcept OSError:\n pass\n"
    )
    assert watch.script(tmp_path, body).counts == {}


def test_a_named_pipe_strands_its_payload_once_nobody_has_it_open(
    watch: Watch, tmp_path: Path
) -> None:
    body = (
        f"name = {str(tmp_path / 'fifo')!r}\nos.mkfifo(name)\n"
        "for _ in range(COUNT):\n"
        " r = os.open(name, os.O_RDONLY | os.O_NONBLOCK)\n w = os.open(name, os.O_WRONLY)\n"
        " os.write(w, b'left')\n os.close(r)\n os.close(w)\n"
    )
    left = watch.script(tmp_path, body)
    assert left.counts == {("stranded", ""): COUNT}
    assert left.only("stranded").first["operation"] == "close of a fifo"


def test_findings_fail_a_run_only_if_asked(tmp_path: Path) -> None:
    program = "import os; r, w = os.pipe(); os.write(w, b'x')"
    command = [sys.executable, "-I", "-S", "-c", program]
    assert audit(command).status == 0
    assert audit(command, "--fail-on", "violation").status == 0
    failed = audit(command, "--fail-on", "hazard")
    assert failed.status == 120
    assert "hazard: hazard: stranded, once" in failed.stderr


def test_without_identity_nothing_is_looked_for_and_that_is_said(tmp_path: Path) -> None:
    program = "import os; r, w = os.pipe(); os.write(w, b'x')"
    command = [sys.executable, "-I", "-S", "-c", program]
    result = audit(command, "--identity", "sample")
    assert result.json["findings"] == []
    assert "no findings looked for" in result.stderr
