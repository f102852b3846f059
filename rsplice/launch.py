# SPDX-License-Identifier: MIT
"""Starts a command that waits at its first instruction until the probes are on it."""

from __future__ import annotations

import errno
import os
import pwd
import select
import shutil
import signal
import struct
from collections.abc import Sequence
from contextlib import suppress

from rsplice.errors import EXIT_CANNOT_RUN, EXIT_NOT_FOUND, RspliceError


class Command:
    """A child process, held back before its exec.

    It waits with poll(2), which carries no payload: nothing it does before the exec is counted.

    :param argv: program and arguments; the program is looked up in PATH
    :param user: who it runs as, None for the caller
    :param output: descriptor for its standard output and error, its input then is /dev/null;
        None to leave all three alone
    :raises RspliceError: there is no such user or program
    """

    def __init__(
        self, argv: Sequence[str], user: str | None = None, output: int | None = None
    ) -> None:
        self.argv = list(argv)
        self.status: int | None = None  #: exit status, 128 + signal if it was killed
        account = _account(user)
        _check_program(argv[0])
        gate, self._gate = os.pipe()
        self._report, report = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _become(self.argv, account, gate, report, output)
        os.close(gate)
        os.close(report)
        self.fd = os.pidfd_open(self.pid)  #: readable when the command has ended

    def release(self) -> None:
        """Lets the command start. RspliceError if it cannot be run."""
        os.close(self._gate)
        with os.fdopen(self._report, "rb") as report:
            words = report.read()
        if words:
            self.wait()
            raise _cannot_run(self.argv[0], struct.unpack("=i", words)[0])

    def send(self, number: int) -> None:
        """Sends a signal, if the command has not ended."""
        if self.status is None:
            signal.pidfd_send_signal(self.fd, number)

    @property
    def ended(self) -> bool:
        """Whether it has ended, its status read or not."""
        return self.status is not None or bool(select.select([self.fd], [], [], 0)[0])

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit status; None if it has not ended within *timeout* seconds."""
        if self.status is None:
            if not select.select([self.fd], [], [], timeout)[0]:
                return None
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.status = code if code >= 0 else 128 - code
            os.close(self.fd)
        return self.status

    def end(self) -> int:
        """Ends the command, kindly and after 5 s for good; its exit status."""
        self.send(signal.SIGTERM)
        status = self.wait(5.0)
        if status is None:
            self.send(signal.SIGKILL)
            status = self.wait()
        assert status is not None
        return status


def _become(
    argv: list[str],
    account: pwd.struct_passwd | None,
    gate: int,
    report: int,
    output: int | None,
) -> None:
    """In the child: waits at the gate, then is the command. Never returns."""
    try:
        _close_private({gate, report, output})
        poll = select.poll()
        poll.register(gate, 0)  # POLLHUP is always reported
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGPIPE,
            signal.SIGXFSZ,
        ):
            signal.signal(number, signal.SIG_DFL)
        poll.poll()
        if output is not None:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
        if account is not None:
            os.initgroups(account.pw_name, account.pw_gid)
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            names = {"USER": account.pw_name, "LOGNAME": account.pw_name, "HOME": account.pw_dir}
            os.environ.update(names)
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(report, struct.pack("=i", error.errno or errno.EIO))
    finally:
        os._exit(EXIT_CANNOT_RUN)


def _close_private(kept: set[int | None]) -> None:
    """Closes now what exec would close: the gates of other commands, for one, that wait too."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the directory's own descriptor is gone by now
            if int(name) not in kept and not os.get_inheritable(int(name)):
                os.close(int(name))


def _account(user: str | None) -> pwd.struct_passwd | None:
    """Whose command it is: *user*, under sudo by default the invoking user, None to stay."""
    try:
        if user is not None:
            return pwd.getpwnam(user)
        if os.geteuid() == 0 and os.environ.get("SUDO_UID", "0") != "0":
            return pwd.getpwuid(int(os.environ["SUDO_UID"]))
    except (KeyError, ValueError) as error:
        name = user or f"of SUDO_UID={os.environ.get('SUDO_UID')}"
        raise RspliceError(f"no user {name}: give --user a name of /etc/passwd") from error
    return None


def _check_program(name: str) -> None:
    """Fails before any probe is loaded where the program is plainly missing."""
    if shutil.which(name) is None:
        exists = os.path.exists(name) if "/" in name else shutil.which(name, os.F_OK) is not None
        raise _cannot_run(name, errno.EACCES if exists else errno.ENOENT)


def _cannot_run(name: str, number: int) -> RspliceError:
    if number == errno.ENOENT:
        return RspliceError(f"{name}: command not found", EXIT_NOT_FOUND)
    return RspliceError(f"{name}: cannot be run: {os.strerror(number)}", EXIT_CANNOT_RUN)
