# SPDX-License-Identifier: MIT
"""recvpage: what readers get is what the server has, or EIO; whatever the server does."""

from __future__ import annotations

import errno
import importlib.util
import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rsplice.errors import RspliceError
from rsplice.workloads.mounts import is_mounted
from rsplice.workloads.recvpage import SETTLED_S, Fault, Options, Stage, stage
from tests.support.attached import descendants_of
from tests.support.run import environment

#: Around the sizes of a page, of the largest READ, and of a pipe.
SIZES = (0, 1, 4095, 4096, 4097, (1 << 17) - 1, 1 << 17, (1 << 19) + 1, (1 << 20) + 101)
BIG = (1 << 20) + 101
FAST = Options(timeout=0.6, retries=2, max_read=1 << 17)

#: Those after which the server's answer is asked for again, over another connection.
RETRIED = (
    *("cut", "short_length", "long_length", "wrong_size", "wrong_id", "wrong_file"),
    *("wrong_offset", "wrong_status", "wrong_magic"),
)
#: Those that only the time limit ends.
LATE = ("stall", "drip")

both_modes = pytest.mark.parametrize("copy", [False, True], ids=["rsplice", "copy"])


def faults(*kinds: str, copy: tuple[str, ...]) -> pytest.MarkDecorator:
    """Headers are checked in one place for both modes; payload is taken in two."""
    cases = [(kind, False) for kind in kinds] + [(kind, True) for kind in copy]
    return pytest.mark.parametrize(
        ("kind", "copy"),
        cases,
        ids=[f"{kind}-{'copy' if copy else 'rsplice'}" for kind, copy in cases],
    )


@pytest.fixture(autouse=True)
def _fuse() -> None:
    if not importlib.util.find_spec("rsplice._fuse"):
        pytest.skip("rsplice was built without libfuse3")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """No process, mount or descriptor outlives a test."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not [pid for pid in descendants_of(os.getpid()) if _name(pid).startswith("rsplice-")]
    assert set(os.listdir("/proc/self/fd")) == before


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def process(name: str) -> int:
    """The one of our processes that is called that."""
    ours = f"PPid:\t{os.getpid()}\n"
    (pid,) = [
        pid
        for pid in descendants_of(os.getpid())
        if _name(pid) == name and ours in Path(f"/proc/{pid}/status").read_text()
    ]
    return pid


@contextmanager
def served(
    tmp_path: Path, files: dict[str, bytes], options: Options = FAST, fault: Fault | None = None
) -> Iterator[Stage]:
    """A mounted stage with *files*, which have a version already."""
    with stage(tmp_path, options) as made:
        for name, content in files.items():
            (made.source / name).write_bytes(content)
        time.sleep(SETTLED_S)
        made.start_server(fault)
        made.mount()
        yield made


def drop(path: Path) -> None:
    """Drops the clean pages of a file."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_or_eio(path: Path, expected: bytes) -> bool:
    """Reads a file to its end; whether all of it came. What came has to be right."""
    done = 0
    with open(path, "rb", buffering=0) as file:
        while True:
            try:
                data = file.read(50_000)
            except OSError as error:
                assert error.errno == errno.EIO
                return False
            assert data == expected[done : done + len(data)], f"wrong bytes near {done}"
            if not data:
                assert done == len(expected)
                return True
            done += len(data)


@both_modes
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_files_are_identical_to_concurrent_readers(tmp_path: Path, copy: bool, unix: bool) -> None:
    """Whole, at random places and through mappings, with their pages dropped meanwhile."""
    files = {f"f{size}": os.urandom(size) for size in SIZES}
    options = Options(copy=copy, unix=unix, threads=3)

    def read(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(12):
            name = choose.choice(list(files))
            path, content = made.mountpoint / name, files[name]
            assert path.stat().st_size == len(content)
            with open(path, "rb", buffering=0) as file:
                for _ in range(6):
                    offset = choose.randrange(len(content) + 2)
                    size = choose.choice((1, 4096, 70_000))
                    data = os.pread(file.fileno(), size, offset)
                    assert data == content[offset : offset + size]
                if content:
                    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
                        assert mapping[:] == content
                assert file.read() == content
            drop(path)

    with served(tmp_path, files, options) as made:
        assert set(os.listdir(made.mountpoint)) == set(files)
        with ThreadPoolExecutor(5) as readers:
            list(readers.map(read, range(5)))
        calls = made.finish()
    reported = calls.reported
    assert reported["fuse_errors"] == reported["fuse_retries"] == reported["fuse_gone"] == 0
    payload = reported["fuse_payload"]
    assert payload == sum(c[1] for key, c in calls.counts.items() if key[0] == "sendfile") > 0
    assert reported["fuse_copy_bytes"] == payload * (2 if copy else 1)
    assert reported["fuse_copied"] == (0 if copy else payload)


@faults(*RETRIED, copy=("cut",))
def test_a_wrong_answer_is_asked_for_again(tmp_path: Path, kind: str, copy: bool) -> None:
    """Two in a row, after one that was right: the bytes are, and the kernel sees no error."""
    content = os.urandom(BIG)
    options = Options(copy, timeout=10, retries=2, max_read=1 << 17)
    fault = Fault(kind, after=70_001, skip=1, count=2)
    with served(tmp_path, {"f": content}, options, fault) as made:
        assert read_or_eio(made.mountpoint / "f", content)
        made.finish()
        assert (made.served.faults, made.counts.retries, made.counts.errors) == (2, 2, 0)
        assert made.counts.payload == len(content)


@faults(*RETRIED, *LATE, copy=("cut", *LATE))
def test_wrong_answers_end_in_eio(tmp_path: Path, kind: str, copy: bool) -> None:
    content = os.urandom(BIG)
    options = Options(copy, timeout=0.3 if kind in LATE else 5, retries=1, max_read=1 << 17)
    with served(tmp_path, {"f": content}, options, Fault(kind, after=101, skip=1)) as made:
        start = time.monotonic()
        assert not read_or_eio(made.mountpoint / "f", content)
        assert time.monotonic() - start < 4
        made.finish()
        counts = made.counts
        assert counts.errors > 0
        # The kernel asks again, for the page that a program waits for.
        assert (counts.timeouts, counts.retries) == (
            (counts.errors, 0) if kind in LATE else (0, counts.errors)
        )


def test_bytes_behind_an_answer_are_no_answer(tmp_path: Path) -> None:
    content = os.urandom(BIG)
    with served(tmp_path, {"f": content}, FAST, Fault("trailing")) as made:
        assert read_or_eio(made.mountpoint / "f", content)
        made.finish()
        assert made.counts.connections > 8, "each READ spoils its connection"


@both_modes
def test_a_server_that_dies_is_missed_until_another_one_comes(tmp_path: Path, copy: bool) -> None:
    content = os.urandom(BIG)
    options = Options(copy, timeout=2, retries=2, max_read=1 << 17)
    with served(tmp_path, {"f": content}, options, Fault("die", after=4097)) as made:
        assert not read_or_eio(made.mountpoint / "f", content)
        with pytest.raises(RspliceError, match="rsplice-server"):
            made.poll()
        with pytest.raises(OSError, match="Input/output error"):
            os.stat(made.mountpoint / "f")
        made.start_server()
        assert read_or_eio(made.mountpoint / "f", content)
        made.finish()


def test_a_server_that_comes_back_in_time_is_not_missed(tmp_path: Path) -> None:
    """Readers see no error: their requests are repeated until it is there."""
    content = os.urandom(BIG)
    options = Options(timeout=10, retries=8, max_read=1 << 17)
    path = tmp_path / "mnt" / "f"

    def read() -> bool:
        fine = read_or_eio(path, content)
        drop(path)
        return fine

    with served(tmp_path, {"f": content}, options) as made, ThreadPoolExecutor(1) as readers:
        for _ in range(3):
            assert read()
            # The connections that lie idle are of its life.
            os.kill(process("rsplice-server"), signal.SIGKILL)
            reading = readers.submit(read)
            time.sleep(0.1)
            with pytest.raises(RspliceError, match="rsplice-server"):
                made.poll()
            made.start_server()
            assert reading.result()
        made.finish()
        assert made.counts.errors == 0


def test_a_fault_at_any_byte_gives_no_wrong_byte(tmp_path: Path) -> None:
    content = os.urandom(3 * 4096 + 5)
    places = (0, 1, 4096, len(content) - 1)
    for number, after in enumerate(places):
        directory = tmp_path / str(number)
        directory.mkdir()
        fault = Fault("cut", after=after, count=2)
        with served(directory, {"f": content}, FAST, fault) as made:
            assert read_or_eio(made.mountpoint / "f", content)
            made.finish()


def test_an_unchanged_file_keeps_its_pages(tmp_path: Path) -> None:
    content = os.urandom(BIG)
    with served(tmp_path, {"f": content}) as made:
        for _ in range(4):
            assert (made.mountpoint / "f").read_bytes() == content
        made.finish()
        assert made.counts.payload == len(content)
        assert made.counts.kept == 3


def _overwrite(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, len(content))
    os.close(fd)


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name("new")
    new.write_bytes(content)
    new.rename(path)


@pytest.mark.parametrize("change", [_overwrite, _replace])
@pytest.mark.parametrize("pause", [0.0, SETTLED_S], ids=["at-once", "settled"])
def test_open_shows_what_was_written_before(
    tmp_path: Path, change: Callable[[Path, bytes], None], pause: float
) -> None:
    """Of the same size, longer and shorter; however soon after the change before."""
    with served(tmp_path, {"f": b"first"}) as made:
        for number in range(8 if pause else 60):
            size = (70_000, 70_000, 70_001, 4096, 9)[number % 5]
            content = bytes([number + 1]) * size
            change(made.source / "f", content)
            time.sleep(pause)
            assert (made.mountpoint / "f").read_bytes() == content
            assert (made.mountpoint / "f").read_bytes() == content
        made.finish()


def test_an_open_file_is_not_stale_for_long(tmp_path: Path) -> None:
    """An answer with another version has the pages of the one before dropped."""
    old, new = (bytes([value]) * (8 << 20) for value in (1, 2))
    with served(tmp_path, {"f": old}) as made:
        with open(made.mountpoint / "f", "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, 0) == old[:4096]
            _overwrite(made.source / "f", new)
            time.sleep(SETTLED_S)
            assert os.pread(file.fileno(), 4096, 4 << 20) == new[:4096]
            until = time.monotonic() + 5
            while os.pread(file.fileno(), 4096, 0) != new[:4096]:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert made.counts.invalidations == 1
        made.finish()


def test_no_open_is_older_than_a_finished_write(tmp_path: Path) -> None:
    """Readers that share the page cache, while the file is written over and over."""
    blocks, size = 40, 4096
    finished = 0
    stop = threading.Event()

    def write() -> None:
        nonlocal finished
        fd = os.open(made.source / "f", os.O_WRONLY)
        pauses = random.Random(1)
        for version in range(1, 10_000):
            os.pwrite(fd, struct.pack("Q", version) * (blocks * size // 8), 0)
            finished = version
            if stop.wait(pauses.choice((0, 0.003, SETTLED_S))):
                break
        os.close(fd)

    def read(_: int) -> int:
        opens = 0
        while not stop.is_set():
            oldest = finished
            with open(made.mountpoint / "f", "rb", buffering=0) as file:
                data = file.read(blocks * size)
            found = min(struct.unpack_from("Q", data, block * size)[0] for block in range(blocks))
            assert found >= oldest, "a page of a version that had been written over"
            opens += 1
        return opens

    options = Options(threads=4)
    with served(tmp_path, {"f": bytes(blocks * size)}, options) as made:
        with ThreadPoolExecutor(5) as pool:
            readers = pool.map(read, range(4))
            writer = pool.submit(write)
            time.sleep(2.5)
            stop.set()
            writer.result()
            assert min(readers) > 10
        assert made.counts.kept > 0 and finished > 10
        made.finish()


def test_no_open_is_older_than_another_beside_it(tmp_path: Path) -> None:
    """While the kernel drops a large file's old pages for one open, the last for a second one."""
    size, page = 48 << 20, 4096
    opened = threading.Barrier(4)

    def last_page(delay: int) -> bytes:
        opened.wait()
        time.sleep(delay * 0.0005)
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), page, size - page)

    with served(tmp_path, {"f": bytes(size)}, Options(threads=4)) as made:
        path = made.mountpoint / "f"
        with ThreadPoolExecutor(4) as readers:
            for number in range(1, 13):
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass
                content = bytes([number]) * page
                fd = os.open(made.source / "f", os.O_WRONLY)
                os.pwrite(fd, content, size - page)
                os.close(fd)
                time.sleep(SETTLED_S)
                assert list(readers.map(last_page, range(4))) == [content] * 4
        made.finish()


def test_faults_leak_nothing(tmp_path: Path) -> None:
    """Descriptors of the filesystem, over many connections that are thrown away."""
    content = os.urandom(1 << 16)

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{process('rsplice-recvpg')}/fd"))

    with served(tmp_path, {"f": content}, FAST, Fault("cut", after=5000, count=300)) as made:
        path = made.mountpoint / "f"
        for _ in range(20):
            read_or_eio(path, content)
        before = descriptors()
        while made.served.faults < 300:
            read_or_eio(path, content)
            drop(path)
        # Connections and pipes come and go.
        assert descriptors() < before + 20
        assert read_or_eio(path, content)
        made.finish()


def test_readers_do_not_hang_when_the_filesystem_is_told_to_end(tmp_path: Path) -> None:
    content = os.urandom(BIG)
    options = Options(timeout=60, max_read=1 << 17)
    with (
        served(tmp_path, {"f": content}, options, Fault("stall")) as made,
        ThreadPoolExecutor(1) as reader,
    ):
        reading = reader.submit(read_or_eio, made.mountpoint / "f", content)
        while not made.served.faults:
            time.sleep(0.01)
        start = time.monotonic()
        os.kill(process("rsplice-recvpg"), signal.SIGTERM)
        with suppress(OSError):
            assert not reading.result()
        assert time.monotonic() - start < 5


def test_a_killed_filesystem_leaves_no_mount(tmp_path: Path) -> None:
    with served(tmp_path, {"f": b"content"}) as made:
        assert (made.mountpoint / "f").read_bytes() == b"content"
        assert is_mounted(made.mountpoint)
        os.kill(process("rsplice-recvpg"), signal.SIGKILL)
        until = time.monotonic() + 5
        while is_mounted(made.mountpoint):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_the_files_are_read_only(tmp_path: Path) -> None:
    with served(tmp_path, {"f": b"content"}) as made:
        for write in (
            lambda: os.open(made.mountpoint / "f", os.O_RDWR),
            lambda: os.open(made.mountpoint / "new", os.O_WRONLY | os.O_CREAT),
            lambda: os.unlink(made.mountpoint / "f"),
        ):
            with pytest.raises(OSError, match="Read-only"):
                write()
        with pytest.raises(FileNotFoundError):
            os.stat(made.mountpoint / "none")
        (made.source / "f").unlink()
        with pytest.raises(FileNotFoundError):
            os.stat(made.mountpoint / "f")
        made.finish()


REQUEST, ANSWER, MAGIC = struct.Struct(">IIQQQII"), struct.Struct(">IIQQQQQQII"), 0x72737031
INVALID, NO_FILE = 2, 1


def ask(made: Stage, *fields: int, name: bytes = b"") -> tuple[int, ...]:
    """The server's answer to a request; () if it hangs up instead."""
    with socket.create_connection(("127.0.0.1", made.port), timeout=5) as connection:
        connection.sendall(REQUEST.pack(*fields) + name)
        data = connection.recv(ANSWER.size, socket.MSG_WAITALL)
    return ANSWER.unpack(data) if data else ()


def test_the_server_refuses_what_is_no_request(tmp_path: Path) -> None:
    with served(tmp_path, {"f": b"content"}) as made:
        found = ask(made, MAGIC, 1, 7, 0, 0, 0, 1, name=b"f")
        assert (found[1], found[2], found[5]) == (0, 7, 7)
        file = found[3]
        assert not ask(made, MAGIC + 1, 2, 7, file, 0, 0, 0)
        assert not ask(made, MAGIC, 1, 7, 0, 0, 0, 1 << 20), "the name is too long"
        for request, status in (
            ((9, 7, file, 0, 0, 0), INVALID),
            ((4, 7, file, 0, 1 << 31, 0), INVALID),
            ((4, 7, file, 1 << 63, 5, 0), INVALID),
            ((4, 7, file, (1 << 64) - 1, 5, 0), INVALID),
            ((4, 7, file + 1, 0, 5, 0), NO_FILE),
        ):
            answer = ask(made, MAGIC, *request)
            assert (answer[1], answer[8]) == (status, 0)
        for name in (b"../mnt", b".", b"..", b""):
            assert ask(made, MAGIC, 1, 7, 0, 0, 0, len(name), name=name)[1] == NO_FILE
        assert (made.mountpoint / "f").read_bytes() == b"content"
        made.finish()


def test_a_version_is_told_only_of_what_has_settled(tmp_path: Path) -> None:
    """Two changes within one tick of a slow clock would look the same."""
    with served(tmp_path, {"f": b"content"}) as made:

        def version() -> int:
            return ask(made, MAGIC, 1, 7, 0, 0, 0, 1, name=b"f")[6]

        settled = version()
        assert settled == version() != 0
        _overwrite(made.source / "f", b"CONTENT")
        assert version() == 0
        time.sleep(SETTLED_S)
        assert version() not in (0, settled)
        made.finish()


def test_more_files_than_one_answer_lists(tmp_path: Path) -> None:
    names = {f"{number:03}-" + "n" * 240 for number in range(300)}
    with served(tmp_path, dict.fromkeys(names, b"")) as made:
        assert set(os.listdir(made.mountpoint)) == names
        made.finish()


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "rsplice", "workload", "recvpage", *args]


def env(tmp_path: Path) -> dict[str, str]:
    return {**environment(), "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("mode", ["rsplice", "copy", "rsplice-unix", "copy-unix"])
def test_the_workload_says_what_it_did(tmp_path: Path, mode: str) -> None:
    args = ("--mode", mode, "--size", "70001", "--count", "23", "--threads", "3", "--json")
    done = subprocess.run(command(*args), env=env(tmp_path), capture_output=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    reported = said["reported"]
    carried = {call["via"]: call["bytes"] for call in said["calls"]}
    kind = "unix" if mode.endswith("unix") else "tcp"
    assert carried["readv"] == 23 * 70001
    assert carried["sendfile"] == reported["fuse_payload"] >= 23 * 70001
    assert carried["recvfrom"] - carried["sendto"] == (
        reported["fuse_payload"] if mode.startswith("copy") else 0
    )
    assert {c["destination"] for c in said["calls"] if c["via"] == "sendto"} == {kind}
    copies = 2 if mode.startswith("copy") else 1
    assert reported["fuse_copy_bytes"] == copies * reported["fuse_payload"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    running = subprocess.Popen(
        command("--seconds", "60", "--threads", "2"),
        env=env(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    until = time.monotonic() + 20
    while not [pid for pid in descendants_of(running.pid) if _name(pid) == "rsplice-reader"]:
        assert time.monotonic() < until, "no reader was started"
        time.sleep(0.05)
    os.killpg(running.pid, number)
    out, err = running.communicate(timeout=20)
    assert running.returncode == 128 + number
    assert (out, err) == (b"", b"")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
