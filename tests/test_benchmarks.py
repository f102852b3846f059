# SPDX-License-Identifier: MIT
"""The benchmark: its arithmetic on fixed readings, and drivers that do what they say."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import calls, footprint, measuring, report, web
from benchmarks.stats import Summary, Target, added_per_call, fewer_per_cent, paired, ratio
from benchmarks.stats import summarize as summary_of
from benchmarks.tracers import ROOT, UNTRACED, Tracer, Unavailable, build, run_loop, tracers

needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")

TITLES = {t.key: t.title for t in tracers(Path("floor"))}


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("loop", tmp_path_factory.mktemp("loop"))


def readings(**by_tracer: float) -> calls.Readings:
    """One reading of every spec by tracer, in ns per pair."""
    return {
        key.replace("_", "-"): {spec.key: [value] for spec in calls.SPECS}
        for key, value in by_tracer.items()
    }


def result(**by_tracer: float) -> dict[str, Any]:
    rates = {"untraced": [1000.0], "floor": [990.0], "audited": [980.0]}
    return {
        "machine": {
            "processor": "A|B",
            "processors": 2,
            "memory_gib": 4,
            "kernel": "6.18",
            "load": 0.25,
        },
        "rounds": 1,
        "calls": calls.compare(readings(**by_tracer)),
        "web": {size: web.compare(rates) for size in web.SIZES},
        "footprint": {
            "memory": {"process_bytes": 90 << 20, "maps_bytes": 5 << 20},
            "start_s": [0.5, 0.75],
            "live_cpu": {"per_cent": 3.0, "calls_per_s": 100_000},
            "missing": {},
        },
        "missing": {},
    }


def met(**by_tracer: float) -> dict[str, bool | None]:
    return {target.what: target.met for target in report.targets(result(**by_tracer))}


def test_summary() -> None:
    assert summary_of([5.0, 1.0, 3.0]) == Summary(3.0, 1.0, 5.0)
    assert summary_of([4.0, 2.0]) == Summary(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no readings"):
        summary_of([])


def test_readings_are_compared_round_by_round() -> None:
    """A round that is slow as a whole changes neither ratio nor what is added."""
    assert paired([100.0, 1000.0, 100.0], [150.0, 1500.0, 150.0], ratio) == Summary(1.5, 1.5, 1.5)
    assert paired([100.0, 900.0], [220.0, 1020.0], added_per_call) == Summary(60, 60, 60)
    assert fewer_per_cent(1000.0, 970.0) == pytest.approx(3.0)
    assert fewer_per_cent(1000.0, 1010.0) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0], ratio)


def test_comparison_of_readings() -> None:
    row = calls.compare(readings(untraced=1000.0, off=1100.0))["off"]["copy-4K"]
    assert row["ns_per_pair"]["median"] == 1100.0
    assert row["ratio"]["median"] == 1.1
    assert row["added_ns_per_call"]["median"] == 50.0


@pytest.mark.parametrize(
    ("reading", "at_least", "expected"),
    [(2.0, False, True), (2.1, False, False), (2.0, True, True), (1.9, True, False)],
)
def test_target(reading: float, at_least: bool, expected: bool) -> None:
    assert Target("", 2.0, "", reading, at_least).met is expected
    assert Target("", 2.0, "", None, at_least).met is None


def test_targets_hold_and_are_missed() -> None:
    good = met(
        untraced=1000,
        not_followed=1080,
        off=1110,
        sample=1140,
        all=1400,
        bpftrace=1500,
        strace=40000,
    )
    assert set(good.values()) == {True}
    bad = met(
        untraced=1000,
        not_followed=1100,
        off=1130,
        sample=1160,
        all=1600,
        bpftrace=1100,
        strace=20000,
    )
    assert [what for what, ok in bad.items() if ok] == [
        "nginx requests, worst",
        "memory with BPF maps",
        "dashboard",
        "start to first call, worst",
    ]


def test_what_was_not_measured_meets_nothing() -> None:
    assert met(untraced=1000)["splice 64 KiB, rsplice all"] is None
    empty = {**result(untraced=1000), "calls": {}, "web": {}, "footprint": {"missing": {}}}
    assert {target.met for target in report.targets(empty)} == {None}


def shown(document: dict[str, Any]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    report.show(console, document, TITLES)
    return console.export_text()


def test_table_fits_80_columns_and_names_what_is_missing() -> None:
    document = result(untraced=1000, off=1100, sample=1200, strace=40000)
    document["missing"] = {"perf": "perf: not installed", "all": "exit status 125: [b]no BPF"}
    text = shown(document)
    assert max(map(len, text.splitlines())) <= 80
    assert "getppid" in text
    assert "…" not in text
    assert re.search(r"perf trace -s .*not installed", text)
    assert re.search(r"rsplice, off .*1\.10x \+50", text)
    assert re.search(r"strace -c -f .*40x \+19,500", text)
    assert "not measured: rsplice, all: exit status 125: [b]no BPF" in text


def test_a_busy_machine_is_named() -> None:
    document = result(untraced=1000)
    assert "Other work" not in shown(document)
    document["machine"]["load"] = 2.0
    assert "Other work was running" in shown(document)
    assert "Other work was running" in report.markdown(document, TITLES)


def test_document_has_every_part() -> None:
    text = report.markdown(result(untraced=1000, off=1100), TITLES)
    assert "A|B, 2 processors, 4 GiB of memory, Linux 6.18; load average" in text
    assert "| splice 64 KiB, rsplice all | at most 1.5 x untraced | not measured |  |" in text
    assert "| a counted call, worst | at most 60 ns more | 50.00 | met |" in text
    assert "| 64 KiB | 1,000 (1,000 to 1,000) | 980 (980 to 980) | 2.0 (2.0 to 2.0) |" in text
    assert "| peak memory of rsplice | 90.0 MiB |" in text
    assert "## Not measured" not in text
    assert "Other work" not in text
    text = report.markdown(result(untraced=1000, floor=1090), TITLES)
    assert "adds 45 to 45 ns to a call here" in text
    document = result(untraced=1000)
    document["footprint"]["missing"] = {"live_cpu": "no terminal"}
    assert "## Not measured\n\n- live_cpu: no terminal\n" in report.markdown(document, TITLES)


def test_what_was_measured_elsewhere_stays_in_the_document() -> None:
    own = f"\n{report.KEPT}\n\n## Measuring\n\na table\n"
    assert report.kept(f"# Overhead\n{own}") == own
    assert report.kept("# Overhead\n") == ""
    assert report.KEPT in (ROOT / "docs" / "overhead.md").read_text()


def test_measuring_is_compared_with_not_measuring_round_by_round() -> None:
    untraced = [[1000.0 * (spec + 1) * round_ for spec in range(4)] for round_ in (1, 2, 3)]
    traced = [[ns * 1.5 for ns in round_] for round_ in untraced]
    text = measuring.table(dict(zip(measuring.WAYS, (untraced, traced, untraced), strict=True)))
    assert text.splitlines()[2] == (
        "| splice 4 KiB | 2.0 us | 1.50 (1.50 to 1.50) | 1.00 (1.00 to 1.00) |"
    )
    assert len(text.splitlines()) == 2 + len(measuring.SPECS)


def test_rate_of_wrk() -> None:
    said = "  2 threads\n  100 requests in 2.00s\nRequests/sec:  12345.67\nTransfer/sec: 1GB\n"
    assert web.parse_rate(said) == 12345.67
    for failed in (
        "",
        said + "  Non-2xx or 3xx responses: 3\n",
        said + "  Socket errors: read 1\n",
    ):
        with pytest.raises(Unavailable):
            web.parse_rate(failed)


@needs_strace
def test_loop_makes_the_calls_it_says(loop: Path, tmp_path: Path) -> None:
    """strace -c -f as the independent count; a run of no pairs shows what the start takes."""
    arguments = "splice:4096:17 splice:65536:19 copy:4096:23 getppid:0:29"
    said, seen = loop_under_strace(loop, tmp_path, ["-r", "3", *arguments.split()])
    _, start = loop_under_strace(loop, tmp_path, ["splice:4096:0"])
    expected = {"splice": 2 * 3 * (17 + 19), "pread64": 3 * 23, "pwrite64": 3 * 23}
    expected["getppid"] = 2 * 3 * 29
    assert {call: seen[call] - start.get(call, 0) for call in expected} == expected
    assert said == expected


@needs_strace
def test_loop_with_a_rate_makes_as_many(loop: Path, tmp_path: Path) -> None:
    said, seen = loop_under_strace(loop, tmp_path, ["-R", "20000", "splice:4096:1009"])
    assert said == {"splice": 2018}
    assert seen["splice"] == 2018
    assert seen["clock_nanosleep"] == 1009 // 50


def loop_under_strace(
    loop: Path, directory: Path, arguments: list[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Calls by name as the loop says, and as strace -c -f says."""
    log = directory / "log"
    command = ["strace", "-c", "-f", "-U", "calls,name", "-o", str(log), str(loop), *arguments]
    done = subprocess.run(command, capture_output=True, check=True)
    said: dict[str, int] = {}
    for run in json.loads(done.stdout)["runs"]:
        for call, number in run["calls"].items():
            said[call] = said.get(call, 0) + number
    rows = re.findall(r"^ +(\d+) (\w+)$", log.read_text(), re.MULTILINE)
    return said, {name: int(number) for number, name in rows}


def test_loop_readings(loop: Path) -> None:
    (run,) = run_loop(UNTRACED, loop, ["-r", "5", "splice:4096:11"])
    assert (run["mode"], run["size"], run["pairs"]) == ("splice", 4096, 55)
    assert len(run["ns_per_pair"]) == 5
    assert min(run["ns_per_pair"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: loop"),
        (["-r", "0", "splice:1:1"], "usage: loop"),
        (["splice:4096"], "splice:4096: not MODE:SIZE:PAIRS"),
        (["splice:9999999:1"], "not MODE:SIZE:PAIRS with a SIZE of at most 1048576"),
        (["tee:1:1"], "tee: the modes are splice, copy and getppid"),
        (["-o", "/nonexistent/x", "splice:1:1"], "cannot write the result"),
    ],
)
def test_loop_refuses_in_one_line(loop: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run([loop, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_floor_runs_its_command(tmp_path: Path) -> None:
    done = subprocess.run([build("floor", tmp_path), "sh", "-c", "exit 7"], capture_output=True)
    if b"cannot load a BPF program" in done.stderr:
        pytest.skip("no privilege to load BPF programs")
    assert done.returncode == 7
    assert done.stderr == b""


def test_a_tracer_that_cannot_run_is_a_reason(loop: Path) -> None:
    absent = Tracer("x", "x", ("nonesuch-tracer",), ("nonesuch-tracer",))
    failing = Tracer("y", "y", ("sh", "-c", "echo no luck >&2; exit 3"))
    silent = Tracer("z", "z", ("true",))
    found, missing = calls.measure([absent, failing, silent], loop, 2, lambda _text: None)
    assert found == {}
    assert missing["x"] == "nonesuch-tracer: not installed"
    assert missing["y"] == "exit status 3: no luck"
    assert missing["z"].startswith("the loop left no result")


def test_rounds_are_interleaved_there_and_back(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "arguments", lambda _tracer: ["-r", "2"] + ["copy:512:1"] * 4)
    said: list[str] = []
    env = Tracer("env", "through env", ("env",))
    found, missing = calls.measure([UNTRACED, env], loop, 3, said.append)
    assert [text.rpartition(": ")[2] for text in said] == [
        *("untraced", "through env", "through env", "untraced", "untraced", "through env")
    ]
    assert {len(values) for specs in found.values() for values in specs.values()} == {3}
    assert missing == {}


def test_slow_tracers_make_fewer_pairs() -> None:
    by_key = {t.key: calls.arguments(t) for t in tracers(Path("floor"))}
    assert by_key["strace"][2] == "splice:4096:600"
    assert by_key["all"] == by_key["untraced"]


def test_family_leaves_out_the_audited_command() -> None:
    """A process that forks itself counts, what it runs does not."""
    program = "import os, subprocess\nos.fork()\nsubprocess.run(['cat'])"
    command = (sys.executable, "-c", program)
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin
        while len(descendants(process.pid)) < 3:
            assert process.poll() is None
        family = footprint.family(process.pid, command)
        process.stdin.close()
    assert len(family) == 2
    assert family[0] == process.pid


def descendants(pid: int) -> set[int]:
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True)
    rows = [line.split() for line in listing.stdout.splitlines()]
    found = {pid}
    for _ in range(3):
        found |= {int(row[0]) for row in rows if int(row[1]) in found}
    cats = sum(row[2] == "cat" for row in rows if int(row[0]) in found)
    return found - {pid} if cats == 2 else set()


def test_memory_of_a_process() -> None:
    assert footprint.peak_memory(os.getpid()) > 1 << 20
    assert footprint.peak_memory(0x7FFFFFFF) == 0
    assert footprint.map_memory([os.getpid()]) == 0
