# SPDX-License-Identifier: MIT
"""Findings on the running kernel: each is provoked a known number of times, and has a twin.

What provokes one does nothing else that is found, so that a process has one finding or, where a
page was refused for being at risk too, two.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsplice.recording import Recording
from tests.support.run import RSPLICE, Driver, audit, own_count
from tests.support.watch import COUNT, Seen, Watch

pytestmark = pytest.mark.privileged

PAGES = 64  # two READs, from 7.3 on one
STEAL, REPLY = "steal-refused", "pipe -> fuse device via fuse reply"
#: Of each READ the first page, and all others.
ODD = {(STEAL, "payload at an odd offset"): 1, (STEAL, "payload not aligned to buffers"): PAGES - 1}

#: Mode of the FUSE server -> what is found: (name, reason) -> how often.
MODES: dict[str, dict[tuple[str, str], int]] = {
    "splice-mapped": {(STEAL, "still mapped"): PAGES},
    "direct-io": {(STEAL, "direct_io"): PAGES},
    "teed": {(STEAL, "extra reference"): PAGES},
    "memfd": {(STEAL, "swap-backed"): PAGES},
    "gift": {(STEAL, "still mapped"): PAGES, ("gift-still-mapped", ""): PAGES},
    "gift-unmapped": {(STEAL, "swap-backed"): PAGES},
    "vmspliced": {(STEAL, "not a gift"): PAGES, ("changed-in-flight", "could change"): PAGES},
    "halves": {(STEAL, "partial page"): PAGES},
    "odd": ODD,
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
    assert watch.lost == []
    yield watch
    watch.tracer.close()


def serve(
    watch: Watch, driver: Driver, directory: Path, mode: str, tail: int = 0, *more: object
) -> Seen:
    server = driver.program.with_name("fuse_server")
    return watch.run(server, mode, "-n", PAGES, "-t", tail, "-d", directory, *more)


def found_in(mode: str, report: Path) -> dict[tuple[str, str], int]:
    """What is found in a server of that *mode*, by its own count of replies."""
    if MODES[mode] is not ODD:
        return MODES[mode]
    first, others = ODD
    reads, _ = own_count(report)["fuse reply", "pipe", "fuse device"]
    return {first: reads, others: PAGES - reads}


@pytest.mark.parametrize("mode", MODES)
def test_each_page_that_was_refused_is_told_with_the_reason(
    mode: str, watch: Watch, driver: Driver, ext4: Path, tmp_path: Path
) -> None:
    seen = serve(watch, driver, ext4, mode, 0, "-o", tmp_path / "own.json")
    assert seen.counts == found_in(mode, tmp_path / "own.json")
    # What the comparison of pages says, or the count of copies: other programs of the tracer's.
    copied = sum(
        max(t.identity.get((0, "copied"), 0), t.measured.get((0, "copied"), 0))
        for t in seen.replies
    )
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
    assert result.counts == {("changed-in-flight", "could change"): COUNT}
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


def test_a_bad_buffer_behind_sound_ones_is_told_where_it_is_taken(
    watch: Watch, tmp_path: Path
) -> None:
    """40 sound buffers, then 7 whose pages have left the file, of which a read takes the first."""
    body = "import fcntl\nfor i in range(COUNT):\n"
    body += " r, w = os.pipe()\n fcntl.fcntl(w, 1031, 64 * PAGE)\n os.ftruncate(source, 0)\n"
    body += " for page in range(47):\n  os.pwrite(source, b'x' * PAGE, page * PAGE)\n"
    body += " assert os.splice(source, w, 47 * PAGE, offset_src=0) == 47 * PAGE\n"
    body += " os.ftruncate(source, {} * PAGE)\n assert len(os.read(r, 41 * PAGE)) == 41 * PAGE\n"
    bad = watch.script(tmp_path, body.format(40))
    assert bad.counts == {("truncated-in-flight", ""): COUNT, ("stranded", ""): COUNT}
    sound = watch.script(tmp_path, body.format(41))
    assert sound.counts == {("stranded", ""): COUNT}


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
    assert "no findings looked for" in " ".join(result.stderr.split())


# --- io_uring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("take", ["read", "readv", "splice"])
@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("vmspliced", ("changed-in-flight", "could change")),
        ("gift", ("gift-still-mapped", "")),
        ("truncated", ("truncated-in-flight", "")),
        ("unmapped", None),
        ("write", None),
        ("kept", None),
        ("ring-kept", None),
    ],
)
def test_requests_of_a_ring_take_pages_too(
    mode: str,
    found: tuple[str, str] | None,
    take: str,
    watch: Watch,
    driver: Driver,
    tmp_path: Path,
) -> None:
    program = driver.program.with_name("ring_pipe")
    seen = watch.run(program, take, mode, COUNT, tmp_path / "file")
    assert seen.counts == ({found: COUNT} if found else {})
    if found:
        operation = seen.only(found[0]).first["operation"]
        assert operation.startswith("pipe -> ") and f" via io_uring {take}" in operation


# --- contents of pages (--integrity) --------------------------------------------------------------


@pytest.fixture(scope="module", params=[None, False], ids=["direct loads", "probe reads"])
def contents(request: pytest.FixtureRequest) -> Iterator[Watch]:
    watch = Watch(request.param, integrity=True)
    assert watch.lost == []
    yield watch
    watch.tracer.close()


COULD, DID = ("changed-in-flight", "could change"), ("changed-in-flight", "did change")
WRITTEN = ("gift-still-mapped", "written later")

#: What queues a page of memory, shared so that a write reaches the pipe; "{}" are flags.
VMSPLICED = (
    "memory = mmap.mmap(-1, PAGE)\n"
    "for i in range(COUNT):\n memory[:] = b'a' * PAGE\n vmsplice(memory, {})\n"
)
#: What queues a page of a file.
SPLICED = "for i in range(COUNT):\n os.splice(source, w, PAGE, offset_src=i * PAGE)\n"


@pytest.mark.parametrize(
    "take",
    ["os.read(r, PAGE)", "os.readv(r, [bytearray(PAGE)])", "os.splice(r, null, PAGE)"],
    ids=["read", "readv", "splice"],
)
def test_memory_that_is_written_before_it_is_read_did_change(
    contents: Watch, tmp_path: Path, take: str
) -> None:
    """One byte, at another place each time; as often, after it was read, which is legal."""
    body = VMSPLICED.format(0) + " {}\n " + take + "\n {}\n"
    write = "memory[i * 178] = 7"
    changed = contents.script(tmp_path, body.format(write, "pass"))
    assert changed.counts == {DID: COUNT}
    first = changed.only("changed-in-flight").first
    assert first["expected"] == "a queued page does not change until it is read"
    assert "other content than was queued" in first["seen"]
    assert contents.script(tmp_path, body.format("pass", write)).counts == {COULD: COUNT}


def test_a_gift_that_is_written_to_is_told(contents: Watch, tmp_path: Path) -> None:
    body = VMSPLICED.format(8) + " {}\n os.read(r, PAGE)\n"
    assert contents.script(tmp_path, body.format("memory[9] = 7")).counts == {WRITTEN: COUNT}
    kept = contents.script(tmp_path, body.format("pass"))
    assert kept.counts == {("gift-still-mapped", ""): COUNT}


def test_a_file_that_is_written_before_its_pages_are_read_did_change(
    contents: Watch, tmp_path: Path
) -> None:
    body = SPLICED + " {}\n os.splice(r, output, PAGE)\n {}\n"
    write = "os.pwrite(source, b'x', i * PAGE + i * 178)"
    changed = contents.script(tmp_path, body.format(write, "pass"))
    assert changed.counts == {DID: COUNT}
    first = changed.only("changed-in-flight").first
    assert Path(first["file"]).name == "source" and first["page_frame"] > 0
    assert contents.script(tmp_path, body.format("pass", write)).counts == {}


def test_what_was_queued_of_a_page_is_compared_and_nothing_around_it(
    contents: Watch, tmp_path: Path
) -> None:
    """100 bytes at an odd place: those in front and behind may change."""
    body = (
        "for i in range(COUNT):\n"
        " at = i * PAGE + 501 + i\n os.splice(source, w, 100, offset_src=at)\n"
        " os.pwrite(source, b'x', at {})\n os.pwrite(source, b'y', at {})\n"
        " os.read(r, PAGE)\n"
    )
    assert contents.script(tmp_path, body.format("- 1", "+ 100")).counts == {}
    inside = contents.script(tmp_path, body.format("- 1", "+ 99"))
    assert inside.counts == {DID: COUNT}


def test_the_rest_of_a_page_is_compared_when_some_of_it_was_read(
    contents: Watch, tmp_path: Path
) -> None:
    """What has been read may change, what has not must not; each page is told once."""
    body = SPLICED + " os.read(r, 1000)\n {}\n os.read(r, 1000)\n os.read(r, PAGE)\n"
    read = "os.pwrite(source, b'x', i * PAGE + 999)"
    assert contents.script(tmp_path, body.format(read)).counts == {}
    rest = "os.pwrite(source, b'x', i * PAGE + 2000)"
    assert contents.script(tmp_path, body.format(rest)).counts == {DID: COUNT}


def test_pages_that_are_teed_and_sent_into_pipes_are_compared(
    contents: Watch, tmp_path: Path
) -> None:
    body = (
        "r2, w2 = os.pipe()\nlibc = ctypes.CDLL(None)\n"
        "for i in range(COUNT):\n os.sendfile(w, source, i * PAGE, PAGE)\n"
        " assert libc.tee(r, w2, PAGE, 0) == PAGE\n os.read(r, PAGE)\n {}\n os.read(r2, PAGE)\n"
    )
    write = "os.pwrite(source, b'x', i * PAGE + 4095)"
    assert contents.script(tmp_path, body.format(write)).counts == {DID: COUNT}
    assert contents.script(tmp_path, body.format("pass")).counts == {}


def test_all_pages_of_a_large_pipe_are_compared(contents: Watch, tmp_path: Path) -> None:
    """256 slots: more than one program looks at. Every third page changes."""
    body = (
        "import fcntl\nfcntl.fcntl(w, 1031, 256 * PAGE)\n"
        "os.posix_fallocate(source, 0, 256 * PAGE)\n"
        "assert os.splice(source, w, 256 * PAGE, offset_src=0) == 256 * PAGE\n"
        "for i in range({}, 256, 3):\n os.pwrite(source, b'x', i * PAGE)\n"
        "left = 256 * PAGE\n"
        "while left:\n left -= os.splice(r, null, left)\n"
    )
    assert contents.script(tmp_path, body.format(1)).counts == {DID: 85}
    assert contents.script(tmp_path, body.format(256)).counts == {}


def test_a_ring_that_is_replaced_and_pages_queued_again_raise_no_alarm(
    contents: Watch, tmp_path: Path
) -> None:
    """The same page in the same slot over and over, with other content each time."""
    body = (
        "import fcntl\nmemory = mmap.mmap(-1, PAGE)\n"
        "for i in range(COUNT):\n"
        " fcntl.fcntl(w, 1031, (16 + i % 2 * 16) * PAGE)\n"
        " memory[:] = bytes([i]) * PAGE\n vmsplice(memory, 0)\n"
        " fcntl.fcntl(w, 1031, (16 + i % 3 * 16) * PAGE)\n os.read(r, PAGE)\n"
    )
    assert contents.script(tmp_path, body).counts == {COULD: COUNT}


@pytest.mark.parametrize("mode", ["splice", "splice-mapped", "vmspliced", "gift", "teed", "memfd"])
def test_the_pages_of_replies_that_nobody_writes_to_have_not_changed(
    mode: str, contents: Watch, driver: Driver, ext4: Path
) -> None:
    assert serve(contents, driver, ext4, mode).counts == MODES[mode]


@pytest.mark.parametrize("mode", ["splice", "splice-copy", "write", "direct-io"])
def test_the_kernel_clears_what_lies_behind_a_short_reply(
    mode: str, contents: Watch, driver: Driver, ext4: Path
) -> None:
    seen = serve(contents, driver, ext4, mode, tail=101)
    assert "stale-content-exposed" not in {name for name, _ in seen.counts}


@pytest.mark.parametrize("take", ["read", "readv", "splice"])
@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("changed", DID),
        ("vmspliced", COULD),
        ("written", DID),
        ("ring-written", DID),
        ("kept", None),
        ("ring-kept", None),
    ],
)
def test_pages_that_a_ring_queues_and_takes_are_compared(
    mode: str,
    found: tuple[str, str] | None,
    take: str,
    contents: Watch,
    driver: Driver,
    tmp_path: Path,
) -> None:
    program = driver.program.with_name("ring_pipe")
    seen = contents.run(program, take, mode, COUNT, tmp_path / "file")
    assert seen.counts == ({found: COUNT} if found else {})


def test_without_integrity_no_content_is_looked_at(watch: Watch, tmp_path: Path) -> None:
    body = SPLICED + " os.pwrite(source, b'x', i * PAGE)\n os.splice(r, output, PAGE)\n"
    assert watch.script(tmp_path, body).counts == {}


def test_an_audit_and_a_recording_tell_what_did_change(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"f" * 4096)
    program = (
        f"import os\nf = os.open({str(file)!r}, os.O_RDWR)\nr, w = os.pipe()\n"
        "os.splice(f, w, 4096, offset_src=0)\nos.pwrite(f, os.urandom(8), 9)\nos.read(r, 4096)\n"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    result = audit(command, "--integrity", "--fail-on", "violation")
    assert result.status == 0  # a hazard
    (found,) = result.json["findings"]
    assert (found["name"], found["first"]["reason"]) == DID
    recording = tmp_path / "run.jsonl"
    options = ["record", "--integrity", "-o", str(recording), "--"]
    subprocess.run([*RSPLICE, *options, *command], check=True, capture_output=True)
    (again,) = Recording(str(recording)).final.findings
    assert (again.name, again.first["reason"]) == DID


def test_integrity_takes_every_page(tmp_path: Path) -> None:
    refused = audit(["true"], "--integrity", "--identity", "sample")
    assert refused.status == 125
    assert refused.message == (
        "rsplice: --integrity looks at every page: leave out --identity sample"
    )
