# SPDX-License-Identifier: MIT
"""recvpage: files of a block server, read through a FUSE filesystem that fetches their pages.

The pages come over a stream socket. Mode ``rsplice`` has the kernel copy them once, out of the
socket's buffers into the page cache; mode ``copy`` receives them into memory and writes them to
the kernel: two copies.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rsplice.errors import RspliceError
from rsplice.workloads import transfer
from rsplice.workloads.core import (
    MEMORY,
    TCP,
    UNIX,
    Budget,
    Calls,
    Crew,
    Pattern,
    Progress,
    Settings,
    Workload,
    create,
    filesystem_of,
    scratch,
)
from rsplice.workloads.mounts import Readers, fuse_module, is_mounted

#: What a file of the filesystem is called in an audit.
FUSE = "fuse"

#: Bytes of each reader's file, if ``size`` is not larger.
FILE_SIZE = 16 << 20
MAX_READ = 1 << 19
#: Seconds after which a file that was written has a version: see recvpage_server.c.
SETTLED_S = 0.08
READY_S = 20.0
UNMOUNTED_S = 5.0

_PAGE = 4096
_EVERY = (1 << 64) - 1


@dataclass(frozen=True)
class Fault:
    """What the server does wrong, for tests: see enum recvpage_fault in recvpage.h."""

    kind: str  #: "cut", "stall", "wrong_id"
    after: int = 0  #: bytes of payload before it, where it comes in mid-payload
    skip: int = 0  #: READs that are answered well before the first
    count: int = _EVERY  #: READs that are answered wrongly


@dataclass(frozen=True)
class Options:
    """How the server's files are mounted."""

    copy: bool = False
    unix: bool = False
    threads: int = 2
    max_read: int = MAX_READ
    timeout: float = 10.0  #: seconds, of one request
    retries: int = 4


class Stage:
    """A server of the files in ``source``, and a filesystem on ``mountpoint`` that shows them.

    Both are processes, ``rsplice-server`` and ``rsplice-recvpg``, that end when told to.
    """

    def __init__(self, directory: Path, options: Options) -> None:
        self.source = directory / "source"
        self.mountpoint = directory / "mnt"
        self.options = options
        self._directory = directory
        self._crew = Crew(directory)
        self._module = fuse_module()
        self._memory = mmap.mmap(-1, 2 * _PAGE)
        view = memoryview(self._memory)
        #: struct recvpage_served and struct recvpage_counts, which the processes write to
        self.served = self._shared("struct recvpage_served *", view[:_PAGE])
        self.counts = self._shared("struct recvpage_counts *", view[_PAGE:])
        self._stop_filesystem = os.pipe()
        self._stop_server = os.pipe()
        self.port = 0  #: of the server, with TCP

    def _shared(self, kind: str, view: memoryview) -> Any:
        return self._module.ffi.cast(kind, self._module.ffi.from_buffer(view))

    @property
    def _path(self) -> Path | None:
        return self._directory / "socket" if self.options.unix else None

    def start_server(self, fault: Fault | None = None) -> None:
        """Starts a server; one that takes the place of another, if that has died."""
        listener = self._listen()
        # Nobody else may have the listener: what connects to a server that has died is refused.
        with listener:
            self._crew.start("rsplice-server", partial(self._serve, listener, fault))

    def _listen(self) -> socket.socket:
        if self._path:
            self._path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self._path))
            listener.listen()
            return listener
        try:
            listener = socket.create_server(("127.0.0.1", self.port))
        except OSError as error:
            raise RspliceError(
                f"no TCP over the loopback: {error}; bring it up with: ip link set lo up"
            ) from error
        self.port = listener.getsockname()[1]
        return listener

    def _serve(self, listener: socket.socket, fault: Fault | None, calls: Calls) -> None:
        ffi, lib = self._module.ffi, self._module.lib
        server = ffi.new("struct recvpage_server *")
        directory = ffi.new("char[]", os.fsencode(self.source))
        server.listener = listener.fileno()
        server.stop = self._stop_server[0]
        server.directory = directory
        if fault:
            server.fault = getattr(lib, f"RECVPAGE_{fault.kind.upper()}")
            server.fault_after = fault.after
            server.fault_skip = fault.skip
            server.fault_count = fault.count
        _check(lib.recvpage_serve(server, self.served))
        kind = UNIX if self.options.unix else TCP
        served = self.served
        _count(calls, ("recvfrom", kind, MEMORY), served.recvfrom)
        _count(calls, ("sendto", MEMORY, kind), served.sendto)
        _count(calls, ("sendfile", filesystem_of(self.source), kind), served.sendfile)

    def mount(self) -> None:
        """Starts the filesystem, and returns when it can be used. RspliceError."""
        self._crew.start("rsplice-recvpg", self._run_filesystem)
        until = time.monotonic() + READY_S
        while not self.counts.ready:
            if not self.poll() or time.monotonic() > until:
                raise RspliceError("the filesystem of recvpage was not mounted")
            time.sleep(0.005)

    def _run_filesystem(self, calls: Calls) -> None:
        ffi, lib = self._module.ffi, self._module.lib
        mount = ffi.new("struct recvpage_mount *")
        mountpoint = ffi.new("char[]", os.fsencode(self.mountpoint))
        path = ffi.new("char[]", os.fsencode(self._path)) if self._path else ffi.NULL
        mount.mountpoint = mountpoint
        mount.path = path
        mount.port = self.port
        mount.stop = self._stop_filesystem[0]
        mount.copy = self.options.copy
        mount.threads = self.options.threads
        mount.max_read = self.options.max_read
        mount.timeout_ms = max(1, round(self.options.timeout * 1000))
        mount.retries = self.options.retries
        if error := lib.recvpage_mount(mount, self.counts):
            message = ffi.string(lib.recvpage_message()).decode(errors="replace")
            raise RspliceError(message or os.strerror(-error))
        self._report(calls)

    def _report(self, calls: Calls) -> None:
        counts = self.counts
        for name in (
            *("replies", "payload", "errors", "gone", "connections", "retries", "timeouts"),
            *("invalidations", "kept", "moved", "shared", "direct", "copied", "unknown", "why"),
        ):
            calls.reported[f"fuse_{name}"] = getattr(counts, name)
        calls.reported["fuse_control_replies"] = counts.control.operations
        calls.reported["fuse_control_bytes"] = counts.control.bytes
        # What is received into memory is copied again by the reply.
        written = counts.payload if self.options.copy else 0
        calls.reported["fuse_copy_bytes"] = counts.copied + counts.received.bytes + written
        kind = UNIX if self.options.unix else TCP
        _count(calls, ("sendto", MEMORY, kind), counts.requests)
        _count(calls, ("recvfrom", kind, MEMORY), counts.answers)
        _count(calls, ("recvfrom", kind, MEMORY), counts.received)

    def poll(self) -> bool:
        """True while one of the processes runs. RspliceError if one failed."""
        return self._crew.poll()

    def finish(self) -> Calls:
        """Unmounts and ends both processes; what they counted."""
        os.write(self._stop_filesystem[1], b".")
        self._wait_unmounted()
        os.write(self._stop_server[1], b".")
        while self.poll():
            time.sleep(0.005)
        return self._crew.wait(lambda: None)

    def _wait_unmounted(self) -> None:
        until = time.monotonic() + self.options.timeout + UNMOUNTED_S
        while is_mounted(self.mountpoint) and self.poll() and time.monotonic() < until:
            time.sleep(0.005)

    def close(self) -> None:
        """Ends what still runs, and takes away what is still mounted."""
        self._crew.stop()
        until = time.monotonic() + UNMOUNTED_S
        # Of a filesystem that was killed its watchdog takes care, in a moment.
        while is_mounted(self.mountpoint):
            if time.monotonic() > until:
                with suppress(OSError):
                    subprocess.run(["fusermount3", "-uz", str(self.mountpoint)], check=False)
                break
            time.sleep(0.01)
        for fd in (*self._stop_filesystem, *self._stop_server):
            os.close(fd)


@contextmanager
def stage(directory: Path, options: Options) -> Iterator[Stage]:
    """A stage in *directory*, which gets a directory ``source`` to put files into.

    Nothing of it is left on the way out.
    """
    made = Stage(directory, options)
    try:
        for each in (made.source, made.mountpoint):
            each.mkdir(exist_ok=True)
        yield made
    finally:
        made.close()


def run(settings: Settings, progress: Progress) -> Calls:
    """Reads ``count`` times ``size`` bytes in ``threads`` processes, each from a file of its own.

    A file is read to its end, and then again after its pages were dropped.
    """
    return run_with(settings, progress, None)


def run_with(settings: Settings, progress: Progress, fault: Fault | None) -> Calls:
    """The same with a server that has a *fault*."""
    fuse_module()
    copy, _, kind = settings.mode.partition("-")
    options = Options(
        copy=copy == "copy", unix=kind == "unix", threads=min(16, settings.threads + 1)
    )
    with scratch() as directory, stage(directory.resolve(), options) as made:
        patterns = [Pattern() for _ in range(settings.threads)]
        blocks = max(1, FILE_SIZE // settings.size)
        for number, pattern in enumerate(patterns):
            os.close(create(made.source / f"file-{number}", blocks * settings.size, pattern))
        time.sleep(SETTLED_S)
        made.start_server(fault)
        made.mount()
        readers = Readers(settings, made.poll)
        work = partial(_read_files, made, settings, readers, patterns, blocks)
        calls = readers.run(directory, progress, work)
        calls.merge(made.finish())
        return calls


def _read_files(
    made: Stage,
    settings: Settings,
    readers: Readers,
    patterns: list[Pattern],
    blocks: int,
    number: int,
    share: int | None,
    calls: Calls,
) -> None:
    """One reader: reads its file to the end, drops its pages, and starts over."""
    budget = Budget(share, settings.seconds)
    buffer = memoryview(mmap.mmap(-1, settings.size))
    operations = 0
    path = made.mountpoint / f"file-{number}"
    while budget.done < 1.0:
        with open(path, "rb", buffering=0) as file:
            for block in range(blocks):
                if not budget.take():
                    break
                _read_block(calls, file.fileno(), buffer)
                patterns[number].expect(buffer, block * len(buffer), path.name)
                operations += 1
                readers.tell(number, operations)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_block(calls: Calls, fd: int, buffer: memoryview) -> None:
    end = transfer.End(fd, FUSE)
    done = 0
    while done < len(buffer):
        done += transfer.read(calls, end, buffer[done:])


def _count(calls: Calls, key: tuple[str, str, str], tally: Any) -> None:
    if tally.operations:
        entry = calls.counts.setdefault(key, [0, 0])
        entry[0] += tally.operations
        entry[1] += tally.bytes


def _check(error: int) -> None:
    if error:
        raise OSError(-error, os.strerror(-error))


WORKLOAD = Workload(
    "recvpage",
    "files of a server behind a socket, read through a FUSE filesystem",
    run,
    Settings("rsplice", size=1 << 20, count=211, seconds=None, threads=1),
    modes=("rsplice", "copy", "rsplice-unix", "copy-unix"),
)
