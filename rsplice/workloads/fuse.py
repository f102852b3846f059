# SPDX-License-Identifier: MIT
"""fuse: a directory read through a FUSE filesystem, which answers its READs in one of five ways.

``copy`` reads into memory and writes to the kernel, ``direct`` the same with O_DIRECT; ``splice``
lends the page cache of the source; ``rsplice`` has the device fill fresh pages, which become the
page cache of the file that is read; with ``passthrough`` the kernel reads the source by itself.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rsplice.errors import RspliceError
from rsplice.workloads import transfer
from rsplice.workloads.core import (
    MEMORY,
    PIPE,
    STOP_SIGNALS,
    Budget,
    Calls,
    Crew,
    Pattern,
    Progress,
    Settings,
    Workload,
    filesystem_of,
    scratch,
)
from rsplice.workloads.mounts import (
    FUSE,
    FUSE_DEVICE,
    PASSTHROUGH,
    Readers,
    fuse_module,
    wait_unmounted,
)

#: Bytes of the largest READ: as many pages as a virtio disk with a queue of 256 takes at once (its
#: seg_max), and few enough for a pipe of 256 slots with the header of the reply.
MAX_READ = 254 * 4096
#: Bytes that a reader reads at a time.
BUFFER_SIZE = 1 << 20
READY_S = 20.0
UNMOUNTED_S = 5.0

_PAGE = 4096
_POLL_S = 0.02

#: Of struct rsplice_fs_counts, in what the workload prints.
_REPORTED = (
    *("opens", "replies", "failed", "bytes"),
    *("moved", "shared", "direct", "copied", "unknown", "why"),
)


@dataclass(frozen=True)
class FuseSettings(Settings):
    """Settings of a run, or the directory to serve instead."""

    source: str | None = None
    mount: str | None = None
    readahead: int = 0  #: bytes; 0: one READ


@dataclass(frozen=True)
class File:
    """A file of the scratch tree and what it holds."""

    name: str  #: its path in the tree
    size: int
    digest: bytes


class Server:
    """A process that serves the files of a directory on a mount point until it is told to stop.

    :param timeout: seconds for which the kernel may believe names and attributes
    :param readahead: bytes that the kernel reads ahead of a reader; 0: one READ
    """

    def __init__(
        self,
        directory: Path,
        source: Path,
        mountpoint: Path,
        mode: str,
        threads: int = 2,
        max_read: int = MAX_READ,
        timeout: float = 0.0,
        readahead: int = 0,
    ) -> None:
        self.mountpoint = mountpoint
        self._source = source
        self._settings = (mode, threads, max_read, timeout, readahead)
        self._module = fuse_module()
        self._crew = Crew(directory)
        self._memory = mmap.mmap(-1, 2 * _PAGE)
        #: struct rsplice_fs_counts, which the process writes to
        self.counts = self._module.ffi.cast(
            "struct rsplice_fs_counts *", self._module.ffi.from_buffer(self._memory)
        )

    def start(self) -> None:
        """Mounts, and returns when the files can be read. RspliceError if that cannot be."""
        self._crew.start("rsplice-fuse", self._serve)
        until = time.monotonic() + READY_S
        while not self.counts.ready:
            if not self.poll():
                raise RspliceError(self._message() or "the filesystem was not mounted")
            if time.monotonic() > until:
                raise RspliceError(f"mounting on {self.mountpoint} takes too long")
            time.sleep(_POLL_S / 10)

    def _serve(self, _calls: Calls) -> None:
        ffi, lib = self._module.ffi, self._module.lib
        mode, threads, max_read, timeout, readahead = self._settings
        options = ffi.new("struct rsplice_fs_options *")
        source = ffi.new("char[]", os.fsencode(self._source))
        mountpoint = ffi.new("char[]", os.fsencode(self.mountpoint))
        options.source = source
        options.mountpoint = mountpoint
        options.mode = getattr(lib, f"RSPLICE_FS_{mode.upper()}")
        options.threads = threads
        options.max_read = max_read
        options.timeout_ms = round(timeout * 1000)
        options.readahead = readahead
        if error := lib.rsplice_fs_run(options, self.counts):
            text = ffi.string(lib.rsplice_fs_message()) or os.strerror(-error).encode()
            self._memory[_PAGE : _PAGE + len(text)] = text

    def _message(self) -> str:
        """Why it ended by itself, "" if it was unmounted."""
        return self._memory[_PAGE:].rstrip(b"\0").decode(errors="replace")

    def poll(self) -> bool:
        """True while it serves. RspliceError if it failed."""
        running = self._crew.poll()
        if not running and (message := self._message()):
            raise RspliceError(message)
        return running

    def stop(self) -> None:
        """Unmounts, and returns when that is done."""
        self._crew.stop()
        # Of a server that was killed its watchdog takes care, in a moment.
        if not wait_unmounted(self.mountpoint, UNMOUNTED_S):
            raise RspliceError(f"{self.mountpoint} is still mounted; try: umount -l")

    def calls(self) -> Calls:
        """What it did to answer READs."""
        calls, counts = Calls(), self.counts
        kind = filesystem_of(self._source.resolve(), direct=self._settings[0] == "direct")
        for key, operations, nbytes in (
            (("pread64", kind, MEMORY), counts.preads, counts.pread_bytes),
            (("fuse reply", MEMORY, FUSE_DEVICE), counts.written, counts.written_bytes),
            (("write", MEMORY, PIPE), counts.headers, counts.header_bytes),
            (("splice", kind, PIPE), counts.splices, counts.spliced_bytes),
            (("fuse reply", PIPE, FUSE_DEVICE), counts.piped, counts.piped_bytes),
        ):
            if operations:
                calls.counts[key] = [operations, nbytes]
        calls.reported.update({f"fuse_{name}": getattr(counts, name) for name in _REPORTED})
        return calls


@contextmanager
def serving(*args: Any, **kwargs: Any) -> Iterator[Server]:
    """A :class:`Server` that has mounted; unmounted on the way out."""
    server = Server(*args, **kwargs)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def run(settings: Settings, progress: Progress) -> Calls:
    """Reads ``count`` files of a scratch tree through the mount, in ``threads`` processes."""
    assert isinstance(settings, FuseSettings)
    if settings.source is None and settings.mount is None:
        return _read_scratch(settings, progress)
    if settings.source is None or settings.mount is None:
        raise RspliceError("--source and --mount go together")
    return _serve_directory(settings, Path(settings.source), Path(settings.mount), progress)


def _server(
    directory: Path, source: Path, mount: Path, settings: FuseSettings
) -> AbstractContextManager[Server]:
    """The server that the settings ask for."""
    mode, threads, readahead = settings.mode, settings.threads, settings.readahead
    return serving(directory, source, mount, mode, threads, readahead=readahead)


def _serve_directory(
    settings: FuseSettings, source: Path, mount: Path, progress: Progress
) -> Calls:
    """Serves until a signal comes, time is up, or somebody unmounts."""
    budget = Budget(None, settings.seconds)
    try:
        point = mount.resolve(strict=True)
    except OSError as error:
        raise RspliceError(f"{mount}: {error.strerror}") from error
    with scratch() as directory, _flag_at_signal() as is_stopped:
        with _server(directory, source, point, settings) as server:
            if sys.stderr.isatty():
                print(f"{source} is shown on {mount} until Ctrl-C", file=sys.stderr)
            while not is_stopped() and budget.done < 1.0 and server.poll():
                progress(budget.done, settings.mode)
                time.sleep(_POLL_S)
        return server.calls()


@contextmanager
def _flag_at_signal() -> Iterator[Callable[[], bool]]:
    """Signals that end a run are no more than remembered meanwhile."""
    seen: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_scratch(settings: FuseSettings, progress: Progress) -> Calls:
    with scratch() as directory:
        source, mount = directory.resolve() / "source", directory.resolve() / "mnt"
        files = make_tree(source, settings.size)
        mount.mkdir()
        with _server(directory, source, mount, settings) as server:
            calls = _Readers(server, source, files, settings).read(directory, progress)
        calls.merge(server.calls())
        return calls


def make_tree(directory: Path, size: int) -> list[File]:
    """A new tree: two files of some *size* bytes, and what is special about files in general."""
    whole = (size + _PAGE - 1) // _PAGE * _PAGE
    (directory / "small" / "deeper").mkdir(parents=True)
    sizes = {"whole": whole, "tail": whole + 101, "small/empty": 0}
    sizes |= {f"small/{n}": n for n in (1, 511, 512, _PAGE - 1, _PAGE, _PAGE + 1)}
    files = [_make_file(directory, name, nbytes) for name, nbytes in sizes.items()]
    files.append(_make_file(directory, "small/deeper/hole", whole, hole=True))
    (directory / "small" / "deeper" / "link").symlink_to("../../whole")
    return files


def _make_file(directory: Path, name: str, size: int, hole: bool = False) -> File:
    """A file on the disk. Of one with a hole only the first and the last page have data."""
    digest, done = hashlib.blake2b(), 0
    fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(fd, size)
        for piece in Pattern().pieces(0, size):
            data = _with_hole(piece, done, size) if hole else piece
            if any(data) or not hole:
                os.pwrite(fd, data, done)
            digest.update(data)
            done += len(piece)
        # Only clean pages go when they are told to.
        os.fsync(fd)
    finally:
        os.close(fd)
    return File(name, size, digest.digest())


def _with_hole(piece: bytes, offset: int, size: int) -> bytes:
    """The same where it lies in the first or the last page of *size* bytes, else zeros."""
    first = max(0, min(len(piece), _PAGE - offset))
    last = max(first, min(len(piece), size - _PAGE - offset))
    return piece[:first] + bytes(last - first) + piece[last:]


class _Readers:
    """Processes that read the files through the mount, and check what they read."""

    def __init__(self, server: Server, source: Path, files: list[File], settings: Settings) -> None:
        self._server = server
        self._source = source
        self._files = files
        self._settings = settings
        self._readers = Readers(settings, server.poll)

    def read(self, directory: Path, progress: Progress) -> Calls:
        """Reads until the work is done; what the readers counted."""
        return self._readers.run(directory, progress, self._work)

    def _work(self, number: int, share: int | None, calls: Calls) -> None:
        self._check_names()
        budget = Budget(share, self._settings.seconds)
        buffer = memoryview(mmap.mmap(-1, BUFFER_SIZE))
        turn = number
        while budget.take():
            self._read_file(self._files[turn % len(self._files)], buffer, calls)
            turn += 1
            self._readers.tell(number, turn - number)

    def _check_names(self) -> None:
        shown = {
            os.path.relpath(os.path.join(at, name), self._server.mountpoint)
            for at, _, names in os.walk(self._server.mountpoint)
            for name in names
        }
        link = "small/deeper/link"
        if shown != {file.name for file in self._files} | {link}:
            raise RspliceError(f"other files than there are: {sorted(shown)}")
        if os.readlink(self._server.mountpoint / link) != os.readlink(self._source / link):
            raise RspliceError(f"{link} leads elsewhere")

    def _read_file(self, file: File, buffer: memoryview, calls: Calls) -> None:
        """Reads a file whose pages nobody has cached, unless another reader is at it too."""
        with open(self._source / file.name, "rb", buffering=0) as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.blake2b()
        with open(self._server.mountpoint / file.name, "rb", buffering=0) as shown:
            os.posix_fadvise(shown.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            passes = self._settings.mode == "passthrough"
            end = transfer.End(shown.fileno(), PASSTHROUGH if passes else FUSE)
            for _ in range(-(-file.size // len(buffer))):
                got = transfer.read(calls, end, buffer)
                digest.update(buffer[:got])
            size = os.fstat(shown.fileno()).st_size
        if (size, digest.digest()) != (file.size, file.digest):
            raise RspliceError(f"wrong data in {file.name} of the mount, of {size} bytes")


WORKLOAD = Workload(
    "fuse",
    "files of --size read through a FUSE filesystem; or --source shown on --mount",
    run,
    FuseSettings("rsplice", size=16 << 20, count=53, seconds=None, threads=2),
    modes=("copy", "direct", "splice", "rsplice", "passthrough"),
)
