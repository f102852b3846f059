# SPDX-License-Identifier: MIT
"""Shows a recording again, with no privileges.

The dashboard plays what `rsplice record` kept, marked RECORDED on every screen; then the report of
the recorded audit is printed. Without a terminal a block of text is printed for each second.

EXAMPLES
  rsplice replay demo.jsonl               play it as it happened
  rsplice replay --speed 10 demo.jsonl    ten seconds in one
  rsplice replay --report demo.jsonl      only the report of its end
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import suppress

from rsplice.recording import Recording


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice replay``."""
    parser.add_argument("file", metavar="FILE", help="a recording made by rsplice record")
    parser.add_argument(
        "--speed",
        type=_speed,
        default=1.0,
        metavar="X",
        help="recorded seconds per second (default: 1)",
    )
    parser.add_argument("--report", action="store_true", help="print only the report of the end")


def run(args: argparse.Namespace) -> int:
    """Plays the recording and prints its last audit."""
    recording = Recording(args.file, speed=args.speed)
    if recording.cut_short:
        print(f"rsplice: the recording is cut short: {recording.cut_short}", file=sys.stderr)
    from rich.console import Console

    from rsplice.dashboards.live import run_live
    from rsplice.dashboards.report import print_report

    if not args.report:
        run_live(recording, Console(), recorded=True)
    print_report(recording.final, sys.stdout, recorded=True)
    return 0


def _speed(text: str) -> float:
    with suppress(ValueError):
        if math.isfinite(speed := float(text)) and speed > 0:
            return speed
    raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
