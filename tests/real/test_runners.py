# SPDX-License-Identifier: MIT
"""Audits in other people's test runners: the examples of docs/testing.md, files and annotations.

Each example is run as it stands in the page, and again with its sendfile switched off.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.actions import commands_in
from tests.support.filesystems import filesystem_of
from tests.support.run import ROOT, RSPLICE, Driver, audit, environment

pytestmark = pytest.mark.privileged

PAGE = (ROOT / "docs" / "testing.md").read_text()
Needs = Callable[..., None]
COPIED = 23 * 16384  #: what the driver's reads copy


@pytest.mark.parametrize("limit", ["copied>376831", "copied>376832"])
def test_junit_of_a_run(driver: Driver, tmp_path: Path, limit: str) -> None:
    """23 reads copy 376832 bytes: the first limit fails, the second does not."""
    command = driver.command(tmp_path / "report.json", tmp_path, "read", "-f", "memfd")
    file = tmp_path / "copies.xml"
    result = audit(command, "--junit", str(file), "--fail-on", limit, "--fail-on", "violation")
    (suite,) = ElementTree.parse(file).getroot()
    cases = [(case.get("name"), len(case)) for case in suite.findall("testcase")]
    fails = limit == "copied>376831"
    assert result.status == (120 if fails else 0)
    assert cases[1:] == [(limit, int(fails)), ("violation", 0)]
    assert cases[0][1] == 0
    assert suite.get("failures") == str(int(fails))
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert (properties["copy_bytes"], properties["payload"]) == (str(COPIED), str(COPIED))
    assert (properties["unknown"], properties["lost"]) == ("0", "0")
    if fails:
        (failure,) = suite.iter("failure")
        assert failure.text
        first, path, why, *_, last = failure.text.splitlines()
        assert first == f"{limit}: {COPIED} bytes copied"
        assert path.startswith("memfd -> user memory via read: payload 368 KiB, copied 368 KiB, ")
        assert "the kernel copies" in why
        assert last.startswith("accuracy: ")


def test_junit_on_standard_output_is_one_document() -> None:
    done = subprocess.run(
        [*RSPLICE, "audit", "--junit", "-", "--", "true"], capture_output=True, env=environment()
    )
    assert done.returncode == 0
    assert ElementTree.fromstring(done.stdout).tag == "testsuites"
    assert done.stderr == b""


def test_two_reports_on_standard_output_are_a_mistake(tmp_path: Path) -> None:
    result = audit(["touch", tmp_path / "ran"], "--json", "-", "--junit", "-")
    assert result.status == 125
    assert "only one report" in result.message
    assert not (tmp_path / "ran").exists()


def test_junit_that_cannot_be_written_is_found_out_before_the_command_runs(tmp_path: Path) -> None:
    result = audit(["touch", tmp_path / "ran"], "--junit", str(tmp_path / "absent" / "x.xml"))
    assert result.status == 125
    assert "there is no directory" in result.message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["::error::forged", "##[add-mask]e", "a\n::error::x"])
def test_annotations_of_a_run_are_rsplices_own(driver: Driver, tmp_path: Path, name: str) -> None:
    """The report names a process that is called like a command; a runner obeys only ours."""
    read = driver.command(tmp_path / "report.json", tmp_path, "read", "-C", name)
    summary = tmp_path / "summary.md"
    summary.write_text("what was there\n")
    result = audit(
        ["sh", "-c", 'cat /proc/self/stat; "$@"', "sh", *read],
        *("--github", "--interval", "0.1", "--fail-on", "copied>0", "--fail-on", "violation"),
        env={**environment(), "GITHUB_STEP_SUMMARY": str(summary)},
    )
    assert result.status == 120
    obeyed = commands_in(result.stderr)
    assert [(c.name, c.properties) for c in obeyed] == [("error", {"title": "rsplice: copied>0"})]
    assert "1.00 copies per byte" in obeyed[0].text
    assert "forged[" in result.stderr or name != "::error::forged", "the report names it"
    text = summary.read_text()
    assert text.startswith("what was there\n### rsplice: sh")
    assert "- failed: copied\\>0\\: " in text
    assert "- passed: violation" in text


def test_annotations_without_limits_and_without_a_command(tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    with subprocess.Popen(["sleep", "100"]) as sleep:
        result = audit(
            [],
            *("-p", str(sleep.pid), "--duration", "0.1", "--github", "-q"),
            *("--junit", str(tmp_path / "copies.xml")),
            env={**environment(), "GITHUB_STEP_SUMMARY": str(summary)},
        )
        sleep.kill()
    assert (result.status, result.stderr) == (0, "")
    assert summary.read_text().startswith("### rsplice: running processes\n")
    (suite,) = ElementTree.parse(tmp_path / "copies.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")


def test_a_summary_that_cannot_be_written_is_found_out_before_the_command_runs(
    tmp_path: Path,
) -> None:
    summary = str(tmp_path / "absent" / "summary.md")
    result = audit(
        ["touch", tmp_path / "ran"],
        "--github",
        env={**environment(), "GITHUB_STEP_SUMMARY": summary},
    )
    assert result.status == 125
    assert summary in result.message
    assert not (tmp_path / "ran").exists()


# The examples of docs/testing.md.


def blocks(kind: str) -> dict[str, str]:
    """The code blocks behind ``<!-- KIND: NAME... -->``, by name."""
    found = re.findall(rf"^<!-- {kind}: (.+) -->\n\n((?:(?: {{4}}.*)?\n)+)", PAGE, re.M)
    texts = {names: textwrap.dedent(text).rstrip() + "\n" for names, text in found}
    return {name: text for names, text in texts.items() for name in names.split()}


def example_environment(directory: Path) -> dict[str, str]:
    """rsplice in PATH, caches of the example's own, and nothing fetched from anywhere."""
    commands = Path(sys.executable).parent
    assert (commands / "rsplice").exists(), f"{commands} has no rsplice: run .ci/setup.sh test"
    return {
        **environment(),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CARGO_HOME": str(directory / "cargo-home"),
        "GOCACHE": str(directory / "go-cache"),
        "GOPATH": str(directory / "go-path"),
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
    }


def run_example(directory: Path, commands: str, **extra: str) -> tuple[int, str]:
    """Runs *commands* in a shell: the exit status of the first that fails, and the output."""
    done = subprocess.run(
        ["sh", "-ec", commands],
        cwd=directory,
        env={**example_environment(directory.parent), **extra},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout


def write_example(name: str, directory: Path) -> Path:
    """The project *name* of the page, written below *directory*."""
    files = {file: text for file, text in blocks("file").items() if file.startswith(f"{name}/")}
    assert files, f"docs/testing.md has no file of {name}"
    for file, text in files.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(text)
    return directory / name


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("ctest", ["cmake", "cc", "make"]),
        ("meson", ["meson", "ninja", "cc"]),
        ("make", ["make", "cc"]),
        ("cargo", ["cargo", "cc"]),
        ("go", ["go", "cc"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_example_is_green_and_without_sendfile_red(
    tmp_path: Path, needs: Needs, name: str, programs: list[str]
) -> None:
    needs(*programs)
    directory = write_example(name, tmp_path)
    commands = blocks("run")[name]
    last = commands.splitlines()[-1]
    for part in (commands, last):
        status, output = run_example(directory, part)
        assert status == 0, output
        assert "rsplice: copied>" not in output
        assert "(cached)" not in output, "go test audits each time"
    status, output = run_example(directory, last, NO_SENDFILE="1")
    assert status != 0, output
    assert re.search(r"^rsplice: copied>\S+: \d+ bytes copied$", output, re.M), output
    kind = filesystem_of(str(tmp_path))
    for path in (f"{kind} -> user memory via read", r"user memory -> tcp via (write|sendto)"):
        told = rf"^{path}: .* 1\.00 copies per byte, inferred\n    the kernel copies"
        assert re.search(told, output, re.M), output
    assert re.search(r"^accuracy: .* 0 events lost, 0 bytes unknown", output, re.M), output


def test_the_output_in_the_page_is_what_ctest_prints(tmp_path: Path, needs: Needs) -> None:
    """All lines but the accuracy line, whatever the numbers and the file system."""
    needs("cmake", "cc", "make")
    directory = write_example("ctest", tmp_path)
    first, last = blocks("run")["ctest"].splitlines()
    assert run_example(directory, first)[0] == 0
    _, output = run_example(directory, last, NO_SENDFILE="1")
    output = output.replace(f"{filesystem_of(str(tmp_path))} -> ", "ext4 -> ")
    shown = [re.sub(r"[\d.]+", "N", line) for line in blocks("output")["ctest"].splitlines()]
    printed = [re.sub(r"[\d.]+", "N", line) for line in output.splitlines()]
    start = printed.index(shown[0])
    assert printed[start : start + len(shown) - 1] == shown[:-1]
    assert shown[-1].startswith("accuracy: ")


@pytest.mark.parametrize(
    ("before", "launcher", "status", "said"),
    [
        ("", "", 0, "copies nothing"),
        ("export NO_SENDFILE=1", "", 1, "copies"),
        ("rm relay-test", "", 1, "fails"),
        ("", "setpriv --bounding-set -all --inh-caps -all", 2, "cannot be audited"),
    ],
)
def test_a_script_tells_the_kinds_of_failure_apart(
    tmp_path: Path, needs: Needs, before: str, launcher: str, status: int, said: str
) -> None:
    needs("make", "cc", "setpriv")
    directory = write_example("make", tmp_path)
    commands = f"make -s relay-test\n{before}\n{launcher} sh check.sh"
    found, output = run_example(directory, commands)
    assert (found, output.splitlines()[-1]) == (status, said), output


def test_the_step_of_the_workflow(tmp_path: Path, needs: Needs) -> None:
    """Its command, without sudo and where it lies: green, and red with one annotation."""
    needs("make", "cc")
    directory = write_example("make", tmp_path)
    assert run_example(directory, "make relay-test")[0] == 0
    match = re.search(r"run: sudo --preserve-env=GITHUB_STEP_SUMMARY (rsplice/[\s\S]*?)\n\n", PAGE)
    assert match
    command = " ".join(match[1].split()).replace("rsplice/.venv/bin/rsplice", "rsplice")
    summary = directory / "summary.md"
    green = run_example(directory, command, GITHUB_STEP_SUMMARY=str(summary))
    assert (green[0], commands_in(green[1])) == (0, [])
    assert "- passed: copied\\>0" in summary.read_text()
    status, output = run_example(
        directory, command, GITHUB_STEP_SUMMARY=str(summary), NO_SENDFILE="1"
    )
    assert status == 120
    assert [c.properties["title"] for c in commands_in(output)] == ["rsplice: copied>0"]
    assert "- failed: copied\\>0" in summary.read_text()
    (suite,) = ElementTree.parse(directory / "copies.xml").getroot()
    assert suite.get("failures") == "1"


def test_each_block_of_the_page_is_used() -> None:
    assert set(re.findall(r"^<!-- (\w+):", PAGE, re.M)) == {"file", "run", "output"}
    assert set(blocks("run")) == {file.partition("/")[0] for file in blocks("file")}
    assert set(blocks("output")) == {"ctest"}
