# SPDX-License-Identifier: MIT
"""Who is followed: children, threads, exec'd images, reused pids, running processes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.attached import wait_for_command, wait_until_attached
from tests.support.patience import DEADLINE, MANY
from tests.support.run import Driver, Result, Running, audit, own_count, process

pytestmark = pytest.mark.privileged

READ = ("read", "ext4", "user memory")


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (f"fork -n {MANY} -s 1", MANY),
        ("fork-chain -n 97 -s 7", 97),
        ("vfork -n 101 -s 7", 101),
        ("threads -n 103 -s 7", 103),
        ("orphan -n 23 -s 7", 23),
        ("exec -n 23 -s 7", 23),
    ],
)
def test_descendants_are_followed(driver: Driver, ext4: Path, arguments: str, count: int) -> None:
    result, own = driver.audit(ext4, *arguments.split())
    assert own[READ][0] == count
    assert result.counts() == own
    assert result.json["totals"]["operations"] == count
    assert result.json["accuracy"]["events_lost"] == 0


def test_each_child_is_a_process_of_its_own_and_threads_are_not(driver: Driver, ext4: Path) -> None:
    forked, _ = driver.audit(ext4, "fork", "-n", "23")
    threaded, _ = driver.audit(ext4, "threads", "-n", "23")
    assert [p["paths"][0]["operations"] for p in forked.json["processes"] if p["paths"]] == [1] * 23
    assert [p["paths"][0]["operations"] for p in threaded.json["processes"] if p["paths"]] == [23]


def test_a_reused_pid_is_another_process(driver: Driver, ext4: Path) -> None:
    result, own = driver.audit(ext4, "pid-reuse", "-n", "23")
    reused = [p for p in result.json["processes"] if p["comm"].startswith("reuse-")]
    assert result.counts() == own
    assert len({p["pid"] for p in reused}) == 1
    assert sorted(p["comm"] for p in reused) == sorted(f"reuse-{i}" for i in range(23))
    assert all(p["paths"][0]["operations"] == 1 for p in reused)


def test_running_process_is_followed_from_now_on(
    driver: Driver, ext4: Path, tmp_path: Path
) -> None:
    """-p: the driver waits until the audit is attached; its children are followed too."""
    report = tmp_path / "report.json"
    command = driver.command(report, ext4, "fork", "-n", "23", "-W")
    with process(command, stdin=subprocess.PIPE) as waiting:
        assert waiting.stdin
        running = Running([], "-p", str(waiting.pid))
        wait_until_attached(running.pid)
        waiting.stdin.close()
        result = running.finish()
    assert result.status == 0
    assert result.counts() == own_count(report)
    assert result.json["exit_status"] is None


def leave_behind(command: list[str]) -> Running:
    """An audit of a shell that has ended with status 7, and whose child waits for its input."""
    shell = 'exec 3<&0; "$@" <&3 & exit 7'
    running = Running(["sh", "-c", shell, "sh", *command, "-W"], stdin=subprocess.PIPE)
    assert running.process.stderr
    assert b"sh has ended; following 1 " in running.process.stderr.readline()
    return running


def test_what_the_command_leaves_behind_is_followed_to_its_end(
    driver: Driver, ext4: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    result = leave_behind(driver.command(report, ext4, "read")).finish()
    assert result.status == result.json["exit_status"] == 7
    assert result.counts("driver") == own_count(report)


def test_sigterm_ends_the_waiting_for_what_is_left_behind(
    driver: Driver, ext4: Path, tmp_path: Path
) -> None:
    running = leave_behind(driver.command(tmp_path / "report.json", ext4, "read"))
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=DEADLINE) == 7
    assert running.finish().counts("driver") == {}


def test_other_processes_are_not_counted(driver: Driver, ext4: Path, tmp_path: Path) -> None:
    """The twin of -p: what runs meanwhile, and is no descendant, stays out."""
    outside = driver.command(tmp_path / "outside.json", ext4, "read", "-n", "1009")
    running = Running(["sleep", "1000"])
    sleeper = wait_for_command(running.pid, "sleep")
    subprocess.run(outside, check=True)
    os.kill(sleeper, signal.SIGTERM)
    assert ("read", "ext4", "user memory") in own_count(tmp_path / "outside.json")
    operations = sum(n for n, _ in running.finish().counts().values())
    assert operations < 100


def test_duration_ends_an_audit_of_a_running_process(sleeper: subprocess.Popen[bytes]) -> None:
    result = audit([], "-p", str(sleeper.pid), "--duration", "0.5")
    assert sleeper.poll() is None
    assert result.status == 0
    assert result.json["totals"]["operations"] == 0


def test_32_bit_process_is_counted_as_unknown(compat32: Path, ext4: Path) -> None:
    source = ext4 / "compat"
    source.write_bytes(b"x" * 23 * 4096)
    with source.open("rb") as stdin:
        result = audit([compat32], stdin=stdin)
    assert result.status == 0
    check_unknown(result, 23, 23 * 4096)


def test_32_bit_call_from_64_bit_code_is_counted_as_unknown(driver: Driver, ext4: Path) -> None:
    result, own = driver.audit(ext4, "int80")
    assert own[READ][0] == 23
    check_unknown(result, *own[READ])


def check_unknown(result: Result, operations: int, nbytes: int) -> None:
    """All that was carried is unknown; where copies are measured, they are what is known of it."""
    totals = result.json["totals"]
    assert (totals["operations"], totals["payload_bytes"]) == (operations, nbytes)
    assert {"copied": totals["copied"], "unknown": totals["unknown"]} == (
        {"copied": nbytes, "unknown": 0} if result.measures else {"copied": 0, "unknown": nbytes}
    )
    assert result.json["accuracy"]["unknown_bytes"] == totals["unknown"]
    (path,) = (path for path in result.paths() if path["operations"])
    assert (path["source"], path["destination"]) == ("unknown", "unknown")
    assert path["evidence"] == result.evidence("none")


def test_64_bit_calls_have_nothing_unknown(driver: Driver, ext4: Path) -> None:
    """The twin of the two tests above."""
    result, own = driver.audit(ext4, "read")
    assert result.counts() == own
    assert result.json["totals"]["unknown"] == 0


def test_page_faults_and_fault_around(driver: Driver, ext4: Path) -> None:
    """23 touches in windows of 64 KiB: as many faults, and 16 times the pages.

    The twin reads the same file. Where the kernel puts a program's own pieces differs between
    runs: by a few windows.
    """
    mapped, _ = driver.audit(ext4, "mmap", "-n", "23")
    read, _ = driver.audit(ext4, "read", "-n", "23", "-s", "65536")
    faults = mapped.json["page_tables"]["faults"] - read.json["page_tables"]["faults"]
    pages = mapped.json["page_tables"]["mapped_pages"] - read.json["page_tables"]["mapped_pages"]
    assert abs(faults - 23) <= 5, faults
    assert abs(pages - 23 * 16) <= 5 * 16, pages


def test_page_cache_inserts(ext4: Path, driver: Driver) -> None:
    """A cold file of 23 pages comes in once; read again, nothing comes in."""
    source = ext4 / "cold"
    source.write_bytes(b"x" * 23 * 4096)
    audit(["cat", source])  # brings in the rest: the program, the inode and its time of access
    with source.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = audit(["cat", source])
    warm = audit(["cat", source])
    inserted = cold.json["page_cache"]["inserted_pages"] - warm.json["page_cache"]["inserted_pages"]
    assert inserted == 23
