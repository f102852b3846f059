# SPDX-License-Identifier: MIT
"""Which page frames lay in a pipe when its bytes were spliced into a FUSE reply."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from rsplice.tracers.btf import Btf
from rsplice.tracers.layout import resolve
from rsplice.tracers.program import Program

_TESTS = Path(__file__).parents[1]
_ACCESS = _TESTS.parent / "tracers" / "bpf" / "access.h"
_PAGE = 4096
_MAX_BUFFERS, _MAX_ANSWERS = 256, 2048
# pipe_frames.c: struct queued
_QUEUED = struct.Struct(f"=3Q{_MAX_BUFFERS}Q{_MAX_BUFFERS}I{_MAX_BUFFERS}I")

FRAME = (1 << 55) - 1  # Documentation/admin-guide/mm/pagemap.rst
PRESENT = 1 << 63


@dataclass(frozen=True)
class Buffer:
    """One buffer of a pipe."""

    frame: int
    offset: int  #: in its page, bytes
    length: int


@dataclass(frozen=True)
class Answer:
    """What a READ was answered with: the whole pipe, the reply's header in the first buffer."""

    offset: int  #: of the READ in its file, bytes
    size: int  #: that it asked for, bytes
    buffers: list[Buffer]


def frames_of(mapping: mmap.mmap, path: str) -> list[int]:
    """The page frames of a mapped file in file order; every page is touched first.

    :param path: as /proc/self/maps has it
    """
    assert sum(mapping[at] for at in range(0, len(mapping), _PAGE)) > 0
    lines = Path("/proc/self/maps").read_text().splitlines()
    (line,) = [line for line in lines if line.endswith(path)]
    pages = -(-len(mapping) // _PAGE)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(int(line.split("-")[0], 16) // _PAGE * 8)
        entries = struct.unpack(f"{pages}Q", pagemap.read(pages * 8))
    assert all(entry & PRESENT for entry in entries)
    return [entry & FRAME for entry in entries]


class PipeFrames:
    """The probes of tests/bpf/pipe_frames.c, attached."""

    def __init__(self, program: Program, page_size: int) -> None:
        self._program = program
        self._page_size = page_size  # of a struct page, bytes
        self._vmemmap = self._learn()

    def watch(self, pid: int) -> None:
        """From now on what that process splices into replies is noted."""
        self._program.map("watched").put(struct.pack("=I", pid), struct.pack("=I", 1))

    def answers(self) -> list[Answer]:
        """All READs that were answered, by offset."""
        (lost,) = struct.unpack("=Q", (self._program.map("lost").get(bytes(4)) or [b""])[0])
        assert not lost, f"{lost} answers had no room"
        found = [_unpack(values[0]) for _, values in self._program.map("answered").items()]
        return sorted(
            (
                Answer(offset, size, [Buffer(self._frame(page), *rest) for page, *rest in buffers])
                for offset, size, buffers in found
            ),
            key=lambda answer: answer.offset,
        )

    def _frame(self, page: int) -> int:
        frame, rest = divmod(page - self._vmemmap, self._page_size)
        assert not rest
        return frame

    def _learn(self) -> int:
        """Where the array of struct pages begins: from a page of ours, whose frame is told."""
        self.watch(os.getpid())
        memory = os.memfd_create("pipe-frames", os.MFD_CLOEXEC)
        reader, writer = os.pipe()
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(memory, b"x" * _PAGE)
            with mmap.mmap(memory, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
                (frame,) = frames_of(mapping, "/memfd:pipe-frames (deleted)")
                assert os.splice(memory, writer, _PAGE, offset_src=0) == _PAGE
                assert os.splice(reader, null, _PAGE) == _PAGE
        finally:
            for fd in (memory, reader, writer, null):
                os.close(fd)
        thread = struct.pack("=I", threading.get_native_id())
        value = self._program.map("spliced").get(thread)
        assert value and frame, "no frame is told: root is needed"
        ((page, _, length),) = _unpack(value[0])[2]
        assert length == _PAGE
        return page - frame * self._page_size


def _unpack(value: bytes) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Offset and size of the READ, and (page, offset, length) of each buffer."""
    fields = _QUEUED.unpack(value)
    (offset, size, nr), rest = fields[:3], fields[3:]
    assert nr <= _MAX_BUFFERS
    pages, lengths, offsets = (rest[i * _MAX_BUFFERS :][:nr] for i in range(3))
    return offset, size, list(zip(pages, offsets, lengths, strict=True))


@contextmanager
def pipe_frames() -> Iterator[PipeFrames]:
    """Attaches the probes meanwhile. Skips the test where the kernel has no such tracepoint."""
    btf = Btf()
    layout = resolve(btf)
    constants = dict(layout.constants)
    members = {
        "FUSE_ARGS_IN": "fuse_args.in_args",
        "FUSE_ARG_VALUE": "fuse_in_arg.value",
        "FUSE_REQ_UNIQUE": "fuse_req.in.h.unique",
    }
    for name, path in members.items():
        found = btf.member(path)
        if found is None or btf.tracepoint_id("fuse_request_end") is None:
            pytest.skip("this kernel does not tell of FUSE requests: fuse_request_end")
        constants[name] = found.offset
    constants["FUSE_ARGS_IN_VALUE"] = constants["FUSE_ARGS_IN"] + constants["FUSE_ARG_VALUE"]
    constants |= {"DIRECT": 0, "MAX_BUFFERS": _MAX_BUFFERS, "MAX_ANSWERS": _MAX_ANSWERS}
    text = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    text += _ACCESS.read_text() + (_TESTS / "bpf" / "pipe_frames.c").read_text()
    program = Program(text, btf, direct=False, keep=False)
    try:
        for tracepoint in ("sys_enter", "fuse_request_end"):
            program.attach(program.load(f"tp_{tracepoint}", tracepoint), tracepoint)
        yield PipeFrames(program, constants["PAGE_SIZE_OF"])
    finally:
        program.close()
