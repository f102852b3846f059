# SPDX-License-Identifier: MIT
"""Keys without Enter, signals without interruptions, and everything put back afterwards."""

from __future__ import annotations

import os
import re
import select
import signal
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_KEY = re.compile(rb"\x1b(?:[\[O][0-9;]*[@-~]|.)?|.", re.DOTALL)
#: What keys send that are not letters; xterm's modes of cursor keys, of Home and of End.
_NAMES = {
    b"\r": "enter",
    b"\n": "enter",
    b"\x7f": "escape",
    b"\x1b": "escape",
    **{b"\x1b" + mode + b"A": "up" for mode in (b"[", b"O")},
    **{b"\x1b" + mode + b"B": "down" for mode in (b"[", b"O")},
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
}
_SEQUENCE_S = 0.05  #: seconds until an escape is a key, not the beginning of what a key sends


@contextmanager
def cbreak(fd: int) -> Iterator[None]:
    """Lets keys be read at once and unechoed from terminal *fd*, with Ctrl-C but no Ctrl-Z."""
    saved = termios.tcgetattr(fd)
    mode = termios.tcgetattr(fd)
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    mode[6] = [*mode[6]]
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    mode[6][termios.VSUSP] = os.fpathconf(fd, "PC_VDISABLE").to_bytes(1, "little")
    termios.tcsetattr(fd, termios.TCSANOW, mode)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal has hung up
            termios.tcsetattr(fd, termios.TCSANOW, saved)


def read_keys(fd: int) -> list[str]:
    """The keys pressed since the last call: characters, "up", "down", "enter", "escape" and such.

    Others that send escape sequences are left out. A terminal that has hung up reads as "q".
    """
    try:
        data = os.read(fd, 1024)
        while data.endswith(b"\x1b") and select.select([fd], [], [], _SEQUENCE_S)[0]:
            more = os.read(fd, 1024)
            if not more:
                break
            data += more
    except OSError:
        data = b""
    if not data:
        return ["q"]
    keys = (_NAMES.get(key) or _character(key) for key in _KEY.findall(data))
    return [key for key in keys if key]


def _character(key: bytes) -> str:
    """The key of one byte; "" for others."""
    return key.decode("ascii", "ignore") if len(key) == 1 else ""


class Signals:
    """While entered, a signal ends a wait instead of the process.

    After SIGINT the process goes on; SIGTERM and SIGHUP are raised again on leaving, when what was
    entered later is already put back. A signal that was ignored stays so.
    """

    def __init__(self) -> None:
        self.ending: int | None = None  #: the signal that asks to end
        self._saved: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*_ENDING, signal.SIGWINCH):
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                self._saved[number] = handler
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._saved.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)
        if self.ending not in (None, signal.SIGINT):
            signal.raise_signal(self.ending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGWINCH:
            self.ending = number

    def wait(self, until: float, keys: int | None) -> tuple[bool, bool]:
        """Waits for a signal, a key or the time *until* (of time.monotonic()).

        :param keys: the terminal that keys are read from, if any
        :return: whether there are keys, and whether the window has a new size
        """
        files = [self._read] if keys is None else [self._read, keys]
        ready, _, _ = select.select(files, [], [], max(0.0, until - time.monotonic()))
        seen = os.read(self._read, 1024) if self._read in ready else b""
        return keys in ready, signal.SIGWINCH in seen
