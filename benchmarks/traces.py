# SPDX-License-Identifier: MIT
"""What rsplice.trace() and the pytest plugin cost.

    python -m benchmarks.traces

Prints medians of rounds, with the least and the greatest. With and without the plugin run in turn,
and are compared by processor time, which other load on the machine disturbs less than the clock.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import rsplice
from benchmarks import suite
from rsplice import tracing

ROUNDS = 7
TESTS = 500

EMPTY = f"""
import pytest
@pytest.mark.parametrize("number", range({TESTS}))
def test_unmarked(number):
    pass
@pytest.mark.max_copied(0)
@pytest.mark.parametrize("number", range({TESTS}))
def test_marked(number):
    pass
"""


def spread(values: Sequence[float], unit: str) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f}) {unit}"


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def trace_once() -> None:
    with rsplice.trace():
        pass


def run_pytest(folder: Path, *options: str) -> float:
    """Processor seconds of a run of pytest in *folder*, its start included."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def traces() -> None:
    print(f"load the probes: {seconds(trace_once):.2f} s")
    print("a trace:", spread([1e3 * seconds(trace_once) for _ in range(50)], "ms"))
    with tracing.held():
        trace_once()
        held = [1e3 * seconds(trace_once) for _ in range(200)]
    print("a trace, probes held:", spread(held, "ms"))
    tracing.close()


def empty_tests(folder: Path) -> None:
    (folder / "test_empty.py").write_text(EMPTY)
    rows: dict[str, list[float]] = {"unmarked": [], "marked": []}
    without, load = [], []
    for _ in range(ROUNDS):
        without.append(run_pytest(folder, "-k", "unmarked", "-p", "no:rsplice"))
        load.append(run_pytest(folder, "-k", "test_marked[0]") - without[-1])
        for name in rows:
            taken = run_pytest(folder, "-k", f"test_{name}") - without[-1]
            rows[name].append(1e3 * (taken - (load[-1] if name == "marked" else 0)) / TESTS)
    print("the first marked test:", spread(load, "s more"))
    for name, values in rows.items():
        print(f"an empty test, {name}:", spread(values, "ms more"))


def real_suite(folder: Path) -> None:
    try:
        source = suite.fetch(folder)
    except OSError as error:
        print(f"a real suite: not measured: {error}")
        return
    without, more = [], []
    for _ in range(ROUNDS):
        without.append(run_pytest(source, "-p", "no:rsplice", "tests"))
        more.append(100 * (run_pytest(source, "tests") / without[-1] - 1))
    print(f"the tests of {suite.NAME} {suite.VERSION}:", spread(without, "s"))
    print("    with the plugin:", spread(more, "% longer"))


def main() -> None:
    print("load average:", *os.getloadavg()[:1])
    traces()
    with tempfile.TemporaryDirectory() as name:
        empty_tests(Path(name))
        real_suite(Path(name))


if __name__ == "__main__":
    main()
