# SPDX-License-Identifier: MIT
"""The ledger: sums that hold for any tallies, and exact audits of a few known calls."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsplice.audit import (
    DISPOSITIONS,
    Accuracy,
    Audit,
    Counts,
    Endpoint,
    Evidence,
    Finding,
    MissingProbe,
    PageCounts,
)
from rsplice.audit import Path as PathRow
from rsplice.events import FLAGS, ProcessSeen, Tally
from rsplice.ledger import Ledger
from rsplice.rules import leg_indices

KERNEL = (6, 18)
USER = Endpoint("user memory")
PIPE = Endpoint("pipe")
EXT4 = Endpoint("ext4")
TCP = Endpoint("tcp")
NULL = Endpoint("/dev/null")
N = 65537


def tally(via: str, source: Endpoint, destination: Endpoint, **more: Any) -> Tally:
    values: dict[str, Any] = {
        **{"process": 1, "flags": frozenset(), "operations": 23, "nbytes": N},
        **more,
    }
    return Tally(source=source, destination=destination, via=via, **values)


def audit_of(*tallies: Tally, kernel: tuple[int, int] = KERNEL) -> Audit:
    ledger = Ledger(kernel)
    for one in tallies:
        ledger.add(one)
    return ledger.audit()


def counts_of(one: Tally) -> Counts:
    return audit_of(one).totals


# Properties. A loaded machine may take its time over an example.

PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
VIAS = ("read", "write", "splice", "sendfile", "copy_file_range", "sendto", "recvfrom", "tee")
KINDS = ("ext4", "xfs", "tmpfs", "pipe", "tcp", "user memory", "/dev/null", "tty", "unknown")
ENDPOINTS = st.builds(Endpoint, st.sampled_from(KINDS), st.booleans(), st.booleans())


@st.composite
def tallies(draw: st.DrawFn) -> Tally:
    """A tally of a sound tracer: no leg has more bytes established than it carried."""
    via = draw(st.sampled_from(VIAS))
    nbytes = draw(st.integers(0, 2**40))
    established: tuple[dict[tuple[int, str], int], ...] = ({}, {}, {})
    for leg in leg_indices(via):
        rest = nbytes
        for known in established:
            disposition = draw(st.sampled_from(DISPOSITIONS))
            share = draw(st.integers(0, rest))
            known[leg, disposition] = share
            rest -= share
    return Tally(
        process=draw(st.integers(1, 3)),
        source=draw(ENDPOINTS),
        destination=draw(ENDPOINTS),
        via=via,
        flags=draw(st.frozensets(st.sampled_from(sorted(FLAGS)), max_size=2)),
        operations=draw(st.integers(0, 2**20)),
        nbytes=nbytes,
        measured=established[0],
        identity=established[1],
        declared=established[2],
    )


PROCESSES = st.builds(
    ProcessSeen,
    key=st.integers(1, 4),
    pid=st.integers(1, 9),
    comm=st.text(max_size=3),
    pages=st.builds(PageCounts, *[st.integers(0, 99)] * len(fields(PageCounts))),
)
FINDINGS = st.builds(
    Finding,
    name=st.sampled_from(["leaked", "stranded"]),
    kind=st.sampled_from(["violation", "hazard"]),
    count=st.integers(1, 9),
    first=st.fixed_dictionaries({"pid": st.integers(1, 9)}, optional={"time": st.integers(0, 9)}),
    advice=st.sampled_from(["look", "think"]),
)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    ledger = Ledger(KERNEL)
    for one in draw(st.lists(tallies(), max_size=6)):
        ledger.add(one)
    for process in draw(st.lists(PROCESSES, max_size=4)):
        ledger.see(process)
    for finding in draw(st.lists(FINDINGS, max_size=3)):
        ledger.add_finding(finding)
    return ledger


def merged(*parts: Ledger) -> dict[str, Any]:
    whole = Ledger(KERNEL)
    for part in parts:
        whole.merge(part)
    return whole.audit().to_json()


def all_counts(audit: Audit) -> list[Counts]:
    per_process = [path.counts for process in audit.processes for path in process.paths]
    processes = [process.counts for process in audit.processes]
    return [audit.totals, *processes, *(path.counts for path in audit.paths), *per_process]


@PROPERTY
@given(ledgers())
def test_dispositions_add_up_to_the_payload(ledger: Ledger) -> None:
    for counts in all_counts(ledger.audit()):
        assert sum(getattr(counts, d) for d in DISPOSITIONS) == counts.payload_bytes


@PROPERTY
@given(ledgers())
def test_totals_are_the_sum_of_paths_and_of_processes(ledger: Ledger) -> None:
    audit = ledger.audit()
    by_path, by_process = Counts(), Counts()
    for path in audit.paths:
        by_path.add(path.counts)
    for process in audit.processes:
        by_process.add(process.counts)
    assert audit.totals == by_path == by_process
    assert audit.accuracy.unknown_bytes == audit.totals.unknown


@PROPERTY
@given(ledgers())
def test_no_counter_is_negative_but_avoided_bytes(ledger: Ledger) -> None:
    for counts in all_counts(ledger.audit()):
        assert all(getattr(counts, f.name) >= 0 for f in fields(Counts))
        assert counts.avoided_bytes == counts.baseline_bytes - counts.copy_bytes


@PROPERTY
@given(ledgers(), ledgers())
def test_merging_in_either_order_gives_the_same(one: Ledger, other: Ledger) -> None:
    assert merged(one, other) == merged(other, one)


@PROPERTY
@given(ledgers(), ledgers(), ledgers())
def test_merging_in_any_grouping_gives_the_same(a: Ledger, b: Ledger, c: Ledger) -> None:
    pair = Ledger(KERNEL)
    pair.merge(b)
    pair.merge(c)
    assert merged(a, pair) == merged(a, b, c)


@PROPERTY
@given(st.lists(tallies(), max_size=6))
def test_the_order_of_tallies_does_not_matter(some: list[Tally]) -> None:
    assert audit_of(*some).to_json() == audit_of(*reversed(some)).to_json()


@PROPERTY
@given(tallies(), st.data())
def test_splitting_a_tally_gives_the_same_audit(whole: Tally, data: st.DataObject) -> None:
    """Every number is cut in two; the rest of each leg is cut where its known bytes allow."""
    legs = leg_indices(whole.via)
    known = {"measured": whole.measured, "identity": whole.identity, "declared": whole.declared}
    cut = {
        name: {key: data.draw(st.integers(0, n)) for key, n in values.items()}
        for name, values in known.items()
    }

    def established(parts: dict[str, dict[tuple[int, str], int]], leg: int) -> int:
        return sum(n for values in parts.values() for (i, _), n in values.items() if i == leg)

    least = max(established(cut, leg) for leg in legs)
    rests = [established(known, leg) - established(cut, leg) for leg in legs]
    most = whole.nbytes - max(rests)
    if least > most:
        # The cuts of the two legs need not fit one byte count: cut nothing off.
        cut, least, most = {name: dict.fromkeys(v, 0) for name, v in known.items()}, 0, 0
    part = replace(
        whole,
        operations=data.draw(st.integers(0, whole.operations)),
        nbytes=data.draw(st.integers(least, most)),
        measured=cut["measured"],
        identity=cut["identity"],
        declared=cut["declared"],
    )
    left = {name: {k: n - cut[name][k] for k, n in v.items()} for name, v in known.items()}
    remainder = replace(
        whole,
        operations=whole.operations - part.operations,
        nbytes=whole.nbytes - part.nbytes,
        measured=left["measured"],
        identity=left["identity"],
        declared=left["declared"],
    )
    assert audit_of(part, remainder).to_json() == audit_of(whole).to_json()


@PROPERTY
@given(st.lists(tallies(), min_size=1, max_size=6))
def test_evidence_is_never_stronger_by_adding(some: list[Tally]) -> None:
    evidence = Evidence.NONE
    ledger = Ledger(KERNEL)
    for one in some:
        ledger.add(one)
        assert ledger.audit().totals.evidence >= evidence
        evidence = ledger.audit().totals.evidence


@PROPERTY
@given(ledgers())
def test_an_audit_survives_json_and_is_sorted(ledger: Ledger) -> None:
    audit = ledger.audit()
    assert Audit.from_json(audit.to_json()) == audit
    for rows in (audit.paths, audit.processes):
        sizes = [(row.counts.copy_bytes, row.counts.payload_bytes) for row in rows]
        assert sizes == sorted(sizes, reverse=True)


@PROPERTY
@given(ledgers())
def test_an_audit_shares_nothing_with_the_ledger(ledger: Ledger) -> None:
    before = ledger.audit().to_json()
    audit = ledger.audit()
    audit.totals.copied += 1
    for path in audit.paths:
        path.counts.copied += 1
    for process in audit.processes:
        process.pages.faults += 1
    for finding in audit.findings:
        finding.count += 1
        finding.first["pid"] = -1
    assert ledger.audit().to_json() == before


# Exact audits.


def test_cat_to_dev_null_copies_each_byte_once() -> None:
    """read into user memory copies; write to /dev/null drops, as any write there would."""
    audit = audit_of(tally("read", EXT4, USER), tally("write", USER, NULL))
    assert audit.totals == Counts(
        payload_bytes=2 * N,
        copy_bytes=N,
        baseline_bytes=N,
        copied=N,
        discarded=N,
        operations=46,
        evidence=Evidence.INFERRED,
    )
    assert audit.totals.avoided_bytes == 0
    assert [path.name for path in audit.paths] == [
        "ext4 -> user memory via read",
        "user memory -> /dev/null via write",
    ]
    assert audit.paths[1].why == "/dev/null drops the data unread"


def test_sendfile_seen_on_both_legs() -> None:
    sendfile = tally("sendfile", EXT4, TCP, identity={(0, "shared"): N, (1, "shared"): N})
    (path,) = audit_of(sendfile).paths
    assert path.counts == Counts(
        payload_bytes=2 * N,
        baseline_bytes=2 * N,
        shared=2 * N,
        operations=23,
        evidence=Evidence.IDENTITY,
    )
    assert path.counts.avoided_bytes == 2 * N
    assert path.why == "the socket buffers hold the file's own pages"


def test_sendfile_seen_on_one_leg_only_is_inferred() -> None:
    counts = counts_of(tally("sendfile", EXT4, TCP, identity={(0, "shared"): N}))
    assert (counts.shared, counts.evidence) == (2 * N, Evidence.INFERRED)


def test_copy_file_range_on_ext4() -> None:
    (path,) = audit_of(tally("copy_file_range", EXT4, EXT4)).paths
    assert path.counts == Counts(
        payload_bytes=2 * N,
        copy_bytes=N,
        baseline_bytes=2 * N,
        copied=N,
        shared=N,
        operations=23,
        evidence=Evidence.INFERRED,
    )
    assert path.why == "ext4 has no reflink: the kernel splices through a pipe and copies"


def test_copy_file_range_seen_to_copy_keeps_the_cause_and_the_evidence() -> None:
    seen = {(0, "shared"): N, (1, "copied"): N}
    (path,) = audit_of(tally("copy_file_range", EXT4, EXT4, identity=seen)).paths
    assert path.counts.copy_bytes == N
    assert path.counts.evidence is Evidence.IDENTITY
    assert path.why == "ext4 has no reflink: the kernel splices through a pipe and copies"


def test_reflink_on_btrfs_is_remapped_if_seen_and_else_unknown() -> None:
    btrfs = Endpoint("btrfs")
    seen = {(0, "remapped"): N, (1, "remapped"): N}
    told = counts_of(tally("copy_file_range", btrfs, btrfs, identity=seen))
    assert (told.remapped, told.baseline_bytes, told.evidence) == (2 * N, 2 * N, Evidence.IDENTITY)
    blind = counts_of(tally("copy_file_range", btrfs, btrfs))
    assert (blind.unknown, blind.copy_bytes, blind.evidence) == (2 * N, 0, Evidence.NONE)


def test_splice_to_dev_null_discards_against_no_baseline() -> None:
    counts = counts_of(tally("splice", PIPE, NULL))
    assert (counts.discarded, counts.baseline_bytes, counts.avoided_bytes) == (N, 0, 0)
    assert counts_of(tally("sendfile", EXT4, NULL)).baseline_bytes == N


def test_truncated_receive_is_measured_against_a_plain_one() -> None:
    counts = counts_of(tally("recvfrom", TCP, USER, flags=frozenset({"trunc"})))
    assert (counts.discarded, counts.baseline_bytes, counts.avoided_bytes) == (N, N, N)


def test_a_bounce_counts_twice_and_can_make_avoided_bytes_negative() -> None:
    counts = counts_of(tally("write", USER, Endpoint("/dev/pts/1")))
    assert (counts.copied, counts.copy_bytes, counts.avoided_bytes) == (N, 2 * N, -N)


def test_a_fuse_reply_is_unknown_where_its_pages_were_not_compared() -> None:
    reply = tally("fuse reply", PIPE, Endpoint("fuse device"))
    seen = replace(reply, identity={(0, "moved"): 4096, (0, "copied"): 128})
    (path,) = audit_of(seen).paths
    assert (path.counts.moved, path.counts.copied) == (4096, 128)
    assert path.counts.unknown == N - 4096 - 128
    assert path.counts.evidence is Evidence.IDENTITY
    assert path.why == "the two ends hold different pages"
    (moved,) = audit_of(replace(reply, identity={(0, "moved"): N})).paths
    assert moved.why == "the pages of the pipe became the FUSE file's page cache"


def test_the_kernels_own_word_wins_over_the_rule() -> None:
    send = tally("sendmsg", USER, TCP, flags=frozenset({"zerocopy"}))
    (path,) = audit_of(replace(send, declared={(0, "copied"): N})).paths
    assert (path.counts.copy_bytes, path.counts.evidence) == (N, Evidence.DECLARED)
    assert path.why == "the kernel reported that it copied in spite of MSG_ZEROCOPY"
    (path,) = audit_of(replace(send, declared={(0, "shared"): N})).paths
    assert (path.counts.copy_bytes, path.counts.evidence) == (0, Evidence.DECLARED)
    assert path.why == "the kernel reported that it sent the caller's own pages"


def test_declared_copies_of_the_loopback_device_tell_the_cause() -> None:
    flags = frozenset({"zerocopy", "loopback"})
    (path,) = audit_of(tally("sendto", USER, TCP, flags=flags, declared={(0, "copied"): N})).paths
    assert path.why.startswith("the loopback device hands the data to a local socket")
    assert path.counts.evidence is Evidence.DECLARED


def test_bytes_copied_twice_count_twice_as_copies_and_once_as_copied() -> None:
    twice = tally("read", EXT4, USER, measured={(0, "copied"): N}, extra={0: N // 2})
    (path,) = audit_of(twice).paths
    assert (path.counts.copied, path.counts.copy_bytes) == (N, N + N // 2)
    assert path.counts.evidence is Evidence.MEASURED


def test_measured_copies_where_the_rule_knows_nothing() -> None:
    unseen = Endpoint("a new filesystem")
    (path,) = audit_of(tally("read", unseen, USER, measured={(0, "copied"): N})).paths
    assert (path.counts.copied, path.counts.evidence) == (N, Evidence.MEASURED)
    assert path.why == "counted where the kernel copies"


def test_unknown_bytes_are_evidence_of_nothing() -> None:
    counts = counts_of(tally("splice", EXT4, PIPE, identity={(0, "unknown"): N}))
    assert (counts.unknown, counts.shared, counts.evidence) == (N, 0, Evidence.NONE)


def test_calls_that_carried_nothing_are_counted() -> None:
    (path,) = audit_of(tally("read", EXT4, USER, nbytes=0)).paths
    assert path.counts == Counts(operations=23)
    assert path.why == "nothing was carried"


def test_paths_are_kept_apart_by_o_direct() -> None:
    direct = Endpoint("ext4", direct=True)
    audit = audit_of(tally("read", EXT4, USER), tally("read", direct, USER))
    assert [path.source for path in audit.paths] == ["ext4", "ext4 O_DIRECT"]
    assert audit.paths[1].counts.direct == N


def test_flags_do_not_split_a_path() -> None:
    plain = tally("recvfrom", TCP, USER)
    audit = audit_of(plain, replace(plain, flags=frozenset({"peek"}), nbytes=N + 2))
    (path,) = audit.paths
    assert path.counts.copied == 2 * N + 2
    assert path.why.startswith("MSG_PEEK")


def test_the_kernel_decides() -> None:
    zero = tally("sendfile", EXT4, PIPE)
    assert audit_of(zero, kernel=(5, 10)).totals.copied == N
    assert audit_of(zero, kernel=(5, 15)).totals.moved == N
    with pytest.raises(ValueError, match=r"a ledger of kernel \(5, 10\)"):
        Ledger(KERNEL).merge(Ledger((5, 10)))


# Processes, findings and accuracy.


def test_a_reused_pid_is_another_process() -> None:
    ledger = Ledger(KERNEL)
    for key, comm, nbytes in ((1, "cp", 7), (2, "dd", 11)):
        ledger.see(ProcessSeen(key, 4242, comm))
        ledger.add(tally("read", EXT4, USER, process=key, nbytes=nbytes))
    rows = [(p.pid, p.comm, p.counts.copied) for p in ledger.audit().processes]
    assert rows == [(4242, "dd", 11), (4242, "cp", 7)]


def test_a_process_seen_again_replaces_what_was_known() -> None:
    ledger = Ledger(KERNEL)
    ledger.see(ProcessSeen(1, 4242, "sh", PageCounts(faults=3)))
    ledger.see(ProcessSeen(1, 4242, "cp", PageCounts(faults=5, inserted_pages=2)))
    audit = ledger.audit()
    (process,) = audit.processes
    assert (process.comm, process.paths) == ("cp", [])
    assert process.pages == audit.pages == PageCounts(faults=5, inserted_pages=2)


def test_a_process_nobody_introduced_keeps_its_bytes() -> None:
    (process,) = audit_of(tally("read", EXT4, USER, process=77)).processes
    assert (process.pid, process.comm, process.counts.copied) == (0, "?", N)


def test_findings_of_one_name_become_one_with_the_earliest_as_example() -> None:
    ledger = Ledger(KERNEL)
    late = Finding("stranded", "hazard", 2, {"pid": 1, "time": 9.5}, "drain the pipe")
    early = Finding("stranded", "hazard", 3, {"pid": 2, "time": 1.5}, "drain the pipe")
    leak = Finding("leaked", "violation", 1, {"pid": 3}, "release the pages")
    for finding in (late, early, leak):
        ledger.add_finding(finding)
    assert ledger.audit().findings == [leak, replace(early, count=5)]
    assert late.count == 2


def test_the_audit_carries_what_it_is_told() -> None:
    ledger = Ledger(KERNEL)
    ledger.add(tally("read", Endpoint("unknown"), USER))
    told = Accuracy(["sys_exit"], [MissingProbe("kprobe", "not built in", "no copies measured")], 3)
    audit = ledger.audit(
        command=["cp", "a", "b"],
        exit_status=1,
        duration_s=0.5,
        kernel_release="6.18.44",
        kernel_where="vm",
        accuracy=told,
    )
    assert (audit.command, audit.exit_status, audit.duration_s) == (["cp", "a", "b"], 1, 0.5)
    assert (audit.kernel_release, audit.kernel_where) == ("6.18.44", "vm")
    assert audit.accuracy == replace(told, unknown_bytes=N)
    assert told.unknown_bytes == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (tally("read", EXT4, USER, nbytes=-1), "negative counter"),
        (tally("read", EXT4, USER, operations=-1), "negative counter"),
        (tally("read", EXT4, USER, flags=frozenset({"fast"})), "flags that are not in FLAGS"),
        (tally("read", EXT4, USER, identity={(1, "copied"): 1}), "no such leg"),
        (tally("sendfile", EXT4, TCP, identity={(2, "shared"): 1}), "no such leg"),
        (tally("read", EXT4, USER, measured={(0, "teleported"): 1}), "no such leg, disposition"),
        (tally("read", EXT4, USER, extra={1: 1}), "no such leg or byte count"),
        (tally("read", EXT4, USER, extra={0: -1}), "no such leg or byte count"),
        (tally("read", EXT4, USER, declared={(0, "copied"): -1}), "no such leg, disposition"),
        (tally("read", EXT4, USER, identity={(0, "copied"): N + 1}), "more bytes established"),
        (
            tally("read", EXT4, USER, identity={(0, "copied"): N}, measured={(0, "copied"): 1}),
            "more bytes established",
        ),
    ],
)
def test_a_tally_that_contradicts_itself_is_refused_whole(broken: Tally, message: str) -> None:
    ledger = Ledger(KERNEL)
    with pytest.raises(ValueError, match=message):
        ledger.add(broken)
    assert ledger.audit() == Audit()


def test_path_names() -> None:
    (path,) = audit_of(tally("splice", Endpoint("ext4", direct=True), PIPE)).paths
    assert isinstance(path, PathRow)
    assert path.name == "ext4 O_DIRECT -> pipe via splice"
