# SPDX-License-Identifier: MIT
"""The probes of librsplice: found, read, counted exactly, and held against what was seen."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplice.audit import (
    Amount,
    Audit,
    Counts,
    Evidence,
    Fallback,
    Filled,
    Process,
    Published,
    RspliceCalls,
)
from rsplice.audit import Path as PathRow
from rsplice.commands.diff import differences
from rsplice.commands.doctor import diagnose
from rsplice.dashboards.html import render_html
from rsplice.dashboards.live import LiveView
from rsplice.dashboards.report import print_report
from rsplice.events import HOWS, MARKS, WHYS, Mark, ProcessSeen
from rsplice.launch import Command
from rsplice.ledger import Ledger
from rsplice.recording import parse_audit
from rsplice.session import kernel_version
from rsplice.tracers import usdt
from rsplice.tracers.program import BpfError, Program
from rsplice.tracers.tracer import Tracer
from tests.support.attached import (
    descriptors_of,
    programs_of,
    wait_until_attached,
    wait_until_gone,
)
from tests.support.run import RSPLICE, Result, Running, audit, environment, process
from tests.test_ledger import KERNEL, PROCESSES, PROPERTY, tallies
from tests.test_report import EVIL, EVIL_SHOWN

privileged = pytest.mark.privileged

ROOT = Path(__file__).parent.parent
COUNT = 211
SOURCE = ROOT / "tests/c/usdt_marks.c"

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, needs: Callable[..., None]) -> Build:
    """Compiles a C source with csrc/probes.h in reach; the program."""
    needs("cc")
    if subprocess.run(
        ["cc", "-E", "-include", "sys/sdt.h", os.devnull], capture_output=True
    ).returncode:
        pytest.skip("not installed: systemtap-sdt-dev (sys/sdt.h)")
    directory = tmp_path_factory.mktemp("usdt")

    def compile_(name: str, *flags: str, source: str | Path = SOURCE) -> Path:
        program = directory / name
        if isinstance(source, str):
            (directory / f"{name}.c").write_text(source)
            source = directory / f"{name}.c"
        if not program.exists():
            command: list[str | Path] = [
                "cc",
                "-I",
                ROOT / "csrc",
                "-pthread",
                "-o",
                program,
                source,
            ]
            command += flags or ["-O2"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return program

    return compile_


@pytest.fixture
def library(build: Build) -> Path:
    """A librsplice.so that does no more than fire its probes, by run()."""
    soname = "-Wl,-soname,librsplice.so.0"
    return build("librsplice.so.0", "-O2", "-shared", "-fPIC", "-Dmain=run", soname)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4096))
    return path


def said(threads: int = 1, count: int = COUNT) -> dict[str, Any]:
    """What usdt_marks says in *threads* threads, as the JSON has it."""
    calls, ramp = count * threads, count * (count + 1) // 2 * threads
    reasons = {1 << 2: 13, 1 << 1 | 1 << 3: 17}
    fallbacks = [
        {
            "why": "; ".join(why for bit, why in enumerate(WHYS) if reason >> bit & 1),
            "calls": calls,
            "bytes": nbytes * calls,
        }
        for reason, nbytes in reasons.items()
    ]
    return {
        "reserved": {"calls": 2 * calls, "bytes": (4100 + 41) * calls},
        "filled": {
            "direct": 4099 * calls,
            "reference": 7 * calls,
            "copied": ramp,
            "generated": 11 * calls,
            "unknown": 0,
        },
        "published": {
            "calls": calls,
            "moved": 23 * calls,
            "shared": 29 * calls,
            "direct": 31 * calls,
            "copied": 37 * calls,
            "unknown": ramp,
        },
        "fallbacks": sorted(fallbacks, key=lambda f: -int(str(f["bytes"]))),
        "aborted": {"calls": 2 * calls, "bytes": (19 + 41) * calls},
    }


def told(calls: dict[str, Any]) -> dict[str, Any]:
    """The part of ``rsplice_calls`` that the library said."""
    return {name: value for name, value in calls.items() if name not in ("seen", "differences")}


def seen_bytes(calls: dict[str, Any]) -> dict[str, int]:
    """Payload of what was seen in the calls, by operation and destination."""
    nbytes: dict[str, int] = {}
    for row in calls["seen"]:
        name = f"{row['via']} {row['destination']}"
        nbytes[name] = nbytes.get(name, 0) + row["payload_bytes"]
    return nbytes


# Attached to a program that fires them a known number of times.


def unattached(result: Result) -> list[dict[str, str]]:
    """Files whose marks are not seen; other probes are missing, too: FUSE's before 6.11."""
    missing: list[dict[str, str]] = result.json["accuracy"]["probes_missing"]
    return [each for each in missing if each["probe"].startswith("probes in ")]


@privileged
@pytest.mark.parametrize(
    "flags",
    [
        ("-O2",),
        ("-O0",),
        ("-O2", "-static"),
        ("-O1", "-no-pie"),
        ("-O3", "-fno-omit-frame-pointer"),
    ],
    ids=" ".join,
)
def test_every_probe_is_counted_with_its_values(
    build: Build, file: Path, flags: tuple[str, ...]
) -> None:
    program = build("marks" + "".join(flags), *flags)
    result = audit([program, str(COUNT), "1", "1", file])
    assert result.status == 0, result.stderr
    calls = result.json["rsplice_calls"]
    assert told(calls) == said()
    # Of the reads, those inside the calls, also behind the abort of a part.
    assert seen_bytes(calls) == {"pread64 user memory": 303 * COUNT}
    assert str(program) in result.json["accuracy"]["usdt_files"]
    assert unattached(result) == []
    assert result.json["accuracy"]["events_lost"] == 0


@privileged
def test_threads_and_forked_children_lose_nothing(build: Build, file: Path) -> None:
    """What Linux 7.0 and later pass over, where more threads run than CPUs, is told as lost."""
    result = audit([build("marks"), str(COUNT), "5", "3", file])
    lost = result.json["accuracy"]["events_lost"]
    calls = result.json["rsplice_calls"]
    if lost and kernel_version() >= (7, 0):
        made, read = said(threads=15), seen_bytes(calls)["pread64 user memory"]
        marks = [made[m]["calls"] - calls[m]["calls"] for m in ("reserved", "published", "aborted")]
        assert all(0 <= short <= lost for short in marks)
        # Two reads at most belong to one mark, and one to one system call.
        assert 0 <= 303 * COUNT * 15 - read <= 2 * 101 * lost
        return
    assert lost == 0
    assert told(calls) == said(threads=15)
    assert seen_bytes(calls) == {"pread64 user memory": 303 * COUNT * 15}
    each = [p["rsplice_calls"] for p in result.json["processes"]]
    assert [told(one) for one in each] == [said(threads=5)] * 3
    assert [seen_bytes(one) for one in each] == [{"pread64 user memory": 303 * COUNT * 5}] * 3


@privileged
def test_a_twin_that_is_not_followed_is_not_counted(build: Build, file: Path) -> None:
    program = build("marks")
    stop = threading.Event()
    ran = []

    def run_twins() -> None:
        while not stop.is_set():
            ran.append(subprocess.run([program, "23", "2", "2", file]).returncode)

    twins = threading.Thread(target=run_twins)
    twins.start()
    try:
        result = audit([program, str(COUNT), "2", "1", file])
    finally:
        stop.set()
        twins.join()
    assert len(ran) > 1
    assert not any(ran)
    assert told(result.json["rsplice_calls"]) == said(threads=2)


@privileged
def test_nothing_is_said_of_programs_without_librsplice(file: Path) -> None:
    result = audit(["cat", file])
    assert result.json["rsplice_calls"]["reserved"] == {"calls": 0, "bytes": 0}
    assert result.json["rsplice_calls"]["seen"] == []
    assert all("rsplice_calls" not in process for process in result.json["processes"])
    assert "LIBRSPLICE" not in result.stderr
    assert unattached(result) == []


@privileged
def test_a_shared_library_is_found_where_the_linker_would(
    build: Build, library: Path, file: Path
) -> None:
    """The program that uses it is started by a shell, which nobody could know beforehand."""
    caller = "int run(int, char **); int main(int c, char **v) { return run(c, v); }"
    program = build("caller", str(library), source=caller)
    where = environment() | {"LD_LIBRARY_PATH": str(library.parent)}
    script = f"{program} {COUNT} 2 1 {file}; :"
    result = audit(["sh", "-c", script], env=where)
    assert str(library) in result.json["accuracy"]["usdt_files"]
    assert told(result.json["rsplice_calls"]) == said(threads=2)
    callers = [p for p in result.json["processes"] if "rsplice_calls" in p]
    assert [p["comm"] for p in callers] == ["caller"]


@privileged
def test_what_a_running_process_has_mapped_is_found(build: Build, file: Path) -> None:
    library = build("mapped.so", "-O2", "-shared", "-fPIC", "-Dmain=run")
    code = f"""
import ctypes, sys
library = ctypes.CDLL({str(library)!r})
print(flush=True)
input()
words = [b"run", b"{COUNT}", b"2", b"1", {str(file)!r}.encode()]
sys.exit(library.run(5, (ctypes.c_char_p * 6)(*words)))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with process([sys.executable, "-c", code], **pipes) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()
        running = Running([], "-p", str(child.pid))
        wait_until_attached(running.pid)
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.wait() == 0
        result = running.finish()
    assert result.json["accuracy"]["usdt_files"].count(str(library)) == 1
    assert told(result.json["rsplice_calls"]) == said(threads=2)


@privileged
@pytest.mark.parametrize("many", [True, False], ids=["one link for all", "an event each"])
def test_both_ways_to_attach_count_the_same(
    build: Build, file: Path, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """Kernels before 6.6 know the second way alone."""
    load = Program.load_uprobe

    def refuse(self: Program, function: str, many_wanted: bool) -> int:
        if many_wanted != many:
            raise BpfError(errno.EINVAL)
        return load(self, function, many_wanted)

    monkeypatch.setattr(Program, "load_uprobe", refuse)
    program = build("marks")
    tracer = Tracer(files=usdt.find([str(program)]))
    try:
        assert str(program) in tracer.usdt_files
        command = Command([str(program), str(COUNT), "3", "1", str(file)])
        tracer.follow(command.pid)
        command.release()
        assert command.wait() == 0
        ledger = Ledger(KERNEL)
        for mark in tracer.counters.read().marks:
            ledger.mark(mark)
        assert told(ledger.audit().rsplice_calls.to_json()) == said(threads=3)
    finally:
        tracer.close()
    assert not uprobe_links()


def uprobe_links() -> set[str]:
    """Descriptors of this process that hold uprobes."""
    held = set()
    for number in descriptors_of(os.getpid()):
        text = Path(f"/proc/self/fdinfo/{number}").read_text()
        if "uprobe" in text or os.readlink(f"/proc/self/fd/{number}").endswith("[perf_event]"):
            held.add(number)
    return held


@privileged
def test_a_kernel_without_uprobes_says_what_is_missing(
    build: Build, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Program, *arguments: object) -> None:
        raise BpfError(errno.EOPNOTSUPP)

    monkeypatch.setattr(Program, "attach_uprobes", refuse)
    program = build("marks")
    tracer = Tracer(files=usdt.find([str(program)]))
    tracer.close()
    missing = {m.probe: m for m in tracer.missing}[f"probes in {program}"]
    assert missing.reason == os.strerror(errno.EOPNOTSUPP)
    assert missing.cost == usdt.COST
    assert tracer.usdt_files == []
    assert "sys_exit" in tracer.attached


@privileged
def test_ended_processes_make_room_and_stay_counted(
    build: Build, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsplice.tracers.counters._RETIRE_AT", 3)
    program = build("marks")
    tracer = Tracer(files=usdt.find([str(program)]))
    try:
        for _ in range(7):
            command = Command([str(program), "23", "1", "1", str(file)])
            tracer.follow(command.pid)
            command.release()
            assert command.wait() == 0
            tracer.counters.make_room()
        reserved = [m for m in tracer.counters.read().marks if m.probe == "reserve"]
        assert [m.calls for m in reserved] == [46] * 7
    finally:
        tracer.close()


@privileged
@pytest.mark.parametrize("number", ["-1", "1L << 62"])
def test_garbage_in_a_probe_is_lost_and_not_believed(build: Build, number: str) -> None:
    source = f"""
#include "probes.h"
int main(void)
{{
	int i;

	for (i = 0; i < 23; i++)
		rsplice_probe_fill(1, {number}, RSPLICE_HOW_COPY);
	rsplice_probe_publish(1, 5, {number}, 0, 0, 0);
	rsplice_probe_fill(1, 7, 99);
	return 0;
}}
"""
    program = build(f"garbage{len(number)}", source=source)
    result = audit([program])
    assert result.json["accuracy"]["events_lost"] == 24
    assert result.json["rsplice_calls"]["filled"] == {**vars(Filled()), "unknown": 7}
    assert result.json["rsplice_calls"]["published"] == vars(Published())


@privileged
def test_a_call_that_is_left_open_counts_for_its_own_process_alone(
    build: Build, file: Path
) -> None:
    """A thread dies inside a call; the processes after it read as they please."""
    source = """
#include "probes.h"
int main(void) { rsplice_probe_reserve(1, 3, 4, 7); return 0; }
"""
    program = build("open", source=source)
    result = audit(["sh", "-c", f"{program}; cat {file} {file}"])
    # The program is no candidate, being started by the shell: nothing at all is said.
    assert result.json["rsplice_calls"]["seen"] == []
    tracer = Tracer(files=usdt.find([str(program)]))
    try:
        for argv in ([str(program)], ["cat", str(file)]):
            with open(os.devnull, "w") as null:
                command = Command(argv, output=null.fileno())
                tracer.follow(command.pid)
                command.release()
                assert command.wait() == 0
        reading = tracer.counters.read()
    finally:
        tracer.close()
    assert [(m.probe, m.calls) for m in reading.marks] == [("reserve", 1)]
    comms = {p.key: p.comm for p in reading.processes}
    inside = {comms[t.process] for t in reading.tallies if "rsplice" in t.flags}
    assert "cat" not in inside


@privileged
def test_nothing_stays_when_rsplice_is_killed(build: Build, file: Path) -> None:
    program = build("marks")
    running = Running([program, "100000000", "1", "1", file])
    wait_until_attached(running.pid)
    programs = programs_of(running.pid)
    assert programs
    running.kill()
    wait_until_gone(programs)


@privileged
def test_two_capabilities_are_enough(build: Build, file: Path, needs: Callable[..., None]) -> None:
    needs("setpriv")
    result = audit([build("marks"), str(COUNT), "1", "1", file], launcher=capabilities())
    if "CAP" in result.stderr or result.document is None:
        pytest.fail(result.stderr)
    assert told(result.json["rsplice_calls"]) == said()


def capabilities() -> list[str]:
    kept = "-all,+bpf,+perfmon"
    return ["setpriv", f"--bounding-set={kept}", f"--inh-caps={kept}"]


@privileged
def test_doctor_names_the_files(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
    details = [c.detail for c in diagnose().checks if c.name == "librsplice"]
    assert f"attached in {library}" in details
    monkeypatch.setattr(usdt, "find", lambda: [])
    (check,) = [c for c in diagnose().checks if c.name == "librsplice"]
    assert check.state == "ok"
    assert "no librsplice with probes is installed" in check.detail


# The reader of notes.


def test_the_notes_of_a_program_are_read(build: Build) -> None:
    program = build("marks")
    file = os.open(program, os.O_RDONLY)
    sites = usdt.read_sites(file)
    os.close(file)
    assert {site.probe for site in sites} == set(usdt.PROBES)
    code = program.read_bytes()
    assert {code[site.offset] for site in sites} == {0x90}  # nop
    assert all(site.encoded() for site in sites)


def test_what_is_no_program_has_no_probes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "script").write_text("#!/bin/sh\n")
    for name in ("fifo", "empty", "script", ".", "nowhere"):
        found = [f.path for f in usdt.find([str(tmp_path / name)])]
        assert not [path for path in found if path.startswith(str(tmp_path))]


@given(st.data())
def test_a_damaged_program_is_no_reason_to_fail(build: Build, data: st.DataObject) -> None:
    """It may come from anybody, and rsplice reads it as root."""
    code = bytearray(build("marks").read_bytes())
    sections = int.from_bytes(code[40:48], "little")
    notes = code.find(b"stapsdt\0")
    for _ in range(data.draw(st.integers(1, 9))):
        start = data.draw(st.sampled_from([0, sections, notes - 12]))
        at = min(start + data.draw(st.integers(0, 2000)), len(code) - 1)
        code[at] = data.draw(st.integers(0, 255))
    code = code[: data.draw(st.sampled_from([len(code), sections, sections + 700, 64, 63]))]
    descriptor = os.memfd_create("damaged")
    try:
        os.write(descriptor, code)
        for site in usdt.read_sites(descriptor):
            try:
                assert len(site.encoded()) == 152
            except ValueError as error:
                assert "argument" in str(error)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "operand", ["-8@counter(%rip)", "-8@(%rax,%rbx,8)", "8@%xmm0", "8@%fs:8", "16@$1", "", "$1"]
)
def test_an_argument_in_a_place_unheard_of_is_told(operand: str) -> None:
    with pytest.raises(ValueError, match="argument"):
        usdt.Site("abort", 0, f"-8@$1 {operand}").encoded()


@pytest.mark.parametrize(
    ("operand", "value", "place", "register", "shift", "signed"),
    [
        ("-8@$-5", 2**64 - 5, 0, 0, 0, 1),
        ("8@%rdi", 0, 1, 112, 0, 0),
        ("-4@%r15d", 0, 1, 0, 32, 1),
        ("1@%al", 0, 1, 80, 56, 0),
        ("-8@-16(%rbp)", 2**64 - 16, 2, 32, 0, 1),
        ("2@(%rsp)", 0, 2, 152, 48, 0),
    ],
)
def test_an_argument_is_found_where_the_note_says(
    operand: str, value: int, place: int, register: int, shift: int, signed: int
) -> None:
    encoded = usdt.Site("abort", 0, f"-8@$0 {operand}").encoded()
    assert usdt._ARGUMENT.unpack_from(encoded, 8 + 24) == (value, place, register, shift, signed)


def test_probes_and_their_numbers_agree_everywhere() -> None:
    """csrc/probes.h, csrc/rsplice.h, bpf/usdt.c and the ledger speak of the same things."""
    header = (ROOT / "csrc/probes.h").read_text()
    bpf = (ROOT / "tracers/bpf/usdt.c").read_text()
    assert tuple(MARKS) == usdt.NAMES
    for name, arguments in usdt.PROBES.items():
        assert f"STAP_PROBE{arguments}(rsplice, {name}, " in header
    order = [bpf.index(f"MARK_{name.upper()}") for name in usdt.NAMES]
    assert order == sorted(order)
    for number, how in enumerate(("DIRECT", "REFERENCE", "COPY", "GENERATED", "UNKNOWN")):
        assert f"RSPLICE_HOW_{how} = {number}," in header
    assert len(HOWS) == 5
    assert set(HOWS) == set(vars(Filled()))
    reasons = [
        line.split()[1:3]
        for line in (ROOT / "csrc/rsplice.h").read_text().splitlines()
        if line.startswith("#define RSPLICE_WHY_")
    ]
    assert [int(value.rstrip("u"), 16) for _, value in reasons] == [
        1 << bit for bit in range(len(WHYS))
    ]


# The ledger.


@st.composite
def marks(draw: st.DrawFn) -> Mark:
    probe = draw(st.sampled_from(sorted(MARKS)))
    details = {"fill": 7, "fallback": 255}
    numbers = st.integers(0, 2**40)
    return Mark(
        draw(st.integers(1, 4)),
        probe,
        draw(st.integers(0, details.get(probe, 0))),
        draw(st.integers(0, 2**20)),
        tuple(draw(numbers) for _ in MARKS[probe]),
    )


def ledger_of(parts: list[Any]) -> Ledger:
    ledger = Ledger(KERNEL)
    for part in parts:
        if isinstance(part, Mark):
            ledger.mark(part)
        elif isinstance(part, ProcessSeen):
            ledger.see(part)
        else:
            ledger.add(part)
    return ledger


PARTS = st.lists(st.one_of(marks(), tallies(), PROCESSES), max_size=12)


def total(calls: RspliceCalls) -> int:
    return calls.filled.nbytes + calls.published.nbytes + sum(f.nbytes for f in calls.fallbacks)


@PROPERTY
@given(PARTS)
def test_calls_of_all_are_the_sum_of_those_of_each(parts: list[Any]) -> None:
    made = ledger_of(parts).audit()
    each = [process.rsplice_calls for process in made.processes]
    assert total(made.rsplice_calls) == sum(map(total, each))
    for name in ("reserved", "aborted"):
        whole: Amount = getattr(made.rsplice_calls, name)
        assert whole.calls == sum(getattr(calls, name).calls for calls in each)
        assert whole.nbytes == sum(getattr(calls, name).nbytes for calls in each)
    whole_seen = made.rsplice_calls.seen_counts
    assert whole_seen.copy_bytes == sum(calls.seen_counts.copy_bytes for calls in each)
    # What was seen in the calls is part of what was seen.
    assert whole_seen.payload_bytes <= made.totals.payload_bytes
    assert whole_seen.copy_bytes <= made.totals.copy_bytes


@PROPERTY
@given(PARTS)
def test_no_byte_that_was_said_is_lost(parts: list[Any]) -> None:
    made = ledger_of(parts).audit().rsplice_calls
    said_by = {
        name: [p for p in parts if isinstance(p, Mark) and p.probe == name] for name in MARKS
    }
    assert made.reserved.nbytes == sum(m.nbytes[0] for m in said_by["reserve"])
    assert made.aborted.nbytes == sum(m.nbytes[0] for m in said_by["abort"])
    assert made.filled.nbytes == sum(m.nbytes[0] for m in said_by["fill"])
    assert made.published.nbytes == sum(sum(m.nbytes) for m in said_by["publish"])
    assert sum(f.nbytes for f in made.fallbacks) == sum(m.nbytes[0] for m in said_by["fallback"])
    assert sum(f.calls for f in made.fallbacks) == sum(m.calls for m in said_by["fallback"])


@PROPERTY
@given(PARTS, PARTS)
def test_the_order_of_marks_does_not_matter_nor_whose_ledger(
    some: list[Any], others: list[Any]
) -> None:
    def merged(one: list[Any], other: list[Any]) -> dict[str, Any]:
        whole = Ledger(KERNEL)
        whole.merge(ledger_of(one))
        whole.merge(ledger_of(other))
        return whole.audit().to_json()["rsplice_calls"]  # type: ignore[no-any-return]

    together = ledger_of([*some, *others]).audit().to_json()["rsplice_calls"]
    assert merged(some, others) == merged(others, some) == together
    assert ledger_of([*others, *some][::-1]).audit().to_json()["rsplice_calls"] == together


@PROPERTY
@given(PARTS)
def test_calls_survive_json_and_recordings(parts: list[Any]) -> None:
    made = ledger_of(parts).audit()
    document = json.loads(json.dumps(made.to_json()))
    assert parse_audit(document) == made
    assert document["rsplice_calls"]["differences"] == made.rsplice_calls.differences


@pytest.mark.parametrize(
    "mark",
    [
        Mark(1, "nothing", 0, 1, (1,)),
        Mark(1, "fill", 0, 1, (1, 2)),
        Mark(1, "publish", 0, 1, (1,)),
        Mark(1, "fill", 0, -1, (1,)),
        Mark(1, "fill", -1, 1, (1,)),
        Mark(1, "publish", 0, 1, (0, 0, -1, 0, 0)),
        Mark(1, "reserve", 1, 1, (1,)),
    ],
)
def test_a_mark_that_contradicts_itself_is_refused(mark: Mark) -> None:
    ledger = Ledger(KERNEL)
    with pytest.raises(ValueError, match="Mark"):
        ledger.mark(mark)
    assert not ledger.audit().rsplice_calls


def test_an_audit_of_before_has_no_calls() -> None:
    document = Audit(processes=[Process(1, "cp")]).to_json()
    del document["rsplice_calls"], document["accuracy"]["usdt_files"]
    assert parse_audit(document).rsplice_calls == RspliceCalls()


def test_calls_of_the_wrong_type_are_no_recording() -> None:
    document = Audit(rsplice_calls=sample_calls()).to_json()
    for damage in (
        {"reserved": {"calls": "1", "bytes": 1}},
        {"published": {}, "filled": {"direct": None}},
        {"fallbacks": [{"why": 3, "calls": 1, "bytes": 1}]},
        {"seen": [7]},
    ):
        with pytest.raises(ValueError):
            parse_audit(document | {"rsplice_calls": document["rsplice_calls"] | damage})


# Where intention and fate differ.


def path(source: str, destination: str, via: str, **counts: int) -> PathRow:
    nbytes = sum(counts.values())
    copied = counts.get("copied", 0)
    row = Counts(nbytes, copied, nbytes, **counts, operations=1, evidence=Evidence.IDENTITY)
    return PathRow(source, destination, via, row, "")


def sample_calls(
    *seen: PathRow, published: Published | None = None, filled: Filled | None = None
) -> RspliceCalls:
    return RspliceCalls(
        Amount(1, 9000),
        filled or Filled(direct=8292),
        published or Published(1, moved=8192, copied=100),
        [Fallback("less than a whole page or block", 1, 100)],
        Amount(),
        list(seen),
    )


INTO_PIPE = path("ext4 O_DIRECT", "pipe", "splice", direct=8292)
HEADER = path("user memory", "pipe", "write", copied=16)


def test_what_agrees_is_no_difference() -> None:
    reply = path("pipe", "fuse device", "fuse reply", moved=8192, copied=100)
    assert sample_calls(INTO_PIPE, HEADER, reply).differences == []


def test_a_copy_that_was_said_to_be_a_move_is_told() -> None:
    reply = path("pipe", "fuse device", "fuse reply", moved=4096, copied=4196)
    (sentence,) = sample_calls(INTO_PIPE, HEADER, reply).differences
    assert sentence == "by the library's word 100 bytes copied, 4212 seen copied"


def test_what_a_device_filled_excuses_no_copy() -> None:
    reply = path("pipe", "fuse device", "fuse reply", copied=8292)
    calls = sample_calls(INTO_PIPE, reply, filled=Filled(direct=3 * 8292))
    assert len(calls.differences) == 1


def test_a_move_that_was_said_to_be_a_copy_is_told() -> None:
    reply = path("pipe", "fuse device", "fuse reply", moved=8292)
    (sentence,) = sample_calls(INTO_PIPE, reply).differences
    assert sentence == "by the library's word 100 bytes copied, no more than 0 seen copied"


def test_a_page_cache_page_that_was_said_to_be_private_is_told() -> None:
    published = Published(1, moved=8292)
    (sentence,) = sample_calls(
        path("ext4", "pipe", "splice", shared=8292), published=published
    ).differences
    assert sentence == "by the library's word 0 bytes shared, 8292 seen shared with the source"


def test_calls_in_which_nothing_was_seen_are_told() -> None:
    (sentence,) = sample_calls().differences
    assert sentence == "by the library's word 8292 bytes handed on, 0 seen"


@pytest.mark.parametrize(
    "calls",
    [
        # What the kernel did is unknown: no contradiction.
        sample_calls(INTO_PIPE, path("pipe", "fuse device", "fuse reply", unknown=8292)),
        # The library does not know, the kernel does.
        sample_calls(
            path("pipe", "fuse device", "fuse reply", copied=8292),
            published=Published(1, unknown=8292),
        ),
        # Filled by a copy, and the consumer failed, or has not had its turn.
        sample_calls(
            path("unix", "user memory", "recvfrom", copied=8292),
            published=Published(),
            filled=Filled(copied=8292),
        ),
        # The same, beside what was handed on and filled by a device.
        sample_calls(
            INTO_PIPE,
            path("pipe", "fuse device", "fuse reply", moved=8192, copied=100),
            path("unix", "user memory", "recvfrom", copied=500),
            filled=Filled(direct=8292, copied=500),
        ),
        # Lent by the page cache, and copied at the consumer, as it was said.
        sample_calls(
            path("tmpfs", "pipe", "splice", shared=8292),
            path("pipe", "fuse device", "fuse reply", copied=8292),
            published=Published(1, copied=8292),
        ),
        RspliceCalls(),
    ],
)
def test_what_is_not_known_is_no_difference(calls: RspliceCalls) -> None:
    assert calls.differences == []


# The views.


def sample_audit(comm: str = "server") -> Audit:
    reply = path("pipe", "fuse device", "fuse reply", moved=4096, copied=4196)
    calls = sample_calls(INTO_PIPE, reply)
    made = Audit(["server"], 0, 1.0, rsplice_calls=calls)
    made.processes = [Process(7, comm, rsplice_calls=calls)]
    made.accuracy.usdt_files = ["/usr/lib/librsplice.so.0"]
    return made


EXPECTED = """\
LIBRSPLICE                                                        CALLS    BYTES
server[7]                                                             1 8.10 KiB
    intended: moved 8.00 KiB, copied 100 B
    seen:     ext4 O_DIRECT -> pipe via splice: direct 8.10 KiB
    seen:     pipe -> fuse device via fuse reply: copied 4.10 KiB, moved 4.00
    KiB
    filled direct 8.10 KiB; fell back 100 B (less than a whole page or block)
    DIFFERS: by the library's word 100 bytes copied, 4196 seen copied
"""


def text_of(audit_: Audit) -> str:
    file = io.StringIO()
    print_report(audit_, file)
    return file.getvalue()


def test_the_report_has_intention_and_fate_side_by_side() -> None:
    text = text_of(sample_audit())
    assert EXPECTED in text
    assert text.rstrip().endswith("0 bytes unknown,\n    librsplice in 1 file")


def test_calls_of_several_processes_are_also_added_up() -> None:
    made = sample_audit()
    made.processes.append(replace(made.processes[0], pid=11))
    rows = [line.split()[0] for line in text_of(made).splitlines() if line.endswith(" 8.10 KiB")]
    assert [row for row in rows if not row.startswith("seen")] == ["all", "server[7]", "server[11]"]


def test_the_page_and_the_dashboard_have_it_too() -> None:
    page = render_html(sample_audit(EVIL))
    assert "moved 8.00 KiB, copied 100 B" in page
    assert "DIFFERS: by the library&#x27;s word 100 bytes copied, 4196 seen copied" in page
    assert EVIL not in page
    assert EVIL_SHOWN in page
    view = LiveView()
    view.feed(sample_audit(), 1.0)
    block = view.block()
    assert "rsplice: 1 call, intended moved 8.00 KiB, copied 100 B; seen copied 4.10 KiB" in block
    assert "DIFFERS: by the library's word 100 bytes copied, 4196 seen copied" in block


def test_views_without_calls_do_not_speak_of_them() -> None:
    made = Audit(["cp"])
    view = LiveView()
    view.feed(made, 1.0)
    for text in (text_of(made), render_html(made), view.block()):
        assert "librsplice" not in text.lower()


def test_two_audits_are_told_apart_by_their_calls() -> None:
    before, after = sample_audit(), sample_audit()
    assert differences(before, after) == []
    after.rsplice_calls = replace(after.rsplice_calls, reserved=Amount(3, 9000))
    assert differences(before, after) == ["~ librsplice", "    calls 1 -> 3 (+2)"]


# The library itself.


LIBRARY = """
import os, socket, sys
import rsplice
source = os.open(sys.argv[1], os.O_RDONLY)
reader, writer = os.pipe()
null = os.open("/dev/null", os.O_WRONLY)
memory = os.memfd_create("target")
one, other = socket.socketpair()
for _ in range(23):
    n = rsplice.rsplice(source, writer, 16384, offset_in=0)
    assert n == 16384 == os.splice(reader, null, n)
    n = rsplice.rsplice(source, memory, 8192, offset_in=0, offset_out=0)
    assert n == 8192
    one.sendall(b"x" * 3001)
    n = rsplice.rsplice(other, writer, 3001)
    assert n == 3001 == os.splice(reader, null, n)
"""


@privileged
def test_the_library_does_as_it_says(tmp_path: Path) -> None:
    pytest.importorskip("rsplice._native")
    data = tmp_path / "data"
    data.write_bytes(os.urandom(65536))
    result = audit([sys.executable, "-c", LIBRARY, data])
    assert result.status == 0, result.stderr
    calls = result.json["rsplice_calls"]
    if not any("_native" in name for name in result.json["accuracy"]["usdt_files"]):
        pytest.skip("rsplice._native was built without sys/sdt.h")
    assert calls["reserved"]["calls"] == calls["published"]["calls"] == 69
    assert calls["published"]["moved"] == 23 * 16384
    assert calls["published"]["direct"] == 23 * 8192
    assert calls["published"]["copied"] == 23 * 3001
    assert calls["differences"] == []
    seen = seen_bytes(calls)
    assert seen["splice pipe"] >= 23 * 16384
    assert sum(p["copy_bytes"] for p in calls["seen"]) == 23 * 3001


@privileged
def test_what_a_filesystem_moves_is_seen_to_be_moved(
    tmp_path: Path, needs: Callable[..., None]
) -> None:
    pytest.importorskip("rsplice._fuse")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE here: /dev/fuse")
    command = [*RSPLICE, "workload", "fuse", "--mode", "rsplice", "--size", "1M", "--count", "7"]
    result = audit(command, env=environment() | {"TMPDIR": str(tmp_path)})
    assert result.status == 0, result.stderr
    calls = result.json["rsplice_calls"]
    if not any("_fuse" in name for name in result.json["accuracy"]["usdt_files"]):
        pytest.skip("rsplice._fuse was built without sys/sdt.h")
    replies = [row for row in calls["seen"] if row["via"] == "fuse reply"]
    assert [row["evidence"] for row in replies] == ["identity"]
    for disposition in ("moved", "copied"):
        assert calls["published"][disposition] == replies[0][disposition]
    assert calls["published"]["moved"] > calls["published"]["copied"]
    assert calls["differences"] == []
