# SPDX-License-Identifier: MIT
"""The BPF text compiles for kernels that are not running, with all that they can be asked."""

from __future__ import annotations

import pytest

from rsplice.journey import Request
from rsplice.tracers import tracer, usdt
from rsplice.tracers.btf import Btf
from rsplice.tracers.compiled import compiled
from rsplice.tracers.journey import Follower
from tests.support.kernel_btf import Unavailable, fetch_all

pytestmark = [pytest.mark.privileged, pytest.mark.timeout(600)]  # the downloads of all kernels

FUNCTIONS = {"tp_sys_exit", "usdt_mark", "jt_sys_exit", "map_range", "map_page", "move_page"}


class Compiled(Exception):
    """Nothing is left to do: no program can be loaded here."""


@pytest.mark.parametrize("series", ["5.10", "6.1", "7.3"])
@pytest.mark.parametrize(("finding", "integrity"), [("", False), ("any", True)])
def test_the_text_of_an_audit_with_journeys_compiles(
    series: str, finding: str, integrity: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rsplice._native")
    kernel = fetch_all()[series]
    if isinstance(kernel, Unavailable):
        pytest.skip(f"the BTF of Linux {series} could not be fetched: {kernel}")
    btf = Btf(str(kernel.vmlinux))
    whole = Btf(str(kernel.fuse), btf) if kernel.fuse else btf

    def program(text: str, btf: Btf, direct: bool, keep: bool = True) -> None:
        found = compiled(text, keep=False).functions.keys()
        assert found >= FUNCTIONS, FUNCTIONS - found
        raise Compiled

    monkeypatch.setattr(tracer, "Btf", lambda: btf)
    monkeypatch.setattr(tracer, "with_fuse", lambda btf: whole)
    monkeypatch.setattr(tracer, "Program", program)
    monkeypatch.setattr(tracer.Tracer, "measures", True)
    with pytest.raises(Compiled):
        tracer.Tracer(
            files=usdt.find(), journeys=Follower(Request(1, None, finding)), integrity=integrity
        )
