# SPDX-License-Identifier: MIT
"""BPF maps as the reader uses them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from rsplice.tracers import program as programs
from rsplice.tracers.btf import Btf
from rsplice.tracers.program import Program

pytestmark = pytest.mark.privileged

COUNT = 23

TEXT = """
BPF_TABLE("percpu_hash", u32, u64, counts, 64);

int add(u64 *ctx)
{
    u32 key = ctx[0];
    u64 none = 0, *count = counts.lookup_or_try_init(&key, &none);

    if (count)
        *count += 1;
    return 0;
}
"""


@pytest.fixture
def program() -> Iterator[Program]:
    text = f"#include <linux/types.h>\n{TEXT}"
    program = Program(text, Btf(), direct=False, keep=False)
    yield program
    program.close()


@pytest.mark.parametrize("command", [programs._MAP_TAKE, 1 << 10], ids=["one step", "two steps"])
def test_what_is_taken_is_counted_once(
    program: Program, command: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A command that no kernel has stands for one that this kernel lacks.
    monkeypatch.setattr(programs, "_MAP_TAKE", command)
    counts = program.map("counts")
    key, other = struct.pack("=I", 7), struct.pack("=I", 8)
    for _ in range(COUNT):
        program.run_once("add", 7)
    program.run_once("add", 8)
    assert _total(counts.take(key)) == COUNT
    assert counts.take(key) is None
    program.run_once("add", 7)
    assert _total(counts.take(key)) == 1
    assert [found for found, _ in counts.items()] == [other]


def _total(values: list[bytes] | None) -> int:
    assert values is not None
    return sum(struct.unpack("=Q", value)[0] for value in values)
