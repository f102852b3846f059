# SPDX-License-Identifier: MIT
"""librsplice: empty buffers, filled by a file or a socket, handed on without a copy.

rsplice(3) says what each source and consumer permits, rsplice(7) why. Sizes and offsets are
bytes. Every call releases the interpreter's lock while it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import EINTR
from typing import Any, Protocol

from rsplice._native import ffi, lib

F_NONBLOCK: int = lib.RSPLICE_F_NONBLOCK  #: EAGAIN instead of waiting for data or for room
F_STRICT: int = lib.RSPLICE_F_STRICT  #: EOPNOTSUPP, and nothing moved, instead of a copy
F_MORE: int = lib.RSPLICE_F_MORE  #: more follows: to a socket, as MSG_MORE
F_SHARE: int = lib.RSPLICE_F_SHARE  #: pages that the source keeps may be lent, instead of a copy

WHY_NO_DIRECT: int = lib.RSPLICE_WHY_NO_DIRECT  #: the source cannot be read with O_DIRECT
WHY_ALIGNMENT: int = lib.RSPLICE_WHY_ALIGNMENT  #: the offset is not aligned to a block or page
WHY_PARTIAL: int = lib.RSPLICE_WHY_PARTIAL  #: less than a whole page, or than a whole block
WHY_SOCKET: int = lib.RSPLICE_WHY_SOCKET  #: out of socket buffers, once, into the final page
WHY_PIPE: int = lib.RSPLICE_WHY_PIPE  #: out of a pipe's pages, into the consumer's own
WHY_GENERATED: int = lib.RSPLICE_WHY_GENERATED  #: the CPU makes the bytes of this source
WHY_SLOTS: int = lib.RSPLICE_WHY_SLOTS  #: more pages than a pipe has slots

_call = lib.rsplice_at
_NULL = ffi.NULL


class HasFileno(Protocol):
    """A file, a socket, or anything else with a descriptor."""

    def fileno(self) -> int: ...


#: A descriptor, or what has one.
Descriptor = int | HasFileno


class Result:
    """What became of the bytes of the last successful call it was given to.

    One object may serve many calls: each success overwrites it, an error leaves it alone.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: Any = ffi.new("struct rsplice_result *")

    @property
    def moved(self) -> int:
        """Bytes whose page was filled empty and is the consumer's alone."""
        return int(self._counts.moved)

    @property
    def shared(self) -> int:
        """Bytes in pages that others refer to as well."""
        return int(self._counts.shared)

    @property
    def direct(self) -> int:
        """Bytes that a device put into the consumer's own page."""
        return int(self._counts.direct)

    @property
    def copied(self) -> int:
        """Bytes that the CPU copied or made."""
        return int(self._counts.copied)

    @property
    def unknown(self) -> int:
        """Bytes handed on in pages whose history cannot be known."""
        return int(self._counts.unknown)

    @property
    def why(self) -> int:
        """``WHY_*`` bits: of the bytes copied."""
        return int(self._counts.why)

    @property
    def reasons(self) -> list[str]:
        """The bits of ``why`` in words."""
        return list(_reasons(self.why))

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{name}={value}"
            for name in ("moved", "shared", "direct", "copied", "unknown")
            if (value := getattr(self, name))
        )
        return f"Result({counts})"


def _reasons(why: int) -> Iterator[str]:
    while why:
        bit = why & -why
        yield ffi.string(lib.rsplice_why(bit)).decode()
        why -= bit


def rsplice(
    fd_in: Descriptor,
    fd_out: Descriptor,
    length: int,
    offset_in: int | None = None,
    offset_out: int | None = None,
    flags: int = 0,
    result: Result | None = None,
) -> int:
    """Has *fd_in* fill up to *length* empty bytes and hands them to *fd_out*.

    :param fd_in: a regular file, block device, socket, pipe, or /dev/zero
    :param fd_out: a pipe, a socket, or a file in memory (memfd, tmpfs, hugetlbfs)
    :param length: bytes
    :param offset_in: where in a file to read; None for its position, which then advances
    :param offset_out: where in a file in memory to fill; None for its position, likewise
    :param flags: of ``F_NONBLOCK``, ``F_STRICT``, ``F_MORE``, ``F_SHARE``
    :param result: told what became of the bytes
    :returns: bytes, as read(2) would: 0 at the end, and maybe fewer than *length*
    :raises OSError: as rsplice(3) says, with its errno
    :raises ValueError: an offset or a length below 0
    """
    source = fd_in if isinstance(fd_in, int) else fd_in.fileno()
    destination = fd_out if isinstance(fd_out, int) else fd_out.fileno()
    if offset_in is None:
        offset_in = -1
    elif offset_in < 0:
        raise ValueError(f"offset_in is {offset_in}: below 0")
    if offset_out is None:
        offset_out = -1
    elif offset_out < 0:
        raise ValueError(f"offset_out is {offset_out}: below 0")
    if length < 0:
        raise ValueError(f"length is {length}: below 0")
    counts = _NULL if result is None else result._counts
    while True:
        done: int = _call(source, offset_in, destination, offset_out, length, flags, counts)
        if done >= 0:
            return done
        # A signal handler of Python's has run by now, and may have raised (PEP 475).
        if done != -EINTR:
            raise OSError(-done, os.strerror(-done))


def pending(fd_in: Descriptor) -> int:
    """Bytes that were taken out of the socket or pipe *fd_in* and that no consumer took: the next
    call with the same source delivers them first."""
    return int(lib.rsplice_pending(fd_in if isinstance(fd_in, int) else fd_in.fileno()))


def discard(fd_in: Descriptor) -> None:
    """Throws away what ``pending(fd_in)`` counts: before *fd_in* is closed."""
    lib.rsplice_discard(fd_in if isinstance(fd_in, int) else fd_in.fileno())
