# SPDX-License-Identifier: MIT
"""Findings on the running kernel: each is provoked a known number of times, and has a twin.

What provokes one does nothing else that is found, so that a process has one finding or, where a
page was refused for being at risk too, two.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rsplice.audit import Finding
from rsplice.events import Tally
from rsplice.launch import Command
from rsplice.tracers.tracer import Tracer
from tests.support.run import Driver, audit

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


@dataclass
class Seen:
    """What one run of a program was found to do."""

    findings: list[Finding]
    replies: list[Tally]  #: of a FUSE server, out of a pipe
    pid: int

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        return {(f.name, f.first.get("reason", "")): f.count for f in self.findings}

    def only(self, name: str) -> Finding:
        (finding,) = [f for f in self.findings if f.name == name]
        return finding


class Watch:
    """One tracer for all programs: it knows by process what an audit adds up."""

    def __init__(self, direct: bool | None) -> None:
        self.tracer = Tracer(direct=direct)
        self._known: set[int] = set()  # keys and pids of processes of earlier runs

    def run(self, *argv: object) -> Seen:
        with open(os.devnull, "w") as null:
            command = Command([str(word) for word in argv], output=null.fileno())
            self.tracer.follow(command.pid)
            command.release()
            status = command.wait()
        if status == 77:
            pytest.skip("this kernel cannot mount FUSE here")
        assert status == 0
        reading = self.tracer.counters.read()
        assert reading.events_lost == 0
        mine = {p.key for p in reading.processes} - self._known
        pids = {p.pid for p in reading.processes if p.key in mine}
        self._known |= mine
        return Seen(
            [f for f in reading.findings if f.first["pid"] in pids],
            [
                t
                for t in reading.tallies
                if t.process in mine and (t.via, t.source.kind) == ("fuse reply", "pipe")
            ],
            command.pid,
        )


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

COUNT = 23


def script(watch: Watch, tmp_path: Path, body: str) -> Seen:
    """Runs a Python program: r and w are a pipe, source a file of 32 pages, COUNT is known."""
    (tmp_path / "source").write_bytes(b"s" * 32 * 4096)
    program = tmp_path / "program.py"
    program.write_text(
        "import ctypes, mmap, os\n"
        f"COUNT, PAGE = {COUNT}, 4096\n"
        f"source = os.open({str(tmp_path / 'source')!r}, os.O_RDWR)\n"
        f"output = os.open({str(tmp_path / 'output')!r}, os.O_RDWR | os.O_CREAT)\n"
        "null = os.open('/dev/null', os.O_WRONLY)\n"
        "r, w = os.pipe()\n"
        "class Vector(ctypes.Structure):\n"
        "    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]\n"
        "def vmsplice(memory, flags):\n"
        "    vector = Vector(ctypes.addressof(ctypes.c_char.from_buffer(memory)), PAGE)\n"
        "    assert ctypes.CDLL(None).vmsplice(w, ctypes.byref(vector), 1, flags) == PAGE\n" + body
    )
    # Isolated: site packages would make calls of their own.
    return watch.run(sys.executable, "-I", "-S", program)


def test_move_into_a_file_is_told_once_a_call(watch: Watch, tmp_path: Path) -> None:
    body = "for _ in range(COUNT):\n"
    body += " os.splice(source, w, 8192, offset_src=0)\n"
    moving = script(watch, tmp_path, body + " os.splice(r, output, 8192, flags=1)\n")
    assert moving.counts == {(STEAL, "a destination that never moves pages"): COUNT}
    first = moving.only(STEAL).first
    assert Path(first["file"]).name == "output"
    plain = script(watch, tmp_path, body + " os.splice(r, output, 8192)\n")
    assert plain.counts == {}


def test_gifts_that_stay_mapped_are_told_until_they_are_unmapped(
    watch: Watch, tmp_path: Path
) -> None:
    body = "for _ in range(COUNT):\n"
    body += " memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    body += " memory[:4] = b'gift'\n vmsplice(memory, 8)\n"
    mapped = script(watch, tmp_path, body + " os.read(r, PAGE)\n")
    assert mapped.counts == {("gift-still-mapped", ""): COUNT}
    assert "a gift" in mapped.only("gift-still-mapped").first["seen"]
    legal = script(
        watch, tmp_path, body + " import gc; gc.collect(); memory.close()\n os.read(r, PAGE)\n"
    )
    assert legal.counts == {}


def test_what_was_vmspliced_and_stays_mapped_could_change(watch: Watch, tmp_path: Path) -> None:
    body = "memory = mmap.mmap(-1, PAGE)\nmemory[:4] = b'mine'\n"
    body += "for _ in range(COUNT):\n vmsplice(memory, 0)\n os.splice(r, null, PAGE)\n"
    result = script(watch, tmp_path, body)
    assert result.counts == {("changed-in-flight", ""): COUNT}
    assert result.only("changed-in-flight").kind == "hazard"
    copied = script(
        watch, tmp_path, "for _ in range(COUNT):\n os.write(w, bytes(PAGE))\n os.read(r, PAGE)"
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
    truncated = script(watch, tmp_path, body.format(" os.ftruncate(source, 0)\n"))
    assert truncated.counts == {("truncated-in-flight", ""): COUNT}
    assert script(watch, tmp_path, body.format("")).counts == {}


def test_payload_that_nobody_will_read_is_told(watch: Watch, tmp_path: Path) -> None:
    left = script(watch, tmp_path, "os.write(w, b'left')\n")
    assert left.counts == {("stranded", ""): 1}
    assert "4 bytes" in left.only("stranded").first["seen"]
    drained = script(watch, tmp_path, "os.write(w, b'left')\nos.read(r, 4)\n")
    assert drained.counts == {}


def test_a_pipe_that_another_process_reads_is_not_stranded(watch: Watch, tmp_path: Path) -> None:
    body = "os.write(w, b'left')\n"
    body += "if os.fork() == 0:\n os.close(w)\n import time; time.sleep(.3); os.read(r, 4)\n"
    assert script(watch, tmp_path, body).counts == {}


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
