# SPDX-License-Identifier: MIT
"""Whether free memory is the machine's own, or its host has taken it back.

A virtual machine may report free pages to its host (mm/page_reporting.c), which then has to find
memory again at the first touch of each: some microseconds that are counted as the toucher's. So
copying into fresh pages costs several times as much there. Both states are measured apart.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from benchmarks.tracers import Unavailable

#: Of free memory, how much is touched so that what is measured finds it in use: all of it would
#: have the kernel drop what it caches.
SHARE = 0.6
#: Kilobytes that were ever reported: not every kernel counts them.
REPORTED = Path("/sys/module/page_reporting/parameters/reported_kib")
SETTLED_KIB = 64 << 10  #: reported in POLL_S at the most, once nearly all is
POLL_S = 5.0
PATIENCE_S = 90.0

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


def take_into_use(most: int = 1 << 40) -> None:
    """Touches most of the memory that is free, and frees it again, in a process of its own.

    Unavailable if that fails.

    :param most: bytes
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _touch(min(most, int(_free() * SHARE)) // mmap.PAGESIZE * mmap.PAGESIZE)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise Unavailable("free memory could not be taken into use")


def _free() -> int:
    """Bytes of memory that nobody uses."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) << 10
    raise Unavailable("/proc/meminfo has no MemFree")


def _touch(size: int) -> None:
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(_POPULATE_WRITE)
        except OSError:
            for at in range(0, size, mmap.PAGESIZE):
                memory[at] = 1


def wait_until_taken_back(patience: float = PATIENCE_S) -> None:
    """Returns when the host has taken back nearly all free memory.

    Unavailable where the kernel does not tell, or if it does not come to that in *patience*
    seconds.
    """
    until = time.monotonic() + patience
    before = _reported()
    while time.monotonic() < until:
        time.sleep(POLL_S)
        now = _reported()
        if now - before < SETTLED_KIB:
            return
        before = now
    raise Unavailable("free memory did not come to rest: other work is running")


def _reported() -> int:
    try:
        return int(REPORTED.read_text())
    except OSError as error:
        raise Unavailable("this kernel does not tell what free memory its host has") from error
