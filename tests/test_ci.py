# SPDX-License-Identifier: MIT
"""JUnit XML and GitHub Actions: what they say, and that no name can forge anything in them."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rsplice.audit import Audit, Counts, Finding, Path, Process
from rsplice.dashboards import github
from rsplice.dashboards.junit import render_junit
from rsplice.dashboards.limits_text import failure_lines
from rsplice.dashboards.report import print_report
from rsplice.limits import parse_limit
from tests.support.actions import Command, commands_in
from tests.test_report import audit_of, read_path, sample, splice_path

LIMITS = [parse_limit(text) for text in ("copied>0", "copied>1GiB", "violation", "hazard")]
#: What is tried in each place where a name of somebody else's is shown.
EVIL = ["::error::x", " ::add-mask::a", "a##[add-mask]e", "a\n::error::x", "a\r##[error]",
        "%0A::x::", "]]>", "<b>&amp;", "\x00\x1b[31m", "\ud800\udcff\ufffe", "| a | b |", "`` ` [x](http://x)",
        "<script>", "@somebody", "::stop-commands::x", "a::error title=x,file=y::z"]  # fmt: skip
names = st.text(max_size=40) | st.sampled_from(EVIL)


def audit_with(name: str) -> Audit:
    """An audit with *name* wherever a name can be, one copied byte, and a violation."""
    audit = audit_of(Path(name, name, name, Counts(1, 1, 1, copied=1, operations=1), name))
    audit.command = [name, name]
    audit.processes = [Process(1, name, audit.paths), Process(2, name, [])]
    audit.findings = [Finding(name, "violation", 1, {"comm": name, "file": name}, name)]
    audit.findings.append(Finding(name, "missed move", 1, {"comm": name}, name))
    return audit


def suite_of(audit: Audit) -> ElementTree.Element:
    root = ElementTree.fromstring(render_junit(audit, LIMITS).encode())
    assert root.tag == "testsuites"
    (suite,) = root
    return suite


# JUnit


def test_junit_has_a_case_for_the_command_and_one_for_each_limit() -> None:
    suite = suite_of(sample())
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "2", "errors": "0", "skipped": "0"}
    assert (suite.get("name"), suite.get("time")) == ("rsplice audit: cp a 'b c'", "0.420")
    cases = {case.get("name"): case.find("failure") for case in suite.findall("testcase")}
    assert list(cases) == ["cp a 'b c'", "copied>0", "copied>1GiB", "violation", "hazard"]
    failed = {name: failure for name, failure in cases.items() if failure is not None}
    assert {name: failure.get("message") for name, failure in failed.items()} == {
        "copied>0": "copied>0: 110592 bytes copied",
        "violation": "violation: violation: double-owner, once",
    }
    for name, failure in failed.items():
        assert failure.text == "\n".join(failure_lines(sample(), parse_limit(str(name))))
    assert {case.get("classname") for case in suite.findall("testcase")} == {"rsplice.cp"}


def test_junit_has_the_numbers_as_properties() -> None:
    found = {p.get("name"): p.get("value") for p in suite_of(sample()).iter("property")}
    assert found == {
        "payload": "1155075",
        "copy_bytes": "110592",
        "copied": "102400",
        "avoided": "1044483",
        "unknown": "4099",
        "lost": "0",
        "copies_per_byte": "0.095744",
        "evidence": "inferred",
    }


@pytest.mark.parametrize("status", [1, 139])
def test_junit_fails_a_command_that_failed(status: int) -> None:
    audit = audit_of(splice_path())
    audit.exit_status = status
    suite = suite_of(audit)
    assert suite.get("failures") == "1"
    (failure,) = suite.iter("failure")
    assert failure.get("message") == f"exit status {status}"


def test_junit_of_running_processes() -> None:
    suite = suite_of(Audit(totals=Counts(5, 0, 5, shared=5)))
    assert [case.get("name") for case in suite.iter("testcase")][0] == "running processes"
    assert suite.get("failures") == "0"


@given(names)
@example("\x08\x0b\x1f\x7f")
def test_junit_is_sound_xml_whatever_the_names(name: str) -> None:
    suite = suite_of(audit_with(name))
    assert suite.get("failures") == "2"
    assert len(suite.findall("testcase")) == 5
    allowed = ("testsuite", "properties", "property", "testcase", "failure", "system-out")
    assert {element.tag for element in suite.iter()} == set(allowed)
    text = "".join(suite.itertext())
    assert all(char.isprintable() or char == "\n" for char in text)


# GitHub Actions


def test_a_failed_limit_is_one_error_with_its_text() -> None:
    first, second, third = commands_in(github.commands(sample(), LIMITS))
    lines = failure_lines(sample(), LIMITS[0])
    assert first.name == second.name == "error"
    assert first.properties == {"title": "rsplice: copied>0"}
    assert first.text.split("\n") == [lines[0], "cp a 'b c', exit status 0", *lines[1:]]
    assert second.properties == {"title": "rsplice: violation"}
    assert (third.name, third.properties) == ("warning", {"title": "rsplice: not all is known"})
    assert third.text.endswith("4099 bytes unknown")


def test_no_limit_that_failed_and_nothing_unknown_is_no_command() -> None:
    assert github.commands(audit_of(splice_path()), LIMITS) == ""
    assert github.commands(audit_of(read_path()), []) == ""


@given(names)
@example("::stop-commands::x")
@example("a##[add-mask]e")
def test_no_name_forges_a_command(name: str) -> None:
    """In the annotations, and in the report and the sentences before them."""
    audit, file = audit_with(name), io.StringIO()
    file.write("a line that was not ended")
    with github.commands_stopped(file):
        print_report(audit, file)
        for line in failure_lines(audit, LIMITS[0]):
            print(line, file=file)
            print(f"rsplice: {line}", file=file)
    annotations = github.commands(audit, LIMITS)
    found = commands_in(file.getvalue() + annotations)
    titles = ["rsplice: copied>0", "rsplice: violation"]
    assert [(c.name, c.properties) for c in found] == [("error", {"title": t}) for t in titles]
    for command, limit in zip(found, (LIMITS[0], LIMITS[2]), strict=True):
        first, name_line, *others = command.text.split("\n")
        assert [first, *others] == failure_lines(audit, limit)
        assert name_line.endswith(", exit status 0")


def test_a_report_that_is_not_fenced_could_be_forged() -> None:
    """The twin: what the test above relies on tells a command from text."""
    assert commands_in("::error::x[7]") == [Command("error", {}, "x[7]")]
    assert commands_in("rsplice: a##[add-mask]e") == [Command("add-mask", {}, "e")]
    assert commands_in("a ::error::x") == []
    assert commands_in("::stop-commands::t\n::error::x\n::t::\n::error::y") == [
        Command("error", {}, "y")
    ]


def test_each_report_is_fenced_with_a_token_of_its_own() -> None:
    files = [io.StringIO() for _ in range(2)]
    for file in files:
        with github.commands_stopped(file):
            file.write("x\n")
    tokens = [re.findall(r"::stop-commands::(\w{32})\nx\n::\1::\n", f.getvalue()) for f in files]
    assert len(tokens[0]) == len(tokens[1]) == 1
    assert tokens[0] != tokens[1]


def test_the_summary_is_a_table() -> None:
    audit = audit_of(read_path(), splice_path())
    audit.findings = [Finding("steal-refused", "missed move", 3, {}, "try O_DIRECT")]
    assert github.summary(audit, LIMITS[:2]) == (
        "### rsplice: cp a 'b c', exit status 0\n\n"
        "- failed: copied\\>0\\: 94208 bytes copied\n"
        "- passed: copied\\>1GiB\n\n"
        "payload 1.09 MiB, copied 92.0 KiB, avoided 1.00 MiB \\(91 %\\)\n\n"
        "| path | operations | payload | copied | copies per byte | evidence | why |\n"
        "| :--- | ---: | ---: | ---: | ---: | :--- | :--- |\n"
        "| ext4 -\\> user memory via pread64 | 23 | 92.0 KiB | 92.0 KiB | 1.00 | measured "
        "| pread64 copies from the page cache |\n"
        "| ext4 -\\> pipe via splice | 17 | 1.00 MiB | 0 B | 0.00 | identity "
        "| the pipe refers to the page cache's own pages |\n\n"
        "- missed move\\: steal-refused, 3 times: try O\\_DIRECT\n\n"
        "accuracy\\: 13 probes attached, 0 missing, 0 events lost, 0 bytes unknown\n\n"
    )


@given(names)
def test_no_name_breaks_the_summary(name: str) -> None:
    """No row of the table has more cells, and no character of a name is markup or HTML."""
    text = github.summary(audit_with(name), LIMITS)
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", text)
    rows = [line for line in bare.split("\n") if line.startswith("|")]
    assert len(rows) == 3
    assert {row.count("|") for row in rows} == {8}
    assert not re.search(r"[<>@\[\]`*_$~]|://", bare.replace("| :--- | ---: |", ""))
    assert all(char.isprintable() or char == "\n" for char in text)


def test_a_long_summary_says_what_it_leaves_out() -> None:
    audit = audit_of(*(Path("ext4", f"d{n}", "read", Counts(1, 1, 1, copied=1)) for n in range(23)))
    text = github.summary(audit, [])
    assert text.count("ext4 -\\> d") == 20
    assert "and 3 more paths, all in the JSON" in text
