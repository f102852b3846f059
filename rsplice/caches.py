# SPDX-License-Identifier: MIT
"""Where things are kept from run to run, and what there is trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def directory() -> Path:
    """Root's is the system's, since HOME may be that of another under sudo."""
    if os.geteuid() == 0:
        return Path("/var/cache/rsplice")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "rsplice"


def mine(status: os.stat_result) -> bool:
    """Whether nobody else can have written it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
