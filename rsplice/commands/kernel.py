# SPDX-License-Identifier: MIT
"""Runs a command on another kernel: in a small VM that has this machine's files, read-only, and
throws away what is written. VERSION is a series that Debian has (5.10, 6.1, 6.12, 7.2, 7.3) or
the release of a kernel that was fetched.

The command's input, output, errors and exit status are passed through. Its directory, /tmp and
/var/tmp can be written to until it ends. It runs as root of the guest, with no network.

EXAMPLES
  rsplice kernel list                          what is here, what can be had
  rsplice kernel fetch 6.12                    download it now
  rsplice kernel fetch ./linux-image-6.1.0-56-amd64_6.1.192-2_amd64.deb
  rsplice kernel fetch --modules lib/modules/6.18.0 ./vmlinuz
  rsplice kernel run 6.12 -- uname -r
  rsplice kernel run --timeout 60 6.1 -- ./test.sh
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rsplice.commands.options import seconds
from rsplice.errors import RspliceError
from rsplice.kernel import cache, vm
from rsplice.kernel.debian import SUITES
from rsplice.kernel.initramfs import Job


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds list, fetch and run."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="kernels that are here, and that can be fetched")
    listing.set_defaults(act=_list)
    fetching = actions.add_parser("fetch", help="put a kernel into the cache")
    fetching.add_argument("what", nargs="+", metavar="VERSION|FILE", help="a version, or files")
    fetching.add_argument(
        "--modules", metavar="DIR", help="where the modules of FILE, a vmlinuz, are"
    )
    fetching.set_defaults(act=_fetch)
    running = actions.add_parser("run", help="run a command on a kernel")
    running.add_argument("version", metavar="VERSION")
    running.add_argument("--timeout", metavar="S", type=seconds, help="end it after S seconds")
    running.add_argument(
        "--kill-after",
        metavar="S",
        type=seconds,
        default=15.0,
        help="end it S seconds after the first signal to it (default: 15)",
    )
    running.add_argument("--network", action="store_true", help="let it reach the network")
    running.add_argument(
        "--memory", metavar="MIB", type=int, default=2048, help="of the guest (default: 2048)"
    )
    running.add_argument("--cpus", metavar="N", type=int, help="of the guest (default: up to 4)")
    running.add_argument("--console", metavar="FILE", help="keep what the guest's kernel prints")
    running.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command, behind --"
    )
    running.set_defaults(act=_run)


def run(args: argparse.Namespace) -> int:
    """Lists, fetches or runs; the exit status is then the command's."""
    status: int = args.act(args)
    return status


def _list(args: argparse.Namespace) -> int:
    here = cache.kernels()
    for series, suites in SUITES.items():
        found = [kernel for kernel in here if kernel.series == series]
        state = ", ".join(kernel.release for kernel in found) or "not fetched"
        print(f"{series:6} {state:40} Debian {', '.join(suites)}")
    for kernel in here:
        if kernel.series not in SUITES:
            print(f"{kernel.series:6} {kernel.release:40} {kernel.source}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    with progress() as say:
        first, *others = args.what
        if all(each.endswith(".deb") for each in args.what):
            kernel = cache.add_packages([_file(each) for each in args.what], say)
        elif os.path.sep in first or args.modules:
            if others:
                raise RspliceError("one kernel image at a time: give its modules by --modules")
            modules = Path(args.modules) if args.modules else None
            if modules and not modules.is_dir():
                raise RspliceError(f"{modules}: no such directory")
            kernel = cache.add_image(_file(first), modules, say)
        elif others:
            raise RspliceError("one version at a time")
        else:
            kernel = cache.fetch(first, say)
    print(f"Linux {kernel.release}: {kernel.directory}")
    return 0


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise RspliceError(f"{name}: no such file")
    return path


def _run(args: argparse.Namespace) -> int:
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command or args.command[0].startswith("-"):
        raise RspliceError("write: rsplice kernel run [OPTIONS] VERSION -- CMD [ARG...]")
    with progress() as say, showing_console():
        kernel = cache.find_or_fetch(args.version, say)
        setup = setup_of(say)
        setup.memory = args.memory
        setup.timeout = args.timeout
        setup.last_words = args.kill_after
        if args.cpus:
            setup.cpus = args.cpus
        job = job_of(args.command)
        job.network = args.network
        if args.console:
            with open(args.console, "wb", buffering=0) as file:

                def keep(data: bytes) -> None:
                    file.write(data)

                setup.console = keep
                return vm.run(kernel, job, setup)
        return vm.run(kernel, job, setup)


def job_of(command: list[str]) -> Job:
    """*command*, in this directory and environment."""
    return Job(
        [os.fsencode(word) for word in command],
        os.fsencode(os.getcwd()),
        dict(os.environb),
        os.fsencode(socket.gethostname()),
    )


def setup_of(say: Callable[[str], None]) -> vm.Setup:
    """A guest whose streams are those of this process."""
    return vm.Setup(input=_input(), sinks={"output": _writer(1), "errors": _writer(2)}, say=say)


def _input() -> int | None:
    """The standard input, if there is one."""
    try:
        os.fstat(0)
    except OSError:
        return None
    return 0


def _writer(fd: int) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        while data:
            data = data[os.write(fd, data) :]

    return write


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says what is being done, on one line of a terminal; elsewhere nothing."""
    from rsplice.dashboards.text import sanitise

    terminal = sys.stderr.isatty()

    def say(what: str) -> None:
        if terminal:
            with suppress(OSError):
                sys.stderr.write(f"\r\x1b[K{sanitise(what)}{'...' if what else ''}")
                sys.stderr.flush()

    try:
        yield say
    finally:
        say("")


@contextmanager
def showing_console() -> Iterator[None]:
    """Shows the last lines of a guest that failed, or the first ones of its panic."""
    from rsplice.dashboards.text import sanitise

    try:
        yield
    except vm.GuestFailed as failed:
        with suppress(OSError):
            for line in failed.console:
                print(f"guest: {sanitise(line)}", file=sys.stderr)
        raise
