# SPDX-License-Identifier: MIT
"""Recordings: kept, played in recorded time, and refused with one line when they are bad."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest

from rsplice.audit import Audit
from rsplice.dashboards.live import Holdable
from rsplice.errors import RspliceError
from rsplice.journey import Journeys, Step, Story
from rsplice.recording import Recorder, Recording, load_audit, parse_audit
from tests.test_report import EVIL, audit_of, read_path, sample

ROOT = File(__file__).parent.parent


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def audit_at(seconds: float) -> Audit:
    return replace(audit_of(read_path(round(seconds))), duration_s=seconds)


def record(path: File, *times: float, end: bool = True) -> File:
    """A recording of one snapshot for each of *times*."""
    with Recorder(str(path), ["cp", EVIL]) as recorder:
        for at in times:
            recorder.write(audit_at(at), end=end and at == times[-1])
    return path


def play(path: File, speed: float = 1.0) -> tuple[Recording, Clock]:
    clock = Clock()
    return Recording(str(path), speed=speed, clock=clock), clock


def test_the_format(tmp_path: File) -> None:
    path = record(tmp_path / "r", 2.0, 3.0)
    header, first, last = map(json.loads, path.read_text().splitlines())
    assert (header["schema"], header["command"]) == ("rsplice.recording/1", ["cp", EVIL])
    assert first == {"t": 2.0, "audit": audit_at(2.0).to_json()}
    assert last == {"t": 3.0, "audit": audit_at(3.0).to_json(), "end": True}


def test_everything_comes_back(tmp_path: File) -> None:
    with Recorder(str(tmp_path / "r")) as recorder:
        recorder.write(sample(), end=True)
    recording = Recording(str(tmp_path / "r"))
    assert recording.final == recording.snapshot() == sample()
    assert recording.cut_short == ""


def with_journeys(at: float, steps: int) -> Audit:
    """A snapshot of one page that so many steps are known of; of none where there are none."""
    journeys = Journeys(1, "", [], 0, "any")
    if steps:
        told = [Step(n, "queued", EVIL, 7, EVIL, 1, 0, ["lru"], EVIL) for n in range(steps)]
        journeys.stories = [Story(1, told, frame=4711, findings=["stranded"])]
    return replace(audit_at(at), journeys=journeys)


def test_journeys_are_kept_once_and_shown_in_each_snapshot(tmp_path: File) -> None:
    path = tmp_path / "r"
    steps = [0, 0, 3, 3, 3, 5, 5, 5]
    audits = [with_journeys(float(at), number) for at, number in enumerate(steps)]
    with Recorder(str(path)) as recorder:
        for audit in audits:
            recorder.write(audit, end=audit is audits[-1])
    kept = ["journeys" in json.loads(line)["audit"] for line in path.read_text().splitlines()[1:]]
    assert kept == [True, False, True, False, False, True, False, True]
    recording, clock = play(path)
    for audit in audits:
        assert recording.snapshot() == audit
        clock.now += 1
    assert recording.final == audits[-1]


def test_recordings_without_journeys_have_none(tmp_path: File) -> None:
    assert Recording(str(record(tmp_path / "r", 2.0, 3.0))).final.journeys is None


def test_it_plays_in_recorded_time(tmp_path: File) -> None:
    recording, clock = play(record(tmp_path / "r", 2.0, 3.0, 5.0, 7.0), speed=2.0)
    seen = []
    for _ in range(6):
        seen.append((recording.running, recording.snapshot().duration_s))
        clock.now += 0.5
    assert seen == [
        (True, 2.0),
        (True, 3.0),
        (True, 3.0),
        (True, 5.0),
        (True, 5.0),
        (False, 7.0),
    ]


def test_it_can_be_held(tmp_path: File) -> None:
    recording, clock = play(record(tmp_path / "r", 2.0, 3.0))
    assert isinstance(recording, Holdable)
    assert recording.snapshot().duration_s == 2.0
    recording.hold(True)
    clock.now += 23
    assert recording.running
    assert recording.snapshot().duration_s == 2.0
    recording.hold(False)
    assert recording.running
    clock.now += 1
    assert not recording.running


def test_a_cut_last_line_is_left_out_and_said(tmp_path: File) -> None:
    path = record(tmp_path / "r", 2.0, 3.0)
    path.write_bytes(path.read_bytes()[:-7])
    recording = Recording(str(path))
    assert recording.cut_short == "its last line is cut off"
    assert recording.final.duration_s == 2.0


def test_a_missing_end_is_said(tmp_path: File) -> None:
    recording = Recording(str(record(tmp_path / "r", 2.0, 3.0, end=False)))
    assert "no end" in recording.cut_short
    assert recording.final.duration_s == 3.0


def test_an_unfinished_recording_can_be_read(tmp_path: File) -> None:
    recorder = Recorder(str(tmp_path / "r"))
    recorder.write(audit_at(2.0))
    assert Recording(str(tmp_path / "r")).final.duration_s == 2.0
    recorder.close()


def edited(key: str, value: Any) -> bytes:
    """A snapshot with a total or another value changed."""
    audit = sample().to_json()
    target = audit["totals"] if key in audit["totals"] else audit
    target[key] = value
    return json.dumps({"t": 2.0, "audit": audit}).encode() + b"\n"


HEADER = b'{"schema": "rsplice.recording/1"}\n'
GOOD = edited("exit_status", 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its first line lacks the schema"),
        (b"\x7fELF\x00\xff\n", "its first line lacks the schema"),
        (b"[1]\n", "its first line lacks the schema"),
        (b"[" * 100_000, "its first line lacks the schema"),
        (b'{"schema": "rsplice.recording/2"}\n', "its first line lacks the schema"),
        (HEADER, "it holds no snapshot"),
        (HEADER + GOOD[:-23], "it holds no snapshot"),
        (HEADER + b"nonsense\n" + GOOD, "line 2: not JSON"),
        (HEADER + GOOD + b"\xff\xfe\n", "line 3: not JSON"),
        (HEADER + b"[" * 100_000 + b"\n", "line 2: it is nested too deeply"),
        (HEADER + b"[]\n", "line 2: no snapshot"),
        (HEADER + GOOD.replace(b'"t": 2.0', b'"t": "2"'), "line 2: t has the wrong type"),
        (HEADER + GOOD.replace(b'"t": 2.0', b'"t": NaN'), "line 2: t has the wrong type"),
        (HEADER + GOOD + GOOD.replace(b'"t": 2.0', b'"t": 1.0'), "line 3: time runs backwards"),
        (HEADER + edited("schema", "x"), "line 2: schema is 'x'"),
        (HEADER + edited("paths", None), "line 2: a value has the wrong type"),
        (HEADER + edited("paths", [{}]), "line 2: 'source' is missing"),
        (HEADER + edited("evidence", "rumour"), "line 2: 'RUMOUR' is missing or unknown"),
        (HEADER + edited("copied", "x"), "line 2: "),
        (HEADER + edited("copied", float("inf")), "line 2: a value has the wrong type"),
        (HEADER + edited("copied", 1 << 64), "line 2: copied has the wrong type or is out"),
        (HEADER + edited("duration_s", float("nan")), "line 2: duration_s has the wrong"),
        (HEADER + edited("exit_status", "0"), "line 2: exit_status has the wrong type"),
        (HEADER + edited("command", [7]), "line 2: command has the wrong type"),
    ],
)
def test_bad_recordings_are_refused_with_one_line(
    tmp_path: File, content: bytes, reason: str
) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(RspliceError) as caught:
        Recording(str(path))
    assert f"{path} is no recording: {reason}" in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_good_line_of_those_is_good(tmp_path: File) -> None:
    path = tmp_path / "r"
    path.write_bytes(HEADER + GOOD)
    assert Recording(str(path)).final == sample()


def test_what_cannot_be_read_is_one_line(tmp_path: File) -> None:
    with pytest.raises(RspliceError, match="^cannot read .*absent: No such file or directory$"):
        Recording(str(tmp_path / "absent"))
    with pytest.raises(RspliceError, match="Is a directory$"):
        Recording(str(tmp_path))
    with pytest.raises(RspliceError, match="^cannot read .*absent: No such file or directory$"):
        load_audit(str(tmp_path / "absent"))


@pytest.mark.parametrize("document", [None, [], "x", 7, {}])
def test_what_is_no_audit(document: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_audit(document)


def test_only_the_owner_may_read_a_recording(tmp_path: File) -> None:
    old = os.umask(0)
    try:
        path = record(tmp_path / "r", 2.0)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_is_replaced_not_written_into(tmp_path: File) -> None:
    other, path = tmp_path / "other", tmp_path / "r"
    other.write_text("precious")
    os.link(other, path)
    record(path, 2.0)
    assert other.read_text() == "precious"
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["other", "r"]


def test_links_and_devices_are_refused(tmp_path: File) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", ""):
        with pytest.raises(RspliceError, match="it is no regular file; name another one$"):
            Recorder(str(tmp_path / name))
    assert not (tmp_path / "victim").exists()


def test_a_missing_directory_is_one_line(tmp_path: File) -> None:
    with pytest.raises(RspliceError, match="^cannot write .*/absent/r: No such file or directory$"):
        Recorder(str(tmp_path / "absent" / "r"))


FULL = """
import resource, signal, sys
from rsplice.errors import RspliceError
from rsplice.recording import Recorder
from tests.test_report import sample

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with Recorder(sys.argv[1]) as recorder:
        for _ in range(23):
            recorder.write(sample())
except RspliceError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(("room", "left"), [(10, False), (20_000, True)])
def test_no_room_is_one_line(tmp_path: File, room: int, left: bool) -> None:
    path = tmp_path / "r"
    run = subprocess.run(
        [sys.executable, "-B", "-c", FULL, str(path), str(room)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr == f"cannot write the recording {path}: File too large\n"
    assert [entry.name for entry in tmp_path.iterdir()] == (["r"] if left else [])
    if left:
        assert Recording(str(path)).final == sample()
