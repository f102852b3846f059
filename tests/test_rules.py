# SPDX-License-Identifier: MIT
"""The table of rules: what it says of each combination that matters, and that the docs show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsplice.audit import DISPOSITIONS, Endpoint
from rsplice.events import FLAGS
from rsplice.rules import RULES, Leg, Rule, Verdict, classify, leg_indices, table_markdown, why_seen

OLD, NEW = (6, 1), (6, 18)
USER = Endpoint("user memory")
PIPE = Endpoint("pipe")
EXT4 = Endpoint("ext4")
EXT4_DIRECT = Endpoint("ext4", direct=True)
TCP = Endpoint("tcp")
NULL = Endpoint("/dev/null")
FUSE_DEVICE = Endpoint("fuse device")

READS = ("read", "pread64", "readv", "preadv", "preadv2", "io_uring read", "io_uring read_fixed")
WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "io_uring write")


def verdict(
    via: str,
    source: Endpoint,
    destination: Endpoint,
    *flags: str,
    leg: int = 0,
    kernel: tuple[int, int] = NEW,
) -> Verdict:
    return classify(Leg(via, leg, source, destination, frozenset(flags)), kernel)


def disposition(via: str, source: Endpoint, destination: Endpoint, *flags: str) -> str:
    """What becomes of the bytes of leg 0, on the old kernel as on the new."""
    old, new = (verdict(via, source, destination, *flags, kernel=k) for k in (OLD, NEW))
    assert old.disposition == new.disposition
    return new.disposition


@pytest.mark.parametrize("via", READS)
def test_reads_copy_unless_a_device_fills_the_pages(via: str) -> None:
    for kind in (
        "ext4",
        "xfs",
        "btrfs",
        "overlay",
        "tmpfs",
        "memfd",
        "fuse",
        "proc",
        "pipe",
        "tcp",
    ):
        assert disposition(via, Endpoint(kind), USER) == "copied", kind
    for kind in ("ext4", "xfs", "f2fs", "block device"):
        assert disposition(via, Endpoint(kind, direct=True), USER) == "direct", kind


@pytest.mark.parametrize("via", WRITES)
def test_writes_copy_unless_a_device_drains_the_pages(via: str) -> None:
    for kind in (
        "ext4",
        "xfs",
        "btrfs",
        "overlay",
        "tmpfs",
        "memfd",
        "fuse",
        "fifo",
        "udp",
        "unix",
    ):
        assert disposition(via, USER, Endpoint(kind)) == "copied", kind
    for kind in ("ext4", "xfs", "f2fs", "block device"):
        assert disposition(via, USER, Endpoint(kind, direct=True)) == "direct", kind
    assert disposition(via, USER, NULL) == "discarded"


@pytest.mark.parametrize("direct", [False, True])
def test_the_flag_o_direct_changes_nothing_for_dax_and_for_a_pipe(direct: bool) -> None:
    dax = Endpoint("ext4", direct=direct, dax=True)
    assert disposition("read", dax, USER) == "copied"
    assert disposition("write", USER, dax) == "copied"
    assert disposition("splice", dax, PIPE) == "copied"
    assert disposition("write", USER, Endpoint("pipe", direct=direct)) == "copied"


def test_o_direct_on_a_file_in_memory_is_buffered_and_splices_copies() -> None:
    direct = Endpoint("tmpfs", direct=True)
    assert verdict("pread64", direct, USER).disposition == "copied"
    assert verdict("splice", direct, PIPE).disposition == "copied"
    assert verdict("splice", Endpoint("tmpfs"), PIPE).disposition == "shared"


@pytest.mark.parametrize("kind", ["fuse", "overlay", "nfs4", "9p"])
def test_o_direct_through_another_layer_is_unknown(kind: str) -> None:
    direct = Endpoint(kind, direct=True)
    assert disposition("read", direct, USER) == "unknown"
    assert disposition("splice", direct, PIPE) == "unknown"
    assert disposition("splice", PIPE, direct) == "unknown"
    assert kind in verdict("read", direct, USER).why


@pytest.mark.parametrize("kind", ["fuse request", "ublk request", "kernel buffer"])
def test_a_device_fills_and_drains_memory_that_a_ring_has_from_the_kernel(kind: str) -> None:
    request, btrfs = Endpoint(kind), Endpoint("btrfs", direct=True)
    read, write = "io_uring read_fixed", "io_uring write_fixed"
    assert verdict(read, EXT4_DIRECT, request).disposition == "direct"
    assert verdict(write, request, EXT4_DIRECT).disposition == "direct"
    for file in (EXT4, Endpoint("tmpfs"), Endpoint("memfd", direct=True)):
        assert verdict(read, file, request).copies == 1
        assert verdict(write, request, file).copies == 1
    assert verdict(read, btrfs, request).disposition == "unknown"
    assert verdict(write, request, btrfs).disposition == "unknown"
    # What was not read in the kernel's sources is not guessed.
    assert verdict(read, PIPE, request).disposition == "unknown"
    assert verdict(write, request, TCP).disposition == "unknown"
    assert verdict(read, EXT4_DIRECT, request, kernel=(6, 14)).disposition == "unknown"


def test_a_ublk_disk_has_a_page_cache_and_a_server_behind_it() -> None:
    disk, server = Endpoint("ublk disk"), Endpoint("ublk device")
    assert disposition("read", disk, USER) == "copied"
    assert disposition("read", Endpoint("ublk disk", direct=True), USER) == "unknown"
    assert verdict("pwrite64", USER, server).copies == 1
    assert verdict("pread64", server, USER).copies == 1


def test_a_passthrough_file_is_read_and_written_by_the_backing_files_page_cache() -> None:
    file = Endpoint("fuse passthrough")
    assert verdict("read", file, USER).copies == verdict("write", USER, file).copies == 1
    assert verdict("splice", file, PIPE).disposition == "unknown"
    assert verdict("splice", PIPE, file).disposition == "copied"
    assert verdict("read", Endpoint(file.kind, direct=True), USER).disposition == "unknown"


def test_requests_of_fuse_come_with_a_command_of_the_ring() -> None:
    command = verdict("io_uring uring_cmd", FUSE_DEVICE, USER)
    assert (command.disposition, command.copies) == ("copied", 1)


def test_btrfs_may_copy_in_spite_of_o_direct() -> None:
    direct = Endpoint("btrfs", direct=True)
    assert disposition("read", direct, USER) == "unknown"
    assert verdict("write", USER, direct, kernel=(6, 1)).disposition == "direct"
    assert verdict("write", USER, direct, kernel=(6, 2)).disposition == "unknown"


def test_splice_into_a_pipe() -> None:
    expected = {
        "ext4": "shared",
        "tmpfs": "shared",
        "block device": "shared",
        "tcp": "shared",
        "pipe": "moved",
        "proc": "copied",
        "udp": "copied",
        "fuse": "unknown",
        "unix": "unknown",
        "fuse device": "unknown",
    }
    for via in ("splice", "io_uring splice"):
        for kind, outcome in expected.items():
            assert disposition(via, Endpoint(kind), PIPE) == outcome, kind
        assert disposition(via, EXT4_DIRECT, PIPE) == "direct"
        assert disposition(via, Endpoint("/dev/zero"), PIPE) == "copied"


def test_splice_out_of_a_pipe() -> None:
    for flags in ((), ("move",)):
        assert disposition("splice", PIPE, EXT4, *flags) == "copied"
    assert disposition("splice", PIPE, EXT4_DIRECT) == "direct"
    assert disposition("splice", PIPE, NULL) == "discarded"
    assert disposition("splice", PIPE, TCP) == "shared"
    assert disposition("splice", PIPE, Endpoint("unix")) == "shared"
    assert verdict("splice", PIPE, Endpoint("udp"), kernel=(6, 4)).disposition == "unknown"
    assert verdict("splice", PIPE, Endpoint("udp"), kernel=(6, 5)).disposition == "shared"


def test_tee_and_vmsplice() -> None:
    assert disposition("tee", PIPE, Endpoint("fifo")) == "shared"
    assert disposition("io_uring tee", PIPE, PIPE) == "shared"
    assert disposition("vmsplice", USER, PIPE, "gift") == "shared"
    assert disposition("vmsplice", PIPE, USER) == "copied"


def test_gfs2_lends_its_page_cache_only_before_6_5() -> None:
    gfs2 = Endpoint("gfs2")
    assert verdict("splice", gfs2, PIPE, kernel=(6, 4)).disposition == "shared"
    assert verdict("splice", gfs2, PIPE, kernel=(6, 5)).disposition == "copied"


def test_sendfile_is_two_legs() -> None:
    assert verdict("sendfile", EXT4, TCP, leg=0).disposition == "shared"
    assert verdict("sendfile", EXT4, TCP, leg=1).disposition == "shared"
    assert verdict("sendfile", EXT4, EXT4, leg=1).disposition == "copied"
    assert verdict("sendfile", EXT4, NULL, leg=1).disposition == "discarded"
    assert verdict("sendfile", EXT4_DIRECT, TCP, leg=0).disposition == "direct"
    assert verdict("sendfile", EXT4, EXT4_DIRECT, leg=1).disposition == "direct"
    assert list(leg_indices("sendfile")) == [0, 1]
    assert list(leg_indices("splice")) == [0]


def test_sendfile_to_a_pipe_copied_before_5_12() -> None:
    assert verdict("sendfile", EXT4, PIPE, leg=0).disposition == "shared"
    assert verdict("sendfile", EXT4, PIPE, leg=1, kernel=(5, 11)).disposition == "copied"
    assert verdict("sendfile", EXT4, PIPE, leg=1, kernel=(5, 12)).disposition == "moved"


def test_copy_file_range_without_reflink_splices() -> None:
    assert verdict("copy_file_range", EXT4, EXT4, leg=0).disposition == "shared"
    assert verdict("copy_file_range", EXT4, EXT4, leg=1) == Verdict(
        "copied", 1, "ext4 has no reflink: the kernel splices through a pipe and copies"
    )
    tmpfs = Endpoint("tmpfs")
    assert verdict("copy_file_range", tmpfs, tmpfs, leg=1).disposition == "copied"


@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ocfs2", "overlay", "nfs4", "cifs", "fuse"])
def test_copy_file_range_that_may_have_shared_extents_is_unknown(kind: str) -> None:
    for leg in (0, 1):
        told = verdict("copy_file_range", Endpoint(kind), Endpoint(kind), leg=leg)
        assert told.disposition == "unknown"
        assert kind in told.why
    assert disposition("ioctl FICLONE", Endpoint(kind), Endpoint(kind), "remap") == "remapped"
    assert disposition("ioctl FICLONERANGE", Endpoint(kind), Endpoint(kind)) == "remapped"


@pytest.mark.parametrize(
    "via", ["write", "sendto", "sendmsg", "sendmmsg", "io_uring send", "io_uring sendmsg"]
)
def test_send_copies(via: str) -> None:
    assert disposition(via, USER, TCP) == "copied"
    assert disposition(via, USER, TCP, "loopback") == "copied"


@pytest.mark.parametrize("via", ["sendto", "sendmsg", "io_uring send_zc", "io_uring sendmsg_zc"])
def test_zerocopy_send_shares_unless_it_meets_the_loopback_device(via: str) -> None:
    assert disposition(via, USER, TCP, "zerocopy") == "shared"
    assert verdict(via, USER, TCP, "zerocopy", "loopback") == Verdict(
        "copied",
        1,
        "the loopback device hands the data to a local socket, which makes the kernel copy it",
    )


@pytest.mark.parametrize("via", ["read", "recvfrom", "recvmsg", "recvmmsg", "io_uring recv"])
def test_receive_copies(via: str) -> None:
    for kind in ("tcp", "udp", "unix", "vsock", "netlink"):
        assert disposition(via, Endpoint(kind), USER) == "copied"
        assert disposition(via, Endpoint(kind), USER, "peek") == "copied"


def test_truncated_receive() -> None:
    assert disposition("recvfrom", TCP, USER, "trunc") == "discarded"
    assert disposition("recvfrom", Endpoint("udp"), USER, "trunc") == "unknown"
    assert disposition("recvmsg", TCP, USER, "trunc", "errqueue") == "copied"


def test_af_alg_depends_on_what_was_not_seen() -> None:
    af_alg = Endpoint("af_alg")
    assert disposition("sendmsg", USER, af_alg) == "unknown"
    assert disposition("splice", PIPE, af_alg) == "unknown"
    assert disposition("read", af_alg, USER) == "copied"


def test_fuse_server() -> None:
    assert disposition("read", FUSE_DEVICE, USER) == "copied"
    assert disposition("fuse reply", USER, FUSE_DEVICE) == "copied"
    assert disposition("writev", USER, FUSE_DEVICE) == "copied"
    assert disposition("fuse reply", PIPE, FUSE_DEVICE, "move") == "unknown"
    assert disposition("splice", PIPE, FUSE_DEVICE) == "unknown"


def test_memory_of_another_process() -> None:
    assert disposition("process_vm_readv", USER, USER) == "copied"
    assert disposition("process_vm_writev", USER, USER) == "copied"


@pytest.mark.parametrize("kind", ["/dev/tty", "/dev/pts/3", "/dev/console"])
def test_a_terminal_copies_twice(kind: str) -> None:
    assert verdict("write", USER, Endpoint(kind)).copies == 2
    assert verdict("read", Endpoint(kind), USER).copies == 2
    assert verdict("splice", PIPE, Endpoint(kind)).copies == 2
    assert verdict("write", USER, EXT4).copies == 1


def test_what_was_not_looked_at_is_unknown() -> None:
    unknown = Endpoint("unknown")
    assert verdict("read", EXT4, USER, "compat") == Verdict(
        "unknown", 0, "32-bit caller: its arguments are not looked at"
    )
    assert disposition("read", unknown, USER) == "unknown"
    assert disposition("sendto", USER, unknown, "zerocopy") == "unknown"
    assert disposition("splice", unknown, PIPE) == "unknown"
    assert verdict("copy_file_range", EXT4, unknown, leg=1).disposition == "unknown"


def test_no_rule_says_so() -> None:
    assert verdict("read", Endpoint("a new filesystem"), USER, kernel=(6, 18)) == Verdict(
        "unknown", 0, "no rule for this combination on kernel 6.18"
    )
    assert verdict("read", EXT4, USER, kernel=(5, 9)).disposition == "unknown"
    assert verdict("read", EXT4, USER, kernel=(5, 10)).disposition == "copied"


def test_an_operation_has_only_its_legs() -> None:
    with pytest.raises(ValueError, match="read has no leg 1"):
        verdict("read", EXT4, USER, leg=1)
    with pytest.raises(ValueError, match="sendfile has no leg 2"):
        verdict("sendfile", EXT4, TCP, leg=2)


def test_each_rule_decides_somewhere() -> None:
    """No rule stands wholly behind another one."""
    kinds = {k.replace("*", "1") for r in RULES for e in (r.source, r.destination) for k in e.kinds}
    ends = [
        Endpoint(kind, direct, dax)
        for kind in sorted(kinds)
        for direct in (False, True)
        for dax in (False, True)
    ]
    for rule in RULES:
        some = (
            Leg(operation, leg, source, destination, rule.flags)
            for operation in sorted(rule.operations.names) or ["read"]
            for leg in leg_indices(operation)
            for source in filter(rule.source.holds, ends)
            for destination in filter(rule.destination.holds, ends)
        )
        holds = (leg for leg in some if rule.holds(leg, rule.since))
        first = (next(r for r in RULES if r.holds(leg, rule.since)) for leg in holds)
        assert any(r is rule for r in first), rule


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.operations.name}: {r.why[:40]}")
def test_a_rule_is_well_formed(rule: Rule) -> None:
    assert rule.disposition in DISPOSITIONS
    assert rule.flags <= FLAGS.keys()
    assert rule.before is None or rule.since < rule.before
    assert rule.bounces == 0 or rule.disposition == "copied"
    assert rule.why.format(source="a", destination="b")
    assert not rule.why.endswith(".") and "|" not in rule.why
    assert rule.kernel_source == "-" or rule.kernel_source.count(":") == 1


def test_what_a_comparison_of_pages_says() -> None:
    sendfile = [Leg("sendfile", leg, EXT4, TCP) for leg in (0, 1)]
    assert why_seen(sendfile[0], "shared") == (
        "the pages in the pipe are the file's own page-cache pages"
    )
    assert why_seen(sendfile[1], "shared") == "the socket buffers hold the file's own pages"
    for disposition_ in DISPOSITIONS:
        assert why_seen(Leg("splice", 0, PIPE, FUSE_DEVICE), disposition_)
    with pytest.raises(ValueError, match="'teleported' is not a disposition"):
        why_seen(sendfile[0], "teleported")


def test_the_docs_show_exactly_this_table() -> None:
    docs = Path(__file__).parent.parent / "docs" / "metrics.md"
    shown = docs.read_text().split("<!-- rules -->\n\n", 1)[1].split("\n<!-- /rules -->", 1)[0]
    assert shown == table_markdown(), (
        "put the output of python3 -c 'from rsplice.rules import table_markdown as t; "
        'print(t(), end="")\' between the rules markers of docs/metrics.md'
    )
