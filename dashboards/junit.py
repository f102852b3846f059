# SPDX-License-Identifier: MIT
"""An audit as JUnit XML, which Jenkins, GitLab and most other CI systems read.

No specification of the format exists; the elements and attributes are those that
https://github.com/testmoapp/junitxml lists as understood everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from rsplice.audit import Audit
from rsplice.dashboards import phrases
from rsplice.dashboards.limits_text import failure_lines
from rsplice.dashboards.text import command_line, sanitise
from rsplice.limits import Limit


def render_junit(audit: Audit, limits: Sequence[Limit]) -> str:
    """One suite: a case for the command, which its exit status fails, and one for each limit."""
    name = command_line(audit.command) or "running processes"
    classname = "rsplice." + sanitise(PurePath((audit.command or ["audit"])[0]).name)
    seconds = f"{audit.duration_s:.3f}"
    suite = Element("testsuite", name=f"rsplice audit: {name}", time=seconds)
    properties = SubElement(suite, "properties")
    for key, value in amounts(audit).items():
        SubElement(properties, "property", name=key, value=value)
    case = SubElement(suite, "testcase", classname=classname, name=name, time=seconds)
    if audit.exit_status:
        _fail(case, "exit status", [f"exit status {audit.exit_status}"])
    for limit in limits:
        text = sanitise(limit.text)
        case = SubElement(suite, "testcase", classname=classname, name=text, time="0")
        if lines := failure_lines(audit, limit):
            _fail(case, "limit", lines)
    known = phrases.totals(audit.totals, audit.accuracy.events_lost)
    SubElement(suite, "system-out").text = f"{known}\n{phrases.accuracy(audit.accuracy)}\n"
    failures = len(suite.findall("testcase/failure"))
    suite.attrib |= {"tests": str(1 + len(limits)), "failures": str(failures)}
    suite.attrib |= {"errors": "0", "skipped": "0"}
    root = Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def amounts(audit: Audit) -> dict[str, str]:
    """The numbers of an audit as properties of a test: bytes, events, a ratio, a word."""
    totals = audit.totals
    return {
        "payload": str(totals.payload_bytes),
        "copy_bytes": str(totals.copy_bytes),
        "copied": str(totals.copied),
        "avoided": str(totals.avoided_bytes),
        "unknown": str(audit.accuracy.unknown_bytes),
        "lost": str(audit.accuracy.events_lost),
        "copies_per_byte": f"{totals.copies_per_byte:.6f}",
        "evidence": totals.evidence.word,
    }


def _fail(case: Element, kind: str, lines: Sequence[str]) -> None:
    failure = SubElement(case, "failure", message=lines[0], type=kind)
    failure.text = "\n".join(lines)
