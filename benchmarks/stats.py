# SPDX-License-Identifier: MIT
"""The benchmark's arithmetic: medians, ratios and targets, from lists of readings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Summary:
    """The median of some readings and how far they lie apart."""

    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}


def summarize(readings: Sequence[float]) -> Summary:
    """Median, least and greatest. ValueError without readings."""
    if not readings:
        raise ValueError("no readings")
    return Summary(median(readings), min(readings), max(readings))


def paired(
    untraced: Sequence[float], traced: Sequence[float], compare: Callable[[float, float], float]
) -> Summary:
    """Compares readings round by round, so that what disturbs a whole round cancels out.

    ValueError if the lists differ in length.
    """
    return summarize([compare(a, b) for a, b in zip(untraced, traced, strict=True)])


def ratio(untraced: float, traced: float) -> float:
    """How many times as long the traced run took."""
    return traced / untraced


def added_per_call(untraced: float, traced: float) -> float:
    """What tracing adds to one call, from times per pair of calls; in their unit."""
    return (traced - untraced) / 2


def fewer_per_cent(untraced: float, traced: float) -> float:
    """By how many per cent a rate fell; negative if it rose."""
    return 100 * (1 - traced / untraced)


@dataclass(frozen=True)
class Target:
    """A target beside its reading; ``reading`` is None when it could not be taken."""

    what: str
    limit: float
    unit: str
    reading: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.reading is None:
            return None
        return self.reading >= self.limit if self.at_least else self.reading <= self.limit
