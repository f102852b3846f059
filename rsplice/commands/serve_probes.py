# SPDX-License-Identifier: MIT
"""Lets a user without privileges trace processes of their own: tests, with the pytest plugin, or
programs that use rsplice.trace(). Others' processes, and programs that run with other rights, such
as set-user-ID ones, are not traced. Runs until SIGTERM or Ctrl-C.

EXAMPLES
  sudo rsplice serve-probes                      for the user who called sudo
  rsplice serve-probes --user ci &               as root, for the user ci
  sudo rsplice serve-probes --socket /tmp/x/probes
                                                 then RSPLICE_PROBES=/tmp/x/probes pytest"""

from __future__ import annotations

import argparse
import errno
import os
import pwd
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from rsplice.dashboards.text import sanitise
from rsplice.engine import Engine
from rsplice.errors import RspliceError
from rsplice.probes import MAX_CLIENTS, Client, socket_path
from rsplice.session import handling

_ENDING = (signal.SIGINT, signal.SIGTERM)


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice serve-probes``."""
    parser.add_argument(
        "--user", metavar="NAME", help="who may trace; under sudo the invoking user by default"
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="where to listen (default: /run/rsplice/UID.socket)"
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal comes."""
    account = _account(args.user)
    path = args.socket or socket_path(account.pw_uid)
    engine = Engine(owner=account.pw_uid)
    try:
        with (
            suppress(Interrupted),
            handling(_ENDING, _interrupt),
            _listening(path, account) as listener,
        ):
            line = f"rsplice: serving probes to {account.pw_name} at {path}"
            print(sanitise(line), file=sys.stderr, flush=True)
            _serve(listener, engine, account.pw_uid)
    finally:
        engine.close()
    return 0


class Interrupted(Exception):
    """A signal asked to end the serving."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in _ENDING:  # one is enough: another one must not cut short what this one begins
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted


def _serve(listener: socket.socket, engine: Engine, owner: int) -> None:
    seats = threading.Semaphore(MAX_CLIENTS)

    def attend(client: Client) -> None:
        try:
            client.serve()
        finally:
            seats.release()

    while True:
        connection, _ = listener.accept()
        if not seats.acquire(blocking=False):
            with suppress(OSError), connection:
                connection.sendall(b'{"error": "too many clients"}\n')
            continue
        client = Client(connection, engine, owner)
        threading.Thread(target=attend, args=(client,), daemon=True).start()


def _account(name: str | None) -> pwd.struct_passwd:
    """Who is served. RspliceError if there is no such user, or nobody is named."""
    try:
        if name is not None:
            return pwd.getpwnam(name)
        if os.geteuid() != 0:
            return pwd.getpwuid(os.geteuid())
        if os.environ.get("SUDO_UID", "0") != "0":
            return pwd.getpwuid(int(os.environ["SUDO_UID"]))
    except (KeyError, ValueError) as error:
        whom = name or "of this process"
        raise RspliceError(f"no user {whom}: give --user a name of /etc/passwd") from error
    raise RspliceError("whom to serve is not known: give --user NAME")


@contextmanager
def _listening(path: str, account: pwd.struct_passwd) -> Iterator[socket.socket]:
    """A socket that *account* alone can connect to; it is removed at the end."""
    directory = os.path.dirname(os.path.abspath(path))
    if path == socket_path(account.pw_uid):
        with suppress(FileExistsError):
            os.mkdir(directory, 0o755)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # In a directory that others can write to, names can be exchanged behind root's back: there
        # the socket is made with the user's own rights.
        ours = _is_ours_alone(directory)
        with _mask(0o177), _acting_as(None if ours else account):
            _remove_stale(path)
            listener.bind(path)
        if ours:
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise RspliceError(f"cannot listen at {path}: {error.strerror or error}") from error
    try:
        yield listener
    finally:
        listener.close()
        with suppress(OSError), _acting_as(None if ours else account):
            os.unlink(path)


def _is_ours_alone(directory: str) -> bool:
    found = os.stat(directory)
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _remove_stale(path: str) -> None:
    """Removes the socket of a helper that has died. OSError if one is alive, or it is none."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "it exists and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "somebody serves there already")


@contextmanager
def _mask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _acting_as(account: pwd.struct_passwd | None) -> Iterator[None]:
    """Has the rights of *account* on files meanwhile."""
    if account is None or os.geteuid() == account.pw_uid:
        yield
        return
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    os.setgroups([account.pw_gid])
    os.setegid(account.pw_gid)
    os.seteuid(account.pw_uid)
    try:
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)
