# SPDX-License-Identifier: MIT
"""One run of the probes: who is followed, for how long, and the audit so far."""

from __future__ import annotations

import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rsplice.audit import Accuracy, Audit
from rsplice.errors import RspliceError
from rsplice.journey import Event, Journeys, Request, tell, without_candidates
from rsplice.launch import Command
from rsplice.ledger import Ledger
from rsplice.tracers import usdt
from rsplice.tracers.capability import reason
from rsplice.tracers.journey import Follower
from rsplice.tracers.tracer import Tracer

#: How often, in seconds, it is looked whether descendants of an ended command go on.
_LINGER = 0.05
#: How often, in seconds, room is made for more pages that a finding may be about.
_DRAIN = 0.5


class Session:
    """Probes on a command, on running processes or on the whole machine; a source of snapshots.

    Use as a context manager: leaving it detaches every probe, and ends a command that was
    started for it and still runs.

    :param argv: the command to run and follow, with all its descendants
    :param pids: running processes to follow, with the children they make from now on
    :param everything: follow every process of the machine
    :param identity: how many calls have their pages compared: "all", "sample", "off"
    :param user: who the command runs as
    :param output: descriptor for the command's standard output and error
    :param journey: the pages whose journeys are followed, if any
    :param integrity: whether the contents of queued pages are compared too; takes identity "all"
    :param verify_files: whether the files whose pages are lent are verified when it stops; likewise
    :raises RspliceError: no privilege, no such pid, no such command, ...
    """

    def __init__(
        self,
        argv: Sequence[str] = (),
        pids: Sequence[int] = (),
        everything: bool = False,
        identity: str = "all",
        user: str | None = None,
        output: int | None = None,
        journey: Request | None = None,
        integrity: bool = False,
        verify_files: bool = False,
    ) -> None:
        why_not = reason()
        if why_not:
            raise RspliceError(why_not)
        self.command = Command(argv, user, output) if argv else None
        self.shown = list(argv)  #: the command as the audit names it
        self.interrupted = False  #: a signal has ended the tracing
        self._everything = everything
        self._started = time.monotonic()
        self._ended: float | None = None
        self._last: Audit | None = None
        self._events: list[Event] = []
        try:
            self.tracer = Tracer(
                identity,
                everything,
                files=usdt.find(argv, pids),
                journeys=Follower(journey) if journey else None,
                integrity=integrity,
                verify=verify_files,
            )
            for pid in pids:
                self.tracer.follow(pid)
        except BaseException:
            if self.command:
                self.command.end()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.tracer.close()
        if self.command:
            self.command.end()

    def start(self) -> None:
        """Starts the clock, and the command if there is one."""
        self._started = time.monotonic()
        if self.command:
            self.tracer.follow(self.command.pid)
            self.command.release()

    @property
    def running(self) -> bool:
        """Whether anybody who is followed is still there, and no signal has ended it."""
        if self.interrupted:
            return False
        if self.command:
            self.command.wait(0)
        return self._everything or bool(self.tracer.counters.alive())

    def wait(self, seconds: float) -> None:
        """Waits until *seconds* have passed, nobody is left, or a signal came."""
        self.tracer.counters.make_room()
        deadline = time.monotonic() + seconds
        while self.running:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if self.tracer.journeys and self.tracer.journeys.request.finding:
                self._drain(self.tracer.journeys)
                left = min(left, _DRAIN)
            if self.command and self.command.status is None:
                if select.select([self.command.fd], [], [], left)[0]:
                    self.command.wait()
            else:
                time.sleep(min(left, _LINGER))

    def stop(self) -> None:
        """Reads the counters for the last time and detaches every probe."""
        if self._last is None:
            self._last = self._read()
            files = self.tracer.lent_files()
            self.tracer.close()
            if files:
                from rsplice.lent import verify

                verify(self._last, files)

    def snapshot(self) -> Audit:
        """The audit so far; after stop() the last one, with the command's exit status."""
        audit = self._last or self._read()
        audit.exit_status = self.command.status if self.command else None
        return audit

    def _read(self) -> Audit:
        self.tracer.counters.make_room()
        reading = self.tracer.counters.read()
        ledger = Ledger(kernel_version())
        for tally in reading.tallies:
            ledger.add(tally)
        for process in reading.processes:
            ledger.see(process)
        for mark in reading.marks:
            ledger.mark(mark)
        for finding in reading.findings:
            ledger.add_finding(finding)
        accuracy = Accuracy(
            list(self.tracer.attached),
            list(self.tracer.missing),
            reading.events_lost,
            identity=self.tracer.identity,
            uncounted=self.tracer.uncounted,
            usdt_files=list(self.tracer.usdt_files),
            measured_at=self.tracer.measured_at,
            outside=dict(reading.outside or {}),
        )
        audit = ledger.audit(
            command=self.shown,
            duration_s=time.monotonic() - self._started,
            kernel_release=os.uname().release,
            accuracy=accuracy,
        )
        if self.tracer.journeys:
            audit.journeys = self._read_journeys(self.tracer.journeys)
        return audit

    def _read_journeys(self, followed: Follower) -> Journeys:
        """The stories so far."""
        self._drain(followed)
        return tell(self._events, followed.request, followed.beyond(), followed.lost())

    def _drain(self, followed: Follower) -> None:
        """Takes what was told of pages since the last time."""
        live = followed.live() if followed.request.finding else set()
        fresh = followed.read(self.tracer.counters.kind, self.tracer.frame_of)
        if followed.request.finding:
            self._events = without_candidates(self._events, fresh, live)
        else:
            self._events += fresh


def kernel_version(release: str | None = None) -> tuple[int, int]:
    """(major, minor) of a release such as "6.18.44-amd64", by default the running kernel's."""
    found = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@contextmanager
def passing_signals(session: Session) -> Iterator[None]:
    """While a command runs, the signals that would end rsplice are the command's.

    SIGTERM and SIGHUP are passed on; Ctrl-C the terminal has sent to it already. A second Ctrl-C
    or SIGTERM, after the command itself has ended, ends the waiting for its descendants. Without
    a command, each of them ends the tracing. The handler raises nothing and reaps nobody: it may
    run anywhere, in the midst of wait(2) too.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        command = session.command
        if command is None or command.ended:
            session.interrupted = True
        elif number != signal.SIGINT:
            command.send(number)

    with handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handle):
        yield


@contextmanager
def handling(
    numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Has *handler* called for the signals *numbers*, and puts back what was before."""
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, old)
