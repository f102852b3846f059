# SPDX-License-Identifier: MIT
"""What rsplice itself takes: memory, processor time of the dashboard, time to start."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.tracers import AUDIT, ROOT, RSPLICE, Unavailable, end

LIVE_CALLS_PER_S = 100_000
_SETTLE_S = 3.0
_WATCH_S = 8.0
_STARTS = 3


def memory() -> dict[str, int]:
    """Bytes: the peak of rsplice's own memory and its BPF maps, auditing the demo workload.

    Unavailable if the audit fails.
    """
    demo = (*RSPLICE, "workload", "mixed", "--seconds", "4")
    command = (*AUDIT, "--", *demo)
    process_peak = maps_peak = 0
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        while process.poll() is None:
            pids = family(process.pid, command)
            process_peak = max(process_peak, *(peak_memory(pid) for pid in pids))
            maps_peak = max(maps_peak, map_memory(pids))
            time.sleep(0.2)
        if process.returncode:
            raise Unavailable(f"the audit ended with status {process.returncode}")
    return {"process_bytes": process_peak, "maps_bytes": maps_peak}


def start_seconds() -> list[float]:
    """Seconds from the start of an audit to the start of its command. Unavailable."""
    readings = []
    for _ in range(_STARTS):
        before = time.time()
        command = (*AUDIT, "--", "date", "+%s.%N")
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise Unavailable(f"the audit ended with status {done.returncode}")
        readings.append(float(done.stdout) - before)
    return readings


def live_cpu(loop: Path) -> dict[str, float]:
    """Per cent of one processor that the dashboard takes beside a loop of 100,000 calls a second.

    Unavailable if it ends too early.
    """
    result = loop.parent / "live.json"
    seconds = int(_SETTLE_S + _WATCH_S + 2)
    work = f"splice:4096:{LIVE_CALLS_PER_S * seconds // 2}"
    command = (
        *(*RSPLICE, "live", "--"),
        *(str(loop), "-R", str(LIVE_CALLS_PER_S), "-o", str(result), work),
    )
    with _on_terminal(command) as (process, terminal):
        _drain(terminal, _SETTLE_S)
        rsplice = family(process.pid, command)
        used, start = _cpu_seconds(rsplice), time.monotonic()
        _drain(terminal, _WATCH_S)
        used = _cpu_seconds(rsplice) - used
        elapsed = time.monotonic() - start
        if process.poll() is not None:
            raise Unavailable("rsplice live ended before its workload")
        _drain(terminal, seconds)
    if not result.exists() or not (text := result.read_text()):
        raise Unavailable("rsplice live did not run its workload to the end")
    (run,) = json.loads(text)["runs"]
    return {"per_cent": 100 * used / elapsed, "calls_per_s": 2e9 / run["ns_per_pair"][0]}


def family(pid: int, command: tuple[str, ...]) -> list[int]:
    """*pid* and its descendants that run the same command: rsplice without what it audits."""
    same = "\0".join(command).encode() + b"\0"
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(path.name)):
            children.setdefault(int(fields[1]), []).append(int(path.name))
    found = [pid]
    for parent in found:
        found += [child for child in children.get(parent, []) if _command_line(child) == same]
    return found


def peak_memory(pid: int) -> int:
    """VmHWM of a process in bytes, 0 if it is gone."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def map_memory(pids: list[int]) -> int:
    """Bytes of the BPF maps that *pids* hold, each map once."""
    maps: dict[str, int] = {}
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fdinfo")
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                text = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()
            except OSError:
                continue
            fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            if "map_id" in fields:
                maps[fields["map_id"]] = int(fields["memlock"])
    return sum(maps.values())


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, none if the process is gone."""
    try:
        # The name in parentheses before them may hold blanks.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _cpu_seconds(pids: list[int]) -> float:
    ticks = sum(int(tick) for pid in pids for tick in _stat(pid)[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def _on_terminal(command: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.terminate()
        end(process)
        os.close(ours)


def _drain(terminal: int, seconds: float) -> None:
    """Reads what is shown, as a terminal does, for a time or until its end."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                if not os.read(terminal, 1 << 16):
                    return
            except OSError:
                return


def measure(loop: Path) -> dict[str, Any]:
    """All of it; what cannot be measured is there as the reason, under "missing"."""
    out: dict[str, Any] = {"missing": {}}
    for name, take in (
        ("memory", memory),
        ("start_s", start_seconds),
        ("live_cpu", lambda: live_cpu(loop)),
    ):
        try:
            out[name] = take()
        except Unavailable as reason:
            out["missing"][name] = str(reason)
    return out
