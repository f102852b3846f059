# SPDX-License-Identifier: MIT
"""What librsplice's probes tell of pages: calls that break its promises, and twins that do not."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rsplice.tracers import usdt
from tests.support.run import ROOT, audit
from tests.support.watch import COUNT, Watch

pytestmark = pytest.mark.privileged

#: Mode of the program -> what is found: (name, reason) -> how often.
MODES: dict[str, dict[tuple[str, str], int]] = {
    "leak": {("leaked", ""): COUNT},
    "leak-in-threads": {("leaked", ""): 3 * COUNT},
    "mapped": {("published-while-mapped", "offered by librsplice"): COUNT},
    "mapped-outside": {("gift-still-mapped", ""): COUNT},
    "mapped-by-others": {("gift-still-mapped", ""): COUNT},
    # The twins.
    "publish": {},
    "abort": {},
    "interrupted": {},
    "handled": {},
    "unmapped": {},
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, needs: Callable[..., None]) -> Path:
    """tests/c/lifecycle.c"""
    needs("cc")
    header = ["cc", "-E", "-include", "sys/sdt.h", os.devnull]
    if subprocess.run(header, capture_output=True).returncode:
        pytest.skip("not installed: systemtap-sdt-dev (sys/sdt.h)")
    made = tmp_path_factory.mktemp("lifecycle") / "lifecycle"
    options = ["-O2", "-pthread", "-I", str(ROOT / "csrc")]
    subprocess.run(["cc", *options, "-o", made, ROOT / "tests/c/lifecycle.c"], check=True)
    return made


@pytest.fixture(scope="module", params=[None, False], ids=["direct loads", "probe reads"])
def watch(request: pytest.FixtureRequest, program: Path) -> Iterator[Watch]:
    watch = Watch(request.param, files=usdt.find([str(program)]))
    assert watch.lost == []
    yield watch
    watch.tracer.close()


@pytest.mark.parametrize("mode", MODES)
def test_each_broken_promise_is_told_and_no_kept_one(
    mode: str, watch: Watch, program: Path
) -> None:
    assert watch.run(program, mode, COUNT).counts == MODES[mode]


@pytest.fixture(scope="module", params=[None, False], ids=["direct loads", "probe reads"])
def contents(request: pytest.FixtureRequest, program: Path) -> Iterator[Watch]:
    watch = Watch(request.param, files=usdt.find([str(program)]), integrity=True)
    assert watch.lost == []
    yield watch
    watch.tracer.close()


@pytest.mark.parametrize(("mode", "count"), [("stale", COUNT), ("clean", 0), ("stale-before", 0)])
def test_what_a_short_fill_leaves_in_its_page_is_told(
    mode: str, count: int, contents: Watch, program: Path
) -> None:
    """Not what was in the file before the call."""
    seen = contents.run(program, mode, COUNT)
    assert seen.counts == ({("stale-content-exposed", ""): count} if count else {})
    if not count:
        return
    finding = seen.only("stale-content-exposed")
    assert finding.kind == "violation"
    assert finding.first["operation"] == "user memory -> memfd via rsplice"
    assert finding.first["seen"] == "bytes behind the first 1001 of the page are not zero"
    assert finding.first["file"] == "memfd:short" and finding.first["file_offset"] == 0
    assert finding.first["page_frame"] > 0


def test_without_integrity_nobody_looks_behind_what_was_filled(watch: Watch, program: Path) -> None:
    assert watch.run(program, "stale", COUNT).counts == {}


def test_a_process_that_is_killed_in_its_calls_leaks_nothing(watch: Watch, program: Path) -> None:
    """The kernel frees what it had."""
    assert watch.run(program, "killed", COUNT, status=128 + signal.SIGKILL).counts == {}


def test_a_leak_says_who_where_and_how_much(watch: Watch, program: Path) -> None:
    seen = watch.run(program, "leak", COUNT)
    finding = seen.only("leaked")
    assert finding.kind == "violation"
    assert (finding.first["pid"], finding.first["comm"]) == (seen.pid, "lifecycle")
    assert finding.first["operation"].endswith(" -> /dev/null via rsplice")
    assert finding.first["seen"].startswith(f"{COUNT * 8192} bytes reserved")
    assert "page_frame" not in finding.first
    assert finding.advice


def test_a_violation_of_the_librarys_fails_a_run_that_asked(program: Path) -> None:
    command = [str(program), "leak", "2"]
    assert audit(command, violations={"leaked"}).status == 0
    failed = audit(command, "--fail-on", "violation", violations={"leaked"})
    assert failed.status == 120
    assert "violation: violation: leaked, 2 times" in failed.stderr
    assert audit([str(program), "abort", "2"], "--fail-on", "violation").status == 0
