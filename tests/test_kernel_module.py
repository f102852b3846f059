# SPDX-License-Identifier: MIT
"""Building the module rsplice_copies: once for each release, from the first suite that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsplice import caches
from rsplice.kernel import debian, module
from rsplice.kernel.debian import Unavailable

RELEASE = "7.3.9+deb13-amd64"


class Builds:
    """Stands in for the downloads and the compiler."""

    def __init__(self, place: Path, without: tuple[str, ...]) -> None:
        self.tried: list[str] = []
        self._place, self._without = place, without

    def root(self, release: str, suite: str, scratch: Path) -> Path:
        assert scratch.is_dir()
        self.tried.append(f"{release} {suite}")
        if suite in self._without:
            raise Unavailable(f"no linux-headers-{release}")
        return self._place

    def make(self, root: Path, release: str) -> Path:
        made = root / "rsplice_copies.ko"
        made.write_text(f"for {release}")
        return made


def builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...] = ()
) -> Builds:
    found = Builds(tmp_path, without)
    monkeypatch.setattr(caches, "directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(module, "_root", found.root)
    monkeypatch.setattr(module, "_make", found.make)
    return found


def test_a_module_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = builds(tmp_path, monkeypatch)
    path = module.build(RELEASE)
    assert path == tmp_path / "cache/modules" / RELEASE / "rsplice_copies.ko"
    assert path.read_text() == f"for {RELEASE}"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert module.build(RELEASE) == path
    assert made.tried == [f"{RELEASE} {debian.SUITES['7.3'][0]}"]


def test_the_next_suite_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = debian.SUITES["7.3"]
    made = builds(tmp_path, monkeypatch, without=(first,))
    assert module.build(RELEASE).exists()
    assert made.tried == [f"{RELEASE} {first}", f"{RELEASE} {second}"]


@pytest.mark.parametrize("release", [RELEASE, "4.4.0-210-generic"])
def test_what_cannot_be_had_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    release: str,
) -> None:
    made = builds(tmp_path, monkeypatch, without=debian.SUITES["7.3"])
    monkeypatch.setattr("sys.argv", ["module", release])
    assert module.main() == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith(f"rsplice: no headers of Linux {release} can be had from Debian")
    for line in made.tried:
        assert f"{line.split()[1]}: no linux-headers-{release}" in told.err
    assert len(made.tried) == (2 if release == RELEASE else 0)


def test_kernels_that_copy_by_other_functions_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = builds(tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", ["module", "5.10.0-46-amd64"])
    assert module.main() == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "rsplice: the module is for Linux 6.1 and later, and that is 5.10.0-46-amd64\n"
    )
    assert made.tried == []
