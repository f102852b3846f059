# SPDX-License-Identifier: MIT
"""Runs of rsplice, and what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from rsplice.session import kernel_version
from tests.support.attached import descendants_of
from tests.support.patience import DEADLINE

ROOT = Path(__file__).parents[2]
RSPLICE = [sys.executable, "-m", "rsplice"]

#: (via, source, destination) -> (operations, payload bytes)
Counts = dict[tuple[str, str, str], tuple[int, int]]

#: Operations of two legs: each half carries the payload.
TWO_LEGS = frozenset({"sendfile", "copy_file_range"})

File = IO[Any] | int | None


def environment() -> dict[str, str]:
    """The tests' environment, in which programs read no locale files."""
    return {**os.environ, "LC_ALL": "C", "COLUMNS": "80"}


@dataclass
class Result:
    """One finished run of rsplice."""

    status: int  #: exit status; -N when signal N killed rsplice itself
    stdout: bytes
    stderr: str
    document: dict[str, Any] | None  #: of --json, None if nothing was written
    without: str | None = None  #: the name of processes that paths() and counts() leave out

    @property
    def json(self) -> dict[str, Any]:
        assert self.document is not None, f"no JSON was written: {self.stderr}"
        return self.document

    @property
    def measures(self) -> bool:
        """Whether this kernel lets copies be counted where they are made, as doctor says."""
        return bool(self.json["accuracy"]["measured_at"])

    def evidence(self, word: str) -> str:
        """The evidence of copies that is *word* ("inferred", "identity") where none are counted."""
        return "measured" if self.measures else word

    @property
    def message(self) -> str:
        """The only line on standard error: what a user reads when the input is bad."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, f"expected one line: {self.stderr!r}"
        assert lines[0].startswith("rsplice: "), lines[0]
        return lines[0]

    def paths(self, comm: str | None = None) -> list[dict[str, Any]]:
        """The paths of every process, or of those called *comm*, each by itself."""
        return [
            path
            for process in self.json["processes"]
            if process["comm"] != self.without and comm in (None, process["comm"])
            for path in process["paths"]
        ]

    def path(self, source: str, destination: str, via: str) -> dict[str, Any]:
        """The path of that name, of all processes; a clear failure if the audit has none."""
        paths = self.paths()
        found = [
            p
            for p in paths
            if (p["source"], p["destination"], p["via"]) == (source, destination, via)
        ]
        names = {f"{p['source']} -> {p['destination']} via {p['via']}" for p in paths}
        assert found, f"{source} -> {destination} via {via} not among {names}"
        total = dict(found[0])
        for other in found[1:]:
            assert other["evidence"] == total["evidence"]
            for name, value in other.items():
                if isinstance(value, int):
                    total[name] += value
        return total

    def counts(self, comm: str | None = None) -> Counts:
        """Operations and payload of every process, or of those called *comm*."""
        total: Counts = {}
        for p in self.paths(comm):
            key = (p["via"], p["source"], p["destination"])
            operations, payload = total.get(key, (0, 0))
            total[key] = (operations + p["operations"], payload + p["payload_bytes"])
        return total


#: Runs that nobody has waited for: see end_unfinished().
_unfinished: list[Running] = []


def end_unfinished() -> None:
    """Kills the audits that a failed test left running, and what they audited."""
    while _unfinished:
        running = _unfinished.pop()
        running.kill()
        running.report.unlink()


class Running:
    """An ``rsplice audit`` that runs; ``finish()`` waits for its end.

    :param command: what is audited, [] with ``-p`` among the options
    :param launcher: what is put in front of rsplice, such as unshare(1)
    :param violations: the violations that the audit may report; a sound kernel has none
    """

    def __init__(
        self,
        command: Sequence[str | bytes | Path],
        *options: str,
        launcher: Sequence[str] = (),
        rsplice: Sequence[str] = RSPLICE,
        stdin: File = subprocess.DEVNULL,
        stdout: File = subprocess.PIPE,
        env: dict[str, str] | None = None,
        violations: Collection[str] = (),
    ) -> None:
        self._violations = frozenset(violations)
        handle, name = tempfile.mkstemp(suffix=".json")
        os.close(handle)
        self.report = Path(name)
        wanted = [] if "--json" in options else ["--json", name]
        self.process = subprocess.Popen(
            [
                *launcher,
                *rsplice,
                "audit",
                *wanted,
                *options,
                *(["--", *command] if command else []),
            ],
            cwd=ROOT,
            env=environment() if env is None else env,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        _unfinished.append(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    def finish(self) -> Result:
        """Waits for the end and reads the report.

        AssertionError if it has a violation that was not expected: each audit of a program is a
        test for false alarms.
        """
        try:
            stdout, stderr = self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            _unfinished[:] = [running for running in _unfinished if running is not self]
            text = self.report.read_text()
            self.report.unlink()
        document = json.loads(text) if text else None
        findings = document["findings"] if document else []
        alarms = [f for f in findings if f["kind"] == "violation"]
        assert {f["name"] for f in alarms} <= self._violations, alarms
        return Result(
            self.process.returncode,
            stdout or b"",
            stderr.decode(errors="surrogateescape"),
            document,
        )

    def kill(self) -> None:
        """Kills rsplice and all of its descendants."""
        for pid in [*descendants_of(self.pid), self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # Not until its pipes end: a process that is no descendant any more may hold them.
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> Result:
        """Sends rsplice a signal, and finishes."""
        self.process.send_signal(number)
        return self.finish()


def audit(command: Sequence[str | bytes | Path], *options: str, **how: Any) -> Result:
    """Runs ``rsplice audit --json FILE OPTIONS -- COMMAND`` to its end; *how* as for Running."""
    return Running(command, *options, **how).finish()


@dataclass
class Driver:
    """The test driver: a static program that counts its own calls."""

    program: Path

    def command(self, report: Path, directory: Path, *arguments: str) -> list[str]:
        return [str(self.program), *arguments, "-d", str(directory), "-o", str(report)]

    def audit(
        self, directory: Path, *arguments: str, options: Sequence[str] = (), **how: Any
    ) -> tuple[Result, Counts]:
        """Audits one run of the driver: the audit, and the driver's own count.

        Skips the test where the kernel lacks what the driver was to do.
        """
        report = directory / "driver.json"
        result = audit(self.command(report, directory, *arguments), *options, **how)
        if result.status == 77:
            pytest.skip(result.stderr.splitlines()[0])
        assert result.status == 0, result.stderr
        return result, own_count(report)


def named_here(end: str) -> str:
    """What an audit on this kernel calls an end of a call.

    Before 5.11 the types of a module cannot be read, nor if a file of FUSE has a page cache.
    """
    hidden = kernel_version() < (5, 11) and Path("/sys/module/fuse/initstate").exists()
    return "fuse of unknown caching" if hidden and end in ("fuse", "fuse O_DIRECT") else end


def counts_of(calls: Iterable[dict[str, Any]]) -> Counts:
    """What a program says it did, with both legs of operations that have two."""
    total: Counts = {}
    for c in calls:
        legs = 2 if c["via"] in TWO_LEGS else 1
        key = c["via"], named_here(c["source"]), named_here(c["destination"])
        total[key] = (c["operations"], legs * c["bytes"])
    return total


def own_count(report: Path) -> Counts:
    """What the driver says it did."""
    return counts_of(json.loads(report.read_text())["calls"])


@contextmanager
def process(command: Sequence[str | Path], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs meanwhile, and is killed at the end; *how* as for Popen."""
    with subprocess.Popen(command, **how) as running:
        try:
            yield running
        finally:
            running.kill()
