# SPDX-License-Identifier: MIT
"""Programs that nobody here wrote, with a prime number of operations and exact bytes.

Each runs under strace within the audit: every path's operations and bytes are held against
strace's return values. What the program is known to do is asserted on top.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.filesystems import Scratch
from tests.support.independent import cross_check
from tests.support.run import Result, audit, process

pytestmark = pytest.mark.privileged

USER = "user memory"
COUNT = 23
BLOCK = 131072  #: what cat and cp read at a time
SIZE = COUNT * BLOCK
Needs = Callable[..., None]


@pytest.fixture(autouse=True)
def strace(needs: Needs) -> None:
    needs("strace")


def expect(result: Result, path: tuple[str, str, str], operations: int, **counts: int) -> None:
    """Asserts the operations and all dispositions (those not given are 0) of a path."""
    found = result.path(*path)
    dispositions = ("copied", "shared", "moved", "direct", "remapped", "discarded", "unknown")
    assert {d: found[d] for d in dispositions} == {d: counts.pop(d, 0) for d in dispositions}
    assert found["operations"] == operations
    assert not counts


def test_cat_to_dev_null(scratch: Scratch) -> None:
    """cat copies each byte once, out of the page cache: /dev/null takes no copy."""
    file = scratch.file("a", SIZE)
    with open("/dev/null", "wb") as null:
        result, trace = cross_check(["cat", file], stdout=null)
    assert trace.files["read", str(file)] == SIZE
    expect(result, (scratch.kind, USER, "read"), COUNT, copied=SIZE)
    expect(result, (USER, "/dev/null", "write"), COUNT, discarded=SIZE)


def test_cat_alone_counts_the_same_without_strace(scratch: Scratch) -> None:
    file = scratch.file("a", SIZE)
    with open("/dev/null", "wb") as null:
        result = audit(["cat", file], stdout=null)
    read = result.path(scratch.kind, USER, "read")
    discarded = result.path(USER, "/dev/null", "write")
    assert (read["operations"], read["payload_bytes"], read["copy_bytes"]) == (COUNT, SIZE, SIZE)
    assert (discarded["payload_bytes"], discarded["copy_bytes"]) == (SIZE, 0)
    assert discarded["baseline_bytes"] == 0, "write(2) to /dev/null copies nothing either"
    assert result.json["exit_status"] == result.status == 0


def test_cat_through_a_pipe(scratch: Scratch) -> None:
    file = scratch.file("a", SIZE)
    result, _ = cross_check(["sh", "-c", f"cat {file} | cat >/dev/null"])
    expect(result, (scratch.kind, USER, "read"), COUNT, copied=SIZE)
    assert result.path(USER, "pipe", "write")["copied"] == SIZE
    assert result.path("pipe", USER, "read")["copied"] == SIZE
    assert result.path(USER, "/dev/null", "write")["discarded"] == SIZE


def test_cp_on_ext4_copies_through_a_pipe(ext4: Path, tmp_path: Path) -> None:
    """copy_file_range without reflink: the kernel splices, and the second half copies."""
    files = [Scratch(ext4, "ext4").file(f"cp{i}", 8 * 4096 + i) for i in range(COUNT)]
    total = sum(f.stat().st_size for f in files)
    (ext4 / "copies").mkdir()
    result, _ = cross_check(["cp", *files, ext4 / "copies"])
    assert all((ext4 / "copies" / f.name).read_bytes() == f.read_bytes() for f in files)
    expect(result, ("ext4", "ext4", "copy_file_range"), COUNT, shared=total, copied=total)
    assert result.path("ext4", "ext4", "copy_file_range")["payload_bytes"] == 2 * total
    assert "reflink" in result.path("ext4", "ext4", "copy_file_range")["why"]


def test_cp_reflink_on_ext4_fails_and_carries_nothing(ext4: Path) -> None:
    file = Scratch(ext4, "ext4").file("unlinked", SIZE)
    result, _ = cross_check(["cp", "--reflink=always", file, ext4 / "refused"])
    assert result.status == 1
    assert not [p for p in result.paths() if p["destination"] == "ext4"]


@pytest.mark.parametrize("option", ["--reflink=always", "--reflink=auto"])
def test_cp_reflink_on_btrfs_copies_nothing(btrfs: Path, option: str) -> None:
    files = [Scratch(btrfs, "btrfs").file(f"cp{i}{option}", 9 * 4096 + i) for i in range(COUNT)]
    (btrfs / f"copies{option}").mkdir()
    result, _ = cross_check(["cp", option, *files, btrfs / f"copies{option}"])
    total = sum(f.stat().st_size for f in files)
    expect(result, ("btrfs", "btrfs", "ioctl FICLONE"), COUNT, remapped=total)
    assert result.path("btrfs", "btrfs", "ioctl FICLONE")["copy_bytes"] == 0


def test_cp_without_reflink_on_btrfs_copies_twice(btrfs: Path) -> None:
    file = Scratch(btrfs, "btrfs").file("never", SIZE)
    result, _ = cross_check(["cp", "--reflink=never", file, btrfs / "never.copy"])
    expect(result, ("btrfs", USER, "read"), COUNT, copied=SIZE)
    expect(result, (USER, "btrfs", "write"), COUNT, copied=SIZE)


@pytest.mark.parametrize(
    ("flags", "source", "destination"),
    [
        ([], "", ""),
        (["iflag=direct"], " O_DIRECT", ""),
        (["oflag=direct"], "", " O_DIRECT"),
        (["iflag=direct", "oflag=direct"], " O_DIRECT", " O_DIRECT"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_dd(scratch: Scratch, flags: list[str], source: str, destination: str) -> None:
    file = scratch.file("a", 29 * 65536)
    command = ["dd", f"if={file}", f"of={scratch.path}/b", "bs=64K", f"count={COUNT}", *flags]
    result, _ = cross_check(command)
    size = COUNT * 65536
    for kind, path in (
        (source, (scratch.kind + source, USER, "read")),
        (destination, (USER, scratch.kind + destination, "write")),
    ):
        expect(result, path, COUNT, **{"direct" if kind else "copied": size})


def test_tail(scratch: Scratch) -> None:
    wanted = COUNT * 8192
    file = scratch.file("a", SIZE)
    result, trace = cross_check(["tail", "-c", str(wanted), file])
    assert result.stdout == file.read_bytes()[-wanted:]
    assert trace.files["read", str(file)] == wanted
    assert result.path(scratch.kind, USER, "read")["copied"] == wanted
    assert result.path(USER, "pipe", "write")["copied"] == wanted


def test_rsync(scratch: Scratch, needs: Needs) -> None:
    """Two processes and a socket pair: each byte is copied four times."""
    needs("rsync")
    files = [scratch.file(f"f{i}", 40009 + i) for i in range(COUNT)]
    total = sum(f.stat().st_size for f in files)
    copies = scratch.path / "copies"
    result, trace = cross_check(["rsync", "--whole-file", *files, f"{copies}/"])
    assert result.status == 0
    assert sorted(f.name for f in copies.iterdir()) == sorted(f.name for f in files)
    assert sum(n for (via, f), n in trace.files.items() if via == "read" and f in map(str, files))
    assert result.path(scratch.kind, USER, "read")["copied"] == total
    assert result.path(USER, scratch.kind, "write")["copied"] == total
    assert result.path(USER, "unix", "write")["copied"] > total
    assert result.path("unix", USER, "read")["copied"] > total


def test_tar(scratch: Scratch) -> None:
    files = [scratch.file(f"f{i}", 40009 + i) for i in range(COUNT)]
    archive = scratch.path / "archive.tar"
    result, _ = cross_check(["tar", "cf", archive, *(str(f) for f in files)])
    assert result.path(scratch.kind, USER, "read")["copied"] == sum(f.stat().st_size for f in files)
    expect(
        result,
        (USER, scratch.kind, "write"),
        archive.stat().st_size // 10240,
        copied=archive.stat().st_size,
    )


def test_socat_relays_a_file(scratch: Scratch, needs: Needs) -> None:
    needs("socat")
    file = scratch.file("a", COUNT * 8192)
    copy = scratch.path / "b"
    result, _ = cross_check(["socat", "-u", "-b", "8192", f"FILE:{file}", f"CREATE:{copy}"])
    assert copy.read_bytes() == file.read_bytes()
    expect(result, (scratch.kind, USER, "read"), COUNT, copied=COUNT * 8192)
    expect(result, (USER, scratch.kind, "write"), COUNT, copied=COUNT * 8192)


def test_socat_through_a_unix_socket(scratch: Scratch, needs: Needs) -> None:
    needs("socat")
    file = scratch.file("a", COUNT * 8192)
    name = scratch.path / "socket"
    with process(["socat", "-u", f"UNIX-LISTEN:{name}", "OPEN:/dev/null"]) as server:
        while not name.exists():
            assert server.poll() is None
            os.sched_yield()
        result, _ = cross_check(["socat", "-u", "-b", "8192", f"FILE:{file}", f"UNIX:{name}"])
    expect(result, (USER, "unix", "write"), COUNT, copied=COUNT * 8192)
