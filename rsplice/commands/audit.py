# SPDX-License-Identifier: MIT
"""Runs CMD, follows it and all of its descendants, and when they have ended says how many
bytes their reads, writes, splices and sends copied, how many copies were avoided, and why.
The report goes to standard error; CMD's own output is left alone.

EXAMPLES
  rsplice audit -- cp a b                     one command
  rsplice audit --json - -- nginx -g 'daemon off;' | jq .totals
  rsplice audit -p 4711 --duration 10         a running process, for ten seconds
  rsplice audit --all --duration 5            the whole machine
  rsplice audit --fail-on 'copied>0' -- ./relay   exit status 120 if anything is copied
  rsplice audit --junit out.xml --fail-on 'copied>1MiB' -- ./test   for CI; or --github
  rsplice audit --journey=2 -- ./relay        and the stories of two pages
  rsplice audit --journey-finding any -- ./relay  and of a page of each finding
  rsplice audit --kernel 6.12 -- ./relay      on another kernel, in a VM
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from functools import partial

from rsplice.audit import Audit
from rsplice.commands import ci, journeys
from rsplice.commands.options import add_targets, open_session, seconds
from rsplice.errors import EXIT_FAIL_ON, RspliceError
from rsplice.limits import Limit, parse_limit
from rsplice.session import Session, passing_signals


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice audit``."""
    parser.add_argument("--json", metavar="FILE", help="write JSON ('-': standard output)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained HTML page")
    parser.add_argument("-o", dest="text", metavar="FILE", help="write the report to FILE")
    parser.add_argument(
        "--duration",
        metavar="S",
        type=seconds,
        help="end after S seconds; a CMD that still runs then is sent SIGTERM",
    )
    parser.add_argument(
        "--interval", metavar="S", type=seconds, help="print the counts so far every S seconds"
    )
    parser.add_argument(
        "--fail-on",
        metavar="EXPR",
        action="append",
        default=[],
        help="exit with 120 if EXPR holds, e.g. 'copied>10MiB', 'lost>0', violation; repeatable",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="at the end compare the cached pages of the files that were spliced, sent or copied "
        "with the disk",
    )
    ci.prepare_parser(parser)
    journeys.prepare_parser(parser)
    parser.add_argument(
        "-q",
        dest="quiet",
        action="store_true",
        help="no report on standard error; what a --fail-on found is told",
    )
    parser.add_argument(
        "-v", dest="verbose", action="store_true", help="say what is attached, and when"
    )
    parser.add_argument(
        "--kernel",
        metavar="VERSION",
        help="run CMD on another kernel, in a VM (see rsplice kernel)",
    )
    add_targets(parser)


def run(args: argparse.Namespace) -> int:
    """Audits, reports; the exit status is the command's unless something failed."""
    limits = [parse_limit(text) for text in args.fail_on]
    _check_looked_for(limits, args)
    journey = journeys.request(args)
    files = (args.json, args.html, args.text, args.journey_json, args.junit)
    if files.count("-") > 1:
        raise RspliceError("only one report can go to standard output")
    for path in (*files, ci.summary_file(args)):
        _check_writable(path)
    if args.kernel is not None:
        if args.verify:
            raise RspliceError("--verify reads this machine's disks: leave out --kernel")
        return _run_in_vm(args, limits)
    begun = time.monotonic()
    with open_session(args, journey=journey, verify_files=args.verify) as session:
        if args.verbose:
            _say_attached(session, time.monotonic() - begun)
        with passing_signals(session):
            session.start()
            _follow(session, args)
        session.stop()
        audit = session.snapshot()
        if session.command and session.command.status is None:
            audit.exit_status = session.command.end()
    return _report(audit, args, limits)


def _run_in_vm(args: argparse.Namespace, limits: list[Limit]) -> int:
    from rsplice.commands import kernel as command
    from rsplice.kernel.audit import audit

    with command.progress() as say, command.showing_console():
        found = audit(args, command.job_of, command.setup_of(say))
    return found if isinstance(found, int) else _report(found, args, limits)


def _follow(session: Session, args: argparse.Namespace) -> None:
    """Waits for the end, printing on the way what was asked for."""
    end = time.monotonic() + args.duration if args.duration else None
    told = False
    while session.running:
        now = time.monotonic()
        if end is not None and now >= end:
            if session.command:
                session.command.send(signal.SIGTERM)
            return
        step = args.interval or 1.0
        session.wait(step if end is None else min(step, end - now))
        if args.interval and session.running:
            with ci.no_commands(args):
                _say_so_far(session.snapshot())
        command = session.command
        if command and command.status is not None and not told and session.running:
            told = True
            count = len(session.tracer.counters.alive())
            _say(f"{command.argv[0]} has ended; following {count} of its descendants (Ctrl-C ends)")


def _report(audit: Audit, args: argparse.Namespace, limits: list[Limit]) -> int:
    from rsplice.dashboards.limits_text import failure_lines
    from rsplice.dashboards.report import print_report

    failure: RspliceError | None = None
    to_stderr = not (args.quiet or args.text or "-" in (args.json, args.journey_json, args.junit))
    for path, render in (
        (args.json, _as_json),
        (args.html, _as_html),
        (args.text, _as_text),
        (args.journey_json, journeys.as_trace),
        (args.junit, partial(ci.as_junit, limits=limits)),
    ):
        if path is None:
            continue
        try:
            _write(path, render(audit))
        except OSError as error:
            # The run cannot be repeated: what could not be kept is at least shown.
            failure = RspliceError(
                f"cannot write {path}: {error.strerror}; the report follows here"
            )
            to_stderr = True
    held = [lines for limit in limits if (lines := failure_lines(audit, limit))]
    if to_stderr or held:
        with ci.no_commands(args):
            if to_stderr:
                print_report(audit, sys.stderr)
            for sentence, *reasons in held:
                # Reasons are told once: by the report, by an annotation, or here.
                _say(sentence, *([] if to_stderr or args.github else reasons))
    ci.annotate(audit, limits, args)
    if failure:
        raise failure
    if held:
        return EXIT_FAIL_ON
    return audit.exit_status or 0


def _as_json(audit: Audit) -> str:
    return json.dumps(audit.to_json(), indent=1) + "\n"


def _as_html(audit: Audit) -> str:
    from rsplice.dashboards.html import render_html

    return render_html(audit)


def _as_text(audit: Audit) -> str:
    import io

    from rsplice.dashboards.report import print_report

    text = io.StringIO()
    print_report(audit, text, color=False)
    return text.getvalue()


def _check_looked_for(limits: list[Limit], args: argparse.Namespace) -> None:
    """Fails before the command runs where a limit is on findings that nobody looks for."""
    for limit in limits:
        if why := limit.not_looked_for(args.identity, args.verify):
            raise RspliceError(f"--fail-on {limit.text}: {why}")


def _check_writable(path: str | None) -> None:
    """Fails before the command runs where its report could not be kept."""
    if path is None or path == "-":
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise RspliceError(f"cannot write {path}: it is a directory")
    if not os.path.isdir(folder):
        raise RspliceError(f"cannot write {path}: there is no directory {folder}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise RspliceError(f"cannot write {path}: permission denied")


def _write(path: str, text: str) -> None:
    """Writes a report whole or not at all. OSError if that fails."""
    if path == "-":
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            # Who reads the report has read enough: the command's status still counts.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w") as device:
            device.write(text)
        return
    fd, temporary = tempfile.mkstemp(".tmp", ".rsplice-", os.path.dirname(path) or ".")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _say(sentence: str, *lines: str) -> None:
    from rsplice.dashboards.text import sanitise

    with contextlib.suppress(OSError):
        text = "\n".join(map(sanitise, (f"rsplice: {sentence}", *lines)))
        print(text, file=sys.stderr, flush=True)


def _say_attached(session: Session, took: float) -> None:
    tracer = session.tracer
    _say(f"{len(tracer.attached)} probes attached after {took:.2f} s: {', '.join(tracer.attached)}")
    for missing in tracer.missing:
        _say(f"not attached: {missing.probe}: {missing.reason} ({missing.cost})")
    if tracer.refused:
        _say(f"kernel memory is read more slowly: {tracer.refused}")


def _say_so_far(audit: Audit) -> None:
    from rsplice.dashboards.live import LiveView

    view = LiveView()
    view.feed(audit, audit.duration_s)
    with contextlib.suppress(OSError):
        print(view.block(), file=sys.stderr, flush=True)
