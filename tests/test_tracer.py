# SPDX-License-Identifier: MIT
"""The tracer by itself: ways to read kernel memory, full maps, whom it follows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsplice.audit import Endpoint
from rsplice.errors import RspliceError
from rsplice.events import Tally
from rsplice.launch import Command
from rsplice.rules import Leg, classify
from rsplice.tracers import counters
from rsplice.tracers import layout as layouts
from rsplice.tracers import tracer as tracers
from rsplice.tracers.btf import Btf
from rsplice.tracers.kinds import kind_name
from rsplice.tracers.tracer import Tracer
from tests.support.run import Driver

pytestmark = pytest.mark.privileged

COUNT = 23
SIZE = 8192

# Splices COUNT times SIZE bytes from a file to a pipe, and from there to /dev/null.
SPLICER = f"""
import os, sys
source, null = os.open(sys.argv[1], os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
r, w = os.pipe()
for _ in range({COUNT}):
    assert os.splice(source, w, {SIZE}, offset_src=0) == {SIZE}
    assert os.splice(r, null, {SIZE}) == {SIZE}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=[True, False], ids=["direct loads", "bpf_probe_read_kernel"])
def tracer(request: pytest.FixtureRequest) -> Iterator[Tracer]:
    tracer = Tracer(direct=request.param)
    yield tracer
    tracer.close()


def follow(tracer: Tracer, *argv: str) -> int:
    """Runs a command under *tracer*; its pid."""
    with open(os.devnull, "w") as null:
        command = Command(argv, output=null.fileno())
        tracer.follow(command.pid)
        command.release()
        assert command.wait() == 0
    return command.pid


def splices(tracer: Tracer, pid: int) -> dict[str, Tally]:
    """The tallies of *pid*'s splices, by destination."""
    keys = {p.key for p in tracer.counters.read().processes if p.pid == pid}
    return {
        t.destination.kind: t
        for t in tracer.counters.read().tallies
        if t.via == "splice" and t.process in keys
    }


def test_both_ways_to_read_kernel_memory_see_the_same(tracer: Tracer, data: Path) -> None:
    pid = follow(tracer, sys.executable, "-c", SPLICER, str(data))
    seen = splices(tracer, pid)
    assert seen["pipe"].operations == seen["/dev/null"].operations == COUNT
    assert seen["pipe"].identity == {(0, "shared"): COUNT * SIZE}
    assert seen["/dev/null"].nbytes == COUNT * SIZE
    assert tracer.counters.read().events_lost == 0


def test_identity_off_compares_no_pages(data: Path) -> None:
    tracer = Tracer(identity="off")
    try:
        pid = follow(tracer, sys.executable, "-c", SPLICER, str(data))
        assert splices(tracer, pid)["pipe"].nbytes == COUNT * SIZE
        assert splices(tracer, pid)["pipe"].identity == {}
        assert "net_dev_start_xmit" not in tracer.attached
    finally:
        tracer.close()


def test_a_sample_counts_all_calls_and_compares_some(data: Path) -> None:
    tracer = Tracer(identity="sample")
    try:
        rounds = SPLICER.replace(f"range({COUNT})", "range(509)")
        pid = follow(tracer, sys.executable, "-c", rounds, str(data))
        tally = splices(tracer, pid)["pipe"]
        assert tally.operations == 509
        assert 0 < tally.identity[0, "shared"] < 509 * SIZE / 4
    finally:
        tracer.close()


def test_full_maps_are_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"MAX_PROCESSES": 7, "MAX_TALLIES": 3, "MAX_FLOWS": 64, "SLOTS": 64}
    monkeypatch.setattr(tracers, "map_sizes", lambda cpus: sizes)
    tracer = Tracer()
    try:
        follow(
            tracer, "sh", "-c", f"for i in $(seq {COUNT}); do cat /etc/hostname; done >/dev/null"
        )
        reading = tracer.counters.read()
        assert len(reading.processes) <= 7
        assert len(reading.tallies) <= 3
        assert reading.events_lost >= COUNT - 7
    finally:
        tracer.close()


@pytest.mark.parametrize(
    ("arguments", "lost"), [("io_uring-read", 23), ("io_uring-read -F sqpoll", 1), ("read", 0)]
)
def test_requests_that_no_probe_sees_are_counted_as_lost(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, tmp_path: Path, arguments: str, lost: int
) -> None:
    """Of an io_uring, as on kernels before 5.19. A polled one may tell of more than itself."""
    resolve = layouts.resolve

    def without_rings(btf: Btf) -> layouts.Layout:
        layout = resolve(btf)
        layout.missing["io_uring"] = "this kernel has no io_kiocb.cqe.user_data"
        return layout

    monkeypatch.setattr(layouts, "resolve", without_rings)
    tracer = Tracer()
    try:
        words = [*arguments.split(), "-f", "file", "-n", str(COUNT)]
        follow(tracer, *driver.command(tmp_path / "own.json", tmp_path, *words))
        reading = tracer.counters.read()
        assert not any(tally.via.startswith("io_uring") for tally in reading.tallies)
        if "sqpoll" in arguments:
            assert lost <= reading.events_lost <= lost + COUNT
        else:
            assert reading.events_lost == lost
    finally:
        tracer.close()


def test_room_is_made_for_more_processes_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"MAX_PROCESSES": 31, "MAX_TALLIES": 512, "MAX_FLOWS": 64, "SLOTS": 64}
    monkeypatch.setattr(tracers, "map_sizes", lambda cpus: sizes)
    monkeypatch.setattr(counters, "_RETIRE_AT", 5)
    tracer = Tracer()
    try:
        pids = []
        for _ in range(101):
            pids.append(follow(tracer, "cat", "/etc/hostname"))
            tracer.counters.make_room()
        reading = tracer.counters.read()
        assert reading.events_lost == 0
        assert sorted(p.pid for p in reading.processes) == sorted(pids)
        length = os.stat("/etc/hostname").st_size
        written = [t for t in reading.tallies if t.via == "write"]
        assert len(written) == 101
        assert {t.nbytes for t in written} == {length}
    finally:
        tracer.close()


def test_processes_that_meet_in_one_slot_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    sizes = {"MAX_PROCESSES": 512, "MAX_TALLIES": 512, "MAX_FLOWS": 64, "SLOTS": 2}
    monkeypatch.setattr(tracers, "map_sizes", lambda cpus: sizes)
    tracer = Tracer()
    try:
        # Three at once, then one after the others have left their slot.
        commands = [Command([sys.executable, "-c", SPLICER, str(data)]) for _ in range(3)]
        for command in commands:
            tracer.follow(command.pid)
        for command in commands:
            command.release()
        assert [command.wait() for command in commands] == [0, 0, 0]
        last = follow(tracer, sys.executable, "-c", SPLICER, str(data))
        for pid in [*(command.pid for command in commands), last]:
            assert splices(tracer, pid)["pipe"].nbytes == COUNT * SIZE
        assert tracer.counters.alive() == []
    finally:
        tracer.close()


def test_what_nobody_follows_is_not_counted(tracer: Tracer, data: Path) -> None:
    subprocess.run([sys.executable, "-c", SPLICER, str(data)], check=True)
    assert tracer.counters.read().tallies == []


def test_two_tracers_count_the_same(data: Path) -> None:
    first, second = Tracer(), Tracer()
    try:
        command = Command([sys.executable, "-c", SPLICER, str(data)])
        for tracer in (first, second):
            tracer.follow(command.pid)
        command.release()
        assert command.wait() == 0
        one, other = (splices(t, command.pid) for t in (first, second))
        assert one["pipe"].identity == other["pipe"].identity == {(0, "shared"): COUNT * SIZE}
    finally:
        first.close()
        second.close()


def test_following_all_sees_others_but_not_itself(data: Path) -> None:
    tracer = Tracer(follow_all=True)
    try:
        child = subprocess.Popen([sys.executable, "-c", SPLICER, str(data)])
        assert child.wait() == 0
        assert splices(tracer, child.pid)["pipe"].nbytes == COUNT * SIZE
        assert os.getpid() not in [p.pid for p in tracer.counters.read().processes]
    finally:
        tracer.close()


def test_a_pid_that_is_not_there_is_one_line() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    tracer = Tracer()
    try:
        with pytest.raises(RspliceError, match=f"no process {child.pid}: .*check the pid"):
            tracer.follow(child.pid)
    finally:
        tracer.close()


def test_closing_detaches_every_program(data: Path) -> None:
    def programs() -> set[str]:
        """Descriptors of this process that hold something of BPF."""
        folder = Path("/proc/self/fd")
        links = {fd.name: os.readlink(fd) for fd in folder.iterdir() if fd.is_symlink()}
        return {name for name, target in links.items() if "bpf" in target}

    before = programs()
    tracer = Tracer()
    assert len(programs() - before) >= len(tracer.attached)
    tracer.close()
    assert programs() <= before


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (1 << 56, "unknown"),
        (2 << 56, "user memory"),
        (3 << 56, "pipe"),
        (4 << 56, "fifo"),
        (5 << 56 | 1 << 20 | 3, "/dev/null"),
        (5 << 56 | 1 << 20 | 5, "/dev/zero"),
        (5 << 56 | 10 << 20 | 229, "fuse device"),
        (5 << 56 | 136 << 20 | 7, "/dev/pts"),
        (5 << 56 | 999 << 20 | 7, "char device 999:7"),
        (6 << 56, "block device"),
        (6 << 56 | 1, "ublk disk"),
        (8 << 56 | 1, "kernel buffer"),
        (9 << 56, "fuse passthrough"),
        (7 << 56 | 2 << 40 | 1 << 32 | 6, "tcp"),
        (7 << 56 | 10 << 40 | 2 << 32 | 17, "udp"),
        (7 << 56 | 2 << 40 | 3 << 32 | 1, "raw"),
        (7 << 56 | 1 << 40 | 1 << 32, "unix"),
        (7 << 56 | 38 << 40, "af_alg"),
        (7 << 56 | 99 << 40, "socket family 99"),
        (0xFFFF888000001000, "ext4"),
        (0xFFFF888000002000, "tmpfs"),
        (0xFFFF888000002001, "memfd"),
        (0xFFFF888000003000, "unknown filesystem"),
    ],
)
def test_ends_have_the_names_that_users_know(end: int, name: str) -> None:
    known = {0xFFFF888000001000: "ext4", 0xFFFF888000002000: "tmpfs"}
    assert kind_name(end, known) == kind_name(end, known, False) == name


@pytest.mark.parametrize("name", ["fuse", "fuseblk", "virtiofs"])
def test_files_of_fuse_that_cannot_be_read_are_not_taken_for_cached_ones(name: str) -> None:
    end = 0xFFFF888000001000
    assert kind_name(end, {end: name}) == name
    unknown = kind_name(end, {end: name}, False)
    for direct in (False, True):
        read = Leg("read", 0, Endpoint(unknown, direct), Endpoint("user memory"))
        assert classify(read, (5, 10)).disposition == "unknown"
