# SPDX-License-Identifier: MIT
"""Traced tests: what the pytest plugin does for tests that ask for it."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NoReturn

import pytest

from rsplice import tracing
from rsplice.audit import Audit, Finding, Path
from rsplice.dashboards import phrases
from rsplice.dashboards.limits_text import failure_lines
from rsplice.engine import Wanted
from rsplice.errors import RspliceError
from rsplice.limits import CACHE_DIFFERS, FINDINGS, Limit, parse_limit, parse_size
from rsplice.pytest_plugin import MARKERS
from rsplice.tracing import Trace

_SCOPES = ("body", "all")
#: Findings of probes, and of a look at the disk, that an audit has and a trace has not.
_NOT_TRACED = ("leaked", CACHE_DIFFERS)
_PREFIX = "rsplice_"  #: of the properties of a report
_SUMMARY_PATHS = 3


@dataclass
class _Test:
    """A traced test, in one of its runs."""

    item: pytest.Item
    limits: list[Limit]
    scope: str
    trace: Trace
    stack: ExitStack = field(default_factory=ExitStack)
    failed: list[Limit] = field(default_factory=list)
    entered: bool = False  #: whether the body has begun
    audit: Audit | None = None  #: when the body has ended

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Traces meanwhile, or goes on doing so where the scope began earlier."""
        __tracebackhide__ = True
        self.entered = True
        self.begin()
        try:
            yield
        finally:
            with _probes_may_fail():
                self.stack.close()
                self.audit = self.trace.audit
            _record(self.item, self.audit)

    def begin(self) -> None:
        if not self.trace.running:
            with _probes_may_fail():
                self.stack.enter_context(_leaving_out(self.trace, self.item.config))

    def check(self) -> None:
        """Fails the test if it is beyond a limit."""
        audit = self.trace.audit
        self.failed = [limit for limit in self.limits if limit.holds(audit)]
        if self.failed:
            sentences = [str(limit.holds(audit)) for limit in self.failed]
            pytest.fail("\n".join(sentences), pytrace=False)


@contextmanager
def _probes_may_fail() -> Iterator[None]:
    """Fails the test with one line if the probes do."""
    try:
        yield
    except RspliceError as error:
        pytest.fail(str(error), pytrace=False)


_TEST = pytest.StashKey[_Test]()
_REPORTS = "rsplice-reports"


def prepare(item: pytest.Item) -> None:
    """Before the set-up of a traced test: skips it where nothing can be traced."""
    __tracebackhide__ = True
    if _TEST in item.stash:
        del item.stash[_TEST]  # of an earlier run
    limits, scope = _asked_for(item)
    _check_probes(item.config)
    trace = Trace(Wanted(pids=(os.getpid(),), below=scope == "all", aside=True))
    test = item.stash[_TEST] = _Test(item, limits, scope, trace)
    if scope == "all":
        test.begin()


def wrap(item: pytest.Item) -> None:
    """Has the trace run while the test function does, and its limits checked after."""
    __tracebackhide__ = True
    if _TEST not in item.stash:
        prepare(item)
    test = item.stash[_TEST]
    test.limits, _ = _asked_for(item)
    # Of what is no function (a doctest, a file of some plugin's) all that it runs is the body.
    name = "obj" if isinstance(item, pytest.Function) else "runtest"
    function = getattr(item, name)

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def traced(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            with test.tracing():
                result = await function(*args, **kwargs)
            test.check()
            return result
    else:

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            with test.tracing():
                result = function(*args, **kwargs)
            test.check()
            return result

    setattr(item, name, traced)
    test.stack.callback(setattr, item, name, function)
    # Before 8.2 pytest has it under another name.
    instance = getattr(item, "_testcase", None) or getattr(item, "instance", None)
    if inspect.iscoroutinefunction(function) and hasattr(instance, "_callTestMethod"):
        # unittest looks its asynchronous methods up by name.
        setattr(instance, item.name, traced)


def trace_of(request: pytest.FixtureRequest) -> Trace:
    """The trace of the test that asks for the fixture zero_copy."""
    test: _Test | None = request.node.stash.get(_TEST, None)
    if test is None:
        raise pytest.UsageError("zero_copy is for test functions that name it as an argument")
    return test.trace


def factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., Trace]]:
    """The fixture zero_copy_trace."""
    _check_probes(request.config)
    made: list[Trace] = []

    def make(**what: Any) -> Trace:
        trace = tracing.trace(**what)
        trace.leave_out = functools.partial(_files_of, request.config)
        made.append(trace)
        return trace

    yield make
    for trace in made:
        trace.stop()


def _check_probes(config: pytest.Config) -> None:
    """Skips, or fails, where nothing can be traced. The probes stay attached until the end."""
    __tracebackhide__ = True
    try:
        tracing.probes()
    except RspliceError as error:
        if config.getoption("rsplice_strict"):
            pytest.fail(f"--rsplice-strict: {error}", pytrace=False)
        raise pytest.skip.Exception(str(error), _use_item_location=True) from None
    if not config.pluginmanager.has_plugin(_REPORTS):
        config.pluginmanager.register(_Reports(), _REPORTS)
        tracing.hold(1)
        config.add_cleanup(tracing.close)


@contextmanager
def _leaving_out(trace: Trace, config: pytest.Config) -> Iterator[None]:
    """Runs *trace* without what pytest itself does in this process."""
    trace.leave_out = functools.partial(_files_of, config)
    with trace:
        yield


# --- what a test asks for -------------------------------------------------------------------------


def _asked_for(item: pytest.Item) -> tuple[list[Limit], str]:
    """The limits and the scope of a test: of its markers, nearest first, else of the ini file."""
    __tracebackhide__ = True
    limits: list[Limit] = []
    scope = item.config.getini("rsplice_scope") or "body"
    for name in MARKERS:
        marker = item.get_closest_marker(name)
        arguments: tuple[Any, ...] = ()
        if marker:
            arguments, keywords = marker.args, dict(marker.kwargs)
            scope = keywords.pop("scope", scope)
            if keywords:
                _wrong(name, f"no argument {', '.join(keywords)}")
            if not arguments and name != "no_findings":
                _wrong(name, "one argument is needed")
        elif default := item.config.getini(_PREFIX + name):
            arguments = (
                tuple(default.replace(",", " ").split()) if name == "no_findings" else (default,)
            )
        else:
            continue
        limits += _limits_of(name, arguments)
    if scope not in _SCOPES:
        _wrong("scope", f"one of {', '.join(_SCOPES)} is wanted, not {scope!r}")
    return limits, scope


def _limits_of(name: str, arguments: tuple[Any, ...]) -> list[Limit]:
    __tracebackhide__ = True
    written = f"{name}({', '.join(map(repr, arguments))})"
    if name == "no_findings":
        return [_NoFindings(written, _finding_names(name, arguments))]
    if len(arguments) != 1:
        _wrong(name, "one argument is wanted")
    if name == "max_copies_per_byte":
        try:
            bound = Fraction(str(arguments[0]))
        except ValueError:
            _wrong(name, f"a number is wanted, not {arguments[0]!r}")
        return [
            _Renamed(written, parse_limit(f"copies_per_byte>{float(bound)}")),
            _Certain(written),
        ]
    size = parse_size(str(arguments[0]))
    if size is None:
        _wrong(name, f"a size such as 0, '64 KiB' or '1 MiB' is wanted, not {arguments[0]!r}")
    if name == "min_avoided":
        return [_MinAvoided(written, size)]
    return [_Renamed(written, parse_limit(f"copied>{arguments[0]}")), _Certain(written)]


def _finding_names(marker: str, wanted: Iterable[Any]) -> frozenset[tuple[str, str]]:
    """The findings, kind and name, that kinds and names stand for; all by default."""
    known = frozenset((kind, name) for kind, names in FINDINGS.items() for name in names)
    chosen: set[tuple[str, str]] = set()
    asked = [str(each).replace("missed move", "missed-move") for each in wanted]
    for each in asked:
        found = {(kind, name) for kind, name in known if each in (kind, name, f"{kind}:{name}")}
        if each.rpartition(":")[2] in _NOT_TRACED:
            _wrong(marker, f"no trace looks for {each!r}: rsplice audit does")
        if not found:
            names = ", ".join((*FINDINGS, *sorted(name for _, name in known)))
            _wrong(marker, f"no finding {each!r}; there are {names}")
        chosen |= found
    return frozenset(chosen) if asked else known


def _wrong(what: str, why: str) -> NoReturn:
    __tracebackhide__ = True
    pytest.fail(f"{what}: {why}", pytrace=False)


@dataclass(frozen=True)
class _Renamed(Limit):
    """A limit under the name that the test gave it."""

    text: str
    limit: Limit

    def holds(self, audit: Audit) -> str | None:
        sentence = self.limit.holds(audit)
        return sentence and f"{self.text}: {sentence.partition(': ')[2]}"

    def paths(self, audit: Audit) -> list[Path]:
        return self.limit.paths(audit)

    def findings(self, audit: Audit) -> list[Finding]:
        return self.limit.findings(audit)


@dataclass(frozen=True)
class _Certain(Limit):
    """What was not seen may have been copied: a limit on copies does not pass then."""

    text: str

    def holds(self, audit: Audit) -> str | None:
        known = audit.accuracy
        if known.events_lost:
            lost = phrases.plural(known.events_lost, "event")
            return f"{self.text}: {lost} lost, so that more may have been copied than was seen"
        if known.unknown_bytes:
            unknown = phrases.plural(known.unknown_bytes, "byte")
            return f"{self.text}: of {unknown} it is unknown whether they were copied"
        return None

    def paths(self, audit: Audit) -> list[Path]:
        return [path for path in audit.paths if path.unknown]


@dataclass(frozen=True)
class _MinAvoided(Limit):
    text: str
    bound: Fraction

    def holds(self, audit: Audit) -> str | None:
        if audit.avoided_bytes >= self.bound:
            return None
        avoided = phrases.plural(audit.avoided_bytes, "byte")
        return f"{self.text}: {avoided} avoided"

    def paths(self, audit: Audit) -> list[Path]:
        return [path for path in audit.paths if path.copy_bytes]

    def findings(self, audit: Audit) -> list[Finding]:
        return [found for found in audit.findings if found.kind == "missed move"]


@dataclass(frozen=True)
class _NoFindings(Limit):
    text: str
    names: frozenset[tuple[str, str]]

    def holds(self, audit: Audit) -> str | None:
        found = self.findings(audit)
        return f"{self.text}: {'; '.join(map(phrases.finding, found))}" if found else None

    def findings(self, audit: Audit) -> list[Finding]:
        return [
            found
            for found in audit.findings
            if (found.kind.replace(" ", "-"), found.name) in self.names
        ]


# --- what pytest itself does ----------------------------------------------------------------------


def _files_of(config: pytest.Config) -> list[int]:
    """Descriptors that pytest writes to while a test runs, and what its output goes to."""
    files: list[Any] = [1, 2, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]
    manager: Any = config.pluginmanager.getplugin("capturemanager")
    captures = [getattr(manager, "_global_capturing", None)]
    captures.append(getattr(getattr(manager, "_capture_fixture", None), "_capture", None))
    for capture in captures:
        for name in ("in_", "out", "err"):
            stream = getattr(capture, name, None)
            files += [getattr(stream, "tmpfile", None), getattr(stream, "targetfd_save", None)]
    terminal: Any = config.pluginmanager.getplugin("terminalreporter")  # none with -p no:terminal
    files.append(getattr(getattr(terminal, "_tw", None), "_file", None))
    log: Any = config.pluginmanager.getplugin("logging-plugin")
    files.append(getattr(getattr(log, "log_file_handler", None), "stream", None))
    for plugin in config.pluginmanager.get_plugins():
        # A worker of pytest-xdist talks to its master through execnet, by a pair of pipes.
        gateway = getattr(getattr(plugin, "channel", None), "gateway", None)
        io = getattr(gateway, "_io", None)
        files += [getattr(io, "infile", None), getattr(io, "outfile", None)]
    return sorted({number for number in map(_descriptor, files) if number is not None})


def _descriptor(file: Any) -> int | None:
    """The descriptor of what may be a file, None if there is none that is open."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        number = file if isinstance(file, int) else file.fileno()
        os.fstat(number)
        return int(number)
    return None


# --- reports --------------------------------------------------------------------------------------


def _record(item: pytest.Item, audit: Audit) -> None:
    """Notes the numbers of a test where reports take them from; those of a run before go."""
    totals = audit.totals
    properties = {
        "payload_bytes": totals.payload_bytes,
        "copy_bytes": totals.copy_bytes,
        "avoided_bytes": totals.avoided_bytes,
        "copies_per_byte": round(totals.copies_per_byte, 3),
        "unknown_bytes": audit.accuracy.unknown_bytes,
        "events_lost": audit.accuracy.events_lost,
        "findings": "; ".join(map(phrases.finding, audit.findings)),
        "paths": "; ".join(_short(path) for path in audit.paths),
    }
    kept = [each for each in item.user_properties if not each[0].startswith(_PREFIX)]
    item.user_properties[:] = kept + [(_PREFIX + name, n) for name, n in properties.items()]


def _short(path: Path) -> str:
    return (
        f"{path.name}: {phrases.size(path.payload_bytes)}, copied {phrases.size(path.copy_bytes)}"
    )


class _Reports:
    """Adds what was traced to the reports of tests that failed. Registered with the first trace."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        # Of a test whose body did not run: its set-up failed.
        if test := item.stash.get(_TEST, None):
            test.stack.close()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        outcome = yield
        test = item.stash.get(_TEST, None)
        if test is None or call.when != "call":
            return
        report = outcome.get_result()
        if report.passed and not test.entered:
            report.outcome = "failed"
            report.longrepr = "rsplice could not trace this test: another plugin runs its function"
        if not report.failed or test.audit is None:
            return
        lines: list[str] = []
        for limit in test.failed:
            lines += [*failure_lines(test.audit, limit), ""]
        if not lines:
            lines = _overview(test.audit)
        if hasattr(report.longrepr, "addsection"):
            report.longrepr.addsection("rsplice", "\n".join(lines).rstrip())
        else:
            report.sections.append(("rsplice", "\n".join(lines).rstrip()))


def _overview(audit: Audit) -> list[str]:
    """Of a test that failed by itself."""
    lines = [phrases.totals(audit.totals, audit.accuracy.events_lost)]
    for path in audit.paths:
        lines += [_short(path), f"    {path.why}"]
    lines += map(phrases.finding, audit.findings)
    return [*lines, phrases.accuracy(audit.accuracy)]


class Summary:
    """--rsplice-summary: the traced tests by the bytes that they copied."""

    def __init__(self) -> None:
        self._tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = {
            name[len(_PREFIX) :]: value
            for name, value in report.user_properties
            if name.startswith(_PREFIX)
        }
        if report.when == "call" and found:
            self._tests[report.nodeid] = found

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.ensure_newline()
        terminalreporter.section("rsplice: bytes copied by traced tests")
        if not self._tests:
            terminalreporter.write_line("no test was traced")
        for nodeid, test in sorted(
            self._tests.items(), key=lambda each: (-each[1]["copy_bytes"], each[0])
        ):
            terminalreporter.write_line(
                f"{phrases.size(test['copy_bytes']):>9} copied of "
                f"{phrases.size(test['payload_bytes']):>9}  {nodeid}"
            )
            paths = test["paths"].split("; ") if test["paths"] else []
            for path in paths[:_SUMMARY_PATHS]:
                terminalreporter.write_line(f"{'':22}{path}")
            if len(paths) > _SUMMARY_PATHS:
                terminalreporter.write_line(f"{'':22}and {len(paths) - _SUMMARY_PATHS} more paths")
