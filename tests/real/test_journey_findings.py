# SPDX-License-Identifier: MIT
"""Journeys of pages that findings are about: from before the finding to after it, and no others.

FUSE servers offer 64 pages each for a move; what each does wrong is its name.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rsplice.audit import Audit
from rsplice.dashboards.live import LiveView
from rsplice.recording import Recording
from tests.real.test_journey import MOMENTS
from tests.support.filesystems import Scratch
from tests.support.patience import DEADLINE
from tests.support.run import ROOT, RSPLICE, Driver, Result, audit, environment
from tests.test_live_view import DETAIL, pressed, screen

pytestmark = pytest.mark.privileged

PAGES = 64
STEAL = "steal-refused: "
#: Server -> the finding of its pages, and what is told of one from its allocation on.
SERVERS = {
    "halves": (STEAL + "partial page", ["filled", "queued", "finding", "copied", "freed"]),
    "teed": (
        STEAL + "extra reference",
        ["filled", "queued", "queued", "finding", "copied", "copied", "freed"],
    ),
    "memfd": (STEAL + "swap-backed", ["queued", "finding", "copied", "removed", "freed"]),
    "splice": ("", []),  # the twin: all its pages are moved
}

Story = dict[str, Any]


def servers(driver: Driver, directory: Path, *modes: str) -> list[str]:
    """A command that runs one server after the other."""
    program = driver.program.with_name("fuse_server")
    calls = [
        shlex.join([str(program), mode, "-n", str(PAGES), "-t", "0", "-d", str(directory)])
        for mode in modes
    ]
    return ["/bin/sh", "-ec", " >/dev/null\n".join([*calls, ""])]


def of_server(story: Story, comm: str) -> bool:
    return comm in {step["comm"] for step in story["steps"] if step["what"] == "queued"}


def told(story: Story) -> list[str]:
    """What happened on every kernel, less what depends on when the kernel gets round to it."""
    unsure = ("allocated", "found", "listed", "unmapped", "dirtied", *MOMENTS)
    return [step["what"] for step in story["steps"] if step["what"] not in unsure]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs rsplice."""
    return subprocess.run(
        [*RSPLICE, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=DEADLINE,
    )


def checked(result: Result) -> Result:
    if result.status == 77:
        pytest.skip("this kernel cannot mount FUSE here")
    assert result.status == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def found(driver: Driver, ext4: Path) -> Result:
    """One audit of all servers."""
    return checked(audit(servers(driver, ext4, *SERVERS), "--journey-finding", "any"))


@pytest.mark.parametrize("mode", SERVERS)
def test_a_page_of_each_finding_has_its_journey(mode: str, found: Result) -> None:
    label, steps = SERVERS[mode]
    stories = [s for s in found.json["journeys"]["stories"] if of_server(s, mode)]
    expected = [([label], steps)] if label else []
    assert [(story["findings"], told(story)) for story in stories] == expected
    for story in stories:
        (step,) = [step for step in story["steps"] if step["what"] == "finding"]
        assert (step["detail"], step["comm"]) == (label, mode)


def test_the_first_occurrence_is_the_page_that_is_followed(found: Result) -> None:
    """Nothing was under way before: its page is the first that could be followed."""
    frames = {s["findings"][0]: s["frame"] for s in found.json["journeys"]["stories"]}
    first = {
        f"{f['name']}: {f['first']['reason']}": f["first"]["page_frame"]
        for f in found.json["findings"]
    }
    assert frames == first
    assert found.json["journeys"]["events_lost"] == 0


def test_the_report_tells_each_with_its_finding(found: Result) -> None:
    lines = found.stderr.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("missed move: ")]
    (end,) = [n for n, line in enumerate(lines) if line.startswith("JOURNEYS: 3 pages of findings")]
    assert len(starts) == 3
    for start, until in zip(starts, [*starts[1:], end], strict=True):
        block = "\n".join(lines[start:until])
        assert block.count("  finding       steal-refused") == 1
        assert block.count("  queued        in a pipe") == 1


def test_a_large_folio_is_followed_as_one_page(driver: Driver, ext4: Path) -> None:
    options = ("--journey-finding", "steal-refused", "--journey=3")
    result = checked(audit(servers(driver, ext4, "large", "vmspliced"), *options))
    stories = [s for s in result.json["journeys"]["stories"] if of_server(s, "large")]
    if not any(f["first"].get("reason") == "large folio" for f in result.json["findings"]):
        pytest.skip("this kernel's ext4 keeps single pages")
    assert stories and all(story["findings"] == [STEAL + "large folio"] for story in stories)
    for story in stories:
        assert story["pages"] > 1
        whats = told(story)
        assert whats.index("queued") < whats.index("finding") < whats.index("copied")
        assert any("buffers" in step["detail"] for step in story["steps"])
    gifts = [s for s in result.json["journeys"]["stories"] if of_server(s, "vmspliced")]
    assert len(gifts) == 3, "so many of each reason as were asked for"


#: The same page of a file through a pipe into another file, three times.
INTO_A_FILE = """
import os, sys
source, file = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
out, into = os.pipe()
for _ in range(3):
    assert os.splice(source, into, 4096, offset_src=0) == 4096
    assert os.splice(out, file, 4096, flags=os.SPLICE_F_MOVE) == 4096
"""


def test_a_buffer_that_a_file_has_emptied_counts_once(ext4: Path) -> None:
    """The kernel leaves no size of it in the pipe's ring, where those of earlier calls lie too."""
    source = Scratch(ext4, "ext4").file("offered", 4096)
    # Not a wrapper: it may have pipes of its own.
    program = [os.path.realpath(sys.executable), "-ISc", INTO_A_FILE, source, ext4 / "offered-copy"]
    result = checked(audit(list(map(str, program)), "--journey-finding", "steal-refused"))
    (story,) = result.json["journeys"]["stories"]
    assert told(story) == ["queued", "copied", "finding"] * 3
    assert {s["detail"] for s in story["steps"] if s["what"] == "copied"} == {"to ext4 by splice"}


def test_a_moved_page_has_no_finding_in_its_journey(driver: Driver, ext4: Path) -> None:
    result = checked(audit(servers(driver, ext4, "splice"), "--journey=17"))
    stories = [s for s in result.json["journeys"]["stories"] if "stolen" in told(s)]
    assert len(stories) > 7
    for story in stories:
        assert told(story)[:3] == ["filled", "queued", "stolen"]
        assert story["findings"] == []


def test_a_recording_has_findings_and_journeys(driver: Driver, ext4: Path, tmp_path: Path) -> None:
    file = tmp_path / "r"
    command = servers(driver, ext4, "halves", "splice")
    recorded = run("record", "--journey", "-o", str(file), "--", *command)
    if recorded.returncode == 77:
        pytest.skip("this kernel cannot mount FUSE here")
    assert recorded.returncode == 0, recorded.stderr
    final: Audit = Recording(str(file)).final
    view = LiveView(recorded=True)
    view.feed(final, final.duration_s)
    text = screen(pressed(view, *DETAIL), height=50)
    assert "missed move: steal-refused, 64 times" in text
    assert "reason       partial page" in text
    for line in (
        "queued        in a pipe, from ext4 O_DIRECT",
        "copied        out of a fuse reply",
    ):
        assert line in text
    report = run("replay", "--report", str(file)).stdout
    assert "finding       steal-refused: partial page" in report
