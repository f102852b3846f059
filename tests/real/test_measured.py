# SPDX-License-Identifier: MIT
"""Copies that are counted where the kernel makes them, against what the driver says it carried.

The kernel has to have fentry or kprobes: `make test-kernels` runs this on kernels that have, at
the callers of the copying functions and, by the module rsplice_copies, at these themselves.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from rsplice.events import Tally
from rsplice.launch import Command
from rsplice.tracers.program import BpfError
from rsplice.tracers.providers import MODULE_TRACEPOINT, How
from rsplice.tracers.tracer import Tracer
from tests.support.run import Driver
from tests.support.watch import TRIES, offering, trampolines

pytestmark = pytest.mark.privileged

USER = "user memory"
PAGES = 64
COUNT = 23
THREADS = 1 << 22  # PID_MAX_LIMIT of include/linux/threads.h

#: The driver's arguments, and the path whose every byte is copied once.
COPIED = {
    "read -f file": ("ext4", USER, "read"),
    "read -f file -s 4099 -a 101": ("ext4", USER, "read"),
    "preadv2 -f memfd": ("memfd", USER, "preadv2"),
    "write -t file": (USER, "ext4", "write"),
    "pwritev -t memfd": (USER, "memfd", "pwritev"),
    "read -f /dev/zero": ("/dev/zero", USER, "read"),
    "read -f pipe": ("pipe", USER, "read"),
    "writev -t pipe": (USER, "pipe", "writev"),
    "vmsplice -f pipe": ("pipe", USER, "vmsplice"),
    "splice -f pipe -t file": ("pipe", "ext4", "splice"),
    "splice -f pipe -t memfd": ("pipe", "memfd", "splice"),
    "sendmsg -t unix": (USER, "unix", "sendmsg"),
    "recvfrom -f unixgram": ("unix", USER, "recvfrom"),
    "sendto -t udp": (USER, "udp", "sendto"),
    "sendto -t tcp": (USER, "tcp", "sendto"),
    "recvmsg -f tcp": ("tcp", USER, "recvmsg"),
    "io_uring-read -f file": ("ext4", USER, "io_uring read"),
    "io_uring-read -f file -F async": ("ext4", USER, "io_uring read"),
    "io_uring-read -f file -F async,defer": ("ext4", USER, "io_uring read"),
    "io_uring-write -t file -F async,defer": (USER, "ext4", "io_uring write"),
    "io_uring-write -t file -F sqpoll": (USER, "ext4", "io_uring write"),
    "process_vm_readv": (USER, USER, "process_vm_readv"),
}
#: The twins: nothing of them is copied.
NOT_COPIED = {
    "read -f direct": ("ext4 O_DIRECT", USER, "read"),
    "write -t direct": (USER, "ext4 O_DIRECT", "write"),
    "write -t /dev/null": (USER, "/dev/null", "write"),
    "splice -f file -t pipe": ("ext4", "pipe", "splice"),
    "splice -f memfd -t pipe": ("memfd", "pipe", "splice"),
    "splice -f pipe -t pipe": ("pipe", "pipe", "splice"),
    "splice -f pipe -t tcp": ("pipe", "tcp", "splice"),
    "sendfile -f file -t tcp": ("ext4", "tcp", "sendfile"),
    "tee -f pipe -t pipe": ("pipe", "pipe", "tee"),
    "vmsplice": (USER, "pipe", "vmsplice"),
    "recvfrom -f tcp -F trunc": ("tcp", USER, "recvfrom"),
}


@dataclass
class Run:
    """One run of a program: its tallies, and what it printed."""

    tallies: list[Tally]
    status: int

    def path(self, source: str, destination: str, via: str) -> list[Tally]:
        return [
            t
            for t in self.tallies
            if (str(t.source), str(t.destination), t.via) == (source, destination, via)
        ]


class Watch:
    """One tracer for all programs: it knows by process what an audit adds up."""

    def __init__(self) -> None:
        self.tracer = Tracer()
        self._known: set[int] = set()
        self._lost = 0  # events, up to now

    def run(self, *argv: object) -> Run:
        """Runs a program. It is run again where the kernel has passed over some of it."""
        for _ in range(TRIES):
            run = self._run(*argv)
            if run:
                return run
        raise AssertionError("events were lost")

    def _run(self, *argv: object) -> Run | None:
        with open("/dev/null", "w") as null:
            command = Command([str(word) for word in argv], output=null.fileno())
            self.tracer.follow(command.pid)
            command.release()
            status = command.wait() or 0
        reading = self.tracer.counters.read()
        before, self._lost = self._lost, reading.events_lost
        mine = {p.key for p in reading.processes} - self._known
        self._known |= mine
        if self._lost > before:
            return None
        return Run([t for t in reading.tallies if t.process in mine], status)


@pytest.fixture(scope="module", params=["callers", "breakpoints", "module"])
def watch(request: pytest.FixtureRequest) -> Iterator[Watch]:
    with ExitStack() as undo:
        if request.param == "module":
            if not (module := os.environ.get("RSPLICE_TEST_MODULE")):
                pytest.skip("the module rsplice_copies was not built for this kernel")
            subprocess.run(("insmod", module), check=True)
            undo.callback(subprocess.run, ("rmmod", "rsplice_copies"), check=True)
        with offering(request.param):
            watch = Watch()
        undo.callback(watch.tracer.close)
        if not watch.tracer.measures:
            pytest.skip("this kernel has neither fentry nor kprobes for BPF")
        taken = f"{How.MODULE.value} {MODULE_TRACEPOINT}"
        assert (taken in watch.tracer.measured_at) == (request.param == "module")
        if request.param == "breakpoints":
            assert trampolines(watch.tracer) == []
        yield watch


def drive(watch: Watch, driver: Driver, directory: Path, arguments: str) -> tuple[Run, Path]:
    report = directory / "own.json"
    run = watch.run(*driver.command(report, directory, *arguments.split()))
    if run.status == 77:
        pytest.skip("this kernel has no such operation")
    assert run.status == 0
    return run, report


def carried(report: Path, source: str, destination: str, via: str) -> int:
    """Bytes of a path by the driver's own account."""
    (call,) = (
        c
        for c in json.loads(report.read_text())["calls"]
        if (c["source"], c["destination"], c["via"]) == (source, destination, via)
    )
    return int(call["bytes"])


@pytest.mark.parametrize("arguments", COPIED)
def test_every_byte_of_a_copying_call_is_measured_once(
    arguments: str, watch: Watch, driver: Driver, ext4: Path
) -> None:
    run, report = drive(watch, driver, ext4, arguments)
    tallies = run.path(*COPIED[arguments])
    measured = sum(t.measured.get((leg, "copied"), 0) for t in tallies for leg in (0, 1))
    assert measured == carried(report, *COPIED[arguments]) > 0
    assert all(not t.extra for t in tallies)


@pytest.mark.parametrize("arguments", NOT_COPIED)
def test_nothing_is_measured_where_nothing_is_copied(
    arguments: str, watch: Watch, driver: Driver, ext4: Path
) -> None:
    run, report = drive(watch, driver, ext4, arguments)
    tallies = run.path(*NOT_COPIED[arguments])
    assert sum(t.nbytes for t in tallies) == carried(report, *NOT_COPIED[arguments]) > 0
    assert all(not t.measured and not t.extra for t in tallies)


@pytest.mark.parametrize(
    ("mode", "copied"),
    [("splice", 0), ("splice-mapped", PAGES), ("teed", PAGES), ("halves", PAGES)],
)
def test_a_reply_copies_the_pages_that_it_does_not_move(
    mode: str, copied: int, watch: Watch, driver: Driver, ext4: Path
) -> None:
    server = driver.program.with_name("fuse_server")
    run = watch.run(server, mode, "-n", PAGES, "-t", 0, "-d", ext4)
    assert run.status == 0
    replies = run.path("pipe", "fuse device", "fuse reply")
    assert sum(t.measured.get((0, "copied"), 0) for t in replies) == copied * 4096
    assert sum(t.identity.get((0, "moved"), 0) for t in replies) == (PAGES - copied) * 4096


def test_a_page_that_is_given_and_not_taken_is_refused_once(
    watch: Watch, driver: Driver, ext4: Path
) -> None:
    server = driver.program.with_name("fuse_server")
    before = {f.first["pid"] for f in watch.tracer.counters.read().findings}
    for mode, reason in (("gift", "still mapped"), ("gift-unmapped", "swap-backed")):
        assert watch.run(server, mode, "-n", PAGES, "-t", 0, "-d", ext4).status == 0
        refused = {
            f.first["reason"]: f.count
            for f in watch.tracer.counters.read().findings
            if f.name == "steal-refused" and f.first["pid"] not in before
        }
        before = {f.first["pid"] for f in watch.tracer.counters.read().findings}
        assert refused == {reason: PAGES}


def test_calls_whose_arguments_find_no_room_are_lost(driver: Driver, ext4: Path) -> None:
    """As with too many threads that sleep in such calls. Measured without them, they would be 0."""
    with offering("breakpoints"):
        watch = Watch()
    with closing(watch.tracer):
        if not watch.tracer.measures:
            pytest.skip("this kernel has no kprobes for BPF")
        kept = watch.tracer._program.map("kept_calls")
        with pytest.raises(BpfError):  # of threads that no kernel has, until it is full
            for thread in range(THREADS, 2 * THREADS):
                kept.put(struct.pack("=II", thread, 0), bytes(32))
        before = watch.tracer.counters.read().events_lost
        command = driver.command(ext4 / "own.json", ext4, "read", "-f", "file", "-n", str(COUNT))
        with pytest.raises(AssertionError, match="events were lost"):
            watch.run(*command)
        assert watch.tracer.counters.read().events_lost >= before + TRIES * COUNT
