# SPDX-License-Identifier: MIT
"""The BPF text compiles for kernels that are not running, with all that they can be asked.

LLVM ends the whole process where a function's stack is too large, and that without a word: so
each is compiled by a child.
"""

from __future__ import annotations

import multiprocessing

import pytest

from rsplice.journey import Request
from rsplice.tracers import tracer, usdt
from rsplice.tracers.btf import Btf
from rsplice.tracers.compiled import compiled
from rsplice.tracers.journey import Follower
from tests.support.kernel_btf import KernelBtf, Unavailable, fetch_all

pytestmark = [pytest.mark.privileged, pytest.mark.timeout(600)]  # the downloads of all kernels

FUNCTIONS = {"tp_sys_exit", "usdt_mark", "jt_sys_exit", "map_range", "map_page", "move_page"}


class Compiled(Exception):
    """Nothing is left to do: no program can be loaded here."""


def compile_for(kernel: KernelBtf, finding: str, integrity: bool) -> None:
    """Compiles what an audit on that kernel would; for a process of its own."""
    btf = Btf(str(kernel.vmlinux))
    whole = Btf(str(kernel.fuse), btf) if kernel.fuse else btf

    def program(text: str, btf: Btf, direct: bool, keep: bool = True) -> None:
        found = compiled(text, keep=False).functions.keys()
        assert found >= FUNCTIONS, FUNCTIONS - found
        raise Compiled

    patch = pytest.MonkeyPatch()
    patch.setattr(tracer, "Btf", lambda: btf)
    patch.setattr(tracer, "with_fuse", lambda btf: whole)
    patch.setattr(tracer, "Program", program)
    patch.setattr(tracer.Tracer, "measures", True)
    with pytest.raises(Compiled):
        tracer.Tracer(
            files=usdt.find(), journeys=Follower(Request(1, None, finding)), integrity=integrity
        )


@pytest.mark.parametrize("series", ["5.10", "6.1", "7.3"])
@pytest.mark.parametrize(("finding", "integrity"), [("", False), ("any", True)])
def test_the_text_of_an_audit_with_journeys_compiles(
    series: str, finding: str, integrity: bool
) -> None:
    pytest.importorskip("rsplice._native")
    kernel = fetch_all()[series]
    if isinstance(kernel, Unavailable):
        pytest.skip(f"the BTF of Linux {series} could not be fetched: {kernel}")
    arguments = (kernel, finding, integrity)
    child = multiprocessing.get_context("fork").Process(target=compile_for, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
