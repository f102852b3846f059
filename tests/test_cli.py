# SPDX-License-Identifier: MIT
"""The command line: help, errors in one line, exit statuses, replay and diff."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path as File
from types import ModuleType
from typing import Any

import pytest

from rsplice import __version__
from rsplice.audit import Audit
from rsplice.cli import COMMANDS, main
from rsplice.commands.diff import differences
from rsplice.errors import RspliceError
from rsplice.recording import Recorder
from tests.test_report import (
    EVIL,
    EVIL_SHOWN,
    audit_of,
    bounced_path,
    read_path,
    sample,
    splice_path,
    unknown_path,
)

ROOT = File(__file__).parent.parent


def rsplice(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does."""
    defaults: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stdin": subprocess.DEVNULL,
        "env": {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    }
    return subprocess.run(
        [sys.executable, "-m", "rsplice", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
        **(defaults | options),
    )


@pytest.fixture
def recording(tmp_path: File) -> str:
    path = str(tmp_path / "recording")
    with Recorder(path) as recorder:
        recorder.write(sample(), end=True)
    return path


def audit_file(path: File, audit: Audit) -> str:
    path.write_text(json.dumps(audit.to_json()))
    return str(path)


def test_help_names_every_command() -> None:
    run = rsplice("--help")
    assert run.returncode == 0
    for name, summary in COMMANDS.items():
        assert re.search(rf"^ +{name}( |$)", run.stdout, re.M)
        assert summary in run.stdout
    assert "EXAMPLES\n" in run.stdout
    assert rsplice("--version").stdout == f"rsplice {__version__}\n"


@pytest.mark.parametrize("name", ["replay", "diff"])
def test_help_of_a_command_ends_with_examples(name: str) -> None:
    run = rsplice(name, "--help")
    assert run.returncode == 0
    description, examples = run.stdout.split("EXAMPLES\n")
    assert "options:" in description
    assert f"rsplice {name} " in examples


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nope"], "invalid choice: 'nope'"),
        ([EVIL], "invalid choice"),
        (["replay"], "the following arguments are required: FILE"),
        (["replay", "--speed", "0", "f"], "argument --speed: '0' is no positive number"),
        (["replay", "--speed", "nan", "f"], "argument --speed: 'nan' is no positive number"),
        (["replay", "--spe", "1", "f"], "unrecognized arguments: --spe"),
        (["replay", "/absent"], "cannot read /absent: No such file or directory"),
        (["diff", "/absent", "/absent"], "cannot read /absent: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_125(words: list[str], reason: str) -> None:
    run = rsplice(*words)
    assert run.returncode == 125
    assert run.stdout == ""
    assert run.stderr.startswith("rsplice: ")
    assert reason in run.stderr
    assert run.stderr.removesuffix("\n").isprintable()


def test_nothing_is_imported_before_it_is_needed() -> None:
    script = (
        "import sys; from rsplice.cli import main; main(['diff', '--help']); "
        "print([m for m in ('rich', 'cffi', 'bcc', 'rsplice.commands.replay') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.endswith("[]\n")


def command(
    monkeypatch: pytest.MonkeyPatch, result: int | BaseException | Callable[[], None]
) -> None:
    """Makes ``rsplice diff`` end with *result*, or with 0 after calling it."""

    def run(args: object) -> int:
        if isinstance(result, BaseException):
            raise result
        if isinstance(result, int):
            return result
        result()
        return 0

    module = ModuleType("rsplice.commands.diff", "Ends.")
    module.prepare_parser = lambda parser: None  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("result", "status", "stderr"),
    [
        (0, 0, ""),
        (23, 23, ""),
        (RspliceError(f"no {EVIL}", 127), 127, f"rsplice: no {EVIL_SHOWN}\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/x"), 125, "rsplice: /x: Permission denied\n"),
    ],
)
def test_how_a_command_ends(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    result: int | BaseException,
    status: int,
    stderr: str,
) -> None:
    command(monkeypatch, result)
    assert main(["diff"]) == status
    assert capfd.readouterr().err == stderr


def test_replay_prints_blocks_and_the_report(recording: str) -> None:
    run = rsplice("replay", recording)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("RECORDED rsplice 0.42 s cp a 'b c'\n")
    assert "\nRECORDED rsplice: cp a 'b c', exit status 0" in run.stdout
    assert "\x1b" not in run.stdout


def test_replay_can_print_only_the_report(recording: str) -> None:
    run = rsplice("replay", "--report", recording)
    assert run.stdout.startswith("RECORDED rsplice: cp a 'b c', exit status 0")


def test_replay_says_that_a_recording_is_cut(recording: str) -> None:
    File(recording).write_bytes(File(recording).read_bytes() + b'{"t": 3')
    run = rsplice("replay", "--report", recording)
    assert run.returncode == 0
    assert run.stderr == "rsplice: the recording is cut short: its last line is cut off\n"


@pytest.mark.parametrize("words", [["replay", "--report"], ["replay"]])
def test_a_closed_pipe_is_quiet(recording: str, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = rsplice(*words, recording, stdout=writer)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")


def test_closed_streams_are_no_error(recording: str) -> None:
    words = [sys.executable, "-m", "rsplice", "replay", recording]
    run = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *words], cwd=ROOT, check=False)
    assert run.returncode == 0


def test_help_into_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = rsplice("--help", stdout=writer)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("words", [["replay", "--report"], ["replay"]])
def test_a_full_disk_is_one_line(recording: str, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        run = rsplice(*words, recording, stdout=full)
    assert run.returncode == 125
    assert run.stderr == "rsplice: cannot write standard output: No space left on device\n"


def test_help_onto_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        run = rsplice("--help", stdout=full)
    assert run.returncode == 125
    assert run.stderr == "rsplice: No space left on device\n"


def test_what_a_command_prints_is_escaped_where_letters_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    command(monkeypatch, lambda: print("caf\u00e9"))
    assert main(["diff"]) == 0
    assert raw.getvalue() == b"caf\\xe9\n"


def test_a_file_of_few_letters(tmp_path: File) -> None:
    before = audit_file(tmp_path / "a", audit_of())
    path = read_path()
    path.source = "caf\u00e9"
    after = audit_file(tmp_path / "b", audit_of(path))
    run = rsplice("diff", before, after, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0
    assert "+ caf\\xe9 -> user memory via pread64" in run.stdout


def test_diff_of_the_same(tmp_path: File) -> None:
    path = audit_file(tmp_path / "a", sample())
    assert rsplice("diff", path, path).stdout == "nothing changed\n"


def test_diff_refuses_what_is_no_audit(tmp_path: File, recording: str) -> None:
    path = audit_file(tmp_path / "a", sample())
    run = rsplice("diff", path, recording)
    assert run.returncode == 125
    assert run.stderr == f"rsplice: {recording} is no audit in JSON: not JSON\n"


def test_what_diff_says() -> None:
    before = audit_of(read_path(23), bounced_path())
    after = audit_of(read_path(29), splice_path())
    after.findings = sample().findings[:1]
    after.pages.faults = 7
    assert differences(before, after) == [
        "~ totals",
        "    payload 100 KiB -> 1.11 MiB (+1064960 B)",
        "    copied 108 KiB -> 116 KiB (+8192 B)",
        "    avoided -8.00 KiB -> 1.00 MiB (+1056768 B)",
        "    shared 0 B -> 1.00 MiB (+1048576 B)",
        "    operations 24 -> 46 (+22)",
        "    evidence inferred -> identity",
        "~ ext4 -> user memory via pread64",
        "    payload 92.0 KiB -> 116 KiB (+24576 B)",
        "    copied 92.0 KiB -> 116 KiB (+24576 B)",
        "    operations 23 -> 29 (+6)",
        "- user memory -> block device /dev/nvme0n1p1 via io_uring write",
        "    payload 8.00 KiB, copied 16.0 KiB, avoided -8.00 KiB, operations 1, evidence inferred",
        "+ ext4 -> pipe via splice",
        "    payload 1.00 MiB, copied 0 B, avoided 1.00 MiB, shared 1.00 MiB, operations 17, "
        "evidence identity",
        "+ missed move: steal-refused",
        "    times 3",
        "~ pages",
        "    faults 0 -> 7 (+7)",
    ]


def test_diff_never_says_0_copied_of_unknown_bytes() -> None:
    lines = differences(audit_of(unknown_path()), audit_of(read_path()))
    assert any(line.startswith("    copied ? -> 92.0 KiB") for line in lines)
