# SPDX-License-Identifier: MIT
"""librsplice when the kernel refuses: faults at every call it makes, sanitizers, the fuzzer."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.c_tests import (
    C_TESTS,
    Programs,
    programs,
    reserved_huge_pages,
    skip_without,
)

#: What the library calls and no fault is put into: these cannot fail, or make no system call.
CANNOT_FAIL = re.compile(
    "pthread_.*|__errno_location|free|munmap|mem(set|cpy)|snprintf|__stack_chk_fail|__register_atfork"
    "|io_uring_(queue_exit|get_sqe|.*peek.*|.*wait_cqe.*)|__io_uring_get_cqe|ffs|_GLOBAL_OFFSET_TABLE_"
    "|__snprintf_chk"
)


@pytest.fixture(scope="module")
def c_tests(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return programs(tmp_path_factory)


@pytest.fixture(scope="module")
def huge_pages() -> Iterator[None]:
    with reserved_huge_pages():
        yield


@pytest.fixture(scope="module")
def sanitized_tests(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    skip_without("make", "cc")
    build = tmp_path_factory.mktemp("sanitized")
    (build / "empty.c").write_text("int main(void) { return 0; }\n")
    probe: list[str | Path] = ["cc", "-fsanitize=address,undefined", "-o", build / "empty"]
    if subprocess.run([*probe, build / "empty.c"], capture_output=True).returncode:
        pytest.skip("not installed: the compiler's sanitizers (libasan, libubsan)")
    return Programs(
        build,
        "address,undefined",
        {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    )


def test_faults_at_every_position(c_tests: Programs, tmp_path: Path) -> None:
    faults = int(c_tests.run("faults", tmp_path).split()[0])
    # Fewer, and faults are not where they are thought to be.
    assert faults > 5000


def test_batch(c_tests: Programs, tmp_path: Path) -> None:
    assert int(c_tests.run("batch", tmp_path, "5").split()[0]) > 200


def test_files_cut_and_grown_at_every_position(c_tests: Programs, tmp_path: Path) -> None:
    assert int(c_tests.run("cut", tmp_path).split()[0]) > 500


def test_every_call_can_be_made_to_fail(c_tests: Programs) -> None:
    c_tests.program("faults")
    wrapped = re.search(r"^WRAPPED := ((?:.*\\\n)*.*)$", (C_TESTS / "Makefile").read_text(), re.M)
    assert wrapped
    names = set(wrapped[1].replace("\\\n", " ").split())
    objects = sorted(c_tests.build.glob("lib-*.o"))
    listed = subprocess.run(
        ["nm", "-A", *objects], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split() for line in listed.splitlines()]
    defined = {words[-1] for words in symbols if words[-2] not in "U"}
    called = {words[-1] for words in symbols if words[-2] == "U"} - defined
    assert names <= called, "faults in what is not called"
    assert [name for name in sorted(called - names) if not CANNOT_FAIL.fullmatch(name)] == []


def test_nothing_is_left_after_10000_rounds(c_tests: Programs, tmp_path: Path) -> None:
    assert "10000 rounds" in c_tests.run("soak", tmp_path)


@pytest.mark.parametrize(
    "name", ["errors", "carry", "threads", "inherit", "poison", "stable", "faults", "soak"]
)
def test_sanitizers(name: str, sanitized_tests: Programs, tmp_path: Path, huge_pages: None) -> None:
    rest = {"faults": ["7"], "soak": ["600"]}.get(name, [])
    sanitized_tests.run(name, tmp_path, *rest)


@pytest.mark.parametrize("name", ["carry", "stable", "soak"])
def test_valgrind(name: str, c_tests: Programs, tmp_path: Path) -> None:
    skip_without("valgrind")
    rest = {"soak": ["50"]}.get(name, [])
    valgrind = ("valgrind", "-q", "--error-exitcode=9", "--leak-check=full")
    c_tests.run(name, tmp_path, *rest, launcher=valgrind)


def test_corpus(sanitized_tests: Programs, tmp_path: Path) -> None:
    corpus = sorted((C_TESTS / "corpus").iterdir())
    assert len(corpus) > 50
    sanitized_tests.environment["TMPDIR"] = str(tmp_path)
    assert f"{len(corpus)} inputs" in sanitized_tests.run("fuzz_replay", *corpus)


def test_the_fuzzer_builds_and_runs(c_tests: Programs, tmp_path: Path) -> None:
    """A second of it: ``make fuzz`` has the ten minutes."""
    skip_without("clang")
    (tmp_path / "empty.c").write_text("int LLVMFuzzerTestOneInput(void) { return 0; }\n")
    probe: list[str | Path] = ["clang", "-fsanitize=fuzzer", "-o", tmp_path / "empty"]
    if subprocess.run([*probe, tmp_path / "empty.c"], capture_output=True).returncode:
        pytest.skip("not installed: libFuzzer (libclang-rt-dev)")
    done = subprocess.run(
        ["make", "-s", "-C", C_TESTS, f"BUILD={tmp_path}", "FUZZ_SECONDS=1", "run-fuzz"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "found").iterdir()) == []
    assert "Done " in done.stderr
