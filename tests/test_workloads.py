# SPDX-License-Identifier: MIT
"""The built-in workloads: what they say they did against what strace saw, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rsplice.commands import workload
from rsplice.errors import RspliceError
from rsplice.workloads import WORKLOADS
from rsplice.workloads.core import Calls, Crew, filesystem_of

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
        (("relay", "--mode", "read-write"), {"readv": 23, "writev": 23}),
        (("relay", "--mode", "splice"), {"splice": 46}),
        (("relay", "--mode", "sendfile"), {"sendfile": 23}),
        (("relay", "--mode", "copy_file_range"), {"copy_file_range": 23}),
        (("relay", "--mode", "splice", "--threads", "3"), {"splice": 46}),
        (("serve", "--mode", "sendfile"), {"sendfile": 23}),
        (("serve", "--mode", "write", "--threads", "2"), {"readv": 23, "writev": 23}),
    ],
)
def test_own_count_is_what_strace_saw(
    tmp_path: Path, args: tuple[str, ...], expected: dict[str, int]
) -> None:
    log = tmp_path / "log"
    calls = "readv,writev,splice,sendfile,copy_file_range,recvfrom"
    strace = ["strace", "-f", "-y", "-qq", "-s0", "-e", f"trace={calls}", "-o", str(log)]
    done = subprocess.run(
        [*strace, *command(*args, "--size", "4099", "--count", "23", "--json")],
        env=environment(tmp_path),
        capture_output=True,
        check=True,
    )
    said = sums(json.loads(done.stdout))
    seen = strace_sums(log.read_text(), r"<(/[^>]*(source|destination|page)|TCP|socket)")
    assert said == seen
    for via, number in expected.items():
        assert said[via][0] == number
    carried = {via: nbytes for via, (_, nbytes) in said.items()}
    assert set(carried.values()) == {23 * 4099 * (2 if "splice" in carried else 1)}


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
        *("readv", "writev", "splice", "sendfile", "copy_file_range", "sendto", "recvfrom")
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


@pytest.mark.parametrize("name", ["mixed", "relay", "serve"])
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
    while not list(tmp_path.glob("rsplice-*/*")):
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
    with pytest.raises(RspliceError, match="process failer of the workload failed: .*No such file"):
        crew.wait(lambda: None)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_calls_that_carry_nothing_are_not_counted() -> None:
    calls = Calls()
    assert calls.add("splice", "pipe", "tcp", 0) == 0
    calls.add("splice", "pipe", "tcp", 7)
    calls.add("splice", "pipe", "tcp", 11)
    other = Calls.from_json(calls.to_json())
    other.merge(calls)
    assert other.counts == {("splice", "pipe", "tcp"): [4, 36]}
    assert calls.counts == {("splice", "pipe", "tcp"): [2, 18]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch"], "no workload is called 'nosuch'; there are: mixed, relay, serve"),
        (["relay", "--mode", "x"], "relay has no mode 'x'"),
        (["mixed", "--mode", "x"], "mixed has no mode 'x'; its modes: none"),
        (["mixed", "--threads", "2"], "mixed has no --threads"),
        (["mixed", "--size", "17M"], "--size of mixed is at most"),
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
