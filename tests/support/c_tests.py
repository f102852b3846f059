# SPDX-License-Identifier: MIT
"""The C programs of tests/c: one test each, which say 0 passed, 1 failed, 77 cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

C_TESTS = Path(__file__).parent.parent / "c"
SKIPPED = 77
DEADLINE = 115  #: seconds; the programs give up by themselves before
HUGE_PAGES = 16  #: of 2 MiB, that the programs need


def skip_without(*programs: str) -> None:
    """Skips the test if one of *programs* is not installed."""
    if absent := [program for program in programs if not shutil.which(program)]:
        pytest.skip(f"not installed: {', '.join(absent)}")


@contextmanager
def reserved_huge_pages() -> Iterator[None]:
    """Reserves huge pages, if none are and root asks. Without them the programs try less."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    ours = os.geteuid() == 0 and setting.exists() and int(setting.read_text()) == 0
    if ours:
        setting.write_text(f"{HUGE_PAGES}\n")
    try:
        yield
    finally:
        if ours:
            setting.write_text("0\n")


@dataclass
class Programs:
    """The programs, built in *build* as they are needed."""

    build: Path
    sanitize: str = ""  #: as for -fsanitize=
    environment: dict[str, str] = field(default_factory=dict)

    def program(self, name: str) -> Path:
        """The program *name*, built."""
        done = subprocess.run(
            [
                *("make", "-s", "-C", C_TESTS, f"BUILD={self.build}"),
                *(f"SANITIZE={self.sanitize}", self.build / name),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.fail(f"{name} does not build: {done.stderr}", pytrace=False)
        return self.build / name

    def run(self, name: str, *arguments: str | Path, launcher: Sequence[str | Path] = ()) -> str:
        """Runs *name* to its end; what it printed. Fails or skips the test as it says."""
        done = subprocess.run(
            [*launcher, self.program(name), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DEADLINE,
            env={**os.environ, **self.environment},
        )
        if done.returncode == SKIPPED:
            pytest.skip(done.stderr.strip())
        if done.returncode:
            pytest.fail(f"{name}: {done.returncode}: {done.stderr[-3000:]}", pytrace=False)
        return done.stdout + done.stderr


def programs(factory: pytest.TempPathFactory) -> Programs:
    """The programs as they are, built once in a session."""
    skip_without("make", "cc")
    build = factory.getbasetemp() / "c-tests"
    build.mkdir(exist_ok=True)
    return Programs(build)
