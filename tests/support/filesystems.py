# SPDX-License-Identifier: MIT
"""Scratch filesystems on loop devices, gone when the tests are."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: The smallest round size that every mkfs accepts; the image is sparse.
_IMAGE_BYTES = 320 << 20

_MKFS = {
    "btrfs": ["mkfs.btrfs", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
}


@dataclass(frozen=True)
class Scratch:
    """A filesystem that programs read nothing from but what a test tells them to."""

    path: Path
    kind: str

    def file(self, name: str, size: int) -> Path:
        """A clean file of *size* bytes on it."""
        file = self.path / name
        file.write_bytes(bytes(range(251)) * (size // 251 + 1))
        os.truncate(file, size)
        with file.open("rb") as f:
            os.fsync(f.fileno())
        return file


def filesystem_of(path: str) -> str:
    """The type of the filesystem that *path* lies on ("ext4", "tmpfs")."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted, _, rest = line.partition(" - ")
        point = mounted.split()[4]
        # A later mount hides an earlier one on the same point.
        if Path(path).is_relative_to(point) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind


def missing(filesystem: str) -> str | None:
    """Why *filesystem* cannot be mounted here, None if it can."""
    if os.geteuid() != 0:
        return "mounting a scratch filesystem needs root"
    if not shutil.which(_MKFS[filesystem][0]):
        return f"not installed: {_MKFS[filesystem][0]}"
    known = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    if filesystem not in known:
        return f"this kernel has no {filesystem}"
    return None


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def loop_mount(filesystem: str) -> Iterator[Path]:
    """The mount point of a fresh *filesystem* ("btrfs", "xfs", "ext4"). CalledProcessError."""
    with tempfile.TemporaryDirectory() as name:
        image, point = Path(name) / "image", Path(name) / "mnt"
        point.mkdir()
        image.touch()
        os.truncate(image, _IMAGE_BYTES)
        _run(*_MKFS[filesystem], image)
        device = _run("losetup", "--find", "--show", image)
        try:
            _run("mount", "-t", filesystem, device, point)
            try:
                yield point
            finally:
                # Lazily: a process that a failed test left behind may still use it.
                _run("umount", "--lazy", point)
        finally:
            _run("losetup", "--detach", device)
