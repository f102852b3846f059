# SPDX-License-Identifier: MIT
"""What the performance benchmark found, on the terminal and as docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console, JustifyMethod
from rich.text import Text

from benchmarks.report import machine_line, markdown_table, plain_table, spread, target_cells
from benchmarks.stats import Target

#: Rounds with memory that the host has taken back, at the most: each reading waits for it.
TAKEN_BACK_ROUNDS = 3

_MODES = {
    "copy": "copy: pread, writev",
    "direct": "direct: O_DIRECT pread, writev",
    "splice": "splice: page cache, SPLICE_F_MOVE",
    "rsplice": "rsplice, each whole page moved",
    "rsplice-ahead": "rsplice, RSPLICE_F_READAHEAD",
    "passthrough": "FUSE passthrough",
    "dd": "dd of the source",
    "dd O_DIRECT": "dd of the source, O_DIRECT",
}
#: The one that the targets are about: how a filesystem would use the library.
_BEST = "rsplice-ahead"
_FILLS = {
    "read-write": "pread into a buffer, pwrite: 2 copies",
    "read-mapping": "pread into the mapping: 1 copy",
    "rsplice": "rsplice, pages of 4 KiB",
    "rsplice-thp": "rsplice, transparent huge pages",
    "rsplice-hugetlb": "rsplice, hugetlb pages of 2 MiB",
}
_PIECES = {
    "pieces-single": "rsplice, one call a piece",
    "pieces-batch": "rsplice_batch, all in one call",
}
_REMOTE = {"copy": "recv, writev: 2 copies", "rsplice": "rsplice: 1 copy"}


def _median(result: dict[str, Any], part: str, name: str, figure: str) -> float | None:
    found = result[part].get(name, {}).get(figure)
    return float(found["median"]) if found else None


def _quotient(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def targets(result: dict[str, Any]) -> list[Target]:
    """The targets beside what was read: medians against medians of the same rounds."""

    def of(other: str, figure: str, state: str = "cold") -> float | None:
        ours = _median(result, "fuse", f"{_BEST} {state}", figure)
        return _quotient(ours, _median(result, "fuse", f"{other} {state}", figure))

    remote = [_median(result, "remote", mode, "cpu_s_per_gib") for mode in ("rsplice", "copy")]
    native = _median(result, "calls", "calls", "us_per_call")
    python = _median(result, "calls", "python", "us_per_call")
    more = None if native is None or python is None else python - native
    found = []
    for state, where in (("cold", ""), ("taken back", ", memory taken back")):
        if where and not any(name.endswith(state) for name in result["fuse"]):
            continue
        found += [
            Target(f"server CPU, of copying's{where}", 0.2, "x",
                   of("copy", "cpu_s_per_gib", state)),
            Target(f"server CPU, of O_DIRECT copying's{where}", 0.5, "x",
                   of("direct", "cpu_s_per_gib", state)),
            Target(f"throughput, of page-cache splice's{where}", 1.3, "x",
                   of("splice", "mib_per_s", state), at_least=True),
        ]  # fmt: skip
    return [
        *found,
        Target("recvpage CPU, of recv and write's", 0.6, "x", _quotient(*remote)),
        Target("a call from Python, over C", 1.0, "us", more),
    ]


#: How a figure becomes a cell, from its summary and its format.
Cell = Callable[[dict[str, float], str], str]


def _middle(summary: dict[str, float], form: str) -> str:
    """The median alone, for a terminal's 80 columns."""
    return format(summary["median"], form)


def _fuse_rows(result: dict[str, Any], cell: Cell) -> list[list[str]]:
    rows = []
    for mode, title in _MODES.items():
        cells = [title]
        for state in (" cold", " warm") if mode not in ("dd", "dd O_DIRECT") else ("",):
            found = result["fuse"].get(mode + state)
            cells += [
                cell(found["mib_per_s"], ",.0f") if found else "",
                cell(found["cpu_s_per_gib"], ".3f") if found and "cpu_s_per_gib" in found else "",
            ]
        if len(cells) > 1 and any(cells[1:]):
            rows.append(cells + [""] * (5 - len(cells)))
    return rows


_FUSE_HEADING = ["", "cold, MiB/s", "server CPU, s/GiB", "warm, MiB/s", "server CPU, s/GiB"]


def _rows(
    part: dict[str, Any], titles: dict[str, str], figures: dict[str, str], cell: Cell
) -> list[list[str]]:
    """A row for each title that was measured: the figures, in their format."""
    return [
        [title, *(cell(part[name][figure], form) for figure, form in figures.items())]
        for name, title in titles.items()
        if name in part
    ]


def _sections(result: dict[str, Any], cell: Cell) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heading, rows) of every table."""
    memory, calls = result["memory"], result["calls"]
    rates = {"mib_per_s": ",.0f", "cpu_s_per_gib": ".3f"}
    return [
        (f"{result['size'] >> 20} MiB read through FUSE", _FUSE_HEADING, _fuse_rows(result, cell)),
        (
            "The same, cold, where the host has taken free memory back",
            ["", "MiB/s", "server CPU, s/GiB"],
            _rows(
                result["fuse"],
                {f"{mode} taken back": title for mode, title in _MODES.items()},
                rates,
                cell,
            ),
        ),
        (
            "Pages fetched over TCP",
            ["", "receiver's CPU, s/GiB"],
            _rows(result["remote"], _REMOTE, {"cpu_s_per_gib": ".3f"}, cell),
        ),
        (
            "256 MiB of a file into a memfd, cold",
            ["", "MiB/s", "CPU, s/GiB"],
            _rows(memory, _FILLS, rates, cell),
        ),
        (
            "Pieces of 4 KiB from all over a file",
            ["", "us each"],
            _rows(memory, _PIECES, {"us_per_call": ",.1f"}, cell),
        ),
        (
            "One call: a byte from pipe to pipe",
            ["", "us"],
            _rows(
                calls, {"calls": "from C", "python": "from Python"}, {"us_per_call": ".2f"}, cell
            ),
        ),
        (
            "memcpy",
            ["", "MiB/s"],
            _rows(memory, {"memcpy": "256 MiB"}, {"mib_per_s": ",.0f"}, cell),
        ),
    ]


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints the tables: medians."""
    sections = _sections(result, _middle)
    sections.append(
        ("Targets", ["", "target", "reading", ""], [target_cells(t) for t in targets(result)])
    )
    for title, heading, rows in sections:
        if not rows:
            continue
        table = plain_table(title)
        for number, text in enumerate(heading):
            justify: JustifyMethod = "right" if number else "left"
            table.add_column(text, justify=justify)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for what, reason in result["missing"].items():
        console.print(Text(f"not measured: {what}: {reason}"))


def markdown(result: dict[str, Any]) -> str:
    """docs/performance.md."""
    parts = [_INTRODUCTION, machine_line(result), "## Targets"]
    parts.append(
        markdown_table(["", "target", "reading", ""], [target_cells(t) for t in targets(result)])
    )
    for title, heading, rows in _sections(result, spread):
        parts += [f"## {title}", markdown_table(heading, rows) if rows else "Not measured."]
    if result["missing"]:
        lines = [f"- {what}: {reason}" for what, reason in result["missing"].items()]
        parts += ["## Not measured", "\n".join(lines)]
    rounds = result["rounds"]
    parts += [
        _REASONS,
        _TRIED,
        _METHOD.format(rounds=rounds, taken_back=min(rounds, TAKEN_BACK_ROUNDS)),
    ]
    return "\n\n".join(parts)


_INTRODUCTION = """\
<!-- SPDX-License-Identifier: MIT -->
# Performance

What filling empty buffers gains over copying, and where it loses. `make bench` measures it all
again, `python -m benchmarks.performance --write-docs` writes this page. The figures are of one
machine:"""

_REASONS = """\
## Why

- **rsplice, cold.** The disk fills fresh pages by DMA, and the kernel puts them into the page
  cache of the FUSE file: the server's processor touches no byte. What is left is work for each page
  of 4 KiB, in `fs/fuse/dev.c:fuse_try_move_folio`: the fresh page takes the placeholder's place in
  the page cache, goes to an LRU list and is charged to a memory cgroup; the placeholder is
  uncharged, taken off its list under a lock and freed. A profile finds 60 % of the server's time
  there.
- **Moving a page is not free, and a copy need not be dear.** Copying 4 KiB that are in the
  processor's cache takes less than all that work, where memory is quick: compare the row "direct",
  which reads by DMA as well and copies once, and memcpy below. Moving gains where copies are slow:
  memory that is new to the processor, or cold, and a busy memory bus. On a stock kernel, page by
  page and on memory that the machine has in use, it gains little processor time or loses some: see
  the table.
- **Virtual machines.** Where free memory goes back to the host (free page reporting, balloons), the
  processor's first touch of a page waits for the host to find one. Copying touches the page that it
  reads from and the page that it writes to; a page that is moved was filled on the host's side, and
  the server does not touch it. There the time of copying is several times what it is on memory in
  use, and that of rsplice the same. A machine that has run for long has both kinds of memory: which
  a program gets decides what copying costs it.
- **Wall time, cold.** Fresh pages lie scattered, and a READ is one request of up to 254 of them
  that the server waits for; readahead of the page cache keeps more of the disk's queue filled, and
  one large buffer needs fewer segments. Besides, a moved page has lost the mark that starts the
  next readahead. Where every page is moved, a reader comes to the end of what was read ahead with
  nothing under way, and one that reads 64 KiB at a time is served by eight times as many READs, of
  128 KiB. With `RSPLICE_F_READAHEAD` the pages of a READ that may carry the mark are copied, 11 of
  254, and all others moved.
- **rsplice, warm: it loses.** O_DIRECT goes to the disk although the source is in the page cache.
  Who reads the same files again and again is served better by `splice`, by copying, or by FUSE
  passthrough, which shares one page cache.
- **FUSE passthrough** takes the server out of the way altogether, for files that lie on a local
  filesystem as they are. A server that assembles, decrypts or fetches its data cannot use it.
- **recvpage.** Received bytes lie in socket buffers, of which the kernel gives no page away: one
  copy is the least on a stock kernel, and half of what recv and write make. It is not half of the
  time: the copy that is saved reads a buffer that the other has just left in the processor's
  cache, the one that stays reads cold pages, and TCP, FUSE and the page cache cost both the same.
  A profile finds three fifths of the receiver's time in that copy: 4 KiB at a time from cold memory
  to cold memory, and waiting for its stores.
- **Huge pages** take work for each page away: one page of 2 MiB in place of 512.
- **Small pieces** wait for the disk, not for the processor: a batch has several under way.
"""

_TRIED = """\
## What was tried besides

Each beside the version without it, in turn, on a machine with other work; most with real-time
priority (`chrt -f`), so that the other work took little.

- recvpage: not to offer the kernel a move that it always refuses (a socket's buffers are not given
  away) takes two atomic operations on each page away, 2 to 9 % of the receiver's time. It is done.
- recvpage: one reference less on each page, by not keeping the bytes of a reply that the kernel may
  refuse: 3 % at most, and they could be lost.
- recvpage: READs of 640 to 896 KiB in place of 512 KiB: no difference. From 1012 KiB on the payload
  needs more slots than a pipe has and goes through memory: two and three times the time.
- recvpage: fewer wake-ups (`SO_RCVLOWAT`) were not tried: a READ takes 1.2 calls of splice(2) from
  the socket and one wait as it is.
- FUSE: READs of 254 pages in place of 255, since this disk takes so many segments in one request
  (`/sys/block/*/queue/max_segments`): 6 % quicker, 8 % less of the server's time. It is done. READs
  of 127 pages: no gain, and a tenth more time.
- FUSE: one pipe less on the way of a page: no difference.
- FUSE: to keep the mark of readahead (`RSPLICE_F_READAHEAD`): half as fast again, or more. Reading
  further ahead besides: two READs and four threads 4 to 9 % more, four and eight READs no more than
  one. Without the mark, two to eight READs ahead are a fifth to a third quicker than one. Who
  reads a file while it is cut and grows again is the likelier to see zeros in it the more is under
  way, since the kernel fills what lies behind a short READ. So it is no default:
  `rsplice workload fuse --readahead`.
"""

_METHOD = """\
## How it was measured

- All rows run in turn, {rounds} rounds, every other round backwards. Tables show the median, and in
  parentheses the least and the greatest; a target compares medians.
- The filesystem is `rsplice workload fuse --source DIR --mount DIR --threads 2` with READs of up to
  1016 KiB; one process reads its file once from start to end, 1 MiB at a time. "direct" is the mode
  that reads the source with O_DIRECT into memory and writes that to the kernel. All read one READ
  ahead; with `--readahead 1016K` rsplice copies what keeps that going.
- Targets take the row with `RSPLICE_F_READAHEAD`.
- Cold: neither the source's pages nor the FUSE file's are in the page cache. Warm: the source's
  are.
- Server CPU is the time that the threads of the serving process ran (schedstat). It holds what
  interrupts took meanwhile, and for `copy` and `splice` the reading ahead of the source.
- recvpage: files on the loopback interface, read through the caching filesystem; the time is that
  of the process that receives and replies.
- `benchmarks/fill.c` fills the memfds and makes the calls.
- Memory in use: before a cold reading of the filesystem, and one of recvpage, a process touches six
  tenths of what is free and ends. Memory that the host has taken back: the reading waits until the
  kernel reports no more of it (`/sys/module/page_reporting`), {taken_back} rounds.
- memcpy is one copy from memory to memory, pages mapped: what the processor can copy at best.
"""
