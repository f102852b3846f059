# SPDX-License-Identifier: MIT
"""Options that several commands share: whom to follow, and how closely."""

from __future__ import annotations

import argparse

from rsplice.errors import RspliceError
from rsplice.journey import Request
from rsplice.session import Session


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Adds -p, --all, --identity, --integrity, --user and the command."""
    parser.add_argument(
        "-p",
        dest="pids",
        metavar="PID[,PID]",
        type=_pids,
        default=[],
        help="follow running processes, and the children they make from now on",
    )
    parser.add_argument(
        "--all", dest="everything", action="store_true", help="follow every process of the machine"
    )
    parser.add_argument(
        "--identity",
        choices=("all", "sample", "off"),
        default="all",
        help="how many calls have their pages compared (default: all)",
    )
    parser.add_argument(
        "--integrity",
        action="store_true",
        help="also compare what is in pages when they are queued in a pipe and when they are read",
    )
    parser.add_argument(
        "--user", metavar="NAME", help="who CMD runs as (default: under sudo the invoking user)"
    )
    parser.add_argument("command", nargs="*", metavar="CMD", help="the command, behind --")


def open_session(
    args: argparse.Namespace,
    output: int | None = None,
    journey: Request | None = None,
    verify_files: bool = False,
) -> Session:
    """The session that the options ask for. RspliceError unless they name one target."""
    targets = [bool(args.command), bool(args.pids), args.everything]
    if sum(targets) != 1:
        raise RspliceError("say what to follow: either -- CMD [ARG...], or -p PID, or --all")
    if args.integrity and args.identity != "all":
        raise RspliceError(f"--integrity looks at every page: leave out --identity {args.identity}")
    if verify_files and args.identity != "all":
        raise RspliceError(f"--verify looks at every call: leave out --identity {args.identity}")
    return Session(
        args.command,
        args.pids,
        args.everything,
        args.identity,
        args.user,
        output,
        journey,
        args.integrity,
        verify_files,
    )


def _pids(text: str) -> list[int]:
    try:
        pids = [int(part) for part in text.split(",")]
    except ValueError:
        pids = []
    if not pids or min(pids) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of pids such as 4711,4712")
    return pids


def seconds(text: str) -> float:
    """A positive number of seconds, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
