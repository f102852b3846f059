# SPDX-License-Identifier: MIT
"""A pytest plugin that writes a line of JSON for each test that begins, and that has ended.

They go to the file that RSPLICE_TEST_RESULTS names, as they come: a guest may not live to the end.
"""

from __future__ import annotations

import json
import os

import pytest

_out = open(os.environ["RSPLICE_TEST_RESULTS"], "w", buffering=1)  # noqa: SIM115


def pytest_runtest_logstart(nodeid: str) -> None:
    """Which test begins: the guest may end in it."""
    print(json.dumps({"test": nodeid}), file=_out)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What is told of a test: that it passed, or why not; a failing teardown has the last word."""
    if report.passed and report.when != "call":
        return
    why = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        why = str(report.longrepr[2])
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = getattr(crash, "message", None) or report.longreprtext[-300:]
    result = {"test": report.nodeid, "outcome": report.outcome, "why": why.split("\n")[0]}
    print(json.dumps(result), file=_out)
