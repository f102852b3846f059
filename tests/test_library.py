# SPDX-License-Identifier: MIT
"""librsplice keeps its word: each C program of tests/c, and what the Python binding adds."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rsplice import library
from tests.support.c_tests import Programs, programs, reserved_huge_pages

PATTERN = bytes(range(251)) * 400


@pytest.fixture(scope="module")
def c_tests(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return programs(tmp_path_factory)


@pytest.fixture(scope="module")
def huge_pages() -> Iterator[None]:
    with reserved_huge_pages():
        yield


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """A file that holds PATTERN."""
    path = tmp_path / "source"
    path.write_bytes(PATTERN)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "name", ["transfer", "errors", "carry", "threads", "inherit", "poison", "stable", "identity"]
)
def test_program(name: str, c_tests: Programs, tmp_path: Path, huge_pages: None) -> None:
    c_tests.run(name, tmp_path)


class TestBinding:
    def test_bytes_counts_and_positions(self, source: int, pipe: tuple[int, int]) -> None:
        result = library.Result()
        assert library.rsplice(source, pipe[1], 1000, result=result) == 1000
        assert os.read(pipe[0], 2000) == PATTERN[:1000]
        assert os.lseek(source, 0, os.SEEK_CUR) == 1000
        counts = result.moved + result.shared + result.direct + result.copied + result.unknown
        assert counts == 1000
        assert library.rsplice(source, pipe[1], 100, offset_in=511) == 100
        assert os.read(pipe[0], 2000) == PATTERN[511:611]
        assert os.lseek(source, 0, os.SEEK_CUR) == 1000

    def test_end_of_file_is_0(self, source: int, pipe: tuple[int, int]) -> None:
        assert library.rsplice(source, pipe[1], 10, offset_in=len(PATTERN)) == 0
        assert library.rsplice(source, pipe[1], 10, offset_in=1 << 40) == 0

    def test_a_file_in_memory(self, source: int) -> None:
        memory = os.memfd_create("memory")
        result = library.Result()
        done = library.rsplice(source, memory, 1 << 20, 0, 100, result=result)
        assert done == len(PATTERN)
        assert os.pread(memory, 1 << 20, 0) == bytes(100) + PATTERN
        assert os.lseek(memory, 0, os.SEEK_CUR) == 0
        assert result.reasons == [library_why(result.why & -result.why)] or result.why == 0
        os.close(memory)

    def test_what_has_a_descriptor_will_do(self, source: int) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, os.fdopen(os.dup(source), "rb") as file:
            assert library.rsplice(file, ours, 5000, offset_in=0) == 5000
            assert theirs.recv(5000, socket.MSG_WAITALL) == PATTERN[:5000]

    @pytest.mark.parametrize(
        ("number", "arguments"),
        [
            (errno.EBADF, {"fd_in": -1}),
            (errno.EBADF, {"fd_out": 1 << 20}),
            (errno.EINVAL, {"flags": 1 << 30}),
            (errno.ESPIPE, {"offset_out": 0}),
        ],
    )
    def test_errno(
        self, number: int, arguments: dict[str, int], source: int, pipe: tuple[int, int]
    ) -> None:
        every: dict[str, Any] = {"fd_in": source, "fd_out": pipe[1], "length": 10, **arguments}
        result = library.Result()
        with pytest.raises(OSError) as raised:
            library.rsplice(**every, result=result)
        assert raised.value.errno == number
        assert raised.value.strerror == os.strerror(number)
        assert repr(result) == "Result()"

    def test_subclasses_of_oserror(self, source: int, pipe: tuple[int, int]) -> None:
        reader, writer = os.pipe()
        with pytest.raises(BlockingIOError):
            library.rsplice(pipe[0], writer, 1, flags=library.F_NONBLOCK)
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            library.rsplice(source, writer, 1)
        os.close(writer)

    @pytest.mark.parametrize("name", ["length", "offset_in", "offset_out"])
    def test_below_0(self, name: str, source: int, pipe: tuple[int, int]) -> None:
        every: dict[str, Any] = {"fd_in": source, "fd_out": pipe[1], "length": 1, name: -1}
        with pytest.raises(ValueError, match=name):
            library.rsplice(**every)

    def test_carried_over(self, pipe: tuple[int, int]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            os.set_blocking(pipe[1], False)
            while True:
                try:
                    os.write(pipe[1], bytes(4096))
                except BlockingIOError:
                    break
            theirs.send(b"carried")
            with pytest.raises(BlockingIOError):
                library.rsplice(ours, pipe[1], 100)
            assert library.pending(ours) == 7
            os.read(pipe[0], 1 << 20)
            assert library.rsplice(ours, pipe[1], 100) == 7
            assert os.read(pipe[0], 100) == b"carried"
            assert library.pending(ours) == 0
            library.discard(ours)

    def test_other_threads_run_meanwhile(self, pipe: tuple[int, int]) -> None:
        memory = os.memfd_create("memory")
        waiting = threading.Thread(target=library.rsplice, args=(pipe[0], memory, 5))
        waiting.start()
        time.sleep(0.05)
        assert waiting.is_alive()
        os.write(pipe[1], b"hello")
        waiting.join(10)
        assert not waiting.is_alive()
        assert os.pread(memory, 10, 0) == b"hello"
        os.close(memory)

    def test_keyboard_interrupt(self, pipe: tuple[int, int]) -> None:
        memory = os.memfd_create("memory")
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            library.rsplice(pipe[0], memory, 1)
        timer.join()
        os.close(memory)

    def test_a_handler_that_does_not_raise(self, pipe: tuple[int, int]) -> None:
        seen: list[int] = []
        memory = os.memfd_create("memory")
        old = signal.signal(signal.SIGALRM, lambda *_: seen.append(os.write(pipe[1], b"late")))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            assert library.rsplice(pipe[0], memory, 100) == 4
        finally:
            signal.signal(signal.SIGALRM, old)
        assert seen == [4]
        os.close(memory)


def library_why(bit: int) -> str:
    result = next((text for text in library._reasons(bit)), "")
    assert result
    return result
