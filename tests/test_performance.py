# SPDX-License-Identifier: MIT
"""The performance benchmark: its arithmetic on fixed readings, and its driver on a small file."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import memory_state, performance, performance_report
from benchmarks.performance import Readings, add, children, processor_seconds
from benchmarks.tracers import Unavailable
from tests.support.run import process

MACHINE = {"processor": "A", "processors": 2, "memory_gib": 4, "kernel": "6.18", "load": 0.1}


def result(rsplice_cpu: float = 0.1, rsplice_speed: float = 900.0) -> dict[str, Any]:
    readings: dict[str, Readings] = {"fuse": {}, "remote": {}, "memory": {}, "calls": {}}
    for mode, speed, cpu in (
        ("copy", 400.0, 1.0),
        ("direct", 800.0, 0.4),
        ("splice", 600.0, 0.8),
        ("rsplice", 500.0, 0.9),
        ("rsplice-ahead", rsplice_speed, rsplice_cpu),
    ):
        for state in performance.STATES:
            add(readings["fuse"], f"{mode} {state}", mib_per_s=speed, cpu_s_per_gib=cpu)
    add(readings["fuse"], "dd", mib_per_s=1000.0)
    add(readings["remote"], "copy", cpu_s_per_gib=1.0)
    add(readings["remote"], "rsplice", cpu_s_per_gib=0.5)
    add(readings["memory"], "memcpy", mib_per_s=5000.0)
    add(readings["calls"], "calls", us_per_call=2.0)
    add(readings["calls"], "python", us_per_call=2.75)
    return {
        "machine": MACHINE,
        "size": 1 << 30,
        "rounds": 1,
        "missing": {"passthrough": "needs root"},
        **{part: performance._summaries(found) for part, found in readings.items()},
    }


def test_targets_compare_medians_of_the_cold_rows() -> None:
    read = [target.reading for target in performance_report.targets(result())]
    assert read == pytest.approx([0.1, 0.25, 1.5, 0.5, 0.75])
    assert all(target.met for target in performance_report.targets(result()))


def test_a_missed_target_says_so() -> None:
    missed = [t for t in performance_report.targets(result(0.3, 700.0)) if not t.met]
    assert [t.what.split(",")[0] for t in missed] == ["server CPU", "server CPU", "throughput"]
    text = performance_report.markdown(result(0.3, 700.0))
    assert text.count("MISSED") == 3


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    without = result()
    del without["fuse"]["rsplice-ahead cold"]
    del without["fuse"]["rsplice-ahead warm"]
    assert [t.met for t in performance_report.targets(without)] == [None, None, None, True, True]
    text = performance_report.markdown(without)
    assert "rsplice, RSPLICE_F_READAHEAD |" not in text
    assert "rsplice, each whole page moved |" in text
    assert "- passthrough: needs root" in text


def test_the_terminal_shows_medians_within_80_columns() -> None:
    out = io.StringIO()
    performance_report.show(Console(file=out, width=80), result())
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert "900" in shown and "needs root" in shown


def test_processor_seconds_are_those_of_a_process_and_its_threads() -> None:
    with process(["sh", "-c", "while :; do :; done"]) as busy:
        while processor_seconds(busy.pid) < 0.05:
            pass
    with process(["sleep", "100"]) as idle:
        assert processor_seconds(idle.pid) < 0.05
        assert idle.pid in children(os.getpid())


def test_memory_that_the_host_has_taken_back_has_its_own_rows_and_targets() -> None:
    both = result()
    for way, cpu in (("copy", 2.5), ("splice", 2.0), ("rsplice-ahead", 0.25)):
        readings: Readings = {}
        add(readings, f"{way} taken back", mib_per_s=1000.0 - 100.0 * cpu, cpu_s_per_gib=cpu)
        both["fuse"] |= performance._summaries(readings)
    found = {t.what: t.reading for t in performance_report.targets(both)}
    assert found["server CPU, of copying's, memory taken back"] == pytest.approx(0.1)
    assert found["server CPU, of O_DIRECT copying's, memory taken back"] is None
    assert found["throughput, of page-cache splice's, memory taken back"] == pytest.approx(
        975 / 800
    )
    assert found["server CPU, of copying's"] == pytest.approx(0.1)
    text = performance_report.markdown(both)
    assert "## The same, cold, where the host has taken free memory back" in text
    assert "| copy: pread, writev | 750 (750 to 750) | 2.500 (2.500 to 2.500) |" in text


def test_memory_is_at_rest_once_little_more_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "reported_kib"
    monkeypatch.setattr(memory_state, "REPORTED", counter)
    monkeypatch.setattr(memory_state, "POLL_S", 0.0)
    with pytest.raises(Unavailable, match="does not tell"):
        memory_state.wait_until_taken_back()
    numbers = iter([0, 1 << 20, 2 << 20, (2 << 20) + 5, 9])
    monkeypatch.setattr(memory_state, "_reported", lambda: next(numbers))
    memory_state.wait_until_taken_back()
    assert next(numbers) == 9, "it looked again, or did not look as often"
    monkeypatch.setattr(memory_state, "_reported", lambda: 0)
    with pytest.raises(Unavailable, match="other work"):
        memory_state.wait_until_taken_back(patience=-1.0)


def test_memory_is_touched_and_given_back() -> None:
    before = len(children(os.getpid()))
    memory_state.take_into_use(1 << 24)
    assert len(children(os.getpid())) == before


@pytest.fixture(scope="module")
def fill(tmp_path_factory: pytest.TempPathFactory, needs: Callable[..., None]) -> Path:
    needs("make", "cc")
    return performance.build_fill(tmp_path_factory.mktemp("fill"))


def test_the_driver_fills_and_says_how_much(fill: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    performance.make_file(file, performance.FILL_SIZE)
    ways = ["read-write", "rsplice", "pieces-batch", "pieces-single", "calls", "memcpy"]
    done = subprocess.run([fill, file, *ways], capture_output=True, text=True)
    if done.returncode and "rsplice" in done.stderr:
        pytest.skip(f"no O_DIRECT where the tests' files lie: {done.stderr.strip()}")
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["what"] for each in said] == ways
    assert [each["bytes"] for each in said[:3]] == [performance.FILL_SIZE] * 2 + [2000 * 4096]
    assert all(each["seconds"] > 0 for each in said)


def test_a_way_that_there_is_not_is_refused(fill: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    performance.make_file(file, 1 << 20)
    with pytest.raises(Unavailable, match="nonsense"):
        performance.fill_memory(fill, file, "nonsense", {})
