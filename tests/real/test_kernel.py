# SPDX-License-Identifier: MIT
"""A real guest: what it can see and do, what comes out of it, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rsplice.errors import RspliceError
from rsplice.kernel import cache, vm
from tests.support.run import environment

SERIES = "6.12"
RSPLICE = (sys.executable, "-m", "rsplice")
BOOT = 110  #: seconds for a boot and a short command on a busy machine

#: What the command in the guest does; each line that it prints is looked at by a test.
SCRIPT = """
echo "release $(uname -r)"
echo "user $(id -u)"
echo "directory $(pwd)"
echo "here $(cat here)"
echo "interfaces $(ls /sys/class/net | tr '\\n' ' ')"
touch "$1" 2>/dev/null && echo "root writable"
rm here && echo changed >new && echo "changes $(ls | tr '\\n' ' ')"
echo "scratch $(stat -f -c %T /tmp)"
test -e ../hidden && echo "hidden seen"
echo "input $(cat)"
modprobe loop && echo "loop $(losetup -f)"
echo "to errors" >&2
echo "again" >/dev/stderr
sleep 1000 &
exit 23
"""


@pytest.fixture(scope="module")
def kernel() -> cache.Kernel:
    if not shutil.which(vm.QEMU):
        pytest.skip(f"not installed: {vm.QEMU}")
    try:
        return cache.find_or_fetch(SERIES, lambda what: None)
    except RspliceError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_command_runs_in_a_guest_as_here(kernel: cache.Kernel, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "here").write_text("a file of this machine\n")
    if not tmp_path.is_relative_to("/tmp"):
        pytest.skip("TMPDIR is elsewhere: /tmp is what the guest has of its own")
    (tmp_path / "hidden").touch()
    outside = Path("/var/lib/rsplice-was-here")
    arguments = ("kernel", "run", "--timeout", str(BOOT), SERIES, "--", "sh", "-c", SCRIPT, "sh")
    run = subprocess.run(
        [*RSPLICE, *arguments, outside],
        cwd=work,
        env=environment(),
        input=b"from here",
        capture_output=True,
        timeout=BOOT,
    )
    lines = dict(line.partition(" ")[::2] for line in run.stdout.decode().splitlines())
    assert run.returncode == 23, run.stderr
    assert lines == {
        "release": kernel.release,
        "user": "0",
        "directory": str(work),
        "here": "a file of this machine",
        "interfaces": "lo ",
        "changes": "new ",
        "scratch": "ext2/ext3",
        "input": "from here",
        "loop": "/dev/loop0",
    }
    assert run.stderr == b"to errors\nagain\n"
    assert not outside.exists()
    assert os.listdir(work) == ["here"]


@pytest.mark.slow
@pytest.mark.privileged
def test_an_audit_in_a_guest_is_reported_here(kernel: cache.Kernel, tmp_path: Path) -> None:
    reads = ("dd", "if=/dev/zero", "of=/dev/null", "bs=4096", "count=23")
    arguments = ("audit", "--kernel", SERIES, "--json", "audit.json", "-o", "report")
    run = subprocess.run(
        [*RSPLICE, *arguments, "--fail-on", "copied>90KiB", "--", *reads],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=BOOT,
    )
    assert run.returncode == 120, run.stderr
    assert re.search(rb"23\+0 records in.*copied>90KiB", run.stderr, re.DOTALL)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["kernel"] == {"release": kernel.release, "where": "vm"}
    assert audit["command"] == list(reads)
    assert audit["exit_status"] == 0
    (path,) = [p for p in audit["paths"] if p["source"] == "/dev/zero"]
    assert (path["via"], path["operations"], path["payload_bytes"]) == ("read", 23, 23 * 4096)
    assert audit["totals"]["unknown"] == 0
    assert "in a VM" in (tmp_path / "report").read_text()


@pytest.mark.slow
def test_a_killed_rsplice_leaves_no_qemu(kernel: cache.Kernel, tmp_path: Path) -> None:
    command = ("kernel", "run", SERIES, "--", "sh", "-c", "echo ready; sleep 1000")
    with subprocess.Popen(
        [*RSPLICE, *command],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in children}
        (qemu,) = [pid for pid, name in names.items() if name.startswith("qemu")]
        run.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{qemu}").exists():
        assert time.monotonic() < deadline, "QEMU outlives rsplice"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.privileged
def test_live_shows_a_guest(kernel: cache.Kernel, tmp_path: Path) -> None:
    script = "echo kept; dd if=/dev/zero of=/dev/null bs=4096 count=23 2>/dev/null; sleep 1; exit 7"
    command = ("live", "--kernel", SERIES, "--interval", "0.3", "--", "sh", "-c", script)
    run = subprocess.run(
        [*RSPLICE, *command],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOOT,
    )
    assert run.returncode == 7, run.stderr
    report = run.stdout.rindex("rsplice: sh -c")
    assert "kept\n" in run.stdout[:report]
    assert f"{kernel.release} in a VM" in " ".join(run.stdout[report:].split())
    assert re.search(r"/dev/zero -> user memory via read +23 92\.0 KiB", run.stdout[report:])
