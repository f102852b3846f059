# SPDX-License-Identifier: MIT
"""The ways to carry bytes between descriptors, each counting its calls.

Vectored calls stand for read(2) and write(2) on files: they fill a buffer that is there already,
and the interpreter makes none of its own, so an audit shows the workload's calls and no others.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from rsplice.errors import RspliceError
from rsplice.workloads.core import MEMORY, PIPE, TCP, UNIX, Calls


@dataclass(frozen=True)
class End:
    """A descriptor and the name an audit has for what it refers to."""

    fd: int
    kind: str


def read(calls: Calls, source: End, buffer: memoryview) -> int:
    """Fills *buffer* from the file position; bytes read."""
    got = os.readv(source.fd, [buffer])
    _expect_progress(got, "readv")
    return calls.add("readv", source.kind, MEMORY, got)


def write(calls: Calls, data: memoryview, destination: End) -> None:
    """Writes all of *data*."""
    done = 0
    while done < len(data):
        sent = os.writev(destination.fd, [data[done:]])
        done += calls.add("writev", MEMORY, destination.kind, sent)


def by_read_write(calls: Calls, source: End, destination: End, buffer: memoryview) -> int:
    """Carries up to one buffer from file position to file position; bytes carried."""
    length = read(calls, source, buffer)
    write(calls, buffer[:length], destination)
    return length


def by_sendfile(calls: Calls, source: End, destination: End, offset: int, size: int) -> None:
    """Sends *size* bytes of a file that lie at *offset*."""
    while size:
        sent = os.sendfile(destination.fd, source.fd, offset, size)
        _expect_progress(sent, "sendfile")
        calls.add("sendfile", source.kind, destination.kind, sent)
        offset += sent
        size -= sent


def by_copy_file_range(calls: Calls, source: End, destination: End, offset: int, size: int) -> None:
    """Copies *size* bytes at *offset* of one file to the same place in another."""
    while size:
        done = os.copy_file_range(source.fd, destination.fd, size, offset, offset)
        _expect_progress(done, "copy_file_range")
        calls.add("copy_file_range", source.kind, destination.kind, done)
        offset += done
        size -= done


class Pipe:
    """A pipe of this process, to splice through."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)

    def fill(self, calls: Calls, source: End, offset: int, size: int) -> int:
        """Queues up to *size* bytes of a file; how many."""
        got = os.splice(source.fd, self.writer, size, offset_src=offset)
        _expect_progress(got, "splice")
        return calls.add("splice", source.kind, PIPE, got)

    def drain(self, calls: Calls, destination: End, size: int, offset: int | None = None) -> None:
        """Hands on *size* queued bytes."""
        while size:
            done = os.splice(self.reader, destination.fd, size, offset_dst=offset)
            _expect_progress(done, "splice")
            calls.add("splice", PIPE, destination.kind, done)
            size -= done
            if offset is not None:
                offset += done


def by_splice(
    calls: Calls, pipe: Pipe, source: End, destination: End, offset: int, size: int, seek: bool
) -> None:
    """Carries *size* bytes at *offset* through *pipe*; to the same place if *seek*."""
    while size:
        queued = pipe.fill(calls, source, offset, size)
        pipe.drain(calls, destination, queued, offset if seek else None)
        offset += queued
        size -= queued


def drain_socket(calls: Calls, connection: socket.socket, kind: str, size: int) -> None:
    """Receives until the peer shuts down, *size* bytes at a time."""
    buffer = bytearray(size)
    while calls.add("recvfrom", kind, MEMORY, connection.recv_into(buffer)):
        pass


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected loopback TCP sockets. RspliceError if there is no loopback."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
    except OSError as error:
        raise RspliceError(
            f"no TCP over the loopback: {error}; bring it up with: ip link set lo up"
        ) from error
    return near, far


def end_of(connection: socket.socket) -> End:
    """The socket as an end to write to."""
    return End(connection.fileno(), UNIX if connection.family == socket.AF_UNIX else TCP)


def _expect_progress(done: int, call: str) -> None:
    if done == 0:
        raise RspliceError(f"{call} carried nothing: the workload's scratch file is shorter now")
