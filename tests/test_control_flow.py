# SPDX-License-Identifier: MIT
"""The verifier of older kernels refuses programs that newer ones load: found out on any kernel.

check_cfg() (kernel/bpf/verifier.c, as of 6.1) walks along the instructions, depth first. A loop
may be closed by a jump, and not by an instruction that is followed by the loop's first one.
"""

from __future__ import annotations

import struct

import pytest

from rsplice.journey import Request
from rsplice.tracers import compiled as module
from rsplice.tracers import program
from rsplice.tracers.compiled import Compiled
from rsplice.tracers.journey import Follower
from rsplice.tracers.tracer import Tracer

_JUMPS = (5, 6)  # BPF_JMP, BPF_JMP32
_ALWAYS, _CALL, _EXIT = 0x00, 0x80, 0x90
_WIDE = 0x18  # ld_imm64: two instructions


def fallen_into(code: bytes) -> list[int]:
    """The instructions that begin a loop which something else than a jump closes."""
    found: list[int] = []
    on_path, left = {0}, set[int]()
    ways = {0: _ways(code, 0)}
    path = [0]
    while path:
        at = path[-1]
        if not ways[at]:
            on_path.discard(path.pop())
            left.add(at)
            continue
        to, jumps = ways[at].pop(0)
        if to in on_path and not jumps:
            found.append(to)
        if to not in on_path and to not in left:
            ways[to] = _ways(code, to)
            path.append(to)
            on_path.add(to)
    return found


def _ways(code: bytes, at: int) -> list[tuple[int, bool]]:
    """Where instruction *at* goes on to, in the kernel's order, and whether it is a jump."""
    opcode, _, offset, _ = struct.unpack_from("<BBhi", code, 8 * at)
    kind = opcode & 0xF0
    if opcode & 7 not in _JUMPS or kind == _CALL:
        return [(at + (2 if opcode == _WIDE else 1), False)]
    if kind == _EXIT:
        return []
    if kind == _ALWAYS:
        return [(at + offset + 1, True)]
    return [(at + 1, True), (at + offset + 1, True)]


def instructions(*rows: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<BBhi", opcode, 0, offset, 0) for opcode, offset in rows)


MOVE, JUMP, IF, EXIT = 0xB7, 0x05, 0x15, 0x95


def test_a_loop_that_a_jump_closes_is_sound() -> None:
    assert fallen_into(instructions((MOVE, 0), (IF, 1), (JUMP, -3), (EXIT, 0))) == []
    assert fallen_into(instructions((MOVE, 0), (IF, -2), (EXIT, 0))) == []


def test_a_loop_that_is_entered_behind_its_first_instruction_is_not() -> None:
    """0 goes on to 2; 1 is the loop's first instruction by place, and falls into 2."""
    assert fallen_into(instructions((JUMP, 1), (MOVE, 0), (IF, -2), (EXIT, 0))) == [2]


@pytest.mark.privileged
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "contents and journeys"])
def test_older_kernels_find_no_loop_that_is_fallen_into(
    monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    texts: list[Compiled] = []

    def remember(text: str, keep: bool = True) -> Compiled:
        texts.append(module.compiled(text, keep))
        return texts[-1]

    monkeypatch.setattr(program, "compiled", remember)
    follower = Follower(Request(2)) if everything else None
    Tracer(direct=False, integrity=everything, journeys=follower).close()
    assert len(texts) == 1
    functions = texts[0].functions
    assert ("tp_compare" in functions) == ("jt_sys_exit" in functions) == everything
    assert {name: found for name, code in functions.items() if (found := fallen_into(code))} == {}
