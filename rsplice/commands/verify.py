# SPDX-License-Identifier: MIT
"""Compares what the page cache holds of files with what is on disk, and tells of clean pages that
differ: the trace that Copy Fail, Dirty Frag and their family leave. Nothing is evicted from the
cache, and nothing becomes dirty. Exit status 0 if no page differs, 1 if one does, 2 if none was
found but something could not be checked. Needs root.

EXAMPLES
  rsplice verify /usr/bin/su /etc/passwd      these files
  rsplice verify --setuid                     all that is setuid, setgid or has file capabilities
  rsplice verify --mapped $(pidof -s sshd)    the program and the libraries that a process runs
  rsplice verify --setuid --json | jq '.files[] | select(.differing != [])'
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rsplice import __version__
from rsplice.dashboards import phrases
from rsplice.dashboards.text import emit, sanitise
from rsplice.errors import RspliceError
from rsplice.pagecache import PAGE, CachedFile, Kernel, Unchecked
from rsplice.targets import EXIT_UNCHECKED, Target, comm, mapped, setuid
from rsplice.verify import SCHEMA, FileResult, Verifier, finding

EXIT_FOUND = 1
WIDTH = 80  #: columns of the report
_PAGES_SHOWN = 8  # of a file; all are in the JSON
_FILES_SHOWN = 3  # for one reason; -v shows all


@dataclass
class Verification:
    """All that was verified."""

    results: list[FileResult] = field(default_factory=list)
    duration_s: float = 0.0
    pid: int | None = None  #: whose mapped files these are
    comm: str | None = None  #: its name

    @property
    def in_memory(self) -> list[FileResult]:
        """Files mapped by a process that lie on no disk: there is nothing to compare them with."""
        return [r for r in self.results if r.in_memory] if self.pid else []

    @property
    def unchecked(self) -> list[FileResult]:
        aside = {id(result) for result in self.in_memory}
        return [r for r in self.results if r.unchecked and id(r) not in aside]

    @property
    def status(self) -> int:
        if self.differing:
            return EXIT_FOUND
        return EXIT_UNCHECKED if self.unchecked else 0

    @property
    def differing(self) -> int:
        return sum(len(result.counts.differing) for result in self.results)

    def total(self, name: str) -> int:
        return sum(getattr(result.counts, name) for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """The document of schema rsplice.verify/1."""
        found = finding(self.results, self.pid, self.comm)
        return {
            "schema": SCHEMA,
            "rsplice": __version__,
            "kernel": {"release": os.uname().release, "where": "running"},
            "exit_status": self.status,
            "duration_s": round(self.duration_s, 6),
            "page_bytes": PAGE,
            "totals": {
                "files": len(self.results),
                "compared_pages": self.total("compared"),
                "same_pages": self.total("same"),
                "busy_pages": self.total("busy"),
                "unchecked_files": len(self.unchecked),
                "unchecked_pages": sum(r.counts.unchecked.total() for r in self.unchecked),
                "differing_pages": self.differing,
            },
            "files": [result.to_json() for result in self.results],
            "findings": [found.to_json()] if found else [],
        }


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice verify``."""
    parser.add_argument(
        "--mapped", metavar="PID", type=_pid, help="verify the files that a process has mapped"
    )
    parser.add_argument(
        "--setuid",
        action="store_true",
        help="verify what is setuid, setgid or has file capabilities, on local filesystems",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "-q", dest="quiet", action="store_true", help="print nothing: the exit status tells"
    )
    parser.add_argument("-v", dest="verbose", action="store_true", help="a line for each file")
    parser.add_argument("files", nargs="*", metavar="FILE", help="the files to verify")


def run(args: argparse.Namespace) -> int:
    """Verifies, and prints."""
    if sum([bool(args.files), args.mapped is not None, args.setuid]) != 1:
        raise RspliceError("say what to verify: either FILE..., or --mapped PID, or --setuid")
    done = _verify(args)
    if not args.quiet:
        text = json.dumps(done.to_json(), indent=1) if args.json else _text(done, args.verbose)
        emit(sys.stdout, text + "\n")
    return done.status


def _verify(args: argparse.Namespace) -> Verification:
    done = Verification(pid=args.mapped, comm=comm(args.mapped) if args.mapped else None)
    begun = time.monotonic()
    try:
        kernel = Kernel()
    except Unchecked as why:
        raise RspliceError(f"nothing can be checked: {why}", EXIT_UNCHECKED) from why
    with Verifier(kernel) as verifier:
        for target in _targets(args, done):
            done.results.append(verify_file(verifier, target))
    done.duration_s = time.monotonic() - begun
    return done


def _targets(args: argparse.Namespace, done: Verification) -> Iterable[Target]:
    if args.mapped is not None:
        return mapped(args.mapped)
    if args.setuid:
        return setuid("/", lambda name, why: done.results.append(FileResult(name, problem=why)))
    return [Target(name, name) for name in args.files]


def verify_file(verifier: Verifier, target: Target) -> FileResult:
    """Verifies one file; what goes wrong is in the result."""
    result = FileResult(target.name)
    try:
        with CachedFile(target.path) as file:
            result.filesystem, result.in_memory = file.filesystem, file.in_memory
            if file.in_memory:
                result.problem = file.refused
            else:
                result.counts = verifier.verify(file)
    except Unchecked as why:
        result.problem = str(why)
    except OSError as error:
        result.problem = error.strerror or str(error)
    return result


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a pid such as 4711")
    return int(text)


def _text(done: Verification, verbose: bool) -> str:
    lines = [_summary(done)]
    if verbose:
        lines += [_file_line(result) for result in done.results]
    found = finding(done.results, done.pid, done.comm)
    if found:
        lines.append(f"{sanitise(found.kind)}: {found.name}, {phrases.plural(found.count, 'page')}")
        for result in done.results:
            lines += _differing(result)
        lines.append(f"    {found.advice}")
    lines += _not_checked(done, verbose)
    return "\n".join(part for line in lines for part in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    """*line* on as many lines as it needs, those after the first indented. Names stay whole."""
    indent = " " * max(4, len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent=line[: len(line) - len(line.lstrip())],
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(done: Verification) -> str:
    compared = done.total("compared")
    text = (
        f"rsplice: {phrases.plural(len(done.results), 'file')}, "
        f"{phrases.plural(compared, 'cached page')} ({phrases.size(compared * PAGE)}), "
        f"{phrases.duration(done.duration_s)}: "
        f"{done.differing or 'none'} {'differs' if done.differing == 1 else 'differ'}"
    )
    busy = done.total("busy")
    return text + (f"; {phrases.plural(busy, 'page')} being written, left alone" if busy else "")


def _file_line(result: FileResult) -> str:
    counts = result.counts
    parts = [f"{counts.same} same"]
    parts += [f"{len(counts.differing)} differ"] if counts.differing else []
    parts += [f"{counts.busy} being written"] if counts.busy else []
    parts += [f"{counts.unchecked.total()} not checked"] if counts.unchecked else []
    said = result.problem or ", ".join(parts)
    kind = f" ({result.filesystem})" if result.filesystem else ""
    return sanitise(f"    {result.name}{kind}: {said}")


def _differing(result: FileResult) -> Iterator[str]:
    pages = [page for _, page in sorted(result.counts.differing.items())]
    if not pages:
        return
    yield sanitise(f"{result.name} ({result.filesystem}):")
    for page in pages[:_PAGES_SHOWN]:
        differing = phrases.plural(page.differing, "byte")
        yield f"    page at {page.offset}, frame {page.frame:#x}: {differing}, from {page.first} on"
        yield f"        cached   {page.cached.hex(' ')}"
        yield f"        on disk  {page.disk.hex(' ')}"
    if len(pages) > _PAGES_SHOWN:
        yield f"    and {len(pages) - _PAGES_SHOWN} more, all in the JSON"


def _not_checked(done: Verification, verbose: bool) -> Iterator[str]:
    if done.in_memory:
        yield f"in memory alone: {phrases.plural(len(done.in_memory), 'file')}, not compared"
    pages: Counter[str] = Counter()
    names: defaultdict[str, list[str]] = defaultdict(list)
    for result in done.unchecked:
        for reason, number in result.reasons.items():
            pages[reason] += number
            names[reason].append(result.name)
    for reason, files in names.items():
        count = f"{phrases.plural(pages[reason], 'cached page')} of " if pages[reason] else ""
        shown = files if verbose else files[:_FILES_SHOWN]
        more = f" and {len(files) - len(shown)} more" if len(files) > len(shown) else ""
        yield sanitise(f"not checked: {count}{', '.join(shown)}{more}: {reason}")
