# SPDX-License-Identifier: MIT
"""Audits in other people's test runners: the files and annotations that these read."""

from __future__ import annotations

import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.actions import commands_in
from tests.support.run import RSPLICE, Driver, audit, environment

pytestmark = pytest.mark.privileged

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
