# SPDX-License-Identifier: MIT
"""rsplice serve-probes: what it does for a user without privileges, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rsplice import engine, probes
from rsplice.errors import RspliceError
from rsplice.tracers import layout as layouts
from rsplice.tracers import tracer as tracers
from rsplice.tracers.btf import Btf

pytestmark = pytest.mark.privileged

ROOT = Path(__file__).resolve().parent.parent
USER = pwd.getpwnam("nobody")
OTHER = 65533  #: the uid of somebody else
DEADLINE = 60

#: A client that says what it is told to, and prints what it hears.
TALK = """
import array, json, os, socket, sys
for case in json.load(sys.stdin):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["RSPLICE_PROBES"])
    for line in case["say"]:
        data = line.replace("PID", str(os.getpid())).encode()
        files = [0] * case.get("files", 0)
        sent = socket.send_fds(connection, [data[:1]], files) if files else 0
        try:
            connection.sendall(data[sent:])
        except BrokenPipeError:
            pass  # it has been refused before its end
    connection.shutdown(socket.SHUT_WR)
    heard = b""
    try:
        while part := connection.recv(1 << 16):
            heard += part
    except ConnectionResetError:
        pass  # with something unread
    print(json.dumps([json.loads(line) for line in heard.splitlines()]))
"""

TRACED = """
import json, os, subprocess, sys
import rsplice
source, null = os.open(sys.argv[1], os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
r, w = os.pipe()
def relay():
    for _ in range(17):
        assert os.splice(source, w, 4096, offset_src=0) == 4096
        assert os.splice(r, null, 4096) == 4096
found = {}
with rsplice.trace() as trace:
    relay()
    found["meanwhile"] = trace.audit.to_json()
    relay()
    with rsplice.trace() as inner:
        relay()
found["all"], found["inner"] = trace.audit.to_json(), inner.audit.to_json()
with rsplice.trace(command=["cat", sys.argv[1]], stdout=subprocess.DEVNULL) as trace:
    trace.process.wait()
found["command"] = trace.audit.to_json()
with rsplice.trace() as trace:
    subprocess.run(["su", "--version"], stdout=subprocess.DEVNULL, check=True)
found["set-user-ID"] = trace.audit.to_json()
print(json.dumps(found))
"""


def unprivileged(*command: str | Path, uid: int = USER.pw_uid) -> list[str]:
    """*command* as another user, with no way back."""
    options = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--bounding-set", "-all"]
    return ["setpriv", *options, *map(str, command)]


@pytest.fixture(scope="module", autouse=True)
def _readable(needs: Callable[..., None]) -> None:
    needs("setpriv", "su")
    tried = subprocess.run(
        unprivileged(sys.executable, "-c", "import rsplice.tracing"), capture_output=True, cwd="/"
    )
    if tried.returncode:
        pytest.skip(f"{USER.pw_name} cannot read {ROOT}: the tests run rsplice as that user")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A directory that anybody can look into; pytest's own are its user's alone."""
    with tempfile.TemporaryDirectory(prefix="rsplice-") as name:
        os.chmod(name, 0o755)
        (Path(name) / "data").write_bytes(os.urandom(4096))
        (Path(name) / "data").chmod(0o644)
        yield Path(name)


@contextmanager
def serving(*options: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A helper, once it listens."""
    command = [sys.executable, "-m", "rsplice", "serve-probes", "--user", USER.pw_name]
    with subprocess.Popen(
        [*command, *map(str, options)], stderr=subprocess.PIPE, text=True
    ) as helper:
        try:
            assert helper.stderr
            line = helper.stderr.readline()
            assert line.startswith("rsplice: serving probes to nobody at "), line
            yield helper
        finally:
            helper.terminate()
            helper.wait(DEADLINE)


@pytest.fixture(scope="module")
def helper(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with serving("--socket", folder / "probes") as helper:
        yield helper


def run(folder: Path, program: str, *arguments: str | Path, **how: Any) -> str:
    """What a Python program of the user prints."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        unprivileged(sys.executable, "-c", program, *arguments),
        capture_output=True,
        text=True,
        env={**os.environ, "RSPLICE_PROBES": str(folder / "probes")},
        timeout=DEADLINE,
        cwd="/",
        **how,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def talk(folder: Path, *cases: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What a client hears that says what stands in each of *cases*, over a connection each."""
    heard = run(folder, TALK, input=json.dumps(cases))
    return [json.loads(line) for line in heard.splitlines()]


def attached(helper: subprocess.Popen[str]) -> int:
    """How many probes a helper has attached."""
    names = []
    for file in Path(f"/proc/{helper.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            names.append(os.readlink(file))
    return sum("bpf_link" in name or "bpf-raw-tp" in name for name in names)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What it does


def test_a_user_without_privileges_traces(helper: subprocess.Popen[str], folder: Path) -> None:
    found = json.loads(run(folder, TRACED, folder / "data"))
    size = 17 * 4096
    for name, rounds in (("meanwhile", 1), ("all", 3), ("inner", 1)):
        totals = found[name]["totals"]
        # Neither the requests nor the answers are counted.
        assert totals["payload_bytes"] == 2 * rounds * size
        assert (totals["shared"], totals["copy_bytes"]) == (rounds * size, 0)
        assert found[name]["accuracy"]["events_lost"] == 0
    command = found["command"]
    assert (command["command"], command["exit_status"]) == (["cat", str(folder / "data")], 0)
    written = [path for path in command["paths"] if path["destination"] == "/dev/null"]
    assert sum(path["payload_bytes"] for path in written) == 4096


def test_a_set_user_id_program_is_let_go_and_said(
    helper: subprocess.Popen[str], folder: Path
) -> None:
    audit = json.loads(run(folder, TRACED, folder / "data"))["set-user-ID"]
    assert audit["totals"]["payload_bytes"] == 0
    (missing,) = audit["accuracy"]["probes_missing"]
    assert missing["reason"].endswith("has run a program with other rights (su): let go")
    assert audit["accuracy"]["events_lost"] == 1


def test_a_child_with_other_rights_from_before_is_not_followed(
    helper: subprocess.Popen[str], folder: Path
) -> None:
    program = """
import json, subprocess, rsplice
child = subprocess.Popen(["su"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
with rsplice.trace(scope="all") as trace:
    pass
print(json.dumps([child.pid, trace.audit.to_json()]))
child.kill()
"""
    pid, audit = json.loads(run(folder, program))
    (missing,) = audit["accuracy"]["probes_missing"]
    assert missing["reason"] == f"process {pid} is not one of user {USER.pw_uid}: not traced"


def test_the_traces_of_a_client_that_dies_are_dropped(
    helper: subprocess.Popen[str], folder: Path
) -> None:
    program = (
        "import rsplice, time\nrsplice.trace().start()\nprint('on', flush=True)\ntime.sleep(1000)"
    )
    wait_until(lambda: attached(helper) == 0)
    with subprocess.Popen(
        unprivileged(sys.executable, "-c", program),
        stdout=subprocess.PIPE,
        env={**os.environ, "RSPLICE_PROBES": str(folder / "probes")},
        cwd="/",
    ) as client:
        assert client.stdout and client.stdout.readline() == b"on\n"
        assert attached(helper) > 10
        client.kill()
    wait_until(lambda: attached(helper) == 0)


def test_a_suite_is_run_by_a_user_without_privileges(folder: Path) -> None:
    """At the default place, found without being told."""
    suite = folder / "suite"
    suite.mkdir()
    (suite / "test_it.py").write_text(
        """
import os, pytest
def carry(how):
    source, null = os.open(__file__, os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    r, w = os.pipe()
    if how == "splice":
        os.splice(source, w, 100, offset_src=0)
    else:
        os.write(w, os.pread(source, 100, 0))
    os.splice(r, null, 100)
@pytest.mark.max_copied(0)
def test_empty():
    print("captured")
    import xml.sax
@pytest.mark.max_copied(0)
def test_splice(zero_copy):
    carry("splice")
    assert zero_copy.audit.payload_bytes == 200
@pytest.mark.max_copied(0)
def test_copy():
    carry("copy")
"""
    )
    command = unprivileged(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", suite)
    with serving():
        path = probes.socket_path(USER.pw_uid)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert os.stat(path).st_uid == USER.pw_uid
        done = subprocess.run(command, capture_output=True, text=True, cwd=suite, timeout=DEADLINE)
    assert "1 failed, 2 passed" in done.stdout, done.stdout
    assert "max_copied(0): 200 bytes copied" in done.stdout
    assert not os.path.exists(path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=suite, timeout=DEADLINE)
    assert "3 skipped" in done.stdout
    assert "no privilege for BPF" in done.stdout


# What it refuses

HELLO = '{"op": "hello"}\n'
START = '{"op": "start", "pids": [0]}\n'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"op": "start", "pids": [1]}', "process 1 is not one of user 65534: not traced"),
        ('{"op": "start", "pids": [SLEEPER]}', "process SLEEPER is not one of user 65534: not"),
        ('{"op": "start", "pids": [0, SLEEPER]}', "process SLEEPER is not one of user 65534"),
        ('{"op": "start", "pids": [999999999]}', "no process 999999999"),
        ('{"op": "start", "pids": [-1]}', "a pid is a positive number"),
        ('{"op": "start", "pids": [true]}', "pids is a list of int"),
        ('{"op": "start", "pids": "all"}', "pids is a list of int"),
        ('{"op": "start", "all": true}', "fields that are not known here: all"),
        ('{"op": "start", "cgroup": "/"}', "cgroups are not traced for others"),
        ('{"op": "start", "below": 1}', "below is true or false"),
        (json.dumps({"op": "start", "pids": [0] * 65}), "more than 64 pids"),
        ('{"op": "audit", "trace": 1}', "no such trace of this client"),
        ('{"op": "stop", "trace": true}', "no such trace of this client"),
        ('{"op": "aside", "tid": 1, "on": true}', "no such thread of this client"),
        ('{"op": "aside", "tid": SLEEPER, "on": true}', "no such thread of this client"),
        ('{"op": "aside", "tid": "PID", "on": true}', "no such thread of this client"),
        ('{"op": "aside", "tid": PID, "on": 1}', "on is true or false"),
        ('{"op": "hello"}', "hello comes once, with the descriptor of the connection"),
        ('{"op": "exec", "path": "/bin/sh"}', "no such operation; there are hello, start"),
        ('{"op": ["start"]}', "no such operation"),
        ('{"pids": [0]}', "no such operation"),
        ("[]", "a request is a JSON object on a line of its own"),
        ("not JSON", "a request is a JSON object on a line of its own"),
        ("\xff\xfe", "a request is a JSON object on a line of its own"),
        ("[" * 60000, "a request is a JSON object on a line of its own"),
        ("x" * (70 << 10), "a request is longer than 65536 bytes"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_refused(
    helper: subprocess.Popen[str],
    folder: Path,
    sleeper: subprocess.Popen[bytes],
    line: str,
    why: str,
) -> None:
    line, why = (text.replace("SLEEPER", str(sleeper.pid)) for text in (line, why))
    ((answer, *_),) = talk(folder, {"say": [line + "\n"]})
    assert answer.keys() == {"error"}
    assert answer["error"].startswith(why)
    assert attached(helper) == 0


def test_there_are_limits(helper: subprocess.Popen[str], folder: Path) -> None:
    aside = '{"op": "aside", "tid": PID, "on": true}\n'
    traces, files, asides = talk(
        folder,
        {"say": [START] * (probes.MAX_TRACES + 1)},
        {"say": [START], "files": probes.MAX_FILES + 1},
        {"say": [aside] * (probes.MAX_ASIDES + 1)},
    )
    assert all("ok" in answer for answer in traces[:-1])
    assert traces[-1] == {"error": "more than 64 traces at a time"}
    assert files == [{"error": "more than 32 descriptors"}]
    assert asides[:-1] == [{"ok": None}] * probes.MAX_ASIDES
    assert asides[-1] == {"error": "more than 256 threads set aside"}
    wait_until(lambda: attached(helper) == 0)


def test_a_client_cannot_read_the_traces_of_another(
    helper: subprocess.Popen[str], folder: Path
) -> None:
    program = f"""
import json, os, socket
one, other = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
for connection in (one, other):
    connection.connect(os.environ["RSPLICE_PROBES"])
one.sendall({START.encode()!r})
number = json.loads(one.recv(1000))["ok"]
for what in ("audit", "stop"):
    other.sendall(json.dumps({{"op": what, "trace": number}}).encode() + b"\\n")
    print(json.loads(other.recv(1000)))
"""
    assert run(folder, program) == "{'error': 'no such trace of this client'}\n" * 2


def test_other_users_are_refused(helper: subprocess.Popen[str], folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:  # root's
        connection.connect(str(folder / "probes"))
        assert json.loads(connection.recv(1000)) == {"error": "these probes are for user 65534"}
    program = "import socket, sys\nsocket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    done = subprocess.run(
        unprivileged(sys.executable, "-c", program, folder / "probes", uid=OTHER),
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert "PermissionError" in done.stderr


# Starting and ending


def command_fails(*options: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rsplice", "serve-probes", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout) == (125, "")
    return done.stderr


def test_a_socket_that_is_served_is_not_taken_over(
    helper: subprocess.Popen[str], folder: Path
) -> None:
    why = command_fails("--user", "nobody", "--socket", folder / "probes")
    assert why == f"rsplice: cannot listen at {folder}/probes: somebody serves there already\n"
    ((answer,),) = talk(folder, {"say": [START]})
    assert "ok" in answer


def test_a_socket_that_a_killed_helper_left_is_replaced(folder: Path) -> None:
    path = folder / "left"
    with serving("--socket", path) as killed:
        killed.kill()
        killed.wait()
        assert path.is_socket()
        with serving("--socket", path):
            pass
    assert not path.exists()


def test_what_is_no_socket_is_left_alone(folder: Path) -> None:
    path = folder / "file"
    path.write_text("kept")
    why = command_fails("--user", "nobody", "--socket", path)
    assert why == f"rsplice: cannot listen at {path}: it exists and is no socket\n"
    assert path.read_text() == "kept"


def test_in_a_directory_of_others_the_socket_is_made_with_the_users_own_rights(
    folder: Path,
) -> None:
    """Nobody can have root change the owner of another file."""
    for owner, mode, works in (
        (USER.pw_uid, 0o700, True),
        (0, 0o1777, True),
        (OTHER, 0o755, False),
    ):
        directory = folder / f"of-{owner}"
        directory.mkdir()
        os.chown(directory, owner, owner)
        directory.chmod(mode)
        path = directory / "probes"
        if works:
            with serving("--socket", path):
                assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (65534, 0o600)
        else:
            why = command_fails("--user", "nobody", "--socket", path)
            assert why == f"rsplice: cannot listen at {path}: Permission denied\n"


def test_a_user_has_to_be_named_and_to_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    assert command_fails() == "rsplice: whom to serve is not known: give --user NAME\n"
    why = command_fails("--user", "no-such-user")
    assert why == "rsplice: no user no-such-user: give --user a name of /etc/passwd\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(folder: Path, number: signal.Signals) -> None:
    with serving("--socket", folder / "ended") as helper:
        helper.send_signal(number)
        assert helper.wait(DEADLINE) == 0
        assert helper.stderr and helper.stderr.read() == ""
    assert not (folder / "ended").exists()


def test_without_a_helper_the_reason_names_the_socket(folder: Path) -> None:
    program = """
import rsplice
try:
    rsplice.trace().start()
except rsplice.RspliceError as error:
    print(error)
"""
    done = subprocess.run(
        unprivileged(sys.executable, "-c", program),
        capture_output=True,
        text=True,
        env={**os.environ, "RSPLICE_PROBES": "/no/such/socket"},
        cwd="/",
    )
    assert done.stdout == (
        "no probes at /no/such/socket: No such file or directory; "
        "start 'rsplice serve-probes' as root\n"
    )


def test_a_process_that_turns_out_to_be_anothers_is_disavowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As if the pid had been taken by another process between the check and the following."""
    data_file = tmp_path / "data"
    data_file.write_bytes(bytes(4099))
    made = engine.Engine(owner=USER.pw_uid)
    answers = iter([True, False])
    monkeypatch.setattr(engine, "_is_owned_by", lambda pid, owner: next(answers))
    monkeypatch.setattr(engine, "_descendants", lambda pids: [os.getpid()] if not pids else [])
    follow = made._counters.follow_as

    def follow_and_work(*arguments: Any) -> None:
        follow(*arguments)
        work = threading.Thread(target=data_file.read_bytes)
        work.start()
        work.join()

    monkeypatch.setattr(made._counters, "follow_as", follow_and_work)
    try:
        number = made.start(engine.Wanted(below=True))
        data_file.read_bytes()
        audit = made.stop(number)
    finally:
        made.close()
    assert audit.paths == []
    assert audit.processes == []
    assert audit.accuracy.events_lost == 1
    (missing,) = [each for each in audit.accuracy.probes_missing if each.probe == "process"]
    assert missing.reason == f"process {os.getpid()} is not one of user {USER.pw_uid}: not traced"


def test_there_is_room_for_so_many_clients(helper: subprocess.Popen[str], folder: Path) -> None:
    program = f"""
import json, os, socket
clients = []
for _ in range({probes.MAX_CLIENTS + 1}):
    clients.append(socket.socket(socket.AF_UNIX))
    clients[-1].connect(os.environ["RSPLICE_PROBES"])
print(json.loads(clients[-1].recv(1000)))
clients[0].sendall({START.encode()!r})
print(list(json.loads(clients[0].recv(1000))))
"""
    assert run(folder, program) == "{'error': 'too many clients'}\n['ok']\n"
    wait_until(lambda: attached(helper) == 0)


@pytest.mark.parametrize(
    ("lacking", "why"),
    [("exec", "no exec probe"), ("cred", "this kernel has no task_struct.cred")],
)
def test_where_owners_cannot_be_told_nobody_is_served(
    monkeypatch: pytest.MonkeyPatch, lacking: str, why: str
) -> None:
    if lacking == "exec":
        kept = [probe for probe in tracers.PROBES if probe.tracepoint != "sched_process_exec"]
        monkeypatch.setattr(tracers, "PROBES", tuple(kept))
    else:
        resolve = layouts.resolve

        def without_owner(btf: Btf) -> layouts.Layout:
            layout = resolve(btf)
            layout.missing["owner"] = why
            return layout

        monkeypatch.setattr(layouts, "resolve", without_owner)
    with pytest.raises(RspliceError, match=why):
        engine.Engine(owner=USER.pw_uid)
