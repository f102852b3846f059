# SPDX-License-Identifier: MIT
"""The command ``rsplice``: finds the subcommand, runs it, turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from inspect import cleandoc
from types import ModuleType
from typing import NoReturn

from rsplice import __version__
from rsplice.dashboards.text import sanitise, silence
from rsplice.errors import EXIT_FAILED, RspliceError

#: The subcommands, each a module of rsplice.commands that is imported only when it is run.
COMMANDS = {
    "audit": "run a command and report its copies",
    "live": "show copies as they happen",
    "doctor": "say what can be seen on this system",
    "record": "keep what the live dashboard would show",
    "replay": "show a recording again, with no privileges",
    "verify": "compare cached pages with what is on disk",
    "workload": "list or run the built-in workloads",
    "serve-probes": "let a user without privileges trace their own processes",
    "kernel": "run a command on another kernel, in a VM",
    "diff": "say what changed between two audits",
}
_INTERRUPTED = 130

_EPILOG = """\
EXAMPLES
  rsplice audit -- cp a b      what cp copied, how often, and why
  rsplice live -p 4711         the same as it happens, for a running process
  rsplice doctor               what this kernel and these privileges can show

'rsplice COMMAND --help' says more of each."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the exit status of a failed rsplice."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_FAILED, f"rsplice: {sanitise(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs rsplice with the arguments *argv*, by default those of the process.

    :return: the exit status
    """
    _mend_streams()
    status = 0
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except RspliceError as error:
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}", EXIT_FAILED)
    return status


def _run(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="rsplice",
        description="Says how many bytes a program's zero-copy path really copies, and why.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rsplice {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == wanted:
            _add_command(commands, name, summary)
        else:
            commands.add_parser(name, help=summary)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    status: int = args.run(args)
    return status


def _add_command(commands: argparse._SubParsersAction[_Parser], name: str, summary: str) -> None:
    module = importlib.import_module(f"rsplice.commands.{name.replace('-', '_')}")
    description, examples = _help(module)
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.prepare_parser(parser)
    parser.set_defaults(run=module.run)


def _help(module: ModuleType) -> tuple[str, str]:
    """The docstring of *module* before its EXAMPLES, and from there on."""
    description, heading, examples = cleandoc(module.__doc__ or "").partition("EXAMPLES\n")
    return description, heading + examples


def _mend_streams() -> None:
    """Closed streams go nowhere; what a terminal's encoding lacks is shown as an escape."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int) -> int:
    with suppress(OSError):  # nobody reads our errors
        print(f"rsplice: {sanitise(message)}", file=sys.stderr, flush=True)
    return status
