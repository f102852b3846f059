# SPDX-License-Identifier: MIT
"""What the workloads that mount a filesystem share."""

from __future__ import annotations

import importlib
import mmap
import re
import struct
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from rsplice.errors import RspliceError
from rsplice.workloads.core import Budget, Calls, Crew, Progress, Settings

#: What a file of a FUSE filesystem and the device that a server replies to are called in an audit.
FUSE = "fuse"
PASSTHROUGH = "fuse passthrough"
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


class Readers:
    """Processes that read through a mount; each has its share of ``count`` operations.

    :param serving: True while the filesystem is served; RspliceError if that has failed
    """

    def __init__(self, settings: Settings, serving: Callable[[], bool]) -> None:
        self._settings = settings
        self._serving = serving
        self._done = mmap.mmap(-1, mmap.PAGESIZE)  # operations of each

    def run(
        self,
        directory: Path,
        progress: Progress,
        work: Callable[[int, int | None, Calls], None],
    ) -> Calls:
        """What they counted, once all are done.

        :param work: what each of them does, with its number and its share (None: no limit)
        """
        crew = Crew(directory)
        budget = Budget(None, self._settings.seconds)
        try:
            for number in range(self._settings.threads):
                share = self._share(number)
                if share != 0:
                    crew.start("rsplice-reader", partial(work, number, share))
            return crew.wait(lambda: self._look(budget, progress))
        finally:
            crew.stop()

    def tell(self, number: int, operations: int) -> None:
        """Reader *number* has made so many operations."""
        struct.pack_into("Q", self._done, 8 * number, operations)

    def _share(self, number: int) -> int | None:
        count, threads = self._settings.count, self._settings.threads
        return None if count is None else count // threads + (number < count % threads)

    def _look(self, budget: Budget, progress: Progress) -> None:
        if not self._serving():
            raise RspliceError("the filesystem was unmounted while it was read")
        done = budget.done
        if self._settings.count:
            operations = struct.unpack_from(f"{self._settings.threads}Q", self._done)
            done = max(done, sum(operations) / self._settings.count)
        progress(min(done, 1.0), self._settings.mode)
