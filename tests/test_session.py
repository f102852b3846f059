# SPDX-License-Identifier: MIT
"""Signals to rsplice while a command runs that it has started; no probes are needed."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from rsplice.launch import Command
from rsplice.session import passing_signals


def started(*argv: str) -> Any:
    """As much of a session as passing_signals() looks at."""
    return SimpleNamespace(command=Command(argv), interrupted=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_the_commands_while_it_runs(number: signal.Signals) -> None:
    session = started("sleep", "1000")
    with passing_signals(session):
        session.command.release()
        signal.raise_signal(number)
        assert session.command.wait(10) == 128 + number
        assert not session.interrupted
        signal.raise_signal(number)
        assert session.interrupted


def test_a_signal_in_the_midst_of_reaping_loses_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to both when their group is signalled, and then wait(2) may just have returned."""
    waitpid = os.waitpid

    def interrupted(pid: int, options: int) -> tuple[int, int]:
        found = waitpid(pid, options)
        signal.raise_signal(signal.SIGTERM)
        return found

    session = started("sh", "-c", "exit 23")
    with passing_signals(session):
        session.command.release()
        with monkeypatch.context() as patched:
            patched.setattr(os, "waitpid", interrupted)
            assert session.command.wait() == 23
    assert session.interrupted


def test_without_a_command_a_signal_ends_the_tracing() -> None:
    session: Any = SimpleNamespace(command=None, interrupted=False)
    with passing_signals(session):
        signal.raise_signal(signal.SIGINT)
    assert session.interrupted
