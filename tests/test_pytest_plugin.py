# SPDX-License-Identifier: MIT
"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import suite

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


def test_workers_of_xdist_trace_side_by_side(pytester: pytest.Pytester) -> None:
    """While tests run, their worker is sent others to run: bytes that are none of the tests'."""
    result = run(
        pytester,
        """
import time
@pytest.mark.max_copied(0)
@pytest.mark.parametrize("number", range(23))
def test_nothing(number):
    time.sleep(0.05 if number % 3 else 0.005)
@pytest.mark.max_copied(0)
@pytest.mark.parametrize("number", range(7))
def test_splice(relay, number, zero_copy):
    relay.splice()
    time.sleep(0.05)
    assert zero_copy.audit.payload_bytes == 2 * ROUNDS * SIZE
@pytest.mark.max_copied(0)
def test_copy(relay):
    relay.copy()
""",
        "-n2",
        "--maxschedchunk=1",
        "--rsplice-summary",
        "--junit-xml=junit.xml",
    )
    result.assert_outcomes(passed=30, failed=1)
    found = summary(result)
    assert len(found) == 31
    assert found["test_copy"] == ("2.12 MiB", "3.19 MiB")
    assert {found[f"test_nothing[{n}]"] for n in range(23)} == {("0 B", "0 B")}
    result.stdout.fnmatch_lines(["*- rsplice -*", "max_copied(0): 2228224 bytes copied"])


def test_a_test_that_is_run_again_is_traced_again(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
runs = []
@pytest.mark.flaky(reruns=3)
@pytest.mark.max_copied("0 B")
def test_copies_at_first(relay, zero_copy):
    runs.append(zero_copy)
    relay.copy() if len(runs) < 3 else relay.splice()
    assert len(set(map(id, runs))) == len(runs)
""",
        "--rsplice-summary",
        "--junit-xml=junit.xml",
    )
    result.assert_outcomes(passed=1)
    assert "2 rerun" in result.stdout.str()
    assert summary(result) == {"test_copies_at_first": ("0 B", "2.12 MiB")}
    properties = ElementTree.parse(pytester.path / "junit.xml").iter("property")
    values = [p.get("value") for p in properties if p.get("name") == "rsplice_copy_bytes"]
    assert values[-1] == "0"  # junit shows those of each run


def test_asynchronous_tests_are_traced(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
import asyncio
pytestmark = [pytest.mark.asyncio, pytest.mark.max_copied("0 B")]
async def test_nothing():
    await asyncio.sleep(0.01)
async def test_splice(relay, zero_copy):
    await asyncio.gather(splice(relay), splice(relay))
    assert zero_copy.audit.payload_bytes == 4 * ROUNDS * SIZE
async def test_copy(relay):
    await asyncio.sleep(0)
    relay.copy()
async def splice(relay):
    await asyncio.sleep(0)
    relay.splice()
""",
        "--rsplice-summary",
    )
    result.assert_outcomes(passed=2, failed=1)
    assert summary(result) == {
        "test_nothing": ("0 B", "0 B"),
        "test_splice": ("0 B", "4.25 MiB"),
        "test_copy": ("2.12 MiB", "3.19 MiB"),
    }


def test_methods_of_unittest_are_traced_without_their_set_up(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
import unittest
class TestSync(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _relay(self, relay):
        self.relay = relay
    def setUp(self):
        self.relay.copy()
    tearDown = setUp
    @pytest.mark.max_copied(0)
    def test_splice(self):
        self.relay.splice()
    @pytest.mark.max_copied(0)
    def test_copy(self):
        self.relay.copy()
    def test_unmarked(self):
        self.relay.copy()
class TestAsync(unittest.IsolatedAsyncioTestCase):
    @pytest.fixture(autouse=True)
    def _relay(self, relay):
        self.relay = relay
    async def asyncSetUp(self):
        self.relay.copy()
    @pytest.mark.max_copied(0)
    async def test_async_splice(self):
        self.relay.splice()
    @pytest.mark.max_copied(0)
    async def test_async_copy(self):
        self.relay.copy()
""",
        "--rsplice-summary",
    )
    result.assert_outcomes(passed=3, failed=2)
    assert summary(result) == {
        "test_splice": ("0 B", "2.12 MiB"),
        "test_copy": ("2.12 MiB", "3.19 MiB"),
        "test_async_splice": ("0 B", "2.12 MiB"),
        "test_async_copy": ("2.12 MiB", "3.19 MiB"),
    }


@pytest.mark.parametrize("method", ["signal", "thread"])
def test_a_test_that_times_out_ends_its_trace(pytester: pytest.Pytester, method: str) -> None:
    result = run(
        pytester,
        """
import time
@pytest.mark.max_copied(0)
def test_first(relay):
    relay.splice()
@pytest.mark.timeout(0.5)
@pytest.mark.max_copied(0)
def test_too_long(relay):
    relay.splice()
    time.sleep(100)
@pytest.mark.max_copied(0)
def test_after(relay, zero_copy):
    relay.splice()
    assert zero_copy.audit.payload_bytes == 2 * ROUNDS * SIZE
""",
        f"--timeout-method={method}",
        "--rsplice-summary",
    )
    if method == "thread":  # ends the process
        assert result.ret == 1
        result.stdout.fnmatch_lines(["*Timeout*"])
        return
    result.assert_outcomes(passed=2, failed=1)
    # pytest-timeout itself reads sources to show where threads are.
    result.stdout.fnmatch_lines(["*Timeout*", "*- rsplice -*", "payload *", "*splice: 1.06 MiB*"])


def test_servers_in_subprocesses(pytester: pytest.Pytester) -> None:
    """One of a fixture is counted where that is asked for, one of the body always."""
    result = run(
        pytester,
        '''
SERVER = """
import os, sys
from conftest import Relay
relay = Relay(sys.argv[1])
for line in sys.stdin:
    getattr(relay, line.strip())()
    print("done", flush=True)
"""
class Server:
    def __init__(self, data):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=os.path.dirname(__file__), text=True,
        )
    def ask(self, what):
        self.process.stdin.write(what + "\\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\\n"
@pytest.fixture(scope="module")
def server(data):
    server = Server(data)
    server.ask("splice")
    yield server
    server.process.kill()

def test_from_before(server, zero_copy):
    server.ask("copy")
    assert zero_copy.audit.copy_bytes < 100  # what was asked and answered
@pytest.mark.max_copied("1 MiB", scope="all")
def test_from_before_all(server):
    server.ask("copy")
@pytest.mark.max_copied("1 MiB", scope="all")
def test_set_up_too(relay):
    pass
def test_of_the_body(data, zero_copy):
    server = Server(data)
    server.ask("splice")
    server.process.kill()
    audit = zero_copy.audit
    assert sum(path.shared for path in audit.paths if path.destination == "pipe") == ROUNDS * SIZE
def test_by_pid(server, zero_copy_trace, relay):
    with zero_copy_trace(pid=server.process.pid) as trace:
        server.ask("splice")
        relay.copy()
    assert trace.audit.payload_bytes - trace.audit.copy_bytes == 2 * ROUNDS * SIZE
def test_block(zero_copy_trace, relay):
    relay.copy()
    with zero_copy_trace() as trace:
        print("captured")
        import xml.sax
        relay.splice()
    relay.copy()
    assert (trace.audit.copy_bytes, trace.audit.payload_bytes) == (0, 2 * ROUNDS * SIZE)
def test_command(zero_copy_trace):
    with zero_copy_trace(command=["head", "-c", "100003", "/dev/zero"], stdout=-1) as trace:
        assert len(trace.process.communicate()[0]) == 100003
    assert trace.audit.paths["user memory -> pipe via write"].copied == 100003
    assert trace.audit.exit_status == 0
def test_left_running(zero_copy_trace):
    zero_copy_trace(command=["sleep", "1000"]).start()
''',
    )  # fmt: skip
    result.assert_outcomes(passed=6, failed=2)
    result.stdout.fnmatch_lines(["*__ test_from_before_all __*", "max_copied('1 MiB'): 2228*"])
    result.stdout.fnmatch_lines(["*__ test_set_up_too __*", "max_copied('1 MiB'): 2228*"])


def test_defaults_stand_in_the_ini_file(pytester: pytest.Pytester) -> None:
    pytester.makeini(
        "[pytest]\nrsplice_max_copied = 1 MiB\nrsplice_no_findings = violation, stranded\n"
    )
    result = run(
        pytester,
        """
def test_default(relay, zero_copy):
    relay.copy()
@pytest.mark.max_copied("3 MiB")
def test_own(relay):
    relay.copy()
def test_untraced(relay):
    relay.copy()
""",
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*__ test_default __*", "max_copied('1 MiB'): 2228224 bytes copied"]
    )


def test_findings_fail_by_kind_and_name(pytester: pytest.Pytester) -> None:
    """SPLICE_F_MOVE into a file never moves: a missed move."""
    body = """
    out = os.open("out", os.O_WRONLY | os.O_CREAT)
    source = os.open(data, os.O_RDONLY)
    r, w = os.pipe()
    import ctypes
    move = lambda a, b: ctypes.CDLL(None).splice(a, None, b, None, ctypes.c_size_t(SIZE), 1)
    assert move(source, w) == SIZE and move(r, out) == SIZE
"""
    tests = "".join(
        f"@pytest.mark.no_findings({arguments})\ndef test_{i}(data):{body}"
        for i, arguments in enumerate(
            ("", "'violation'", "'violation', 'hazard'", "'missed-move'", "'steal-refused'")
        )
    )
    result = run(pytester, tests)
    result.assert_outcomes(passed=2, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*__ test_0 __*",
            "no_findings(): *steal-refused*",
            "*- rsplice -*",
            "*steal-refused*",
            "    *copy_file_range(2)*",
            "*__ test_3 __*",
            "no_findings('missed-move'): *steal-refused*",
            "*__ test_4 __*",
        ]
    )


def test_what_was_lost_or_is_unknown_fails_a_limit_on_copies(pytester: pytest.Pytester) -> None:
    """Completions that a program asked not to get are lost; of 32-bit callers all is unknown."""
    result = run(
        pytester,
        """
from dataclasses import replace
import rsplice.tracing
@pytest.fixture
def spoilt(monkeypatch, request):
    stop = rsplice.tracing.Trace.stop
    def spoil(trace):
        stop(trace)
        setattr(trace.audit.accuracy, request.param, 7)
    monkeypatch.setattr(rsplice.tracing.Trace, "stop", spoil)
@pytest.mark.parametrize("spoilt", ["events_lost", "unknown_bytes"], indirect=True)
@pytest.mark.max_copied("1 GiB")
def test_spoilt(spoilt):
    pass
""",
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "max_copied('1 GiB'): 7 events lost, so that more may have been copied than was seen",
            "max_copied('1 GiB'): of 7 bytes it is unknown whether they were copied",
        ]
    )


NONSENSE = {
    "max_copied": "max_copied: one argument is needed",
    "max_copied('lots')": "max_copied: a size such as 0, '64 KiB' or '1 MiB' is wanted*",
    "max_copied(0, where='here')": "max_copied: no argument where",
    "max_copied(0, scope='some')": "scope: one of body, all is wanted, not 'some'",
    "max_copies_per_byte('x')": "max_copies_per_byte: a number is wanted, not 'x'",
    "no_findings('bugs')": "no_findings: no finding 'bugs'; there are violation,*",
    "no_findings('leaked')": "no_findings: no trace looks for 'leaked': rsplice audit does",
    "no_findings('violation:cache-differs-from-disk')": "no_findings: no trace looks for *-disk'*",
}


def test_a_marker_that_says_nothing_sensible_fails_its_test(pytester: pytest.Pytester) -> None:
    tests = "".join(
        f"@pytest.mark.{mark}\ndef test_{number}():\n    pass\n"
        for number, mark in enumerate(NONSENSE)
    )
    result = run(pytester, tests)
    result.assert_outcomes(errors=len(NONSENSE))
    result.stdout.fnmatch_lines(list(NONSENSE.values()))


def test_other_outcomes_stay_what_they_are(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
pytestmark = pytest.mark.max_copied(0)
def test_skips(relay):
    relay.copy()
    pytest.skip("for a reason")
@pytest.mark.xfail(strict=True)
def test_expected_to_copy(relay):
    relay.copy()
def test_fails_by_itself(relay):
    relay.copy()
    raise ValueError("of its own")
@pytest.fixture
def broken():
    raise ValueError("set-up")
def test_set_up_fails(broken):
    pass
@pytest.fixture
def marking(request):
    request.node.add_marker(pytest.mark.max_copied(1))
def test_that_a_fixture_marks(relay, marking):
    relay.copy()
def test_after_all(relay):
    relay.splice()
def test_that_asks_late(request, relay):
    request.getfixturevalue("zero_copy")
    relay.splice()
""",
    )
    result.assert_outcomes(passed=2, failed=2, skipped=1, xfailed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["E * ValueError: of its own", "*- rsplice -*", "payload 3.19 MiB*"]
    )
    result.stdout.fnmatch_lines(["max_copied(1): 2228224 bytes copied"])


def test_items_that_are_no_functions_are_traced_as_a_whole(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.max_copied(100))
"""
    )
    pytester.makepyfile(
        '''
def small():
    """
    >>> len(open("/dev/zero", "rb", 0).read(100))
    100
    """
def large():
    """
    >>> len(open("/dev/zero", "rb", 0).read(101))
    101
    """
'''
    )
    result = pytester.runpytest_subprocess(
        "--doctest-modules", "-p", "no:cacheprovider", timeout=100
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["max_copied(100): 101 bytes copied"])


def test_subtests_are_part_of_their_test(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
import unittest
class TestSub(unittest.TestCase):
    @pytest.mark.max_copied(100)
    def test_sub(self):
        for size in (60, 41):
            with self.subTest(size=size):
                assert len(open("/dev/zero", "rb", 0).read(size)) == size
@pytest.mark.max_copied(100)
def test_subtests(subtests):
    for size in (60, 40):
        with subtests.test(size=size):
            assert len(open("/dev/zero", "rb", 0).read(size)) == size
""",
    )
    assert "max_copied(100): 101 bytes copied" in result.stdout.str()
    assert "could not trace" not in result.stdout.str()
    assert result.parseoutcomes()["failed"] == 1


def test_a_test_that_somebody_else_runs_does_not_pass_untraced(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
import pytest
@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    pyfuncitem.module.test_it()
    return True
"""
    )
    pytester.makepyfile(
        """
import pytest
@pytest.mark.max_copied(0)
def test_it():
    open("/etc/hostname").read()
"""
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=100)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["rsplice could not trace this test: another plugin runs*"])


def test_probes_that_fail_fail_the_test_in_one_line(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
import rsplice.engine
@pytest.fixture(params=["start", "stop"])
def broken(monkeypatch, request):
    def fail(self, *arguments):
        raise rsplice.RspliceError(f"{request.param} fails")
    monkeypatch.setattr(rsplice.engine.Engine, request.param, fail)
@pytest.mark.max_copied(0)
def test_it(broken):
    pass
""",
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["start fails", "stop fails"])
    assert "Traceback" not in result.stdout.str()


def test_output_that_is_not_captured_is_not_counted(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
@pytest.mark.max_copied(0)
def test_that_prints():
    print("x" * 5000)
    os.write(2, b"by descriptor")
""",
        "-s",
    )
    result.assert_outcomes(passed=1)
    assert "x" * 5000 in result.stdout.str()


def test_a_real_suite_stays_what_it_is(tmp_path: Path) -> None:
    """The tests of aiofiles, all of them traced: the same outcomes as without the plugin."""
    try:
        source = suite.fetch(tmp_path)
    except OSError as error:
        pytest.skip(str(error))
    (tmp_path / "mark_all.py").write_text(
        "import pytest\n"
        "def pytest_collection_modifyitems(items):\n"
        "    for item in items:\n"
        "        item.add_marker(pytest.mark.max_copied('1 GiB'))\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests"]
    environment = {**os.environ, "PYTHONPATH": f"{source / 'src'}:{tmp_path}"}

    def outcomes(*options: str) -> tuple[str, str]:
        """What happened to each test, and all that was printed."""
        done = subprocess.run(
            [*command, *options],
            cwd=source,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        report = ElementTree.parse(source / "junit.xml")
        found = [
            (
                case.get("classname"),
                case.get("name"),
                [part.tag for part in case if part.tag != "properties"],
            )
            for case in report.iter("testcase")
        ]
        return repr(found), done.stdout

    without, _ = outcomes("-p", "no:rsplice", "--junit-xml=junit.xml")
    traced, shown = outcomes("-p", "mark_all", "--junit-xml=junit.xml", "--rsplice-summary")
    assert without.count("test_sendfile_socket") == 1
    assert traced == without
    assert re.search(r"copied of .*::test_sendfile_socket\n", shown)
