# SPDX-License-Identifier: MIT
"""The built-in workloads: what they say they did against what strace saw, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplice.commands import workload
from rsplice.errors import RspliceError
from rsplice.workloads import WORKLOADS, gift, memfd, native, zerocopy
from rsplice.workloads.core import Calls, Crew, Pattern, filesystem_of
from rsplice.workloads.transfer import End, Pipe, by_ring, private_pages, tcp_pair

ROOT = Path(__file__).parent.parent
PROGRAM = """
import argparse, sys
from rsplice.commands import workload
parser = argparse.ArgumentParser()
workload.prepare_parser(parser)
sys.exit(workload.run(parser.parse_args()))
"""
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *args]


def environment(scratch: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}


def run_json(tmp_path: Path, *args: str) -> dict[str, Any]:
    done = subprocess.run(
        command(*args, "--json"), env=environment(tmp_path), capture_output=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def no_ring() -> str | None:
    """Why there is no io_uring here, None if there is."""
    try:
        native.Ring().close()
    except RspliceError as error:
        return str(error)
    return None


def sums(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(operations, bytes) by system call."""
    total: dict[str, tuple[int, int]] = {}
    for call in result["calls"]:
        operations, nbytes = total.get(call["via"], (0, 0))
        total[call["via"]] = (operations + call["operations"], nbytes + call["bytes"])
    return total


def strace_sums(log: str, ours: str) -> dict[str, tuple[int, int]]:
    """The same from strace's lines that match *ours*: calls that returned more than 0."""
    operations: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    unfinished: dict[str, str] = {}
    for line in log.splitlines():
        pid, _, rest = line.partition(" ")
        rest = rest.lstrip()
        if rest.endswith("<unfinished ...>"):
            unfinished[pid] = rest
            continue
        if rest.startswith("<..."):
            rest = unfinished.pop(pid) + rest
        match = re.fullmatch(r"(\w+)\(.* = (\d+)", rest)
        if match and int(match[2]) and re.search(ours, rest):
            operations[match[1]] += 1
            nbytes[match[1]] += int(match[2])
    return {via: (operations[via], nbytes[via]) for via in operations}


@needs_strace
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("relay --mode read-write", {"readv": 1, "writev": 1}),
        ("relay --mode splice", {"splice": 2}),
        ("relay --mode sendfile", {"sendfile": 1}),
        ("relay --mode copy_file_range", {"copy_file_range": 1}),
        ("relay --mode splice --threads 3", {"splice": 2}),
        ("serve --mode sendfile", {"sendfile": 1}),
        ("serve --mode write --threads 2", {"readv": 1, "writev": 1}),
        ("serve --mode splice --threads 2", {"splice": 2}),
        ("serve --mode zerocopy --threads 2", {"readv": 1, "sendto": 1}),
        ("gift --mode gift --size 8192", {"vmsplice": 1}),
        ("gift --mode lend --threads 2", {"vmsplice": 1}),
        ("tee --threads 5", {"splice": 2, "tee": 4, "readv": 5}),
        ("memfd --mode read --threads 2", {"readv": 1, "writev": 1}),
        ("memfd --mode mmap", {"readv": 1}),
    ],
)
def test_own_count_is_what_strace_saw(tmp_path: Path, args: str, expected: dict[str, int]) -> None:
    """*expected*: how many calls a chunk takes, each of which carries all of it."""
    log = tmp_path / "log"
    calls = "readv,writev,splice,sendfile,copy_file_range,recvfrom,sendto,vmsplice,tee"
    strace = ["strace", "-f", "-y", "-qq", "-s0", "-e", f"trace={calls}", "-o", str(log)]
    options = ["--size", "4099", *args.split()[1:], "--count", "23", "--json"]
    done = subprocess.run(
        [*strace, *command(args.split()[0], *options)],
        env=environment(tmp_path),
        capture_output=True,
        check=True,
    )
    said = sums(json.loads(done.stdout))
    files = r"<(/[^>]*(source|destination|page|memfd:rsplice-workload)|TCP|socket|pipe)"
    assert said == strace_sums(log.read_text(), files)
    size = 8192 if "8192" in args else 4099
    for via, number in expected.items():
        assert said[via] == (23 * number, 23 * number * size)
    # The other ends receive what was sent, in pieces of their own.
    assert {nbytes for via, (_, nbytes) in said.items() if via not in expected} <= {23 * size}


def test_modes_name_their_endpoints(tmp_path: Path) -> None:
    filesystem = filesystem_of(tmp_path)
    result = run_json(tmp_path, "relay", "--mode", "splice", "--count", "3", "--size", "1K")
    ends = {(c["source"], c["destination"], c["bytes"]) for c in result["calls"]}
    assert ends == {(filesystem, "pipe", 3072), ("pipe", filesystem, 3072)}
    result = run_json(tmp_path, "serve", "--count", "3", "--size", "1K")
    ends = {(c["source"], c["destination"], c["bytes"]) for c in result["calls"]}
    assert ends == {(filesystem, "tcp", 3072), ("tcp", "user memory", 3072)}


def test_relay_copies_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mode leaves a destination that equals its source."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    kept: list[bytes] = []

    def keep(directory: Path, ignore_errors: bool) -> None:
        kept.extend((directory / f"{name}-0").read_bytes() for name in ("source", "destination"))

    monkeypatch.setattr("shutil.rmtree", keep)
    for mode in WORKLOADS["relay"].modes:
        if mode == "io_uring" and (why := no_ring()):
            pytest.skip(why)
        kept.clear()
        options = dict.fromkeys(("seconds", "threads"), None)
        settings = workload.parse_settings(
            WORKLOADS["relay"], {**options, "mode": mode, "size": "4099", "count": "16"}
        )
        WORKLOADS["relay"].run(settings, lambda _done, _what: None)
        assert kept[0] == kept[1]
        assert len(kept[1]) == 16 * 4099


def test_seconds_end_a_run_without_a_count(tmp_path: Path) -> None:
    result = run_json(tmp_path, "relay", "--mode", "sendfile", "--seconds", "0.2", "--size", "4K")
    assert result["calls"][0]["operations"] > 0
    assert result["seconds"] >= 0.2


def test_mixed_is_worth_looking_at(tmp_path: Path) -> None:
    result = run_json(tmp_path, "mixed", "--seconds", "2")
    vias = {c["via"] for c in result["calls"]}
    assert vias == {
        *("readv", "writev", "splice", "sendfile", "copy_file_range", "sendto", "recvfrom"),
        *("vmsplice", "tee"),
    }
    ends = {c["source"] for c in result["calls"]} | {c["destination"] for c in result["calls"]}
    assert {"pipe", "tcp", "unix", "/dev/null", "user memory"} <= ends
    assert result["pages_touched"] > 0
    received = {c["source"]: c["bytes"] for c in result["calls"] if c["via"] == "recvfrom"}
    sent = {"tcp": 0, "unix": 0}
    for call in result["calls"]:
        if call["destination"] in sent:
            sent[call["destination"]] += call["bytes"]
    assert received == sent
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mixed", "relay", "serve", "gift", "tee", "memfd"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, name: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        command(name, "--seconds", "60"),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    # gift has no files in its directory.
    while not list(tmp_path.glob("rsplice-*" if name == "gift" else "rsplice-*/*")):
        assert time.monotonic() < deadline, "the workload made no scratch files"
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert (out, err) == (b"", b"")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_failing_process_ends_the_workload(tmp_path: Path) -> None:
    crew = Crew(tmp_path)

    def fail(_calls: Calls) -> None:
        os.open("/nonexistent/file", os.O_RDONLY)

    crew.start("sleeper", lambda _calls: time.sleep(60))
    crew.start("failer", fail)
    pids = crew.pids
    assert len(pids) == 2
    with pytest.raises(RspliceError, match="process failer of the workload failed: .*No such file"):
        crew.wait(lambda: None)
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_a_pipe_that_breaks_is_blamed_on_who_broke_it(tmp_path: Path) -> None:
    crew = Crew(tmp_path)

    def fail(_calls: Calls) -> None:
        raise RspliceError("wrong data in a pipe")

    crew.start("reader", fail)
    with (
        pytest.raises(RspliceError, match="process reader of the workload failed: wrong data"),
        crew.blamed(),
    ):
        raise BrokenPipeError
    crew.start("reader", lambda _calls: None)
    with pytest.raises(BrokenPipeError), crew.blamed():
        raise BrokenPipeError


@given(st.integers(0, 1 << 40), st.integers(0, 200_000), st.data())
def test_pattern_finds_every_wrong_byte(offset: int, size: int, data: st.DataObject) -> None:
    pattern = Pattern()
    buffer = memoryview(bytearray(size))
    pattern.fill(buffer, offset)
    pattern.expect(buffer, offset, "a buffer")
    assert b"".join(pattern.pieces(offset, size)) == buffer
    if size:
        where = data.draw(st.integers(0, size - 1))
        buffer[where] ^= 1
        with pytest.raises(RspliceError, match="wrong data in a buffer, near byte"):
            pattern.expect(buffer, offset, "a buffer")


def test_pattern_has_no_two_pages_alike() -> None:
    pattern = Pattern()
    pages = {b"".join(pattern.pieces(i * 4096, 4096)) for i in range(4096)}
    assert len(pages) == 4096


def arguments(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    workload.prepare_parser(parser)
    return parser.parse_args([*args, "--json"])


def test_a_lent_buffer_that_is_written_too_early_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reader's check, seen to fail: one buffer is used over and over."""

    def always_one(_pipe: Pipe, size: int) -> Iterator[AbstractContextManager[memoryview]]:
        pages = memoryview(private_pages(size))
        while True:
            yield nullcontext(pages)

    monkeypatch.setattr(gift, "_reused", always_one)
    with pytest.raises(RspliceError, match="wrong data in what was read from the pipe"):
        workload.run(arguments("gift", "--mode", "lend", "--count", "211", "--size", "4099"))


def test_a_buffer_that_the_kernel_still_sends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's check, seen to fail: nobody waits for notifications."""
    monkeypatch.setattr(zerocopy, "BUFFERS", 1)
    monkeypatch.setattr(zerocopy.Sender, "buffer", lambda self: self._buffers[0])
    with pytest.raises(RspliceError, match="wrong data in what a client received"):
        workload.run(arguments("serve", "--mode", "zerocopy", "--count", "211"))


def test_a_page_that_is_wrong_in_a_memfd_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(memfd, "_by_mmap", nothing)
    with pytest.raises(RspliceError, match="wrong data in a memfd, near byte 0"):
        workload.run(arguments("memfd", "--mode", "mmap", "--count", "1"))


def test_a_wrong_byte_behind_tee_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody waits for the reader that gave up."""
    read = Pipe.read

    def wrong(self: Pipe, calls: Calls, buffer: memoryview) -> int:
        got = read(self, calls, buffer)
        buffer[got - 1] ^= 1
        return got

    monkeypatch.setattr(Pipe, "read", wrong)
    with pytest.raises(RspliceError, match="wrong data in what was read from a pipe"):
        workload.run(arguments("tee", "--count", "23"))


class Notified(socket.socket):
    """A connection whose error queue says what a test wants."""

    news: list[tuple[int, int, int]]  #: code, first and last send

    def recvmsg(self, *_: int) -> Any:
        code, first, last = self.news.pop(0)
        data = struct.pack("=IBBBBII", 0, 5, 0, code, 0, first, last)
        return b"", [(0, 11, data)], 0, None


def test_notifications_out_of_order_and_past_the_last_number() -> None:
    near, far = tcp_pair()
    calls = Calls()
    connection = Notified(fileno=near.detach())
    with connection, far:
        sender = zerocopy.Sender(calls, connection, 4096)
        sender._sends = (1 << 32) - 2
        # Readable at once: what it says is not the kernel's, but the test's.
        sender._poll.register(connection, select.POLLOUT)
        buffers = [sender.buffer() for _ in range(4)]
        for buffer in buffers:
            sender.send(buffer, 100)
        assert len(sender._free) == zerocopy.BUFFERS - 4
        connection.news = [(0, 1, 1), (1, (1 << 32) - 2, 0)]
        sender._await_notification()
        assert sender._free[-1] is buffers[3]
        sender.finish()
        assert len(sender._free) == zerocopy.BUFFERS
    assert calls.reported == {"notified": 4, "notified_copied": 3, "notified_copied_bytes": 300}


def test_memfd_by_rsplice_says_what_became_of_each_byte(tmp_path: Path) -> None:
    result = run_json(tmp_path, "memfd", "--count", "3", "--size", "64K")
    assert sum(result["reported"].values()) == 3 * 65536
    assert sums(result) == {"rsplice": (3, 3 * 65536)}


def test_what_the_c_part_is_missing_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rsplice._native", None)
    native._native.cache_clear()
    for args in (["gift"], ["tee"], ["memfd"], ["relay", "--mode", "io_uring"]):
        with pytest.raises(RspliceError, match="the C part of rsplice is not built") as caught:
            workload.run(arguments(*args))
        assert "\n" not in str(caught.value)
    assert workload.run(arguments("relay", "--count", "3")) == 0
    native._native.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"), [(38, "without liburing"), (1, "forbidden"), (12, "Cannot allocate")]
)
def test_no_io_uring_is_one_line(monkeypatch: pytest.MonkeyPatch, error: int, reason: str) -> None:
    class Library:
        @staticmethod
        def calls_ring_create(_ret: object) -> int:
            return -error

    real = native._native()
    monkeypatch.setattr(native, "_native", lambda: SimpleNamespace(ffi=real.ffi, lib=Library))
    with pytest.raises(RspliceError, match=f"^no io_uring: .*{reason}"):
        workload.run(arguments("relay", "--mode", "io_uring", "--count", "3"))


def test_a_ring_writes_what_was_read_short(tmp_path: Path) -> None:
    """At the end of the source less is read than asked for, and the linked write is cancelled."""
    if why := no_ring():
        pytest.skip(why)
    text = os.urandom(4099)
    (tmp_path / "source").write_bytes(text)
    ring = native.Ring()
    calls = Calls()
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "copy", "wb") as copy:
        buffer = memoryview(bytearray(8192))
        assert ring.relay(source.fileno(), copy.fileno(), buffer, 0) == (4099, 0)
        ends = End(source.fileno(), "file"), End(copy.fileno(), "file")
        with pytest.raises(RspliceError, match="io_uring read carried nothing"):
            by_ring(calls, ring, *ends, buffer, 0)
    ring.close()
    assert (tmp_path / "copy").read_bytes() == text
    assert {via: n for (via, _, _), n in calls.counts.items()} == {
        "io_uring read": [1, 4099],
        "io_uring write": [1, 4099],
    }


def test_a_failed_operation_of_a_ring_has_its_errno(tmp_path: Path) -> None:
    if why := no_ring():
        pytest.skip(why)
    ring = native.Ring()
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError, match="Bad file descr"):
        ring.relay(file.fileno(), file.fileno(), memoryview(bytearray(10)), 0)
    ring.close()


def test_calls_that_carry_nothing_are_not_counted() -> None:
    calls = Calls()
    assert calls.add("splice", "pipe", "tcp", 0) == 0
    calls.add("splice", "pipe", "tcp", 7)
    calls.add("splice", "pipe", "tcp", 11)
    calls.reported["notified"] += 3
    other = Calls.from_json(calls.to_json())
    other.merge(calls)
    assert other.counts == {("splice", "pipe", "tcp"): [4, 36]}
    assert other.reported == {"notified": 6}
    assert calls.counts == {("splice", "pipe", "tcp"): [2, 18]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch"], f"no workload is called 'nosuch'; there are: {', '.join(WORKLOADS)}"),
        (["relay", "--mode", "x"], "relay has no mode 'x'"),
        (["mixed", "--mode", "x"], "mixed has no mode 'x'; its modes: none"),
        (["mixed", "--threads", "2"], "mixed has no --threads"),
        (["mixed", "--size", "17M"], "--size of mixed is at most"),
        (["gift", "--size", "17M"], "--size of gift is at most"),
        (["gift", "--size", "4099"], "--size 4099: only whole pages can be given"),
        (["memfd", "--mode", "x"], "memfd has no mode 'x'; its modes: read, mmap, rsplice"),
        (["relay", "--size", "0"], "--size '0' is not a size"),
        (["relay", "--size", "2G"], "--size '2G' is not a size"),
        (["relay", "--size", "64Q"], "--size '64Q' is not a size"),
        (["relay", "--count", "-1"], "--count '-1' is not a whole number"),
        (["relay", "--count", "٣"], "--count '٣' is not a whole number"),
        (["relay", "--threads", "65"], "--threads '65' is not a whole number from 1 to 64"),
        (["relay", "--seconds", "nan"], "--seconds 'nan' is not a positive number"),
        (["relay", "--seconds", "0"], "--seconds '0' is not a positive number"),
    ],
)
def test_bad_options_are_one_line(args: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    workload.prepare_parser(parser)
    with pytest.raises(RspliceError, match=re.escape(message)) as caught:
        workload.run(parser.parse_args(args))
    assert "\n" not in str(caught.value)


def test_sizes() -> None:
    options = dict.fromkeys(("mode", "count", "seconds", "threads"), None)
    for text, size in [("4096", 4096), ("64K", 65536), ("64KiB", 65536), ("1 MiB", 1 << 20)]:
        settings = workload.parse_settings(WORKLOADS["relay"], {**options, "size": text})
        assert settings.size == size


def test_list_names_every_workload_and_mode(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    workload.prepare_parser(parser)
    assert workload.run(parser.parse_args([])) == 0
    out = capsys.readouterr().out
    for each in WORKLOADS.values():
        assert each.name in out
        assert all(mode in out for mode in each.modes)
    assert workload.run(parser.parse_args(["--json"])) == 0
    assert [w["name"] for w in json.loads(capsys.readouterr().out)] == list(WORKLOADS)


def test_unwritable_scratch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prefix: str) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    parser = argparse.ArgumentParser()
    workload.prepare_parser(parser)
    with pytest.raises(RspliceError, match="no scratch directory: .*set TMPDIR"):
        workload.run(parser.parse_args(["relay"]))
