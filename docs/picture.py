# SPDX-License-Identifier: MIT
"""Draws docs/dashboard.svg and docs/finding.svg from the packaged recording.

python docs/picture.py
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from rsplice import dashboards
from rsplice.dashboards.live import LiveView
from rsplice.recording import Recording

SIZE = (100, 30)


def draw(*keys: str) -> str:
    """The dashboard at the end of the demo and after some *keys*, as SVG."""
    clock = [0.0]
    recording = Recording(
        str(Path(dashboards.__file__).parent / "demo.jsonl"), clock=lambda: clock[0]
    )
    view = LiveView()
    for second in range(int(recording.duration_s)):
        clock[0] = float(second)
        audit = recording.snapshot()
        view.feed(audit, audit.duration_s)
    for key in keys:
        view.press(key)
    console = Console(
        record=True, file=io.StringIO(), width=SIZE[0], height=SIZE[1], force_terminal=True
    )
    console.print(view)
    return console.export_svg(title="rsplice live")


if __name__ == "__main__":
    Path(__file__).with_name("dashboard.svg").write_text(draw())
    # The third finding, opened.
    opened = draw("\t", "\t", "down", "down", "enter")
    Path(__file__).with_name("finding.svg").write_text(opened)
