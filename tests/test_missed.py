# SPDX-License-Identifier: MIT
"""Events that the kernel does not tell a program of, since that runs already: they are counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rsplice.session import kernel_version
from rsplice.tracers.btf import Btf
from rsplice.tracers.program import Program

pytestmark = pytest.mark.privileged

COUNT = 23
_TRACEPOINT = "bpf_trace_printk"

#: A program at the tracepoint that its own helper hits: the second hit finds it running.
TEXT = """
static long (*say)(const char *text, u32 size, ...) = (void *)6; /* bpf_trace_printk() */

int hit(u64 *ctx)
{
    char text[] = "rsplice";

    return say(text, sizeof(text)) < 0;
}

int quiet(u64 *ctx)
{
    return 0;
}
"""


@pytest.fixture
def program() -> Iterator[Program]:
    if kernel_version() < (5, 12):
        pytest.skip("before 5.12 a program that hits its own tracepoint does so for ever")
    btf = Btf()
    if btf.tracepoint_id(_TRACEPOINT) is None:
        pytest.skip(f"this kernel has no tracepoint {_TRACEPOINT}")
    program = Program(f"#include <linux/types.h>\n{TEXT}", btf, direct=False, keep=False)
    yield program
    program.close()


@pytest.mark.parametrize(("attached", "missed"), [("hit", COUNT), ("quiet", 0)])
def test_each_event_within_the_program_itself_is_one_that_was_missed(
    program: Program, attached: str, missed: int
) -> None:
    program.attach(program.load(attached, _TRACEPOINT), _TRACEPOINT)
    assert program.missed() == 0
    for _ in range(COUNT):
        program.run_once("hit", 0)
    assert program.missed() == missed
