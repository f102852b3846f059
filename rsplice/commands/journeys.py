# SPDX-License-Identifier: MIT
"""The options of ``rsplice audit`` that have pages followed."""

from __future__ import annotations

import argparse
import json

from rsplice.audit import Audit
from rsplice.errors import RspliceError
from rsplice.journey import PAGES_DEFAULT, PAGES_MAX, Journeys, Request, chrome_trace


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds --journey, --journey-file and --journey-json."""
    parser.add_argument(
        "--journey",
        metavar="N",
        nargs="?",
        type=_pages,
        const=PAGES_DEFAULT,
        help="tell the stories of the first N pages seen queued in a pipe (default: "
        f"{PAGES_DEFAULT}, at most {PAGES_MAX})",
    )
    parser.add_argument(
        "--journey-file", metavar="PATH", help="of the first N that enter this file's page cache"
    )
    parser.add_argument(
        "--journey-json", metavar="FILE", help="write them as Chrome trace events, for Perfetto"
    )


def request(args: argparse.Namespace) -> Request | None:
    """What the options ask for, None if for nothing. RspliceError if they rule each other out."""
    if args.journey is None and args.journey_file is None and args.journey_json is None:
        return None
    if args.identity == "off":
        raise RspliceError("--journey compares pages: leave out --identity off")
    if args.journey_json == "-" == args.json:
        raise RspliceError("--json and --journey-json cannot both go to standard output")
    return Request(args.journey or PAGES_DEFAULT, args.journey_file)


def as_trace(audit: Audit) -> str:
    """The stories as JSON that Perfetto and chrome://tracing open."""
    return json.dumps(chrome_trace(audit.journeys or Journeys())) + "\n"


def _pages(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 0 < value <= PAGES_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of pages from 1 to {PAGES_MAX}; write --journey=N, "
            "and the command behind --"
        )
    return value
