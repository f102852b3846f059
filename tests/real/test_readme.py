# SPDX-License-Identifier: MIT
"""The README's example of a test: it is what is shown, and ends as is shown."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.filesystems import filesystem_of
from tests.support.run import ROOT, environment

pytestmark = pytest.mark.privileged

SECTION = (ROOT / "README.md").read_text().partition("\n## In tests\n")[2].partition("\n## ")[0]


def blocks() -> list[str]:
    """The code blocks of the section: the test, its run, and its run without sendfile."""
    found = re.findall(r"(?:^(?: {4}.*)?\n)+", SECTION, re.M)
    return [textwrap.dedent(text).strip("\n") + "\n" for text in found if text.strip()]


def significant(text: str) -> list[str]:
    """The lines of an output, whatever the time, the probes and the file system's name."""
    text = re.sub(r"\d+ probes attached, \d+ missing( \(.*?\))?,", "probes,", text)
    text = re.sub(r"in [\d.]+s( \(.*\))?$", "in time", text, flags=re.M)
    return [line for line in text.splitlines() if line.strip() and not line.startswith("$")]


def test_it_has_twenty_lines() -> None:
    code = blocks()[0]
    assert len([line for line in code.splitlines() if line]) == 20
    assert "twenty lines" in SECTION.lower()


@pytest.mark.parametrize(("block", "status"), [(1, 0), (2, 1)], ids=["sendfile", "no sendfile"])
def test_it_ends_as_is_shown(tmp_path: Path, block: int, status: int) -> None:
    code, *outputs = blocks()
    (tmp_path / "test_server.py").write_text(code)
    shown = outputs[block - 1]
    extra = dict(re.findall(r"\b([A-Z]+)=(\w+)", shown.splitlines()[0]))
    assert extra == ({"SENDFILE": "off"} if status else {})
    # With CI set pytest cuts no line of its summary short. What other runs left is no warning's.
    usual = {name: value for name, value in environment().items() if name != "CI"}
    usual["PYTEST_DEBUG_TEMPROOT"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_server.py"],
        cwd=tmp_path,
        env={**usual, **extra},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == status, done.stdout
    printed = done.stdout.replace(f"{filesystem_of(str(tmp_path))} -> ", "ext4 -> ")
    assert significant(printed) == significant(shown)
