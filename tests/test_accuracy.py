# SPDX-License-Identifier: MIT
"""The comparison of what is told with what is measured, on tallies made up for it."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.accuracy import (
    FILESYSTEMS,
    TCP_TARGET,
    WORKLOADS,
    Comparison,
    Results,
    across,
    compare,
    lines,
)
from rsplice.audit import Endpoint
from rsplice.events import Tally

KERNEL = (6, 12)
N = 7919
READ = Tally(1, Endpoint("ext4"), Endpoint("user memory"), "read", frozenset(), 1, N)


def compared(measured: int, target: float = 0.0, extra: int = 0) -> Comparison:
    counted = replace(READ, measured={(0, "copied"): measured}, extra={0: extra})
    return Comparison("read", target, compare([READ], [counted], KERNEL))


def test_equal_counts_hold() -> None:
    comparison = compared(N)
    assert comparison.holds
    assert [(row.told, row.measured, row.difference) for row in comparison.rows] == [(N, N, 0)]


def test_one_byte_less_or_more_does_not() -> None:
    assert not compared(N - 1).holds
    assert not compared(N, extra=1).holds


def test_a_target_allows_for_its_share_and_no_more() -> None:
    assert compared(N - 7, TCP_TARGET).holds
    assert not compared(N - 8, TCP_TARGET).holds


def test_what_is_unknown_without_measuring_is_shown_and_compared_with_nothing() -> None:
    unseen = replace(READ, source=Endpoint("9p"))
    comparison = Comparison("read", 0.0, compare([unseen], [unseen], KERNEL))
    assert comparison.rows[0].difference is None
    assert comparison.holds
    assert f"0 + {N} unknown" in lines(comparison)


def test_kernels_stand_side_by_side_with_what_is_told_of_and_what_differs() -> None:
    unseen = replace(READ, source=Endpoint("9p"))
    rows = compare([READ, unseen], [replace(READ, measured={(0, "copied"): N}), unseen], KERNEL)
    newer = Results("7.3.4+deb13-amd64", ["fexit x"], [Comparison("a | b", 0.0, rows)])
    older = Results("6.1.0-56-amd64", [], [compared(N - 1), Comparison("c", 0.0, error="no | c")])
    assert Results.parse(newer.text()) == newer
    assert across([older, newer]).splitlines() == [
        "| workload | 6.1.0 | 7.3.4 | told by |",
        "| --- | ---: | ---: | --- |",
        f"| read | {N - 1} (-1) | - | inferred |",
        "| c | no \\| c | - |  |",
        f"| a \\| b | - | {N} | inferred |",
    ]


def test_a_workload_that_fails_does_not_hold() -> None:
    comparison = compared(N)
    comparison.error = "no such file"
    assert not comparison.holds
    assert "read (no such file)" in lines(comparison)


def test_only_what_travels_as_packets_may_differ() -> None:
    assert len(WORKLOADS) >= 20
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    for workload in WORKLOADS:
        assert workload.target == 0 or "tcp" in workload.name or "serve" in workload.name


def test_what_is_left_out_without_a_file_system_is_what_needs_it() -> None:
    for each in FILESYSTEMS:
        needing = [w for w in WORKLOADS if f"{{{each}}}" in w.command]
        assert len(needing) >= 10
        assert needing == [w for w in WORKLOADS if w.name.split()[0] == each]
