# SPDX-License-Identifier: MIT
"""Shows copies, and copies avoided, as they happen: of CMD, of running processes, of the machine,
or with no arguments of a built-in workload. Leaving it prints the audit.

Keys: q quit, p pause, s sort, tab view (paths, processes, findings), ? help; among findings
up and down choose, enter opens one, Esc goes back.
What CMD prints is kept out of the picture and shown at the end; its standard input is /dev/null.
Without the privilege for BPF the built-in workload is played from a recording.

EXAMPLES
  rsplice live                     the built-in workload
  rsplice live -- rsync -a a/ b    a command
  rsplice live -p 4711             a running process
  rsplice live --all               the whole machine
  rsplice live --kernel 6.12 -- ./server   on another kernel, in a VM
  rsplice live --journey -- ./relay   and the journey of a page of each finding
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from rsplice.audit import Audit
from rsplice.commands import journeys
from rsplice.commands.options import add_targets, open_session, seconds
from rsplice.errors import EXIT_FAILED, RspliceError
from rsplice.journey import ANY_FINDING, FINDING_PAGES_DEFAULT, Request
from rsplice.session import Session
from rsplice.tracers.capability import reason

DEMO = [sys.executable, "-m", "rsplice", "workload", "mixed"]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice live``."""
    parser.add_argument(
        "--interval", metavar="S", type=seconds, default=1.0, help="seconds between two screens"
    )
    journeys.prepare_findings_parser(parser)
    parser.add_argument(
        "--kernel",
        metavar="VERSION",
        help="run CMD on another kernel, in a VM (see rsplice kernel)",
    )
    add_targets(parser)


def run(args: argparse.Namespace) -> int:
    """Shows the dashboard, then prints what the command printed, and the report."""
    from rich.console import Console

    from rsplice.dashboards.live import run_live
    from rsplice.dashboards.report import print_report

    if args.kernel is not None:
        return _show_guest(args)
    demo = not (args.command or args.pids or args.everything)
    why_not = reason()
    if demo and why_not:
        return _play_recording(why_not)
    if demo:
        args.command = DEMO
    with tempfile.TemporaryFile() as kept:
        if sys.stderr.isatty():
            print("rsplice: attaching probes (the first time takes longest)", file=sys.stderr)
        with _session(args, kept.fileno(), demo) as session:
            if demo:
                session.shown = ["rsplice", "workload", "mixed"]
            session.start()
            run_live(session, Console(), interval=args.interval)
            if session.command and session.command.wait(0) is None:
                session.command.end()
            session.stop()
            last = session.snapshot()
        _show_kept(kept)
    print_report(last, sys.stdout)
    return _status(last, demo)


def _session(args: argparse.Namespace, output: int, demo: bool) -> Session:
    """The session; the demo follows pages of findings even unasked, where that can be."""
    asked = journeys.findings_request(args)
    if demo and asked is None and args.identity == "all":
        with suppress(RspliceError):
            return open_session(args, output, Request(FINDING_PAGES_DEFAULT, finding=ANY_FINDING))
    return open_session(args, output, asked)


def _show_guest(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rsplice.commands.kernel import progress
    from rsplice.dashboards.live import run_live
    from rsplice.dashboards.report import print_report
    from rsplice.kernel import cache
    from rsplice.kernel.live import GuestSource, check

    check(args.pids, args.everything, args.command)
    options = [f"--interval={args.interval}", f"--identity={args.identity}"]
    options += [f"--user={args.user}"] if args.user is not None else []
    options += ["--integrity"] if args.integrity else []
    options += [f"--journey={args.journey}"] if args.journey is not None else []
    with tempfile.TemporaryFile() as kept:
        with progress() as say:
            kernel = cache.find_or_fetch(args.kernel, say)
            say(f"booting Linux {kernel.release}")
            source = GuestSource(kernel, args.command, options, kept)
            with source:
                source.wait()
                say("")
                run_live(source, Console(), interval=args.interval)
                status = source.end()
        _show_kept(kept)
    last = source.snapshot()
    if last.duration_s == 0:
        return status or EXIT_FAILED
    print_report(last, sys.stdout)
    return status


def _status(audit: Audit, demo: bool) -> int:
    """The command's exit status; that of the demo, which q ends, is nobody's business."""
    return 0 if demo else audit.exit_status or 0


def _show_kept(kept: IO[bytes]) -> None:
    """Prints what the command printed, as it would have."""
    sys.stdout.flush()
    kept.seek(0)
    while block := kept.read(1 << 16):
        sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


def _play_recording(why_not: str) -> int:
    from rich.console import Console

    from rsplice import dashboards
    from rsplice.dashboards.live import run_live
    from rsplice.dashboards.report import print_report
    from rsplice.recording import Recording

    print(f"rsplice: {why_not}; playing a recording of the demo", file=sys.stderr)
    recording = Recording(str(Path(dashboards.__file__).parent / "demo.jsonl"))
    run_live(recording, Console(), recorded=True)
    print_report(recording.final, sys.stdout, recorded=True)
    return 0
