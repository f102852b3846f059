# SPDX-License-Identifier: MIT
"""What can go wrong: one clear line, the right exit status, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.attached import (
    descriptors_of,
    programs_of,
    wait_for_command,
    wait_until_attached,
    wait_until_gone,
)
from tests.support.run import ROOT, RSPLICE, Driver, Running, audit, environment

PRIVILEGED = pytest.mark.privileged
Needs = Callable[..., None]

#: A shell that hangs until a signal, and says when it does.
HANG = "echo ready; while :; do sleep 0.05; done"


def ready(running: Running) -> None:
    assert running.process.stdout
    assert running.process.stdout.readline() == b"ready\n"


# The command.


@PRIVILEGED
def test_command_not_found() -> None:
    result = audit(["no-such-command-here"])
    assert result.status == 127
    assert "no-such-command-here" in result.message


@PRIVILEGED
@pytest.mark.parametrize("kind", ["file", "directory", "format"])
def test_command_that_cannot_be_run(tmp_path: Path, kind: str) -> None:
    command = tmp_path / "command"
    if kind == "directory":
        command.mkdir()
    else:
        command.write_bytes(b"\0\0\0\0")
        command.chmod(0o755 if kind == "format" else 0o644)
    result = audit([command])
    assert result.status == 126
    assert str(command) in result.message


@PRIVILEGED
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_command_killed(number: signal.Signals) -> None:
    result = audit(["sh", "-c", f"kill -{int(number)} $$"])
    assert result.status == 128 + number
    assert result.json["exit_status"] == 128 + number


@PRIVILEGED
@pytest.mark.parametrize("status", [0, 1, 101, 255])
def test_exit_status_of_the_command_is_kept(status: int) -> None:
    result = audit(["sh", "-c", f"exit {status}"])
    assert result.status == result.json["exit_status"] == status


@PRIVILEGED
def test_output_of_the_command_is_left_alone() -> None:
    result = audit(["sh", "-c", "cat; echo error >&2"], stdin=_pipe_with(b"\x1b[31m\xff\n"))
    assert result.stdout == b"\x1b[31m\xff\n"
    assert result.stderr.startswith("error\n")


def _pipe_with(data: bytes) -> int:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


@PRIVILEGED
def test_unknown_pid() -> None:
    absent = int(Path("/proc/sys/kernel/pid_max").read_text()) - 1
    assert not Path(f"/proc/{absent}").exists()
    result = audit([], "-p", str(absent))
    assert result.status == 125
    assert str(absent) in result.message
    assert result.document is None


@pytest.mark.parametrize("pid", ["0", "-1", "x", "1,,2", "99999999999999999999"])
def test_pid_that_is_none(pid: str) -> None:
    result = audit([], "-p", pid)
    assert result.status == 125
    assert result.message


def test_nothing_to_audit() -> None:
    result = audit([])
    assert result.status == 125
    assert result.message


# --fail-on.


@pytest.mark.parametrize(
    "expression",
    [
        "bogus>0",
        "copied",
        "copied>",
        "copied>ten",
        "copied>1 XiB",
        "violation:no-such",
        "",
        "copied>>0",
    ],
)
def test_bad_fail_on(expression: str, tmp_path: Path) -> None:
    result = audit(["touch", tmp_path / "ran"], "--fail-on", expression)
    assert result.status == 125
    assert "fail-on" in result.message
    assert not (tmp_path / "ran").exists(), "the command ran although the condition is bad"


@pytest.mark.parametrize(
    ("expression", "option", "advice"),
    [
        ("violation", "--identity=sample", "with --identity sample: leave it out"),
        ("hazard:stranded", "--identity=off", "with --identity off: leave it out"),
        ("violation:cache-differs-from-disk", "--identity=all", "with --verify only: add it"),
    ],
)
def test_nobody_fails_on_what_is_not_looked_for(
    expression: str, option: str, advice: str, tmp_path: Path
) -> None:
    result = audit(["touch", tmp_path / "ran"], option, "--fail-on", expression)
    assert result.status == 125
    assert result.message.startswith(f"rsplice: --fail-on {expression}: ")
    assert advice in result.message
    assert not (tmp_path / "ran").exists()


@PRIVILEGED
@pytest.mark.parametrize(
    ("expression", "status"),
    [
        ("copied>0", 120),
        ("copied>376831", 120),
        ("copied>376832", 0),
        ("copied>10MiB", 0),
        ("copies_per_byte>0.5", 120),
        ("copies_per_byte>1.0", 0),
        ("unknown>0", 0),
        ("lost>0", 0),
        ("violation", 0),
        ("violation:leaked", 0),
    ],
)
def test_fail_on(driver: Driver, tmp_path: Path, expression: str, status: int) -> None:
    """23 reads of 16384 bytes copy 376832 bytes."""
    command = driver.command(tmp_path / "report.json", tmp_path, "read", "-f", "memfd")
    result = audit(command, "--fail-on", expression)
    assert result.status == status
    assert result.json["totals"]["copied"] == 23 * 16384
    said = [line for line in result.stderr.splitlines() if line.startswith("rsplice: ")][1:]
    assert len(said) == (1 if status else 0)
    assert all(expression.partition(">")[0] in line for line in said)


@PRIVILEGED
def test_fail_on_outweighs_the_status_of_the_command() -> None:
    result = audit(["sh", "-c", "cat /proc/self/status; exit 7"], "--fail-on", "copied>0")
    assert result.status == 120
    assert result.json["exit_status"] == 7


# Privilege and installation.


def without_capabilities(*names: str) -> list[str]:
    dropped = ",".join(f"-{n}" for n in names)
    return ["setpriv", "--bounding-set", dropped, "--inh-caps", dropped]


@PRIVILEGED
@pytest.mark.parametrize(
    ("dropped", "named"),
    [
        (["all"], "CAP_BPF"),
        (["sys_admin", "bpf"], "CAP_BPF"),
        (["sys_admin", "perfmon"], "CAP_PERFMON"),
    ],
)
def test_no_privilege(needs: Needs, tmp_path: Path, dropped: list[str], named: str) -> None:
    needs("setpriv")
    ran = tmp_path / "ran"
    result = audit(["touch", ran], launcher=without_capabilities(*dropped))
    assert result.status == 125
    assert named in result.message
    assert not ran.exists(), "the command ran although nothing was traced"


@PRIVILEGED
def test_another_user(needs: Needs) -> None:
    needs("setpriv")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    usable = [*nobody, sys.executable, "-c", "import rsplice.tracers.btf"]
    if subprocess.run(usable, cwd=ROOT, capture_output=True).returncode:
        pytest.skip("the user nobody may not read this checkout or its Python")
    result = audit(["true"], "--json", "/dev/null", launcher=nobody)
    assert result.status == 125
    assert "CAP_BPF" in result.message
    assert "root" in result.message


@PRIVILEGED
def test_no_btf(needs: Needs, tmp_path: Path) -> None:
    needs("unshare")
    hide = f'mount --bind {tmp_path} /sys/kernel/btf && exec "$@"'
    result = audit(["true"], launcher=["unshare", "--mount", "sh", "-c", hide, "sh"])
    assert result.status == 125
    assert "BTF" in result.message


@PRIVILEGED
def test_bcc_not_installed() -> None:
    code = (
        "import runpy, sys; sys.modules['bcc'] = None; sys.argv[0] = 'rsplice';"
        "runpy.run_module('rsplice', run_name='__main__')"
    )
    result = audit(["true"], rsplice=[sys.executable, "-c", code])
    assert result.status == 125
    assert "python3-bpfcc" in result.message


@PRIVILEGED
def test_bcc_is_the_other_package_of_that_name(tmp_path: Path) -> None:
    """PyPI's "bcc" is about crystal lattices."""
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("lattice = 'body-centred cubic'\n")
    result = audit(["true"], env={**environment(), "PYTHONPATH": str(tmp_path)})
    assert result.status == 125
    assert "python3-bpfcc" in result.message


# Where the report goes.


def closed_pipe() -> int:
    """The write end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@PRIVILEGED
def test_json_into_a_closed_pipe() -> None:
    result = audit(["true"], "--json", "-", stdout=closed_pipe())
    assert "Traceback" not in result.stderr
    assert result.status >= 0, "rsplice died of SIGPIPE"


@PRIVILEGED
def test_report_into_a_closed_pipe() -> None:
    """The command's status is still told, with nobody to read the report."""
    done = subprocess.run(
        [*RSPLICE, "audit", "--", "sh", "-c", "exit 7"], cwd=ROOT, stderr=closed_pipe()
    )
    assert done.returncode == 7


@PRIVILEGED
@pytest.mark.parametrize("option", ["--json", "-o"])
def test_disk_full(option: str) -> None:
    """The run cannot be repeated: the report is shown instead, and then the reason."""
    other = ["--json", "/dev/null"] if option == "-o" else []
    result = audit(["true"], "-q", option, "/dev/full", *other)
    assert result.status == 125
    *report, reason = result.stderr.splitlines()
    assert any(line.startswith("accuracy:") for line in report)
    assert reason.startswith("rsplice: cannot write /dev/full: No space left on device")


@PRIVILEGED
@pytest.mark.parametrize("option", ["--json", "-o"])
def test_report_that_cannot_be_created(tmp_path: Path, option: str) -> None:
    """Found out before the command runs: its audit would be lost."""
    ran = tmp_path / "ran"
    target = str(tmp_path / "absent" / "report")
    result = audit(
        ["touch", ran], option, target, *(["--json", "/dev/null"] if option == "-o" else [])
    )
    assert result.status == 125
    assert target in result.message
    assert not ran.exists()


# Names that are not to be trusted.

ESCAPES = [
    b"\x1b[31mred",
    b"\x1b]0;title\x07",
    b"[bold]x[/bold]",
    b"\xff\xfe",
    b"a\nb\rc\td",
    b"\x9b2J",
]


@PRIVILEGED
@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_process_name_with_escape_sequences(driver: Driver, tmp_path: Path, name: bytes) -> None:
    read = driver.command(tmp_path / "report.json", tmp_path, "read", "-C")
    command: list[str | bytes | Path] = [read[0], read[1], read[2], name, *read[3:]]
    result = audit(command, "-v")
    assert result.status == 0
    shown = result.stderr.encode(errors="surrogateescape")
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", shown)
    shown.decode()
    assert result.json["totals"]["operations"] == 23


@PRIVILEGED
def test_process_name_on_a_terminal(driver: Driver, tmp_path: Path) -> None:
    """The terminal gets colours from rsplice alone: no title, no clearing of the screen."""
    command = driver.command(tmp_path / "report.json", tmp_path, "read", "-C", "\x1b]0;evil\x07")
    main, terminal = pty.openpty()
    done = subprocess.Popen([*RSPLICE, "audit", "-v", "--", *command], cwd=ROOT, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main, 65536):
            shown += chunk
    except OSError:  # EIO: the terminal's last user is gone
        pass
    os.close(main)
    assert done.wait() == 0
    assert b"evil" in shown or b"driver" in shown
    assert b"\x1b]" not in shown
    assert b"\x07" not in shown


# Several at once, and signals.


@PRIVILEGED
def test_two_audits_at_once_do_not_mix(driver: Driver, tmp_path: Path) -> None:
    runs = {}
    for count in (101, 211):
        report = tmp_path / f"{count}.json"
        command = driver.command(report, tmp_path, "read", "-f", "memfd", "-n", str(count))
        shell = 'echo ready; cat >/dev/null; exec "$@"'
        runs[count] = Running(["sh", "-c", shell, "sh", *command], stdin=subprocess.PIPE)
    for running in runs.values():
        ready(running)
    for count, running in runs.items():
        result = running.finish()
        assert result.path("memfd", "user memory", "read")["operations"] == count


@PRIVILEGED
def test_sigterm_is_forwarded_and_nothing_stays() -> None:
    running = Running(["sh", "-c", f"trap 'echo got; exit 7' TERM; {HANG}"])
    ready(running)
    programs = programs_of(running.pid)
    assert programs
    result = running.stop(signal.SIGTERM)
    assert (result.status, result.stdout) == (7, b"got\n")
    assert result.json["exit_status"] == 7
    wait_until_gone(programs)


@PRIVILEGED
def test_sigterm_kills_a_command_that_does_not_catch_it() -> None:
    running = Running(["sh", "-c", HANG])
    ready(running)
    assert running.stop(signal.SIGTERM).status == 128 + signal.SIGTERM


@PRIVILEGED
def test_sigterm_before_the_command_runs_starts_nothing(tmp_path: Path) -> None:
    """At any moment of the start a signal ends rsplice, with no traceback."""
    running = Running(["sh", "-c", HANG])
    result = running.stop(signal.SIGTERM)
    assert result.status in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in result.stderr


@PRIVILEGED
def test_ctrl_c_reaches_the_command_and_the_report_is_made() -> None:
    running = Running(["sh", "-c", f"trap 'exit 9' INT; {HANG}"])
    ready(running)
    command = wait_for_command(running.pid, "sh")
    os.kill(running.pid, signal.SIGINT)
    os.kill(command, signal.SIGINT)
    result = running.finish()
    assert result.status == 9
    assert result.json["exit_status"] == 9


@PRIVILEGED
def test_sigterm_ends_an_audit_of_a_running_process_with_a_report(
    sleeper: subprocess.Popen[bytes],
) -> None:
    running = Running([], "-p", str(sleeper.pid))
    wait_until_attached(running.pid)
    result = running.stop(signal.SIGTERM)
    assert sleeper.poll() is None, "the followed process was killed"
    assert result.json["schema"] == "rsplice.audit/1"


@PRIVILEGED
def test_when_rsplice_is_killed_the_kernel_lets_go() -> None:
    running = Running(["sh", "-c", HANG])
    ready(running)
    command = wait_for_command(running.pid, "sh")
    programs = programs_of(running.pid)
    assert programs
    running.process.kill()
    running.process.wait()
    try:
        wait_until_gone(programs)
    finally:
        os.kill(command, signal.SIGTERM)
    running.finish()


@PRIVILEGED
def test_the_command_inherits_nothing_of_bpf() -> None:
    running = Running(["sh", "-c", HANG])
    ready(running)
    assert not descriptors_of(wait_for_command(running.pid, "sh"))
    running.stop()


@PRIVILEGED
def test_json_on_standard_output_is_one_document() -> None:
    result = audit(["true"], "--json", "-", "-q")
    assert json.loads(result.stdout)["schema"] == "rsplice.audit/1"


def test_a_pid_namespace_of_its_own(needs: Callable[..., None], tmp_path: Path) -> None:
    """There pids mean others than in the kernel: nothing would be followed."""
    needs("unshare")
    ran = tmp_path / "ran"
    launcher = ["unshare", "--pid", "--fork", "--mount-proc"]
    result = audit(["touch", ran], launcher=launcher)
    assert result.status == 125
    assert "PID namespace" in result.message
    assert "--pid host" in result.message
    assert not ran.exists()
