# SPDX-License-Identifier: MIT
"""python -m benchmarks.performance: what librsplice gains, beside what it is compared with.

The same READs answered in every way that `rsplice workload fuse` has, pages fetched from a
server, and memory filled from a file: throughput, and the processor time that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import memory_state
from benchmarks import performance_report as report
from benchmarks.__main__ import machine
from benchmarks.stats import summarize
from benchmarks.tracers import ROOT, RSPLICE, Unavailable

SCHEMA = "rsplice.performance/1"
GIB = 1 << 30
BUFFER_SIZE = 1 << 20
THREADS = 2
START_S = 20.0

#: How READs are answered: options of `rsplice workload fuse`. Readahead is the default's, one READ,
#: in all of them; asking for it also has rsplice keep it going: RSPLICE_F_READAHEAD.
WAYS = {
    "copy": ("--mode", "copy"),
    "direct": ("--mode", "direct"),
    "splice": ("--mode", "splice"),
    "rsplice": ("--mode", "rsplice"),
    "rsplice-ahead": ("--mode", "rsplice", "--readahead", "1016K"),
    "passthrough": ("--mode", "passthrough"),
}
#: Whether the source's pages are in the page cache when the reading starts.
STATES = ("cold", "warm")
#: Cold as well, where the host has taken free memory back: these ways.
TAKEN_BACK = "taken back"
TAKEN_BACK_WAYS = ("copy", "direct", "splice", "rsplice-ahead")
REMOTE_MODES = ("copy", "rsplice")
FILLS = ("read-write", "read-mapping", "rsplice", "rsplice-thp", "rsplice-hugetlb")
PIECES = ("pieces-single", "pieces-batch")
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
FILL_SIZE = 256 << 20

Say = Callable[[str], None]
#: name -> figure -> one reading a round
Readings = dict[str, dict[str, list[float]]]


def add(readings: Readings, name: str, **figures: float) -> None:
    for figure, value in figures.items():
        readings.setdefault(name, {}).setdefault(figure, []).append(value)


def processor_seconds(pid: int) -> float:
    """What all threads of a process have run, in seconds (schedstat counts nanoseconds)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def children(pid: int) -> list[int]:
    """The processes that *pid* has started and not yet waited for."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def forget(path: Path) -> None:
    """Drops the clean pages of a file from the page cache."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(path: Path, buffer: memoryview) -> int:
    """Reads a file to its end; bytes."""
    total = 0
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            total += got
    return total


def make_file(path: Path, size: int) -> None:
    """A file of random bytes that are on the disk."""
    block = os.urandom(BUFFER_SIZE)
    with open(path, "wb", buffering=0) as file:
        for at in range(0, size, BUFFER_SIZE):
            # No two blocks alike, for disks that notice.
            file.write(at.to_bytes(8, "little") + block[8:])
        os.fsync(file.fileno())


@contextmanager
def served(source: Path, mount: Path, way: str) -> Iterator[int]:
    """The directory *source* shown on *mount*; the pid of the process that serves."""
    command = (
        *(*RSPLICE, "workload", "fuse", "--source", str(source), "--mount", str(mount)),
        *(*WAYS[way], "--threads", str(THREADS)),
    )
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:
        try:
            yield _server(process, mount)
        finally:
            process.terminate()


def _server(process: subprocess.Popen[str], mount: Path) -> int:
    until = time.monotonic() + START_S
    while not os.path.ismount(mount):
        if process.poll() is not None:
            assert process.stderr
            raise Unavailable(process.stderr.read().strip() or "the filesystem ended")
        if time.monotonic() > until:
            raise Unavailable("the filesystem was not mounted in time")
        time.sleep(0.02)
    for pid in children(process.pid):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "rsplice-fuse":
            return pid
    raise Unavailable("the process that serves was not found")


def read_served(source: Path, mount: Path, way: str, readings: Readings) -> None:
    """One round of one way, cold and warm, with memory that is in use."""
    _read(source, mount, way, STATES, readings)


def read_taken_back(source: Path, mount: Path, way: str, readings: Readings) -> None:
    """The same, cold, with memory that the host has taken back."""
    _read(source, mount, way, (TAKEN_BACK,), readings)


def _read(source: Path, mount: Path, way: str, states: Sequence[str], readings: Readings) -> None:
    buffer = memoryview(bytearray(BUFFER_SIZE))
    with served(source, mount, way) as server:
        (name,) = (path.name for path in source.iterdir())
        for state in states:
            forget(source / name)
            forget(mount / name)
            if state == TAKEN_BACK:
                memory_state.wait_until_taken_back()
            elif state == "cold":
                memory_state.take_into_use()
            else:
                read_all(source / name, buffer)
            before, started = processor_seconds(server), time.perf_counter()
            size = read_all(mount / name, buffer)
            seconds = time.perf_counter() - started
            cpu = processor_seconds(server) - before
            add(
                readings,
                f"{way} {state}",
                mib_per_s=size / seconds / (1 << 20),
                cpu_s_per_gib=cpu * GIB / size,
            )


def read_by_dd(path: Path, readings: Readings) -> None:
    """The source itself, without a filesystem in between: what the disk permits."""
    for name, flags in (("dd", ()), ("dd O_DIRECT", ("iflag=direct",))):
        forget(path)
        started = time.perf_counter()
        subprocess.run(
            ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none", *flags], check=True
        )
        seconds = time.perf_counter() - started
        add(readings, name, mib_per_s=path.stat().st_size / seconds / (1 << 20))


def fetch(size: int, mode: str, readings: Readings) -> None:
    """Files of a server behind a socket, read through the caching filesystem."""
    count = 4
    memory_state.take_into_use()
    done = _run(
        *(*RSPLICE, "workload", "recvpage", "--mode", mode, "--json"),
        *("--size", str(size), "--count", str(count)),
    )
    said = json.loads(done)
    cpu = said["reported"]["cpu_us_rsplice-recvpg"] / 1e6
    add(readings, mode, cpu_s_per_gib=cpu * GIB / said["reported"]["fuse_payload"])


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Unavailable(lines[-1] if lines else f"{command[0]}: status {done.returncode}")
    return done.stdout


def build_fill(directory: Path) -> Path:
    """Compiles benchmarks/fill.c with librsplice. Unavailable if that fails."""
    if not shutil.which("make") or not shutil.which("cc"):
        raise Unavailable("make or cc: not installed")
    _run("make", "-s", "-C", "csrc", f"BUILD={directory}", f"{directory}/librsplice.a")
    uring = subprocess.run(["pkg-config", "--libs", "liburing"], capture_output=True, text=True)
    program = directory / "fill"
    _run(
        *("cc", "-O2", "-o", str(program), "benchmarks/fill.c", f"{directory}/librsplice.a"),
        *("-pthread", *uring.stdout.split()),
    )
    return program


@contextmanager
def huge_pages(nr: int) -> Iterator[None]:
    """Keeps *nr* huge pages of 2 MiB ready, if nobody has asked for any. Unavailable."""
    before = HUGE_PAGES.read_text().strip()
    if before != "0":
        yield
        return
    try:
        HUGE_PAGES.write_text(str(nr))
    except OSError as error:
        raise Unavailable(f"no huge pages: {error.strerror}") from error
    try:
        if int(HUGE_PAGES.read_text()) < nr:
            raise Unavailable("memory has not enough huge pages free")
        yield
    finally:
        HUGE_PAGES.write_text(before)


def fill_memory(program: Path, file: Path, way: str, readings: Readings) -> None:
    """One way of benchmarks/fill.c."""
    if way == "rsplice-hugetlb":
        with huge_pages(FILL_SIZE >> 21):
            said = json.loads(_run(str(program), str(file), way))
    else:
        said = json.loads(_run(str(program), str(file), way))
    figures = {"seconds": said["seconds"]}
    if said["bytes"]:
        figures["mib_per_s"] = said["bytes"] / said["seconds"] / (1 << 20)
    if "cpu_seconds" in said:
        figures["cpu_s_per_gib"] = said["cpu_seconds"] * GIB / said["bytes"]
    if "calls" in said:
        figures["us_per_call"] = said["seconds"] * 1e6 / said["calls"]
    add(readings, way, **figures)


def python_calls(readings: Readings) -> None:
    """The least that a call does, from Python: as `calls` of benchmarks/fill.c."""
    from rsplice import rsplice

    one, two = os.pipe(), os.pipe()
    os.write(one[1], b"x")
    count = 20000
    started = time.perf_counter()
    for _ in range(count):
        rsplice(one[0], two[1], 1)
        rsplice(two[0], one[1], 1)
    seconds = time.perf_counter() - started
    for fd in (*one, *two):
        os.close(fd)
    add(readings, "python", us_per_call=seconds * 1e6 / (2 * count))


class _Measured:
    """Readings by part, and what could not be measured."""

    def __init__(self, say: Say) -> None:
        self.parts: dict[str, Readings] = {"fuse": {}, "remote": {}, "memory": {}, "calls": {}}
        self.missing: dict[str, str] = {}
        self._say = say

    def take(self, part: str, name: str, measure: Callable[..., None], *arguments: Any) -> None:
        """Calls measure(*arguments, readings); what is unavailable is not tried again."""
        if name in self.missing:
            return
        self._say(name)
        try:
            measure(*arguments, self.parts[part])
        except Unavailable as reason:
            self.missing[name] = str(reason)


def measure(size: int, rounds: int, say: Say) -> dict[str, Any]:
    """Every round measures everything once, every other round backwards: what disturbs the
    machine for a while then falls on all alike."""
    with tempfile.TemporaryDirectory(prefix="rsplice-bench-") as name:
        directory = Path(name)
        os.environ["TMPDIR"] = name
        source, mount = directory / "source", directory / "mnt"
        source.mkdir()
        mount.mkdir()
        file = source / "file"
        make_file(file, size)
        fill = build_fill(directory / "build")
        where = machine()
        done = _Measured(say)
        # First: what is measured later takes memory into use.
        for number in range(min(rounds, report.TAKEN_BACK_ROUNDS)):
            for way in TAKEN_BACK_WAYS[:: 1 if number % 2 == 0 else -1]:
                done.take("fuse", TAKEN_BACK, read_taken_back, source, mount, way)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            turn = 1 if number % 2 == 0 else -1
            done.take("fuse", "dd", read_by_dd, file)
            for way in list(WAYS)[::turn]:
                done.take("fuse", way, read_served, source, mount, way)
            for mode in REMOTE_MODES[::turn]:
                done.take("remote", f"recvpage {mode}", fetch, size // 8, mode)
            for fill_way in (*FILLS, *PIECES)[::turn]:
                done.take("memory", fill_way, fill_memory, fill, file, fill_way)
            done.take("memory", "memcpy", fill_memory, fill, file, "memcpy")
            done.take("calls", "calls", fill_memory, fill, file, "calls")
            done.take("calls", "python", python_calls)
    return {
        "schema": SCHEMA,
        "machine": where,
        "size": size,
        "rounds": rounds,
        "missing": done.missing,
        **{part: _summaries(readings) for part, readings in done.parts.items()},
    }


def _summaries(readings: Readings) -> dict[str, Any]:
    return {
        name: {figure: summarize(values).to_json() for figure, values in figures.items()}
        for name, figures in readings.items()
    }


def main() -> int:
    """0, or 1 with a line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__)
    parser.add_argument("-o", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--mib", type=int, default=1024, help="MiB of the file (default 1024)")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.mib < FILL_SIZE >> 20:
        parser.error(f"--rounds is at least 1, --mib at least {FILL_SIZE >> 20}")
    console = Console(stderr=True)
    start = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - start:5.0f} s  {text}", highlight=False)

    try:
        result = measure(arguments.mib << 20, arguments.rounds, say)
        report.show(Console(), result)
        if arguments.o:
            arguments.o.write_text(json.dumps(result, indent=2) + "\n")
        if arguments.write_docs:
            (ROOT / "docs" / "performance.md").write_text(report.markdown(result))
    except (OSError, Unavailable) as error:
        console.print(f"benchmarks: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
