# SPDX-License-Identifier: MIT
"""Programs that break no page's lifecycle, under every check: none may be called a violation.

Every audit of tests.support.run is such a test already, those of cp, tar, rsync, curl and nginx in
test_programs and test_servers among them. These are the busy ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.attached import wait_for_command
from tests.support.filesystems import Scratch
from tests.support.run import ROOT, Result, Running, audit
from tests.support.servers import free_port, nginx_config, wait_for_port

pytestmark = pytest.mark.privileged

Needs = Callable[..., None]


def no_alarm(result: Result, status: int = 0) -> Result:
    """Asserts that it ended well, was seen whole, with findings looked for, and is no violation."""
    assert result.status == status, result.stderr
    accuracy = result.json["accuracy"]
    assert accuracy["identity"] == "all"
    assert (accuracy["events_lost"], accuracy["probes_missing"]) == (0, [])
    assert [f for f in result.json["findings"] if f["kind"] == "violation"] == []
    return result


def operations(result: Result, via: str) -> int:
    """How many operations of that name the audit saw."""
    found: int = sum(p["operations"] for p in result.paths() if p["via"] == via)
    return found


def test_the_check_of_every_audit_tells_a_violation() -> None:
    """The twin: what a program's audit is held to fails where there is one."""
    document: dict[str, Any] = {
        "accuracy": {"identity": "all", "events_lost": 0, "probes_missing": []},
        "findings": [{"name": "double-owner", "kind": "violation"}],
    }
    with pytest.raises(AssertionError, match="double-owner"):
        no_alarm(Result(0, b"", "", document))
    running = Running(["true"])
    running.process.wait()
    running.report.write_text('{"findings": [{"name": "leaked", "kind": "violation"}]}')
    with pytest.raises(AssertionError, match="leaked"):
        running.finish()


def test_git_clone_gc_and_fsck(scratch: Scratch, needs: Needs) -> None:
    needs("git")
    origin = scratch.path / "origin"
    quiet = [
        "-c",
        "user.name=x",
        "-c",
        "user.email=x@x",
        "-c",
        "gc.auto=0",
        "-c",
        "safe.directory=*",
    ]
    git = ["git", *quiet]
    subprocess.run([*git, "init", "-q", "-b", "main", origin], check=True)
    for commit in range(7):
        for number in range(101):
            (origin / f"f{number}").write_bytes(os.urandom(40 * number) + b"%d\n" % commit)
        subprocess.run([*git, "-C", origin, "add", "."], check=True)
        subprocess.run([*git, "-C", origin, "commit", "-q", "-m", f"{commit}"], check=True)
    line = " ".join(git)
    script = f"{line} clone -q file://{origin} clone && cd clone && {line} gc -q && {line} fsck"
    result = no_alarm(audit(["sh", "-ec", f"cd {scratch.path} && {script}"]))
    assert len(list((scratch.path / "clone").glob("f*"))) == 101
    assert operations(result, "write") > 700, "its objects went through pipes and into files"


def test_a_python_test_suite() -> None:
    """Files, pipes and subprocesses: tests of ours that need no privilege."""
    suite = ["tests/test_cli.py", "tests/test_recording.py"]
    result = no_alarm(
        audit([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite])
    )
    assert b" passed" in result.stdout and b" failed" not in result.stdout
    assert operations(result, "read") > 1000


def test_a_build_by_make_and_gcc(scratch: Scratch, needs: Needs) -> None:
    """53 files compiled two at a time, with pipes from compiler to assembler, then linked."""
    needs("make", "gcc")
    names = [f"f{number}" for number in range(53)]
    for number, name in enumerate(names):
        text = f'#include <stdio.h>\nint {name}(void) {{ return printf("%d", {number}); }}\n'
        (scratch.path / f"{name}.c").write_text(text)
    calls = "".join(f"int {name}(void);\n" for name in names)
    calls += "int main(void) { return !(" + " + ".join(f"{name}()" for name in names) + "); }\n"
    (scratch.path / "main.c").write_text(calls)
    objects = " ".join(f"{name}.o" for name in [*names, "main"])
    (scratch.path / "Makefile").write_text(
        f"CFLAGS := -O1 -pipe\nprogram: {objects}\n\t$(CC) -o $@ $^\n"
    )
    result = no_alarm(audit(["make", "-s", "-j2", "-C", scratch.path, "program"]))
    subprocess.run([scratch.path / "program"], capture_output=True, check=True)
    assert len(result.json["processes"]) > 2 * 53
    assert operations(result, "write") > 53


@pytest.mark.parametrize("direction", ["read", "write", "rw"])
def test_fio_with_splice(scratch: Scratch, needs: Needs, direction: str) -> None:
    """4 MiB in blocks of 64 KiB, by way of pipes and, where it writes, of vmsplice."""
    needs("fio")
    if "splice" not in subprocess.run(["fio", "--enghelp"], capture_output=True, text=True).stdout:
        pytest.skip("this fio has no ioengine=splice")
    command = [
        *("fio", "--name=job", "--ioengine=splice", "--thread", f"--rw={direction}"),
        *("--size=4M", "--bs=64k", f"--directory={scratch.path}", "--randrepeat=1"),
    ]
    result = no_alarm(audit(command))
    assert (scratch.path / "job.0.0").stat().st_size == 4 << 20
    spliced = [p for p in result.paths() if p["via"] == "splice"]
    carried = sum(p["payload_bytes"] for p in spliced)
    assert carried >= 4 << 20
    if direction == "write":
        assert operations(result, "vmsplice") >= 64


def test_nginx_under_load(scratch: Scratch, tmp_path: Path, needs: Needs) -> None:
    """2003 requests of 64 KiB over many connections at a time, sent by sendfile."""
    needs("nginx", "curl")
    (scratch.path / "www").mkdir()
    scratch.file("www/page", 65536)
    port = free_port()
    config = nginx_config(tmp_path, scratch.path / "www", port, sendfile=True)
    running = Running(["nginx", "-p", tmp_path, "-e", "stderr", "-c", config])
    wait_for_port(port)
    url = f"http://127.0.0.1:{port}/page?[1-2003]"
    subprocess.run(["curl", "-sSZ", "--fail", "-o", "/dev/null", url], check=True, timeout=60)
    os.kill(wait_for_command(running.pid, "nginx"), signal.SIGQUIT)
    result = no_alarm(running.finish())
    sent = result.path(scratch.kind, "tcp", "sendfile")
    assert sent["payload_bytes"] == 2 * 2003 * 65536
    assert (sent["copied"], sent["unknown"]) == (0, 0)


def test_tar_to_tar_under_strace(tmp_path: Path, needs: Needs) -> None:
    """Two tars and a pipe under strace: ptrace(2) and process_vm_readv(2) beside the rest."""
    needs("strace", "tar")
    script = f"tar cf - -C {ROOT} rsplice | tar xf - -C {tmp_path} && rm -r {tmp_path}/rsplice"
    result = no_alarm(audit(["strace", "-f", "-o", "/dev/null", "sh", "-ec", script]))
    assert operations(result, "write") > 100
