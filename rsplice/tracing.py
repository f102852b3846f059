# SPDX-License-Identifier: MIT
"""rsplice.trace(): the copies that a block of code makes, in this process and its children."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

from rsplice.asides import imports_set_aside
from rsplice.audit import Audit
from rsplice.engine import ASIDE, Engine, Wanted
from rsplice.errors import RspliceError
from rsplice.probes import RemoteProbes, served_path
from rsplice.tracers.capability import reason
from rsplice.tracers.program import BpfError

SCOPES = ("block", "all")

#: How long, in seconds, a command has to end after SIGTERM.
_GRACE = 5.0


class Probes(Protocol):
    """What a trace needs: an Engine, or one of another process."""

    def start(self, wanted: Wanted) -> int: ...
    def stop(self, number: int) -> Audit: ...
    def audit(self, number: int) -> Audit: ...
    def adopt(self, tid: int, number: int) -> None: ...
    def set_aside(self, tid: int, flags: int) -> None: ...
    def hold(self, held: bool) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class Trace:
    """One trace: begins where its ``with`` block is entered, ends where it is left.

    Made by rsplice.trace(). Entered again it begins anew.
    """

    def __init__(self, wanted: Wanted, argv: Sequence[str] = (), **popen: Any) -> None:
        self._wanted = wanted
        self._argv = argv
        self._popen = popen
        self._number: int | None = None
        self._owner = 0
        self._probes: Probes | None = None
        self._last: Audit | None = None
        self._stack = ExitStack()
        self._import_error: RspliceError | None = None
        self.process: subprocess.Popen[Any] | None = None  #: the command, if there is one
        #: For a test runner: descriptors that are its own. Set, imports are left out, too.
        self.leave_out: Callable[[], list[int]] | None = None

    @property
    def running(self) -> bool:
        """Whether it counts now."""
        return self._number is not None

    @property
    def audit(self) -> Audit:
        """What was counted: so far while it runs, in all once it has ended.

        :raises RspliceError: it has not begun, or it belongs to the process that this one was
            forked from
        """
        if self._number is not None:
            self._check_process()
            assert self._probes is not None
            with _told():
                audit = self._probes.audit(self._number)
            audit.exit_status = self._status()
            return audit
        if self._last is None:
            raise RspliceError("the trace has not begun: enter it with a with statement")
        return self._last

    def start(self) -> None:
        """Begins; a ``with`` statement does it.

        :raises RspliceError: nothing can be traced here, or there is no such process
        :raises RuntimeError: it runs already
        """
        if self._number is not None:
            raise RuntimeError("the trace runs already")
        self._owner = os.getpid()
        self._probes = probes()
        self._last = None
        wanted = self._wanted
        if self.leave_out is not None:
            wanted = replace(wanted, left_out=tuple(self.leave_out()), aside=True)
            self._stack.enter_context(imports_set_aside(self._set_aside))
        self._import_error = None
        try:
            with _told():
                self._number = self._probes.start(wanted)
        except BaseException:
            self._stack.close()
            raise
        if self._argv:
            try:
                self._run()
            except BaseException:
                self.stop()
                raise

    def _run(self) -> None:
        assert self._probes is not None and self._number is not None
        tid = threading.get_native_id()
        with _told():
            self._probes.adopt(tid, self._number)
        try:
            self.process = subprocess.Popen(self._argv, **self._popen)
        finally:
            self._probes.set_aside(tid, 0)

    def stop(self) -> None:
        """Ends, if it runs; a command that still runs is ended first."""
        if self._number is None or self._owner != os.getpid():
            return  # in a forked child: its parent's
        assert self._probes is not None
        if self.process:
            _end(self.process)
        number, self._number = self._number, None
        try:
            with _told():
                self._last = self._probes.stop(number)
        finally:
            self._stack.close()
        if self._import_error:
            self._last = None
            raise self._import_error
        self._last.exit_status = self._status()

    def _set_aside(self, tid: int, begins: bool) -> None:
        if self._probes is None or self._owner != os.getpid():
            return
        try:
            with _told():
                self._probes.set_aside(tid, ASIDE if begins else 0)
        except RspliceError as error:
            self._import_error = error  # which is no reason for the import to fail

    def __enter__(self) -> Trace:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _status(self) -> int | None:
        """The command's exit status, 128 + signal if it was killed."""
        code = self.process.returncode if self.process else None
        return 128 - code if code is not None and code < 0 else code

    def _check_process(self) -> None:
        if self._owner != os.getpid():
            raise RspliceError(
                f"the trace belongs to process {self._owner}, which this one was forked from: "
                "it counts this process too, and is read there"
            )


def trace(
    *,
    pid: int | Sequence[int] | None = None,
    cgroup: str | None = None,
    command: Sequence[str] | None = None,
    scope: str = "block",
    **popen: Any,
) -> Trace:
    """A context manager that counts what is copied while its block runs.

    By default of this process, all of its threads included, and of the children that are started
    in the block. Traces may be nested, may overlap in threads, and may be repeated; each counts
    all that happens in its time. The probes are loaded once in a process (about 0.7 s).

    :param pid: a process to count instead, or several, with the children they start in the block
    :param cgroup: the processes of this cgroup (a path below /sys/fs/cgroup) instead
    :param command: a command to run instead; it is counted from its first instruction, is
        ``trace.process`` in the block, and is ended with it if it still runs
    :param scope: "block", or "all" to count children that were started before, too
    :param popen: for the command, as for subprocess.Popen
    :raises ValueError: the arguments contradict each other
    """
    if sum(each is not None for each in (pid, cgroup, command)) > 1:
        raise ValueError("give one of pid, cgroup and command")
    if scope not in SCOPES:
        raise ValueError(f"scope is one of {', '.join(SCOPES)}, not {scope!r}")
    if popen and command is None:
        raise TypeError(f"unexpected arguments: {', '.join(popen)}")
    pids: tuple[int, ...] = () if cgroup or command else (os.getpid(),)
    if pid is not None:
        pids = (pid,) if isinstance(pid, int) else tuple(pid)
    shown = tuple(map(str, command or ()))
    wanted = Wanted(pids, below=scope == "all", cgroup=cgroup, command=shown)
    return Trace(wanted, command or (), **popen)


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a command, kindly and then for good."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _told() -> Iterator[None]:
    """Says in one line that the probes are gone, as where somebody closed all descriptors."""
    global _probes
    try:
        yield
    except (BpfError, OSError) as error:
        # Not closed: their numbers may be those of other files now.
        _probes = None
        raise RspliceError(f"the probes of this process do not answer: {error}") from error


# --- the probes of this process -------------------------------------------------------------------

_lock = threading.Lock()
_probes: Probes | None = None
_why_not: RspliceError | None = None
_holders = 0


def probes() -> Probes:
    """The probes of this process, loaded when they are first asked for.

    :raises RspliceError: there can be none here; the message says why, the same each time
    """
    global _probes, _why_not
    with _lock:
        if _why_not:
            raise _why_not
        if _probes is None:
            try:
                _probes = _load()
            except RspliceError as error:
                _why_not = error
                raise
            if _holders:
                _probes.hold(True)
        return _probes


def _load() -> Probes:
    """This process's own probes if it may have any, else those that somebody serves."""
    if reason() and (path := served_path()):
        return RemoteProbes(path)
    return Engine()


@contextmanager
def held() -> Iterator[None]:
    """Keeps the probes attached between traces meanwhile: each then takes some 20 ms less."""
    hold(1)
    try:
        yield
    finally:
        hold(-1)


def hold(change: int) -> None:
    """Adds to the number of those who want the probes attached between traces."""
    global _holders
    with _lock:
        before = _holders > 0
        _holders += change
        if _probes and before != (_holders > 0):
            _probes.hold(_holders > 0)


def close() -> None:
    """Takes the probes off and frees them; the next trace loads them again."""
    global _probes, _why_not
    with _lock:
        if _probes:
            _probes.close()
        _probes = _why_not = None


def _after_fork() -> None:
    """In a forked child: its parent's probes are not its own."""
    global _probes, _lock, _holders
    inherited, _probes = _probes, None
    _lock = threading.Lock()
    _holders = 0
    if inherited:
        with suppress(OSError):
            inherited.abandon()


# At exit the kernel detaches and frees all of it, as it does when the process is killed.
os.register_at_fork(after_in_child=_after_fork)
