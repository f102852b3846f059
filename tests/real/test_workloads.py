# SPDX-License-Identifier: MIT
"""Every workload and mode: its own count of its calls against the audit's, and what became of
the bytes.

All run in one audit, each under process names of its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rsplice.session import kernel_version
from rsplice.workloads import memfd
from tests.support.filesystems import Scratch
from tests.support.run import ROOT, TWO_LEGS, Counts, Result, audit

pytestmark = pytest.mark.privileged

COUNT = 23
USER = "user memory"
#: What the interpreter and its loader make for themselves.
INTERPRETER = ("read", "write", "pread64")

# The workloads of [[TMPDIR, argument...]...], each in a process of its own, and every process of
# it named after the case. What it prints and returns goes to NUMBER.json, .err and .status.
PROGRAM = """
import argparse, json, os, sys, tempfile
from rsplice.commands import workload
from rsplice.errors import RspliceError
from rsplice.workloads import core

rename = core.set_process_name
parser = argparse.ArgumentParser()
workload.prepare_parser(parser)
for number, (tempfile.tempdir, *arguments) in enumerate(json.loads(sys.argv[1])):
    if not (pid := os.fork()):
        for descriptor, name in ((1, "json"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        core.set_process_name = lambda name: rename(f"c{number}-{name}")
        core.set_process_name("main")
        try:
            sys.exit(workload.run(parser.parse_args(arguments)))
        except RspliceError as error:
            sys.exit(str(error))
    with open(f"{number}.status", "w") as status:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=status)
"""

SHARED, COPIED, MOVED = ("shared",), ("copied",), ("moved",)
DISPOSITIONS = ("copied", "shared", "moved", "direct", "remapped", "discarded", "unknown")
LOOP_SECTOR = 512  #: bytes: what O_DIRECT on a loop device is aligned to
FILE, PIPE, TCP = "ext4", "pipe", "tcp"


@dataclass(frozen=True)
class Leg:
    """A path of a workload: what becomes of its bytes, and how often it carries them all."""

    via: str
    source: str
    destination: str
    dispositions: tuple[str, ...]
    evidence: str
    times: int = 1


@dataclass(frozen=True)
class Case:
    """One run of a workload, and all the paths that it has."""

    arguments: str
    size: int
    legs: tuple[Leg, ...]

    @property
    def name(self) -> str:
        return f"{self.arguments} {self.size}".replace("--", "").replace(" ", "-")


def case(arguments: str, size: int, *legs: Leg) -> Case:
    return Case(arguments, size, legs)


RECEIVED = Leg("recvfrom", TCP, USER, COPIED, "measured")
READ = Leg("readv", FILE, USER, COPIED, "inferred")
LENT = Leg("splice", FILE, PIPE, SHARED, "identity")
MOVED_ON = Leg("splice", PIPE, PIPE, MOVED, "identity")
TAKEN = Leg("readv", PIPE, USER, COPIED, "inferred")
GIVEN = Leg("vmsplice", USER, PIPE, SHARED, "identity")


def written(via: str, destination: str, evidence: str = "inferred") -> Leg:
    return Leg(via, USER, destination, COPIED, evidence)


def tees(size: int, outputs: int) -> Case:
    teed = Leg("tee", PIPE, PIPE, SHARED, "identity", outputs - 1)
    taken = dataclasses.replace(TAKEN, times=outputs)
    return case(f"tee --threads {outputs}", size, LENT, teed, MOVED_ON, taken)


CASES = [
    case("relay --mode read-write --threads 3", 4099, READ, written("writev", FILE)),
    case("relay --mode read-write", 16384, READ, written("writev", FILE)),
    case("relay --mode splice", 4099, LENT, Leg("splice", PIPE, FILE, COPIED, "identity")),
    case("relay --mode splice", 150_001, LENT, Leg("splice", PIPE, FILE, COPIED, "identity")),
    *(
        case(
            f"relay --mode io_uring{more}",
            size,
            Leg("io_uring read", FILE, USER, COPIED, "inferred"),
            written("io_uring write", FILE),
        )
        for size, more in ((4099, ""), (16384, " --threads 3"))
    ),
    *(
        case(f"relay --mode {via}", size, Leg(via, FILE, FILE, SHARED + COPIED, evidence))
        for size in (4099, 16384)
        for via, evidence in (("sendfile", "inferred"), ("copy_file_range", "identity"))
    ),
    case("serve --mode write", 4099, READ, written("writev", TCP), RECEIVED),
    case("serve --mode write --threads 3", 150_001, READ, written("writev", TCP), RECEIVED),
    *(
        case(
            f"serve --mode sendfile{more}",
            size,
            Leg("sendfile", FILE, TCP, SHARED, "identity"),
            RECEIVED,
        )
        for size, more in ((4099, ""), (150_001, " --threads 3"))
    ),
    *(
        case(
            f"serve --mode splice{more}",
            size,
            LENT,
            Leg("splice", PIPE, TCP, SHARED, "identity"),
            RECEIVED,
        )
        for size, more in ((4099, ""), (150_001, " --threads 3"))
    ),
    *(
        case(
            f"serve --mode zerocopy{more}", size, READ, written("sendto", TCP, "declared"), RECEIVED
        )
        for size, more in ((4099, ""), (150_001, " --threads 3"))
    ),
    case("gift --mode gift", 16384, GIVEN, TAKEN),
    case("gift --mode gift --threads 3", 1 << 18, GIVEN, TAKEN),
    case("gift --mode lend", 4099, GIVEN, TAKEN),
    case("gift --mode lend --threads 3", 150_001, GIVEN, TAKEN),
    case("tee --threads 1", 4099, LENT, MOVED_ON, TAKEN),
    tees(4099, 5),
    tees(150_001, 3),
    case("memfd --mode read --threads 3", 4099, READ, written("writev", "memfd")),
    case("memfd --mode read", 150_001, READ, written("writev", "memfd")),
    case("memfd --mode mmap", 150_001, READ),
]

RSPLICE_CASES = [
    case("memfd --mode rsplice", 4099),
    case("memfd --mode rsplice --threads 3", 65536),
    case("memfd --mode rsplice", 150_001),
]


@dataclass
class Matrix:
    """One audit of all cases, and what each of them says of itself."""

    result: Result
    directory: Path

    def own(self, case: Case) -> dict[str, Any]:
        """What the workload printed; skips what this kernel does not have."""
        number = index(case)
        if int((self.directory / f"{number}.status").read_text()):
            error = (self.directory / f"{number}.err").read_text().strip()
            if error.startswith("no io_uring"):
                pytest.skip(error)
            pytest.fail(error)
        own: dict[str, Any] = json.loads((self.directory / f"{number}.json").read_text())
        assert not own["skipped"]
        return own

    def own_counts(self, case: Case) -> Counts:
        """Operations and payload, with both legs of operations that have two."""
        return {
            (c["via"], c["source"], c["destination"]): (
                c["operations"],
                c["bytes"] * (2 if c["via"] in TWO_LEGS else 1),
            )
            for c in self.own(case)["calls"]
        }

    def all_paths(self, case: Case) -> list[dict[str, Any]]:
        """What the audit has of the case's processes."""
        return [
            path
            for process in self.result.json["processes"]
            if process["comm"].startswith(f"c{index(case)}-")
            for path in process["paths"]
        ]

    def paths(self, case: Case) -> list[dict[str, Any]]:
        """The same but for what the interpreter does itself."""
        return [path for path in self.all_paths(case) if path["via"] not in INTERPRETER]

    def counts(self, case: Case) -> Counts:
        return {
            (p["via"], p["source"], p["destination"]): (p["operations"], p["payload_bytes"])
            for p in self.paths(case)
        }


def index(case: Case) -> int:
    return [*CASES, *RSPLICE_CASES].index(case)


@pytest.fixture(scope="module")
def matrix(
    ext4: Path, scratch_filesystem: Scratch, tmp_path_factory: pytest.TempPathFactory
) -> Matrix:
    """All cases run by one interpreter under one audit."""
    directory = tmp_path_factory.mktemp("workloads")
    cases = []
    for each in [*CASES, *RSPLICE_CASES]:
        where = ext4 if each in CASES else scratch_filesystem.path
        more = ["--size", str(each.size), "--count", str(COUNT), "--json"]
        cases.append([str(where), *each.arguments.split(), *more])
    program = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    command = ["env", "-C", str(directory), f"PYTHONPATH={ROOT}", *program]
    # Linux 7.0 and later lose some where more threads run than CPUs (docs/kernels.md).
    for _ in range(3 if kernel_version() >= (7, 0) else 1):
        result = audit(command)
        assert result.status == 0, result.stderr
        if not result.json["accuracy"]["events_lost"]:
            return Matrix(result, directory)
    raise AssertionError("events were lost")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_audit_counts_what_the_workload_counts(case: Case, matrix: Matrix) -> None:
    own = matrix.own_counts(case)
    assert matrix.counts(case) == own
    expected = {
        (leg.via, leg.source, leg.destination): leg.times
        * (2 if leg.via in TWO_LEGS else 1)
        * COUNT
        * case.size
        for leg in case.legs
    }
    assert {path: nbytes for path, (_, nbytes) in own.items()} == expected


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_disposition(case: Case, matrix: Matrix) -> None:
    matrix.own(case)
    paths = {(p["via"], p["source"], p["destination"]): p for p in matrix.paths(case)}
    for leg in case.legs:
        path = paths[leg.via, leg.source, leg.destination]
        each = path["payload_bytes"] // len(leg.dispositions)
        assert {d: path[d] for d in DISPOSITIONS if path[d]} == dict.fromkeys(
            leg.dispositions, each
        )
        evidence = leg.evidence
        if leg.dispositions == COPIED and evidence != "declared":
            evidence = matrix.result.evidence(evidence)
        elif matrix.result.measures and leg.dispositions == SHARED + COPIED:
            evidence = "identity"  # of the pages that are shared, the weaker of the two
        # A reader that is quicker than the call's return leaves no page to compare.
        drained = {"inferred"} if leg.destination == "pipe" else set()
        assert path["evidence"] in {evidence} | drained


@pytest.mark.parametrize(
    "case", [c for c in CASES if "zerocopy" in c.arguments], ids=lambda c: c.name
)
def test_zerocopy_is_what_the_kernel_said(case: Case, matrix: Matrix) -> None:
    """The audit and the sender have it from the same notifications, each by itself."""
    reported = matrix.own(case)["reported"]
    operations, nbytes = matrix.own_counts(case)["sendto", USER, TCP]
    (sent,) = (p for p in matrix.paths(case) if p["via"] == "sendto")
    assert reported["notified"] == reported["notified_copied"] == operations
    assert reported["notified_copied_bytes"] == sent["copied"] == nbytes


@pytest.mark.parametrize("case", RSPLICE_CASES, ids=lambda c: c.name)
def test_rsplice_filled_what_it_says_it_filled(
    case: Case, matrix: Matrix, scratch_filesystem: Scratch
) -> None:
    """librsplice's word on each byte against the calls that it was seen to make."""
    own, kind = matrix.own(case), scratch_filesystem.kind
    assert sum(own["reported"].values()) == COUNT * case.size
    assert [(c["via"], c["source"], c["bytes"]) for c in own["calls"]] == [
        ("rsplice", kind, COUNT * case.size)
    ]
    seen: Counter[str] = Counter()
    for path in matrix.all_paths(case):
        # Nothing else that the interpreter reads lies on this filesystem.
        if path["source"].startswith(kind) and path["via"] != "read":
            seen.update({d: path[d] for d in DISPOSITIONS if path[d]})
    assert seen == {d: n for d, n in own["reported"].items() if n}
    chunks = [n % memfd.FILE_PARTS * case.size for n in range(COUNT)]
    whole = case.size // LOOP_SECTOR * LOOP_SECTOR
    assert seen["direct"] == sum(whole for offset in chunks if not offset % LOOP_SECTOR)
