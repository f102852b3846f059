# SPDX-License-Identifier: MIT
"""Limits on an audit as a person writes them: ``copied>10MiB``, ``violation:double-owner``."""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter

from rsplice.audit import Audit, Counts, Finding, Path
from rsplice.dashboards import phrases
from rsplice.dashboards.text import sanitise
from rsplice.errors import RspliceError

CACHE_DIFFERS = "cache-differs-from-disk"
#: The names of the findings, by kind.
FINDINGS = {
    "violation": (
        "published-while-mapped",
        "published-while-referenced",
        "published-activated",
        "double-owner",
        "merge-flag-on-page-cache",
        "shared-frag-lost",
        CACHE_DIFFERS,
        "stale-content-exposed",
        "leaked",
    ),
    "hazard": ("changed-in-flight", "truncated-in-flight", "gift-still-mapped", "stranded"),
    "missed-move": ("steal-refused",),
}

_FORMS = (
    "copied>10MiB, copies_per_byte>1.0, unknown>0, lost>0, "
    "violation, violation:NAME, hazard, missed-move"
)
_COMPARE: dict[str, Callable[[Fraction, Fraction], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
}
_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
#: What a limit on a sum counts of each path.
_PATH_AMOUNTS: dict[str, Callable[[Counts], int]] = {
    "copied": attrgetter("copy_bytes"),
    "copies_per_byte": attrgetter("copy_bytes"),
    "unknown": attrgetter("unknown"),
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", re.ASCII)
_AMOUNT = re.compile(r"(copied|copies_per_byte|unknown|lost)\s*(>=|<=|==|>|<)\s*(.*)")


class Limit(ABC):
    """A condition on an audit, which fails it."""

    text: str  #: as a person wrote it

    @abstractmethod
    def holds(self, audit: Audit) -> str | None:
        """A sentence that says what held, or None."""

    def not_looked_for(self, identity: str, verify: bool) -> str | None:
        """Why an audit with these options sees nothing of what it is about; None if it does.

        :param identity: how many calls have their pages compared: "all", "sample" or "off"
        :param verify: whether lent files are compared with the disk
        """
        return None

    def paths(self, audit: Audit) -> list[Path]:
        """Where to look if it holds: the paths that it is about, most bytes first."""
        return []

    def findings(self, audit: Audit) -> list[Finding]:
        """The findings that it is about, or that explain the bytes that it is about."""
        return []


def parse_limit(text: str) -> Limit:
    """The limit that *text* writes down.

    :raises RspliceError: it is none; the message names the accepted forms
    """
    stripped = text.strip()
    kind, colon, name = stripped.partition(":")
    if kind in FINDINGS and (not colon or name in FINDINGS[kind]):
        return _FindingLimit(stripped, kind, name)
    if kind in FINDINGS:
        known = ", ".join(FINDINGS[kind])
        raise RspliceError(f"--fail-on {sanitise(text)!r}: no such {kind}; there are {known}")
    if (match := _AMOUNT.fullmatch(stripped)) and (bound := _bound(match[1], match[3])) is not None:
        return _AmountLimit(stripped, match[1], match[2], bound)
    raise RspliceError(f"--fail-on {sanitise(text)!r} is none of {_FORMS}")


def parse_size(text: str) -> Fraction | None:
    """The bytes of "24 MB", "1.5GiB" or "0"; None if *text* is no size.

    Units are B, KiB, MiB, GiB and kB, MB, GB, in any case.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _UNITS:
        return None
    return Fraction(match[1]) * _UNITS[match[2].lower()]


def _bound(subject: str, text: str) -> Fraction | None:
    """What *subject* is compared with: a size, or for counts and ratios a plain number."""
    plain = subject in ("copies_per_byte", "lost")
    return None if plain and not text.replace(".", "", 1).isdecimal() else parse_size(text)


@dataclass(frozen=True)
class _AmountLimit(Limit):
    text: str
    subject: str
    comparator: str
    bound: Fraction

    def holds(self, audit: Audit) -> str | None:
        value, sentence = _amount(self.subject, audit)
        return f"{self.text}: {sentence}" if _COMPARE[self.comparator](value, self.bound) else None

    def paths(self, audit: Audit) -> list[Path]:
        amount = _PATH_AMOUNTS.get(self.subject)
        if amount is None:
            return []
        return sorted(
            filter(lambda p: amount(p.counts), audit.paths), key=lambda p: -amount(p.counts)
        )

    def findings(self, audit: Audit) -> list[Finding]:
        copies = self.subject in ("copied", "copies_per_byte")
        return [f for f in audit.findings if copies and f.kind == "missed move"]


def _amount(subject: str, audit: Audit) -> tuple[Fraction, str]:
    totals = audit.totals
    if subject == "lost":
        lost = audit.accuracy.events_lost
        return Fraction(lost), f"{phrases.plural(lost, 'event')} lost"
    if subject == "copies_per_byte":
        value = Fraction(totals.copy_bytes, totals.payload_bytes or 1)
        carried = phrases.plural(totals.payload_bytes, "byte")
        return value, f"{phrases.plural(totals.copy_bytes, 'byte')} copied for {carried} carried"
    nbytes = totals.copy_bytes if subject == "copied" else audit.accuracy.unknown_bytes
    return Fraction(nbytes), f"{phrases.plural(nbytes, 'byte')} {subject}"


@dataclass(frozen=True)
class _FindingLimit(Limit):
    text: str
    kind: str
    name: str  #: "" for any

    def holds(self, audit: Audit) -> str | None:
        for found in self.findings(audit):
            return f"{self.text}: {phrases.finding(found)}"
        why = self._unseen(audit)
        return why and f"{self.text}: not looked for: {sanitise(why)}"

    def _unseen(self, audit: Audit) -> str | None:
        """Why nobody could see any of what it is about: that there was none is not known then.

        Of a kind that is seen in part the accuracy line tells the rest.
        """
        wanted = {self.name} if self.name else {*FINDINGS[self.kind]} - {CACHE_DIFFERS}
        missing = [m for m in audit.accuracy.probes_missing if wanted & {*m.findings}]
        hidden = {name for each in missing for name in each.findings}
        return f"{missing[0].probe}: {missing[0].reason}" if wanted <= hidden else None

    def not_looked_for(self, identity: str, verify: bool) -> str | None:
        if identity != "all":
            return f"no findings are looked for with --identity {identity}: leave it out"
        if self.name == CACHE_DIFFERS and not verify:
            return "what is cached is compared with the disk with --verify only: add it"
        return None

    def findings(self, audit: Audit) -> list[Finding]:
        return [
            found
            for found in audit.findings
            if found.kind.replace(" ", "-") == self.kind and self.name in ("", found.name)
        ]
