# SPDX-License-Identifier: MIT
"""python -m benchmarks.measuring: what it costs a program that its copies are measured.

A loop of splices, and one of reads and writes, untraced, audited without measuring, and audited as
a kernel with fentry or kprobes lets it. It prints a Markdown table. In an emulated guest
(`rsplice kernel run 6.12 -- python -m benchmarks.measuring`) only the ratios mean anything.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.calls import Spec
from benchmarks.report import markdown_table, spread
from benchmarks.stats import paired, ratio, summarize
from benchmarks.tracers import Unavailable, build
from rsplice.errors import RspliceError
from rsplice.launch import Command
from rsplice.tracers import providers
from rsplice.tracers.tracer import Tracer

SPECS = (
    Spec("splice-4K", "splice 4 KiB", "splice", 4096, 2000),
    Spec("splice-64K", "splice 64 KiB", "splice", 65536, 1000),
    Spec("copy-4K", "pread+pwrite 4 KiB", "copy", 4096, 2000),
    Spec("copy-64K", "pread+pwrite 64 KiB", "copy", 65536, 1000),
)
WAYS = {"untraced": None, "audited, not measured": False, "audited, measured": True}
ROUNDS = 5
RUNS = 3  #: of the loop in each launch; the fastest counts


@contextmanager
def tracing(measured: bool | None) -> Iterator[Tracer | None]:
    """Probes as an audit has them; without what measures, or none at all.

    :raises Unavailable: nothing can be measured here
    """
    if measured is None:
        yield None
        return
    offered = providers.running

    def without(*arguments: Any) -> providers.Kernel:
        return replace(offered(*arguments), fexit=False, kprobes=False, module=False)

    with patch.object(providers, "running", offered if measured else without):
        tracer = Tracer()
    try:
        if tracer.measures != measured:
            raise Unavailable("this kernel lets nothing be measured")
        yield tracer
    finally:
        tracer.close()


def time_loop(loop: Path, measured: bool | None) -> list[float]:
    """Nanoseconds per pair of calls, by spec."""
    result = loop.parent / "result.json"
    specs = [f"{spec.mode}:{spec.size}:{spec.pairs}" for spec in SPECS]
    with tracing(measured) as tracer:
        command = Command([str(loop), "-r", str(RUNS), "-o", str(result), *specs])
        if tracer:
            tracer.follow(command.pid)
        command.release()
        if command.wait():
            raise Unavailable(f"the loop ended with {command.status}")
    return [min(run["ns_per_pair"]) for run in json.loads(result.read_text())["runs"]]


def table(readings: dict[str, list[list[float]]]) -> str:
    """Markdown: microseconds untraced, and times that of the others.

    :param readings: way -> a list for each round, of one reading for each spec
    """
    columns = {way: list(zip(*rounds, strict=True)) for way, rounds in readings.items()}
    untraced, *others = columns.values()
    rows = [
        [
            spec.title,
            f"{summarize([ns / 1000 for ns in untraced[number]]).median:.1f} us",
            *(
                spread(paired(list(untraced[number]), list(way[number]), ratio).to_json(), ".2f")
                for way in others
            ),
        ]
        for number, spec in enumerate(SPECS)
    ]
    return markdown_table(["a pair of calls", *readings], rows)


def main() -> int:
    """0; 1 with a line on standard error where it cannot be done."""
    with tempfile.TemporaryDirectory(prefix="rsplice-measuring-") as name:
        os.environ["TMPDIR"] = name
        readings: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        try:
            loop = build("loop", Path(name))
            for number in range(ROUNDS):
                # Every other round backwards: a drift of the machine then favours nobody.
                for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
                    readings[way].append(time_loop(loop, WAYS[way]))
        except (RspliceError, Unavailable) as error:
            print(f"measuring: {error}", file=sys.stderr)
            return 1
    print(f"Linux {os.uname().release}, {ROUNDS} rounds: untraced, and times that\n")
    print(table(readings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
