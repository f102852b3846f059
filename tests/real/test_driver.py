# SPDX-License-Identifier: MIT
"""Every operation of the test driver: the audit's count against the driver's own.

All run in one audit, each under a process name of its own.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.run import Counts, Driver, Result, audit, own_count

pytestmark = pytest.mark.privileged

COUNT = 23
SIZE = 16384
USER = "user memory"


@dataclass(frozen=True)
class Case:
    """One run of the driver, and the path that it is about.

    :param expected: disposition -> its share of the payload, None where it depends on how the
        kernel laid out a socket buffer, and may be unknown
    """

    arguments: str
    source: str
    destination: str
    via: str
    expected: dict[str, int] | None
    evidence: str | None = None
    filesystem: str = "ext4"

    @property
    def name(self) -> str:
        return self.arguments.replace(" ", "")


def reads(via: str, source: str, kind: str, disposition: str = "copied", more: str = "") -> Case:
    arguments = f"{via.replace('io_uring ', 'io_uring-')} -f {source} {more}".strip()
    return Case(arguments, kind, USER, via, {disposition: 1})


def writes(via: str, sink: str, kind: str, disposition: str = "copied", more: str = "") -> Case:
    arguments = f"{via.replace('io_uring ', 'io_uring-')} -t {sink} {more}".strip()
    return Case(arguments, USER, kind, via, {disposition: 1})


def relays(
    via: str,
    source: str,
    sink: str,
    kinds: tuple[str, str],
    expected: dict[str, int] | None,
    more: str = "",
) -> Case:
    arguments = f"{via.replace('io_uring ', 'io_uring-')} -f {source} -t {sink} {more}".strip()
    # A pipe shows its pages, a file's show themselves when they leave a socket.
    seen = kinds[1] == "pipe" or source == "file"
    shared = expected is not None and set(expected) <= {"shared", "moved"}
    return Case(arguments, *kinds, via, expected, "identity" if seen and shared else None)


FILE_KINDS = [("file", "ext4"), ("memfd", "memfd")]
STREAM_KINDS = [
    ("pipe", "pipe"),
    ("fifo", "fifo"),
    ("tcp", "tcp"),
    ("udp", "udp"),
    ("unix", "unix"),
    ("unixgram", "unix"),
]
SOCKET_KINDS = STREAM_KINDS[2:]
SHARED, MOVED, COPIED = {"shared": 1}, {"moved": 1}, {"copied": 1}
DIRECT = "ext4 O_DIRECT"

CASES = [
    *(reads(v, *k) for v in ("read", "readv") for k in FILE_KINDS + STREAM_KINDS),
    *(reads(v, *k) for v in ("pread64", "preadv", "preadv2") for k in FILE_KINDS),
    *(writes(v, *k) for v in ("write", "writev") for k in FILE_KINDS + STREAM_KINDS),
    *(writes(v, *k) for v in ("pwrite64", "pwritev", "pwritev2") for k in FILE_KINDS),
    reads("read", "file", "ext4", more="-s 4099 -a 101"),
    reads("read", "/dev/zero", "/dev/zero"),
    reads("read", "direct", DIRECT, "direct"),
    reads("pread64", "direct", DIRECT, "direct", "-a 4096"),
    writes("write", "direct", DIRECT, "direct"),
    writes("pwrite64", "direct", DIRECT, "direct"),
    writes("write", "/dev/null", "/dev/null", "discarded"),
    # What the socket is for, a hash or a cipher, is not seen.
    Case("write -t alg", USER, "af_alg", "write", None),
    # Pages by reference, and what breaks that.
    relays("splice", "file", "pipe", ("ext4", "pipe"), SHARED),
    relays("splice", "file", "pipe", ("ext4", "pipe"), SHARED, "-s 4099 -a 101"),
    relays("splice", "memfd", "pipe", ("memfd", "pipe"), SHARED),
    relays("splice", "direct", "pipe", (DIRECT, "pipe"), {"direct": 1}),
    relays("splice", "/dev/zero", "pipe", ("/dev/zero", "pipe"), COPIED),
    relays("splice", "pipe", "pipe", ("pipe", "pipe"), MOVED),
    relays("splice", "fifo", "pipe", ("fifo", "pipe"), MOVED),
    relays("splice", "pipe", "file", ("pipe", "ext4"), COPIED),
    relays("splice", "pipe", "file", ("pipe", "ext4"), COPIED, "-F move"),
    relays("splice", "pipe", "memfd", ("pipe", "memfd"), COPIED),
    relays("splice", "pipe", "/dev/null", ("pipe", "/dev/null"), {"discarded": 1}),
    relays("splice", "pipe", "tcp", ("pipe", "tcp"), SHARED),
    relays("splice", "pipe", "udp", ("pipe", "udp"), None),
    relays("splice", "pipe", "unix", ("pipe", "unix"), None),
    relays("splice", "pipe", "alg", ("pipe", "af_alg"), None),
    Case("splice -f tcp -t pipe", "tcp", "pipe", "splice", SHARED),
    relays("splice", "unix", "pipe", ("unix", "pipe"), None),
    relays("tee", "pipe", "pipe", ("pipe", "pipe"), SHARED),
    relays("sendfile", "file", "tcp", ("ext4", "tcp"), SHARED),
    relays("sendfile", "direct", "tcp", (DIRECT, "tcp"), {"direct": 1, "shared": 1}),
    relays("sendfile", "file", "pipe", ("ext4", "pipe"), None),
    relays("sendfile", "file", "file", ("ext4", "ext4"), {"shared": 1, "copied": 1}),
    relays("sendfile", "file", "unix", ("ext4", "unix"), None),
    relays("sendfile", "file", "/dev/null", ("ext4", "/dev/null"), {"shared": 1, "discarded": 1}),
    relays("copy_file_range", "file", "file", ("ext4", "ext4"), {"shared": 1, "copied": 1}),
    Case("copy_file_range", "btrfs", "btrfs", "copy_file_range", {"remapped": 1}, None, "btrfs"),
    Case("FICLONE", "btrfs", "btrfs", "ioctl FICLONE", {"remapped": 1}, None, "btrfs"),
    Case("FICLONERANGE", "btrfs", "btrfs", "ioctl FICLONERANGE", {"remapped": 1}, None, "btrfs"),
    Case("FICLONE -n 11", "xfs", "xfs", "ioctl FICLONE", {"remapped": 1}, None, "xfs"),
    Case("vmsplice", USER, "pipe", "vmsplice", SHARED, "identity"),
    Case("vmsplice -F gift", USER, "pipe", "vmsplice", SHARED, "identity"),
    Case("vmsplice -f pipe", "pipe", USER, "vmsplice", COPIED),
    # Sockets.
    *(writes(v, *k) for v in ("sendto", "sendmsg") for k in SOCKET_KINDS),
    *(reads(v, *k) for v in ("recvfrom", "recvmsg") for k in SOCKET_KINDS),
    *(Case(f"sendmmsg -t {t}", USER, k, "sendmmsg", COPIED) for t, k in SOCKET_KINDS),
    *(Case(f"recvmmsg -f {f}", k, USER, "recvmmsg", COPIED) for f, k in SOCKET_KINDS),
    # Loopback delivers to a socket of the same machine: the kernel says COPIED.
    dataclasses.replace(writes("sendto", "tcp", "tcp", more="-F zerocopy"), evidence="declared"),
    writes("sendmsg", "tcp", "tcp", more="-F zerocopy"),
    writes("sendto", "udp", "udp", more="-F zerocopy"),
    reads("recvfrom", "tcp", "tcp", "discarded", "-F trunc"),
    reads("recvmsg", "tcp", "tcp", "discarded", "-F trunc"),
    reads("recvfrom", "tcp", "tcp", more="-F peek"),
    reads("recvmsg", "unix", "unix", more="-F peek"),
    # Between processes.
    Case("process_vm_readv", USER, USER, "process_vm_readv", COPIED),
    Case("process_vm_writev", USER, USER, "process_vm_writev", COPIED),
    # io_uring: inline, by a worker, by the polling thread.
    *(
        reads(f"io_uring {v}", "file", "ext4", more=m)
        for v in ("read", "readv", "read_fixed")
        for m in ("", "-F async", "-F sqpoll")
    ),
    *(
        writes(f"io_uring {v}", "file", "ext4", more=m)
        for v in ("write", "writev", "write_fixed")
        for m in ("", "-F async", "-F sqpoll")
    ),
    # By a worker, and completed by the thread that waits.
    reads("io_uring read", "file", "ext4", more="-F async,defer"),
    writes("io_uring write", "file", "ext4", more="-F async,defer"),
    reads("io_uring read", "direct", DIRECT, "direct"),
    writes("io_uring write", "direct", DIRECT, "direct"),
    reads("io_uring read_multishot", "pipe", "pipe"),
    reads("io_uring recv", "tcp", "tcp"),
    reads("io_uring recvmsg", "tcp", "tcp"),
    Case("io_uring-recv_multishot", "tcp", USER, "io_uring recv", COPIED),
    writes("io_uring send", "tcp", "tcp"),
    writes("io_uring sendmsg", "tcp", "tcp"),
    writes("io_uring send_zc", "tcp", "tcp"),
    Case("io_uring-send_zc_fixed", USER, "tcp", "io_uring send_zc", COPIED),
    writes("io_uring sendmsg_zc", "tcp", "tcp"),
    relays("io_uring splice", "file", "pipe", ("ext4", "pipe"), SHARED),
    relays("io_uring splice", "pipe", "tcp", ("pipe", "tcp"), SHARED),
    relays("io_uring tee", "pipe", "pipe", ("pipe", "pipe"), SHARED),
]


@dataclass
class Matrix:
    """One audit of all cases, and what the driver says of each."""

    result: Result
    directory: Path

    def status(self, case: Case) -> int:
        return int((self.directory / f"{CASES.index(case)}.status").read_text())

    def error(self, case: Case) -> str:
        return (self.directory / f"{CASES.index(case)}.err").read_text().strip()

    def own(self, case: Case) -> Counts:
        return own_count(self.directory / f"{CASES.index(case)}.json")

    def path(self, case: Case) -> dict[str, Any]:
        """The path that *case* is about, of its own process."""
        found = [
            p
            for p in self.result.paths(comm_of(case))
            if (p["source"], p["destination"], p["via"])
            == (case.source, case.destination, case.via)
        ]
        assert len(found) == 1
        return found[0]


def comm_of(case: Case) -> str:
    return f"case-{CASES.index(case)}"


@pytest.fixture(scope="module")
def matrix(
    driver: Driver,
    ext4: Path,
    btrfs: Path,
    xfs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Matrix:
    """All cases run by one shell under one audit."""
    directory = tmp_path_factory.mktemp("matrix")
    mounts = {"ext4": ext4, "btrfs": btrfs, "xfs": xfs}
    script = directory / "script"
    lines = []
    for i, case in enumerate(CASES):
        arguments = [*case.arguments.split(), "-C", comm_of(case)]
        command = driver.command(directory / f"{i}.json", mounts[case.filesystem], *arguments)
        lines.append(f"{shlex.join(command)} 2>{i}.err; echo $? >{i}.status\n")
    script.write_text(f"cd {directory}\n" + "".join(lines))
    return Matrix(audit(["/bin/sh", script]), directory)


@pytest.fixture
def done(matrix: Matrix) -> Callable[[Case], Matrix]:
    """Skips a case that this kernel cannot do, and says what the kernel lacks."""

    def check(case: Case) -> Matrix:
        if matrix.status(case) == 77:
            pytest.skip(matrix.error(case))
        assert matrix.status(case) == 0, matrix.error(case)
        return matrix

    return check


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_counts_equal_the_drivers_own(case: Case, done: Callable[[Case], Matrix]) -> None:
    matrix = done(case)
    own = matrix.own(case)
    assert (case.via, case.source, case.destination) in own, "the case names a path it does not use"
    assert matrix.result.counts(comm_of(case)) == own


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_disposition(case: Case, done: Callable[[Case], Matrix]) -> None:
    matrix = done(case)
    path = matrix.path(case)
    bytes_once = matrix.own(case)[case.via, case.source, case.destination][1]
    dispositions = {
        d: path[d]
        for d in ("copied", "shared", "moved", "direct", "remapped", "discarded", "unknown")
        if path[d]
    }
    assert sum(dispositions.values()) == bytes_once
    assert path["why"]
    if case.expected is not None:
        assert path["unknown"] == 0, path["why"]
        parts = sum(case.expected.values())
        assert dispositions == {d: n * bytes_once // parts for d, n in case.expected.items()}
    if case.evidence:
        assert path["evidence"] == case.evidence


def test_the_shell_and_every_case_are_all_there_is(matrix: Matrix) -> None:
    """Totals are the sum over processes: nothing is counted outside of them."""
    total = matrix.result.json["totals"]
    for name in ("operations", "payload_bytes", "copy_bytes", "avoided_bytes", "unknown"):
        assert total[name] == sum(p[name] for p in matrix.result.paths())
    assert matrix.result.json["accuracy"]["events_lost"] == 0


ZEROCOPY = [c for c in CASES if "zerocopy" in c.arguments or "_zc" in c.arguments]


@pytest.mark.parametrize("case", ZEROCOPY, ids=lambda c: c.name)
def test_zerocopy_agrees_with_the_kernels_own_word(
    case: Case, done: Callable[[Case], Matrix]
) -> None:
    """What the error queue or the completion said about each send."""
    matrix = done(case)
    report = json.loads((matrix.directory / f"{CASES.index(case)}.json").read_text())
    assert report["notified"] == COUNT
    assert matrix.path(case)["copied"] == report["notified_copied"] * SIZE
