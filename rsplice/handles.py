# SPDX-License-Identifier: MIT
"""Opens a file by device and inode: its name may be unknown, or another one's by now."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

# struct file_handle (fcntl.h): bytes that follow, type, bytes.
_HANDLE = struct.Struct("=Ii")
_BYTES = 128  # MAX_HANDLE_SZ
# Types of handles (include/linux/exportfs.h; fs/xfs/xfs_export.h, fs/btrfs/export.h): how the inode
# is written and where, and where the generation is. Others give some of them another meaning.
_LAYOUTS = {0x01: ("=I", 0, 4), 0x81: ("=Q", 0, 8), 0x4D: ("=Q", 0, 16)}


def open_inode(device: int, inode: int, generation: int) -> int:
    """A read-only descriptor of a file on a mounted ext2, ext3, ext4, xfs or btrfs.

    :param device: the kernel's dev_t, as struct super_block has it
    :raises OSError: with the reason; ESTALE if there is no such file any more
    """
    error = OSError(None, "its filesystem is mounted nowhere here")
    for point in _mount_points(f"{device >> 20}:{device & 0xFFFFF}"):
        try:
            return _open_at(point, inode, generation)
        except OSError as failure:  # something else may be mounted over it
            error = failure
    raise error


def _open_at(point: str, inode: int, generation: int) -> int:
    mount = os.open(point, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # That of the mount point shows what handles of this filesystem look like.
        handle = ctypes.create_string_buffer(_HANDLE.pack(_BYTES, 0), _HANDLE.size + _BYTES)
        number = ctypes.c_int()
        at = ctypes.c_char_p(b"")
        if _libc.name_to_handle_at(mount, at, handle, ctypes.byref(number), 0x1000):
            raise OSError(None, "its filesystem has no handles of files")
        _, kind = _HANDLE.unpack_from(handle)
        if kind not in _LAYOUTS:
            raise OSError(None, f"its filesystem has handles of an unknown type, {kind:#x}")
        layout, first, second = _LAYOUTS[kind]
        struct.pack_into(layout, handle, _HANDLE.size + first, inode)
        struct.pack_into("=I", handle, _HANDLE.size + second, generation)
        fd = int(_libc.open_by_handle_at(mount, handle, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd
    finally:
        os.close(mount)


def _mount_points(numbers: str) -> Iterator[str]:
    """Where a filesystem is mounted; *numbers*: its device, as "8:1"."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[2] == numbers:
            # Spaces and the like stand as octal numbers.
            raw = fields[4].encode(errors="surrogateescape")
            yield os.fsdecode(raw.decode("unicode_escape").encode("latin-1"))
