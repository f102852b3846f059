# SPDX-License-Identifier: MIT
"""The ways to carry bytes between descriptors, each counting its calls.

Vectored calls stand for read(2) and write(2) on files: they fill a buffer that is there already,
and the interpreter makes none of its own, so an audit shows the workload's calls and no others.
(Python's preadv and pwritev are one system call or another, as its libc has it.)
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rsplice.errors import RspliceError
from rsplice.workloads import native
from rsplice.workloads.core import MEMORY, PIPE, TCP, UNIX, Calls


@dataclass(frozen=True)
class End:
    """A descriptor and the name an audit has for what it refers to."""

    fd: int
    kind: str


def read(calls: Calls, source: End, buffer: memoryview) -> int:
    """Fills *buffer* from the file position; bytes read."""
    got = os.readv(source.fd, [buffer])
    expect_progress(got, "readv")
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


def by_ring(
    calls: Calls, ring: native.Ring, source: End, destination: End, buffer: memoryview, offset: int
) -> None:
    """Copies a buffer's size at *offset* of one file to the same place in another."""
    while buffer:
        got, written = ring.relay(source.fd, destination.fd, buffer, offset)
        expect_progress(got, "io_uring read")
        calls.add("io_uring read", source.kind, MEMORY, got)
        calls.add("io_uring write", MEMORY, destination.kind, written)
        while written < got:
            more = ring.write(destination.fd, buffer[written:got], offset + written)
            written += calls.add("io_uring write", MEMORY, destination.kind, more)
        offset += got
        buffer = buffer[got:]


def by_sendfile(calls: Calls, source: End, destination: End, offset: int, size: int) -> None:
    """Sends *size* bytes of a file that lie at *offset*."""
    while size:
        sent = os.sendfile(destination.fd, source.fd, offset, size)
        expect_progress(sent, "sendfile")
        calls.add("sendfile", source.kind, destination.kind, sent)
        offset += sent
        size -= sent


def by_copy_file_range(calls: Calls, source: End, destination: End, offset: int, size: int) -> None:
    """Copies *size* bytes at *offset* of one file to the same place in another."""
    while size:
        done = os.copy_file_range(source.fd, destination.fd, size, offset, offset)
        expect_progress(done, "copy_file_range")
        calls.add("copy_file_range", source.kind, destination.kind, done)
        offset += done
        size -= done


def private_pages(size: int) -> mmap.mmap:
    """Anonymous memory of this process alone, aligned to a page."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@contextmanager
def fresh_pages(size: int) -> Iterator[memoryview]:
    """Memory to give away: it is unmapped in the end."""
    with private_pages(size) as pages, memoryview(pages) as view:
        yield view


class Pipe:
    """A pipe of this process, to splice through or to lend memory to."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.slots = fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ) // mmap.PAGESIZE
        self._open = {self.reader, self.writer}

    def close(self) -> None:
        self.close_reader()
        self.close_writer()

    def close_reader(self) -> None:
        self._close(self.reader)

    def close_writer(self) -> None:
        self._close(self.writer)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)

    def read(self, calls: Calls, buffer: memoryview) -> int:
        """Copies queued bytes to *buffer*; how many, 0 when no writer is left."""
        return calls.add("readv", PIPE, MEMORY, os.readv(self.reader, [buffer]))

    def lend(self, calls: Calls, data: memoryview, gift: bool) -> None:
        """Queues the very pages of *data*, waiting for room; as a present, if *gift*."""
        done = 0
        while done < len(data):
            queued = native.vmsplice(self.writer, data[done:], gift)
            done += calls.add("vmsplice", MEMORY, PIPE, queued)

    def tee(self, calls: Calls, other: Pipe, size: int) -> None:
        """Queues the first *size* bytes in *other* as well, which must have room for them."""
        queued = native.tee(self.reader, other.writer, size)
        calls.add("tee", PIPE, PIPE, queued)
        if queued != size:
            raise RspliceError(f"tee queued {queued} of {size} bytes in an empty pipe")

    def fill(self, calls: Calls, source: End, offset: int, size: int) -> int:
        """Queues up to *size* bytes of a file; how many."""
        got = os.splice(source.fd, self.writer, size, offset_src=offset)
        expect_progress(got, "splice")
        return calls.add("splice", source.kind, PIPE, got)

    def drain(
        self,
        calls: Calls,
        destination: End,
        size: int,
        offset: int | None = None,
        move: bool = False,
    ) -> None:
        """Hands on *size* queued bytes; with *move* it asks for the pages to be moved."""
        flags = os.SPLICE_F_MOVE if move else 0
        while size:
            done = os.splice(self.reader, destination.fd, size, offset_dst=offset, flags=flags)
            expect_progress(done, "splice")
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


def drain_socket(
    calls: Calls,
    connection: socket.socket,
    kind: str,
    size: int,
    check: Callable[[memoryview], None] | None = None,
) -> None:
    """Receives until the peer shuts down, *size* bytes at a time, and has them checked."""
    buffer = memoryview(bytearray(size))
    while got := calls.add("recvfrom", kind, MEMORY, connection.recv_into(buffer)):
        if check:
            check(buffer[:got])


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


def expect_progress(done: int, call: str) -> None:
    if done == 0:
        raise RspliceError(f"{call} carried nothing: the workload's scratch file is shorter now")
