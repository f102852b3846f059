# SPDX-License-Identifier: MIT
"""Rates of the last minute as a line of bars."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

WINDOW = 60.0  #: seconds that a spark line shows

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " .:-=+*#@"


class Sample(NamedTuple):
    """The mean of a rate between two times, in seconds."""

    start: float
    end: float
    rate: float


def spark(samples: Sequence[Sample], end: float, cells: int, top: float, ascii_only: bool) -> str:
    """*cells* characters for the minute before *end*, each the highest sample that touches it.

    Nothing and no sample are blank, the smallest positive rate is visible, a negative one is "-".

    :param top: the rate of a full bar
    """
    highest: list[float] = [0.0] * cells
    begin, step = end - WINDOW, WINDOW / max(cells, 1)
    for sample in samples:
        first = max(0, int((sample.start - begin) / step))
        for cell in range(first, min(cells, ceil((sample.end - begin) / step))):
            highest[cell] = max(highest[cell], sample.rate) if highest[cell] else sample.rate
    bars = _ASCII_BARS if ascii_only else _BARS
    return "".join(_bar(rate, top, bars) for rate in highest)


def _bar(rate: float, top: float, bars: str) -> str:
    if rate < 0:
        return "-"
    return bars[min(len(bars) - 1, ceil(rate / top * (len(bars) - 1)))] if rate else bars[0]
