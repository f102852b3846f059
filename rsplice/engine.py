# SPDX-License-Identifier: MIT
"""Many traces over one set of probes: whom each trace follows, and what it counted.

The kernel side adds up by key, and a followed process has one key at a time. Here each key stands
for a process in a set of traces: whenever a trace begins or ends, the processes that are in it get
new keys, so that all that was counted under one key belongs to the same traces. A process that
the kernel saw starting is in the traces that its parent's key was in. So nothing is ever
subtracted, and what becomes known late (bytes that leave a socket after the call) is booked where
the call was.
"""

from __future__ import annotations

import itertools
import os
import select
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rsplice.audit import Accuracy, Audit, MissingProbe, PageCounts
from rsplice.errors import RspliceError
from rsplice.events import ProcessSeen
from rsplice.ledger import Ledger
from rsplice.session import kernel_version
from rsplice.tracers.capability import reason
from rsplice.tracers.counters import identify
from rsplice.tracers.program import BpfError
from rsplice.tracers.tracer import Tracer

# bpf/asides.h
ASIDE, _OWN = 1 << 14, 1 << 15
_LET_GO = 2
_THREAD = struct.Struct("=QQ")
_CGROUPS = "/sys/fs/cgroup"

#: So many keys are worth a walk through the maps.
_SWEEP_AT = 256


@dataclass(frozen=True)
class Wanted:
    """What a trace is to count.

    :param pids: processes, with the children that they start from now on
    :param below: also the children that they have already
    :param cgroup: a directory of cgroup v2, whose processes are taken in as well
    :param left_out: descriptors of this process; calls on their open files are not counted
    :param aside: leave out what threads do that were set aside, too
    :param command: what the audit calls it
    """

    pids: tuple[int, ...] = ()
    below: bool = False
    cgroup: str | None = None
    left_out: tuple[int, ...] = ()
    aside: bool = False
    command: tuple[str, ...] = ()


@dataclass
class _Trace:
    wanted: Wanted
    began: float
    lost: int  #: events that were lost before
    files: list[tuple[int, int]] = field(default_factory=list)  #: descriptor, struct file
    refused: list[str] = field(default_factory=list)  #: processes that could not be followed


class Engine:
    """The probes of one process, for any number of traces. All methods may be called by any thread.

    While there is no trace the probes are taken off, unless they are held.

    :param owner: whose processes alone may be traced; None for anybody's
    :raises RspliceError: nothing can be traced here; the message says why
    """

    def __init__(self, owner: int | None = None) -> None:
        why_not = reason()
        if why_not:
            raise RspliceError(why_not)
        self._owner = owner
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._sequence = itertools.count(1)
        self._traces: dict[int, _Trace] = {}
        # By key: its traces, the first key of the same process, the flags of its start.
        self._members: dict[int, frozenset[int]] = {}
        self._origins: dict[int, int] = {}
        self._asides: dict[int, int] = {}
        self._threads: dict[int, list[bytes]] = {}  # what those do that are set aside
        self._files: dict[int, int] = {}  # how many traces leave a struct file out
        self._dead: set[int] = set()  # keys that are of no trace any more
        self._unswept = 0  # keys made since there was a sweep
        self._nr_started = 0
        self._held = 0
        self._tracer = Tracer(traces=True, owner=owner)
        self._program = self._tracer.program
        self._counters = self._tracer.counters
        self._thread_map = self._program.map("threads")
        self._left_out = self._program.map("left_out")
        self._learned = self._program.map("learned_file")
        self._attached = True
        self._rest()

    def close(self) -> None:
        """Ends all traces, takes the probes off and frees what they held."""
        with self._lock:
            for trace in self._traces.values():
                self._let_files(trace)
            self._traces.clear()
            self._tracer.close()
            self._attached = False

    def hold(self, held: bool) -> None:
        """Keeps the probes on between traces: some 20 ms less for each, 80 ns more for each call.

        As many hold(False) as there were hold(True) end it.
        """
        with self._lock:
            self._held += 1 if held else -1
            self._rest()

    def _rest(self) -> None:
        if self._attached and not self._traces and not self._held:
            self._program.detach()
            self._attached = False

    def start(self, wanted: Wanted) -> int:
        """Begins a trace; its number. RspliceError if a process cannot be followed."""
        with self._lock, self._own_work():
            if not self._attached:
                self._attach()
            number = next(self._numbers)
            trace = _Trace(wanted, time.monotonic(), self._counters.nr_lost())
            self._traces[number] = trace
            try:
                for descriptor in wanted.left_out:
                    trace.files.append(self._keep_out(descriptor, ASIDE))
                self._learn()
                # The caller's own process comes last: all before is none of its work.
                for pid in sorted(self._roots(wanted), key=lambda pid: pid == os.getpid()):
                    self._join(pid, number)
                if wanted.below:
                    self._join_below(number)
            except BaseException:
                self._end(number)
                raise
            trace.began = time.monotonic()
            return number

    def stop(self, number: int) -> Audit:
        """Ends a trace: all that it counted. RspliceError if there is none of that number."""
        with self._lock, self._own_work():
            self._trace(number)
            self._part(number)
            audit = self._read(number)
            self._end(number)
            return audit

    def drop(self, number: int) -> None:
        """Ends a trace that nobody wants to know of any more."""
        with self._lock, self._own_work():
            if number in self._traces:
                self._end(number)

    def audit(self, number: int) -> Audit:
        """What a trace has counted so far. RspliceError if there is none of that number."""
        with self._lock, self._own_work():
            self._trace(number)
            self._learn()
            return self._read(number)

    def set_aside(self, tid: int, flags: int) -> None:
        """Counts what thread *tid* does from now on apart: ASIDE, or 0 for no longer."""
        with self._lock:
            self._set_thread(tid, _THREAD.pack(0, flags) if flags else None)

    def _set_thread(self, tid: int, state: bytes | None) -> None:
        """What thread *tid* is busy with; None for what it was busy with before."""
        key = struct.pack("=I", tid)
        nested = self._threads.setdefault(tid, [])
        if state is not None:
            nested.append(state)
        elif nested:
            nested.pop()
        if nested:
            self._thread_map.put(key, nested[-1])
        else:
            del self._threads[tid]
            self._thread_map.delete(key)

    def adopt(self, tid: int, number: int) -> None:
        """Takes the processes that thread *tid* starts into a trace, until set_aside(tid, 0)."""
        with self._lock, self._own_work():
            self._trace(number)
            group, _ = identify(tid)
            current = self._counters.followed().get(group, 0)
            key = self._new_key(group)
            self._members[key] = self._members.get(current, frozenset()) | {number}
            self._origins[key] = key
            self._asides[key] = 0
        with self._lock:
            self._set_thread(tid, _THREAD.pack(key, 0))

    def abandon(self) -> None:
        """In a forked child: closes what it has inherited, and touches nothing of its parent's."""
        for trace in self._traces.values():
            for descriptor, _ in trace.files:
                os.close(descriptor)
        self._tracer.close()

    # --- who is in which trace -------------------------------------------------------------------

    def _trace(self, number: int) -> _Trace:
        if number not in self._traces:
            raise RspliceError(f"there is no trace {number}: it has ended")
        return self._traces[number]

    def _attach(self) -> None:
        try:
            self._program.attach_again()
        except BpfError as error:
            self._program.detach()
            raise RspliceError(f"the probes cannot be attached again: {error}") from error
        self._attached = True

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        """What this thread does meanwhile is no work of the traced program."""
        tid = threading.get_native_id()
        self._set_thread(tid, _THREAD.pack(0, _OWN))
        try:
            yield
        finally:
            self._set_thread(tid, None)

    def _new_key(self, pid: int) -> int:
        self._unswept += 1
        return pid << 32 | next(self._sequence) & 0xFFFFFFFF

    def _learn(self) -> None:
        """Notes the processes that were started since."""
        number = self._counters.nr_started()
        if number == self._nr_started:
            return
        self._nr_started = number
        there = self._counters.started()

        for key in there:
            line = []
            while key in there and key not in self._members:
                line.append(key)
                key = there[key].parent
            for key in reversed(line):
                # A parent that is not known was of traces that have ended.
                started = there[key]
                self._members[key] = self._members.get(started.parent, frozenset())
                self._origins[key] = key
                self._asides[key] = started.aside | self._asides.get(started.parent, 0)
                self._unswept += 1

    def _roots(self, wanted: Wanted) -> list[int]:
        return [*wanted.pids, *(_cgroup_members(wanted.cgroup) if wanted.cgroup else ())]

    def _join(self, pid: int, number: int) -> None:
        """Takes a process into a trace. RspliceError if it is not there, or not to be followed."""
        with self._owned(pid):
            group, comm = identify(pid)
            key = self._counters.followed().get(group)
            traces = self._members.get(key, frozenset()) if key else frozenset()
            if number not in traces:
                self._put(group, comm, traces | {number}, key)

    def _put(self, pid: int, comm: bytes, traces: frozenset[int], before: int | None) -> None:
        """Counts what a process does from now on for *traces*.

        :param before: the key that it had, if it was followed
        """
        key = self._new_key(pid)
        self._members[key] = traces
        self._origins[key] = self._origins.get(before, key) if before else key
        self._asides[key] = self._asides.get(before, 0) if before else 0
        self._counters.follow_as(pid, key, comm)
        if before and self._counters.has_ended(before):
            self._counters.unfollow(pid)

    def _part(self, number: int) -> None:
        """Takes all processes out of a trace."""
        mine = os.getpid()
        while True:
            self._learn()
            inside = [
                (pid, key)
                for pid, key in self._counters.followed().items()
                if number in self._members.get(key, ())
            ]
            if not inside:
                return
            for pid, key in sorted(inside, key=lambda each: each[0] != mine):
                rest = self._members[key] - {number}
                comm = self._counters.comm_of(key) if rest else None
                if comm is not None:
                    self._put(pid, comm, rest, key)
                else:
                    self._counters.unfollow(pid)

    def _join_below(self, number: int) -> None:
        """Takes in the processes that descend from those of the trace already."""
        trace = self._traces[number]
        tried: set[int] = set()
        while True:
            inside = {
                pid
                for pid, key in self._counters.followed().items()
                if number in self._members.get(key, ())
            }
            new = [pid for pid in _descendants(inside) if pid not in inside | tried]
            if not new:
                return
            for pid in new:
                tried.add(pid)
                try:
                    self._join(pid, number)
                except RspliceError as error:
                    if os.path.exists(f"/proc/{pid}"):
                        trace.refused.append(str(error))
            self._learn()

    @contextmanager
    def _owned(self, pid: int) -> Iterator[None]:
        """Follows nobody who is not the owner's, nor who has taken the pid meanwhile."""
        if self._owner is None:
            yield
            return
        try:
            descriptor = os.pidfd_open(_group_of(pid))
        except OSError as error:
            raise RspliceError(f"no process {pid}: {error.strerror}; check the pid") from error
        try:
            self._check_owner(pid)
            yield
            try:
                self._check_owner(pid)
                _check_alive(descriptor, pid)
            except RspliceError:
                self._disavow(_group_of(pid))
                raise
        finally:
            os.close(descriptor)

    def _disavow(self, pid: int) -> None:
        """Follows a process no more, and lets nobody see what was counted of it."""
        key = self._counters.followed().get(pid)
        self._counters.unfollow(pid)
        if key in self._members:
            self._members[key] = frozenset()
            self._dead.add(key)

    def _check_owner(self, pid: int) -> None:
        if not _is_owned_by(pid, self._owner):
            raise RspliceError(f"process {pid} is not one of user {self._owner}: not traced")

    # --- files that are left out -----------------------------------------------------------------

    def _keep_out(self, descriptor: int, flags: int) -> tuple[int, int]:
        """Counts calls on an open file apart; a descriptor that holds it, and its struct file."""
        # Held open, so that its struct file cannot become another file's.
        kept = os.dup(descriptor)
        address = self._file_of(kept)
        self._files[address] = self._files.get(address, 0) + 1
        self._left_out.put(struct.pack("=Q", address), struct.pack("=Q", flags))
        return kept, address

    def _file_of(self, descriptor: int) -> int:
        self._program.run_once("learn_file", descriptor)
        return int(struct.unpack("=Q", (self._learned.get(bytes(4)) or [bytes(8)])[0])[0])

    def _let_files(self, trace: _Trace) -> None:
        for descriptor, address in trace.files:
            self._files[address] -= 1
            if not self._files[address]:
                del self._files[address]
                self._left_out.delete(struct.pack("=Q", address))
            os.close(descriptor)
        trace.files.clear()

    def own(self, descriptor: int) -> int:
        """Has calls on an open file counted as rsplice's own work, until disown().

        :return: what disown() wants. The file is not held: while it is, nobody sees its end
        """
        with self._lock:
            address = self._file_of(descriptor)
            self._left_out.put(struct.pack("=Q", address), struct.pack("=Q", _OWN))
            return address

    def disown(self, address: int) -> None:
        """Counts calls on what may be another file now as those on all others."""
        with self._lock:
            self._left_out.delete(struct.pack("=Q", address))

    # --- what was counted ------------------------------------------------------------------------

    def _end(self, number: int) -> None:
        """Forgets a trace, and what was counted for it alone."""
        self._part(number)
        self._let_files(self._traces.pop(number))
        for key, traces in self._members.items():
            if number in traces:
                self._members[key] = traces - {number}
                if len(traces) == 1:
                    self._dead.add(key)
        if not self._traces or self._unswept > _SWEEP_AT:
            self._sweep()
        self._rest()

    def _sweep(self) -> None:
        """Makes room in the kernel's maps, and here."""
        self._unswept = 0
        # In this order: who has been started since is not known, and is left alone.
        gone = set(self._members)
        followed = set(self._counters.followed().values())
        gone -= followed
        dead = self._dead - followed
        for key in dead:
            del self._members[key], self._origins[key], self._asides[key]
        self._dead -= dead
        self._counters.forget(dead)
        self._counters.retire_keys(gone - dead)

    def _read(self, number: int) -> Audit:
        trace = self._traces[number]
        wanted = trace.wanted
        keys = {
            key
            for key, traces in self._members.items()
            if number in traces and not (wanted.aside and self._asides[key])
        }
        reading = self._counters.read(keys, _OWN | (ASIDE if wanted.aside else 0))
        ledger = Ledger(kernel_version())
        for tally in reading.tallies:
            ledger.add(replace(tally, process=self._origins[tally.process]))
        for process in self._merged(reading.processes):
            ledger.see(process)
        for finding in reading.findings:
            ledger.add_finding(finding)
        refused = [*trace.refused, *self._let_go(keys)]
        missing = [
            *self._tracer.missing,
            *(MissingProbe("process", why, "its bytes are not counted") for why in refused),
        ]
        accuracy = Accuracy(
            list(self._tracer.attached),
            missing,
            reading.events_lost - trace.lost + len(refused),
            identity=self._tracer.identity,
            uncounted=self._tracer.uncounted,
        )
        return ledger.audit(
            command=wanted.command,
            duration_s=time.monotonic() - trace.began,
            kernel_release=os.uname().release,
            accuracy=accuracy,
        )

    def _merged(self, processes: Sequence[ProcessSeen]) -> list[ProcessSeen]:
        """One for each process, with all that was counted under its keys."""
        merged: dict[int, ProcessSeen] = {}
        for process in sorted(processes, key=lambda each: each.key):
            origin = self._origins[process.key]
            pages = PageCounts(**vars(process.pages))
            if origin in merged:
                pages.add(merged[origin].pages)
            merged[origin] = replace(process, key=origin, pages=pages)
        return list(merged.values())

    def _let_go(self, keys: set[int]) -> list[str]:
        return [
            f"process {started.pid} has run a program with other rights "
            f"({started.comm.split(bytes(1))[0].decode(errors='replace')}): let go"
            for key, started in self._counters.started().items()
            if key in keys and started.ended == _LET_GO
        ]


def _check_alive(descriptor: int, pid: int) -> None:
    """RspliceError if the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if poll.poll(0):
        raise RspliceError(f"no process {pid}: it has ended")


def _group_of(pid: int) -> int:
    with suppress(RspliceError):
        return identify(pid)[0]
    return pid


def _is_owned_by(pid: int, owner: int | None) -> bool:
    """Whether all user ids of a process are *owner*'s, and it has no capabilities."""
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
    except (OSError, ValueError):
        return False
    uids = {int(uid) for uid in fields["Uid"].split()}
    gids = set(fields["Gid"].split())
    return uids == {owner} and len(gids) == 1 and (owner == 0 or int(fields["CapPrm"], 16) == 0)


def _descendants(pids: set[int]) -> list[int]:
    """The processes that descend from *pids* now."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The name in parentheses may hold anything.
            parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found: set[int] = set()
    while True:
        new = {p for p, parent in parents.items() if parent in pids | found} - found
        if not new:
            return sorted(found)
        found |= new


def _cgroup_members(cgroup: str) -> list[int]:
    """The processes of a cgroup and of those below it. RspliceError if there is no such cgroup."""
    top = Path(cgroup)
    if not top.is_absolute():
        mounts = (root for root in (f"{_CGROUPS}/unified", _CGROUPS) if _is_cgroup2(root))
        top = Path(next(mounts, _CGROUPS), cgroup)
    if not (top / "cgroup.procs").exists():
        raise RspliceError(f"no cgroup {cgroup}: {top} has no cgroup.procs; check the path")
    pids: list[int] = []
    for path in (top, *(path for path in top.rglob("*") if path.is_dir())):
        with suppress(OSError):
            pids += map(int, (path / "cgroup.procs").read_text().split())
    return [pid for pid in pids if pid]


def _is_cgroup2(root: str) -> bool:
    return os.path.exists(f"{root}/cgroup.controllers")
