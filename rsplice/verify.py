# SPDX-License-Identifier: MIT
"""Compares clean, up-to-date pages of the page cache with the disk: cache-differs-from-disk.

A page that is being written differs from the disk by right, and may be written between any two
looks at it. So a difference counts only if it is seen :data:`PAUSES` + 1 times, and each time

- the page is neither dirty nor under writeback, before and after the disk is read,
- it is the same page frame with the same bytes before and after,
- and these bytes, and those on disk, are those of the time before.

One look that sees no difference, or another one, acquits the page.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import local
from typing import Any, Protocol

from rsplice.audit import Finding
from rsplice.pagecache import (
    PAGE,
    REFUSED,
    Buffer,
    FromCache,
    Kind,
    Unchecked,
    Unreadable,
    busy,
    same,
)

SCHEMA = "rsplice.verify/1"
NAME = "cache-differs-from-disk"
ADVICE = (
    "memory or disk was changed behind the filesystem's back: keep a copy of both, compare them "
    "with a known good one, and do not run or trust the file until it is read from disk again"
)

CHUNK = 256  #: pages that are looked at together
SPAN = 64 * CHUNK  #: pages that are passed over together where none is cached
PAUSES = (0.01, 0.05, 0.2, 0.5)  #: seconds before each further look at a page that differs
_RETRIES = (
    0.02,
    0.1,
)  # seconds before a read of the disk that was answered from the cache is repeated
_THREADS = 4  # reads of the disk at a time
_SHOWN = 16  # bytes of each side that a difference shows


class Frames(Protocol):
    """What tells of page frames: rsplice.pagecache.Kernel."""

    def frames(self, address: int, count: int) -> list[int]: ...
    def flags(self, frames: list[int]) -> list[int]: ...


class Mapped(Protocol):
    """A part of a file, mapped: rsplice.pagecache.Window."""

    @property
    def address(self) -> int: ...
    def resident(self) -> bytes: ...
    def copy(self, first: int, count: int, to: Buffer) -> int: ...


class Cached(Protocol):
    """A file: rsplice.pagecache.CachedFile."""

    filesystem: str
    refused: str | None

    @property
    def size(self) -> int: ...
    @property
    def stamp(self) -> tuple[int, int, int]: ...
    def cached(self, offset: int, pages: int) -> bool: ...
    def window(self, offset: int, pages: int) -> AbstractContextManager[Mapped]: ...
    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]: ...
    def disk(self, offset: int, length: int, written: int, to: Buffer, at: int) -> int: ...


@dataclass(frozen=True)
class Difference:
    """A page that differs from the disk."""

    offset: int  #: of the page in the file
    frame: int
    differing: int  #: how many of its bytes differ
    first: int  #: where in the file the first of them is
    cached: bytes  #: some bytes from there on
    disk: bytes
    digest: bytes  #: of all bytes of both

    def to_json(self) -> dict[str, Any]:
        return {
            "offset": self.offset,
            "page_frame": self.frame,
            "differing_bytes": self.differing,
            "first_difference": self.first,
            "cached": self.cached.hex(" "),
            "disk": self.disk.hex(" "),
        }


@dataclass
class Counts:
    """Cached pages by what was found."""

    same: int = 0
    busy: int = 0  #: dirty, under writeback, or changed while they were looked at
    unchecked: Counter[str] = field(default_factory=Counter)  #: by the reason
    differing: dict[int, Difference] = field(default_factory=dict)  #: by page number

    @property
    def compared(self) -> int:
        return self.same + len(self.differing)

    def add(self, other: Counts) -> None:
        self.same += other.same
        self.busy += other.busy
        self.unchecked += other.unchecked
        self.differing |= other.differing


@dataclass
class FileResult:
    """What became of one file."""

    name: str
    filesystem: str = ""
    counts: Counts = field(default_factory=Counts)
    problem: str | None = None  #: why it could not be looked at
    in_memory: bool = False  #: there is no disk below it

    @property
    def reasons(self) -> Counter[str]:
        """Why something was not checked, with how many cached pages; 0 where nobody could tell."""
        return self.counts.unchecked if self.problem is None else Counter({self.problem: 0})

    @property
    def unchecked(self) -> bool:
        return self.problem is not None or bool(self.counts.unchecked)

    def to_json(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "file": self.name,
            "filesystem": self.filesystem,
            "compared_pages": counts.compared,
            "same_pages": counts.same,
            "busy_pages": counts.busy,
            "unchecked": [{"reason": r, "pages": n} for r, n in self.reasons.items()],
            "differing": [d.to_json() for _, d in sorted(counts.differing.items())],
        }


def finding(
    results: Iterable[FileResult], pid: int | None = None, comm: str | None = None
) -> Finding | None:
    """The finding of all pages that differ; None if none does.

    :param pid: of the process that has the files mapped, if they are those of one
    :param comm: its name
    """
    bad = [result for result in results if result.counts.differing]
    if not bad:
        return None
    first = bad[0].counts.differing[min(bad[0].counts.differing)]
    seen = {
        "pid": pid,
        "comm": comm,
        "operation": "verify",
        "file": bad[0].name,
        "offset": first.first,
        "page_frame": first.frame,
        "time": time.time(),
        "expected": first.disk.hex(" ") + " (on disk)",
        "seen": first.cached.hex(" ") + " (in the page cache)",
    }
    known = {key: value for key, value in seen.items() if value is not None}
    count = sum(len(result.counts.differing) for result in bad)
    return Finding(NAME, "violation", count, known, ADVICE)


class Verifier:
    """Verifies files, several parts of a file at a time.

    :param pauses: seconds before each further look at a page that differs
    """

    def __init__(self, kernel: Frames, pauses: Iterable[float] = PAUSES) -> None:
        self._kernel = kernel
        self._pauses = tuple(pauses)
        self._pool = ThreadPoolExecutor(_THREADS)
        self._mine = local()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def verify(self, file: Cached) -> Counts:
        """Compares what of *file* is cached. OSError if it cannot be looked at."""
        pages = -(-file.size // PAGE)
        # Of a large file, such as a sparse image, little may be cached.
        parts = [
            (first + part, size)
            for first, count in divided(pages, SPAN)
            if file.cached(first * PAGE, count)
            for part, size in divided(count, CHUNK)
        ]
        counts = self._look_at(file, parts)
        self._confirm(file, counts)
        return counts

    def _confirm(self, file: Cached, counts: Counts) -> None:
        """Looks again, and acquits in *counts* what does not differ as it did each time."""
        for pause in self._pauses:
            suspects, counts.differing = counts.differing, {}
            if not suspects:
                return
            time.sleep(pause)
            again = self._look_at(file, runs(sorted(suspects)))
            for page, now in list(again.differing.items()):
                if now.digest != suspects[page].digest:
                    del again.differing[page]
                    again.busy += 1
            counts.add(again)

    def _look_at(self, file: Cached, parts: Iterable[tuple[int, int]]) -> Counts:
        counts = Counts()

        def look(part: tuple[int, int]) -> Counts:
            if not hasattr(self._mine, "look"):
                self._mine.look = _Look(self._kernel)
            mine: _Look = self._mine.look
            return mine.at(file, *part)

        for part in self._pool.map(look, parts):
            counts.add(part)
        return counts


class _Look:
    """One look at a few pages; its buffers are used again for the next."""

    def __init__(self, kernel: Frames) -> None:
        self._kernel = kernel
        self._cached, self._again = Buffer(CHUNK * PAGE), Buffer(CHUNK * PAGE)
        self._disk, self._zeros = Buffer(CHUNK * PAGE), Buffer(CHUNK * PAGE)

    def at(self, file: Cached, first: int, count: int) -> Counts:
        """Compares *count* pages from page *first* on, as far as they are cached."""
        size = file.size - first * PAGE
        count = min(count, -(-size // PAGE))
        if count <= 0:
            return Counts()  # truncated meanwhile
        with file.window(first * PAGE, count) as window:
            resident = window.resident()
            if 1 not in resident:
                return Counts()
            if file.refused:
                return Counts(unchecked=Counter({file.refused: resident.count(1)}))
            return self._compare(file, window, resident, first, size)

    def _compare(
        self, file: Cached, window: Mapped, resident: bytes, first: int, size: int
    ) -> Counts:
        counts = Counts()
        frames, flags = self._take(window, resident, self._cached)
        layout = Layout(file, first * PAGE, len(frames))
        wanted = [
            _sort(frame, state, kind, counts)
            for frame, state, kind in zip(frames, flags, layout.kinds, strict=True)
        ]
        suspects: dict[int, Buffer] = {}
        for begin, end, kind in alike(wanted):
            length = min(end * PAGE, size) - begin * PAGE
            suspects |= self._compare_run(file, layout, first, (begin, end, kind), length, counts)
        if not suspects:
            return counts
        frames_again, flags_again = self._take(window, resident, self._again)
        for page, disk in suspects.items():
            length = min(PAGE, size - page * PAGE)
            steady = frames_again[page] == frames[page] and not busy(flags_again[page])
            if steady and same(self._cached, self._again, page * PAGE, length):
                offset, frame = (first + page) * PAGE, frames[page]
                sides = self._cached.page(page)[:length], disk.page(page)[:length]
                counts.differing[first + page] = difference(offset, frame, *sides)
            else:
                counts.busy += 1
        return counts

    def _take(self, window: Mapped, resident: bytes, to: Buffer) -> tuple[list[int], list[int]]:
        """Copies the cached pages; the frame of each, 0 for the others, and its flags.

        In this order: a page that is written after the copy is dirty when it is asked about.
        """
        copied = bytearray(len(resident))
        for begin, end, state in alike(list(resident)):
            while state and begin < end:
                got = window.copy(begin, end - begin, to)
                copied[begin : begin + got] = b"\1" * got
                begin += got + 1  # behind the page that is gone
        frames = self._kernel.frames(window.address, len(resident))
        frames = [frame if was else 0 for frame, was in zip(frames, copied, strict=True)]
        return frames, self._kernel.flags(frames)

    def _compare_run(
        self,
        file: Cached,
        layout: Layout,
        first: int,
        run: tuple[int, int, int],
        length: int,
        counts: Counts,
    ) -> dict[int, Buffer]:
        """The pages of *run* that differ, with what they differ from."""
        begin, end, kind = run
        disk, at = self._zeros, begin * PAGE
        if kind == Kind.DATA:
            disk = self._disk
            try:
                got = self._read(file, layout, first * PAGE + at, length, at)
            except Unchecked as reason:
                if isinstance(reason, Unreadable) and end - begin > 1:
                    return self._compare_halves(file, layout, first, run, length, counts)
                counts.unchecked[str(reason)] += end - begin
                return {}
            if got < length:
                counts.busy += end - begin
                return {}
        if same(self._cached, disk, at, length):
            counts.same += end - begin
            return {}
        differ: dict[int, Buffer] = {}
        for page in range(begin, end):
            if same(self._cached, disk, page * PAGE, min(PAGE, at + length - page * PAGE)):
                counts.same += 1
            else:
                differ[page] = disk
        return differ

    def _compare_halves(
        self,
        file: Cached,
        layout: Layout,
        first: int,
        run: tuple[int, int, int],
        length: int,
        counts: Counts,
    ) -> dict[int, Buffer]:
        """_compare_run() of a run with an unreadable page: the others are still compared."""
        begin, end, kind = run
        middle = (begin + end) // 2
        left, right = (begin, middle, kind), (middle, end, kind)
        size = (middle - begin) * PAGE
        differ = self._compare_run(file, layout, first, left, size, counts)
        return differ | self._compare_run(file, layout, first, right, length - size, counts)

    def _read(self, file: Cached, layout: Layout, offset: int, length: int, at: int) -> int:
        """Reads the disk; the bytes there were, 0 if the file is being changed.

        :raises Unchecked: it cannot be read around the cache; the rest of the file is not tried
        """
        stamp = file.stamp
        for pause in (*_RETRIES, None):
            try:
                written = layout.written(offset, offset + length)
                return file.disk(offset, length, written, self._disk, at)
            except FromCache as reason:
                if pause is None:
                    file.refused = str(reason)
                    raise
            time.sleep(pause)
            if not layout.holds(file) or file.stamp != stamp:
                break
        return 0


def _sort(frame: int, flags: int, kind: int, counts: Counts) -> int | None:
    """What a page is to be compared with, Kind.DATA or Kind.ZERO; None if it is not."""
    if not frame:
        return None  # not cached, or gone meanwhile
    if busy(flags) or kind == Kind.LATER:
        counts.busy += 1
        return None
    if kind in REFUSED:
        counts.unchecked[REFUSED[kind]] += 1
        return None
    return kind


def difference(offset: int, frame: int, cached: bytes, disk: bytes) -> Difference:
    """How the page at *offset* differs from the disk."""
    where = [n for n, (a, b) in enumerate(zip(cached, disk, strict=True)) if a != b]
    shown = slice(where[0], where[0] + _SHOWN)
    digest = blake2b(cached + disk).digest()
    return Difference(
        offset, frame, len(where), offset + where[0], cached[shown], disk[shown], digest
    )


class Layout:
    """Where the pages of a part of a file are on disk."""

    def __init__(self, file: Cached, offset: int, pages: int) -> None:
        self._part = offset, pages * PAGE
        self._extents = list(file.extents(*self._part))
        self.kinds = [Kind.ZERO] * pages  #: of each page; what no extent covers is a hole
        for begin, end, kind in self._extents:
            first = max(0, (begin - offset) // PAGE)
            for page in range(first, min(pages, -(-(end - offset) // PAGE))):
                # A page of several extents is what the most difficult of them is.
                self.kinds[page] = max(self.kinds[page], kind)

    def holds(self, file: Cached) -> bool:
        """Whether *file* still has these extents."""
        return list(file.extents(*self._part)) == self._extents

    def written(self, begin: int, end: int) -> int:
        """How many bytes between *begin* and *end* are in blocks that hold data."""
        return sum(
            max(0, min(end, b) - max(begin, a)) for a, b, kind in self._extents if kind == Kind.DATA
        )


def alike(values: list[Any]) -> Iterator[tuple[int, int, Any]]:
    """The runs of equal values, as (begin, end, value); None is no value."""
    begin = 0
    while begin < len(values):
        end = begin + 1
        while end < len(values) and values[end] == values[begin]:
            end += 1
        if values[begin] is not None:
            yield begin, end, values[begin]
        begin = end


def divided(pages: int, size: int) -> Iterator[tuple[int, int]]:
    """*pages* pages as (first, count) of no more than *size*."""
    for first in range(0, pages, size):
        yield first, min(size, pages - first)


def runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Sorted page numbers as (first, count) of neighbours, no more than CHUNK together."""
    begin = 0
    while begin < len(pages):
        end = begin + 1
        while end < len(pages) and pages[end] == pages[end - 1] + 1 and end - begin < CHUNK:
            end += 1
        yield pages[begin], end - begin
        begin = end
