# SPDX-License-Identifier: MIT
"""The compiled BPF text that is kept: what was compiled, read only where nobody else can write."""

from __future__ import annotations

import importlib.util
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from rsplice.errors import RspliceError
from rsplice.tracers import compiled as module
from rsplice.tracers.compiled import Compiled, MapSpec, compiled, map_places

TEXT = """
BPF_ARRAY(first, u64, 3);
BPF_TABLE("percpu_hash", u32, u64, second, 7);

int count(u64 *ctx)
{
    u32 key = 1;
    u64 *value = second.lookup(&key), *other = first.lookup(&key);

    if (value && other)
        *value += *other;
    return 0;
}
"""

needs_bcc = pytest.mark.skipif(
    not importlib.util.find_spec("bcc"), reason="not installed: python3-bpfcc"
)
needs_bpf = pytest.mark.usefixtures("needs_bpf")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled texts are kept in this test."""
    monkeypatch.setattr(module, "_directory", lambda: tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were compiled, by a stand-in for BCC."""
    texts: list[str] = []

    def stand_in(text: str) -> Compiled:
        texts.append(text)
        return Compiled({"f": text.encode() * 8}, [MapSpec("m", 2, 4, 8, 3, 0)])

    monkeypatch.setattr(module, "_compile", stand_in)
    return texts


@needs_bcc
@needs_bpf
def test_what_is_kept_is_what_was_compiled(directory: Path, monkeypatch: Any) -> None:
    first = compiled(TEXT)
    assert {(m.name, m.key_size, m.value_size, m.entries) for m in first.maps} == {
        ("first", 4, 8, 3),
        ("second", 4, 8, 7),
    }
    numbers = [
        struct.unpack_from("=i", first.functions["count"], at + 4)[0]
        for at in map_places(first.functions["count"])
    ]
    assert sorted(first.maps[number].name for number in numbers) == ["first", "second"]

    def fail(_text: str) -> Compiled:
        raise AssertionError("compiled again")

    monkeypatch.setattr(module, "_compile", fail)
    assert compiled(TEXT) == first
    (file,) = directory.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700


@needs_bcc
def test_another_text_is_compiled(directory: Path, compiles: list[str]) -> None:
    assert compiled("one") != compiled("two")
    assert compiled("one").functions["f"] == b"one" * 8
    assert compiles == ["one", "two"]


@needs_bcc
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"functions": {"f": "xy"}, "maps": []}', b'{"functions": {}}']
)
def test_a_damaged_file_is_compiled_anew(
    content: bytes, directory: Path, compiles: list[str]
) -> None:
    compiled("one")
    (file,) = directory.iterdir()
    file.write_bytes(content)
    assert compiled("one").functions["f"] == b"one" * 8
    assert compiled("one").functions["f"] == b"one" * 8
    assert compiles == ["one", "one"]


@needs_bcc
@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_others_may_write_to_is_not_read(
    what: str, directory: Path, compiles: list[str]
) -> None:
    compiled("one")
    (file,) = directory.iterdir()
    os.chmod(file if what == "file" else directory, 0o777)
    compiled("one")
    assert compiles == ["one", "one"]


@needs_bcc
def test_a_link_is_not_followed(directory: Path, compiles: list[str]) -> None:
    compiled("one")
    (file,) = directory.iterdir()
    file.rename(directory.parent / "elsewhere")
    file.symlink_to(directory.parent / "elsewhere")
    compiled("one")
    assert compiles == ["one", "one"]


@needs_bcc
def test_nowhere_to_keep_it_is_no_error(
    directory: Path, compiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.parent.joinpath("kept").write_text("a file")
    assert compiled("one").functions["f"] == b"one" * 8
    assert compiles == ["one"]


@needs_bcc
def test_a_text_of_one_run_is_not_kept(directory: Path, compiles: list[str]) -> None:
    compiled("one", keep=False)
    compiled("one", keep=False)
    assert compiles == ["one", "one"]
    assert not directory.exists()


@needs_bcc
def test_few_are_kept(directory: Path, compiles: list[str]) -> None:
    for number in range(67):
        compiled(str(number))
    assert len(list(directory.iterdir())) == 60
    compiled("66")
    assert len(compiles) == 67


def test_without_bcc_nothing_is_read(
    directory: Path, compiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RspliceError, match="python3-bpfcc"):
        compiled("one")
    assert compiles == []
