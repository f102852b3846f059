# SPDX-License-Identifier: MIT
"""rsplice verify on real filesystems: a block changes below a cached page, and all the twins.

Every scratch filesystem lies in an image behind a loop device. The block of a page is found in the
image by its random bytes, and changed there: the page cache of the file knows nothing of it.
Files are held in the cache by a mapping: whoever drops caches meanwhile drops none of it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.filesystems import missing
from tests.support.run import ROOT, RSPLICE, environment

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PAGE = mmap.PAGESIZE
PAGES = 40
CHANGED = b"CHANGED BELOW!"
KINDS = ("ext4", "xfs", "btrfs")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Filesystem:
    """A scratch filesystem, and the image that is its disk."""

    kind: str
    path: Path
    image: Path

    def file(self, name: str, size: int = PAGES * PAGE) -> Path:
        """A clean file of random bytes; on btrfs without checksums, which would be wrong below."""
        file = self.path / name
        if self.kind == "btrfs" and not file.exists():
            file.touch()
            subprocess.run(["chattr", "+C", file], check=True)
        write(file, os.urandom(size))
        return file

    def find(self, block: bytes) -> int:
        """Where *block* is in the image."""
        with self.image.open("rb") as image, mapping(image.fileno()) as data:
            at = data.find(block)
            assert at >= 0, "the block is not on disk"
            assert data.find(block, at + 1) < 0, "the block is on disk twice"
            return at

    @contextmanager
    def changed(self, file: Path, offset: int) -> Iterator[None]:
        """The bytes at *offset* of *file* are others on disk."""
        begin = offset // PAGE * PAGE
        old = file.read_bytes()[begin : begin + PAGE]
        at = self.find(old) + offset - begin
        poke(self.image, at, CHANGED)
        try:
            yield
        finally:
            poke(self.image, at, old[offset - begin : offset - begin + len(CHANGED)])


def write(file: Path, data: bytes) -> None:
    with file.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    sync(file)


def sync(file: Path) -> None:
    """Nothing of the file's filesystem is dirty when it returns."""
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    _libc.syncfs(fd)
    os.close(fd)


def poke(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as f:
        f.seek(offset)
        f.write(data)


@contextmanager
def mapping(fd: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        yield memory


@contextmanager
def cached(*files: Path) -> Iterator[list[mmap.mmap]]:
    """The whole of *files* is in the page cache, and stays there."""
    with ExitStack() as stack:
        memories = []
        for file in files:
            with file.open("rb") as f:
                memory = stack.enter_context(mapping(f.fileno()))
            for offset in range(0, len(memory), PAGE):
                memory[offset]
            memories.append(memory)
        yield memories


def resident(file: Path) -> list[int]:
    """Which pages are cached, by mincore(2): asks, and touches nothing."""
    with file.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        _libc.mmap.restype = ctypes.c_void_p
        address = ctypes.c_void_p(
            _libc.mmap(None, ctypes.c_size_t(size), 1, 1, f.fileno(), ctypes.c_long(0))
        )
        states = ctypes.create_string_buffer(-(-size // PAGE))
        assert _libc.mincore(address, ctypes.c_size_t(size), states) == 0
        _libc.munmap(address, ctypes.c_size_t(size))
    return [page for page, state in enumerate(states.raw) if state & 1]


def frame_of(memory: mmap.mmap, offset: int) -> int:
    """The page frame at *offset* of a mapping."""
    memory[offset]
    line = next(n for n in Path("/proc/self/maps").read_text().splitlines() if _is(n, memory))
    address = int(line.partition("-")[0], 16) + offset
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE * 8)
        return int(struct.unpack("Q", pagemap.read(8))[0]) & ((1 << 55) - 1)


def _is(line: str, memory: mmap.mmap) -> bool:
    begin, end = (int(n, 16) for n in line.split()[0].split("-"))
    return line.endswith("/framed") and end - begin == len(memory)


def verify(*words: str | Path) -> tuple[int, dict[str, Any]]:
    """The exit status and the JSON of a run."""
    run = subprocess.run(
        [*RSPLICE, "verify", "--json", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        timeout=60,
    )
    assert run.stderr == b"", run.stderr
    data: dict[str, Any] = json.loads(run.stdout)
    assert data["exit_status"] == run.returncode
    return run.returncode, data


def filesystem_at(kind: str, path: Path) -> Filesystem:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[4] == str(path):
            loop = Path(right.split()[1]).name
            image = Path(f"/sys/block/{loop}/loop/backing_file").read_text().rstrip("\n")
            return Filesystem(kind, path, Path(image))
    raise AssertionError(f"{path} is not mounted")


@pytest.fixture(params=KINDS)
def filesystem(request: pytest.FixtureRequest) -> Filesystem:
    return filesystem_at(request.param, request.getfixturevalue(request.param))


@pytest.fixture(params=["xfs", "btrfs"])
def reflinking(request: pytest.FixtureRequest) -> Filesystem:
    return filesystem_at(request.param, request.getfixturevalue(request.param))


@pytest.fixture
def on_ext4(ext4: Path) -> Filesystem:
    return filesystem_at("ext4", ext4)


# A page that differs.


@pytest.mark.parametrize("offset", [0, 5 * PAGE + 123, (PAGES - 1) * PAGE + 200])
def test_a_block_that_was_changed_below_a_page(filesystem: Filesystem, offset: int) -> None:
    file = filesystem.file("changed", PAGES * PAGE - 3000)
    data = file.read_bytes()
    with cached(file) as (memory,):
        with filesystem.changed(file, offset):
            status, found = verify(file)
            assert status == 1
            assert found["totals"]["differing_pages"] == 1
            assert found["totals"]["same_pages"] == PAGES - 1
            (page,) = found["files"][0]["differing"]
            assert page["offset"] == offset // PAGE * PAGE
            first = page["first_difference"]
            assert offset <= first < offset + len(CHANGED)
            assert bytes.fromhex(page["cached"]) == data[first : first + 16]
            assert bytes.fromhex(page["disk"]).startswith(CHANGED[first - offset :])
            assert [f["kind"] for f in found["findings"]] == ["violation"]
            # It is all still there: nothing was evicted, and the next reader gets what it got.
            assert memory[:] == data
            assert len(resident(file)) == PAGES
        assert verify(file)[0] == 0


def test_the_page_frame_is_that_of_the_page(on_ext4: Filesystem) -> None:
    file = on_ext4.file("framed")
    with cached(file) as (memory,), on_ext4.changed(file, 3 * PAGE):
        status, found = verify(file)
        assert status == 1
        assert found["files"][0]["differing"][0]["page_frame"] == frame_of(memory, 3 * PAGE)


def test_the_report_is_for_people(on_ext4: Filesystem) -> None:
    file = on_ext4.file("bad \x1b[31m\n name")
    with cached(file), on_ext4.changed(file, 3 * PAGE):
        command = [*RSPLICE, "verify", "-v", str(file)]
        run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "")
    assert "violation: cache-differs-from-disk, 1 page\n" in run.stdout
    assert r"bad \x1b[31m\x0a name" in run.stdout
    assert run.stdout.replace("\n", "").isprintable()


def test_both_files_that_share_a_block(reflinking: Filesystem, needs: Callable[..., None]) -> None:
    needs("cp")
    first = reflinking.file("first")
    second = reflinking.path / "second"
    reflinking.file("second")  # without checksums where the first has none
    subprocess.run(["cp", "--reflink=always", first, second], check=True)
    sync(second)
    with cached(first, second):
        status, found = verify(first, second)
        assert (status, found["totals"]["same_pages"]) == (0, 2 * PAGES)
        with reflinking.changed(first, 2 * PAGE):
            status, found = verify(first, second)
        assert status == 1
        assert [len(f["differing"]) for f in found["files"]] == [1, 1]


def test_the_lower_file_of_an_overlay(on_ext4: Filesystem, tmp_path: Path) -> None:
    if "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no overlayfs")
    for name in ("lower", "upper", "work", "merged"):
        (on_ext4.path / name).mkdir(exist_ok=True)
    file = on_ext4.file("lower/file")
    options = ",".join(f"{n}dir={on_ext4.path}/{n}" for n in ("lower", "upper", "work"))
    merged = on_ext4.path / "merged"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
    try:
        shown = merged / "file"
        with cached(shown):
            status, found = verify(shown)
            assert (status, found["totals"]["same_pages"]) == (0, PAGES)
            with on_ext4.changed(file, PAGE):
                assert verify(shown)[0] == 1
    finally:
        subprocess.run(["umount", "--lazy", merged], check=True)


# Twins that stay silent.


def test_a_file_that_nobody_changed(filesystem: Filesystem) -> None:
    file = filesystem.file("unchanged", PAGES * PAGE + 1)
    with cached(file):
        status, found = verify(file)
    assert status == 0
    assert found["totals"]["compared_pages"] == found["totals"]["same_pages"] == PAGES + 1
    assert found["findings"] == []


def test_a_page_that_is_not_cached(filesystem: Filesystem) -> None:
    """It is not read either: what was not cached before is not cached after."""
    file = filesystem.file("partly")
    for _ in range(5):
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            memory = mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        memory.madvise(mmap.MADV_RANDOM)
        memory[3 * PAGE], memory[9 * PAGE]
        before = resident(file)
        status, found = verify(file)
        after = resident(file)
        memory.close()
        assert status == 0
        if len(before) < PAGES:
            break
    assert before == after
    assert {3, 9} <= set(before) and len(before) < PAGES
    assert found["totals"]["compared_pages"] == len(before)


def test_a_dirty_page_is_left_dirty(filesystem: Filesystem) -> None:
    """Its block is as it was. Somebody else's sync(2) may spoil a round of this."""
    for number in range(5):
        file = filesystem.file(f"dirty-{number}")
        before = file.read_bytes()[7 * PAGE : 8 * PAGE]
        poke(file, 7 * PAGE, os.urandom(PAGE))
        with cached(file):
            status, found = verify(file)
        left = before in filesystem.image.read_bytes()
        assert status == 0
        totals = found["totals"]
        assert totals["same_pages"] + totals["busy_pages"] == PAGES
        if totals["busy_pages"] and left:
            return
    pytest.fail("each time the page was written out")


def test_a_large_sparse_file_takes_little_time(on_ext4: Filesystem) -> None:
    file = on_ext4.path / "sparse"
    with file.open("wb") as f:
        os.truncate(file, 1 << 36)
        os.pwrite(f.fileno(), os.urandom(PAGE), 1 << 35)
    sync(file)
    with file.open("rb") as f:
        memory = mmap.mmap(f.fileno(), PAGE, mmap.MAP_SHARED, mmap.PROT_READ, offset=1 << 35)
    memory[0]
    begun = time.monotonic()
    status, found = verify(file)
    assert time.monotonic() - begun < 10
    assert status == 0 and found["totals"]["same_pages"] >= 1
    memory.close()


@pytest.mark.parametrize("made", ["hole", "unwritten"])
def test_where_nothing_was_written(filesystem: Filesystem, made: str) -> None:
    file = filesystem.path / made
    with file.open("wb") as f:
        f.write(os.urandom(2 * PAGE))
        if made == "hole":
            os.truncate(file, PAGES * PAGE)
        else:
            os.posix_fallocate(f.fileno(), 0, PAGES * PAGE)
        f.seek((PAGES - 4) * PAGE)
        f.write(os.urandom(PAGE))
    sync(file)
    with cached(file):
        status, found = verify(file)
    assert (status, found["totals"]["same_pages"]) == (0, PAGES)


def test_a_small_file(filesystem: Filesystem) -> None:
    """On btrfs its bytes lie among the metadata: it is not checked, and that is said."""
    file = filesystem.path / "small"
    write(file, os.urandom(300))
    with cached(file):
        status, found = verify(file)
    if filesystem.kind == "btrfs":
        assert status == 2
        assert "inline" in found["files"][0]["unchecked"][0]["reason"]
    else:
        assert (status, found["totals"]["same_pages"]) == (0, 1)


def test_compressed_extents(btrfs: Path, needs: Callable[..., None]) -> None:
    needs("btrfs")
    file = btrfs / "compressed"
    file.unlink(missing_ok=True)
    file.touch()
    subprocess.run(["btrfs", "property", "set", file, "compression", "zlib"], check=True)
    poke(file, 0, b"easily compressed " * 9000)
    sync(file)
    with cached(file):
        status, found = verify(file)
    assert status == 2
    assert found["findings"] == []
    (unchecked,) = found["files"][0]["unchecked"]
    assert "compressed" in unchecked["reason"]
    assert unchecked["pages"] == -(-18 * 9000 // PAGE)


def _write(fd: int, number: int) -> None:
    os.pwrite(fd, os.urandom(3000), number * 7919 % (PAGES * PAGE))
    if number % 5 == 0:
        os.fsync(fd)


def _map(fd: int, number: int) -> None:
    with mmap.mmap(fd, PAGES * PAGE) as memory:
        for page in range(0, PAGES, 3):
            memory[page * PAGE + number % PAGE] = number % 256
        if number % 3 == 0:
            memory.flush()


def _direct(fd: int, number: int) -> None:
    direct = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4 * PAGE) as memory:
        memory[:] = os.urandom(4 * PAGE)
        os.pwritev(direct, [memory], number % (PAGES // 4) * 4 * PAGE)
    os.close(direct)
    os.pread(fd, PAGES * PAGE, 0)


def _truncate(fd: int, number: int) -> None:
    os.ftruncate(fd, number * 7919 % (PAGES * PAGE))
    os.pwrite(fd, os.urandom(PAGES * PAGE), 0)
    if number % 3 == 0:
        os.fsync(fd)


def _punch(fd: int, number: int) -> None:
    at, length = number % PAGES * PAGE, 2 * PAGE
    _libc.fallocate(fd, 1 | 2, ctypes.c_long(at), ctypes.c_long(length))
    os.pread(fd, PAGES * PAGE, 0)
    if number % 2:
        os.pwrite(fd, os.urandom(length), at)
        os.fsync(fd)


@contextmanager
def _busy(file: Path, change: Callable[[int, int], None]) -> Iterator[None]:
    """*file* is changed all the time."""
    ended = threading.Event()
    fd = os.open(file, os.O_RDWR)

    def work() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            change(fd, number)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        ended.set()
        worker.join()
        os.close(fd)


@pytest.mark.parametrize("change", [_write, _map, _direct, _truncate, _punch])
def test_a_file_that_is_being_changed(
    filesystem: Filesystem, change: Callable[[int, int], None]
) -> None:
    file = filesystem.file("busy")
    with _busy(file, change):
        until = time.monotonic() + 2
        while time.monotonic() < until:
            status, found = verify(file)
            assert found["findings"] == []
            assert status == 0, found["files"][0]["unchecked"]


def _append(fd: int, number: int) -> None:
    os.pwrite(fd, os.urandom(100), PAGES * PAGE + number * 100 % (PAGES * PAGE))
    os.fsync(fd)


def test_a_page_that_differs_in_a_file_that_is_being_written(filesystem: Filesystem) -> None:
    file = filesystem.file("log")
    with cached(file), filesystem.changed(file, 2 * PAGE), _busy(file, _append):
        # Its folio may be that of pages that are being written, now and then.
        assert 1 in {verify(file)[0] for _ in range(3)}


def test_looking_leaves_no_trace_in_the_file(on_ext4: Filesystem) -> None:
    file = on_ext4.file("traceless")
    os.utime(file, (1, 1))  # older than the last change: reading it would move it
    with cached(file):
        os.utime(file, (1, 1))
        before = file.stat()
        assert verify(file)[0] == 0
        assert file.stat() == before


# What cannot be checked.


def test_a_file_without_a_disk() -> None:
    file = Path("/dev/shm/rsplice-verify-test")
    file.write_bytes(b"x" * 9000)
    try:
        with cached(file):
            status, found = verify(file)
    finally:
        file.unlink()
    assert status == 2
    assert found["files"][0]["unchecked"][0]["reason"] == "tmpfs has no disk below it"


def test_a_block_with_a_wrong_checksum_is_not_checked(btrfs: Path) -> None:
    filesystem = filesystem_at("btrfs", btrfs)
    file = filesystem.path / "checksums"
    write(file, os.urandom(PAGES * PAGE))
    with cached(file):
        assert verify(file)[0] == 0
        with filesystem.changed(file, 4 * PAGE):
            status, found = verify(file)
    assert (status, found["totals"]["same_pages"]) == (2, PAGES - 1)
    (unchecked,) = found["files"][0]["unchecked"]
    assert unchecked == {"reason": "the disk cannot be read, or a checksum is wrong", "pages": 1}


def test_journalled_data_has_no_way_around_the_cache(tmp_path: Path) -> None:
    """ext4 then takes O_DIRECT for a hint, and answers from the cache: that proves nothing."""
    if why := missing("ext4"):
        pytest.skip(why)
    image, point = tmp_path / "image", tmp_path / "mnt"
    point.mkdir()
    image.touch()
    os.truncate(image, 64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop,data=journal", image, point], check=True)
    try:
        file = point / "file"
        write(file, os.urandom(PAGES * PAGE))
        with cached(file):
            status, found = verify(file)
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)
    assert (status, found["totals"]["compared_pages"]) == (2, 0)
    assert "from the page cache" in found["files"][0]["unchecked"][0]["reason"]


# The files of a process, and those that give privileges.


@contextmanager
def _mapping_process(*files: Path) -> Iterator[int]:
    """A process that has mapped *files*, whose names are gone, and a memfd."""
    code = (
        "import mmap, os, sys\n"
        "files = [os.open(name, os.O_RDONLY) for name in sys.argv[1:]]\n"
        "memory = os.memfd_create('memory')\n"
        "os.ftruncate(memory, 4096)\n"
        "maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in [*files, memory]]\n"
        "[sum(m[::4096]) for m in maps]\n"
        "[os.unlink(name) for name in sys.argv[1:]]\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_the_mapped_files_of_a_process(on_ext4: Filesystem) -> None:
    file = on_ext4.file("mapped")
    data = file.read_bytes()
    at = on_ext4.find(data[PAGE : 2 * PAGE])
    with _mapping_process(file) as pid:
        status, found = verify("--mapped", str(pid))
        assert status == 0, [f for f in found["files"] if f["unchecked"]]
        names = [f["file"] for f in found["files"]]
        assert f"{file} (deleted)" in names
        assert os.path.realpath(sys.executable) in names
        assert any(name.startswith("/memfd:memory") for name in names)
        poke(on_ext4.image, at, CHANGED)
        status, found = verify("--mapped", str(pid))
    assert status == 1
    (first,) = [f["first"] for f in found["findings"]]
    assert (first["pid"], first["file"]) == (pid, f"{file} (deleted)")
    assert first["comm"].startswith("python")


def test_what_gives_privileges(tmp_path: Path) -> None:
    status, found = verify("--setuid")
    assert status in (0, 2)
    assert found["findings"] == []
    names = [f["file"] for f in found["files"]]
    privileged = [p for p in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount") if _setuid(p)]
    assert set(privileged) <= set(names)
    assert not any(name.startswith(("/proc/", "/sys/", "/dev/")) for name in names)


def _setuid(path: str) -> bool:
    with suppress(OSError):
        return bool(os.stat(path).st_mode & 0o6000) and not os.path.islink(path)
    return False
