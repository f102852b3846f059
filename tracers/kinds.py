# SPDX-License-Identifier: MIT
"""Names of endpoints: from the one word that the kernel side keeps (bpf/ends.h)."""

from __future__ import annotations

import socket
from functools import lru_cache
from pathlib import Path

_UNKNOWN, _USER, _PIPE, _FIFO, _CHAR, _BLOCK, _SOCKET, _REGISTERED, _PASSTHROUGH = range(1, 10)
_FILESYSTEM = 0xFF
_CACHE_WRITEBACK = 0b0100
_FUSE_DEVICE = 10 << 20 | 229

#: File systems whose servers say by file whether it is cached (FOPEN_DIRECT_IO).
_FUSE = ("fuse", "fuseblk", "virtiofs")

_SIMPLE = {
    _UNKNOWN: "unknown",
    _USER: "user memory",
    _PIPE: "pipe",
    _FIFO: "fifo",
    _PASSTHROUGH: "fuse passthrough",
}
#: Who puts memory of the kernel into a ring's table of buffers: the function that lets go of it.
_REGISTRARS = {"fuse_zero_copy_release": "fuse request", "ublk_io_release": "ublk request"}
_IPPROTO_NAMES = {6: "tcp", 17: "udp", 132: "sctp", 136: "udplite", 262: "mptcp"}
_FAMILY_NAMES = {
    socket.AF_UNIX: "unix",
    socket.AF_NETLINK: "netlink",
    socket.AF_PACKET: "packet",
    38: "af_alg",
    40: "vsock",
}


def is_filesystem(end: int) -> bool:
    """Whether the word is the address of a struct file_system_type."""
    return end >> 56 == _FILESYSTEM


def kind_name(end: int, filesystems: dict[int, str], fuse_is_read: bool = True) -> str:
    """The kind as a user names it.

    :param end: the word
    :param filesystems: names by address of struct file_system_type
    :param fuse_is_read: whether files of FUSE tell if they pass by the page cache (ends.h)
    """
    if is_filesystem(end):
        name = filesystems.get(end & ~1, "unknown filesystem")
        if name == "9p" and _caches_9p():
            return "9p with a cache"
        if name in _FUSE and not fuse_is_read:
            return f"{name} of unknown caching"
        return "memfd" if end & 1 and name in ("tmpfs", "hugetlbfs") else name
    kind, value = end >> 56, end & ((1 << 56) - 1)
    if kind == _CHAR:
        return _character_device(value)
    if kind == _BLOCK:
        return "ublk disk" if value else "block device"
    if kind == _REGISTERED:
        return _registered(value | 0xFF << 56)
    if kind == _SOCKET:
        return _socket(value >> 40, value >> 32 & 0xFF, value & 0xFFFFFFFF)
    return _SIMPLE.get(kind, "unknown")


@lru_cache
def _caches_9p() -> bool:
    """Whether each 9p that is mounted here reads and writes by the page cache.

    That is what cache=loose and cache=fscache ask for. Newer kernels show a number, with a bit for
    writing by it (fs/9p/v9fs.h:enum p9_cache_bits, 6.4).
    """
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    options = [dict(o.partition("=")[::2] for o in m[3].split(",")) for m in mounts if m[2] == "9p"]
    return bool(options) and all(map(_caches, options))


def _caches(options: dict[str, str]) -> bool:
    cache = options.get("cache", "none")
    if cache.startswith("0x"):
        return int(cache, 16) & _CACHE_WRITEBACK != 0
    return cache in ("loose", "fscache")


def _socket(family: int, kind: int, protocol: int) -> str:
    if family in (socket.AF_INET, socket.AF_INET6):
        if kind == socket.SOCK_RAW:
            return "raw"
        return _IPPROTO_NAMES.get(protocol, f"inet protocol {protocol}")
    return _FAMILY_NAMES.get(family, f"socket family {family}")


@lru_cache
def _registered(release: int) -> str:
    """Whose memory it is that the function at that address lets go of."""
    with open("/proc/kallsyms") as symbols:
        for line in symbols:
            if int(line[:16], 16) == release:
                return _REGISTRARS.get(line.split()[2], "kernel buffer")
    return "kernel buffer"


@lru_cache
def _character_device(dev: int) -> str:
    """ "/dev/null" and the like; the kernel's dev_t has the minor in its low 20 bits."""
    if dev == _FUSE_DEVICE:
        return "fuse device"
    major, minor = dev >> 20, dev & 0xFFFFF
    if 136 <= major <= 143:
        return "/dev/pts"
    # A server's device may be gone by now.
    if f"{major} ublk-char" in map(str.strip, Path("/proc/devices").read_text().splitlines()):
        return "ublk device"
    try:
        uevent = Path(f"/sys/dev/char/{major}:{minor}/uevent").read_text()
    except OSError:
        return f"char device {major}:{minor}"
    names = [line[8:] for line in uevent.splitlines() if line.startswith("DEVNAME=")]
    return f"/dev/{names[0]}" if names else f"char device {major}:{minor}"
