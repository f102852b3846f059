# SPDX-License-Identifier: MIT
"""Other kernels: the cache, the initramfs, errors in one line, and guests that fail in all ways.

A stand-in for QEMU plays the guest: tests/real/test_kernel.py boots a real one.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplice import caches
from rsplice.cli import main
from rsplice.errors import RspliceError
from rsplice.kernel import cache, debian, image, initramfs, vm
from rsplice.kernel.cache import Kernel
from rsplice.kernel.initramfs import Job
from tests import kernels

RELEASE = "6.12.7-test"

#: Plays a guest as its argument says: speaks on the chardevs that rsplice gave it.
QEMU = r"""
import os, re, socket, sys, time
fds = {}
for word in sys.argv:
    found = re.fullmatch(r"socket,id=(\w+),fd=(\d+)", word)
    if found:
        fds[found[1]] = socket.socket(fileno=int(found[2]))
part = os.environ["GUEST"]
open(os.environ["PIDS"], "a").write(f"{os.getpid()}\n")
kvm = "kvm" in sys.argv
if part == "no-start":
    sys.exit("qemu: no room\x1b[2J")
if part == "kvm-hangs" and kvm:
    time.sleep(1000)
if part == "kvm-ends" and kvm:
    sys.exit("qemu: KVM internal error")
if part == "no-setup":
    fds["control"].sendall(b"up\nfail /host: No such device\n")
    time.sleep(1000)
if part == "no-boot":
    time.sleep(1000)
starts = len(open(os.environ["PIDS"]).readlines())
if part == "trips" and starts == 1 or part == "trips-always":
    fds["console"].sendall(b"[ 1.6] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\r\n")
    fds["console"].sendall(b"[ 1.6] Kernel panic - not syncing: Fatal exception\r\n")
    sys.exit(0)
fds["control"].sendall(b"up\nru")
fds["control"].sendall(b"n\n")
if part == "panic":
    fds["console"].sendall(b"one\r\n\x1b]0;title\x07two\r\n")
    fds["console"].sendall(b"[ 1.2] Kernel panic - not syncing: so\r\nCall Trace:\r\n")
    for each in range(101):
        fds["console"].sendall(b"[ 1.2]  ? frame %d\r\n" % each)
    sys.exit(0)
if part == "oops":
    for words in ("one", "BUG: kernel NULL pointer dereference", "Oops: 0000 [#1] SMP", "RIP: so"):
        fds["console"].sendall(b"[ 1.2] %s\r\n" % words.encode())
    for each in range(101):
        fds["console"].sendall(b"[ 1.2]  ? frame %d\r\n" % each)
    fds["console"].sendall(b"[ 1.2] Kernel panic - not syncing: Fatal exception\r\n")
    sys.exit(0)
if part == "hang":
    fds["console"].sendall(b"last words\n")
    fds["output"].sendall(b"before\n")
    time.sleep(1000)
if part == "obey":
    fds["output"].sendall(b"ready\n")
    number = fds["control"].recv(100)
    fds["control"].sendall(b"exit %d\n" % (128 + int(number)))
    time.sleep(1000)
if part == "echo":
    text = b""
    while data := fds["input"].recv(1000):
        text += data
    fds["output"].sendall(text.upper())
    fds["errors"].sendall(b"that was it\n")
if part == "much":
    block = bytes(range(256)) * 256
    for each in range(101):
        fds["output"].sendall(block)
if part == "ask":
    fds["question"].sendall(b"one\ntwo\nthr")
    fds["output"].sendall(fds["question"].makefile().readline().encode())
fds["control"].sendall(b"exit 7\n")
time.sleep(1000)
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setattr(caches, "directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def kernel(kept: Path) -> Kernel:
    """A kernel in it that only the stand-in can boot."""
    if not shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        pytest.skip("not installed: e2fsprogs (mkfs.ext4)")
    place = kept / "kernels" / RELEASE
    modules = place / "lib/modules" / RELEASE
    modules.mkdir(parents=True)
    for each in (kept, place.parent, place):
        each.chmod(0o700)
    (modules / "modules.dep").write_text("")
    (place / "image").write_bytes(b"")
    (place / "source").write_text("a test\n")
    return Kernel(RELEASE, place)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> Callable[[str], Path]:
    """Call it with the part that the stand-in plays; gives the file with its pids."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / vm.QEMU
    script.write_text(f"#!{sys.executable}\n{QEMU}")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.setattr(vm, "kvm_device", lambda: False)

    def play(part: str) -> Path:
        monkeypatch.setenv("GUEST", part)
        return tmp_path / "pids"

    return play


def job() -> Job:
    return Job([b"true"], b"/tmp", {b"A": b"b"})


class Streams:
    """What a guest sent."""

    def __init__(self) -> None:
        self.output, self.errors, self.said = b"", b"", list[str]()

    def setup(self, **more: object) -> vm.Setup:
        def output(data: bytes) -> None:
            self.output += data

        def errors(data: bytes) -> None:
            self.errors += data

        sinks = {"output": output, "errors": errors}
        return vm.Setup(sinks=sinks, say=self.said.append, **more)  # type: ignore[arg-type]


def gone(pids: Path) -> bool:
    """Whether no stand-in is left, of those that were started."""
    started = [int(line) for line in pids.read_text().split()]
    assert started
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- guests ---------------------------------------------------------------------------------------


def test_streams_and_the_status_are_passed_through(
    kernel: Kernel, guest: Callable[[str], Path]
) -> None:
    pids = guest("echo")
    streams = Streams()
    reader, writer = os.pipe()
    os.write(writer, b"some words\n")
    os.close(writer)
    assert vm.run(kernel, job(), streams.setup(input=reader)) == 7
    os.close(reader)
    assert (streams.output, streams.errors) == (b"SOME WORDS\n", b"that was it\n")
    assert streams.said[0] == f"booting Linux {RELEASE}" and streams.said[-1] == ""
    assert gone(pids)


def test_a_regular_file_can_be_the_input(
    kernel: Kernel, guest: Callable[[str], Path], tmp_path: Path
) -> None:
    guest("echo")
    streams = Streams()
    path = tmp_path / "input"
    path.write_bytes(b"word\n" * 40009)
    with open(path, "rb") as file:
        assert vm.run(kernel, job(), streams.setup(input=file.fileno())) == 7
    assert streams.output == b"WORD\n" * 40009


def test_all_that_was_written_before_the_end_arrives(
    kernel: Kernel, guest: Callable[[str], Path]
) -> None:
    guest("much")
    streams = Streams()
    assert vm.run(kernel, job(), streams.setup()) == 7
    assert streams.output == bytes(range(256)) * 256 * 101


def test_a_service_answers_lines(kernel: Kernel, guest: Callable[[str], Path]) -> None:
    guest("ask")
    streams = Streams()
    asked = []

    def answer(line: bytes) -> bytes:
        asked.append(line)
        return line.upper() + b"\n"

    assert vm.run(kernel, job(), streams.setup(services={"question": answer})) == 7
    assert asked == [b"one", b"two"]
    assert streams.output == b"ONE\n"


@pytest.mark.parametrize(
    ("part", "timeout", "message", "console"),
    [
        ("panic", None, "the guest ended: Kernel panic - not syncing: so", "two"),
        ("hang", 0.3, "the command did not end within 0.3 s", "last words"),
        ("no-setup", None, "the guest could not be set up: /host: No such device", ""),
        ("no-start", None, "ended before the command did: qemu: no room", ""),
    ],
)
def test_a_guest_that_fails_is_ended_and_its_console_kept(
    kernel: Kernel,
    guest: Callable[[str], Path],
    part: str,
    timeout: float | None,
    message: str,
    console: str,
) -> None:
    pids = guest(part)
    with pytest.raises(vm.GuestFailed) as failed:
        vm.run(kernel, job(), Streams().setup(timeout=timeout))
    assert message in str(failed.value)
    assert failed.value.exit_status == 125
    assert console in "\n".join(failed.value.console)
    assert gone(pids)


def test_a_kernel_that_does_not_boot_is_given_up(
    kernel: Kernel, guest: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = guest("no-boot")
    monkeypatch.setattr(vm, "_BOOT_SECONDS", 2.0)  # time for the stand-in to say who it is
    with pytest.raises(vm.GuestFailed, match=r"did not boot within 2 s"):
        vm.run(kernel, job(), Streams().setup())
    assert gone(pids)


@pytest.mark.parametrize("part", ["kvm-hangs", "kvm-ends"])
def test_kvm_is_tried_once(
    kernel: Kernel, guest: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    pids = guest(part)
    monkeypatch.setattr(vm, "kvm_device", lambda: True)
    monkeypatch.setattr(vm, "_KVM_SECONDS", 2.0)
    assert vm.kvm_verdict() is None
    assert vm.run(kernel, job(), Streams().setup()) == 7
    assert vm.kvm_verdict() is False
    assert len(pids.read_text().split()) == 2
    assert vm.run(kernel, job(), Streams().setup()) == 7
    assert len(pids.read_text().split()) == 3
    assert gone(pids)


def test_kvm_that_works_is_used(
    kernel: Kernel, guest: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = guest("ok")
    monkeypatch.setattr(vm, "kvm_device", lambda: True)
    for _ in range(2):
        assert vm.run(kernel, job(), Streams().setup()) == 7
        assert vm.kvm_verdict() is True
    assert len(pids.read_text().split()) == 2


def test_a_verdict_of_before_the_last_boot_is_none(kept: Path) -> None:
    cache.directory().joinpath("kvm").write_text('{"boot": "another", "works": false}')
    assert vm.kvm_verdict() is None
    cache.directory().joinpath("kvm").write_text("nonsense")
    assert vm.kvm_verdict() is None


def launched(kept: Path) -> subprocess.Popen[bytes]:
    """``rsplice kernel run`` as a process, with the cache of the test."""
    code = (
        "import sys; from pathlib import Path; from rsplice import caches; "
        f"caches.directory = lambda: Path({str(kept)!r}); "
        "from rsplice.kernel import vm; vm.kvm_device = lambda: False; "
        "from rsplice.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "kernel", "run", RELEASE, "--", "true"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_the_commands(
    kept: Path, guest: Callable[[str], Path], number: signal.Signals
) -> None:
    pids = guest("obey")
    with launched(kept) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert gone(pids)


def test_the_second_signal_ends_the_guest(kept: Path, guest: Callable[[str], Path]) -> None:
    pids = guest("hang")
    with launched(kept) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"before\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
        assert process.stderr.read() == b"rsplice: ended by SIGTERM\n"
    assert gone(pids)


def test_a_killed_rsplice_leaves_no_guest(kept: Path, guest: Callable[[str], Path]) -> None:
    pids = guest("hang")
    with launched(kept) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"before\n"
        process.kill()
    assert gone(pids)


def test_what_a_guest_prints_is_shown_sanitised(
    guest: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    guest("panic")
    assert main(["kernel", "run", RELEASE, "--", "true"]) == 125
    shown = capfd.readouterr().err
    assert "guest: one\n" in shown
    assert "guest: [ 1.2] Kernel panic - not syncing: so\nguest: Call Trace:\n" in shown
    assert len(shown.splitlines()) == 21 and "frame 0\n" in shown and "frame 99" not in shown
    assert "Kernel panic" in shown.splitlines()[-1]
    assert "\x1b" not in shown and "\x07" not in shown


def test_of_a_panic_that_an_oops_has_caused_the_oops_is_shown(
    guest: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    guest("oops")
    assert main(["kernel", "run", RELEASE, "--", "true"]) == 125
    *shown, last = capfd.readouterr().err.splitlines()
    assert shown[:4] == [
        "guest: [ 1.2] BUG: kernel NULL pointer dereference",
        "guest: [ 1.2] Oops: 0000 [#1] SMP",
        "guest: [ 1.2] RIP: so",
        "guest: [ 1.2]  ? frame 0",
    ]
    assert len(shown) == 40
    assert "Kernel panic - not syncing: Fatal exception" in last


def test_a_guest_that_trips_over_a_breakpoint_as_it_boots_is_booted_anew(
    guest: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    pids = guest("trips")
    assert main(["kernel", "run", RELEASE, "--", "true"]) == 7
    assert len(pids.read_text().splitlines()) == 2
    assert capfd.readouterr().err == ""
    pids.unlink()
    guest("trips-always")
    assert main(["kernel", "run", RELEASE, "--", "true"]) == 125
    assert len(pids.read_text().splitlines()) == 3
    assert "Oops: int3" in capfd.readouterr().err


def test_the_console_is_kept_where_it_is_wanted(
    guest: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    guest("panic")
    path = tmp_path / "console"
    assert main(["kernel", "run", "--console", str(path), RELEASE, "--", "true"]) == 125
    assert path.read_bytes().startswith(b"one\r\n\x1b]0;title")


def test_without_qemu_the_packages_are_named(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(RspliceError, match="apt-get install qemu-system-x86 "):
        vm.run(kernel, job(), vm.Setup())


# --- the cache ------------------------------------------------------------------------------------


def bzimage(payload: bytes, release: str = RELEASE) -> bytes:
    """A kernel image with one setup sector behind the boot sector, and what it unpacks."""
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x100)
    head[0x300 : 0x300 + len(release) + 5] = release.encode() + b" (me)"
    struct.pack_into("<II", head, 0x248, 0, len(payload) + 4)
    return bytes(head) + payload + b"\0\0\0\0"


def elf(sections: dict[bytes, bytes]) -> bytes:
    """A 64-bit ELF file with these sections."""
    contents = [b"", *sections.values()]
    names = b"\0" + b"\0".join(sections) + b"\0.names\0"
    contents.append(names)
    body, offsets = b"", []
    for content in contents:
        offsets.append(64 + len(body))
        body += content
    at = [0, *(names.index(b"\0" + name + b"\0") + 1 for name in (*sections, b".names"))]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, len(content), 0, 0, 1, 0)
        for name, offset, content in zip(at, offsets, contents, strict=True)
    )
    head = b"\x7fELF\x02\x01".ljust(0x28, b"\0") + struct.pack("<Q", 64 + len(body))
    head = head.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, len(contents), len(contents) - 1)
    return head.ljust(64, b"\0") + body + table


NOTE = struct.pack("<III4s8s", 4, 8, 18, b"Xen\0", b"entry")
OTHER_NOTE = struct.pack("<III4s4s", 4, 2, 3, b"GNU\0", b"no")


def package(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package with these files."""
    tree = path.with_suffix("")
    for name, content in {**files, "DEBIAN/control": CONTROL}.items():
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", tree, path], check=True, capture_output=True
    )
    return path


CONTROL = b"Package: x\nVersion: 1\nArchitecture: all\nMaintainer: me\nDescription: test\n"

needs_tools = pytest.mark.skipif(
    not (shutil.which("dpkg-deb") and shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin")),
    reason="not installed: dpkg or kmod (dpkg-deb, depmod)",
)


@needs_tools
def test_packages_become_a_kernel(kept: Path, tmp_path: Path) -> None:
    vmlinux = elf({b".notes": OTHER_NOTE + NOTE, b".BTF": b"types"})
    modules = f"usr/lib/modules/{RELEASE}"
    files = [
        package(tmp_path / "one.deb", {f"boot/vmlinuz-{RELEASE}": bzimage(lzma.compress(vmlinux))}),
        package(
            tmp_path / "two.deb",
            {
                f"{modules}/kernel/fs/a.ko": b"module",
                f"{modules}/kernel/drivers/gpu/big.ko": b"module",
                "usr/share/doc/x": b"no module",
            },
        ),
    ]
    said: list[str] = []
    kernel = cache.add_packages(files, said.append)
    assert (kernel.release, kernel.series) == (RELEASE, "6.12")
    assert kernel.image.read_bytes() == vmlinux
    assert kernel.source == "one.deb two.deb"
    assert [path.name for path in kernel.modules.rglob("*.ko")] == ["a.ko"]
    assert (kernel.modules / "modules.dep").exists()
    assert cache.kernels() == [kernel]
    assert cache.find("6.12") == cache.find(RELEASE) == kernel
    assert cache.find("6.1") is None
    assert cache.add_packages(files, said.append) == kernel
    assert [path.name for path in cache.directory().iterdir()] == [RELEASE]
    assert kept.stat().st_mode & 0o777 == 0o700


@needs_tools
def test_an_image_that_cannot_start_as_it_is_stays_packed(kept: Path, tmp_path: Path) -> None:
    packed = bzimage(lzma.compress(elf({b".notes": OTHER_NOTE})))
    (tmp_path / "vmlinuz").write_bytes(packed)
    kernel = cache.add_image(tmp_path / "vmlinuz", None, lambda what: None)
    assert kernel.image.read_bytes() == packed


@needs_tools
def test_modules_of_another_kernel_are_refused(kept: Path, tmp_path: Path) -> None:
    file = package(
        tmp_path / "x.deb",
        {
            "boot/vmlinuz": bzimage(lzma.compress(elf({}))),
            f"boot/vmlinuz-{RELEASE}": bzimage(lzma.compress(elf({}))),
            "lib/modules/6.1.0/kernel/fs/a.ko": b"module",
        },
    )
    with pytest.raises(RspliceError, match=r"modules are those of Linux 6\.1\.0"):
        cache.add_packages([file], lambda what: None)
    assert cache.kernels() == [] and list(cache.directory().iterdir()) == []


@needs_tools
def test_a_package_without_a_kernel_is_refused(kept: Path, tmp_path: Path) -> None:
    file = package(tmp_path / "x.deb", {"usr/share/doc/x": b"x"})
    with pytest.raises(RspliceError, match=r"no kernel image in x\.deb"):
        cache.add_packages([file], lambda what: None)
    (tmp_path / "y.deb").write_bytes(b"no package")
    with pytest.raises(RspliceError, match="not a Debian package"):
        cache.add_packages([tmp_path / "y.deb"], lambda what: None)
    assert list(cache.directory().iterdir()) == []


def test_a_cache_that_others_can_write_to_is_not_used(kept: Path) -> None:
    cache.directory().chmod(0o777)
    with pytest.raises(RspliceError, match="others can write there"):
        cache.kernels()


def test_an_unknown_version_is_one_line(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["kernel", "run", "4.4", "--", "true"], ["kernel", "fetch", "4.4"]):
        assert main(arguments) == 125
        error = capsys.readouterr().err
        assert error.startswith("rsplice: no kernel 4.4 here") and error.count("\n") == 1
        assert "5.10, 6.1, 6.12, 7.2, 7.3" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernel"], "required: ACTION"),
        (["kernel", "run", "6.12"], "write: rsplice kernel run [OPTIONS] VERSION -- CMD"),
        (["kernel", "run", "6.12", "--network", "--", "true"], "[OPTIONS] VERSION -- CMD"),
        (["kernel", "run", "--timeout", "never", "6.12", "--", "true"], "positive number"),
        (["kernel", "fetch", "6.1", "6.12"], "one version at a time"),
        (["kernel", "fetch", "./missing"], "no such file"),
        (["kernel", "fetch", "missing.deb"], "no such file"),
        (["kernel", "fetch", "--modules", "/missing", "/etc/passwd"], "no such directory"),
        (
            ["kernel", "fetch", "/etc/passwd"],
            "/etc/passwd: the kernel image is not a bzImage: give",
        ),
        (["audit", "--kernel", "6.12", "-p", "1"], "--kernel runs a command"),
        (["audit", "--kernel", "6.12", "--all"], "--kernel runs a command"),
        (["audit", "--kernel", "6.12"], "--kernel runs a command"),
    ],
)
def test_bad_arguments_are_one_line(
    kept: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 125
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("rsplice: ") and error.count("\n") == 1


def test_list_names_what_is_here_and_what_can_be_had(
    kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernel", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(debian.SUITES)
    assert RELEASE in lines[2] and "not fetched" in lines[1]


# --- images ---------------------------------------------------------------------------------------


def test_the_release_is_read_from_packed_and_unpacked_kernels() -> None:
    assert image.release(bzimage(b"", "6.1.0-9")) == "6.1.0-9"
    assert image.release(elf({b".x": b"..Linux version 6.2.0 (me)"})) == "6.2.0"
    for bad in (b"", b"MZ" * 1000, elf({})):
        with pytest.raises(image.BadImage):
            image.release(bad)


def test_only_a_kernel_with_the_note_starts_unpacked() -> None:
    assert image.boots_directly(elf({b".notes": NOTE}))
    assert image.boots_directly(elf({b".notes": OTHER_NOTE + NOTE}))
    assert not image.boots_directly(elf({b".notes": OTHER_NOTE}))
    assert not image.boots_directly(elf({}))


# --- the initramfs --------------------------------------------------------------------------------


def test_modules_are_loaded_after_those_that_they_need(kernel: Kernel) -> None:
    modules = kernel.modules
    (modules / "modules.dep").write_text(
        "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs.ko\n"
        "kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs.ko\n"
        "kernel/fs/netfs.ko:\n"
        "kernel/fs/unused.ko:\n"
    )
    for name in ("fs/9p/9p.ko.xz", "net/9p/9pnet.ko.xz"):
        (modules / "kernel" / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / "kernel" / name).write_bytes(lzma.compress(name.encode()))
    (modules / "kernel/fs/netfs.ko").write_bytes(b"plain")
    archive = initramfs.build(kernel, job())
    (text,) = (part for name, part in unpacked(archive).items() if name == "job")
    loaded = [line.split(b"=", 1)[1] for line in text.split(b"\0") if line.startswith(b"module=")]
    assert loaded == [b"/modules/netfs.ko", b"/modules/9pnet.ko", b"/modules/9p.ko"]
    assert unpacked(archive)["modules/9p.ko"] == b"fs/9p/9p.ko.xz"
    assert initramfs.build(kernel, job()) == archive


def test_the_job_says_what_to_run(kernel: Kernel) -> None:
    task = Job(
        [b"a b", b"", b"\xff"], b"/x", {b"N": b"=", b"M": b""}, network=True, ports=["p"],
        files={"f": b"content"},
    )  # fmt: skip
    files = unpacked(initramfs.build(kernel, task))
    lines = files["job"].split(b"\0")
    assert [line for line in lines if line.startswith(b"arg=")] == [
        b"arg=a b",
        b"arg=",
        b"arg=\xff",
    ]
    assert {b"cwd=/x", b"env=N==", b"env=M=", b"network=1", b"port=p"} <= set(lines)
    assert files["rsplice/f"] == b"content"
    assert files["init"].startswith(b"\x7fELF")


@given(st.dictionaries(st.from_regex(r"[a-z]{1,9}(/[a-z]{1,9}){0,2}", fullmatch=True), st.binary()))
def test_archives_hold_what_was_put_in(files: dict[str, bytes]) -> None:
    directories = {str(parent) for name in files for parent in Path(name).parents}
    files = {name: content for name, content in files.items() if name not in directories}
    archive = initramfs._archive(files)
    assert len(archive) % 4 == 0
    assert unpacked(archive) == files


def unpacked(archive: bytes) -> dict[str, bytes]:
    """The regular files in archives that follow each other, read by the format's description."""
    files, at = {}, 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = at + (110 + name_size + 3 & ~3)
        if mode & 0o170000 == 0o100000:
            files[name] = archive[start : start + size]
        at = start + (size + 3 & ~3)
    return files


def test_the_audit_passes_on_what_decides_the_counts() -> None:
    import argparse

    from rsplice.commands import audit as command
    from rsplice.kernel.audit import _options

    parser = argparse.ArgumentParser()
    command.prepare_parser(parser)
    known = {action.dest for action in parser._actions} - {"help", "command", "kernel"}
    here = {"json", "html", "text", "fail_on", "quiet", "journey_json", "pids", "everything"}
    here |= {"junit", "github"}  # what is made of the counts
    here |= {"verify"}  # refused
    words = (
        "--identity all --user me --duration 2 --interval 3 --journey 4 --journey-file f "
        "--journey-finding g --integrity -v -- x"
    )
    given_ = parser.parse_args(words.split())
    options = _options(given_)
    passed = {option.split("=")[0].strip("-").replace("-", "_") for option in options}
    passed = {"verbose" if name == "v" else name for name in passed}
    assert passed == known - here
    assert parser.parse_args([*options, "--", "x"]) == given_
    assert _options(parser.parse_args(["--journey-json", "f", "x"]))[-1] == "--journey"


@pytest.mark.parametrize(
    ("missing", "device", "verdict", "state", "words"),
    [
        (["depmod"], True, None, "missing", "no depmod: apt-get install qemu-system-x86 "),
        ([], False, None, "ok", "emulated: /dev/kvm is missing"),
        ([], True, None, "ok", "with KVM if it runs a guest"),
        ([], True, True, "ok", "with KVM, which ran one"),
        ([], True, False, "ok", "emulated: KVM did not run one"),
    ],
)
def test_doctor_says_whether_other_kernels_can_be_run(
    monkeypatch: pytest.MonkeyPatch,
    missing: list[str],
    device: bool,
    verdict: bool | None,
    state: str,
    words: str,
) -> None:
    from rsplice.commands.doctor import _check_vm

    monkeypatch.setattr(vm, "missing_programs", lambda: missing)
    monkeypatch.setattr(vm, "kvm_device", lambda: device)
    monkeypatch.setattr(vm, "kvm_verdict", lambda: verdict)
    check = _check_vm()
    assert check.state == state
    assert words in check.detail
    assert bool(check.cost) == (state == "missing")


# --- make test-kernels ----------------------------------------------------------------------------


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> kernels.NotSeen:
    entry = kernels.NotSeen(r"::test_late\b", (6, 2), "it came with 6.2")
    monkeypatch.setattr(kernels, "NOT_SEEN", (entry,))
    return entry


def outcome_of(series: str, **results: str) -> kernels.Outcome:
    outcome = kernels.Outcome(series, f"{series}.9", ["tests/test_x.py::test_one[a]"])
    outcome.collected += ["tests/test_x.py::test_one[b]", "tests/test_x.py::test_late"]
    names = dict(zip(("a", "b", "late"), outcome.collected, strict=True))
    outcome.results = {names[key]: (what, "why") for key, what in results.items()}
    return outcome


@pytest.mark.usefixtures("lacking")
def test_a_kernels_results_are_held_against_what_it_can_show() -> None:
    assert outcome_of("6.1", a="passed", b="passed", late="failed").problems() == []
    assert outcome_of("6.12", a="passed", b="passed", late="passed").problems() == []
    assert outcome_of("6.1", a="passed", b="skipped", late="passed").problems() == [
        "6.1: tests/test_x.py::test_one[b]: skipped: why",
        "6.1: tests/test_x.py::test_late: passed, but should not: it came with 6.2",
    ]
    newer = kernels.NotSeen("test_late", None, "it went with 6.3", since=(6, 3))
    assert [newer.holds(version) for version in ((6, 2), (6, 3), (7, 0))] == [False, True, True]
    assert outcome_of("6.12", a="passed", late="failed").problems() == [
        "6.12: tests/test_x.py::test_one[b]: missing: the guest ended before it",
        "6.12: tests/test_x.py::test_late: failed: why",
    ]
    assert kernels.Outcome("6.1", status=125, last_words="rsplice: no QEMU").problems() == [
        "6.1: no test was run (exit status 125): rsplice: no QEMU"
    ]


@pytest.mark.parametrize(("late", "cell"), [("passed", "3 passed"), ("failed", "1 not seen [1]")])
def test_a_race_may_be_won_and_is_shown_as_it_ended(
    lacking: kernels.NotSeen, monkeypatch: pytest.MonkeyPatch, late: str, cell: str
) -> None:
    monkeypatch.setattr(kernels, "NOT_SEEN", (replace(lacking, race=True),))
    outcome = outcome_of("6.1", a="passed", b="passed", late=late)
    assert outcome.problems() == []
    assert cell in kernels.table_of([outcome])


@pytest.mark.usefixtures("lacking")
def test_the_table_shows_what_passed_and_why_the_rest_is_not_seen() -> None:
    outcomes = [
        outcome_of("6.1", a="passed", b="failed", late="failed"),
        outcome_of("6.12", a="passed", b="passed", late="passed"),
    ]
    outcomes[1].seconds = 420
    assert kernels.table_of(outcomes) == (
        "| test | 6.1 (6.1.9) | 6.12 (6.12.9) |\n"
        "| --- | --- | --- |\n"
        "| **x** | 1 passed, 1 **failed**, 1 not seen [1] | 3 passed |\n"
        "| one | 1 passed, 1 **failed** | 2 passed |\n"
        "| late | 1 not seen [1] | 1 passed |\n"
        "| minutes | 0 | 7 |\n"
        "\n"
        "1. Not seen: it came with 6.2.\n"
    )


#: Plays `rsplice kernel run`: each guest runs a test of three, and ends in the second.
GUEST = r"""
import json, sys
from pathlib import Path
names = Path(sys.argv[-1].removeprefix("@")).read_text().splitlines()
print("6.1.9-guest")
print(json.dumps({"test": names[0]}))
print(json.dumps({"test": names[0], "outcome": "passed", "why": ""}))
if len(names) > 1:
    print(json.dumps({"test": names[1]}), flush=True)
    sys.exit("guest: Kernel panic")
"""


def test_a_guest_that_ends_in_a_test_fails_it_and_another_one_runs_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "guest").write_text(f"#!{sys.executable}\n{GUEST}")
    (tmp_path / "guest").chmod(0o755)
    monkeypatch.setattr(kernels, "BUILD", tmp_path)
    monkeypatch.setattr(kernels, "_module", lambda series: {})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "guest"))
    tests = [f"tests/test_x.py::test_{name}" for name in ("one", "two", "three")]
    outcome = kernels._run("6.1", tests)
    assert outcome.release == "6.1.9-guest"
    assert outcome.results == {
        tests[0]: ("passed", ""),
        tests[1]: ("failed", "the guest ended in it: guest: Kernel panic"),
        tests[2]: ("passed", ""),
    }
    monkeypatch.setattr(kernels, "BOOTS", 1)
    assert kernels._run("6.1", tests).left == tests[2:]


def test_results_of_single_tests_are_added_to_those_of_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "BUILD", tmp_path)
    kernels._store(outcome_of("6.1", a="passed", b="failed"), add=False)
    kernels._store(outcome_of("6.1", b="passed", late="failed"), add=True)
    tests = outcome_of("6.1").collected
    again = kernels._stored("6.1", tests)
    assert [again.results[test][0] for test in tests] == ["passed", "passed", "failed"]
    kernels._store(outcome_of("6.1", a="passed"), add=False)
    assert kernels._stored("6.1", tests).left == tests[1:]


def test_the_docs_give_the_reasons_that_the_tests_know() -> None:
    page = kernels.DOCS.read_text()
    results = page.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    told = set(re.findall(r"^\d+\. Not seen: (.*)\.$", results, re.MULTILINE))
    shown = [kernels.Outcome(series).version for series in kernels.SERIES]
    held = [n for n in kernels.NOT_SEEN if any(map(n.holds, shown))]
    races = {n.reason for n in held if n.race}  # which may have been won
    assert told - races == {n.reason for n in held} - races
    older = {n.reason for n in kernels.NOT_SEEN} - told
    assert [reason for reason in older if reason not in " ".join(page.split())] == []
    assert "**failed**" not in results
