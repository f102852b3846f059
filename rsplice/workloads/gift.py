# SPDX-License-Identifier: MIT
"""gift: memory queued in a pipe by vmsplice(2), and read by a process of its own.

Done as it should be: pages that were only lent are not written again before the reader has
consumed them, pages that were given are unmapped and never seen again.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count, cycle

from rsplice.errors import RspliceError
from rsplice.workloads import native, transfer
from rsplice.workloads.core import (
    Budget,
    Calls,
    Crew,
    Pattern,
    Progress,
    Settings,
    Workload,
    run_threads,
    scratch,
)

MAX_SIZE = 1 << 24
READ_SIZE = 1 << 16


def run(settings: Settings, progress: Progress) -> Calls:
    """Passes ``count`` buffers of ``size`` bytes; each thread has a pipe of its own."""
    _check_size(settings)
    native.require()
    pattern = Pattern()
    with scratch() as directory:
        pipes = [transfer.Pipe() for _ in range(settings.threads)]
        reader = Crew(directory)
        try:
            reader.start("rsplice-reader", lambda calls: _read_all(calls, pipes, pattern))
            for pipe in pipes:
                pipe.close_reader()
            with reader.blamed():
                calls = _give_all(pipes, pattern, settings, progress)
            calls.merge(reader.wait(lambda: progress(1.0, settings.mode)))
            return calls
        finally:
            reader.stop()
            for pipe in pipes:
                pipe.close()


def _check_size(settings: Settings) -> None:
    if settings.size > MAX_SIZE:
        raise RspliceError(f"--size of gift is at most {MAX_SIZE >> 20}M")
    if settings.mode == "gift" and settings.size % mmap.PAGESIZE:
        raise RspliceError(
            f"--size {settings.size}: only whole pages can be given, "
            f"a multiple of {mmap.PAGESIZE} bytes; --mode lend takes any size"
        )


def _give_all(
    pipes: list[transfer.Pipe], pattern: Pattern, settings: Settings, progress: Progress
) -> Calls:
    budget = Budget(settings.count, settings.seconds)
    waiting = list(pipes)
    lock = threading.Lock()

    def work(calls: Calls) -> None:
        with lock:
            pipe = waiting.pop()
        buffers = (_fresh if settings.mode == "gift" else _reused)(pipe, settings.size)
        try:
            for number in count():
                if not budget.take():
                    return
                with next(buffers) as buffer:
                    pattern.fill(buffer, number * settings.size)
                    pipe.lend(calls, buffer, gift=settings.mode == "gift")
        finally:
            pipe.close_writer()

    return run_threads(work, settings, budget, progress)


def _fresh(_pipe: transfer.Pipe, size: int) -> Iterator[AbstractContextManager[memoryview]]:
    """Buffers each of which is unmapped when it has been given."""
    while True:
        yield transfer.fresh_pages(size)


def _reused(pipe: transfer.Pipe, size: int) -> Iterator[AbstractContextManager[memoryview]]:
    """Buffers in turn, so many that one has left the pipe when it is its turn again.

    A page takes a slot of the pipe for itself, until the reader has copied all of it.
    """
    pages = -(-size // mmap.PAGESIZE)
    others = -(-pipe.slots // pages)
    for buffer in cycle([memoryview(transfer.private_pages(size)) for _ in range(others + 1)]):
        yield nullcontext(buffer)


def _read_all(calls: Calls, pipes: list[transfer.Pipe], pattern: Pattern) -> None:
    settings = Settings("", READ_SIZE, None, None, threads=len(pipes))
    for pipe in pipes:
        pipe.close_writer()
    waiting = list(pipes)
    lock = threading.Lock()

    def work(mine: Calls) -> None:
        with lock:
            pipe = waiting.pop()
        try:
            _read(mine, pipe, pattern)
        finally:
            # Closed at once if the data is wrong: the giver waits for room in the pipe.
            pipe.close_reader()

    calls.merge(run_threads(work, settings, Budget(None, None), lambda _done, _what: None))


def _read(calls: Calls, pipe: transfer.Pipe, pattern: Pattern) -> None:
    buffer = memoryview(bytearray(READ_SIZE))
    done = 0
    while got := pipe.read(calls, buffer):
        pattern.expect(buffer[:got], done, "what was read from the pipe")
        done += got


WORKLOAD = Workload(
    "gift",
    "memory queued in a pipe by vmsplice, given away or only lent, and read",
    run,
    Settings("gift", size=1 << 16, count=1009, seconds=None, threads=1),
    modes=("gift", "lend"),
)
