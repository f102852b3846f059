# SPDX-License-Identifier: MIT
"""The FUSE filesystem of the workloads: what readers get is what the source has, in every mode."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplice.errors import RspliceError
from rsplice.workloads import WORKLOADS, fuse
from rsplice.workloads.core import Pattern, Settings
from rsplice.workloads.fuse import MAX_READ, File, Server, make_tree, serving
from rsplice.workloads.mounts import is_mounted
from tests.support.attached import descendants_of
from tests.support.run import ROOT, RSPLICE, environment

PAGE = 4096
MODES = WORKLOADS["fuse"].modes
#: Those in which the server answers READs itself.
ANSWERING = tuple(mode for mode in MODES if mode != "passthrough")
GONE_S = 20.0  #: until nothing is left of a server that was killed, on a busy machine


def _why_not() -> str | None:
    if not importlib.util.find_spec("rsplice._fuse"):
        return "rsplice was built without libfuse3"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


needs_fuse = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "")
needs_module = pytest.mark.skipif(
    not importlib.util.find_spec("rsplice._fuse"), reason="rsplice was built without libfuse3"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
every_mode = pytest.mark.parametrize("mode", MODES)
answering_modes = pytest.mark.parametrize("mode", ANSWERING)


def comm(pid: int) -> str:
    """The name of a process, "" if it has ended, waited for or not."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        name, _, rest = stat.partition("(")[2].rpartition(")")
        return "" if rest.split()[0] == "Z" else name
    return ""


#: Processes that the test that runs has not started.
_others: set[int] = set()


def ours(name: str) -> list[int]:
    """The test's processes of that name."""
    found = set(descendants_of(os.getpid())) - _others
    return [pid for pid in found if comm(pid) == name]


def server_and_watchdog() -> tuple[int, int]:
    """The only ones of the test. Until it has its own name the watchdog has the server's."""
    wait_until(lambda: len(ours("rsplice-unmount")) == 1, "no watchdog")
    (server,), (watchdog,) = ours("rsplice-fuse"), ours("rsplice-unmount")
    return server, watchdog


def wait_until(holds: Callable[[], bool], what: str, seconds: float = GONE_S) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """No mount and no process outlives a test."""
    _others.clear()
    _others.update(descendants_of(os.getpid()))
    yield
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not [*ours("rsplice-fuse"), *ours("rsplice-unmount")]


@dataclass
class Shown:
    """A source directory and where it is shown."""

    source: Path
    mount: Path
    server: Server

    def write(self, name: str, content: bytes) -> None:
        """A file of the source, on the disk."""
        with open(self.source / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def drop(self, name: str) -> None:
        """Drops what is cached of a file."""
        for path in (self.source / name, self.mount / name):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def shown(directory: Path, mode: str, **options: Any) -> Iterator[Shown]:
    """A mounted filesystem; skips where this machine has no passthrough."""
    source, mount = directory / "source", directory / "mnt"
    source.mkdir(exist_ok=True)
    mount.mkdir(exist_ok=True)
    with ExitStack() as stack:
        try:
            server = stack.enter_context(serving(directory, source, mount, mode, **options))
        except RspliceError as error:
            if "passthrough" in str(error):
                pytest.skip(str(error))
            raise
        yield Shown(source, mount, server)


def digest(path: Path) -> bytes:
    """Of a file, read in pieces of an odd size."""
    found = hashlib.blake2b()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(300_007):
            found.update(data)
    return found.digest()


# Identical


def check_tree(mount: Path, files: list[File]) -> None:
    for file in files:
        assert (mount / file.name).stat().st_size == file.size, file.name
        assert digest(mount / file.name) == file.digest, file.name


@needs_fuse
@needs_root
@pytest.mark.parametrize(("readahead", "kib"), [(0, 1016), (3 << 20, 3072)])
def test_the_kernel_reads_as_far_ahead_as_asked(tmp_path: Path, readahead: int, kib: int) -> None:
    files = make_tree(tmp_path / "source", (7 << 20) + 5)
    with (
        shown(tmp_path, "rsplice", threads=3, readahead=readahead) as at,
        ThreadPoolExecutor(2) as readers,
    ):
        device = at.mount.stat().st_dev
        setting = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
        assert Path(setting).read_text() == f"{kib}\n"
        for _ in range(3):
            list(readers.map(lambda _n: check_tree(at.mount, files), range(2)))
            for file in files:
                at.drop(file.name)


@needs_fuse
@every_mode
def test_a_tree_is_identical_to_concurrent_readers(tmp_path: Path, mode: str) -> None:
    files = make_tree(tmp_path / "source", (3 << 20) + 5)
    with shown(tmp_path, mode, threads=3) as at, ThreadPoolExecutor(4) as readers:
        for _ in range(3):
            list(readers.map(lambda _n: check_tree(at.mount, files), range(4)))
            for file in files:
                at.drop(file.name)
        assert os.readlink(at.mount / "small/deeper/link") == "../../whole"
        assert digest(at.mount / "small/deeper/link") == files[0].digest


@needs_fuse
@answering_modes
def test_a_wrong_byte_would_be_found(tmp_path: Path, mode: str) -> None:
    """The twin of the test above: one byte of the source is changed behind its checksum."""
    files = make_tree(tmp_path / "source", 1 << 20)
    with open(tmp_path / "source" / "tail", "r+b") as file:
        file.seek(PAGE)
        byte = file.read(1)
        file.seek(PAGE)
        file.write(bytes([byte[0] ^ 1]))
    with shown(tmp_path, mode) as at, pytest.raises(AssertionError, match="tail"):
        check_tree(at.mount, files)


@needs_fuse
@needs_root
@every_mode
def test_a_tree_is_identical_after_the_kernel_dropped_its_caches(tmp_path: Path, mode: str) -> None:
    files = make_tree(tmp_path / "source", 1 << 20)
    with shown(tmp_path, mode) as at:
        for _ in range(2):
            check_tree(at.mount, files)
            Path("/proc/sys/vm/drop_caches").write_text("3")


@needs_fuse
@every_mode
@pytest.mark.parametrize("max_read", [PAGE, 1 << 17, 1 << 20])
def test_every_size_of_read(tmp_path: Path, mode: str, max_read: int) -> None:
    """1 MiB has a page more than a pipe has slots, with the header."""
    files = make_tree(tmp_path / "source", (1 << 20) + 2 * PAGE)
    with shown(tmp_path, mode, max_read=max_read) as at:
        check_tree(at.mount, files)
        for file in files:
            at.drop(file.name)
            assert (at.mount / file.name).read_bytes() == (at.source / file.name).read_bytes()


@needs_fuse
@every_mode
def test_names_and_attributes_are_the_sources(tmp_path: Path, mode: str) -> None:
    make_tree(tmp_path / "source", PAGE)
    with shown(tmp_path, mode) as at:
        assert_same_names(at)
        (at.source / "small" / "new").write_bytes(b"new")
        (at.source / "tail").unlink()
        (at.source / "small" / "1").rename(at.source / "moved")
        (at.source / "whole").chmod(0o640)
        assert_same_names(at)
        assert os.statvfs(at.mount).f_blocks == os.statvfs(at.source).f_blocks


def assert_same_names(at: Shown) -> None:
    def listed(top: Path) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(top.rglob("*")):
            s = path.lstat()
            found[str(path.relative_to(top))] = (s.st_mode, s.st_size, s.st_nlink, s.st_mtime_ns)
        return found

    assert listed(at.mount) == listed(at.source)


@needs_fuse
def test_a_large_directory_is_listed_whole(tmp_path: Path) -> None:
    with shown(tmp_path, "copy") as at:
        names = {f"{number:04}-{'x' * 100}" for number in range(2003)}
        for name in names:
            (at.source / name).touch()
        assert set(os.listdir(at.mount)) == names
        assert {entry.name for entry in os.scandir(at.mount) if entry.stat().st_size == 0} == names


# Random places


@dataclass(frozen=True)
class Place:
    """What is read of a file, and how: "read", "pread", "mmap" or "direct"."""

    how: str
    offset: int
    size: int


LENGTHS = (PAGE + 1, MAX_READ - 1, MAX_READ + PAGE, 3 * MAX_READ + 511)
HOLE = range(PAGE * 3, PAGE * 40)  # in all files that reach that far

places = st.lists(
    st.builds(
        Place,
        st.sampled_from(["read", "pread", "mmap", "direct"]),
        st.one_of(
            st.integers(0, max(LENGTHS) + PAGE),
            st.sampled_from([0, 1, PAGE - 1, PAGE, MAX_READ - 1, *LENGTHS]),
        ),
        st.one_of(st.integers(1, 3 * PAGE), st.sampled_from([PAGE, 1 << 17, MAX_READ + 3])),
    ),
    min_size=1,
    max_size=12,
)
#: At the source, between reads: a new length, and bytes written at an offset.
changes = st.tuples(st.integers(0, max(LENGTHS)), st.integers(0, max(LENGTHS)), st.binary())


def look(path: Path, place: Place, size: int, aligned: bool) -> tuple[int, bytes]:
    """Reads a place of a file of *size* bytes; where it was really read, and what was there."""
    if place.how == "mmap":
        start = min(place.offset, size - 1) // PAGE * PAGE
        length = min(place.size, size - start)
        with open(path, "rb", buffering=0) as file:
            mapped = mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=start)
        with mapped:
            return start, bytes(mapped)
    flags = os.O_RDONLY | (os.O_DIRECT if place.how == "direct" else 0)
    offset, length = place.offset, place.size
    if place.how == "direct" and aligned:
        offset, length = offset // PAGE * PAGE, (length + PAGE - 1) // PAGE * PAGE
    fd = os.open(path, flags)
    try:
        with mmap.mmap(-1, length) as buffer:
            if place.how == "read":
                os.lseek(fd, offset, os.SEEK_SET)
                got = os.readv(fd, [buffer])
            else:
                got = os.preadv(fd, [buffer], offset)
            return offset, buffer[:got]
    finally:
        os.close(fd)


def expected(content: bytes, place: Place, start: int, found: bytes) -> bytes:
    """What a read at *start* has to give; a mapping is as long as was asked for."""
    return content[start : start + max(len(found), min(place.size, len(content) - start))]


@pytest.fixture(scope="module", params=MODES)
def everywhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Shown, str]]:
    """One mount a mode, for many examples."""
    if why := _why_not():
        pytest.skip(why)
    with shown(tmp_path_factory.mktemp("fuse"), request.param, threads=3) as at:
        yield at, request.param


def with_hole(size: int) -> bytes:
    content = bytearray(random.Random(size).randbytes(size))
    content[HOLE.start : HOLE.stop] = bytes(len(content[HOLE.start : HOLE.stop]))
    return bytes(content)


def write_sparse(path: Path, content: bytes) -> None:
    """Without blocks where the hole is."""
    with open(path, "wb", buffering=0) as file:
        os.pwrite(file.fileno(), content[: HOLE.start], 0)
        os.truncate(file.fileno(), len(content))
        os.pwrite(file.fileno(), content[HOLE.stop :], HOLE.stop)
        os.truncate(file.fileno(), len(content))
        os.fsync(file.fileno())


@needs_fuse
@settings(max_examples=60)
@given(length=st.sampled_from(LENGTHS), wanted=places, drop=st.booleans())
def test_random_reads_are_those_of_the_source(
    everywhere: tuple[Shown, str], length: int, wanted: list[Place], drop: bool
) -> None:
    at, mode = everywhere
    name, content = f"fixed-{length}", with_hole(length)
    if not (at.source / name).exists():
        write_sparse(at.source / name, content)
    if drop:
        at.drop(name)
    for place in wanted:
        start, found = look(at.mount / name, place, length, mode == "passthrough")
        assert found == expected(content, place, start, found), place


@needs_fuse
@settings(max_examples=40)
@given(length=st.sampled_from(LENGTHS), steps=st.lists(st.tuples(changes, places), max_size=4))
def test_random_reads_between_changes_at_the_source(
    everywhere: tuple[Shown, str],
    length: int,
    steps: list[tuple[tuple[int, int, bytes], list[Place]]],
) -> None:
    """Truncated, extended and written to, as fsx does, while the reader keeps the file open."""
    at, mode = everywhere
    content = bytearray(with_hole(length))
    write_sparse(at.source / "changing", bytes(content))
    with open(at.mount / "changing", "rb") as kept:
        for (new_length, offset, data), wanted in steps:
            change(at.source / "changing", content, new_length, offset, data)
            assert os.fstat(kept.fileno()).st_size == len(content)
            for place in wanted:
                if not content:
                    continue
                args = (place, len(content), mode == "passthrough")
                start, found = look(at.mount / "changing", *args)
                assert found == expected(bytes(content), place, start, found), place
            assert os.pread(kept.fileno(), len(content) + 1, 0) == content


def change(path: Path, content: bytearray, length: int, offset: int, data: bytes) -> None:
    """The same in a file and in what it should hold."""
    with open(path, "r+b", buffering=0) as file:
        os.truncate(file.fileno(), length)
        os.pwrite(file.fileno(), data, offset)
    content[length:] = b""
    content.extend(bytes(max(length, offset + len(data) if data else 0) - len(content)))
    if data:
        content[offset : offset + len(data)] = data


# Files that change underneath


@needs_fuse
@every_mode
def test_readers_of_a_file_that_shrinks_and_grows_get_no_wrong_byte(
    tmp_path: Path, mode: str
) -> None:
    pattern, most = Pattern(), 5 * MAX_READ + 77
    text = b"".join(pattern.pieces(0, most))
    stop = threading.Event()
    with shown(tmp_path, mode, threads=3) as at, ThreadPoolExecutor(5) as threads:
        names = [f"file-{number}" for number in range(4)]
        for name in names:
            at.write(name, text)
        # Zeros may show for a moment in every mode: the kernel puts them behind a short READ
        # (fs/fuse/file.c:fuse_short_read), and the source's page cache has them where a file is
        # cut. That the library itself makes none of them is for tests/c/cut.c.
        # One reader a file: what two of them see meanwhile is a race in the kernel.
        readers = [threads.submit(keep_reading, at.mount / name, text, stop) for name in names]
        resize(at.source, names, text, time.monotonic() + 2.0)
        stop.set()
        assert sum(reader.result() for reader in readers) > 20
        for name in names:
            size = (at.source / name).stat().st_size
            assert (at.mount / name).read_bytes() == text[:size]


def resize(source: Path, names: list[str], text: bytes, until: float) -> None:
    """Cuts files at random places, and appends what was there."""
    chance = random.Random(23)
    while time.monotonic() < until:
        path = source / chance.choice(names)
        length = chance.randrange(len(text))
        with open(path, "r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if length < size:
                os.truncate(file.fileno(), length)
            else:
                os.pwrite(file.fileno(), text[size:length], size)
        time.sleep(0.01)


def keep_reading(path: Path, text: bytes, stop: threading.Event) -> int:
    """Reads a file that holds some first bytes of *text*, or zeros, over and over; how often."""
    rounds = 0
    while not stop.is_set():
        done = 0
        with open(path, "rb", buffering=0) as file:
            while data := file.read(100_003):
                right = text[done : done + len(data)]
                if data != right and len(right) == len(data):
                    data = bytes(a or b for a, b in zip(data, right, strict=True))
                assert data == right, f"wrong bytes near {done}"
                done += len(data)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        rounds += 1
    return rounds


@needs_fuse
@every_mode
def test_a_file_that_was_cut_behind_the_kernels_back_is_short_and_not_stale(
    tmp_path: Path, mode: str
) -> None:
    """The kernel still believes in the old size, and asks for all of it."""
    with shown(tmp_path, mode, timeout=600.0) as at:
        content = os.urandom(8 * PAGE)
        at.write("file", content)
        with open(at.mount / "file", "rb", buffering=0) as file:
            assert os.fstat(file.fileno()).st_size == len(content)
            os.truncate(at.source / "file", 3 * PAGE + 7)
            assert os.pread(file.fileno(), len(content), 0) == content[: 3 * PAGE + 7]
            assert os.pread(file.fileno(), PAGE, 5 * PAGE) == b""


@needs_fuse
@every_mode
def test_a_replaced_file_and_one_written_in_place_are_read_anew(tmp_path: Path, mode: str) -> None:
    with shown(tmp_path, mode) as at:
        for number in range(3):
            content = os.urandom(2 * PAGE + 5)
            at.write("new", content)
            (at.source / "new").rename(at.source / "file")
            assert (at.mount / "file").read_bytes() == content
            content = os.urandom(len(content))
            with open(at.source / "file", "r+b") as file:
                file.write(content)
            assert (at.mount / "file").read_bytes() == content, number


@needs_fuse
@answering_modes
def test_pages_are_kept_from_open_to_open_unless_the_file_has_changed(
    tmp_path: Path, mode: str
) -> None:
    content = os.urandom(3 * PAGE + 1)
    with shown(tmp_path, mode) as at:
        at.write("file", content)
        long_ago = time.time_ns() - 10**12
        os.utime(at.source / "file", ns=(long_ago, long_ago))

        def read_anew() -> bool:
            before = at.server.counts.replies
            assert (at.mount / "file").read_bytes() == content
            time.sleep(0.1)  # a reply is counted when it has been sent
            return bool(at.server.counts.replies > before)

        assert read_anew()
        assert read_anew(), "a change just now would leave the same times"
        time.sleep(3.1)
        read_anew()
        assert not read_anew()
        content = content[::-1]
        at.write("file", content)
        assert read_anew()


@needs_fuse
@answering_modes
def test_an_open_file_outlives_its_name(tmp_path: Path, mode: str) -> None:
    with shown(tmp_path, mode) as at:
        content = os.urandom(PAGE * 5 + 9)
        at.write("file", content)
        with open(at.mount / "file", "rb", buffering=0) as file:
            (at.source / "file").unlink()
            assert file.read() == content
        assert not (at.mount / "file").exists()


# Errors


@needs_fuse
@every_mode
def test_it_is_read_only(tmp_path: Path, mode: str) -> None:
    with shown(tmp_path, mode) as at:
        at.write("file", b"content")
        for change_it in (
            lambda: os.open(at.mount / "file", os.O_WRONLY),
            lambda: os.unlink(at.mount / "file"),
            lambda: os.mkdir(at.mount / "directory"),
        ):
            with pytest.raises(OSError) as caught:
                change_it()
            assert caught.value.errno == errno.EROFS
        with pytest.raises(FileNotFoundError):
            (at.mount / "other").stat()


@needs_fuse
@needs_strace
@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        ("copy", "pread64"),
        ("direct", "pread64"),
        ("splice", "splice,pread64"),
        ("rsplice", "splice"),
    ],
)
def test_errors_of_the_source_reach_the_reader(tmp_path: Path, mode: str, calls: str) -> None:
    with shown(tmp_path, mode, threads=1) as at:
        content = os.urandom(PAGE)
        at.write("file", content)
        inject = ("-e", f"trace={calls}", "-e", f"inject={calls}:error=EUCLEAN")
        with traced(*inject), pytest.raises(OSError) as caught:
            (at.mount / "file").read_bytes()
        assert caught.value.errno == errno.EUCLEAN
        assert at.server.counts.failed > 0
        assert (at.mount / "file").read_bytes() == content, "the twin: without the error"


@needs_fuse
@needs_strace
@pytest.mark.parametrize("mode", ["splice", "rsplice"])
def test_a_file_that_shrinks_and_grows_within_one_read(tmp_path: Path, mode: str) -> None:
    """A fill that ends where the file ended, and then there is more: what comes is in order."""
    content = os.urandom(6 * PAGE)
    with shown(tmp_path, mode, threads=1) as at, ThreadPoolExecutor(1) as threads:
        at.write("file", content)
        with traced("-e", "trace=splice", "-e", "inject=splice:delay_enter=400000"):
            reader = threads.submit((at.mount / "file").read_bytes)
            time.sleep(0.2)  # in the first splice(2)
            os.truncate(at.source / "file", PAGE + 700)
            time.sleep(0.4)  # in the second
            at.write("file", content)
            found = reader.result(timeout=20)
        assert len(found) >= PAGE + 700
        assert found == content[: len(found)]
        assert (at.mount / "file").read_bytes() == content


@contextmanager
def traced(*options: str) -> Iterator[int]:
    """Has strace at work on the server meanwhile; the server's number."""
    server, _ = server_and_watchdog()
    strace = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", *options, "-p", str(server)]
    )
    try:
        wait_until(lambda: is_traced(server), "strace does not attach")
        yield server
    finally:
        strace.terminate()
        strace.wait()


def is_traced(pid: int) -> bool:
    """All of its threads."""
    return all(
        "TracerPid:\t0\n" not in (task / "status").read_text()
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


# What is left


@needs_fuse
@every_mode
def test_a_killed_server_leaves_neither_mount_nor_process(tmp_path: Path, mode: str) -> None:
    server = Server(tmp_path, tmp_path / "source", tmp_path / "mnt", mode)
    (tmp_path / "mnt").mkdir()
    make_tree(tmp_path / "source", 8 << 20)
    try:
        server.start()
    except RspliceError as error:
        server.stop()
        if "passthrough" not in str(error):
            raise
        pytest.skip(str(error))
    pid, watchdog = server_and_watchdog()
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(watchdog, ignored)
    reading = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(read_until_it_fails, tmp_path / "mnt", reading)
        assert reading.wait(GONE_S)
        os.kill(pid, signal.SIGKILL)
        assert reader.result(timeout=GONE_S) in (errno.ECONNABORTED, errno.ENOTCONN, errno.ENOENT)
    wait_until(lambda: not is_mounted(tmp_path / "mnt"), "it is still mounted")
    wait_until(lambda: not comm(watchdog), "the watchdog is still there")
    # The mount goes before the process is quite gone.
    with pytest.raises(RspliceError, match="killed"):
        wait_until(lambda: not server.poll(), "the server is still there")
    server.stop()


def read_until_it_fails(mount: Path, reading: threading.Event) -> int | None:
    """The errno with which it fails."""
    try:
        while True:
            with open(mount / "whole", "rb", buffering=0) as file:
                while file.read(1 << 16):
                    reading.set()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        return error.errno


@needs_fuse
def test_the_watchdog_takes_no_other_mount_away(tmp_path: Path) -> None:
    """What somebody has mounted over ours is theirs."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    server = Server(tmp_path, tmp_path / "source", tmp_path / "mnt", "copy")
    (tmp_path / "source").mkdir()
    (tmp_path / "mnt").mkdir()
    server.start()
    pid, watchdog = server_and_watchdog()
    subprocess.run(["mount", "-t", "tmpfs", "theirs", tmp_path / "mnt"], check=True)
    try:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not comm(watchdog), "the watchdog is still there")
        assert "theirs" in Path("/proc/self/mounts").read_text()
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)
        subprocess.run(["umount", "--lazy", tmp_path / "mnt"], check=True)
    server.stop()


@needs_fuse
def test_unmounted_by_somebody_the_server_ends(tmp_path: Path) -> None:
    with shown(tmp_path, "copy") as at:
        _, watchdog = server_and_watchdog()
        subprocess.run(["umount", at.mount], check=True)
        wait_until(lambda: not at.server.poll(), "it still runs")
        wait_until(lambda: not comm(watchdog), "the watchdog is still there")


@needs_fuse
@every_mode
def test_the_server_keeps_no_descriptor_of_what_is_closed(tmp_path: Path, mode: str) -> None:
    with shown(tmp_path, mode) as at:
        pid, _ = server_and_watchdog()
        descriptors = Path(f"/proc/{pid}/fd")

        def open_and_read(rounds: int) -> int:
            for _ in range(rounds):
                for entry in os.scandir(at.mount):
                    Path(entry).read_bytes()
                at.drop("file-0")
            time.sleep(0.2)
            return len(list(descriptors.iterdir()))

        for number in range(5):
            at.write(f"file-{number}", os.urandom(PAGE + number))
        before = open_and_read(3)
        # Pipes that librsplice keeps for later come on top, a few for each thread.
        assert open_and_read(50) <= before + 16


@needs_fuse
@needs_root
@pytest.mark.parametrize("mode", ["copy", "rsplice"])
def test_more_files_than_descriptors(tmp_path: Path, mode: str) -> None:
    """Each name that the kernel knows costs the server one, until they get scarce."""
    names = {f"d{number % 7}/file-{number}" for number in range(900)}
    for name in names:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        path.with_suffix(".link").symlink_to(name)
    code = f"""
import resource
from pathlib import Path
from tests.test_fuse_workload import reads_whole_tree, shown
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
with shown(Path({str(tmp_path)!r}), {mode!r}) as at:
    for _ in range(2):
        reads_whole_tree(at)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def reads_whole_tree(at: Shown) -> None:
    """Every file holds its name, also one that has taken the place of another."""
    found = {str(path.relative_to(at.mount)): path for path in at.mount.rglob("file-*")}
    assert len(found) == 1800
    for name, path in found.items():
        if path.is_symlink():
            assert os.readlink(path) == name.replace(".link", "")
        else:
            assert path.read_text() == name
    for path in list(at.source.glob("d3/file-*"))[:50]:
        if not path.is_symlink():
            # The number of the inode is likely to be used again.
            path.unlink()
            path.write_text(str(path.relative_to(at.source)))
            assert (at.mount / path.relative_to(at.source)).read_text() == path.read_text()


# The command


def workload(*args: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RSPLICE, "workload", *args], cwd=ROOT, capture_output=True, text=True, timeout=60, **how
    )


@needs_fuse
@every_mode
def test_the_workload_counts_what_it_read(tmp_path: Path, mode: str) -> None:
    done = workload(
        *("fuse", "--mode", mode, "--size", "70000", "--count", "23", "--threads", "1", "--json"),
        env={**environment(), "TMPDIR": str(tmp_path)},
    )
    if "passthrough" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    read = [c for c in result["calls"] if c["via"] == "readv"]
    kind = "fuse passthrough" if mode == "passthrough" else "fuse"
    assert [(c["source"], c["destination"]) for c in read] == [(kind, "user memory")]
    reported = result["reported"]
    assert (reported["fuse_opens"], reported["fuse_failed"]) == (23, 0)
    replies = sum(c["bytes"] for c in result["calls"] if c["via"] == "fuse reply")
    assert replies == reported["fuse_bytes"]
    assert replies == (0 if mode == "passthrough" else read[0]["bytes"])
    assert not list(tmp_path.iterdir())


@needs_fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_no_mount_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*RSPLICE, "workload", "fuse", "--seconds", "60", "--size", "1M"],
        cwd=ROOT,
        env={**environment(), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 20
    while not [pid for pid in descendants_of(process.pid) if comm(pid) == "rsplice-reader"]:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    family = descendants_of(process.pid)
    assert {"rsplice-fuse", "rsplice-reader", "rsplice-unmount"} <= {comm(pid) for pid in family}
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (out, err) == (b"", b"")
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    wait_until(lambda: not any(comm(pid) for pid in family), "a process is still there")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    if not killed:
        assert not list(tmp_path.iterdir())


@needs_fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_directory_is_served_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    source, mount = tmp_path / "my source", tmp_path / "my mount"
    files = make_tree(source, 1 << 17)
    mount.mkdir()
    process = subprocess.Popen(
        [*RSPLICE, "workload", "fuse", "--source", source, "--mount", mount, "--json"],
        cwd=ROOT,
        env={**environment(), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: is_mounted(mount), "not mounted", 20)
    check_tree(mount, files)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["reported"]["fuse_bytes"] == sum(file.size for file in files)
    assert not is_mounted(mount)


@needs_module
@pytest.mark.parametrize(
    ("source", "mount", "message"),
    [
        ("source", "none", "none: No such file or directory"),
        ("source", "file", "file: Not a directory"),
        ("none", "mnt", "none: No such file or directory"),
        ("file", "mnt", "file: Not a directory"),
        (".", "mnt", "lies inside"),
        ("source", None, "--source and --mount go together"),
        (None, "mnt", "--source and --mount go together"),
    ],
)
def test_bad_directories_are_one_line(
    tmp_path: Path, source: str | None, mount: str | None, message: str
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").touch()
    given = [("--source", source), ("--mount", mount)]
    args = [word for option, name in given if name for word in (option, str(tmp_path / name))]
    assert message in one_line(workload("fuse", *args))


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (125, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("rsplice: ")
    return line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["relay", "--source", "/"], "relay has no --source"),
        (["serve", "--mount", "/"], "serve has no --mount"),
        (["fuse", "--source", "/", "--mount", "/mnt", "--count", "3"], "--count means nothing"),
        (["fuse", "--source", "/", "--mount", "/mnt", "--size", "3"], "--size means nothing"),
        (["relay", "--readahead", "1M"], "relay has no --readahead"),
        (["fuse", "--readahead", "4095"], "--readahead '4095' is not a size from 4096 to 1G"),
        (["fuse", "--readahead", "much"], "--readahead 'much' is not a size"),
        (["fuse", "--mode", "x"], "its modes: copy, direct, splice, rsplice, passthrough"),
    ],
)
def test_bad_options_are_one_line(args: list[str], message: str) -> None:
    assert message in one_line(workload(*args))


@needs_module
@needs_root
@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("mount -t tmpfs none /dev", "/dev/fuse: No such file or directory"),
        ("mount -t tmpfs none /dev; mknod -m 0 /dev/fuse c 10 229", "/dev/fuse: "),
    ],
)
def test_without_the_device_one_line_says_so(setup: str, message: str) -> None:
    script = f'{setup}; exec "$@"'
    unprivileged = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
    command = ["unshare", "-m", "sh", "-c", script, "sh", *unprivileged, *RSPLICE]
    done = subprocess.run(
        [*command, "workload", "fuse"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert message in one_line(done)


@needs_fuse
@needs_root
@pytest.mark.parametrize("mode", ["rsplice", "passthrough"])
def test_without_privilege_one_line_says_so(mode: str) -> None:
    """As root without CAP_SYS_ADMIN, whom neither mount(2) nor fusermount3 obeys."""
    unprivileged = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    done = subprocess.run(
        [*unprivileged, *RSPLICE, "workload", "fuse", "--mode", mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "not permitted" in one_line(done)


def test_without_libfuse_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from rsplice.workloads import mounts

    monkeypatch.setitem(sys.modules, "rsplice._fuse", None)
    mounts.fuse_module.cache_clear()
    with pytest.raises(RspliceError, match="built without FUSE.*install libfuse3-dev"):
        fuse.run(fuse.WORKLOAD.defaults, lambda _done, _what: None)


# The scratch tree


def test_the_scratch_tree_has_what_its_checksums_say(tmp_path: Path) -> None:
    files = make_tree(tmp_path / "source", (1 << 20) + 1)
    check_tree(tmp_path / "source", files)
    by_name = {file.name: file.size for file in files}
    assert by_name["whole"] % PAGE == 0 and by_name["tail"] % PAGE
    hole = (tmp_path / "source" / "small/deeper/hole").stat()
    assert hole.st_size == (1 << 20) + PAGE
    assert hole.st_blocks * 512 < hole.st_size // 2, "there is no hole"
    assert isinstance(fuse.WORKLOAD.defaults, Settings)
