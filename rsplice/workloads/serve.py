# SPDX-License-Identifier: MIT
"""serve: a static file sent over loopback TCP, to clients in a process of their own."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

from rsplice.workloads import transfer
from rsplice.workloads.core import (
    TCP,
    Budget,
    Calls,
    Crew,
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


def run(settings: Settings, progress: Progress) -> Calls:
    """Serves a file of ``size`` bytes ``count`` times, over one connection a thread."""
    with scratch() as directory:
        page = directory / "page.html"
        os.close(create(page, settings.size))
        pairs = [transfer.tcp_pair() for _ in range(settings.threads)]
        clients = Crew(directory)
        try:
            clients.start("rsplice-client", lambda calls: _receive(calls, pairs))
            for _, far in pairs:
                far.close()
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
        destination = transfer.end_of(connection)
        buffer = memoryview(bytearray(BUFFER_SIZE))
        with open(page, "rb", buffering=0) as file:
            source = transfer.End(file.fileno(), kind)
            while budget.take():
                if settings.mode == "sendfile":
                    transfer.by_sendfile(calls, source, destination, 0, settings.size)
                else:
                    _write_file(calls, source, destination, settings.size, buffer)
        connection.shutdown(socket.SHUT_WR)

    return run_threads(work, settings, budget, progress)


def _write_file(
    calls: Calls, source: transfer.End, destination: transfer.End, size: int, buffer: memoryview
) -> None:
    os.lseek(source.fd, 0, os.SEEK_SET)
    while size:
        size -= transfer.by_read_write(calls, source, destination, buffer[:size])


def _receive(calls: Calls, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    counted = [Calls() for _ in pairs]
    threads = []
    for (near, far), mine in zip(pairs, counted, strict=True):
        near.close()
        args = (mine, far, TCP, BUFFER_SIZE)
        threads.append(threading.Thread(target=transfer.drain_socket, args=args))
    for thread in threads:
        thread.start()
    for thread, mine in zip(threads, counted, strict=True):
        thread.join()
        calls.merge(mine)


WORKLOAD = Workload(
    "serve",
    "a file of --size served over loopback TCP",
    run,
    Settings("sendfile", size=1 << 20, count=211, seconds=None, threads=1),
    modes=("write", "sendfile"),
)
