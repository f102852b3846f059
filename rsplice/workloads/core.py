# SPDX-License-Identifier: MIT
"""What the built-in workloads share: settings, their own count of calls, scratch files, processes.

A workload's count comes from return values alone, so that it can be held against an audit's.
Sizes are bytes, times seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rsplice.audit import Endpoint
from rsplice.errors import RspliceError

MEMORY = "user memory"
PIPE = "pipe"
TCP = "tcp"
UNIX = "unix"

#: The signals that end a run early, after which its scratch files and processes are gone too.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


@dataclass(frozen=True)
class Settings:
    """What one run of a workload is asked to do; ``None`` means no limit of that kind."""

    mode: str
    size: int  #: bytes per operation
    count: int | None  #: operations in all
    seconds: float | None
    threads: int


@dataclass
class Calls:
    """System calls that carried payload, counted by what they returned."""

    counts: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    pages_touched: int = 0  #: pages of 4096 bytes read through a mapping
    #: what the kernel or librsplice said of the bytes, beyond return values
    reported: Counter[str] = field(default_factory=Counter)
    skipped: set[str] = field(default_factory=set)  #: what this machine does not allow, and why

    def add(self, via: str, source: str, destination: str, nbytes: int) -> int:
        """Counts one call that returned *nbytes*; one that carried nothing is not counted."""
        if nbytes > 0:
            entry = self.counts.setdefault((via, source, destination), [0, 0])
            entry[0] += 1
            entry[1] += nbytes
        return nbytes

    def merge(self, other: Calls) -> None:
        """Adds what *other* counted."""
        for key, (operations, nbytes) in other.counts.items():
            entry = self.counts.setdefault(key, [0, 0])
            entry[0] += operations
            entry[1] += nbytes
        self.pages_touched += other.pages_touched
        self.reported.update(other.reported)
        self.skipped |= other.skipped

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": [
                {
                    "via": via,
                    "source": source,
                    "destination": destination,
                    "operations": operations,
                    "bytes": nbytes,
                }
                for (via, source, destination), (operations, nbytes) in sorted(self.counts.items())
            ],
            "pages_touched": self.pages_touched,
            "reported": dict(sorted(self.reported.items())),
            "skipped": sorted(self.skipped),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Calls:
        calls = Calls(
            pages_touched=data["pages_touched"],
            reported=Counter(data["reported"]),
            skipped=set(data["skipped"]),
        )
        for c in data["calls"]:
            key = (c["via"], c["source"], c["destination"])
            calls.counts[key] = [c["operations"], c["bytes"]]
        return calls


#: Told how much is done (0.0 to 1.0) and what is going on, some ten times a second.
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Workload:
    """A built-in workload: what it is, its defaults, and the function that runs it."""

    name: str
    summary: str
    run: Callable[[Settings, Progress], Calls]
    defaults: Settings
    modes: tuple[str, ...] = ()
    paced: bool = False  #: ``count`` is per program and tick, ``threads`` means nothing


class Budget:
    """How many operations are left, shared by threads; none when time is up or after stop()."""

    def __init__(self, count: int | None, seconds: float | None) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._taken = 0
        self._seconds = seconds
        self._start = time.monotonic()
        self._stopped = False

    def take(self) -> bool:
        """True if the caller may make one more operation."""
        with self._lock:
            if self._stopped or self.done >= 1.0:
                return False
            self._taken += 1
            return True

    def stop(self) -> None:
        self._stopped = True

    @property
    def done(self) -> float:
        """The larger share used up: of the operations or of the time."""
        by_count = self._taken / self._count if self._count else 0.0
        elapsed = time.monotonic() - self._start
        by_time = elapsed / self._seconds if self._seconds else 0.0
        return min(1.0, max(by_count, by_time))


def run_threads(
    work: Callable[[Calls], None], settings: Settings, budget: Budget, progress: Progress
) -> Calls:
    """Runs *work* in ``settings.threads`` threads until each returns; what they counted.

    The first error of a thread stops them all and is raised here.
    """
    counted = [Calls() for _ in range(settings.threads)]
    errors: list[BaseException] = []

    def guarded(calls: Calls) -> None:
        try:
            work(calls)
        except BaseException as error:
            errors.append(error)
            budget.stop()

    threads = [threading.Thread(target=guarded, args=(c,), daemon=True) for c in counted]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                progress(budget.done, settings.mode)
                thread.join(0.1)
    finally:
        budget.stop()
    if errors:
        raise errors[0]
    total = Calls()
    for calls in counted:
        total.merge(calls)
    return total


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for scratch files under TMPDIR, removed on the way out."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="rsplice-"))
    except OSError as error:
        raise RspliceError(f"no scratch directory: {error}; set TMPDIR to one") from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Pattern:
    """Endless random bytes that come again after some pages and a bit: no two pages are alike."""

    _PERIOD = (1 << 16) + 509

    def __init__(self) -> None:
        self._text = os.urandom(self._PERIOD) * 2

    def pieces(self, offset: int, size: int) -> Iterator[bytes]:
        """What lies from *offset* on, *size* bytes in pieces."""
        while size:
            start = offset % self._PERIOD
            piece = self._text[start : start + min(size, self._PERIOD)]
            yield piece
            offset += len(piece)
            size -= len(piece)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Writes the bytes from *offset* on to all of *buffer*."""
        done = 0
        for piece in self.pieces(offset, len(buffer)):
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def expect(self, data: memoryview, offset: int, where: str) -> None:
        """RspliceError if *data*, found *where*, are not the bytes from *offset* on."""
        done = 0
        for piece in self.pieces(offset, len(data)):
            # Bytes, since Python compares views one element at a time.
            if bytes(data[done : done + len(piece)]) != piece:
                raise RspliceError(f"wrong data in {where}, near byte {offset + done}")
            done += len(piece)


def create(path: Path, size: int, pattern: Pattern | None = None) -> int:
    """A descriptor open for reading and writing of a new file of *size* bytes, on the disk.

    It holds the *pattern*, or one that nobody knows.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    for piece in (pattern or Pattern()).pieces(0, size):
        # Not writev(2), which workloads make and count.
        while piece:
            piece = piece[os.write(fd, piece) :]
    # Clean pages are what a server's files are, and the only ones that DONTNEED drops.
    os.fsync(fd)
    return fd


def filesystem_of(path: Path, direct: bool = False) -> str:
    """The endpoint of a file in directory *path*, as an audit names it ("ext4", "tmpfs")."""
    best, kind = "", "file"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        mounted, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mounted.split()[4])
        # A later mount hides an earlier one on the same point.
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return str(Endpoint(kind, direct=direct))


def set_process_name(name: str) -> None:
    """Names this process as ps and an audit will show it (15 bytes at most)."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


class Crew:
    """Forked processes with names of their own, each of which counts its calls."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[int, str] = {}
        self._calls = Calls()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that have not been taken in yet."""
        return tuple(self._running)

    def start(self, name: str, work: Callable[[Calls], None]) -> None:
        """Forks a process called *name* that does *work* and ends."""
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal handled between fork() and _be() would unwind the child through our cleanup.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._be(name, work)
        self._running[pid] = name
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _be(self, name: str, work: Callable[[Calls], None]) -> NoReturn:
        status = 1
        try:
            # The parent alone decides on Ctrl-C, and nobody outlives it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            set_process_name(name)
            calls = Calls()
            work(calls)
            calls.reported[f"cpu_us_{name}"] += _cpu_us()
            self._report(os.getpid()).write_text(json.dumps(calls.to_json()))
            status = 0
        except (OSError, RspliceError) as error:
            self._report(os.getpid()).write_text(str(error))
        except BaseException:
            self._report(os.getpid()).write_text(traceback.format_exc(limit=-1))
        finally:
            os._exit(status)

    def _report(self, pid: int) -> Path:
        return self._directory / f"report-{pid}.json"

    def poll(self) -> bool:
        """Takes in the processes that have ended; True while some still run.

        RspliceError if one of them failed.
        """
        for pid, name in list(self._running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._running[pid]
            report = self._report(pid)
            text = report.read_text() if report.exists() else f"killed, status {status}"
            if status:
                raise RspliceError(f"process {name} of the workload failed: {_last_line(text)}")
            self._calls.merge(Calls.from_json(json.loads(text)))
        return bool(self._running)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Has a connection or pipe that broke reported as what the process at its end died of."""
        try:
            yield
        except ConnectionError:
            self.wait(lambda: None)
            raise

    def stop(self) -> None:
        """Ends every process that still runs, and waits for it."""
        for pid in self._running:
            os.kill(pid, signal.SIGTERM)
        while self._running:
            os.waitpid(self._running.popitem()[0], 0)

    def wait(self, progress: Callable[[], None]) -> Calls:
        """Waits for every process, calling *progress* meanwhile; what they all counted."""
        try:
            while self.poll():
                progress()
                time.sleep(0.1)
        finally:
            self.stop()
        return self._calls


def _cpu_us() -> int:
    """Microseconds that this process has run, system calls included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return round((usage.ru_utime + usage.ru_stime) * 1e6)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"
