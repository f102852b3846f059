# SPDX-License-Identifier: MIT
"""What is said of a limit that failed."""

from __future__ import annotations

import pytest

from rsplice.audit import Audit, Counts, Evidence, Finding, Path, Process
from rsplice.dashboards.limits_text import failure_lines
from rsplice.limits import parse_limit
from tests.test_report import EVIL, EVIL_SHOWN, audit_of, read_path, sample, unknown_path

ACCURACY = (
    "accuracy: 13 probes attached, 1 missing (filemap_read: no kprobes here -> read copies are "
    "inferred), 0 events lost, 4099 bytes unknown"
)


def lines(audit: Audit, text: str) -> list[str]:
    return failure_lines(audit, parse_limit(text))


def test_copies_are_told_with_path_evidence_reason_finding_and_accuracy() -> None:
    assert lines(sample(), "copied>0") == [
        "copied>0: 110592 bytes copied",
        "ext4 -> user memory via pread64: payload 92.0 KiB, copied 92.0 KiB, "
        "1.00 copies per byte, measured",
        "    pread64 copies from the page cache",
        "    by cp[7]",
        "user memory -> block device /dev/nvme0n1p1 via io_uring write: payload 8.00 KiB, "
        "copied 16.0 KiB, 2.00 copies per byte, inferred",
        "    bounced",
        "    by cp[7]",
        "missed move: steal-refused, 3 times",
        "    first: pid 7, seen large folio",
        "    try O_DIRECT",
        ACCURACY,
    ]


def test_unknown_bytes_are_told_with_their_path() -> None:
    assert lines(sample(), "unknown>0") == [
        "unknown>0: 4099 bytes unknown",
        "tcp -> user memory via recvfrom: payload 4.00 KiB, copied ?, ? copies per byte, none",
        "    unknown 4.00 KiB",
        f"    by {EVIL_SHOWN}[11]",
        ACCURACY,
    ]


def test_a_finding_is_told_with_its_advice_and_no_other_finding() -> None:
    assert lines(sample(), "violation") == [
        "violation: violation: double-owner, once",
        "violation: double-owner, once",
        rf"    first: comm {EVIL_SHOWN}, page frame 4711",
        "    report it",
        ACCURACY,
    ]


def test_lost_events_are_told_by_the_accuracy_line() -> None:
    audit = audit_of(read_path())
    audit.accuracy.events_lost = 7
    told = lines(audit, "lost>0")
    assert told[0] == "lost>0: 7 events lost"
    assert [line for line in told[1:] if "7 events lost" in line] == told[1:]


@pytest.mark.parametrize("text", ["copied>1MiB", "lost>0", "hazard", "violation:leaked"])
def test_nothing_is_said_of_a_limit_that_does_not_hold(text: str) -> None:
    assert lines(sample(), text) == []


def test_the_worst_come_first_and_the_rest_are_counted() -> None:
    paths = [
        Path("ext4", f"to{n}", "read", Counts(n, n, n, copied=n, evidence=Evidence.INFERRED))
        for n in range(1, 14)
    ]
    audit = audit_of(*paths)
    audit.findings = [Finding(f"n{i}", "missed move", 1, {}, "") for i in range(11)]
    told = lines(audit, "copied>0")
    assert [line.split()[2] for line in told if "->" in line] == [
        f"to{n}" for n in range(13, 3, -1)
    ]
    assert "and 3 more paths, all in the JSON" in told
    assert "and 1 more finding, all in the JSON" in told


def test_processes_are_named_most_bytes_first() -> None:
    audit = audit_of(read_path(5 * 23))
    audit.processes = [Process(n, f"p{n}", [read_path(n)]) for n in (3, 11, 5, 7)]
    assert "    by p11[11], p7[7], p5[5] and 1 more" in lines(audit, "copied>0")


def test_a_single_process_is_not_named() -> None:
    audit = audit_of(read_path())
    audit.processes = [Process(7, "cp", [read_path()])]
    assert "cp[7]" not in "\n".join(lines(audit, "copied>0"))


def test_no_control_bytes_reach_the_lines() -> None:
    audit = audit_of(Path(EVIL, EVIL, EVIL, Counts(2, 2, 2, copied=2, unknown=0), EVIL))
    audit.processes = [Process(1, EVIL, audit.paths), Process(2, EVIL, [unknown_path()])]
    audit.findings = [Finding(EVIL, "missed move", 1, {"file": EVIL}, EVIL)]
    assert all(line.isprintable() for line in lines(audit, "copied>0"))
