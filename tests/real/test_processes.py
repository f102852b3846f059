# SPDX-License-Identifier: MIT
"""Who is followed: children, threads, exec'd images, reused pids, running processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rsplice.session import kernel_version
from tests.support.attached import wait_for_command, wait_until_attached
from tests.support.patience import DEADLINE, MANY
from tests.support.run import Counts, Driver, Result, Running, audit, own_count, process

pytestmark = pytest.mark.privileged

USER = "user memory"
READ = ("read", "ext4", USER)


#: What the driver does -> how many reads that is.
DESCENDANTS = {
    f"fork -n {MANY} -s 1": MANY,
    "fork-chain -n 97 -s 7": 97,
    "vfork -n 101 -s 7": 101,
    "threads -n 103 -s 7": 103,
    "orphan -n 23 -s 7": 23,
    "exec -n 23 -s 7": 23,
}
ALONE = (
    *("fork -n 23", "threads -n 23", "pid-reuse -n 23", "int80 -n 23"),
    *("read -n 23", "read -n 23 -s 65536", "mmap -n 23"),
)
ALL = (*DESCENDANTS, *ALONE)


@dataclass
class Family:
    """One audit of a shell that ran ALL, one after the other."""

    result: Result
    directory: Path

    def status(self, arguments: str) -> int:
        return int((self.directory / f"{ALL.index(arguments)}.status").read_text())

    def own(self, arguments: str) -> Counts:
        """The driver's own count; skips what this kernel cannot do."""
        if self.status(arguments) == 77:
            pytest.skip((self.directory / f"{ALL.index(arguments)}.err").read_text().strip())
        assert self.status(arguments) == 0
        return own_count(self.directory / f"{ALL.index(arguments)}.json")

    def named(self, arguments: str) -> list[dict[str, Any]]:
        """The processes of a run of the driver."""
        processes: list[dict[str, Any]] = self.result.json["processes"]
        return [process for process in processes if process["comm"] == comm_of(arguments)]


def comm_of(arguments: str) -> str:
    """The name of a run's processes; what is exec'd is called after /proc/self/exe."""
    return "exe" if arguments.startswith("exec") else f"case-{ALL.index(arguments)}"


@pytest.fixture(scope="module")
def family(driver: Driver, ext4: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = tmp_path_factory.mktemp("family")
    lines = [f"cd {directory}\n"]
    for i, arguments in enumerate(ALL):
        command = driver.command(
            directory / f"{i}.json", ext4, *arguments.split(), "-C", f"case-{i}"
        )
        lines.append(f"{shlex.join(command)} 2>{i}.err; echo $? >{i}.status\n")
    (directory / "script").write_text("".join(lines))
    return Family(audit(["sh", directory / "script"]), directory)


@pytest.mark.parametrize("arguments", DESCENDANTS)
def test_descendants_are_followed(family: Family, arguments: str) -> None:
    own = family.own(arguments)
    assert own[READ][0] == DESCENDANTS[arguments]
    assert family.result.counts(comm_of(arguments)) == own


def test_the_shell_and_its_descendants_are_all_there_is(family: Family) -> None:
    """Nobody else's calls are counted, and none is lost."""
    own = sum(
        n
        for arguments in ALL
        if not family.status(arguments)
        for n, _ in family.own(arguments).values()
    )
    shell = sum(n for n, _ in family.result.counts("sh").values())
    assert family.result.json["totals"]["operations"] == own + shell
    assert family.result.json["accuracy"]["events_lost"] == 0


def test_each_child_is_a_process_of_its_own_and_threads_are_not(family: Family) -> None:
    forked, threaded = (
        [path["operations"] for process in family.named(how) for path in process["paths"]]
        for how in ("fork -n 23", "threads -n 23")
    )
    assert forked == [1] * 23
    assert threaded == [23]


def test_a_reused_pid_is_another_process(family: Family) -> None:
    own = family.own("pid-reuse -n 23")
    reused = [p for p in family.result.json["processes"] if p["comm"].startswith("reuse-")]
    assert len({p["pid"] for p in reused}) == 1
    assert sorted(p["comm"] for p in reused) == sorted(f"reuse-{i}" for i in range(23))
    paths = [path for process in reused for path in process["paths"]]
    assert [path["operations"] for path in paths] == [1] * 23
    assert sum(path["payload_bytes"] for path in paths) == own[READ][1]


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
    assert READ in own_count(tmp_path / "outside.json")
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
    (path,) = (path for path in result.paths() if path["operations"])
    check_unknown(result, path, 23, 23 * 4096)
    assert result.json["accuracy"]["unknown_bytes"] == path["unknown"]


def test_32_bit_call_from_64_bit_code_is_counted_as_unknown(family: Family) -> None:
    own = family.own("int80 -n 23")
    (path,) = family.result.paths(comm_of("int80 -n 23"))
    assert own[READ][0] == 23
    check_unknown(family.result, path, *own[READ])


def check_unknown(result: Result, path: dict[str, Any], operations: int, nbytes: int) -> None:
    """All that was carried is unknown; where copies are measured, they are what is known of it."""
    assert (path["source"], path["destination"]) == ("unknown", "unknown")
    assert (path["operations"], path["payload_bytes"]) == (operations, nbytes)
    known = nbytes if result.measures else 0
    assert (path["copied"], path["unknown"]) == (known, nbytes - known)
    assert path["evidence"] == result.evidence("none")


def test_64_bit_calls_have_nothing_unknown(family: Family) -> None:
    """The twin of the two tests above."""
    (path,) = family.result.paths(comm_of("read -n 23"))
    assert {("read", path["source"], USER): (path["operations"], path["copied"])} == family.own(
        "read -n 23"
    )
    assert path["unknown"] == 0


def test_page_faults_and_fault_around(family: Family) -> None:
    """23 touches in windows of 64 KiB: as many faults, and 16 times the pages.

    The twin reads the same file. Where the kernel puts a program's own pieces differs between
    runs: by a few windows.
    """
    tables = {}
    for arguments in ("mmap -n 23", "read -n 23 -s 65536"):
        (process,) = family.named(arguments)
        tables[arguments.split()[0]] = process["page_tables"]
    faults = tables["mmap"]["faults"] - tables["read"]["faults"]
    pages = tables["mmap"]["mapped_pages"] - tables["read"]["mapped_pages"]
    assert abs(faults - 23) <= 5, faults
    assert abs(pages - 23 * 16) <= 5 * 16, pages


def test_page_cache_inserts(ext4: Path, tmp_path: Path) -> None:
    """A cold file of 23 pages comes in once; read again, nothing comes in."""
    source = ext4 / "cold"
    source.write_bytes(b"x" * 23 * 4096)
    with source.open("rb") as f:
        os.fsync(f.fileno())
    for name in ("first", "cold", "warm"):
        (tmp_path / name).symlink_to("/bin/cat")
    drop = f"dd if={source} iflag=nocache count=0 status=none"
    # The first brings in the rest: the program, the inode and its time of access.
    result = audit(
        ["sh", "-ec", f"cd {tmp_path}; ./first {source}; {drop}; ./cold {source}; ./warm {source}"]
    )
    inserted = {p["comm"]: p["page_cache"]["inserted_pages"] for p in result.json["processes"]}
    # Before 5.16 the read at the end of the file puts a page behind it (mm/filemap.c:filemap_read).
    behind = 1 if kernel_version() < (5, 16) else 0
    assert inserted["cold"] - inserted["warm"] == 23 + behind
