# SPDX-License-Identifier: MIT
"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.privileged

COMMON = """
import os, subprocess, sys, threading
import pytest

SIZE, ROUNDS = 64 << 10, 17

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data"
    path.write_bytes(os.urandom(SIZE))
    return path

class Relay:
    def __init__(self, path):
        self.source, self.null = os.open(path, os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
        self.pipe = os.pipe()
    def splice(self):
        for _ in range(ROUNDS):
            assert os.splice(self.source, self.pipe[1], SIZE, offset_src=0) == SIZE
            assert os.splice(self.pipe[0], self.null, SIZE) == SIZE
    def copy(self):
        for _ in range(ROUNDS):
            assert os.write(self.pipe[1], os.pread(self.source, SIZE, 0)) == SIZE
            assert os.splice(self.pipe[0], self.null, SIZE) == SIZE

@pytest.fixture
def relay(data):
    relay = Relay(data)
    relay.copy()  # set-up is not counted
    yield relay
    relay.copy()
"""


def run(pytester: pytest.Pytester, text: str, *options: str) -> pytest.RunResult:
    """A run of pytest over a module with *text*, and what COMMON has in a conftest."""
    pytester.makeconftest(COMMON)
    pytester.makepyfile("from conftest import *\n" + text)
    options = ("-p", "no:cacheprovider", "-p", "no:randomly", *options)
    return pytester.runpytest_subprocess(*options, timeout=100)


def summary(result: pytest.RunResult) -> dict[str, tuple[str, str]]:
    """What --rsplice-summary says of each test: bytes copied, bytes carried."""
    rows = re.findall(r"^ *(\S+ \S+) copied of +(\S+ \S+)  \S*::(\S+)$", result.stdout.str(), re.M)
    return {name: (copied, carried) for copied, carried, name in rows}


def test_what_pytest_itself_moves_is_not_counted(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(helper="SIZE = len(open(__file__).read())\n")
    result = run(
        pytester,
        '''
import logging
pytestmark = pytest.mark.max_copied(0)
def test_empty():
    pass
def test_that_prints(capfd):
    print("x" * 5000)
    sys.stderr.write("to the other")
    os.write(1, b"by descriptor")
    logging.getLogger().error("logged")
    assert len(capfd.readouterr().out) == 5001 + 13
def test_that_imports():
    import xml.dom.minidom, sqlite3, decimal, helper
    assert helper.SIZE
def test_that_fails():
    assert {"a": [1, 2, 3] * 30} == {"a": [1, 2, 4] * 30}, "on purpose"
def test_that_warns():
    import warnings
    warnings.warn("a warning")
''',
        "--rsplice-summary",
        "--log-file=log",
    )  # fmt: skip
    result.assert_outcomes(passed=4, failed=1)
    nothing = ("0 B", "0 B")
    assert summary(result) == {
        "test_empty": nothing,
        "test_that_prints": nothing,
        "test_that_imports": nothing,
        "test_that_fails": nothing,
        "test_that_warns": nothing,
    }


def test_limits_pass_and_fail(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        '''
@pytest.mark.max_copied("0 B")
@pytest.mark.no_findings("violation")
def test_splice(relay, zero_copy):
    relay.splice()
    audit = zero_copy.audit
    assert sum(path.shared for path in audit.paths if path.destination == "pipe") == ROUNDS * SIZE
@pytest.mark.max_copied("2 MiB")
def test_copy(relay):
    relay.copy()
@pytest.mark.max_copied("3 MiB")
def test_copy_less(relay):
    relay.copy()
@pytest.mark.max_copies_per_byte(0.5)
def test_ratio(relay):
    relay.copy()
@pytest.mark.max_copies_per_byte(1)
def test_ratio_passes(relay):
    relay.copy()
@pytest.mark.min_avoided("1 MiB")
def test_avoided(relay):
    relay.splice()
@pytest.mark.min_avoided("1 MiB")
def test_avoided_fails(relay):
    relay.copy()
def test_unmarked(relay):
    relay.copy()
''',
        "--rsplice-summary",
        "--junit-xml=junit.xml",
    )  # fmt: skip
    result.assert_outcomes(passed=5, failed=3)
    carried = "3.19 MiB"
    assert summary(result) == {
        "test_splice": ("0 B", "2.12 MiB"),
        "test_copy": ("2.12 MiB", carried),
        "test_copy_less": ("2.12 MiB", carried),
        "test_ratio": ("2.12 MiB", carried),
        "test_ratio_passes": ("2.12 MiB", carried),
        "test_avoided": ("0 B", "2.12 MiB"),
        "test_avoided_fails": ("2.12 MiB", carried),
    }
    result.stdout.fnmatch_lines(
        [
            "*__ test_copy __*",
            "max_copied('2 MiB'): 2228224 bytes copied",
            "*- rsplice -*",
            "max_copied('2 MiB'): 2228224 bytes copied",
            "* -> user memory via pread64: payload 1.06 MiB, copied 1.06 MiB, 1.00 copies per *",
            "    the kernel copies *",
            "accuracy: * probes attached, 0 missing, 0 events lost, 0 bytes unknown",
            "*__ test_ratio __*",
            "max_copies_per_byte(0.5): 2228224 bytes copied for 3342336 bytes carried",
            "*__ test_avoided_fails __*",
            "min_avoided('1 MiB'): 0 bytes avoided",
        ]
    )
    cases = {
        case.get("name"): case
        for case in ElementTree.parse(pytester.path / "junit.xml").iter("testcase")
    }
    values = {each.get("name"): each.get("value") for each in cases["test_copy"].iter("property")}
    assert values["rsplice_copy_bytes"] == str(2 * 17 * 65536)
    assert values["rsplice_payload_bytes"] == str(3 * 17 * 65536)
    assert "user memory -> pipe via write: 1.06 MiB" in str(values["rsplice_paths"])
    assert list(cases["test_unmarked"].iter("property")) == []


def test_without_the_privilege_tests_are_skipped_with_the_reason_that_doctor_gives(
    pytester: pytest.Pytester,
) -> None:
    text = '''
@pytest.mark.max_copied("0 B")
def test_marked():
    pass
def test_with_the_fixture(zero_copy):
    pass
def test_unmarked():
    pass
'''  # fmt: skip
    pytester.makeconftest(COMMON)
    pytester.makepyfile("from conftest import *\n" + text)
    command = ["setpriv", "--bounding-set", "-sys_admin,-bpf,-perfmon", sys.executable]
    command += ["-m", "pytest", "-p", "no:cacheprovider", "-rs"]
    result = pytester.run(*command, timeout=100)
    result.assert_outcomes(passed=1, skipped=2)
    reason = "no privilege for BPF: CAP_BPF and CAP_PERFMON missing (or CAP_SYS_ADMIN); run as root"
    result.stdout.fnmatch_lines([f"SKIPPED *: {reason}"])
    doctor = subprocess.run(
        [*command[:4], "-m", "rsplice", "doctor"], capture_output=True, text=True
    )
    assert f"nothing can be audited: {reason}" in doctor.stdout
    result = pytester.run(*command, "--rsplice-strict", timeout=100)
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines([f"*--rsplice-strict: {reason}"])
