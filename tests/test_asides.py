# SPDX-License-Identifier: MIT
"""Imports are told from the rest of what a thread does; paths are found by name."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path as File
from typing import Any

import pytest

from rsplice.asides import imports_set_aside
from rsplice.audit import Audit, Counts, Path, Paths


@pytest.fixture
def modules(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> File:
    """Three modules, the first of which imports the second."""
    (tmp_path / "aside_one.py").write_text("import aside_two\n")
    (tmp_path / "aside_two.py").write_text("")
    (tmp_path / "aside_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("aside_one", "aside_two", "aside_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_first_import_is_set_aside_as_one(modules: File) -> None:
    seen: list[tuple[int, bool]] = []
    with imports_set_aside(lambda tid, begins: seen.append((tid, begins))):
        import aside_one  # type: ignore[import-not-found]  # noqa: F401
        import aside_one as again  # noqa: F401

        importlib.import_module("aside_one")
    tid = threading.get_native_id()
    assert seen == [(tid, True), (tid, False)]
    with imports_set_aside(lambda tid, begins: seen.append((tid, begins))):
        import aside_two  # type: ignore[import-not-found]  # noqa: F401
    assert len(seen) == 2  # it is there already


def test_each_thread_is_told_apart(modules: File) -> None:
    seen: list[tuple[int, bool]] = []
    tids: list[int] = []

    def load() -> None:
        tids.append(threading.get_native_id())
        importlib.import_module("aside_two")

    with imports_set_aside(lambda tid, begins: seen.append((tid, begins))):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert seen == [(tids[0], True), (tids[0], False)]


def test_an_import_that_fails_ends_too(modules: File) -> None:
    seen: list[bool] = []
    with imports_set_aside(lambda tid, begins: seen.append(begins)):
        with pytest.raises(ZeroDivisionError):
            importlib.import_module("aside_broken")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("aside_that_is_not_there")
    assert seen == [True, False, True, False]


def test_afterwards_nothing_is_left(modules: File) -> None:
    bootstrap: Any = importlib._bootstrap
    before = bootstrap._find_and_load
    with imports_set_aside(lambda tid, begins: None):
        with imports_set_aside(lambda tid, begins: None):
            assert bootstrap._find_and_load is not before
        assert bootstrap._find_and_load is not before
    assert bootstrap._find_and_load is before


def test_a_path_is_found_by_its_name() -> None:
    splice = Path("ext4", "pipe", "splice", Counts(8, 0, 8, shared=8, operations=2))
    read = Path("pipe", "user memory", "read", Counts(8, 8, 8, copied=8, operations=1))
    audit = Audit(paths=Paths([splice, read]))
    found = audit.paths["ext4 -> pipe via splice"]
    assert found is splice
    assert (found.shared, found.copied, found.operations, found.avoided_bytes) == (8, 0, 2, 8)
    assert (audit.paths[1], audit.paths[-2:]) == (read, [splice, read])
    with pytest.raises(
        KeyError, match="no path 'a -> b via c'; there are 'ext4 -> pipe via splice"
    ):
        audit.paths["a -> b via c"]
    with pytest.raises(KeyError, match="there are none"):
        Audit().paths["a -> b via c"]
    assert Audit.from_json(audit.to_json()).paths["pipe -> user memory via read"].copied == 8
