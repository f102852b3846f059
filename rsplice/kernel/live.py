# SPDX-License-Identifier: MIT
"""``rsplice live --kernel``: the snapshots are made in the guest, the view on this side."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from rsplice.audit import Audit
from rsplice.errors import RspliceError
from rsplice.kernel.cache import Kernel
from rsplice.kernel.vm import LAST_WORDS, dying_with_this_one
from rsplice.recording import parse_audit

_BOOT_SECONDS = 240.0
_END_SECONDS = LAST_WORDS + 5


class GuestSource:
    """A source of snapshots: ``rsplice record -o -`` in a guest.

    Use as a context manager: leaving it ends the guest.

    :param options: of ``rsplice record``
    :param kept: takes what the command, and rsplice in the guest, print
    """

    def __init__(
        self, kernel: Kernel, command: Sequence[str], options: Sequence[str], kept: IO[bytes]
    ) -> None:
        rsplice = [sys.executable, "-m", "rsplice"]
        record = [*rsplice, "record", "-o", "-", *options, "--", *command]
        self._last = Audit(command=list(command), kernel_release=kernel.release, kernel_where="vm")
        self._first = threading.Event()
        guest = [*rsplice, "kernel", "run", f"--kill-after={LAST_WORDS}", kernel.release]
        self._process = subprocess.Popen(
            [*guest, "--", *record],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=kept,
            start_new_session=True,  # Ctrl-C is the view's
            preexec_fn=dying_with_this_one(),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> GuestSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def wait(self) -> None:
        """Until the first snapshot is here, or there will be none."""
        self._first.wait(_BOOT_SECONDS)

    @property
    def running(self) -> bool:
        return self._reader.is_alive()

    def snapshot(self) -> Audit:
        return self._last

    def end(self) -> int:
        """Ends the command and the guest, if they run; rsplice's exit status there."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None and self._reader.is_alive():
                self._process.send_signal(number)
            self._reader.join(_END_SECONDS)
        return self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                entry = json.loads(line)
                if "audit" in entry:
                    audit = parse_audit(entry["audit"])
                    audit.kernel_where = "vm"
                    # They are left out of a snapshot while they are the same.
                    audit.journeys = audit.journeys or self._last.journeys
                    self._last = audit
                    self._first.set()
            except (ValueError, TypeError, RecursionError):
                continue
        self._first.set()


def check(pids: Sequence[int], everything: bool, command: Sequence[str]) -> None:
    """RspliceError unless there is a command to run, and nothing else to follow."""
    if pids or everything or not command:
        raise RspliceError(
            "--kernel runs a command: write -- CMD [ARG...], and neither -p nor --all"
        )
