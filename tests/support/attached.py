# SPDX-License-Identifier: MIT
"""What of BPF a process holds: how tests know that an audit is attached, and that nothing stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.support.patience import DEADLINE


def descriptors_of(pid: int) -> list[str]:
    """The descriptors of *pid* that hold BPF objects or perf events."""
    held = []
    directory = Path(f"/proc/{pid}/fd")
    for fd in os.listdir(directory):
        try:
            target = os.readlink(directory / fd)
        except OSError:
            continue
        if target.startswith(("anon_inode:bpf", "anon_inode:[bpf", "anon_inode:[perf_event]")):
            held.append(fd)
    return held


def programs_of(pid: int) -> set[int]:
    """The ids of the BPF programs that process *pid* holds."""
    ids = set()
    for fd in descriptors_of(pid):
        try:
            text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        except OSError:
            continue
        ids |= {int(n) for n in re.findall(r"^prog_id:\s*(\d+)$", text, re.MULTILINE)}
    return ids


def descendants_of(pid: int) -> list[int]:
    """The children of *pid*, and theirs, youngest generation first."""
    found: list[int] = []
    generation = _children(pid)
    while generation:
        found = generation + found
        generation = [child for parent in generation for child in _children(parent)]
    return found


def _children(pid: int) -> list[int]:
    children = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(n) for n in (task / "children").read_text().split()]
    except OSError:
        pass  # it has ended
    return children


def wait_until_attached(pid: int) -> None:
    """Returns when the audit, process *pid*, has attached all and is ready for a signal.

    It catches SIGTERM from then on, which /proc shows. AssertionError if it ends before.
    """
    until = time.monotonic() + DEADLINE
    while not _catches(pid, signal.SIGTERM):
        assert time.monotonic() < until, "the audit is not ready"
        time.sleep(0.02)
    assert descriptors_of(pid), "the audit attached nothing"


def _catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.M)
    assert caught and "State:\tZ" not in status, f"process {pid} has ended"
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def wait_for_command(pid: int, comm: str) -> int:
    """The pid of the audited command *comm*, a descendant of rsplice, once it has been exec'd."""
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        # The eldest: a shell's child has the shell's name until it runs something else.
        for child in reversed(descendants_of(pid)):
            if _comm(child) == comm:
                return child
        time.sleep(0.02)
    raise AssertionError(f"{comm} was not started")


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _loaded(program: int) -> bool:
    assert shutil.which("bpftool"), "not installed: bpftool"
    shown = subprocess.run(["bpftool", "prog", "show", "id", str(program)], capture_output=True)
    return shown.returncode == 0


def wait_until_gone(programs: set[int]) -> None:
    """Returns when the kernel has let go of *programs*; AssertionError if some stay."""
    until = time.monotonic() + DEADLINE
    while left := {p for p in programs if _loaded(p)}:
        assert time.monotonic() < until, f"BPF programs stay loaded: {sorted(left)}"
        time.sleep(0.1)
