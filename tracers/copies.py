# SPDX-License-Identifier: MIT
"""Bytes that the kernel was seen to copy, by legs and outside of them (bpf/copies.h)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from rsplice.tracers.program import Program

_SIDES = struct.Struct("=2Q")
_SUM = struct.Struct("=Q")
#: enum outside
OUTSIDE = ("other_calls", "kernel_threads", "packets")


@dataclass
class Copied:
    """What was counted so far, in bytes.

    :param legs: by key of a tally: out of the source, and into the destination
    :param outside: by name of OUTSIDE
    """

    legs: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)


class Copies:
    """The maps of one run that measures.

    :param program: the compiled programs, which own the maps
    """

    def __init__(self, program: Program) -> None:
        #: by key of a tally
        self.map = program.map("copied_tallies")
        self._outside = program.map("copied_outside")
        self._last = program.map("copied_last")
        self._retired: dict[bytes, tuple[int, int]] = {}

    def read(self) -> Copied:
        """All that was counted since the start."""
        legs = dict(self._retired)
        for key, values in self.map.items():
            legs[key] = _plus(legs.get(key, (0, 0)), _sum(values))
        outside = dict.fromkeys(OUTSIDE, 0)
        for number, values in self._outside.items():
            (where,) = struct.unpack("=I", number)
            outside[OUTSIDE[where]] += sum(_SUM.unpack(value)[0] for value in values)
        # What no leg took of the last call on each CPU.
        outside["other_calls"] += sum(map(sum, (_sum(v) for _, v in self._last.items())))
        return Copied(legs, outside)

    def retire(self, key: bytes) -> None:
        """Takes what is known of a tally out of the kernel's map."""
        values = self.map.take(key)
        if values is not None:
            self._retired[key] = _plus(self._retired.get(key, (0, 0)), _sum(values))

    def forget(self, is_dead: Callable[[bytes], bool]) -> None:
        """Drops what was taken out of the kernel's map of the tallies that are dead."""
        self._retired = {k: sides for k, sides in self._retired.items() if not is_dead(k)}


def by_leg(sides: tuple[int, int], two_legs: bool) -> dict[int, int]:
    """Bytes by leg: an operation of one leg has copied on whichever side it was."""
    legs = {0: sides[0], 1: sides[1]} if two_legs else {0: sum(sides)}
    return {leg: nbytes for leg, nbytes in legs.items() if nbytes}


def once(measured: dict[tuple[int, str], int], identity: dict[tuple[int, str], int]) -> None:
    """Takes out of *identity* what *measured* has: bytes that were counted as they were copied.

    Both are bytes by leg and disposition. The pages at both ends tell of the same copies.
    """
    for key, count in measured.items():
        if key in identity:
            identity[key] -= min(count, identity[key])


def _sum(values: list[bytes]) -> tuple[int, int]:
    """Adds up the values of all CPUs."""
    pairs = [_SIDES.unpack(value) for value in values]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _plus(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]
