# SPDX-License-Identifier: MIT
"""Limits: what they accept, what holds, and what they say of a mistake."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rsplice.audit import Audit, Counts, Finding, MissingProbe
from rsplice.errors import RspliceError
from rsplice.limits import FINDINGS, parse_limit, parse_size
from rsplice.tracers.findings import NAMES


def audit() -> Audit:
    result = Audit(totals=Counts(1000, 1500, 1000))
    result.accuracy.unknown_bytes = 23
    result.accuracy.events_lost = 7
    result.findings = [
        Finding("double-owner", "violation", 3, {}, ""),
        Finding("steal-refused", "missed move", 1, {}, ""),
    ]
    return result


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("copied>0", "copied>0: 1500 bytes copied"),
        ("copied>1499", "copied>1499: 1500 bytes copied"),
        ("copied > 1.4 KiB", "copied > 1.4 KiB: 1500 bytes copied"),
        ("copied>=1.5kB", "copied>=1.5kB: 1500 bytes copied"),
        ("copied==1500", "copied==1500: 1500 bytes copied"),
        ("copied<10MiB", "copied<10MiB: 1500 bytes copied"),
        ("copies_per_byte>1.0", "copies_per_byte>1.0: 1500 bytes copied for 1000 bytes carried"),
        (
            "copies_per_byte>=1.5",
            "copies_per_byte>=1.5: 1500 bytes copied for 1000 bytes carried",
        ),
        ("unknown>0", "unknown>0: 23 bytes unknown"),
        ("lost>6", "lost>6: 7 events lost"),
        ("violation", "violation: violation: double-owner, 3 times"),
        ("violation:double-owner", "violation:double-owner: violation: double-owner, 3 times"),
        ("missed-move", "missed-move: missed move: steal-refused, once"),
    ],
)
def test_limits_that_hold(text: str, sentence: str) -> None:
    assert parse_limit(text).holds(audit()) == sentence


@pytest.mark.parametrize(
    "text",
    [
        "copied>1500",
        "copied>1.5kB",
        "copied>10MiB",
        "copied<=1499",
        "copied==0",
        "copies_per_byte>1.5",
        "unknown>23",
        "lost>=8",
        "violation:leaked",
        "hazard",
    ],
)
def test_limits_that_do_not_hold(text: str) -> None:
    assert parse_limit(text).holds(audit()) is None


def blind() -> Audit:
    """An audit that could not look for pages of librsplice that are leaked."""
    result = audit()
    result.accuracy.probes_missing = [
        MissingProbe("mm_filemap_map_pages", "none here", "faults are not counted"),
        MissingProbe("probes in /lib/\x1b[31m.so", "before 5.15", "it is not shown", ["leaked"]),
    ]
    return result


def test_a_finding_by_name_is_not_called_absent_where_nobody_looked() -> None:
    assert parse_limit("violation:leaked").holds(blind()) == (
        "violation:leaked: not looked for: probes in /lib/\\x1b[31m.so: before 5.15"
    )


def test_a_kind_that_nobody_looked_for_is_not_called_absent() -> None:
    result = Audit()
    result.accuracy.probes_missing = [MissingProbe("sys_enter", "none here", "", list(NAMES[1:]))]
    for text in ("violation", "hazard", "missed-move", "missed-move:steal-refused"):
        assert parse_limit(text).holds(result) == f"{text}: not looked for: sys_enter: none here"


def test_what_was_looked_for_holds_as_ever_where_another_was_not() -> None:
    for text in ("hazard", "violation:double-owner", "missed-move", "hazard:stranded"):
        assert parse_limit(text).holds(blind()) == parse_limit(text).holds(audit())
    without = blind()
    without.findings.clear()
    assert parse_limit("violation").holds(without) is None  # the accuracy line tells


@pytest.mark.parametrize(
    ("text", "identity", "verify", "is_seen"),
    [
        ("copied>0", "off", False, True),
        ("lost>0", "off", False, True),
        ("hazard", "all", False, True),
        ("hazard", "sample", False, False),
        ("violation:leaked", "off", True, False),
        ("violation:cache-differs-from-disk", "all", True, True),
        ("violation:cache-differs-from-disk", "all", False, False),
    ],
)
def test_what_is_not_looked_for_is_known_before_the_run(
    text: str, identity: str, verify: bool, is_seen: bool
) -> None:
    assert (parse_limit(text).not_looked_for(identity, verify) is None) == is_seen


def test_nothing_carried_is_no_copy_per_byte() -> None:
    assert parse_limit("copies_per_byte>0").holds(Audit()) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "copied",
        "copied>",
        "copied>x",
        "copied>-1",
        "copied>1ZiB",
        "copied=0",
        "copied=>0",
        "copied>0>1",
        "copied>1e9",
        "copied>\u0663",
        "avoided>0",
        "copies_per_byte>1MiB",
        "lost>1kB",
        "violations",
        "violation:",
        "\x1b[31m",
    ],
)
def test_a_mistake_is_one_line_that_names_the_forms(text: str) -> None:
    with pytest.raises(RspliceError) as caught:
        parse_limit(text)
    message = str(caught.value)
    assert "copied>10MiB" in message or "published-while-mapped" in message
    assert message.isprintable()
    assert caught.value.exit_status == 125


def test_an_unknown_finding_is_a_mistake() -> None:
    with pytest.raises(RspliceError, match="no such violation; there are .*double-owner"):
        parse_limit("violation:duoble-owner")
    for kind, names in FINDINGS.items():
        for name in names:
            parse_limit(f"{kind}:{name}")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("0 B", 0),
        ("24 MB", 24_000_000),
        ("1kB", 1000),
        ("1.5 KiB", 1536),
        ("2gib", 2 << 30),
        ("3 GB", 3 * 10**9),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == Fraction(nbytes)


@pytest.mark.parametrize("text", ["", "B", "1 XB", "1..2", "-1", ".5", "1 K"])
def test_what_is_no_size(text: str) -> None:
    assert parse_size(text) is None
