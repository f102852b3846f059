# SPDX-License-Identifier: MIT
"""python -m benchmarks: measures what rsplice costs, in under ten minutes."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import calls, footprint, report, web
from benchmarks.tracers import ROOT, Tracer, Unavailable, build, tracers

SCHEMA = "rsplice.bench/1"
PARTS = ("calls", "web", "footprint")


def machine() -> dict[str, Any]:
    """A plain description of this machine."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model[1] if model else os.uname().machine,
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / (1 << 30)),
        "kernel": os.uname().release,
        "load": os.getloadavg()[0],
    }


def measure(parts: list[str], rounds: int, console: Console) -> tuple[dict[str, Any], list[Tracer]]:
    """Everything that *parts* asks for. Unavailable if the loop does not build."""

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - start:5.0f} s  {text}", highlight=False)

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rsplice-bench-") as name:
        directory = Path(name)
        os.environ["TMPDIR"] = name
        loop = build("loop", directory)
        floor = build("floor", directory)
        compared = tracers(floor)
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": machine(),
            "rounds": rounds,
            "calls": {},
            "web": {},
            "footprint": {"missing": {}},
            "missing": {},
        }
        if "calls" in parts:
            readings, result["missing"] = calls.measure(compared, loop, rounds, say)
            result["calls"] = calls.compare(readings)
        if "web" in parts:
            try:
                result["web"] = web.measure(directory, floor, 2 * rounds, 2, say)
            except Unavailable as reason:
                result["missing"]["nginx"] = str(reason)
        if "footprint" in parts:
            say("rsplice itself")
            result["footprint"] = footprint.measure(loop)
    return result, compared


def main() -> int:
    """0, or 1 with a line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-o", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--write-docs", action="store_true", help="write docs/overhead.md")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each kind (default 7)")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part (may be repeated)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds is at least 1")
    console = Console(stderr=True)
    try:
        if arguments.o:
            # A result that cannot be kept is better known before than after the minutes.
            arguments.o.touch()
        result, compared = measure(arguments.only or list(PARTS), arguments.rounds, console)
        titles = {tracer.key: tracer.title for tracer in compared}
        report.show(Console(), result, titles)
        if arguments.o:
            arguments.o.write_text(json.dumps(result, indent=2) + "\n")
        if arguments.write_docs:
            docs = ROOT / "docs" / "overhead.md"
            docs.write_text(report.markdown(result, titles) + report.kept(docs.read_text()))
    except (OSError, Unavailable) as error:
        console.print(f"benchmarks: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
