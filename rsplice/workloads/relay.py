# SPDX-License-Identifier: MIT
"""relay: a file copied to another, chunk by chunk, one way or the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from rsplice.workloads import native, transfer
from rsplice.workloads.core import (
    Budget,
    Calls,
    Progress,
    Settings,
    Workload,
    create,
    filesystem_of,
    run_threads,
    scratch,
)

#: Chunks in each file; further ones start over.
FILE_CHUNKS = 16


def run(settings: Settings, progress: Progress) -> Calls:
    """Relays ``count`` chunks of ``size`` bytes; each thread has files of its own."""
    with scratch() as directory:
        numbers = count()
        lock = threading.Lock()
        budget = Budget(settings.count, settings.seconds)

        def work(calls: Calls) -> None:
            with lock:
                number = next(numbers)
            _relay(directory, number, settings, budget, calls)

        return run_threads(work, settings, budget, progress)


def _relay(directory: Path, number: int, settings: Settings, budget: Budget, calls: Calls) -> None:
    kind = filesystem_of(directory)
    length = settings.size * FILE_CHUNKS
    source = transfer.End(create(directory / f"source-{number}", length), kind)
    destination = transfer.End(create(directory / f"destination-{number}", 0), kind)
    with ExitStack() as stack:
        stack.callback(os.close, source.fd)
        stack.callback(os.close, destination.fd)
        carry = _carrier(settings, calls, stack, source, destination)
        for chunk in count():
            if not budget.take():
                return
            carry(chunk % FILE_CHUNKS * settings.size, settings.size)


def _carrier(
    settings: Settings,
    calls: Calls,
    stack: ExitStack,
    source: transfer.End,
    destination: transfer.End,
) -> Callable[[int, int], None]:
    """The function that carries the bytes at (offset, size); what it needs goes with *stack*."""
    if settings.mode == "splice":
        pipe = transfer.Pipe()
        stack.callback(pipe.close)
    if settings.mode == "io_uring":
        ring = native.Ring()
        stack.callback(ring.close)
    buffer = memoryview(bytearray(settings.size))

    def read_write(offset: int, size: int) -> None:
        os.lseek(source.fd, offset, os.SEEK_SET)
        os.lseek(destination.fd, offset, os.SEEK_SET)
        while size:
            size -= transfer.by_read_write(calls, source, destination, buffer[:size])

    def splice(offset: int, size: int) -> None:
        transfer.by_splice(calls, pipe, source, destination, offset, size, seek=True)

    def sendfile(offset: int, size: int) -> None:
        os.lseek(destination.fd, offset, os.SEEK_SET)
        transfer.by_sendfile(calls, source, destination, offset, size)

    def copy_file_range(offset: int, size: int) -> None:
        transfer.by_copy_file_range(calls, source, destination, offset, size)

    def io_uring(offset: int, _size: int) -> None:
        transfer.by_ring(calls, ring, source, destination, buffer, offset)

    return {
        "read-write": read_write,
        "splice": splice,
        "sendfile": sendfile,
        "copy_file_range": copy_file_range,
        "io_uring": io_uring,
    }[settings.mode]


WORKLOAD = Workload(
    "relay",
    "a file copied to another in chunks of --size",
    run,
    Settings("read-write", size=1 << 16, count=1009, seconds=None, threads=1),
    modes=("read-write", "splice", "sendfile", "copy_file_range", "io_uring"),
)
