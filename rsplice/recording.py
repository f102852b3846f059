# SPDX-License-Identifier: MIT
"""Snapshots kept in a file, and played again.

A recording is a file of JSON lines: a header ``{"schema": "rsplice.recording/1", ...}``, then a
line ``{"t": seconds, "audit": {...}}`` for each snapshot, the last one with ``"end": true``.
An audit without ``journeys`` has those of the snapshot before; the last one has its own.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import is_dataclass
from functools import cache
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, get_args, get_origin, get_type_hints

from rsplice import __version__
from rsplice.audit import Audit
from rsplice.dashboards.text import sanitise
from rsplice.errors import RspliceError
from rsplice.journey import Journeys

SCHEMA = "rsplice.recording/1"
_HEADER_MAX = 1 << 20  #: bytes
_AUDIT_MAX = 1 << 28  #: bytes
_INTEGER_MAX = 1 << 64


class Recorder:
    """Writes a recording; what was written so far can be played, even after a crash.

    A file of that name is replaced, never followed or written into. "-" is the standard output.

    :raises RspliceError: the file cannot be made
    """

    def __init__(self, path: str, command: Sequence[str] = ()) -> None:
        self._path = path
        self._journeys: Journeys | None = None  #: those written last
        if path == "-":
            self._file = open(os.dup(1), "wb")  # noqa: SIM115 (closed by close())
            self._line({"schema": SCHEMA, "rsplice": __version__, "command": list(command)})
            return
        try:
            _refuse_special(path)
            number, temporary = tempfile.mkstemp(".tmp", ".rsplice-", os.path.dirname(path) or ".")
        except OSError as error:
            raise self._failure(error) from error
        self._file = open(number, "wb")  # noqa: SIM115 (closed by close())
        try:
            self._line({"schema": SCHEMA, "rsplice": __version__, "command": list(command)})
            os.replace(temporary, path)
        except (OSError, RspliceError) as error:
            self.close()
            os.unlink(temporary)
            raise self._failure(error) if isinstance(error, OSError) else error from error

    def write(self, audit: Audit, *, end: bool = False) -> None:
        """Adds a snapshot, at the time ``audit.duration_s``; the last one with *end*.

        :raises RspliceError: it cannot be written (a full disk)
        """
        entry: dict[str, Any] = {"t": round(audit.duration_s, 6), "audit": audit.to_json()}
        if audit.journeys and audit.journeys == self._journeys and not end:
            del entry["audit"]["journeys"]
        self._journeys = deepcopy(audit.journeys)
        self._line(entry | {"end": True} if end else entry)

    def close(self) -> None:
        """Closes the file. What could not be written was already complained of."""
        with suppress(OSError):
            self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _line(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> RspliceError:
        return RspliceError(f"cannot write the recording {sanitise(self._path)}: {error.strerror}")


def _refuse_special(path: str) -> None:
    """Replacing /dev/null, or a link like /dev/stdout, would damage the system."""
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise RspliceError(
            f"cannot write the recording {sanitise(path)}: it is no regular file; name another one"
        )


class _Snapshot(NamedTuple):
    at: float
    line: bytes
    journeys: bytes  #: the line that has its journeys; b"" if none has


class Recording:
    """A source that plays a recording in recorded time, which starts at the first snapshot().

    :param speed: recorded seconds per second
    :param clock: the time in seconds
    :raises RspliceError: the file cannot be read, or is no recording
    """

    def __init__(
        self, path: str, *, speed: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._speed = speed
        self._clock = clock
        self._started: float | None = None
        self._held: float | None = None
        #: why the recording does not reach the end of what it recorded, or ""
        self.cut_short = "it has no end, rsplice was killed while recording"
        try:
            with open(path, "rb") as file:
                _read_header(file)
                self._snapshots = list(self._read(file))
            self.final = self._audit(-1)  #: the last snapshot
        except OSError as error:
            raise RspliceError(f"cannot read {sanitise(path)}: {error.strerror}") from error
        except (ValueError, IndexError) as error:
            reason = str(error) if isinstance(error, ValueError) else "it holds no snapshot"
            raise RspliceError(f"{sanitise(path)} is no recording: {sanitise(reason)}") from error

    @property
    def duration_s(self) -> float:
        """Seconds from the first snapshot to the last."""
        return self._snapshots[-1].at - self._snapshots[0].at

    @property
    def running(self) -> bool:
        """False once the last snapshot is reached."""
        return self._elapsed() < self.duration_s

    def snapshot(self) -> Audit:
        """The snapshot of the present recorded time."""
        at = self._snapshots[0].at + self._elapsed()
        return self._audit(bisect_right(self._snapshots, at, key=lambda s: s.at) - 1)

    def hold(self, still: bool) -> None:
        """Stops recorded time, or lets it go on."""
        if still and self._held is None:
            self._held = self._clock()
        elif not still and self._held is not None and self._started is not None:
            self._started += self._clock() - self._held
            self._held = None

    def _elapsed(self) -> float:
        now = self._clock() if self._held is None else self._held
        if self._started is None:
            self._started = now
        return (now - self._started) * self._speed

    def _audit(self, index: int) -> Audit:
        snapshot = self._snapshots[index]
        data = json.loads(snapshot.line)["audit"]
        if snapshot.journeys and not data.get("journeys"):
            data["journeys"] = json.loads(snapshot.journeys)["audit"]["journeys"]
        return parse_audit(data)

    def _read(self, file: BinaryIO) -> Iterator[_Snapshot]:
        last, journeys = 0.0, b""
        for number, line in enumerate(file, start=2):
            try:
                snapshot, end = _read_snapshot(line, last, journeys)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"line {number}: {error}") from error
                self.cut_short = "its last line is cut off"
                return
            if end:
                self.cut_short = ""
            last, journeys = snapshot.at, snapshot.journeys
            yield snapshot


def _read_header(file: BinaryIO) -> None:
    try:
        header = _decode(file.readline(_HEADER_MAX))
    except ValueError:
        header = None
    schema = header.get("schema") if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"its first line lacks the schema {SCHEMA}")


def _read_snapshot(line: bytes, earliest: float, journeys: bytes) -> tuple[_Snapshot, bool]:
    entry = _decode(line)
    if not isinstance(entry, dict) or "audit" not in entry:
        raise ValueError("no snapshot")
    at: Any = entry.get("t")
    _check(at, float, "t")
    if at < earliest:
        raise ValueError("time runs backwards")
    has_journeys = parse_audit(entry["audit"]).journeys is not None
    return _Snapshot(at, line, line if has_journeys else journeys), bool(entry.get("end"))


def load_audit(path: str) -> Audit:
    """The audit in the JSON file *path*.

    :raises RspliceError: the file cannot be read, or holds no audit
    """
    try:
        with open(path, "rb") as file:
            return parse_audit(_decode(file.read(_AUDIT_MAX)))
    except OSError as error:
        raise RspliceError(f"cannot read {sanitise(path)}: {error.strerror}") from error
    except ValueError as error:
        reason = sanitise(str(error))
        raise RspliceError(f"{sanitise(path)} is no audit in JSON: {reason}") from error


def parse_audit(data: Any) -> Audit:
    """The audit of a decoded document, with every value of the type that views rely on.

    :raises ValueError: the document is no audit
    """
    if not isinstance(data, dict):
        raise ValueError("no object")
    try:
        audit = Audit.from_json(data)
    except KeyError as error:
        raise ValueError(f"{error} is missing or unknown") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError("a value has the wrong type") from error
    _check(audit, Audit, "audit")
    return audit


def _decode(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError("not JSON") from error


def _check(value: Any, hint: Any, where: str) -> None:
    """ValueError unless *value* is of the type *hint*, all through."""
    if not _fits(value, hint):
        raise ValueError(f"{where} has the wrong type or is out of range")
    if type(None) in get_args(hint):
        if value is None:
            return
        hint = get_args(hint)[0]
    if isinstance(hint, type) and is_dataclass(hint):
        for name, inner in _hints(hint).items():
            _check(getattr(value, name), inner, name)
    elif get_origin(hint) is list:
        for item in value:
            _check(item, get_args(hint)[0], where)


def _fits(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if hint is int:
        return type(value) is int and abs(value) < _INTEGER_MAX
    if type(None) in get_args(hint):
        return value is None or _fits(value, get_args(hint)[0])
    return isinstance(value, get_origin(hint) or hint)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
