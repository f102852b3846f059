# SPDX-License-Identifier: MIT
"""Runs one command on another kernel: QEMU, this machine's root read-only, streams passed through.

A runner of our own: from its start to the command's first instruction it takes 4 s under
emulation. Kernels are started uncompressed, from an initramfs whose init (init.c) does the rest.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from rsplice.errors import RspliceError
from rsplice.kernel import initramfs
from rsplice.kernel.cache import Kernel, directory
from rsplice.kernel.initramfs import Job
from rsplice.session import handling
from rsplice.tracers.compiled import COMPILER, answer

QEMU = "qemu-system-x86_64"
#: What a machine that runs guests needs, by Debian's names.
PACKAGES = "qemu-system-x86 kmod e2fsprogs debian-archive-keyring"

Sink = Callable[[bytes], None]

#: Places that are the guest's own; where rsplice and its Python lie is seen there all the same.
_HIDDEN = ("/tmp/", "/var/tmp/", "/run/", "/dev/shm/")
_INSTALLED = dict.fromkeys((sys.prefix, str(Path(__file__).parents[2])))

#: The first ports, in the order that init.c knows.
_STREAMS = ("control", "input", "output", "errors")
_CONSOLE_LINES = 20
_OOPS_LINES, _FAULT_LINES = 40, 3  #: the registers come before the call trace
_CONSOLE_WIDTH = 1000  #: bytes of a line that are kept
_KVM_SECONDS = 8.0  #: a guest that KVM runs is up within one
_BOOT_SECONDS = 180.0  #: an emulated one on a busy machine
_ANSWER_SECONDS = 30.0
#: An emulated CPU may run on into a breakpoint that another one has patched the kernel's text by
#: (smp_text_poke_bp_batch(), arch/x86/kernel/alternative.c), and that is gone by the time it is
#: handled: an oops of int3, about once in 100 boots where each CPU had a thread of its own.
#: Where no command has begun the guest is booted anew.
_BOOTS = 3
#: For rsplice in a guest to read counters and detach probes once a signal has told it to end.
LAST_WORDS = 60.0
_LINE_MAX = 1 << 23  #: bytes
_SCRATCH_MIB = 4096
_PR_SET_PDEATHSIG = 1

#: No kernel address differs from one boot to the next, so that what was compiled for one serves
#: the next; a panic ends the guest. Whether the timer ticks is not tested: within that test's time
#: it may not, on a busy machine, and then the kernel panics (check_timer(), io_apic.c).
_COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 nokaslr mitigations=off random.trust_cpu=on "
    "no_timer_check"
)


class GuestFailed(RspliceError):
    """A guest that ended otherwise than by its command's end.

    :param console: its last lines, as they came
    """

    def __init__(self, message: str, console: list[str]) -> None:
        super().__init__(message)
        self.console = console


@dataclass
class Setup:
    """The guest, and what goes on with what it sends.

    :param memory: MiB
    :param timeout: seconds that the command may take
    :param last_words: seconds that it has to end once a signal has told it to
    :param input: descriptor of the command's standard input; None: it is empty
    :param sinks: take what comes out of the ports "output", "errors" and others, by name; the
        command finds these others below initramfs.PORTS
    :param services: answer the lines that come out of further ports
    :param console: takes what the kernel writes to its console
    :param say: is told what is being done
    """

    memory: int = 2048
    cpus: int = field(default_factory=lambda: min(os.cpu_count() or 1, 4))
    timeout: float | None = None
    last_words: float = 15.0
    input: int | None = None
    sinks: Mapping[str, Sink] = field(default_factory=dict)
    services: Mapping[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    console: Sink | None = None
    say: Callable[[str], None] = lambda what: None


def run(kernel: Kernel, job: Job, setup: Setup) -> int:
    """Boots *kernel*, runs the job, and returns the command's exit status (128 + signal).

    No guest outlives this call, whatever ends it.

    :raises RspliceError: QEMU is missing
    :raises GuestFailed: it did not start, panicked, or took longer than the timeout
    """
    if not shutil.which(QEMU):
        raise RspliceError(f"{QEMU} is not installed. As root: apt-get install {PACKAGES}")
    setup = replace(setup, services={"compiler": answer, **setup.services})
    further = [name for name in setup.sinks if name not in _STREAMS]
    compiler = {COMPILER.encode(): f"{initramfs.PORTS}/compiler".encode()}
    job = replace(
        job,
        ports=[*further, *setup.services],
        shown=[path for path in _INSTALLED if path.startswith(_HIDDEN)],
        environment={**job.environment, **compiler},
    )
    archive = initramfs.build(kernel, job)
    if kvm_device() and kvm_verdict() is not False:
        try:
            with _Guest(kernel, archive, job, setup, kvm=True) as guest:
                status = guest.run()
            _keep_verdict(True)
            return status
        except _NotUp:
            _keep_verdict(False)
    for attempt in range(_BOOTS):
        with _Guest(kernel, archive, job, setup, kvm=False) as guest:
            try:
                return guest.run()
            except GuestFailed:
                if not guest.tripped or attempt == _BOOTS - 1:
                    raise
    raise AssertionError  # the last one has returned or raised


# --- KVM ------------------------------------------------------------------------------------------


def missing_programs() -> list[str]:
    """What has to be installed before a guest can be run, by its programs' names."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return [
        name for name in (QEMU, "depmod", "mkfs.ext4", "cc") if not shutil.which(name, path=path)
    ]


def kvm_device() -> bool:
    """Whether this user may ask the kernel for KVM."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def kvm_verdict() -> bool | None:
    """Whether KVM ran a guest since this machine booted; None if none was tried."""
    try:
        kept = json.loads((directory() / "kvm").read_text())
        return bool(kept["works"]) if kept["boot"] == _boot() else None
    except (RspliceError, OSError, ValueError, KeyError, TypeError):
        return None


def _keep_verdict(works: bool) -> None:
    with suppress(OSError):
        (directory() / "kvm").write_text(json.dumps({"boot": _boot(), "works": works}))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class _NotUp(Exception):
    """KVM did not get the guest up in time."""


def dying_with_this_one() -> Callable[[], None]:
    """For a child that is to be killed when this process ends, however it does: preexec_fn."""
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


# --- one guest ------------------------------------------------------------------------------------


class _Guest:
    """One QEMU process. Leaving it ends the process."""

    def __init__(
        self, kernel: Kernel, archive: bytes, job: Job, setup: Setup, *, kvm: bool
    ) -> None:
        self._release = kernel.release
        self._setup = setup
        self._kvm = kvm
        self._cleanup = ExitStack()
        self._selector = self._cleanup.enter_context(selectors.DefaultSelector())
        self._console: deque[bytes] = deque(maxlen=_CONSOLE_LINES)
        self._line = b""  # the console's last, as far as it is here
        self._oops: list[bytes] = []  # the first, with which a panic may have begun
        self._panic: bytes | None = None
        self._words = b""
        self._up = self._running = False
        self._status: int | None = None
        self._failure: str | None = None
        self._signals = 0
        self._last_words = float("inf")
        self._ours: list[socket.socket] = []
        try:
            self._start(kernel, archive, job)
        except BaseException:
            self._cleanup.close()
            raise

    def __enter__(self) -> _Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    def _start(self, kernel: Kernel, archive: bytes, job: Job) -> None:
        setup = self._setup
        initrd = os.memfd_create("initramfs")
        self._cleanup.callback(os.close, initrd)
        with open(initrd, "wb", closefd=False) as file:
            file.write(archive)
        theirs: list[socket.socket] = []
        arguments = _arguments(kernel, setup, job.network, self._kvm)
        arguments += ["-initrd", f"/proc/self/fd/{initrd}"]
        for number, name in enumerate(("console", *_STREAMS, *job.ports)):
            mine, other = socket.socketpair()
            theirs.append(other)
            self._ours.append(mine)
            self._cleanup.callback(mine.close)
            arguments += ["-chardev", f"socket,id={name},fd={other.fileno()}"]
            if name == "console":
                arguments += ["-serial", "chardev:console"]
            else:
                arguments += ["-device", f"virtserialport,chardev={name},nr={number},name={name}"]
        self._control = self._ours[1]
        self._input = self._ours[2]
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the stack)
        self._complaints = self._cleanup.enter_context(complaints)
        self._qemu = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=self._complaints,
            stderr=self._complaints,
            pass_fds=[initrd, *(each.fileno() for each in theirs)],
            start_new_session=True,
            preexec_fn=dying_with_this_one(),
        )
        self._cleanup.callback(self._end)
        for each in theirs:
            each.close()
        sinks: list[Sink] = [self._take_console, self._take_control, lambda data: None]
        for name, mine in zip(("output", "errors", *job.ports), self._ours[3:], strict=True):
            if name in setup.services:
                sinks.append(_Service(mine, setup.services[name]))
            else:
                sinks.append(setup.sinks.get(name, lambda data: None))
        for mine, sink in zip(self._ours, sinks, strict=True):
            self._selector.register(mine, selectors.EVENT_READ, sink)
        if setup.input is None:
            self._input.shutdown(socket.SHUT_WR)

    def _end(self) -> None:
        self._qemu.kill()
        self._qemu.wait()

    def run(self) -> int:
        """The command's exit status. GuestFailed if there is none."""
        self._setup.say(f"booting Linux {self._release}" + (" (KVM)" if self._kvm else ""))
        begun = time.monotonic()
        deadline = begun + (_KVM_SECONDS if self._kvm else _BOOT_SECONDS)
        with handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._interrupt):
            while self._status is None:
                was_running = self._running
                open_ports = self._take_turn()
                if self._running and not was_running:
                    self._setup.say("")
                    self._feed()
                    limit = self._setup.timeout
                    deadline = time.monotonic() + limit if limit else float("inf")
                if self._failure:
                    raise self._failed(self._failure)
                if not open_ports:
                    if self._kvm and not self._up:
                        raise _NotUp
                    raise self._failed(self._why_ended())
                if time.monotonic() > self._last_words:
                    raise self._failed("the command did not end when it was told to")
                if time.monotonic() > deadline:
                    if self._kvm and not self._up:
                        raise _NotUp
                    raise self._failed(self._why_late())
            while self._take_turn(0.0):  # what it wrote came before its status
                pass
        return self._status

    def _take_turn(self, seconds: float = 0.2) -> bool:
        """Passes on what comes. Whether there is anything left to wait for."""
        events = self._selector.select(seconds)
        for key, _ in events:
            if key.data is None:
                self._pass_input()
                continue
            source = key.fileobj
            assert isinstance(source, socket.socket)
            try:
                data = source.recv(1 << 18)
            except OSError:
                data = b""
            if not data:
                self._selector.unregister(source)
                continue
            try:
                key.data(data)
            except BrokenPipeError:
                self._selector.unregister(source)
                source.close()
                if source in self._ours[3:5]:
                    self._send(signal.SIGPIPE)
        if seconds == 0:
            return bool(events)
        left = self._selector.get_map().values()
        return any(key.fileobj is self._control for key in left)

    def _take_console(self, data: bytes) -> None:
        if self._setup.console:
            self._setup.console(data)
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[-_CONSOLE_WIDTH:]
        for line in lines:
            self._keep(line[:_CONSOLE_WIDTH])

    def _keep(self, line: bytes) -> None:
        """The last lines, but of a panic the first: many more follow, and the cause stands here.

        Or in those of an oops before it, whose header ends in its number (__die_header(),
        arch/x86/kernel/dumpstack.c) and may follow a few lines of the page fault's.
        """
        if not self._oops and self._panic is None and re.search(rb"\[#\d+\]", line):
            self._oops = [each for each in self._console if b"BUG" in each or b"#PF" in each]
            self._oops = self._oops[-_FAULT_LINES:] + [line]
        elif self._oops and len(self._oops) < _OOPS_LINES:
            self._oops.append(line)
        if self._panic is None and (found := re.search(rb"Kernel panic[^\r]*", line)):
            self._panic = found[0]
            self._console = deque(list(self._console)[-_CONSOLE_LINES // 2 :])
        if self._panic is None or len(self._console) < _CONSOLE_LINES:
            self._console.append(line)

    def _take_control(self, data: bytes) -> None:
        *lines, self._words = (self._words + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "up":
                self._up = True
            elif word == "run":
                self._up = self._running = True
            elif word == "fail":
                self._failure = f"the guest could not be set up: {rest}"
            elif word == "exit" and rest.isdigit():
                self._status = int(rest)

    # --- input and signals ---

    def _feed(self) -> None:
        """From now on what comes from the standard input goes to the command."""
        if self._setup.input is not None:
            self._pending = b""
            self._input.setblocking(False)
            try:
                self._selector.register(self._setup.input, selectors.EVENT_READ, None)
            except PermissionError:  # a regular file: always ready
                self._pump_file(self._setup.input)

    def _pump_file(self, file: int) -> None:
        """A child that feeds a file, which cannot be waited for."""
        if os.fork() == 0:
            try:
                self._input.setblocking(True)
                while data := os.read(file, 1 << 16):
                    self._input.sendall(data)
                self._input.shutdown(socket.SHUT_WR)
            finally:
                os._exit(0)

    def _pass_input(self) -> None:
        assert self._setup.input is not None
        if not self._pending:
            try:
                self._pending = os.read(self._setup.input, 1 << 16)
            except OSError:
                self._pending = b""
            if not self._pending:
                self._selector.unregister(self._setup.input)
                self._input.shutdown(socket.SHUT_WR)
                return
        try:
            self._pending = self._pending[self._input.send(self._pending) :]
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # the guest is gone
            self._selector.unregister(self._setup.input)

    def _send(self, number: int) -> None:
        with suppress(OSError):
            self._control.send(b"%d\n" % number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first signal is the command's, if it runs; the second ends the guest."""
        self._signals += 1
        if self._running and self._signals == 1:
            self._send(number)
            self._last_words = time.monotonic() + self._setup.last_words
            return
        raise _Ended(number)

    # --- failures ---

    @property
    def tripped(self) -> bool:
        """Whether it panicked by a breakpoint of its own, before the command began."""
        oops = any(b"int3" in line for line in self._oops)
        return self._panic is not None and oops and not self._running

    def _failed(self, why: str) -> GuestFailed:
        kept: Iterable[bytes] = [*self._console, self._line]
        if self._panic is not None:
            kept = self._oops or self._console
        lines = [line.decode(errors="replace").rstrip("\r") for line in kept]
        return GuestFailed(why, [line for line in lines if line.strip()])

    def _why_ended(self) -> str:
        # Panicked: it asked for a reboot, and QEMU ended.
        if self._panic is not None:
            return f"the guest ended: {self._panic.decode(errors='replace')}"
        with suppress(subprocess.TimeoutExpired):
            self._qemu.wait(5)
        self._complaints.seek(0)
        words = self._complaints.read().decode(errors="replace").strip().splitlines()
        said = f": {words[-1]}" if words else ""
        return f"{QEMU} ended before the command did{said}"

    def _why_late(self) -> str:
        if self._running:
            return f"the command did not end within {self._setup.timeout:g} s"
        return f"Linux {self._release} did not boot within {_BOOT_SECONDS:g} s"


class _Service:
    """Answers each line that comes out of a port.

    A guest that does not take its answer in time gets no more of them: BrokenPipeError.
    """

    def __init__(self, port: socket.socket, answer: Callable[[bytes], bytes]) -> None:
        self._port, self._answer = port, answer
        self._words = b""
        port.settimeout(_ANSWER_SECONDS)

    def __call__(self, data: bytes) -> None:
        *lines, self._words = (self._words + data).split(b"\n")
        if len(self._words) > _LINE_MAX:
            raise BrokenPipeError
        try:
            for line in lines:
                self._port.sendall(self._answer(line))
        except OSError as error:
            raise BrokenPipeError from error


class _Ended(RspliceError):
    """A signal asked to end the guest."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}", 128 + number)


def _arguments(kernel: Kernel, setup: Setup, network: bool, kvm: bool) -> list[str]:
    """QEMU's, but for what belongs to open descriptors."""
    # One thread for all CPUs, see _BOOTS: a 7.3 guest panicked so as tracepoints were attached.
    # The price: two busy processes take twice as long as one.
    accelerator = ("kvm", "host") if kvm else ("tcg,thread=single", "max")
    arguments = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    arguments += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"]
    arguments += ["-M", "q35", "-accel", accelerator[0], "-cpu", accelerator[1]]
    arguments += ["-smp", str(setup.cpus), "-m", str(setup.memory)]
    arguments += ["-kernel", str(kernel.image), "-append", _COMMAND_LINE]
    arguments += ["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]
    arguments += ["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]
    # snapshot=on: what is written goes to a file of this guest that has no name.
    scratch = str(initramfs.scratch(_SCRATCH_MIB)).replace(",", ",,")
    drive = f"file={scratch},id=scratch,if=none,format=raw,snapshot=on,cache=unsafe"
    arguments += ["-drive", drive, "-device", "virtio-blk-pci,drive=scratch"]
    arguments += ["-device", "virtio-serial-pci"]
    if network:
        arguments += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]
    return arguments
