# SPDX-License-Identifier: MIT
"""What the loop is run under: nothing, rsplice in its modes, and other tracers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RSPLICE = (sys.executable, "-m", "rsplice")
AUDIT = (*RSPLICE, "audit")

TIMEOUT_S = 120

#: Runs its arguments where tracefs is mounted, without leaving a mount behind.
_WITH_TRACEFS = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    "[ -d /sys/kernel/tracing/events ] || mount -t tracefs nodev /sys/kernel/tracing; "
    'exec "$0" "$@"',
)
_BPFTRACE = (
    "tracepoint:syscalls:sys_exit_splice,"
    "tracepoint:syscalls:sys_exit_pread64,"
    "tracepoint:syscalls:sys_exit_pwrite64"
    " /pid == cpid/ { @calls[probe] = count(); }"
)


class Unavailable(Exception):
    """A row that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Tracer:
    """One way to run a command."""

    key: str
    title: str
    prefix: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  #: programs that have to be installed
    divisor: int = 1  #: by how much fewer pairs, where each takes very long
    as_one_word: bool = False  #: the command is one argument
    beside: tuple[str, ...] = field(default=())  #: a command that runs meanwhile


UNTRACED = Tracer("untraced", "untraced")


def tracers(floor: Path) -> list[Tracer]:
    """Every way that is compared, untraced first. *floor* is the built floor.c."""
    return [
        UNTRACED,
        Tracer("floor", "empty BPF program", (str(floor),)),
        Tracer("not-followed", "rsplice, not followed", beside=AUDIT),
        Tracer("off", "rsplice, off", (*AUDIT, "--identity", "off", "--")),
        Tracer("sample", "rsplice, sample", (*AUDIT, "--identity", "sample", "--")),
        Tracer("all", "rsplice, all", (*AUDIT, "--identity", "all", "--")),
        Tracer("journey", "rsplice, journeys", (*AUDIT, "--journey=2", "--"), divisor=10),
        Tracer("integrity", "rsplice, integrity", (*AUDIT, "--integrity", "--"), divisor=10),
        Tracer(
            "bpftrace",
            "bpftrace, counts",
            (*_WITH_TRACEFS, "bpftrace", "-e", _BPFTRACE, "-c"),
            ("bpftrace", "unshare"),
            as_one_word=True,
        ),
        Tracer(
            "perf",
            "perf trace -s",
            (*_WITH_TRACEFS, "perf", "trace", "-s", "--"),
            ("perf", "unshare"),
            divisor=100,
        ),
        Tracer("strace", "strace -c -f", ("strace", "-c", "-f"), ("strace",), divisor=100),
    ]


def build(source: str, directory: Path) -> Path:
    """Compiles benchmarks/*source*.c into *directory*. Unavailable if that fails."""
    program = directory / source
    compiler = os.environ.get("CC", "cc")
    if not shutil.which(compiler):
        raise Unavailable(f"{compiler}: not installed")
    text = ROOT / "benchmarks" / f"{source}.c"
    _check([compiler, "-O2", "-Wall", "-Wextra", "-o", str(program), str(text)])
    return program


def require(programs: tuple[str, ...]) -> None:
    """Unavailable if one of *programs* is not installed."""
    for program in programs:
        if not shutil.which(program):
            raise Unavailable(f"{program}: not installed")


def run_loop(tracer: Tracer, loop: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """What the loop says of its runs when *tracer* runs it. Unavailable if it cannot."""
    require(tracer.needs)
    result = loop.parent / "result.json"
    result.unlink(missing_ok=True)
    command = [str(loop), "-o", str(result), *arguments]
    if tracer.as_one_word:
        command = [" ".join(command)]
    with _running(tracer.beside):
        _check([*tracer.prefix, *command])
    try:
        runs: list[dict[str, Any]] = json.loads(result.read_text())["runs"]
    except (OSError, ValueError) as error:
        raise Unavailable(f"the loop left no result: {error}") from error
    return runs


@contextmanager
def _running(audit: tuple[str, ...]) -> Iterator[None]:
    """Keeps an audit of an idle command running, if one is asked for."""
    if not audit:
        yield
        return
    idle = ("--", "sh", "-c", "echo ready; exec cat")
    with subprocess.Popen(
        (*audit, *idle),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        # The command starts when the probes are attached.
        if process.stdout.readline() != b"ready\n":
            raise Unavailable(_last_line(process.stderr.read()))
        try:
            yield
        finally:
            process.stdin.close()
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process that has been told to end, and kills it if it does not."""
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _check(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, cwd=ROOT
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"did not end within {TIMEOUT_S} s") from error
    if done.returncode:
        raise Unavailable(f"exit status {done.returncode}: {_last_line(done.stderr)}")


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word on standard error"
