# SPDX-License-Identifier: MIT
"""The other commands, on real input: doctor, live, record and replay, and audit's extra outputs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.run import ROOT, RSPLICE, environment

pytestmark = pytest.mark.privileged

LIMIT = 60  # seconds after which a run is given up


def rsplice(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs rsplice without a terminal; fails unless it exits with *status*."""
    done = subprocess.run(
        [*RSPLICE, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=LIMIT,
    )
    assert done.returncode == status, done.stderr
    return done


def test_doctor_tells_of_every_probe_and_of_its_absence() -> None:
    from rsplice.tracers.tracer import PROBES

    found = json.loads(rsplice("doctor", "--json").stdout)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert {probe.tracepoint for probe in PROBES} <= set(states)
    assert states["BTF"] == states["BPF privilege"] == states["BCC"] == states["sys_exit"] == "ok"
    assert found["can"] and found["cannot"]
    text = rsplice("doctor").stdout
    assert all(probe.tracepoint in text for probe in PROBES)


def test_doctor_without_privilege_says_what_is_missing() -> None:
    unprivileged = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--reuid", "65534"]
    done = subprocess.run(
        [*unprivileged, "--clear-groups", *RSPLICE, "doctor"],
        capture_output=True,
        text=True,
        cwd="/",
        env={**environment(), "PYTHONPATH": str(ROOT)},
        timeout=LIMIT,
    )
    if "No module named" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("this tree cannot be read by an unprivileged user")
    assert done.returncode == 1
    assert "CAP_BPF and CAP_PERFMON missing" in done.stdout
    assert "cannot tell: nothing can be audited" in done.stdout
    assert "attached" not in done.stdout


def test_live_without_a_terminal_prints_snapshots_what_was_kept_and_the_audit() -> None:
    script = "echo kept; for i in 1 2 3; do cat /etc/passwd >/dev/null; sleep 0.4; done; exit 7"
    done = rsplice("live", "--interval", "0.2", "--", "sh", "-c", script, status=7)
    assert len(re.findall(r"accuracy: ", done.stdout)) >= 3
    report = done.stdout.rindex("rsplice: sh -c")
    assert "kept\n" in done.stdout[:report]
    assert done.stdout.count("kept\n") == 1
    assert "user memory -> /dev/null via write" in done.stdout[report:]


def _on_a_terminal(arguments: list[str], *typing: tuple[bytes, bytes]) -> tuple[int, bytes]:
    """Runs rsplice on a terminal of its own.

    :param typing: what is waited for, and the keys that are typed then, in turn
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ.update(environment(), TERM="xterm", COLUMNS="80", LINES="24")
        os.execvp(RSPLICE[0], [*RSPLICE, *arguments])
    seen, start, left = b"", 0, list(typing)
    deadline = time.monotonic() + LIMIT
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 0.2)[0]:
                continue
            try:
                seen += os.read(terminal, 1 << 16)
            except OSError:  # the terminal's last user has gone
                break
            if left and left[0][0] in seen[start:]:
                start = len(seen)
                os.write(terminal, left.pop(0)[1])
        assert not left, f"{left[0][0]!r} did not appear in {seen[start:]!r}"
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen
    finally:
        os.close(terminal)


@pytest.mark.parametrize("keys", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_live_leaves_the_terminal_as_it_was(keys: bytes) -> None:
    _, seen = _on_a_terminal(["live", "--", "sleep", "1000"], (b"q quit", keys))
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1
    after = seen[seen.index(b"\x1b[?1049l") :]
    assert b"rsplice: sleep 1000" in after
    assert b"accuracy: " in after


def test_a_finding_opens_on_the_journey_of_its_page() -> None:
    program = 'import os; r, w = os.pipe(); os.write(w, b"left")'
    script = f"{shlex.join([sys.executable, '-I', '-S', '-c', program])}; sleep 1000"
    _, seen = _on_a_terminal(
        ["live", "--journey", "--interval", "0.2", "--", "sh", "-c", script],
        (b"q quit", b"\t\t"),
        (b"> hazard       stranded", b"\n"),
        (b"finding       stranded", b"\x1b"),
        (b"enter open", b"q"),
    )
    opened = seen[seen.index(b"enter back") - 4096 :]
    assert b"queued        in a pipe, the bytes copied from user memory by write" in opened
    assert b"JOURNEYS: 1 page of findings" in seen[seen.index(b"\x1b[?1049l") :]


def test_record_and_replay_show_the_same_numbers(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    script = "for i in 1 2 3; do cat /etc/passwd >/dev/null; sleep 0.2; done"
    rsplice("record", "--interval", "0.1", "-o", str(file), "--", "sh", "-c", script)
    size = 3 * os.stat("/etc/passwd").st_size
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["end"]
    written = [p for p in last["audit"]["paths"] if p["destination"] == "/dev/null"]
    assert [(p["operations"], p["discarded"]) for p in written] == [(3, size)]
    shown = rsplice("replay", "--report", str(file)).stdout
    assert "RECORDED" in shown
    assert "user memory -> /dev/null via write" in shown


def test_the_packaged_demo_plays_without_privilege() -> None:
    from rsplice import dashboards

    demo = Path(dashboards.__file__).parent / "demo.jsonl"
    shown = rsplice("replay", "--speed", "1000", str(demo)).stdout
    assert "RECORDED" in shown
    assert "ext4 -> tcp via sendfile" in shown


def test_interval_prints_the_counts_so_far() -> None:
    done = rsplice("audit", "--interval", "0.2", "--", "sleep", "0.9")
    assert len(re.findall(r"accuracy: ", done.stderr)) >= 3


def test_duration_ends_a_command() -> None:
    done = rsplice("audit", "--duration", "0.3", "--", "sleep", "1000", status=128 + signal.SIGTERM)
    assert "sleep 1000" in done.stderr


def test_html_and_text_go_to_files(tmp_path: Path) -> None:
    page, text = tmp_path / "page.html", tmp_path / "report.txt"
    done = rsplice("audit", "--html", str(page), "-o", str(text), "--", "true")
    assert done.stderr == ""
    assert page.read_text().lower().startswith("<!doctype html>")
    assert "accuracy: " in text.read_text()
    assert "\x1b" not in text.read_text()
