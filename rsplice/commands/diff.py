# SPDX-License-Identifier: MIT
"""Says what changed between two audits.

A.json and B.json are what `rsplice audit --json` wrote. Lines are marked + (only in B), - (only
in A) and ~ (in both, with other numbers); what is the same in both is left out.

EXAMPLES
  rsplice audit --json before.json -- cp a b
  rsplice audit --json after.json -- cp --reflink=never a b
  rsplice diff before.json after.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

from rsplice.audit import DISPOSITIONS, Audit, Counts, RspliceCalls
from rsplice.dashboards import phrases
from rsplice.dashboards.text import emit, sanitise
from rsplice.recording import load_audit


class Fact(NamedTuple):
    """One number of an audit and how it is shown."""

    value: int
    text: str
    unit: str | None = ""  #: of a difference; None where there is none

    def since(self, before: Fact) -> str:
        """How it came to be: "1.00 KiB -> 1.00 KiB (+1 B)"."""
        change = f" ({self.value - before.value:+}{self.unit})" if self.unit is not None else ""
        return f"{before.text} -> {self.text}{change}"


Facts = dict[str, Fact]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``rsplice diff``."""
    parser.add_argument("before", metavar="A.json", help="an audit in JSON")
    parser.add_argument("after", metavar="B.json", help="another one")


def run(args: argparse.Namespace) -> int:
    """Prints what changed; the exit status is 0 whether anything did or not."""
    lines = differences(load_audit(args.before), load_audit(args.after))
    emit(sys.stdout, "\n".join(lines or ["nothing changed"]) + "\n")
    return 0


def differences(before: Audit, after: Audit) -> list[str]:
    """Lines that say what differs, in the order of a report; none if nothing does."""
    return [
        line
        for old, new in zip(_groups(before), _groups(after), strict=True)
        for name in old | new
        for line in _section(name, old.get(name), new.get(name))
    ]


def _section(name: str, old: Facts | None, new: Facts | None) -> Iterator[str]:
    if old == new:
        return
    if old is not None and new is not None:
        yield f"~ {name}"
        for label in old:
            if old[label] != new[label]:
                yield f"    {label} {new[label].since(old[label])}"
        return
    facts = (old or new or {}).items()
    shown = (f"{label} {fact.text}" for label, fact in facts if fact.value or label == "copied")
    yield f"{'+' if old is None else '-'} {name}"
    yield "    " + ", ".join(shown)


def _groups(audit: Audit) -> list[dict[str, Facts]]:
    """The facts of each named part, in the order in which they are shown."""
    known = audit.accuracy
    pages = {name.replace("_", " "): _number(n) for name, n in vars(audit.pages).items()}
    missing, lost = _number(len(known.probes_missing)), _number(known.events_lost)
    return [
        {"totals": _counts(audit.totals)},
        {sanitise(path.name): _counts(path.counts) for path in audit.paths},
        _rsplice_calls(audit.rsplice_calls),
        {sanitise(f"{f.kind}: {f.name}"): {"times": _number(f.count)} for f in audit.findings},
        {"pages": pages, "accuracy": {"probes missing": missing, "events lost": lost}},
    ]


def _counts(counts: Counts) -> Facts:
    others = (name for name in DISPOSITIONS if name != "copied")
    return {
        "payload": _size(counts.payload_bytes),
        "copied": Fact(counts.copy_bytes, phrases.copied(counts), " B"),
        "avoided": Fact(counts.avoided_bytes, phrases.avoided(counts), " B"),
        **{name: _size(getattr(counts, name)) for name in others},
        "operations": _number(counts.operations),
        "evidence": Fact(counts.evidence, counts.evidence.word, None),
    }


def _rsplice_calls(calls: RspliceCalls) -> dict[str, Facts]:
    if not calls:
        return {}
    handed_on = {name: n for name, n in vars(calls.published).items() if name != "calls"}
    return {
        "librsplice": {
            "calls": _number(calls.reserved.calls),
            **{name: _size(nbytes) for name, nbytes in handed_on.items()},
            "aborted": _size(calls.aborted.nbytes),
            "seen copied": _size(calls.seen_counts.copy_bytes),
            "differences": _number(len(calls.differences)),
        }
    }


def _size(nbytes: int) -> Fact:
    return Fact(nbytes, phrases.size(nbytes), " B")


def _number(number: int) -> Fact:
    return Fact(number, str(number))
