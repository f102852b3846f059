# SPDX-License-Identifier: MIT
"""Tables whose first column takes the room that the others leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

_NAME_MIN = 16


@dataclass(frozen=True)
class Column:
    """A column after the first: its title and its width in cells, the gap before it included."""

    title: str
    width: int
    left: bool = False  #: aligned to the left, after a gap of two cells

    def cell(self, text: str) -> str:
        """*text* at the width of the column."""
        return f"  {text}".ljust(self.width) if self.left else text.rjust(self.width)


def name_width(columns: Sequence[Column], width: int) -> int:
    """The cells that the first column gets in a table of *width* cells."""
    return max(_NAME_MIN, width - sum(column.width for column in columns))


def header(name: str, columns: Sequence[Column], width: int) -> Text:
    """The line of titles."""
    titles = [column.title for column in columns]
    return Text(_line(name, columns, titles, width), style="bold", no_wrap=True)


def row(name: str, columns: Sequence[Column], cells: Sequence[str], width: int) -> Text:
    """One line; a name that is too long is cut."""
    room = name_width(columns, width)
    if cell_len(name) > room:
        name = set_cell_size(name, room - 2) + ".."
    return Text(_line(name, columns, cells, width), no_wrap=True)


def tall_row(name: str, columns: Sequence[Column], cells: Sequence[str], width: int) -> list[Text]:
    """One line, or two where the name is too long to stand beside its numbers."""
    if cell_len(name) <= name_width(columns, width):
        return [row(name, columns, cells, width)]
    return [Text(name), row("", columns, cells, width)]


def _line(name: str, columns: Sequence[Column], cells: Sequence[str], width: int) -> str:
    numbers = (column.cell(cell) for column, cell in zip(columns, cells, strict=True))
    return (set_cell_size(name, name_width(columns, width)) + "".join(numbers)).rstrip()
