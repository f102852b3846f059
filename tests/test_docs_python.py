# SPDX-License-Identifier: MIT
"""The examples of docs/python.md and docs/pytest.md: they run, and print what stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.filesystems import filesystem_of

pytestmark = pytest.mark.privileged

DOCS = Path(__file__).resolve().parent.parent / "docs"
PYTHON = DOCS / "python.md"
PYTEST = DOCS / "pytest.md"


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The indented blocks of a page that a comment stands over, with the comment."""
    pattern = r"^<!-- (\S.*?) -->\n\n((?:    .*\n|\n)+)"
    for comment, text in re.findall(pattern, page.read_text(), re.M):
        yield comment, textwrap.dedent(text).strip() + "\n"


def examples() -> list[tuple[str, str]]:
    """The programs of python.md, and what each prints."""
    found = list(blocks(PYTHON))
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert {(one[0], other[0]) for one, other in pairs} == {("example", "prints")}
    return [(one[1], other[1]) for one, other in pairs]


def here(text: str, folder: Path) -> str:
    """*text* for the filesystem that the tests run on."""
    return text.replace("ext4", filesystem_of(str(folder)))


def test_there_are_examples() -> None:
    assert len(examples()) == 5
    assert sum(comment.startswith("file: ") for comment, _ in blocks(PYTEST)) == 2
    assert sum(comment.startswith("output: ") for comment, _ in blocks(PYTEST)) == 2


@pytest.mark.parametrize("number", range(len(examples())))
def test_an_example_prints_what_stands_under_it(tmp_path: Path, number: int) -> None:
    program, expected = examples()[number]
    (tmp_path / "data").write_bytes(os.urandom(1 << 16))
    done = subprocess.run(
        [sys.executable, "-c", here(program, tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (expected, "")


def plain(text: str) -> list[str]:
    """Lines without the rules that pytest fits to the terminal."""
    return [re.sub(r"([=_-])\1{2,}", r"\1", line).rstrip() for line in text.splitlines()]


def test_the_tests_of_the_pytest_page_do_what_it_says(tmp_path: Path) -> None:
    outputs = []
    for comment, text in blocks(PYTEST):
        kind, _, rest = comment.partition(": ")
        if kind == "file":
            (tmp_path / rest).write_text(text)
        else:
            outputs.append((rest, text))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, "-q"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "3 passed" in done.stdout, done.stdout
    for rest, expected in outputs:
        words = rest.split()
        setting = dict(word.split("=") for word in words if "=" in word)
        arguments = [word for word in words if "=" not in word]
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **setting},
        )
        shown = "\n".join(plain(done.stdout))
        wanted = "\n".join(plain(here(expected, tmp_path)))
        # How many probes attach depends on the kernel.
        shown, wanted = (re.sub(r"\d+ probes", "N probes", text) for text in (shown, wanted))
        assert wanted in shown
