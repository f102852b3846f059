# SPDX-License-Identifier: MIT
"""Keeps the stream of snapshots that the live dashboard would show, in a file that
``rsplice replay`` plays on any machine, with no privileges.

EXAMPLES
  rsplice record -o run.jsonl -- rsync -a a/ b
  rsplice record -o run.jsonl -p 4711 --duration 60
  rsplice record --journey -o run.jsonl -- ./relay   and the journey of a page of each finding
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

from rsplice.commands import journeys
from rsplice.commands.options import add_targets, open_session, seconds
from rsplice.recording import Recorder
from rsplice.session import Session, passing_signals


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice record``."""
    parser.add_argument(
        "-o",
        dest="file",
        metavar="FILE",
        required=True,
        help="the recording ('-': standard output)",
    )
    parser.add_argument(
        "--duration", metavar="S", type=seconds, help="end after S seconds (CMD: by SIGTERM)"
    )
    parser.add_argument(
        "--interval", metavar="S", type=seconds, default=1.0, help="seconds between two snapshots"
    )
    journeys.prepare_findings_parser(parser)
    add_targets(parser)


def run(args: argparse.Namespace) -> int:
    """Records until the command, the processes or the duration end."""
    journey = journeys.findings_request(args)
    streamed = args.file == "-"
    output = 2 if streamed else None
    with (
        Recorder(args.file, args.command) as recorder,
        open_session(args, output, journey) as session,
    ):
        with passing_signals(session):
            session.start()
            _keep(session, recorder, args)
        session.stop()
        audit = session.snapshot()
        if session.command and audit.exit_status is None:
            audit.exit_status = session.command.end()
        recorder.write(audit, end=True)
    if not streamed:
        print(f"rsplice: {args.file}: {audit.duration_s:.1f} s recorded", file=sys.stderr)
    return audit.exit_status or 0


def _keep(session: Session, recorder: Recorder, args: argparse.Namespace) -> None:
    end = time.monotonic() + (args.duration or float("inf"))
    while session.running:
        left = end - time.monotonic()
        if left <= 0:
            if session.command:
                session.command.send(signal.SIGTERM)
            return
        recorder.write(session.snapshot())
        session.wait(min(args.interval, left))
