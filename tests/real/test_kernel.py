# SPDX-License-Identifier: MIT
"""A real guest: what it can see and do, what comes out of it, and that nothing is left of it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import signal
import socketserver
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rsplice.errors import RspliceError
from rsplice.kernel import cache, vm
from tests.support.attached import descendants_of
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
    with started(*command, cwd=tmp_path) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        guests = guests_of(run)
        run.kill()
    assert len(guests) == 1 and gone(guests)


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


def started(*arguments: str, cwd: Path, **more: Any) -> subprocess.Popen[bytes]:
    """rsplice, in the background."""
    return subprocess.Popen(
        [*RSPLICE, *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **{"stdin": subprocess.DEVNULL, **more},
    )


def guests_of(process: subprocess.Popen[bytes]) -> list[str]:
    """The QEMU processes below a run of rsplice."""
    pids = descendants_of(process.pid)
    return [str(pid) for pid in pids if _name(pid).startswith("qemu")]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(pids: list[str]) -> bool:
    """Whether the processes end soon."""
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            "echo c >/proc/sysrq-trigger",
            (),
            "the guest ended: Kernel panic - not syncing: sysrq triggered crash",
        ),
        (
            "echo '<2>last words' >/dev/kmsg; sleep 1; exec sleep 1000",
            ("--timeout", "3"),
            "the command did not end within 3 s",
        ),
    ],
    ids=["panic", "hang"],
)
def test_a_guest_that_fails_is_said_to_have(
    kernel: cache.Kernel, tmp_path: Path, script: str, options: Sequence[str], message: str
) -> None:
    command = ("kernel", "run", *options, SERIES, "--", "sh", "-c", f"echo before; {script}")
    with started(*command, cwd=tmp_path) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"before\n"
        guests = guests_of(run)
        output, errors = run.communicate(timeout=BOOT)
    assert run.returncode == 125
    assert output == b""
    *console, last = errors.decode().splitlines()
    assert last.startswith("rsplice: ") and message in last
    assert console and all(line.startswith("guest: ") for line in console)
    assert len(guests) == 1 and gone(guests)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_much_that_is_binary_passes_through_to_the_end(
    kernel: cache.Kernel, tmp_path: Path
) -> None:
    data = os.urandom((10 << 20) + 7919)
    script = "tee /dev/stderr; kill -9 $$"
    command = ("kernel", "run", SERIES, "--", "sh", "-c", script)
    with started(*command, cwd=tmp_path, stdin=subprocess.PIPE) as run:
        output, errors = run.communicate(data, timeout=BOOT)
    assert run.returncode == 128 + signal.SIGKILL
    assert (output == data, errors == data) == (True, True), (len(output), len(errors))


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server on this machine that sends back in capitals what it gets."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_guest_reaches_the_network_if_it_is_to(
    kernel: cache.Kernel, tmp_path: Path, echo_port: int
) -> None:
    # 10.0.2.2 is this machine, in QEMU's user network.
    ask = f"exec 3<>/dev/tcp/10.0.2.2/{echo_port} && echo word >&3 && cat <&3"
    command = ("kernel", "run", "--network", SERIES, "--", "bash", "-c", ask)
    with started(*command, cwd=tmp_path) as run:
        output, errors = run.communicate(timeout=BOOT)
    assert (run.returncode, output, errors) == (0, b"WORD\n", b"")


@pytest.mark.slow
def test_ctrl_c_is_the_commands_and_leaves_nothing(kernel: cache.Kernel, tmp_path: Path) -> None:
    script = "trap 'echo told; exit 3' INT; echo ready; while :; do sleep 0.1; done"
    before = set(cache.directory().iterdir())
    with started("kernel", "run", SERIES, "--", "sh", "-c", script, cwd=tmp_path) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n", run.communicate(timeout=BOOT)
        guests = guests_of(run)
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=BOOT)
    assert (run.returncode, output, errors) == (3, b"told\n", b"")
    assert len(guests) == 1 and gone(guests)
    assert set(cache.directory().iterdir()) == before


#: What a guest needs beside file systems.
DRIVERS = ("block", "char", "virtio")


@pytest.mark.slow
def test_an_image_with_its_modules_becomes_a_kernel_and_boots(
    kernel: cache.Kernel, tmp_path: Path
) -> None:
    kept = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from rsplice import caches; "
        f"caches.directory = lambda: Path({str(kept)!r}); "
        "from rsplice.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def rsplice(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BOOT,
        )

    modules = tmp_path / "modules"
    for part in ("arch", "crypto", "fs", "lib", "net/9p", *(f"drivers/{d}" for d in DRIVERS)):
        if (kernel.modules / "kernel" / part).exists():
            shutil.copytree(kernel.modules / "kernel" / part, modules / "kernel" / part)
    fetched = rsplice("kernel", "fetch", "--modules", modules, kernel.image)
    assert (fetched.returncode, fetched.stderr) == (0, "")
    assert fetched.stdout == f"Linux {kernel.release}: {kept}/kernels/{kernel.release}\n"
    # Unasked there is no network.
    script = "uname -r; modprobe loop || exit; exec 3<>/dev/tcp/10.0.2.2/80"
    run = rsplice("kernel", "run", kernel.release, "--", "bash", "-c", script)
    assert (run.returncode, run.stdout) == (1, f"{kernel.release}\n")
    assert "Network is unreachable" in run.stderr
    shutil.rmtree(modules / "kernel/fs/9p")
    assert rsplice("kernel", "fetch", "--modules", modules, kernel.image).returncode == 0
    run = rsplice("kernel", "run", kernel.release, "--", "true")
    said = "this kernel has no file system 9p, which a guest needs"
    assert (run.returncode, run.stderr) == (
        125, f"rsplice: the guest could not be set up: {said}\n"
    )  # fmt: skip


@contextmanager
def in_a_terminal(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """rsplice with a terminal of its own, and our end of that."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [*RSPLICE, *arguments]
    try:
        with subprocess.Popen(
            command, cwd=cwd, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
        ) as run:
            os.close(theirs)
            yield run, ours
    finally:
        os.close(ours)


def read_until(fd: int, words: bytes) -> bytes:
    """What comes until *words* are among it; to the end if they are empty."""
    seen = b""
    deadline = time.monotonic() + BOOT
    while not words or words not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([fd], [], [], 1)[0]:
            try:
                seen += os.read(fd, 1 << 16)
            except OSError:  # nobody writes there any more
                break
    return seen


LIVE = (
    "live", "--kernel", SERIES, "--interval", "0.3", "--", "sh", "-c",
    "while :; do dd if=/dev/zero of=/dev/null bs=4096 count=23 2>/dev/null; sleep 0.1; done",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.privileged
def test_live_ends_the_guest_at_q(kernel: cache.Kernel, tmp_path: Path) -> None:
    with in_a_terminal(*LIVE, cwd=tmp_path) as (run, terminal):
        read_until(terminal, b"/dev/zero -> user")
        guests = guests_of(run)
        os.write(terminal, b"q")
        report = read_until(terminal, b"")
        assert run.wait(BOOT) == 128 + signal.SIGTERM, report
    assert len(guests) == 1 and gone(guests)
    assert f"{kernel.release} in a VM" in " ".join(report.decode().split())
    assert b"/dev/zero -> user memory via read" in report


@pytest.mark.slow
@pytest.mark.privileged
def test_a_killed_live_leaves_no_guest(kernel: cache.Kernel, tmp_path: Path) -> None:
    with in_a_terminal(*LIVE, cwd=tmp_path) as (run, terminal):
        read_until(terminal, b"booting")
        deadline = time.monotonic() + BOOT
        while not (guests := guests_of(run)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.kill()
    assert gone(guests)
