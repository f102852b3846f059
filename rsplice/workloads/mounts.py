# SPDX-License-Identifier: MIT
"""What the workloads that mount a filesystem share."""

from __future__ import annotations

import importlib
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

from rsplice.errors import RspliceError

#: What a file of a FUSE filesystem and the device that a server replies to are called in an audit.
FUSE = "fuse"
FUSE_DEVICE = "fuse device"

_POLL_S = 0.01


@cache
def fuse_module() -> Any:
    """The C part that is built on libfuse3. RspliceError if there is none."""
    try:
        return importlib.import_module("rsplice._fuse")
    except ImportError as error:
        raise RspliceError(
            f"rsplice was built without FUSE: {error}; install libfuse3-dev (fuse3-devel) and "
            "fuse3, then rsplice again"
        ) from error


def is_mounted(path: Path) -> bool:
    """Whether something is mounted on *path*, be it alive or not."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4])
        if point == str(path):
            return True
    return False


def wait_unmounted(path: Path, seconds: float) -> bool:
    """Waits for a mount to go; False if it is still there after *seconds*."""
    until = time.monotonic() + seconds
    while is_mounted(path):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True
