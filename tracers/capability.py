# SPDX-License-Identifier: MIT
"""Whether this process may trace, and if not, what it lacks."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from rsplice.tracers.btf import RUNNING

# include/linux/proc_ns.h: PROC_PID_INIT_INO, the PID namespace that the kernel's own pids are of
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
# include/uapi/linux/capability.h
_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39


def effective_capabilities() -> int:
    """This process's effective capabilities, a bit each."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def missing_capabilities() -> list[str]:
    """The capabilities that tracing needs and this process lacks.

    CAP_SYS_ADMIN alone is enough; since 5.8 CAP_BPF and CAP_PERFMON together are
    (capabilities(7)).
    """
    have = effective_capabilities()
    if have >> _CAP_SYS_ADMIN & 1:
        return []
    wanted = (("CAP_BPF", _CAP_BPF), ("CAP_PERFMON", _CAP_PERFMON))
    return [name for name, bit in wanted if not have >> bit & 1]


def reason() -> str | None:
    """Why nothing can be traced here, in one line that says what to do; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"tracing works on Linux x86-64 only, this is {platform.machine()}"
    if not os.access(RUNNING, os.R_OK):
        return f"no BTF at {RUNNING}: use a kernel built with CONFIG_DEBUG_INFO_BTF"
    if os.readlink("/proc/self/ns/pid") != _INITIAL_PID_NAMESPACE:
        return (
            "in a PID namespace of its own rsplice cannot tell which process is which: "
            "run it on the host, or give the container the host's (--pid host)"
        )
    lacking = missing_capabilities()
    if lacking:
        return (
            f"no privilege for BPF: {' and '.join(lacking)} missing (or CAP_SYS_ADMIN); run as root"
        )
    return None
