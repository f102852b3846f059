# SPDX-License-Identifier: MIT
"""Sending with MSG_ZEROCOPY: a buffer is free again when the kernel has said so, not before."""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import struct
from dataclasses import dataclass

from rsplice.errors import RspliceError
from rsplice.workloads.core import MEMORY, Calls
from rsplice.workloads.transfer import end_of

BUFFERS = 16

# Python's socket module does not have these.
_SO_ZEROCOPY = 60
_MSG_ZEROCOPY = 0x4000000
_ORIGIN_ZEROCOPY = 5
_CODE_COPIED = 1

_NUMBERS = 1 << 32  #: the kernel numbers the sends of a socket with 32 bits

#: struct sock_extended_err: errno, origin, type, code, padding, first and last send told of
_EXTENDED_ERROR = struct.Struct("=IBBBBII")


@dataclass(eq=False)
class Buffer:
    """Memory to send from."""

    data: memoryview
    users: int = 0  #: sends that the kernel has not told of, and the caller


class Sender:
    """Sends buffers of its own over a TCP connection, and counts what the kernel says of them."""

    def __init__(self, calls: Calls, connection: socket.socket, size: int) -> None:
        """Has *BUFFERS* buffers of *size* bytes. RspliceError without SO_ZEROCOPY."""
        try:
            connection.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
        except OSError as error:
            raise RspliceError(f"no SO_ZEROCOPY: {error.strerror}; it needs Linux 4.14") from error
        self._calls = calls
        self._connection = connection
        self._kind = end_of(connection).kind
        self._poll = select.poll()
        self._poll.register(connection, 0)
        self._buffers = [Buffer(memoryview(mmap.mmap(-1, size))) for _ in range(BUFFERS)]
        self._free = list(self._buffers)
        self._sends = 0
        #: bytes and buffer of the sends that the kernel has not told of, by number
        self._awaited: dict[int, tuple[int, Buffer]] = {}

    def buffer(self) -> Buffer:
        """A buffer that nobody refers to; to be given to send()."""
        while not self._free:
            self._await_notification()
        buffer = self._free.pop()
        buffer.users = 1
        return buffer

    def send(self, buffer: Buffer, size: int) -> None:
        """Sends the first *size* bytes; the caller must not touch the buffer any more."""
        done = 0
        while done < size:
            sent, zerocopy = self._send(buffer.data[done:size])
            done += self._calls.add("sendto", MEMORY, self._kind, sent)
            if zerocopy:
                buffer.users += 1
                self._awaited[self._sends] = (sent, buffer)
                self._sends = (self._sends + 1) % _NUMBERS
        self._release(buffer)

    def finish(self) -> None:
        """Waits until the kernel refers to no buffer."""
        while self._awaited:
            self._await_notification()

    def _release(self, buffer: Buffer) -> None:
        buffer.users -= 1
        if not buffer.users:
            self._free.append(buffer)

    def _send(self, data: memoryview) -> tuple[int, bool]:
        while True:
            try:
                return self._connection.send(data, _MSG_ZEROCOPY), True
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            # So many pages are locked, or notifications kept, that no more may be.
            if not self._awaited:
                self._calls.reported["zerocopy_refused"] += 1
                return self._connection.send(data), False
            self._await_notification()

    def _await_notification(self) -> None:
        events = self._poll.poll()[0][1]
        try:
            _, ancillary, _, _ = self._connection.recvmsg(0, 128, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            code = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code or events & select.POLLHUP:
                code = code or errno.EPIPE
                raise OSError(code, os.strerror(code)) from None
            return
        for _, _, data in ancillary:
            self._take(*_EXTENDED_ERROR.unpack_from(data))

    def _take(
        self, _error: int, origin: int, _type: int, code: int, _pad: int, first: int, last: int
    ) -> None:
        if origin != _ORIGIN_ZEROCOPY:
            raise RspliceError(f"the error queue tells of origin {origin}, not of zerocopy")
        for i in range((last - first) % _NUMBERS + 1):
            sent, buffer = self._awaited.pop((first + i) % _NUMBERS)
            copied = sent if code & _CODE_COPIED else 0
            self._calls.reported["notified"] += 1
            self._calls.reported["notified_copied"] += bool(copied)
            self._calls.reported["notified_copied_bytes"] += copied
            self._release(buffer)
