# SPDX-License-Identifier: MIT
"""The pytest plugin: limits on what tests copy (docs/pytest.md).

Loaded in every run of pytest where rsplice is installed, so it imports nothing: what traced tests
need is in rsplice.testing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rsplice.tracing import Trace

#: The markers, and what their arguments are.
MARKERS = {
    "max_copied": "(size): fails if the test copies more, e.g. '0 B', '64 KiB'",
    "max_copies_per_byte": "(ratio): fails if it copies a byte that it carries more often",
    "min_avoided": "(size): fails if it saves fewer copies over read and write, in bytes",
    "no_findings": "(*kinds_or_names): fails if there is one, of any kind by default",
}
_INI = {
    "rsplice_max_copied": "max_copied of traced tests that do not say",
    "rsplice_max_copies_per_byte": "max_copies_per_byte of traced tests that do not say",
    "rsplice_min_avoided": "min_avoided of traced tests that do not say",
    "rsplice_no_findings": "no_findings of traced tests that do not say: kinds and names",
    "rsplice_scope": "scope of traced tests that do not say: body or all",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rsplice", "what tests copy (rsplice)")
    group.addoption(
        "--rsplice-summary",
        action="store_true",
        help="list the traced tests by the bytes that they copied, with their paths",
    )
    group.addoption(
        "--rsplice-strict",
        action="store_true",
        help="traced tests fail, instead of being skipped, where nothing can be traced",
    )
    for name, text in _INI.items():
        parser.addini(name, text, default="")


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}{text}; scope='all' counts fixtures, too")
    if config.getoption("rsplice_summary"):
        from rsplice.testing import Summary

        config.pluginmanager.register(Summary(), "rsplice-summary")


def _is_traced(item: pytest.Item) -> bool:
    return "zero_copy" in getattr(item, "fixturenames", ()) or any(
        marker.name in MARKERS for marker in item.iter_markers()
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if _is_traced(item):
        from rsplice.testing import prepare

        prepare(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    # Asked again: a fixture may have added a marker.
    if _is_traced(item):
        from rsplice.testing import wrap

        wrap(item)


@pytest.fixture
def zero_copy(request: pytest.FixtureRequest) -> Trace:
    """The trace of this test: counts what the body does, its threads and children included."""
    from rsplice.testing import trace_of

    return trace_of(request)


@pytest.fixture
def zero_copy_trace(request: pytest.FixtureRequest) -> Iterator[Callable[..., Trace]]:
    """Makes traces of parts of a test: a block, a pid, a command, a cgroup, as rsplice.trace()."""
    from rsplice.testing import factory

    yield from factory(request)


def pytest_report_header(config: pytest.Config) -> Any:
    return "rsplice: strict" if config.getoption("rsplice_strict") else None
