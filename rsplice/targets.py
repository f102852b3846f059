# SPDX-License-Identifier: MIT
"""Which files to verify: those that a process has mapped, and those that give privileges."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from rsplice.errors import RspliceError
from rsplice.pagecache import MEMORY, NETWORK, mounts

EXIT_UNCHECKED = 2
_PRIVILEGED = stat.S_ISUID | stat.S_ISGID
_EXECUTABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


@dataclass(frozen=True)
class Target:
    """A file to verify.

    :param name: how a user knows it
    :param path: where it can be opened, even if it has no name any more
    """

    name: str
    path: str | bytes


def mapped(pid: int) -> list[Target]:
    """The regular files that process *pid* has mapped, each once.

    :raises RspliceError: there is no such process, or its mappings may not be seen
    """
    directory = f"/proc/{pid}/map_files"
    found: dict[tuple[int, int], Target] = {}
    try:
        links = os.listdir(directory)
        if not links:
            os.readlink(f"/proc/{pid}/exe")
    except FileNotFoundError as error:
        raise RspliceError(_no_files(pid), EXIT_UNCHECKED) from error
    except OSError as error:
        raise RspliceError(f"{directory}: {error.strerror}", EXIT_UNCHECKED) from error
    for link in sorted(links, key=_start):
        path = f"{directory}/{link}"
        with suppress(FileNotFoundError):  # unmapped meanwhile
            name = os.readlink(path)
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                found.setdefault((status.st_dev, status.st_ino), Target(name, path))
    return list(found.values())


def comm(pid: int) -> str | None:
    """The name of process *pid*; None if it has ended."""
    with suppress(OSError), open(f"/proc/{pid}/comm", errors="surrogateescape") as file:
        return file.read().rstrip("\n")
    return None


def _start(link: str) -> int:
    return int(link.partition("-")[0], 16)


def _no_files(pid: int) -> str:
    if os.path.isdir(f"/proc/{pid}"):
        return f"process {pid} has no memory: it is a thread of the kernel, or has ended"
    return f"there is no process {pid}"


def setuid(root: str, failed: Callable[[str, str], None]) -> Iterator[Target]:
    """Executables below *root* that are setuid, setgid or have file capabilities.

    Local filesystems are entered, pseudo, network and FUSE filesystems are not.

    :param failed: called with each directory that cannot be read, and why
    """
    # A later mount on the same point is what one sees there.
    topmost = {point: kind for _, point, kind in mounts()}
    elsewhere = {point for point, kind in topmost.items() if not local(kind)}
    seen: set[tuple[int, int]] = set()  # bind mounts show a directory again
    waiting = [os.fsencode(root)]
    while waiting:
        directory = waiting.pop()
        try:
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.path not in elsewhere:
                            waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False) and _gives_privileges(entry):
                        yield Target(os.fsdecode(entry.path), entry.path)
        except FileNotFoundError:
            pass  # removed meanwhile
        except OSError as error:
            failed(os.fsdecode(directory), error.strerror or str(error))


def local(filesystem: str) -> bool:
    """Whether a filesystem of this type keeps its files on a disk of this machine."""
    fuse = filesystem.startswith("fuse")
    return not (fuse or filesystem in MEMORY or filesystem in NETWORK)


def _gives_privileges(entry: os.DirEntry[bytes]) -> bool:
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
        if mode & _PRIVILEGED:
            return True
        if not mode & _EXECUTABLE:
            return False
        return bool(os.getxattr(entry.path, "security.capability", follow_symlinks=False))
    except OSError:
        return False  # gone, or without the attribute
