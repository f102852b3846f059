# SPDX-License-Identifier: MIT
"""What the kernel passed over is told as lost: what was counted and what was lost are all there is.

From Linux 7.0 on a task may be let run in the midst of a probe that another one is in, and its own
calls are then passed over (program.Program.missed).
"""

from __future__ import annotations

import sys

import pytest

from tests.support.run import audit

#: Two processes on one CPU: one reads all the time, the other comes in between whenever it wakes.
SCRIPT = """
import os, time
zero = os.open("/dev/zero", os.O_RDONLY)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if other := os.fork():
    made = 0
    while os.waitpid(other, os.WNOHANG) == (0, 0):
        for _ in range(101):
            os.read(zero, 1)
        made += 101
    print(made + 2003)
else:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    for _ in range(2003):
        time.sleep(50e-6)
        os.read(zero, 1)
"""


@pytest.mark.privileged
def test_calls_are_counted_or_lost() -> None:
    run = audit([sys.executable, "-c", SCRIPT])
    assert run.status == 0, run.stderr
    made = int(run.stdout)
    (path,) = [p for p in run.json["paths"] if p["source"] == "/dev/zero" and p["via"] == "read"]
    lost = run.json["accuracy"]["events_lost"]
    print(f"{made} made, {path['operations']} counted, {lost} lost")
    assert path["operations"] <= made
    assert made - path["operations"] <= lost
