# SPDX-License-Identifier: MIT
"""rsplice workload: lists the built-in workloads, or runs one."""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from rsplice.errors import RspliceError
from rsplice.workloads import WORKLOADS
from rsplice.workloads.core import STOP_SIGNALS, Progress, Settings, Workload

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+) ?([KMG]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_MAX_SIZE = 1 << 30
_PAGE = 4096
_MAX_THREADS = 64
_MAX_COUNT = 1 << 40
_MAX_PACED_COUNT = 1 << 16

EXAMPLES = """\
EXAMPLES
  rsplice workload                               the list
  rsplice workload relay --mode splice --count 23
  rsplice audit -- rsplice workload serve --mode sendfile --size 1M
  rsplice audit -- rsplice workload fuse --mode rsplice
  rsplice audit -- rsplice workload recvpage --mode copy
  rsplice workload fuse --source DIR --mount POINT     shows DIR on POINT until Ctrl-C
  rsplice live -- rsplice workload mixed

At its end a workload prints, as JSON, the calls it made, counted by what they returned.
Scratch files lie under TMPDIR and are removed at the end.
"""


class _Stopped(BaseException):
    """A signal has come that ends the run."""

    def __init__(self, number: int) -> None:
        self.number = number


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice workload`` to *parser*."""
    parser.description = "Lists the built-in workloads, or runs one."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("name", nargs="?", metavar="NAME", help="the workload to run")
    parser.add_argument("--mode", help="how the workload carries the bytes (see the list)")
    parser.add_argument("--size", help="bytes per operation, such as 4096, 64K or 1M")
    parser.add_argument("--count", help="operations to make (mixed: per program and 50 ms)")
    parser.add_argument("--seconds", help="stop after this time")
    parser.add_argument(
        "--threads", help="threads, each with files, a connection or a pipe of its own"
    )
    parser.add_argument("--source", metavar="DIR", help="fuse: the directory to show on --mount")
    parser.add_argument("--mount", metavar="DIR", help="fuse: where, until a signal comes")
    parser.add_argument(
        "--readahead",
        metavar="SIZE",
        help="fuse: bytes to read ahead of a reader (default: a READ)",
    )
    parser.add_argument("--json", action="store_true", help="only JSON, on one line")


def run(args: argparse.Namespace) -> int:
    """Lists or runs; 0, or 128 + the number of the signal that ended the run.

    :raises RspliceError: bad options, or a machine that lacks what the workload needs
    """
    if args.name is None:
        _list(args.json)
        return 0
    if args.name not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise RspliceError(f"no workload is called {args.name!r}; there are: {known}")
    workload = WORKLOADS[args.name]
    settings = parse_settings(workload, vars(args))
    try:
        with _stopping(), _progress(workload, quiet=args.json) as progress:
            result = _run(workload, settings, progress)
    except _Stopped as stopped:
        return 128 + stopped.number
    print(json.dumps(result, indent=None if args.json else 2))
    return 0


def _run(workload: Workload, settings: Settings, progress: Progress) -> dict[str, Any]:
    start = time.monotonic()
    try:
        calls = workload.run(settings, progress)
    except OSError as error:
        raise RspliceError(f"workload {workload.name}: {error}") from error
    seconds = round(time.monotonic() - start, 3)
    mode = {"mode": settings.mode} if settings.mode else {}
    return {"workload": workload.name, **mode, "seconds": seconds, **calls.to_json()}


def parse_settings(workload: Workload, options: dict[str, str | None]) -> Settings:
    """The settings of a run from option texts, with the workload's defaults.

    RspliceError for a text that does not fit.
    """
    settings = workload.defaults
    mode = options["mode"]
    if mode is not None:
        if mode not in workload.modes:
            known = ", ".join(workload.modes) or "none"
            raise RspliceError(f"{workload.name} has no mode {mode!r}; its modes: {known}")
        settings = replace(settings, mode=mode)
    if (size := options["size"]) is not None:
        settings = replace(settings, size=_parse_size("--size", size))
    if (seconds := options["seconds"]) is not None:
        # A time limit alone lifts the limit of operations.
        count = settings.count if workload.paced else None
        settings = replace(settings, seconds=_parse_seconds(seconds), count=count)
    if (count_text := options["count"]) is not None:
        most = _MAX_PACED_COUNT if workload.paced else _MAX_COUNT
        settings = replace(settings, count=_parse_number("--count", count_text, most))
    if (threads := options["threads"]) is not None:
        if workload.paced:
            raise RspliceError(f"{workload.name} has no --threads: it is made of processes")
        settings = replace(settings, threads=_parse_number("--threads", threads, _MAX_THREADS))
    return _with_its_own(workload, settings, options)


def _with_its_own(
    workload: Workload, settings: Settings, options: dict[str, str | None]
) -> Settings:
    """*settings* with what only some workloads take."""
    given: dict[str, Any] = {
        name: directory
        for name in ("source", "mount")
        if (directory := options.get(name)) is not None
    }
    served = bool(given)
    if (readahead := options.get("readahead")) is not None:
        given["readahead"] = _parse_size("--readahead", readahead, least=_PAGE)
    for name in given:
        if not hasattr(settings, name):
            raise RspliceError(f"{workload.name} has no --{name}")
    for name in ("size", "count"):
        if served and options[name] is not None:
            raise RspliceError(f"--{name} means nothing where a directory is served")
    return replace(settings, **given)


def _parse_size(option: str, text: str, least: int = 1) -> int:
    match = _SIZE.fullmatch(text)
    size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if not least <= size <= _MAX_SIZE:
        raise RspliceError(
            f"{option} {text!r} is not a size from {least} to 1G, such as 4096, 64K or 1M"
        )
    return size


def _parse_number(option: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= most):
        raise RspliceError(f"{option} {text!r} is not a whole number from 1 to {most}")
    return int(text)


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RspliceError(f"--seconds {text!r} is not a positive number of seconds")
    return seconds


def _list(as_json: bool) -> None:
    if as_json:
        print(json.dumps([_describe(workload) for workload in WORKLOADS.values()]))
        return
    width = max(map(len, WORKLOADS)) + 2
    for w in WORKLOADS.values():
        print(f"{w.name:<{width}}{w.summary}")
        if w.modes:
            print(f"{'':{width}}--mode {'|'.join(w.modes)} (default {w.defaults.mode})")


def _describe(workload: Workload) -> dict[str, Any]:
    defaults = workload.defaults
    return {
        "name": workload.name,
        "summary": workload.summary,
        "modes": list(workload.modes),
        "defaults": {k: v for k, v in vars(defaults).items() if v not in (None, "")},
    }


@contextmanager
def _stopping() -> Iterator[None]:
    """Turns a signal into an exception, so that scratch files go whatever ends the run."""

    def stop(number: int, _frame: FrameType | None) -> None:
        # A second Ctrl-C must not cut the cleanup short.
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    before = {each: signal.signal(each, stop) for each in STOP_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _progress(workload: Workload, quiet: bool) -> Iterator[Progress]:
    """A progress bar on standard error, if that is a terminal and *quiet* is not asked for."""
    if quiet or not sys.stderr.isatty():
        yield lambda _done, _what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    # No refreshing thread: the workload forks.
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task(workload.name, total=1.0)

        def show(done: float, what: str) -> None:
            bar.update(task, completed=done, description=f"{workload.name}: {what}", refresh=True)

        yield show
