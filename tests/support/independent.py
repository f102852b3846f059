# SPDX-License-Identifier: MIT
"""An independent count: what strace(1) saw the same processes do, in the same run.

strace runs under the audit, and the audit's count of every process but strace is held against it:
two runs of a program that uses pipes or sockets seldom make the same calls.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.filesystems import filesystem_of
from tests.support.run import TWO_LEGS, Counts, Result, Running

_MEMORY = "user memory"
_TO_MEMORY = {"read", "pread64", "readv", "preadv", "preadv2", "recvfrom", "recvmsg", "recvmmsg"}
_FROM_MEMORY = {
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "pwritev2",
    "sendto",
    "sendmsg",
    "sendmmsg",
}
#: Between descriptors: which of those printed is the source, which the destination.
_BETWEEN = {
    "splice": (0, 1),
    "tee": (0, 1),
    "sendfile": (1, 0),
    "copy_file_range": (0, 1),
}
_CALLS = sorted(_TO_MEMORY | _FROM_MEMORY | _BETWEEN.keys() | {"ioctl", "openat"})

_LINE = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>\d+)(?:<(?P<path>.*)>.*)?$")
_DESCRIPTOR = re.compile(r"\b(\d+)<(.+?)>(?:\(deleted\))?(?=[,)\s]|$)")
_CLONE = re.compile(r"FICLONE, (?:src_fd=)?(\d+)")
_SOCKETS = {"TCP": "tcp", "UDP": "udp", "UNIX": "unix", "NETLINK": "netlink"}


@dataclass
class Trace:
    """What strace saw."""

    counts: Counts = field(default_factory=dict)
    #: (via, file) -> bytes, for the files that the calls named
    files: dict[tuple[str, str], int] = field(default_factory=dict)

    def _add(self, via: str, source: str, destination: str, nbytes: int) -> None:
        operations, payload = self.counts.get((via, source, destination), (0, 0))
        legs = 2 if via in TWO_LEGS else 1
        self.counts[via, source, destination] = (operations + 1, payload + legs * nbytes)

    def _add_file(self, via: str, name: str, nbytes: int) -> None:
        self.files[via, name] = self.files.get((via, name), 0) + nbytes


def _kind(text: str, direct: set[str]) -> str:
    """The endpoint that strace -yy describes as *text*, as an audit names it."""
    if text.startswith("pipe:["):
        return "pipe"
    if match := re.match(r"([A-Z]+)(?:v6)?(?:-[A-Z]+)?:\[", text):
        return _SOCKETS.get(match[1], match[1])
    if text.startswith("/memfd:"):
        return "memfd"
    path, _, device = text.partition("<")
    if device.startswith("char"):
        return path
    if device.startswith("block"):
        return "block device"
    if os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
        return "fifo"
    return filesystem_of(path) + (" O_DIRECT" if path in direct else "")


def _read_file(lines: Sequence[str], trace: Trace) -> None:
    direct: set[str] = set()
    opened: dict[str, str] = {}
    for line in lines:
        match = _LINE.match(line)
        if not match:
            continue
        name, arguments, result = match["name"], match["arguments"], int(match["result"])
        ends = [text for _, text in _DESCRIPTOR.findall(arguments)]
        kinds = [_kind(text, direct) for text in ends]
        if name == "openat":
            opened[match["result"]] = match["path"] or ""
            if re.search(r"\bO_DIRECT\b", arguments):
                direct.add(match["path"] or "")
        elif name == "ioctl":
            if clone := _CLONE.search(arguments):
                source = opened[clone[1]]
                size = os.stat(source).st_size
                trace._add("ioctl FICLONE", _kind(source, direct), kinds[0], size)
        elif result and kinds:
            if name in ("sendmmsg", "recvmmsg"):
                result = sum(int(n) for n in re.findall(r"msg_len=(\d+)", arguments))
            if name in _BETWEEN:
                first, second = _BETWEEN[name]
                trace._add(name, kinds[first], kinds[second], result)
            elif name in _TO_MEMORY:
                trace._add(name, kinds[0], _MEMORY, result)
            else:
                trace._add(name, _MEMORY, kinds[0], result)
            for text in set(ends):
                trace._add_file(name, text, result)


class CrossChecked:
    """An audit of a command under strace; ``finish()`` compares the two counts."""

    def __init__(self, command: Sequence[str | Path], *options: str, **how: Any) -> None:
        self._traces = tempfile.TemporaryDirectory()
        # fmt: off
        strace = ["strace", "-ff", "-qq", "-yy", "-v", "-s", "0", "-e", "signal=none",
                  "-e", "trace=" + ",".join(_CALLS), "-o", f"{self._traces.name}/trace"]
        # fmt: on
        self.running = Running([*strace, *command], *options, **how)

    def finish(self) -> tuple[Result, Trace]:
        """Waits for the end. AssertionError if a path's operations or bytes differ."""
        result = self.running.finish()
        result.without = "strace"
        trace = Trace()
        with self._traces:
            for file in Path(self._traces.name).iterdir():
                _read_file(file.read_text(errors="replace").splitlines(), trace)
        assert result.document is not None, result.stderr
        assert result.counts() == trace.counts
        assert result.json["accuracy"]["events_lost"] == 0
        return result, trace


def cross_check(command: Sequence[str | Path], *options: str, **how: Any) -> tuple[Result, Trace]:
    """Audits *command* under strace and holds every path against strace's return values."""
    return CrossChecked(command, *options, **how).finish()
