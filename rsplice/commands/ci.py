# SPDX-License-Identifier: MIT
"""The options of ``rsplice audit`` for the systems that run tests."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rsplice.audit import Audit
from rsplice.errors import RspliceError
from rsplice.limits import Limit


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds --junit and --github."""
    parser.add_argument(
        "--junit", metavar="FILE", help="write JUnit XML: a case for CMD and one for each --fail-on"
    )
    parser.add_argument(
        "--github",
        action="store_true",
        help="annotate the GitHub Actions step, and add to its summary",
    )


def summary_file(args: argparse.Namespace) -> str | None:
    """Where the summary of the GitHub Actions step is kept; None if it is not wanted."""
    return os.environ.get("GITHUB_STEP_SUMMARY") or None if args.github else None


def as_junit(audit: Audit, limits: Sequence[Limit]) -> str:
    """The audit and what became of its limits as JUnit XML."""
    from rsplice.dashboards.junit import render_junit

    return render_junit(audit, limits)


def no_commands(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Meanwhile standard error commands a GitHub Actions runner nothing."""
    if not args.github:
        return nullcontext()
    from rsplice.dashboards.github import commands_stopped

    return commands_stopped(sys.stderr)


def annotate(audit: Audit, limits: Sequence[Limit], args: argparse.Namespace) -> None:
    """Tells GitHub Actions which limits failed, and why, if that is wanted.

    :raises RspliceError: the summary cannot be written
    """
    if not args.github:
        return
    from rsplice.dashboards import github
    from rsplice.dashboards.text import emit

    emit(sys.stderr, github.commands(audit, limits))
    if path := summary_file(args):
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(github.summary(audit, limits))
        except OSError as error:
            raise RspliceError(f"cannot write {path}: {error.strerror}") from error
