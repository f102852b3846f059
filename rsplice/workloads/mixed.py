# SPDX-License-Identifier: MIT
"""mixed: several small programs at work at once, in phases that copy and phases that do not.

It is what the live demo shows, so it is paced: every program does a little, then sleeps.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from rsplice.errors import RspliceError
from rsplice.workloads import native, transfer
from rsplice.workloads.core import (
    MEMORY,
    PIPE,
    TCP,
    UNIX,
    Calls,
    Crew,
    Progress,
    Settings,
    Workload,
    create,
    filesystem_of,
    scratch,
)

PHASES = ("copying", "avoiding copies", "filling the page cache", "all at once")
COPYING, AVOIDING, FILLING, ALL = range(4)

TICK_S = 0.05
FILE_SIZE = 16 << 20
PAGE_SIZE = 4096
MESSAGE_SIZE = 2039

#: Does the program's share of one tick in a phase.
Step = Callable[[int], None]


@dataclass(frozen=True)
class Stage:
    """What the programs have in common: files, sockets, and the time table."""

    directory: Path
    settings: Settings
    start: float
    kind: str  #: of the files, as an audit names it
    web: tuple[socket.socket, socket.socket] | None
    log: tuple[socket.socket, socket.socket]

    @property
    def seconds(self) -> float:
        return self.settings.seconds or 0.0

    def phase(self) -> int | None:
        """The number of the phase that runs now, None when all are over."""
        done = (time.monotonic() - self.start) / self.seconds
        return int(done * len(PHASES)) if done < 1.0 else None

    def play(self, step: Step) -> None:
        """Calls *step* once a tick until the last phase ends."""
        while (phase := self.phase()) is not None:
            step(phase)
            time.sleep(TICK_S)

    def open(self, name: str, flags: int = os.O_RDWR) -> transfer.End:
        fd = os.open(self.directory / name, flags | os.O_CLOEXEC)
        return transfer.End(fd, self.kind)

    def offsets(self) -> list[int]:
        """Where the operations of one tick lie in a file."""
        places = FILE_SIZE // self.settings.size
        return [i % places * self.settings.size for i in range(self.settings.count or 0)]


def run(settings: Settings, progress: Progress) -> Calls:
    """Plays the phases in turn, ``seconds`` in all, with ``count`` operations of ``size`` bytes
    for each program and tick of 50 ms."""
    if settings.size > FILE_SIZE:
        raise RspliceError(f"--size of mixed is at most {FILE_SIZE} bytes")
    skipped = set()
    web = None
    with scratch() as directory:
        for name in ("assets", "records", "archive", "copy"):
            os.close(create(directory / name, FILE_SIZE))
        try:
            web = transfer.tcp_pair()
        except RspliceError as error:
            skipped.add(str(error))
        log = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stage = Stage(directory, settings, time.monotonic(), filesystem_of(directory), web, log)
        crew = Crew(directory)
        try:
            for program, work in PROGRAMS.items():
                if web or work not in (_web, _client):
                    crew.start(program, partial(work, stage))
            calls = crew.wait(lambda: progress(*_where(stage)))
        finally:
            crew.stop()
    calls.skipped |= skipped
    return calls


def _where(stage: Stage) -> tuple[float, str]:
    phase = stage.phase()
    done = (time.monotonic() - stage.start) / stage.seconds
    return min(done, 1.0), PHASES[ALL if phase is None else phase]


def _web(stage: Stage, calls: Calls) -> None:
    """Serves the assets: read and write while copying, sendfile and splice else."""
    assert stage.web
    connection, _ = stage.web
    source, destination = stage.open("assets"), transfer.end_of(connection)
    pipe = transfer.Pipe()
    buffer = memoryview(bytearray(stage.settings.size))

    def step(phase: int) -> None:
        for turn, offset in enumerate(stage.offsets()):
            if phase == COPYING or (phase == ALL and turn % 4 == 0):
                os.lseek(source.fd, offset, os.SEEK_SET)
                transfer.by_read_write(calls, source, destination, buffer)
            elif phase != FILLING and turn % 2:
                transfer.by_sendfile(calls, source, destination, offset, len(buffer))
            elif phase != FILLING:
                args = (calls, pipe, source, destination, offset, len(buffer))
                transfer.by_splice(*args, seek=False)

    stage.play(step)
    connection.shutdown(socket.SHUT_WR)


def _client(stage: Stage, calls: Calls) -> None:
    """Receives what the web server sends."""
    assert stage.web
    transfer.drain_socket(calls, stage.web[1], TCP, stage.settings.size)


def _relay(stage: Stage, calls: Calls) -> None:
    """Throws a file away through a pipe, which costs no copy, or copies it to another.

    Then it also asks for pages to be moved into a file, which no kernel does.
    """
    source, destination = stage.open("assets"), stage.open("copy")
    null = transfer.End(os.open("/dev/null", os.O_WRONLY), "/dev/null")
    pipe = transfer.Pipe()
    buffer = memoryview(bytearray(stage.settings.size))

    def step(phase: int) -> None:
        for turn, offset in enumerate(stage.offsets()):
            if phase == COPYING:
                os.lseek(source.fd, offset, os.SEEK_SET)
                os.lseek(destination.fd, offset, os.SEEK_SET)
                transfer.by_read_write(calls, source, destination, buffer)
            elif phase in (AVOIDING, ALL) and turn % 8 == 0:
                queued = pipe.fill(calls, source, offset, len(buffer))
                pipe.drain(calls, destination, queued, offset, move=True)
            elif phase in (AVOIDING, ALL):
                transfer.by_splice(calls, pipe, source, null, offset, len(buffer), seek=False)

    stage.play(step)


def _backup(stage: Stage, calls: Calls) -> None:
    """Copies a file with copy_file_range while copying, and reads it cold while filling."""
    source, destination = stage.open("archive"), stage.open("copy")
    buffer = memoryview(bytearray(stage.settings.size))

    def step(phase: int) -> None:
        size = len(buffer)
        for offset in stage.offsets()[::2]:
            if phase == FILLING:
                os.posix_fadvise(source.fd, offset, size, os.POSIX_FADV_DONTNEED)
                os.lseek(source.fd, offset, os.SEEK_SET)
                transfer.read(calls, source, buffer)
            elif phase in (COPYING, ALL):
                transfer.by_copy_file_range(calls, source, destination, offset, size)

    stage.play(step)


def _database(stage: Stage, calls: Calls) -> None:
    """Reads and writes records with O_DIRECT, where the filesystem has it."""
    try:
        records = stage.open("records", os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        calls.skipped.add(f"O_DIRECT on {stage.kind}: {error.strerror}; set TMPDIR to a disk")
        return
    records = transfer.End(records.fd, filesystem_of(stage.directory, direct=True))
    # O_DIRECT wants memory and lengths aligned to blocks; anonymous mappings are.
    size = max(PAGE_SIZE, stage.settings.size // PAGE_SIZE * PAGE_SIZE)
    page = memoryview(mmap.mmap(-1, size))

    def step(phase: int) -> None:
        if phase in (FILLING, ALL):
            for offset in range(0, 4 * size, size):
                os.lseek(records.fd, offset % FILE_SIZE, os.SEEK_SET)
                transfer.read(calls, records, page)
            os.lseek(records.fd, 0, os.SEEK_SET)
            transfer.write(calls, page[:PAGE_SIZE], records)

    stage.play(step)


def _index(stage: Stage, calls: Calls) -> None:
    """Looks up pages of the assets through a mapping that is made anew each tick.

    It stays until the next, so that the web server sends pages that are in a page table.
    """
    assets = stage.open("assets", os.O_RDONLY)
    held: list[mmap.mmap] = []

    def step(phase: int) -> None:
        while held:
            held.pop().close()
        if phase in (FILLING, ALL):
            held.append(mmap.mmap(assets.fd, FILE_SIZE, prot=mmap.PROT_READ))
            for offset in range(0, FILE_SIZE, 37 * PAGE_SIZE):
                held[0][offset]
                calls.pages_touched += 1

    stage.play(step)


def _logger(stage: Stage, calls: Calls) -> None:
    """Sends log lines over a unix socket."""
    line = bytes(MESSAGE_SIZE)

    def step(phase: int) -> None:
        if phase != FILLING:
            for _ in range(stage.settings.count or 0):
                calls.add("sendto", MEMORY, UNIX, stage.log[0].send(line))

    stage.play(step)
    stage.log[0].shutdown(socket.SHUT_WR)


def _collector(stage: Stage, calls: Calls) -> None:
    """Receives the log."""
    transfer.drain_socket(calls, stage.log[1], UNIX, MESSAGE_SIZE)


def _encoder(stage: Stage, calls: Calls) -> None:
    """Hands frames to two listeners: written to each while copying, given and teed else.

    At last it gives them away and keeps them mapped: the hazard of a gift.
    """
    try:
        native.require()
    except RspliceError as error:
        calls.skipped.add(str(error))
        return
    null = transfer.End(os.open("/dev/null", os.O_WRONLY), "/dev/null")
    first, second = transfer.Pipe(), transfer.Pipe()
    # What the pipes hold, since the listeners are this process too.
    size = min(stage.settings.size, first.slots * PAGE_SIZE, second.slots * PAGE_SIZE)
    frame = memoryview(bytearray(size))

    def give(pages: memoryview) -> None:
        pages[:] = frame
        first.lend(calls, pages, gift=True)
        first.tee(calls, second, size)

    def write() -> None:
        for pipe in (first, second):
            transfer.write(calls, frame, transfer.End(pipe.writer, PIPE))

    def step(phase: int) -> None:
        for _ in stage.offsets()[::4]:
            if phase == FILLING:
                return
            with ExitStack() as mapped:
                if phase == COPYING:
                    write()
                else:
                    give(mapped.enter_context(transfer.fresh_pages(size)))
                if phase != ALL:
                    mapped.close()
                first.drain(calls, null, size)
                left = size
                while left:
                    left -= second.read(calls, frame[:left])

    stage.play(step)


def _editor(stage: Stage, calls: Calls) -> None:
    """Changes a page of a file, and cuts off another, while it is queued: hazards of splice."""
    assets = stage.open("assets")
    draft = stage.open("draft", os.O_RDWR | os.O_CREAT)
    null = transfer.End(os.open("/dev/null", os.O_WRONLY), "/dev/null")
    pipe = transfer.Pipe()
    numbers, page = count(), memoryview(bytes(PAGE_SIZE))

    def step(phase: int) -> None:
        if phase in (AVOIDING, ALL):
            pipe.fill(calls, assets, 0, PAGE_SIZE)
            os.lseek(assets.fd, 0, os.SEEK_SET)
            transfer.write(calls, memoryview(b"%019d" % next(numbers)), assets)
            pipe.drain(calls, null, PAGE_SIZE)
            os.lseek(draft.fd, 0, os.SEEK_SET)
            transfer.write(calls, page, draft)
            pipe.fill(calls, draft, 0, PAGE_SIZE)
            os.ftruncate(draft.fd, 0)
            pipe.drain(calls, null, PAGE_SIZE)

    stage.play(step)


#: Process names, and what each process does.
PROGRAMS: dict[str, Callable[[Stage, Calls], None]] = {
    "client": _client,
    "collector": _collector,
    "web": _web,
    "relay": _relay,
    "backup": _backup,
    "database": _database,
    "index": _index,
    "logger": _logger,
    "encoder": _encoder,
    "editor": _editor,
}

WORKLOAD = Workload(
    "mixed",
    "a web server, a database, a backup and others in phases; what the live demo shows",
    run,
    Settings("", size=1 << 16, count=32, seconds=20.0, threads=1),
    paced=True,
)
