# SPDX-License-Identifier: MIT
"""rsplice.trace(): what a block of code copies, whoever else is at work."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rsplice
from rsplice import engine, probes, session, tracing
from rsplice.audit import Audit
from rsplice.tracers import tracer as tracers
from tests.support.patience import DEADLINE, PATIENCE

pytestmark = pytest.mark.privileged

ROUNDS = 17
SIZE = 64 << 10
SENT = ROUNDS * SIZE

#: A program that splices ROUNDS times SIZE bytes of its first argument to /dev/null.
RELAY = f"""
import os, sys
null, (r, w) = os.open("/dev/null", os.O_WRONLY), os.pipe()
source = os.open(sys.argv[1], os.O_RDONLY)
for _ in range({ROUNDS}):
    assert os.splice(source, w, {SIZE}, offset_src=0) == {SIZE}
    assert os.splice(r, null, {SIZE}) == {SIZE}
"""
#: A program that does so whenever it is told to, and says when it has.
SERVER = "import sys\nfor line in sys.stdin:\n" + "".join(
    f"    {line}\n" for line in [*RELAY.strip().splitlines(), "print('done', flush=True)"]
)


class Relay:
    """Carries SIZE bytes through a pipe by splice; "moved" bytes are shared, never copied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = os.open(path, os.O_RDONLY)
        self.null = os.open(os.devnull, os.O_WRONLY)
        self.pipe = os.pipe()

    def run(self, rounds: int = ROUNDS) -> None:
        for _ in range(rounds):
            assert os.splice(self.source, self.pipe[1], SIZE, offset_src=0) == SIZE
            assert os.splice(self.pipe[0], self.null, SIZE) == SIZE

    def copy(self, rounds: int = ROUNDS) -> None:
        for _ in range(rounds):
            assert os.write(self.pipe[1], os.pread(self.source, SIZE, 0)) == SIZE
            assert os.splice(self.pipe[0], self.null, SIZE) == SIZE

    def close(self) -> None:
        for descriptor in (self.source, self.null, *self.pipe):
            os.close(descriptor)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tracing") / "data"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def relay(data: Path) -> Iterator[Relay]:
    relay = Relay(data)
    yield relay
    relay.close()


@pytest.fixture(autouse=True, scope="module")
def _attached() -> Iterator[None]:
    with tracing.held():
        yield
    tracing.close()


def spliced(audit: Audit) -> int:
    """Bytes that were spliced into a pipe, all of which are shared with their file."""
    # Not what rsplice itself splices when a child of the test loads it: from memfds and the like
    # (tracers.findings), from /proc where /dev/zero cannot be spliced.
    others = ("memfd", "/dev/zero", "unix", "proc")
    paths = [
        path
        for path in audit.paths
        if path.destination == "pipe" and path.via == "splice" and path.source not in others
    ]
    assert sum(path.shared for path in paths) == sum(path.payload_bytes for path in paths)
    return sum(path.shared for path in paths)


def check_payload(audit: Audit, seen: int, made: int) -> None:
    """All bytes were seen, but for calls of SIZE, each of which is told as lost.

    Only Linux 7.0 and later lose some, where more threads run than CPUs (docs/kernels.md).
    """
    lost = audit.accuracy.events_lost
    assert made - lost * SIZE <= seen <= made
    assert lost == 0 or session.kernel_version() >= (7, 0)


# What is counted


def test_a_block_is_counted_and_nothing_else(relay: Relay) -> None:
    relay.run()
    with rsplice.trace() as trace:
        relay.run()
    relay.run()
    audit = trace.audit
    assert (spliced(audit), audit.payload_bytes) == (SENT, 2 * SENT)
    assert (audit.copy_bytes, audit.avoided_bytes, audit.findings) == (0, SENT, [])
    assert audit.accuracy.events_lost == audit.accuracy.unknown_bytes == 0


def test_an_empty_block_is_nothing(relay: Relay) -> None:
    for _ in range(7):
        with rsplice.trace() as trace:
            assert trace.audit.payload_bytes == 0
        assert trace.audit.payload_bytes == 0
        assert trace.audit.paths == []


def test_paths_are_found_by_name(relay: Relay) -> None:
    with rsplice.trace() as trace:
        relay.copy()
    audit = trace.audit
    assert audit.copy_bytes == 2 * SENT
    path = audit.paths["user memory -> pipe via write"]
    assert (path.copied, path.shared, path.operations) == (SENT, 0, ROUNDS)
    with pytest.raises(KeyError, match="no path 'pipe -> tcp via splice'; there are '.*pread64'"):
        audit.paths["pipe -> tcp via splice"]


def test_the_audit_can_be_read_while_it_runs(relay: Relay) -> None:
    with rsplice.trace() as trace:
        for i in range(1, 6):
            relay.run()
            assert spliced(trace.audit) == i * SENT
            assert trace.audit.payload_bytes == 2 * i * SENT
    assert spliced(trace.audit) == 5 * SENT


def test_traces_nest(relay: Relay) -> None:
    with rsplice.trace() as outer:
        relay.run(3)
        with rsplice.trace() as inner:
            relay.run(5)
            with rsplice.trace() as innermost:
                relay.run(7)
        relay.run(11)
    sizes = [spliced(trace.audit) // SIZE for trace in (outer, inner, innermost)]
    assert sizes == [3 + 5 + 7 + 11, 5 + 7, 7]
    assert outer.audit.payload_bytes == 2 * 26 * SIZE


def test_a_trace_is_repeated(relay: Relay) -> None:
    trace = rsplice.trace()
    for rounds in (3, 5, 7):
        with trace:
            relay.run(rounds)
        assert spliced(trace.audit) == rounds * SIZE


def test_traces_overlap_in_threads(data: Path) -> None:
    """Each counts all of the process in its time: here one begins and ends amid another."""
    first, second = Relay(data), Relay(data)
    step = threading.Barrier(2, timeout=DEADLINE)
    seen: dict[str, Audit] = {}

    def other() -> None:
        step.wait()  # the first runs
        with rsplice.trace() as trace:
            second.run(5)
            step.wait()
            step.wait()  # the first has ended
            second.run(7)
        seen["other"] = trace.audit

    thread = threading.Thread(target=other)
    thread.start()
    with rsplice.trace() as trace:
        first.run(3)
        step.wait()
        step.wait()
    seen["first"] = trace.audit
    step.wait()
    thread.join()
    first.close()
    second.close()
    assert spliced(seen["first"]) == (3 + 5) * SIZE
    assert spliced(seen["other"]) == (5 + 7) * SIZE


def test_threads_are_counted(data: Path) -> None:
    relays = [Relay(data) for _ in range(7)]
    with rsplice.trace() as trace:
        threads = [threading.Thread(target=relay.run) for relay in relays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for relay in relays:
        relay.close()
    check_payload(trace.audit, spliced(trace.audit), 7 * SENT)
    assert [process.pid for process in trace.audit.processes] == [os.getpid()]


def test_tasks_of_an_event_loop_are_counted(data: Path) -> None:
    async def carry(relay: Relay) -> None:
        for _ in range(5):
            relay.run(1)
            await asyncio.sleep(0)

    async def main() -> list[Audit]:
        relays = [Relay(data) for _ in range(3)]
        with rsplice.trace() as outer:
            background = asyncio.create_task(carry(relays[0]))
            with rsplice.trace() as inner:
                await asyncio.gather(carry(relays[1]), carry(relays[2]))
            await background
        for relay in relays:
            relay.close()
        return [outer.audit, inner.audit]

    outer, inner = asyncio.run(main())
    assert spliced(outer) == 15 * SIZE
    assert spliced(inner) == 15 * SIZE  # the other task ran at the same time


def test_more_traces_than_the_kernel_has_room_for(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, and all of them within another that has to remember them."""
    sizes = {"MAX_PROCESSES": 101, "MAX_TALLIES": 211, "MAX_FLOWS": 64, "SLOTS": 64}
    monkeypatch.setattr(tracers, "map_sizes", lambda cpus: sizes)
    monkeypatch.setattr(engine, "_SWEEP_AT", 23)
    made = engine.Engine()
    try:
        wanted = engine.Wanted((os.getpid(),))
        outer = made.start(wanted)
        for i in range(211):
            inner = made.start(wanted)
            relay.run(1 + i % 3)
            assert spliced(made.stop(inner)) == (1 + i % 3) * SIZE
        audit = made.stop(outer)
        assert spliced(audit) == sum(1 + i % 3 for i in range(211)) * SIZE
        assert audit.accuracy.events_lost == 0
    finally:
        made.close()


def test_children_that_start_while_room_is_made_are_counted(
    data: Path, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_SWEEP_AT", 1)
    made = engine.Engine()
    children = 101 if PATIENCE == 1 else 23

    def start_children() -> None:
        for _ in range(children):
            subprocess.run(["cat", data], stdout=subprocess.DEVNULL, check=True)

    try:
        wanted = engine.Wanted((os.getpid(),))
        outer = made.start(wanted)
        thread = threading.Thread(target=start_children)
        thread.start()
        while thread.is_alive():
            made.stop(made.start(wanted))
        audit = made.stop(outer)
    finally:
        made.close()
    written = [path for path in audit.paths if path.destination == "/dev/null"]
    check_payload(audit, sum(path.payload_bytes for path in written), children * SIZE)
    assert 0 <= 1 + children - len(audit.processes) <= audit.accuracy.events_lost


# Children


def test_children_of_the_block_are_counted(data: Path) -> None:
    with rsplice.trace() as trace:
        subprocess.run([sys.executable, "-c", RELAY, data], check=True)
    assert spliced(trace.audit) == SENT
    assert len(trace.audit.processes) == 2


def test_grandchildren_are_counted(data: Path) -> None:
    program = (
        f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {RELAY!r}, {str(data)!r}])"
    )
    with rsplice.trace() as trace:
        subprocess.run([sys.executable, "-c", program], check=True)
    assert spliced(trace.audit) == SENT


@pytest.fixture
def server(data: Path) -> Iterator[Callable[[], None]]:
    """Asks a process that runs already to relay once."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, data],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def ask() -> None:
            assert process.stdin and process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"

        ask()
        ask.pid = process.pid  # type: ignore[attr-defined]
        yield ask
        process.kill()


def test_children_from_before_are_not_counted(server: Callable[[], None]) -> None:
    with rsplice.trace() as trace:
        server()
    assert spliced(trace.audit) == 0


def test_children_from_before_are_counted_if_asked_for(server: Callable[[], None]) -> None:
    with rsplice.trace(scope="all") as trace:
        server()
    server()
    assert spliced(trace.audit) == SENT


def test_children_of_an_outer_block_are_not_an_inner_ones(data: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(data)]
    with (
        rsplice.trace() as outer,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdin and process.stdout
        with rsplice.trace() as inner:
            process.stdin.write(b"go\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"done\n"
        process.stdin.close()
        process.wait()
    assert (spliced(outer.audit), spliced(inner.audit)) == (SENT, 0)


def test_a_process_is_counted_by_pid(server: Callable[[], None], relay: Relay) -> None:
    pid = server.pid  # type: ignore[attr-defined]
    with rsplice.trace(pid=pid) as trace:
        relay.run()  # not of that process
        server()
    assert spliced(trace.audit) == SENT
    assert [process.pid for process in trace.audit.processes] == [pid]


def test_a_command_is_counted_from_its_start_to_its_end(data: Path, relay: Relay) -> None:
    command = [sys.executable, "-c", RELAY, str(data)]
    with rsplice.trace() as outer, rsplice.trace(command=command) as trace:
        relay.run()
        assert trace.process is not None
        assert trace.process.wait() == 0
    assert spliced(trace.audit) == SENT
    assert spliced(outer.audit) == 2 * SENT
    assert (trace.audit.command, trace.audit.exit_status) == (command, 0)
    assert [process.pid for process in trace.audit.processes] == [trace.process.pid]


def test_a_command_that_still_runs_is_ended() -> None:
    with rsplice.trace(command=["sleep", "1000"]) as trace:
        assert trace.process is not None
    assert trace.process.returncode == -signal.SIGTERM
    assert trace.audit.exit_status == 128 + signal.SIGTERM


def test_a_command_that_is_not_there_leaves_nothing(relay: Relay) -> None:
    with pytest.raises(FileNotFoundError), rsplice.trace(command=["/no/such/program"]):
        pass
    with rsplice.trace() as trace:
        relay.run()
    assert spliced(trace.audit) == SENT


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of its own."""
    roots = [root for root in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup") if is_cgroup2(root)]
    if not roots:
        pytest.skip("no cgroup v2 is mounted")
    path = Path(roots[0], f"rsplice-test-{os.getpid()}")
    try:
        (path / "below").mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    yield path
    for directory in (path / "below", path):
        directory.rmdir()


def is_cgroup2(root: str) -> bool:
    return os.path.exists(f"{root}/cgroup.controllers")


def test_a_cgroup_is_counted(cgroup: Path, server: Callable[[], None], relay: Relay) -> None:
    pid = server.pid  # type: ignore[attr-defined]
    (cgroup / "below" / "cgroup.procs").write_text(str(pid))
    for name in (str(cgroup), cgroup.name):
        with rsplice.trace(cgroup=name) as trace:
            relay.run()
            server()
        assert spliced(trace.audit) == SENT
    with (
        pytest.raises(rsplice.RspliceError, match=r"no cgroup no/such: .*check the path"),
        rsplice.trace(cgroup="no/such"),
    ):
        pass


def test_the_slower_reads_count_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On kernels before 6.2."""
    slow = functools.partial(tracers.Tracer, direct=False)
    monkeypatch.setattr(engine, "Tracer", slow)
    made = engine.Engine()
    relay = Relay(data)
    try:
        file, aside = os.open(data, os.O_RDONLY), threading.get_native_id()
        number = made.start(engine.Wanted((os.getpid(),), left_out=(file,), aside=True))
        relay.run()
        assert len(os.pread(file, 100, 0)) == 100
        made.set_aside(aside, engine.ASIDE)
        relay.copy()
        subprocess.run(["true"], check=True)
        made.set_aside(aside, 0)
        subprocess.run([sys.executable, "-c", RELAY, data], check=True)
        audit = made.stop(number)
        assert spliced(audit) == 2 * SENT
        assert len(audit.processes) == 2
    finally:
        made.close()
        relay.close()
        os.close(file)


# Ways out


def test_an_exception_ends_the_trace(relay: Relay) -> None:
    with pytest.raises(ZeroDivisionError), rsplice.trace() as trace:
        relay.run()
        raise ZeroDivisionError
    assert not trace.running
    relay.run()
    assert spliced(trace.audit) == SENT


def test_a_forked_child_is_counted_and_cannot_touch_the_trace(relay: Relay) -> None:
    with rsplice.trace() as trace:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                relay.run()
                try:
                    _ = trace.audit
                except rsplice.RspliceError as error:
                    status = 0 if "forked from" in str(error) else 2
                trace.stop()
                # One of the child's own, over probes of its own.
                with rsplice.trace() as own:
                    relay.run(3)
                status = status or (0 if spliced(own.audit) == 3 * SIZE else 3)
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        relay.run()
    assert spliced(trace.audit) == 2 * SENT + 3 * SIZE
    with rsplice.trace() as again:
        relay.run()
    assert spliced(again.audit) == SENT


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_are_counted(method: str, data: Path) -> None:
    program = f"""
import multiprocessing, os, rsplice
SOURCE = {str(data)!r}
def work():
    import sys
    sys.argv[1:] = [SOURCE]
    exec({RELAY!r})
if __name__ == "__main__":
    with rsplice.trace() as trace:
        process = multiprocessing.get_context({method!r}).Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
    print(sum(p.shared for p in trace.audit.paths if p.destination == "pipe"))
"""
    script = data.parent / f"{method}.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{SENT}\n", "")


@pytest.mark.parametrize("end", ["os._exit(7)", "os.execv('/bin/sh', ['sh', '-c', 'exit 7'])"])
def test_a_process_that_ends_within_a_trace_leaves_nothing(end: str) -> None:
    program = f"import os, rsplice\nwith rsplice.trace() as trace:\n    {end}\n"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 7


def test_a_process_that_closes_all_descriptors_is_told_so() -> None:
    program = """
import os, rsplice
try:
    with rsplice.trace() as trace:
        os.closerange(3, 1 << 10)
except rsplice.RspliceError as error:
    print(error)
with rsplice.trace() as trace:  # by other probes
    r, w = os.pipe()
    os.write(w, b"12345")
print(trace.audit.copy_bytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (
        "the probes of this process do not answer: Bad file descriptor\n5\n",
        "",
    )


def test_an_answer_that_a_signal_took_away_is_not_the_next_ones() -> None:
    """As pytest-timeout does it: an exception amid a question to rsplice serve-probes."""
    ours, theirs = socket.socketpair()
    remote = object.__new__(probes.RemoteProbes)
    remote.__dict__.update(
        _path="here",
        _lock=threading.Lock(),
        _answers=b"",
        _numbers=itertools.count(1),
        _socket=ours,
    )
    signal.signal(signal.SIGALRM, lambda number, frame: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(ZeroDivisionError):
        remote.hold(True)
    theirs.sendall(b'{"id": 1, "ok": "late"}\n{"id": 2, "ok": 42}\n')
    assert remote.start(engine.Wanted()) == 42
    ours.close()
    theirs.close()


# Arguments


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="one of pid, cgroup and command"):
        rsplice.trace(pid=1, command=["true"])
    with pytest.raises(ValueError, match="scope is one of block, all"):
        rsplice.trace(scope="some")
    with pytest.raises(TypeError, match="unexpected arguments: cwd"):
        rsplice.trace(cwd="/")


def test_a_pid_that_is_not_there_is_one_line(relay: Relay) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with (
        pytest.raises(rsplice.RspliceError, match=f"no process {child.pid}: .*check the pid"),
        rsplice.trace(pid=child.pid),
    ):
        pass


def test_a_trace_that_has_not_begun_has_no_audit() -> None:
    with pytest.raises(rsplice.RspliceError, match="has not begun"):
        _ = rsplice.trace().audit


def test_importing_rsplice_imports_no_probes() -> None:
    program = (
        "import sys, rsplice, rsplice.pytest_plugin\n"
        "print([name for name in sys.modules if name.startswith(('rsplice', 'cffi', 'rich'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "['rsplice', 'rsplice.pytest_plugin']\n"


# Sockets: what is sent late


def test_what_a_socket_sends_is_of_the_trace_that_gave_it(data: Path) -> None:
    """One connection, two traces: each has its own sendfile, and all of it shared."""
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    received: list[int] = []

    def drain() -> None:
        while got := len(theirs.recv(1 << 16)):
            received.append(got)

    with rsplice.trace() as outer:
        thread = threading.Thread(target=drain)
        thread.start()
        source = os.open(data, os.O_RDONLY)
        for rounds in (5, 3):
            with rsplice.trace() as trace:
                for _ in range(rounds):
                    assert os.sendfile(ours.fileno(), source, 0, SIZE) == SIZE
                deadline = time.monotonic() + DEADLINE
                while sum(received) < rounds * SIZE and time.monotonic() < deadline:
                    time.sleep(0.001)
            received.clear()
            path = next(path for path in trace.audit.paths if path.via == "sendfile")
            assert (path.destination, path.shared) == ("tcp", 2 * rounds * SIZE)
            assert path.evidence.word == "identity"
        ours.close()
        thread.join()
    os.close(source)
    theirs.close()
    listener.close()
    path = next(path for path in outer.audit.paths if path.via == "sendfile")
    assert path.shared == 2 * 8 * SIZE
