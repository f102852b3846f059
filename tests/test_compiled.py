# SPDX-License-Identifier: MIT
"""The compiled BPF text that is kept: what was compiled, read only where nobody else can write."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import threading
import tty
from collections.abc import Iterator
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


@needs_bcc
@needs_bpf
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return nothing_of_the_kind;", "error: use of undeclared identifier"),
        ('char much[600]; asm volatile("" : : "r"(much)); return 0;', "stack limit of 512 bytes"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(body: str, why: str, directory: Path) -> None:
    """Even where LLVM gives up, and ends the process that it is in."""
    with pytest.raises(RspliceError, match=why) as told:
        compiled(f"int f(void *ctx) {{ {body} }}\n")
    assert str(told.value).startswith("BCC cannot compile the probes: ")
    assert "\n" not in str(told.value)
    assert not directory.exists()


# --- a guest has its host compile -----------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Iterator[list[bytes]]:
    """A device behind which a host sends, for each request, what is in the list, if anything."""
    answers: list[bytes] = []
    master, slave = os.openpty()
    tty.setraw(slave)
    monkeypatch.setenv(module.COMPILER, os.ttyname(slave))

    def serve() -> None:
        words = b""
        while True:
            try:
                words += os.read(master, 1 << 16)
            except OSError:
                return
            if words.endswith(b"\n"):
                number = json.loads(words)["id"].encode()
                words = b""
                for answer in answers:
                    os.write(master, answer.replace(b"ID", number))

    thread = threading.Thread(target=serve)
    thread.start()
    yield answers
    os.close(slave)
    thread.join(10)
    os.close(master)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were compiled without the host."""
    texts: list[str] = []

    def stand_in(text: str) -> Compiled:
        texts.append(text)
        return Compiled({"here": b"x" * 8}, [])

    monkeypatch.setattr(module, "_compile_here", stand_in)
    return texts


OTHERS = b'{"id": "another", "compiled": {"functions": {"wrong": ""}, "maps": []}}\n'
OURS = b'{"id": "ID", "compiled": {"functions": {"f": "00ff"}, "maps": []}}\n'


@needs_bcc
def test_a_guest_takes_what_its_host_compiled(host: list[bytes], here: list[str]) -> None:
    host += [OTHERS, OURS]
    assert compiled("x" * 100003) == Compiled({"f": b"\0\xff"}, [])
    assert here == []


@needs_bcc
@pytest.mark.parametrize(
    "answer", [b'{"id": "ID"}\n', b"nonsense\n", b'{"id": "ID", "compiled": []}\n']
)
def test_a_guest_compiles_what_its_host_does_not(
    host: list[bytes], here: list[str], answer: bytes
) -> None:
    host += [answer]
    assert compiled("text").functions == {"here": b"x" * 8}
    assert here == ["text"]


@needs_bcc
def test_a_device_that_is_gone_is_no_error(
    directory: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.COMPILER, "/nonexistent")
    assert compiled("text").functions == {"here": b"x" * 8}


@needs_bcc
def test_a_host_answers_each_request(directory: Path, compiles: list[str]) -> None:
    reply = json.loads(module.answer(b'{"id": "7", "text": "one"}'))
    assert reply["id"] == "7"
    assert bytes.fromhex(reply["compiled"]["functions"]["f"]) == b"one" * 8
    for bad in (b"", b"nonsense", b"[]", b'{"id": "7"}'):
        assert "compiled" not in json.loads(module.answer(bad))
    assert compiles == ["one"]
