# SPDX-License-Identifier: MIT
"""System calls that Python lacks, from csrc/workloads/calls.c.

Loaded when first used, so that workloads that need none of it run without.
"""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from rsplice.errors import RspliceError


@cache
def _native() -> Any:
    try:
        return importlib.import_module("rsplice._native")
    except ImportError as error:
        raise RspliceError(
            f"the C part of rsplice is not built: {error}; install rsplice with pip to have it"
        ) from error


def require() -> None:
    """Loads the C part. RspliceError if there is none."""
    _native()


def vmsplice(pipe: int, data: memoryview, gift: bool) -> int:
    """Queues the pages of *data* in a pipe, waiting for room; bytes, maybe fewer than there are.

    :param gift: give the pages away, with SPLICE_F_GIFT
    """
    native = _native()
    with native.ffi.from_buffer(data) as start:
        return _retried(lambda: native.lib.calls_vmsplice(pipe, start, len(data), gift))


def tee(source: int, destination: int, size: int) -> int:
    """Queues up to *size* bytes that lie in one pipe in another as well; bytes."""
    lib = _native().lib
    return _retried(lambda: lib.calls_tee(source, destination, size))


class Ring:
    """An io_uring, for one thread."""

    def __init__(self) -> None:
        """RspliceError if there can be none."""
        native = _native()
        self._ffi, self._lib = native.ffi, native.lib
        ret = self._ffi.new("struct calls_ring **")
        if error := -self._lib.calls_ring_create(ret):
            more = {
                errno.ENOSYS: "the kernel has none, or rsplice was built without liburing",
                errno.EPERM: "forbidden, by kernel.io_uring_disabled or a seccomp filter",
            }.get(error, os.strerror(error))
            raise RspliceError(f"no io_uring: {more}")
        self._ring = ret[0]

    def close(self) -> None:
        self._lib.calls_ring_destroy(self._ring)

    def relay(
        self, source: int, destination: int, buffer: memoryview, offset: int
    ) -> tuple[int, int]:
        """Reads a buffer at *offset* and writes it at *offset*, linked; bytes read and written."""
        done = self._ffi.new("struct calls_relayed *")
        with self._ffi.from_buffer(buffer, require_writable=True) as start:
            args = (source, destination, start, len(buffer), offset, done)
            _checked(self._lib.calls_ring_relay(self._ring, *args))
        # A short read ends the chain.
        written = 0 if done.written == -errno.ECANCELED else _checked(done.written)
        return _checked(done.read), written

    def write(self, destination: int, data: memoryview, offset: int) -> int:
        """Writes *data* at *offset*; bytes written."""
        with self._ffi.from_buffer(data) as start:
            args = (destination, start, len(data), offset)
            return _checked(self._lib.calls_ring_write(self._ring, *args))


def _checked(result: int) -> int:
    """A result of bytes or -errno. OSError."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _retried(call: Callable[[], int]) -> int:
    while (result := call()) == -errno.EINTR:
        pass
    return _checked(result)
