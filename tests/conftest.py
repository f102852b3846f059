# SPDX-License-Identifier: MIT
"""Fixtures that several test modules use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.filesystems import Scratch, filesystem_of, loop_mount, missing
from tests.support.run import Driver, end_unfinished, process

# The same examples every time, and no database: a run can be repeated.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

# Shells start what is in the background with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

DRIVERS = Path(__file__).parent / "drivers"


@cache
def _no_bpf() -> str | None:
    from rsplice.tracers.capability import reason

    return reason()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked privileged where BPF programs cannot be loaded, and says why."""
    if item.get_closest_marker("privileged") and (why := _no_bpf()):
        pytest.skip(why)


@pytest.fixture
def needs_bpf() -> None:
    """Skips with the one-line reason why BPF cannot be used here."""
    if why := _no_bpf():
        pytest.skip(why)


@pytest.fixture(scope="session")
def needs() -> Callable[..., None]:
    """Call it with the names of programs: skips the test if one is not installed."""

    def check(*programs: str) -> None:
        if absent := [p for p in programs if not shutil.which(p)]:
            pytest.skip(f"not installed: {', '.join(absent)}")

    return check


def _make(build: Path, target: str) -> None:
    done = subprocess.run(
        ["make", "-s", "-C", DRIVERS, f"BUILD={build}", target], capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"the test driver does not build: {done.stderr}", pytrace=False)


@pytest.fixture(scope="session")
def build_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the drivers are built; an emulated machine finds them built by its host."""
    built = os.environ.get("RSPLICE_TEST_DRIVERS")
    return Path(built) if built else tmp_path_factory.mktemp("drivers")


@pytest.fixture(scope="session")
def driver(build_directory: Path, needs: Callable[..., None]) -> Driver:
    """The test driver, built once."""
    needs("make", "cc")
    if not Path("/usr/include/liburing.h").exists():
        pytest.skip("not installed: liburing-dev (liburing.h)")
    _make(build_directory, "all")
    return Driver(build_directory / "driver")


@pytest.fixture(scope="session")
def compat32(build_directory: Path, needs: Callable[..., None]) -> Path:
    """A 32-bit program that reads 23 times 4096 bytes from its standard input."""
    needs("make", "cc")
    probe = ["cc", "-m32", "-ffreestanding", "-nostdlib", "-static", "-x", "c", "/dev/null"]
    built = subprocess.run([*probe, "-o", build_directory / "probe"], capture_output=True)
    if built.returncode:
        pytest.skip("not installed: a compiler with -m32 (gcc-multilib)")
    _make(build_directory, "compat32")
    return build_directory / "compat32"


def _mounted(filesystem: str) -> Iterator[Path]:
    if why := missing(filesystem):
        pytest.skip(why)
    with loop_mount(filesystem) as point:
        yield point


@pytest.fixture(scope="session")
def btrfs() -> Iterator[Path]:
    """The mount point of a scratch btrfs."""
    yield from _mounted("btrfs")


@pytest.fixture(scope="session")
def xfs() -> Iterator[Path]:
    """The mount point of a scratch xfs."""
    yield from _mounted("xfs")


@pytest.fixture(scope="session")
def ext4() -> Iterator[Path]:
    """The mount point of a scratch ext4: what the tests' own directory lies on is any."""
    yield from _mounted("ext4")


@pytest.fixture(scope="session")
def scratch_filesystem() -> Iterator[Scratch]:
    kind = "ext4" if filesystem_of("/usr/lib") == "xfs" else "xfs"
    for path in _mounted(kind):
        yield Scratch(path, kind)


@pytest.fixture
def scratch(scratch_filesystem: Scratch) -> Iterator[Scratch]:
    """An empty directory on a filesystem of another kind than the programs' own libraries."""
    with tempfile.TemporaryDirectory(dir=scratch_filesystem.path) as name:
        yield Scratch(Path(name), scratch_filesystem.kind)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    with process(["sleep", "1000"]) as sleep:
        yield sleep


@pytest.fixture(autouse=True)
def _no_audit_left() -> Iterator[None]:
    yield
    end_unfinished()
