# SPDX-License-Identifier: MIT
"""memfd: a part of a file put into a fresh memfd, with two copies, with one, or with none."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rsplice.workloads import native, transfer
from rsplice.workloads.core import (
    Budget,
    Calls,
    Pattern,
    Progress,
    Settings,
    Workload,
    create,
    filesystem_of,
    run_threads,
    scratch,
)

#: Parts of the file; further fills start over.
FILE_PARTS = 16
BUFFER_SIZE = 1 << 16
MEMFD = "memfd"

#: Puts *size* bytes at an offset of the source into a memfd.
Fill = Callable[[int, int, int], None]


def run(settings: Settings, progress: Progress) -> Calls:
    """Fills ``count`` memfds of ``size`` bytes and checks what is in them."""
    pattern = Pattern()
    budget = Budget(settings.count, settings.seconds)
    with scratch() as directory:
        file = directory / "source"
        os.close(create(file, settings.size * FILE_PARTS, pattern))
        numbers = count()
        lock = threading.Lock()

        def part() -> int:
            with lock:
                return next(numbers) % FILE_PARTS

        def work(calls: Calls) -> None:
            with _filler(settings, calls, file) as fill:
                while budget.take():
                    _fill_one(fill, pattern, part() * settings.size, settings.size)

        return run_threads(work, settings, budget, progress)


def _fill_one(fill: Fill, pattern: Pattern, offset: int, size: int) -> None:
    fd = os.memfd_create("rsplice-workload", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        fill(fd, offset, size)
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as pages, memoryview(pages) as view:
            pattern.expect(view, offset, "a memfd")
    finally:
        os.close(fd)


@contextmanager
def _filler(settings: Settings, calls: Calls, file: Path) -> Iterator[Fill]:
    """The function that fills, for one thread."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        source = transfer.End(fd, filesystem_of(file.parent))
        if settings.mode == "read":
            yield partial(_by_read, calls, source, memoryview(bytearray(BUFFER_SIZE)))
        elif settings.mode == "mmap":
            yield partial(_by_mmap, calls, source)
        else:
            yield partial(_by_rsplice, calls, source, *_binding())
    finally:
        os.close(fd)


def _by_read(
    calls: Calls, source: transfer.End, buffer: memoryview, memfd: int, offset: int, size: int
) -> None:
    """Two copies: into a buffer, and from there into the memfd."""
    os.lseek(source.fd, offset, os.SEEK_SET)
    while size:
        size -= transfer.by_read_write(calls, source, transfer.End(memfd, MEMFD), buffer[:size])


def _by_mmap(calls: Calls, source: transfer.End, memfd: int, offset: int, size: int) -> None:
    """One copy: into the memfd's own pages, which are mapped."""
    os.lseek(source.fd, offset, os.SEEK_SET)
    with mmap.mmap(memfd, size) as pages, memoryview(pages) as view:
        done = 0
        while done < size:
            done += transfer.read(calls, source, view[done:])


def _by_rsplice(
    calls: Calls,
    source: transfer.End,
    rsplice: Callable[..., int],
    result: Any,
    memfd: int,
    offset: int,
    size: int,
) -> None:
    """None, where the device can fill the memfd's pages itself."""
    done = 0
    while done < size:
        got = rsplice(source.fd, memfd, size - done, offset + done, done, result=result)
        transfer.expect_progress(got, "rsplice")
        done += calls.add("rsplice", source.kind, MEMFD, got)
        for name in ("moved", "shared", "direct", "copied", "unknown"):
            calls.reported[name] += getattr(result, name)


def _binding() -> tuple[Callable[..., int], Any]:
    """librsplice's call, and a structure for what it tells."""
    native.require()
    from rsplice import library

    return library.rsplice, library.Result()


WORKLOAD = Workload(
    "memfd",
    "a part of a file put into a fresh memfd of --size, and checked",
    run,
    Settings("rsplice", size=1 << 20, count=211, seconds=None, threads=1),
    modes=("read", "mmap", "rsplice"),
)
