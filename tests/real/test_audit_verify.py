# SPDX-License-Identifier: MIT
"""rsplice audit --verify: blocks change below the pages of files that a run lends, and twins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.real.test_verify import KINDS, PAGE, PAGES, Filesystem, cached, filesystem_at
from tests.support.run import Result, audit

pytestmark = pytest.mark.privileged

#: How a program lends pages of the file `source`.
LEND = {
    "splice": "os.splice(source, w, PAGE, offset_src=0)",
    "sendfile": "os.sendfile(sink, source, 0, 2 * PAGE)",
    "copy_file_range": (
        "copy = os.open(name + ' copy', os.O_RDWR | os.O_CREAT)\n"
        "os.copy_file_range(source, copy, PAGE, 0)"
    ),
}


@pytest.fixture(params=KINDS)
def filesystem(request: pytest.FixtureRequest) -> Filesystem:
    return filesystem_at(request.param, request.getfixturevalue(request.param))


@pytest.fixture
def on_ext4(ext4: Path) -> Filesystem:
    return filesystem_at("ext4", ext4)


def lend(files: Mapping[Path, str], *options: str) -> Result:
    """An audit of a program that does with each file what is said of it, as in LEND."""
    program = f"import os\nPAGE = {PAGE}\nsink = os.memfd_create('sink')\nr, w = os.pipe()\n"
    for file, body in files.items():
        program += f"name = {str(file)!r}\nsource = os.open(name, os.O_RDONLY)\n{body}\n"
        program += "os.write(w, b'.')\nos.read(r, 2 * PAGE)\n"
    command = [sys.executable, "-I", "-S", "-c", program]
    return audit(command, "--verify", *options, violations={"cache-differs-from-disk"})


def differing(result: Result) -> list[dict[str, object]]:
    return [f for f in result.json["findings"] if f["name"] == "cache-differs-from-disk"]


def unverified(result: Result) -> list[dict[str, str]]:
    """What could not be compared; other probes are missing, too: FUSE's before 6.11."""
    missing: list[dict[str, str]] = result.json["accuracy"]["probes_missing"]
    return [each for each in missing if each["probe"].startswith("verify ")]


def test_a_block_that_was_changed_below_a_file_that_is_spliced(filesystem: Filesystem) -> None:
    file = filesystem.file("lent")
    with cached(file), filesystem.changed(file, 5 * PAGE + 123):
        result = lend({file: LEND["splice"]}, "--fail-on", "violation")
    assert result.status == 120
    (found,) = differing(result)
    assert (found["kind"], found["count"]) == ("violation", 1)
    first = found["first"]
    assert isinstance(first, dict)
    assert (first["file"], first["file_offset"]) == (str(file), 5 * PAGE)
    assert first["page_frame"] > 0 and 0 < first["time"] <= result.json["duration_s"]
    assert unverified(result) == []


def test_files_with_nothing_changed_below_them(ext4: Path, xfs: Path, btrfs: Path) -> None:
    """The twin, of all kinds at once; below one the block was another one for a while."""
    places = zip(KINDS, (ext4, xfs, btrfs), strict=True)
    filesystems = [filesystem_at(kind, path) for kind, path in places]
    files = [filesystem.file("sound") for filesystem in filesystems]
    with cached(*files):
        with filesystems[0].changed(files[0], 5 * PAGE + 123):
            pass
        result = lend(dict.fromkeys(files, LEND["splice"]), "--fail-on", "violation")
    assert result.status == 0
    assert differing(result) == []
    assert unverified(result) == []


def test_each_way_to_lend_a_page_counts(on_ext4: Filesystem) -> None:
    files = {on_ext4.file(f"{way} of it"): way for way in LEND}
    with cached(*files), ExitStack() as stack:
        for file in files:
            stack.enter_context(on_ext4.changed(file, (PAGES - 1) * PAGE))
        result = lend({file: LEND[way] for file, way in files.items()})
    assert result.status == 0
    (found,) = differing(result)
    assert found["count"] == len(LEND)


def test_only_files_that_were_lent_are_compared(on_ext4: Filesystem) -> None:
    file = on_ext4.file("read")
    with cached(file), on_ext4.changed(file, 0):
        result = lend({file: "os.read(source, PAGE)\nos.splice(sink, w, PAGE, offset_src=0)"})
        assert differing(result) == []
        assert unverified(result) == []


def test_a_file_is_found_by_its_inode(on_ext4: Filesystem) -> None:
    """It has another name by then; another file has its name, and differs not."""
    file = on_ext4.file("first name")
    rename = "\nos.rename(name, name + ' no more')\nopen(name, 'w').close()"
    with cached(file), on_ext4.changed(file, 0):
        (found,) = differing(lend({file: LEND["splice"] + rename}))
    first = found["first"]
    assert isinstance(first, dict) and first["file"] == f"{file} no more"
    (on_ext4.path / "first name no more").unlink()


def test_a_file_that_is_gone_is_told(on_ext4: Filesystem) -> None:
    file = on_ext4.file("gone")
    result = lend({file: LEND["splice"] + "\nos.unlink(name)"})
    assert differing(result) == []
    (missing,) = unverified(result)
    assert missing["probe"].startswith("verify inode ")
    assert missing["cost"] == "whether its cached pages differ from the disk is not known"


def test_files_that_cannot_be_opened_are_told_together(on_ext4: Filesystem) -> None:
    """Here three that are gone."""
    file = on_ext4.file("many")
    body = (
        "for i in range(3):\n"
        " other = os.open(f'{name} {i}', os.O_RDWR | os.O_CREAT)\n os.write(other, b'o' * PAGE)\n"
        " os.splice(other, w, PAGE, offset_src=0)\n os.read(r, PAGE)\n"
        " os.unlink(f'{name} {i}')\n"
    )
    (missing,) = unverified(lend({file: body}))
    assert missing["probe"].startswith("verify inode ")
    assert missing["probe"].endswith(" of ext4 and 2 more")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--identity=sample", "--verify looks at every call: leave out --identity sample"),
        ("--kernel=6.12", "--verify reads this machine's disks: leave out --kernel"),
    ],
)
def test_what_it_does_not_go_with(option: str, line: str) -> None:
    refused = audit(["true"], "--verify", option)
    assert refused.status == 125
    assert refused.message == f"rsplice: {line}"
