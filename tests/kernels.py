# SPDX-License-Identifier: MIT
"""make test-kernels: tests of the running kernel, run on other kernels, one boot for each.

``python -m tests.kernels [--write] [SERIES...]`` runs them in guests of ``rsplice kernel``, prints
a table and exits with 1 if anything was not as expected. With ``--write`` the table goes to
docs/kernels.md. What a kernel cannot show is in NOT_SEEN, with the reason: such a test has to
fail there, or the entry is wrong. A guest that ends in a test fails that test, and another one
runs the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from rsplice.errors import RspliceError
from rsplice.kernel import cache, module

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "kernels"
DOCS = ROOT / "docs" / "kernels.md"

#: Debian's oldest that is supported in full, its stable one, and the newest that it has.
SERIES = ("6.1", "6.12", "7.3")
AT_ONCE = 3  #: guests; each leaves a fifth of a CPU idle, and the last one would run alone
#: From 7.0 on, where more threads run than CPUs, the kernel passes over some (docs/kernels.md).
CROWDED, CPUS = (7, 0), 8
BOOTS = 3  #: of one kernel: a guest that has ended is followed by another one
SECONDS = 3600  #: for the tests of one guest
_TEST_SECONDS = 400

#: What is run, of each file what needs BPF: pytest's arguments.
TESTS = (
    "tests/real/test_driver.py",
    "tests/real/test_measured.py",
    "tests/real/test_findings.py",
    "tests/real/test_moments.py",
    "tests/real/test_journey.py",
    "tests/real/test_journey_findings.py",
    "tests/real/test_descendants.py",
    "tests/real/test_library_findings.py",
    "tests/real/test_fuse.py",
    "tests/real/test_fuse_workload.py",
    "tests/real/test_recvpage.py",
    "tests/real/test_page_identity.py",
    "tests/test_tracer.py",
    "tests/test_tracing.py",
    "tests/test_usdt.py",
    "tests/real/test_processes.py",
    "tests/real/test_workloads.py",
    "tests/real/test_lost_events.py",
    "tests/test_maps.py",
    "tests/test_missed.py",
    # How a refused program is told, and a file that is gone, is no matter of the kernel.
    "tests/test_refused.py::test_nothing_is_said_to_be_refused_where_nothing_was",
    "tests/real/test_audit_verify.py::test_a_block_that_was_changed_below_a_file_that_is_spliced",
    "tests/real/test_audit_verify.py::test_files_with_nothing_changed_below_them",
    "tests/real/test_audit_verify.py::test_each_way_to_lend_a_page_counts",
    "tests/real/test_audit_verify.py::test_only_files_that_were_lent_are_compared",
    "tests/real/test_audit_verify.py::test_a_file_is_found_by_its_inode",
)
#: The same again with slower memory reads, which every kernel has: once is enough. Of marks, what
#: the kernel has no part in: where programs are found, their compiler's flags, garbage in them.
_LEFT_OUT = re.compile(
    r"probe reads|bpf_probe_read_kernel|slower_reads_do_as_well"
    r"|test_usdt.py::.*(\[-O[013].*\]|-static|doctor|garbage|without|librar.*_is_found|has_mapped"
    r"|make_room)"
)


@dataclass(frozen=True)
class NotSeen:
    """Tests that must not pass on some kernels.

    :param tests: a pattern of their names
    :param before: kernels older than this (major, minor), None for all
    :param reason: what that kernel lacks, for users
    :param since: this kernel, and newer ones
    :param race: who wins decides: it may pass, too
    """

    tests: str
    before: tuple[int, int] | None
    reason: str
    since: tuple[int, int] = (0, 0)
    race: bool = False

    def holds(self, version: tuple[int, ...]) -> bool:
        """Whether it is about that kernel."""
        return version >= self.since and (self.before is None or version < self.before)


_NOT_ASKED_FOR = (
    "before 6.11 the kernel has no FUSE tracepoints, and of FUSE replies only pages that it asks "
    "the pipe for tell why they stayed: not parts of pages, nor those of sockets, notifications "
    "and FOPEN_DIRECT_IO"
)
NOT_SEEN: tuple[NotSeen, ...] = (
    NotSeen(
        r"test_(driver|measured)\.py::.*io_uring-|test_driver.py::test_the_shell"
        r"|test_findings.py::test_(requests_of_a_ring|pages_that_a_ring)",
        (5, 19),
        "before 5.19 the kernel does not tell which requests of an io_uring have ended: "
        "they are counted as lost events",
    ),
    NotSeen(
        r"test_findings.py::test_pages_that_are_teed_and_sent",
        (5, 12),
        "before 5.12 sendfile to a pipe copies, and no page of the file is there to change",
    ),
    NotSeen(
        r"test_workloads.py::",
        (5, 19),
        "before 5.19 one that uses an io_uring has lost events, and all are in one audit",
    ),
    NotSeen(
        r"test_missed.py::test_each_event_within",
        (5, 12),
        "before 5.12 the kernel lets a program run within itself, for ever if need be",
    ),
    NotSeen(
        r"test_library_findings.py::|test_usdt.py::(?!test_nothing_stays)"
        r"|test_journey.py::test_a_page_that_a_fuse_reply_moves",
        (5, 15),
        "before 5.15 the probes of librsplice cannot be attached, and what it meant is not told",
    ),
    NotSeen(
        r"test_usdt.py::.*\[one link for all\]",
        (6, 6),
        "before 6.6 each place of a librsplice probe is attached by itself",
    ),
    NotSeen(
        r"test_usdt.py::test_two_capabilities_are_enough",
        (6, 6),
        "before 6.6 the probes of librsplice take perf_event_open(2), which Debian's kernels "
        "refuse without CAP_SYS_ADMIN",
    ),
    NotSeen(r"\[splice-f/dev/zero-", (6, 5), "/dev/zero can be spliced from since 6.5"),
    NotSeen(r"\[io_uring-read_multishot-", (6, 7), "io_uring has read_multishot since 6.7"),
    NotSeen(
        r"::test_each_page_that_was_refused.*-(direct-io|halves|odd|socket|together|notify)\]"
        r"|::test_a_last_page_that_is_no_whole_one"
        # Pages of halves are among those that they follow.
        r"|test_journey_findings.py::.*(\[halves\]|report_tells_each|a_recording_has)",
        (6, 11),
        _NOT_ASKED_FOR,
    ),
    NotSeen(
        r"test_page_identity.py::",
        (6, 11),
        "before 6.11 the kernel has no FUSE tracepoints, by which the test finds a reply's pages",
    ),
    NotSeen(r"descendants.*\[ublk-buffer\]", (6, 4), "ublk takes encoded commands since 6.4"),
    NotSeen(r"descendants.*\[ublk-copy\]", (6, 5), "ublk has UBLK_F_USER_COPY since 6.5"),
    NotSeen(
        r"descendants.*passthrough_file"
        r"|test_fuse_workload.py::.*(\[passthrough\]|passthrough_leaves|in_every_mode)",
        (6, 9),
        "FUSE has passthrough since 6.9",
    ),
    NotSeen(
        r"test_fuse_workload.py::test_(rsplice_moves|what_reading_ahead)",
        (6, 5),
        "before 6.5 the end of a read with O_DIRECT may refer to its pages for a moment longer, "
        "and a reply that comes at once has them copied",
        race=True,
    ),
    NotSeen(r"descendants.*\[(ring|direct|write)-copy", (6, 14), "FUSE over io_uring is of 6.14"),
    NotSeen(r"descendants.*\[ublk-(cached|zero)\]", (6, 16), "ublk has AUTO_BUF_REG since 6.16"),
    NotSeen(
        r"descendants.*\[(ring|direct|write|early)-(?!copy)", (7, 3), "zero copy of FUSE is of 7.3"
    ),
)

#: Skips that say what a kernel does, not what it lacks; and that Debian has its headers no more.
_MAY_BE_SKIPPED = re.compile(
    "this kernel's ext4 keeps single pages|the module rsplice_copies was not built"
)


@dataclass
class Outcome:
    """What became of the tests on one kernel."""

    series: str
    release: str = ""
    collected: list[str] = field(default_factory=list)
    results: dict[str, tuple[str, str]] = field(default_factory=dict)  #: test -> (outcome, why)
    running: str | None = None  #: a test that has begun and not ended
    status: int = 0
    last_words: str = ""  #: the last line of what the guest, or rsplice, printed
    seconds: float = 0.0

    @property
    def left(self) -> list[str]:
        """The tests without a result."""
        return [test for test in self.collected if test not in self.results]

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.series.split("."))

    def expected(self, test: str) -> NotSeen | None:
        """The entry of NOT_SEEN for a test on this kernel; none for a race that was won."""
        found = (n for n in NOT_SEEN if n.holds(self.version) and re.search(n.tests, test))
        entry = next(found, None)
        won = entry and entry.race and self.results.get(test, ("missing", ""))[0] == "passed"
        return None if won else entry

    def problems(self) -> list[str]:
        """What was not as expected, a line each."""
        if not self.results:
            said = f"(exit status {self.status}): {self.last_words}"
            return [f"{self.series}: no test was run {said}"]
        found = []
        for test in self.collected:
            outcome, why = self.results.get(test, ("missing", "the guest ended before it"))
            entry = self.expected(test)
            if outcome == "passed" and entry:
                found.append(f"{self.series}: {test}: passed, but should not: {entry.reason}")
            elif outcome == "skipped" and _MAY_BE_SKIPPED.search(why):
                continue
            elif outcome != "passed" and not entry:
                found.append(f"{self.series}: {test}: {outcome}: {why}")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs tests on other kernels.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    parser.add_argument("--only", metavar="TEST", action="append", help="pytest's argument instead")
    parser.add_argument("--stored", action="store_true", help="what the last runs found")
    parser.add_argument("series", nargs="*", default=SERIES)
    args = parser.parse_args()
    tests = _prepare(tuple(args.only or TESTS))
    if args.stored:
        outcomes = [_stored(series, tests) for series in args.series]
    else:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            # The newest has most CPUs to emulate: it takes longest, and begins first.
            runs = {series: pool.submit(_run, series, tests) for series in reversed(args.series)}
        outcomes = [runs[series].result() for series in args.series]
        for outcome in outcomes:
            _store(outcome, add=bool(args.only))
    table = table_of(outcomes)
    print(table)
    if args.write:
        _write(table)
    problems = [problem for outcome in outcomes for problem in outcome.problems()]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _store(outcome: Outcome, add: bool) -> None:
    """Keeps the results for --stored.

    :param add: to those of earlier runs
    """
    file = BUILD / f"{outcome.series}.json"
    if add and file.exists():
        before = _stored(outcome.series, [])
        outcome = replace(
            outcome,
            results=before.results | outcome.results,
            seconds=before.seconds + outcome.seconds,
        )
    file.write_text(json.dumps(asdict(outcome)))


def _stored(series: str, tests: list[str]) -> Outcome:
    """What the last runs of *tests* on a kernel have found."""
    outcome = Outcome(**json.loads((BUILD / f"{series}.json").read_text()))
    outcome.results = {test: (what, why) for test, (what, why) in outcome.results.items()}
    return replace(outcome, collected=tests)


def _prepare(arguments: tuple[str, ...]) -> list[str]:
    """The names of the tests. What takes long under emulation is done here: all compiling."""
    drivers = BUILD / "drivers"
    drivers.mkdir(parents=True, exist_ok=True)
    make = ("make", "-s", "-C", ROOT / "tests/drivers", f"BUILD={drivers}", "all", "compat32")
    subprocess.run(make, check=True)
    # Whatever comes of it: its modules are compiled.
    audit = (sys.executable, "-m", "rsplice", "audit", "-q", "--", "true")
    subprocess.run(audit, cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", *_OPTIONS, *arguments],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]
    return [name for name in names if not _LEFT_OUT.search(name)]


_OPTIONS = ("-p", "no:cacheprovider", "-m", "privileged")


def _module(series: str) -> dict[str, str]:
    """Where the module for this kernel is, for the tests; nothing if its headers cannot be had."""
    try:
        release = cache.find_or_fetch(series, lambda what: None).release
        return {"RSPLICE_TEST_MODULE": str(module.build(release))}
    except RspliceError as error:
        print(f"{series}: without the module: {error}", flush=True)
        return {}


def _environment() -> dict[str, str]:
    environment = os.environ | {
        "PYTHONPYCACHEPREFIX": str(BUILD / "pycache"),
        "RSPLICE_TEST_DRIVERS": str(BUILD / "drivers"),
        "RSPLICE_TEST_PATIENCE": "10",
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _run(series: str, tests: list[str]) -> Outcome:
    """The tests on one kernel. What pytest prints goes to build/kernels/SERIES.log."""
    outcome = Outcome(series, collected=tests)
    environment = _environment() | _module(series)
    begun = time.monotonic()
    with open(f"{BUILD / series}.log", "wb") as log:
        for number in range(BOOTS):
            console = BUILD / f"{series}.{number}.console"
            _boot(outcome, log, begun, environment, console)
            if outcome.running:
                why = f"the guest ended in it: {outcome.last_words}"
                outcome.results[outcome.running] = ("failed", why)
                outcome.running = None
            if not outcome.left:
                break
    outcome.seconds = time.monotonic() - begun
    _say(outcome, begun)
    return outcome


def _boot(
    outcome: Outcome, log: IO[bytes], begun: float, environment: dict[str, str], console: Path
) -> None:
    """One guest, for the tests that are left."""
    series = outcome.series
    names = BUILD / f"{series}.tests"
    names.write_text("\n".join(outcome.left))
    script = (
        'exec 3>&1 1>&2; echo "$(uname -r)" >&3; modprobe -a loop btrfs xfs fuse ublk_drv; '
        'RSPLICE_TEST_RESULTS=/dev/fd/3 exec "$@"'
    )
    pytest = [sys.executable, "-m", "pytest", "-p", "tests.support.results", *_OPTIONS]
    pytest += ["-v", "--tb=short", "--durations=23", f"--timeout={_TEST_SECONDS}", f"@{names}"]
    guest = [sys.executable, "-m", "rsplice", "kernel", "run", f"--timeout={SECONDS}"]
    guest += ["--memory=4096", f"--console={console}"]
    guest += [f"--cpus={CPUS}"] if outcome.version >= CROWDED else []
    guest += [series, "--"]
    with subprocess.Popen(
        [*guest, "sh", "-c", script, "sh", *pytest],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            _take(line, outcome)
            if len(outcome.results) % 50 == 1 and not outcome.running:
                _say(outcome, begun)
    outcome.status = run.returncode
    lines = Path(log.name).read_text(errors="replace").strip().splitlines()
    outcome.last_words = lines[-1] if lines else "nothing was printed"


def _take(line: str, outcome: Outcome) -> None:
    """A line of tests/support/results.py, or the first of all, which uname(1) has printed."""
    if not line.startswith("{"):
        outcome.release = line.strip()
        return
    entry = json.loads(line)
    if "outcome" in entry:
        outcome.results[entry["test"]] = (entry["outcome"], entry["why"])
        outcome.running = None
    else:
        outcome.running = entry["test"]


_saying = threading.Lock()


def _say(outcome: Outcome, begun: float) -> None:
    with _saying:
        done, all_ = len(outcome.results), len(outcome.collected)
        print(
            f"{outcome.series}: {done} of {all_} tests, {time.monotonic() - begun:.0f} s",
            flush=True,
        )


# --- the table ------------------------------------------------------------------------------------


def table_of(outcomes: list[Outcome]) -> str:
    """Tests by kernel: how many cases passed, and what was not seen, and why.

    A file's row has the sum of its test functions, which follow.
    """
    tests = list(dict.fromkeys(test for o in outcomes for test in o.collected))
    reasons = list(dict.fromkeys(n.reason for o in outcomes for t in tests if (n := o.expected(t))))
    rows: dict[str, list[str]] = {}  # what a row begins with -> its tests
    for test in tests:
        file, _, name = test.partition("[")[0].partition("::")
        rows.setdefault(file, []).append(test)
        rows.setdefault(f"{file}::{name}", []).append(test)
    lines = [
        f"| test | {' | '.join(f'{o.series} ({o.release})' for o in outcomes)} |",
        f"| --- |{' --- |' * len(outcomes)}",
    ]
    for row, members in rows.items():
        cells = [_cell(outcome, members, reasons) for outcome in outcomes]
        lines.append(f"| {_title(row)} | {' | '.join(cells)} |")
    lines.append(f"| minutes | {' | '.join(f'{o.seconds / 60:.0f}' for o in outcomes)} |")
    lines.append("")
    lines += [f"{number}. Not seen: {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines).rstrip() + "\n"


def _title(row: str) -> str:
    """ "**driver**" for tests/real/test_driver.py, "disposition" for its ::test_disposition."""
    file, _, function = row.partition("::")
    name = (function or Path(file).stem).removeprefix("test_").replace("_", " ")
    return name if function else f"**{name}**"


def _cell(outcome: Outcome, tests: list[str], reasons: list[str]) -> str:
    counts: Counter[str] = Counter()
    for test in tests:
        entry = outcome.expected(test)
        result, why = outcome.results.get(test, ("missing", ""))
        if entry:
            counts[f"not seen [{reasons.index(entry.reason) + 1}]"] += 1
        elif result == "skipped" and _MAY_BE_SKIPPED.search(why):
            counts["does not apply"] += 1
        else:
            counts["passed" if result == "passed" else "**failed**"] += 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _write(table: str) -> None:
    before, _, rest = DOCS.read_text().partition("<!-- results -->\n")
    after = rest.partition("<!-- /results -->")[2]
    DOCS.write_text(f"{before}<!-- results -->\n\n{table}\n<!-- /results -->{after}")


if __name__ == "__main__":
    sys.exit(main())
