# SPDX-License-Identifier: MIT
"""Times per call: the loop under each tracer in turn, several rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stats import added_per_call, paired, ratio, summarize
from benchmarks.tracers import UNTRACED, Tracer, Unavailable, run_loop

#: Timed runs of the loop in each launch; the fastest counts, since disturbance only adds.
RUNS = 5


@dataclass(frozen=True)
class Spec:
    """A pair of calls to time."""

    key: str
    title: str
    mode: str
    size: int  #: bytes per call
    pairs: int  #: per run


SPECS = (
    Spec("splice-4K", "splice 4 KiB", "splice", 4096, 60_000),
    Spec("splice-64K", "splice 64 KiB", "splice", 65536, 25_000),
    Spec("copy-4K", "pread+pwrite 4 KiB", "copy", 4096, 25_000),
    Spec("getppid", "getppid", "getppid", 0, 150_000),
)

#: Nanoseconds per pair: tracer -> spec -> one reading a round.
Readings = dict[str, dict[str, list[float]]]


def measure(
    tracers: list[Tracer], loop: Path, rounds: int, say: Callable[[str], None]
) -> tuple[Readings, dict[str, str]]:
    """Readings of every tracer, and for those that cannot be run the reason."""
    readings: Readings = {t.key: {s.key: [] for s in SPECS} for t in tracers}
    missing: dict[str, str] = {}
    for number in range(rounds):
        # Every other round backwards: a drift of the machine then favours nobody.
        for tracer in tracers if number % 2 == 0 else tracers[::-1]:
            if tracer.key in missing:
                continue
            say(f"calls, round {number + 1} of {rounds}: {tracer.title}")
            try:
                runs = run_loop(tracer, loop, arguments(tracer))
            except Unavailable as reason:
                missing[tracer.key] = str(reason)
                del readings[tracer.key]
                continue
            for spec, run in zip(SPECS, runs, strict=True):
                readings[tracer.key][spec.key].append(min(run["ns_per_pair"]))
    return readings, missing


def arguments(tracer: Tracer) -> list[str]:
    """What the loop is told to do under *tracer*."""
    return [
        "-r",
        str(RUNS),
        *(f"{s.mode}:{s.size}:{max(1, s.pairs // tracer.divisor)}" for s in SPECS),
    ]


def compare(readings: Readings) -> dict[str, dict[str, Any]]:
    """Per tracer and spec: nanoseconds per pair, ratio to untraced, nanoseconds added a call."""
    untraced = readings[UNTRACED.key]
    return {
        tracer: {
            spec: {
                "ns_per_pair": summarize(values).to_json(),
                "ratio": paired(untraced[spec], values, ratio).to_json(),
                "added_ns_per_call": paired(untraced[spec], values, added_per_call).to_json(),
            }
            for spec, values in specs.items()
        }
        for tracer, specs in readings.items()
    }
