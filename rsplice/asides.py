# SPDX-License-Identifier: MIT
"""What goes on in a process beside the code that is traced: imports, and a test runner's files."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Called when a thread begins (True) or ends (False) an import.
Switch = Callable[[int, bool], None]

_bootstrap: Any = importlib._bootstrap
_lock = threading.Lock()
_switches: list[Switch] = []
_thread = threading.local()
_original: Any = None


@contextmanager
def imports_set_aside(switch: Switch) -> Iterator[None]:
    """Calls *switch* with the thread's id around each import of a module that is not loaded yet.

    All that happens in an import counts as import: what the module's code does when it runs for
    the first time, too. Imports of modules that are loaded pay nothing.
    """
    _add(switch)
    try:
        yield
    finally:
        _remove(switch)


def _add(switch: Switch) -> None:
    global _original
    with _lock:
        _switches.append(switch)
        if _original is None:
            # The import statement, import_module() and the like come here when a module is not in
            # sys.modules (import_find_and_load(), Python/import.c; importlib/_bootstrap.py).
            _original = _bootstrap._find_and_load
            _bootstrap._find_and_load = _find_and_load


def _remove(switch: Switch) -> None:
    global _original
    with _lock:
        _switches.remove(switch)
        if not _switches:
            _bootstrap._find_and_load, _original = _original, None


def _find_and_load(name: str, import_: Any) -> Any:
    __tracebackhide__ = True
    original = _original or _bootstrap._find_and_load
    if name in sys.modules or getattr(_thread, "importing", False):
        return original(name, import_)
    switches, tid = list(_switches), threading.get_native_id()
    _thread.importing = True
    for switch in switches:
        switch(tid, True)
    try:
        return original(name, import_)
    finally:
        for switch in switches:
            switch(tid, False)
        _thread.importing = False
