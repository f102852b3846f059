# SPDX-License-Identifier: MIT
"""Programs whose findings are counted, one after the other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rsplice.audit import Finding
from rsplice.events import Tally
from rsplice.launch import Command
from rsplice.session import kernel_version
from rsplice.tracers import providers
from rsplice.tracers.btf import Btf
from rsplice.tracers.providers import ALL, How
from rsplice.tracers.tracer import PROBES, Tracer

COUNT = 23
#: How a tracer reads memory, and that it has to do without fentry -> Tracer's *direct*.
READS = {"direct loads": None, "probe reads": False, "breakpoints": None}
#: From 7.0 on events may be lost to whoever else runs (Counters.nr_lost).
TRIES = 3 if kernel_version() >= (7, 0) else 1
#: Older kernels have the tracepoint, but not what is read at it (rsplice/tracers/layout.py).
_NOT_READ_BEFORE = {"io_uring_complete": (5, 19)}


@dataclass
class Seen:
    """What one run of a program was found to do."""

    findings: list[Finding]
    replies: list[Tally]  #: of a FUSE server, out of a pipe
    pid: int

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        return {(f.name, f.first.get("reason", "")): f.count for f in self.findings}

    def only(self, name: str) -> Finding:
        (finding,) = [f for f in self.findings if f.name == name]
        return finding


@contextmanager
def offering(reads: str) -> Iterator[None]:
    """With "breakpoints" a tracer that begins in here finds no fentry, only kprobes."""
    with pytest.MonkeyPatch.context() as patch:
        if reads == "breakpoints":
            patch.setattr(providers, "can_fexit", lambda function: False)
            if not providers.running(Btf()).kprobes:
                pytest.skip(providers.NEITHER)
        yield


def trampolines(tracer: Tracer) -> list[str]:
    """The functions at which a tracer has fentry or fexit."""
    taken = [each.candidate for each in tracer.observed if each.candidate]
    return [each.function for each in taken if each.how in (How.FENTRY, How.FEXIT)]


class Watch:
    """One tracer for all programs: it knows by process what an audit adds up."""

    def __init__(self, direct: bool | None = None, **options: Any) -> None:
        self.tracer = Tracer(direct=direct, **options)
        self._known: set[int] = set()  # keys and pids of processes of earlier runs
        self._lost = 0  # events, up to now

    @property
    def lost(self) -> list[str]:
        """Probes that are not attached, though this kernel has what they attach to."""
        return [m.probe for m in self.tracer.missing if not _is_unknown_here(m.probe)]

    def run(self, *argv: object, status: int = 0) -> Seen:
        """Runs a program. It is run again where the kernel has passed over some of it."""
        for _ in range(TRIES):
            seen = self._run(*argv, status=status)
            if seen:
                return seen
        raise AssertionError("events were lost")

    def _run(self, *argv: object, status: int) -> Seen | None:
        with open(os.devnull, "w") as null:
            command = Command([str(word) for word in argv], output=null.fileno())
            self.tracer.follow(command.pid)
            command.release()
            ended = command.wait()
        if ended == 77:
            pytest.skip("this kernel cannot mount FUSE here")
        assert ended == status
        reading = self.tracer.counters.read()
        before, self._lost = self._lost, reading.events_lost
        mine = {p.key for p in reading.processes} - self._known
        pids = {p.pid for p in reading.processes if p.key in mine}
        self._known |= mine
        if self._lost > before:
            return None
        return Seen(
            [f for f in reading.findings if f.first["pid"] in pids],
            [
                t
                for t in reading.tallies
                if t.process in mine and (t.via, t.source.kind) == ("fuse reply", "pipe")
            ],
            command.pid,
        )

    def script(self, folder: Path, body: str) -> Seen:
        """Runs a Python program: r and w are a pipe, source a file of 32 pages, COUNT is known."""
        (folder / "source").write_bytes(b"s" * 32 * 4096)
        program = folder / "program.py"
        program.write_text(
            "import ctypes, mmap, os\n"
            f"COUNT, PAGE = {COUNT}, 4096\n"
            f"source = os.open({str(folder / 'source')!r}, os.O_RDWR)\n"
            f"output = os.open({str(folder / 'output')!r}, os.O_RDWR | os.O_CREAT)\n"
            "null = os.open('/dev/null', os.O_WRONLY)\n"
            "r, w = os.pipe()\n"
            "class Vector(ctypes.Structure):\n"
            "    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]\n"
            "def vmsplice(memory, flags):\n"
            "    vector = Vector(ctypes.addressof(ctypes.c_char.from_buffer(memory)), PAGE)\n"
            "    assert ctypes.CDLL(None).vmsplice(w, ctypes.byref(vector), 1, flags) == PAGE\n"
            + body
        )
        # Isolated: site packages would make calls of their own.
        return self.run(sys.executable, "-I", "-S", program)


def _is_unknown_here(probe: str) -> bool:
    """Whether this kernel lacks what *probe* attaches to.

    A tracepoint would be named by its BTF, a function of a module that is loaded by kallsyms.
    """
    modules = {name for each in ALL if each.outside for name in each.functions}
    if probe in modules:
        names = [line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines()]
        return not any(name.split(".")[0] == probe.split(".")[0] for name in names)
    if kernel_version() < _NOT_READ_BEFORE.get(probe, (0, 0)):
        return True
    if probe not in {each.tracepoint for each in PROBES}:
        return False
    files = (Path("/sys/kernel/btf") / name for name in ("vmlinux", "fuse"))
    name = f"btf_trace_{probe}\0".encode()
    return not any(name in file.read_bytes() for file in files if file.exists())
