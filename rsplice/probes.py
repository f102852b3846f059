# SPDX-License-Identifier: MIT
"""Probes of another process: what `rsplice serve-probes` and its clients say to each other.

A client connects to a unix socket and sends requests, each a JSON object on a line of its own; each
is answered by one line, ``{"ok": ...}`` or ``{"error": "why"}``, with the ``id`` of the request if
it has one. Descriptors go with the first byte of the request that they belong to (SCM_RIGHTS).

    {"op": "hello"}                           first; the connection's own socket goes with it
    {"op": "start", "pids": [0], ...}         the fields of a Wanted; 0 is the client. -> its number
    {"op": "audit", "trace": 1}               -> the audit so far, schema rsplice.audit/1
    {"op": "stop", "trace": 1}                -> the audit
    {"op": "adopt", "trace": 1, "tid": 4711}  processes that this thread starts are in the trace
    {"op": "aside", "tid": 4711, "on": true}  what this thread does is no work of the traced code
    {"op": "hold", "on": true}                keeps the probes attached between traces
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rsplice.audit import Audit
from rsplice.engine import ASIDE, Engine, Wanted
from rsplice.errors import RspliceError
from rsplice.tracers.program import BpfError

MAX_REQUEST = 64 << 10  #: bytes of a line
MAX_TRACES = 64  #: of a client, at a time
MAX_PIDS = 64  #: of a trace
MAX_FILES = 32  #: that a trace leaves out
MAX_CLIENTS = 64
MAX_ASIDES = 256  #: threads of a client

_UCRED = struct.Struct("=iII")


def peer(connection: socket.socket) -> tuple[int, int]:
    """The pid and the uid of who is at the other end of a unix socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


def socket_path(uid: int) -> str:
    """Where a user's probes are served by default."""
    return f"/run/rsplice/{uid}.socket"


def served_path() -> str | None:
    """The socket of this user's probes: of RSPLICE_PROBES, else the first that there is."""
    if path := os.environ.get("RSPLICE_PROBES"):
        return path
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    candidates = [f"{runtime}/rsplice/probes"] if runtime else []
    candidates.append(socket_path(os.getuid()))
    return next((path for path in candidates if os.path.exists(path)), None)


class RemoteProbes:
    """The probes of a helper, as rsplice.tracing wants them.

    :param path: its socket
    :raises RspliceError: nobody serves there, or somebody who is not to be trusted
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._answers = b""
        self._numbers = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
            _, uid = peer(self._socket)
            if uid not in (0, os.getuid()):
                raise RspliceError(f"{path} is served by user {uid}: not trusted")
            self._ask({"op": "hello"}, [self._socket.fileno()])
        except OSError as error:
            self._socket.close()
            raise RspliceError(
                f"no probes at {path}: {error.strerror}; start 'rsplice serve-probes' as root"
            ) from error
        except BaseException:
            self._socket.close()
            raise

    def start(self, wanted: Wanted) -> int:
        request = {
            "op": "start",
            "pids": [0 if pid == os.getpid() else pid for pid in wanted.pids],
            "below": wanted.below,
            "aside": wanted.aside,
            "command": list(wanted.command),
        }
        if wanted.cgroup:
            request["cgroup"] = wanted.cgroup
        return int(self._ask(request, wanted.left_out))

    def stop(self, number: int) -> Audit:
        return Audit.from_json(self._ask({"op": "stop", "trace": number}))

    def audit(self, number: int) -> Audit:
        return Audit.from_json(self._ask({"op": "audit", "trace": number}))

    def adopt(self, tid: int, number: int) -> None:
        self._ask({"op": "adopt", "trace": number, "tid": tid})

    def set_aside(self, tid: int, flags: int) -> None:
        self._ask({"op": "aside", "tid": tid, "on": bool(flags)})

    def hold(self, held: bool) -> None:
        self._ask({"op": "hold", "on": held})

    def close(self) -> None:
        """Goes; the helper then ends what traces there are."""
        self._socket.close()

    abandon = close

    def _ask(self, request: dict[str, Any], files: Sequence[int] = ()) -> Any:
        with self._lock:
            number = next(self._numbers)
            line = json.dumps({**request, "id": number}).encode() + b"\n"
            try:
                sent = socket.send_fds(self._socket, [line], list(files)) if files else 0
                self._socket.sendall(line[sent:])
                answer = self._answer()
                # A signal's exception may have kept an answer from who had asked for it.
                while answer.get("id", number) != number:
                    answer = self._answer()
            except OSError as error:
                raise RspliceError(f"the probes at {self._path} are gone: {error}") from error
        if "error" in answer:
            raise RspliceError(f"the probes at {self._path}: {answer['error']}")
        return answer["ok"]

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._answers:
            part = self._socket.recv(1 << 16)
            if not part:
                raise OSError("connection closed")
            self._answers += part
        line, _, self._answers = self._answers.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise OSError("no answer of rsplice serve-probes")
        return answer


class _Refused(Exception):
    """A request that makes no sense, or is beyond a limit: the message says why."""


class Client:
    """One client of a helper: does what it asks for, within its rights.

    :param connection: closed at the end, with all that the client had begun
    :param engine: its owner is the only one who may connect
    """

    def __init__(self, connection: socket.socket, engine: Engine, owner: int) -> None:
        self._socket = connection
        self._engine = engine
        self._owner = owner
        self._pid, self._uid = peer(connection)
        self._files: list[int] = []  # received, and not yet asked about
        self._traces: set[int] = set()
        self._asides: list[int] = []
        self._own: int | None = None
        self._held = False

    def serve(self) -> None:
        """Answers until the client goes, or says what cannot be understood."""
        try:
            if self._uid != self._owner:
                self._say({"error": f"these probes are for user {self._owner}"})
                return
            self._answer_all()
        except OSError:
            pass  # it has gone
        finally:
            self._clean_up()

    def _answer_all(self) -> None:
        data = b""
        while True:
            *lines, data = data.split(b"\n")
            for line in lines:
                if len(line) <= MAX_REQUEST and not self._answer(line):
                    return
            if max(map(len, [*lines, data])) > MAX_REQUEST:
                self._say({"error": f"a request is longer than {MAX_REQUEST} bytes"})
                return
            part, files, flags, _ = socket.recv_fds(self._socket, 1 << 16, MAX_FILES + 1)
            self._files += files
            if not part:
                return
            if flags & socket.MSG_CTRUNC or len(self._files) > MAX_FILES:
                self._say({"error": f"more than {MAX_FILES} descriptors"})
                return
            data += part

    def _answer(self, line: bytes) -> bool:
        """Answers one request. False if the client is not to be listened to any more."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError
        except (ValueError, RecursionError):
            self._say({"error": "a request is a JSON object on a line of its own"})
            return False
        number = request.pop("id", None)
        named = {"id": number} if type(number) is int else {}
        try:
            answer = {"ok": self._do(request)}
        except (_Refused, RspliceError) as error:
            answer = {"error": str(error)}
        except (OSError, BpfError) as error:
            answer = {"error": f"cannot do that: {os.strerror(error.errno or errno.EIO)}"}
        finally:
            self._close_files()
        self._say({**named, **answer})
        return True

    def _say(self, answer: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(answer).encode() + b"\n")

    def _do(self, request: dict[str, Any]) -> Any:
        operation = request.pop("op", None)
        known = {
            "hello": self._hello,
            "start": self._start,
            "audit": self._audit,
            "stop": self._stop,
            "adopt": self._adopt,
            "aside": self._set_aside,
            "hold": self._hold,
        }
        if not isinstance(operation, str) or operation not in known:
            raise _Refused(f"no such operation; there are {', '.join(known)}")
        return known[operation](request)

    def _hello(self, request: dict[str, Any]) -> dict[str, str]:
        from rsplice import __version__

        _no_more(request)
        if len(self._files) != 1 or self._own is not None:
            raise _Refused("hello comes once, with the descriptor of the connection")
        # What the client says here is no work of what it traces.
        self._own = self._engine.own(self._files[0])
        return {"rsplice": __version__}

    def _start(self, request: dict[str, Any]) -> int:
        if len(self._traces) >= MAX_TRACES:
            raise _Refused(f"more than {MAX_TRACES} traces at a time")
        pids = _list_of(request, "pids", int, MAX_PIDS)
        command = _list_of(request, "command", str, MAX_REQUEST)
        below, aside = _flag(request, "below"), _flag(request, "aside")
        if "cgroup" in request:
            raise _Refused("cgroups are not traced for others: run rsplice as root")
        _no_more(request)
        if any(pid < 0 for pid in pids):
            raise _Refused("a pid is a positive number")
        wanted = Wanted(
            tuple(pid or self._pid for pid in pids),
            below,
            left_out=tuple(self._files),
            aside=aside,
            command=tuple(command),
        )
        number = self._engine.start(wanted)
        self._traces.add(number)
        return number

    def _audit(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._engine.audit(self._trace(request)).to_json()

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        number = self._trace(request)
        audit = self._engine.stop(number)
        self._traces.remove(number)
        return audit.to_json()

    def _adopt(self, request: dict[str, Any]) -> None:
        tid = self._thread(request)
        number = self._trace(request)
        self._remember(tid)
        self._engine.adopt(tid, number)

    def _set_aside(self, request: dict[str, Any]) -> None:
        on = _flag(request, "on")
        tid = self._thread(request)
        _no_more(request)
        if on:
            self._remember(tid)
            self._engine.set_aside(tid, ASIDE)
        elif tid in self._asides:
            self._asides.remove(tid)
            self._engine.set_aside(tid, 0)

    def _hold(self, request: dict[str, Any]) -> None:
        on = _flag(request, "on")
        _no_more(request)
        if on != self._held:
            self._held = on
            self._engine.hold(on)

    def _remember(self, tid: int) -> None:
        if len(self._asides) >= MAX_ASIDES:
            raise _Refused(f"more than {MAX_ASIDES} threads set aside")
        self._asides.append(tid)

    def _trace(self, request: dict[str, Any]) -> int:
        number = request.pop("trace", None)
        _no_more(request)
        if not isinstance(number, int) or number not in self._traces:
            raise _Refused("no such trace of this client")
        return number

    def _thread(self, request: dict[str, Any]) -> int:
        """A thread of the client itself."""
        tid = request.pop("tid", None)
        if type(tid) is not int or tid <= 0 or not os.path.exists(f"/proc/{self._pid}/task/{tid}"):
            raise _Refused("no such thread of this client")
        return tid

    def _close_files(self) -> None:
        for descriptor in self._files:
            with suppress(OSError):
                os.close(descriptor)
        self._files.clear()

    def _clean_up(self) -> None:
        with suppress(BpfError):  # the helper ends
            for number in self._traces:
                self._engine.drop(number)
            for tid in self._asides:
                self._engine.set_aside(tid, 0)
            if self._own is not None:
                self._engine.disown(self._own)
            if self._held:
                self._engine.hold(False)
        self._close_files()
        self._socket.close()


def _list_of(request: dict[str, Any], name: str, kind: type, most: int) -> list[Any]:
    found = request.pop(name, [])
    if not isinstance(found, list) or any(type(each) is not kind for each in found):
        raise _Refused(f"{name} is a list of {kind.__name__}")
    if len(found) > most:
        raise _Refused(f"more than {most} {name}")
    return found


def _flag(request: dict[str, Any], name: str) -> bool:
    found = request.pop(name, False)
    if not isinstance(found, bool):
        raise _Refused(f"{name} is true or false")
    return found


def _no_more(request: dict[str, Any]) -> None:
    if request:
        raise _Refused("fields that are not known here: " + ", ".join(sorted(request))[:200])
