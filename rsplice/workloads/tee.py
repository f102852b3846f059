# SPDX-License-Identifier: MIT
"""tee: what is queued in one pipe goes to several, by tee(2), and to the last by splice(2)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from mmap import PAGESIZE
from pathlib import Path
from queue import SimpleQueue

from rsplice.workloads import native, transfer
from rsplice.workloads.core import (
    PIPE,
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

#: Chunks in the file; further ones start over.
FILE_CHUNKS = 16


@dataclass
class Output:
    """A pipe with a thread that reads it."""

    pipe: transfer.Pipe = field(default_factory=transfer.Pipe)
    #: (offset in the file, bytes) that were queued; None at the end
    queued: SimpleQueue[tuple[int, int] | None] = field(default_factory=SimpleQueue)
    #: True when they have been read, False if they never will be
    emptied: SimpleQueue[bool] = field(default_factory=SimpleQueue)

    def read(self, pattern: Pattern, calls: Calls) -> None:
        """Reads all that is queued, and checks it."""
        buffer = memoryview(bytearray(self.pipe.slots * PAGESIZE))
        try:
            while work := self.queued.get():
                offset, left = work
                while left:
                    got = self.pipe.read(calls, buffer[:left])
                    pattern.expect(buffer[:got], offset, "what was read from a pipe")
                    offset, left = offset + got, left - got
                self.emptied.put(True)
        finally:
            self.emptied.put(False)


def run(settings: Settings, progress: Progress) -> Calls:
    """Hands ``count`` chunks of a file, ``size`` bytes each, to ``threads`` pipes."""
    native.require()
    pattern = Pattern()
    budget = Budget(settings.count, settings.seconds)
    with scratch() as directory, ExitStack() as stack:
        outputs = [Output() for _ in range(settings.threads)]
        for output in outputs:
            stack.callback(output.pipe.close)
        works: list[Callable[[Calls], None]] = [partial(output.read, pattern) for output in outputs]
        works.append(partial(_feed, directory, pattern, settings, budget, outputs))
        lock = threading.Lock()

        def work(calls: Calls) -> None:
            with lock:
                mine = works.pop()
            mine(calls)

        return run_threads(work, replace(settings, threads=len(works)), budget, progress)


def _feed(
    directory: Path,
    pattern: Pattern,
    settings: Settings,
    budget: Budget,
    outputs: list[Output],
    calls: Calls,
) -> None:
    source = transfer.End(
        create(directory / "source", settings.size * FILE_CHUNKS, pattern),
        filesystem_of(directory),
    )
    pipe = transfer.Pipe()
    try:
        for chunk in count():
            if not budget.take():
                return
            offset = chunk % FILE_CHUNKS * settings.size
            end = offset + settings.size
            while offset < end:
                got = pipe.fill(calls, source, offset, min(end - offset, _room(offset, outputs)))
                if not _fan_out(calls, pipe, offset, got, outputs):
                    return
                offset += got
    finally:
        pipe.close()
        os.close(source.fd)
        for output in outputs:
            output.queued.put(None)


def _room(offset: int, outputs: list[Output]) -> int:
    """Bytes from *offset* of a file that each output takes when empty: a slot holds one page."""
    return min(output.pipe.slots for output in outputs) * PAGESIZE - offset % PAGESIZE


def _fan_out(
    calls: Calls, pipe: transfer.Pipe, offset: int, size: int, outputs: list[Output]
) -> bool:
    """Hands all that is queued to every output, and waits until they are empty again.

    tee(2) starts at the front each time, so what did not fit could not be made up for. False if
    a reader has given up.
    """
    *others, last = outputs
    for output in others:
        pipe.tee(calls, output.pipe, size)
    pipe.drain(calls, transfer.End(last.pipe.writer, PIPE), size)
    for output in outputs:
        output.queued.put((offset, size))
    return all(output.emptied.get() for output in outputs)


WORKLOAD = Workload(
    "tee",
    "what is queued in one pipe handed to --threads others, each with a reader",
    run,
    Settings("", size=1 << 16, count=1009, seconds=None, threads=3),
)
