# SPDX-License-Identifier: MIT
"""A program that the verifier refuses: the run goes on with slower reads, and says so."""

from __future__ import annotations

import errno

import pytest

from rsplice.commands import doctor
from rsplice.tracers.btf import Btf
from rsplice.tracers.program import BpfError, Program
from rsplice.tracers.tracer import Tracer

pytestmark = pytest.mark.privileged

WORDS = "R6 bitwise operator &= on pointer prohibited"


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has direct loads, and refuses a program that makes some."""
    if Btf().function_id("bpf_rdonly_cast") is None:
        pytest.skip("this kernel has no direct loads (Linux 6.2)")
    load = Program.load

    def refuse(self: Program, function: str, tracepoint: str) -> int:
        if self._direct and function == "tp_sys_enter":
            raise BpfError(errno.EACCES, f"{function}: {WORDS}")
        return load(self, function, tracepoint)

    monkeypatch.setattr(Program, "load", refuse)


def test_what_the_kernel_refused_is_told_by_doctor(
    refusing: None,
) -> None:
    diagnosis = doctor.diagnose()
    (reads,) = (check for check in diagnosis.checks if check.name == "memory reads")
    assert reads.state == "ok"
    assert "bpf_probe_read_kernel" in reads.detail
    assert f"tp_sys_enter: {WORDS}" in reads.detail
    assert diagnosis.works


def test_the_run_goes_on_with_all_of_its_probes(refusing: None) -> None:
    tracer = Tracer()
    try:
        assert not tracer.direct
        assert WORDS in tracer.refused
        assert "sys_enter" in tracer.attached
    finally:
        tracer.close()


def test_nothing_is_said_to_be_refused_where_nothing_was() -> None:
    tracer = Tracer()
    try:
        assert tracer.refused == ""
        assert tracer.direct == (Btf().function_id("bpf_rdonly_cast") is not None)
    finally:
        tracer.close()
