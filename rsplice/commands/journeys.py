# SPDX-License-Identifier: MIT
"""The options that have pages followed."""

from __future__ import annotations

import argparse
import json

from rsplice.audit import Audit
from rsplice.dashboards.text import sanitise
from rsplice.errors import RspliceError
from rsplice.journey import (
    ANY_FINDING,
    FINDING_PAGES_DEFAULT,
    PAGES_DEFAULT,
    PAGES_MAX,
    Journeys,
    Request,
    chrome_trace,
)
from rsplice.tracers.findings import NAMES


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice audit``."""
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
        "--journey-finding",
        metavar="NAME",
        help="of pages that findings of this name, or of 'any', are about: N of each reason "
        f"(default: {FINDING_PAGES_DEFAULT})",
    )
    parser.add_argument(
        "--journey-json", metavar="FILE", help="write them as Chrome trace events, for Perfetto"
    )


def prepare_findings_parser(parser: argparse.ArgumentParser) -> None:
    """Adds --journey as ``rsplice live`` and ``rsplice record`` have it: findings show them."""
    parser.add_argument(
        "--journey",
        metavar="N",
        nargs="?",
        type=_pages,
        const=FINDING_PAGES_DEFAULT,
        help="follow N pages of each finding and reason, whose journeys its details show "
        f"(default: {FINDING_PAGES_DEFAULT})",
    )


def findings_request(args: argparse.Namespace) -> Request | None:
    """What that asks for, None if for nothing. RspliceError if no findings are looked for."""
    return None if args.journey is None else _of_findings(args, ANY_FINDING, args.journey)


def request(args: argparse.Namespace) -> Request | None:
    """What the options ask for, None if for nothing. RspliceError if they rule each other out."""
    asked = (args.journey, args.journey_file, args.journey_finding, args.journey_json)
    if all(option is None for option in asked):
        return None
    if args.identity == "off":
        raise RspliceError("--journey compares pages: leave out --identity off")
    if args.journey_json == "-" == args.json:
        raise RspliceError("--json and --journey-json cannot both go to standard output")
    if args.journey_finding is None:
        return Request(args.journey or PAGES_DEFAULT, args.journey_file)
    if args.journey_file is not None:
        raise RspliceError("--journey-finding and --journey-file cannot be combined")
    return _of_findings(args, args.journey_finding, args.journey)


def _of_findings(args: argparse.Namespace, name: str, pages: int | None) -> Request:
    """Asks for pages of findings. RspliceError if there are none of that name, or none at all."""
    if args.identity != "all":
        raise RspliceError("journeys of findings need all pages compared: leave out --identity")
    known = NAMES[1:]
    if name not in (ANY_FINDING, *known):
        raise RspliceError(
            f"--journey-finding: no finding is called {sanitise(name)}; there are "
            f"{', '.join(known)}, and 'any'"
        )
    return Request(pages or FINDING_PAGES_DEFAULT, finding=name)


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
