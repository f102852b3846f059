# SPDX-License-Identifier: MIT
"""serve: a static file sent over loopback TCP, to clients in a process of their own."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rsplice.workloads import transfer, zerocopy
from rsplice.workloads.core import (
    TCP,
    Budget,
    Calls,
    Crew,
    Pattern,
    Progress,
    Settings,
    Workload,
    create,
    filesystem_of,
    run_threads,
    scratch,
)

#: What a server without sendfile reads and writes at a time, and a client receives.
BUFFER_SIZE = 1 << 16

Check = Callable[[memoryview], None]


def run(settings: Settings, progress: Progress) -> Calls:
    """Serves a file of ``size`` bytes ``count`` times, over one connection a thread."""
    with scratch() as directory:
        page = directory / "page.html"
        pattern = Pattern()
        os.close(create(page, settings.size, pattern))
        pairs = [transfer.tcp_pair() for _ in range(settings.threads)]
        clients = Crew(directory)
        try:
            check = partial(_expect_pages, pattern, settings.size)
            clients.start("rsplice-client", lambda calls: _receive(calls, pairs, check))
            for _, far in pairs:
                far.close()
            with clients.blamed():
                calls = _serve(page, [near for near, _ in pairs], settings, progress)
            calls.merge(clients.wait(lambda: progress(1.0, settings.mode)))
            return calls
        finally:
            clients.stop()
            for near, _ in pairs:
                near.close()


def _serve(
    page: Path, connections: list[socket.socket], settings: Settings, progress: Progress
) -> Calls:
    kind = filesystem_of(page.parent)
    budget = Budget(settings.count, settings.seconds)
    waiting = list(connections)
    lock = threading.Lock()

    def work(calls: Calls) -> None:
        with lock:
            connection = waiting.pop()
        with ExitStack() as stack:
            file = stack.enter_context(open(page, "rb", buffering=0))
            source = transfer.End(file.fileno(), kind)
            serve = _server(settings, calls, stack, source, connection)
            while budget.take():
                serve()
        connection.shutdown(socket.SHUT_WR)

    return run_threads(work, settings, budget, progress)


def _server(
    settings: Settings,
    calls: Calls,
    stack: ExitStack,
    source: transfer.End,
    connection: socket.socket,
) -> Callable[[], None]:
    """The function that sends the whole file once; what it needs goes with *stack*."""
    destination = transfer.end_of(connection)
    size = settings.size
    if settings.mode == "splice":
        pipe = transfer.Pipe()
        stack.callback(pipe.close)
    if settings.mode == "zerocopy":
        sender = zerocopy.Sender(calls, connection, BUFFER_SIZE)
        stack.callback(sender.finish)
    if settings.mode == "write":
        buffer = memoryview(bytearray(BUFFER_SIZE))

    def write() -> None:
        os.lseek(source.fd, 0, os.SEEK_SET)
        left = size
        while left:
            left -= transfer.by_read_write(calls, source, destination, buffer[:left])

    def sendfile() -> None:
        transfer.by_sendfile(calls, source, destination, 0, size)

    def splice() -> None:
        transfer.by_splice(calls, pipe, source, destination, 0, size, seek=False)

    def send_zerocopy() -> None:
        os.lseek(source.fd, 0, os.SEEK_SET)
        left = size
        while left:
            free = sender.buffer()
            got = transfer.read(calls, source, free.data[:left])
            sender.send(free, got)
            left -= got

    return {
        "write": write,
        "sendfile": sendfile,
        "splice": splice,
        "zerocopy": send_zerocopy,
    }[settings.mode]


def _receive(
    calls: Calls, pairs: list[tuple[socket.socket, socket.socket]], check: partial[Check]
) -> None:
    settings = Settings("", BUFFER_SIZE, None, None, threads=len(pairs))
    for near, _ in pairs:
        near.close()
    waiting = [far for _, far in pairs]
    lock = threading.Lock()

    def work(mine: Calls) -> None:
        with lock:
            connection = waiting.pop()
        # Closed at once if the data is wrong: the server waits for this end to read on.
        with connection:
            transfer.drain_socket(mine, connection, TCP, BUFFER_SIZE, check())

    calls.merge(run_threads(work, settings, Budget(None, None), lambda _done, _what: None))


def _expect_pages(pattern: Pattern, size: int) -> Check:
    """A check that what is received is the file over and over."""
    at = 0

    def check(data: memoryview) -> None:
        nonlocal at
        while data:
            piece = data[: size - at]
            pattern.expect(piece, at, "what a client received")
            at = (at + len(piece)) % size
            data = data[len(piece) :]

    return check


WORKLOAD = Workload(
    "serve",
    "a file of --size served over loopback TCP",
    run,
    Settings("sendfile", size=1 << 20, count=211, seconds=None, threads=1),
    modes=("write", "sendfile", "splice", "zerocopy"),
)
