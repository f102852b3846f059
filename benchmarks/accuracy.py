# SPDX-License-Identifier: MIT
"""python -m benchmarks.accuracy: are the numbers right?

Every workload is traced both ways at once: what rsplice tells from calls, file types and pages,
and what was counted where the kernel copies. It needs a kernel with fentry or kprobes, such as
that of a distribution: `rsplice kernel run 6.12 -- python -m benchmarks.accuracy`. The scratch
files lie under TMPDIR, which should be on ext4.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rsplice.errors import RspliceError
from rsplice.events import Tally
from rsplice.launch import Command
from rsplice.ledger import Ledger
from rsplice.rules import Version
from rsplice.session import kernel_version
from rsplice.tracers.tracer import Tracer

ROOT = Path(__file__).resolve().parents[1]
#: What may differ where data travels as packets: retransmissions.
TCP_TARGET = 0.001


@dataclass(frozen=True)
class Workload:
    """A command to trace.

    :param command: for a shell; {driver} and {server} are the test drivers, {rsplice} is the
        command, {directory} is scratch
    :param target: the largest difference that is right, as a share of the copied bytes
    """

    name: str
    command: str
    target: float = 0.0


def _driver(arguments: str, target: float = 0.0) -> Workload:
    return Workload(arguments, f"{{driver}} {arguments} -n 23 -d {{directory}} -o own", target)


def _server(mode: str) -> Workload:
    return Workload(f"fuse server {mode}", f"{{server}} {mode} -n 64 -t 101 -d {{directory}}")


WORKLOADS = (
    # Programs.
    Workload("cat", "cat big >/dev/null"),
    Workload("cat | wc", "cat big | wc -c"),
    Workload("cp", "cp --reflink=never big copy"),
    Workload("dd", "dd if=big of=copy bs=64K status=none"),
    Workload("dd O_DIRECT in", "dd if=big of=copy bs=64K iflag=direct status=none"),
    Workload("dd O_DIRECT out", "dd if=big of=copy bs=64K oflag=direct status=none"),
    Workload("dd /dev/zero", "dd if=/dev/zero of=copy bs=64K count=32 status=none"),
    Workload("tail -c | head -c", "tail -c 300001 big | head -c 200003 >out"),
    Workload("tar", "tar cf out big small && tar xf out -C into"),
    Workload("gzip", "gzip -1 -c big >out"),
    Workload("rsync", "rsync -W --ignore-times big small into/"),
    Workload("sort", "sort small >out"),
    Workload("cat sysctl", "cat /proc/sys/kernel/osrelease >/dev/null"),
    # Files.
    *(_driver(f"{via} -f {end}") for via in ("read", "preadv2") for end in ("file", "memfd")),
    *(_driver(f"{via} -t {end}") for via in ("write", "pwritev2") for end in ("file", "memfd")),
    _driver("read -f file -s 4099 -a 101"),
    _driver("read -f /dev/zero"),
    _driver("read -f direct"),
    _driver("write -t direct"),
    _driver("write -t /dev/null"),
    _driver("sendfile -f file -t file"),
    _driver("copy_file_range -f file -t file"),
    # Pipes.
    _driver("read -f pipe"),
    _driver("write -t pipe"),
    _driver("readv -f fifo"),
    _driver("splice -f file -t pipe"),
    _driver("splice -f memfd -t pipe"),
    _driver("splice -f /dev/zero -t pipe"),
    _driver("splice -f pipe -t pipe"),
    _driver("splice -f pipe -t file"),
    _driver("splice -f pipe -t memfd"),
    _driver("tee -f pipe -t pipe"),
    _driver("vmsplice"),
    _driver("vmsplice -F gift"),
    _driver("vmsplice -f pipe"),
    # Sockets.
    _driver("read -f unix"),
    _driver("sendmsg -t unix"),
    _driver("recvfrom -f unixgram"),
    _driver("recvmsg -f unix -F peek"),
    _driver("sendfile -f file -t unix"),
    _driver("sendto -t udp"),
    _driver("recvfrom -f udp"),
    _driver("sendto -t tcp", TCP_TARGET),
    _driver("recvmsg -f tcp", TCP_TARGET),
    _driver("recvfrom -f tcp -F trunc", TCP_TARGET),
    _driver("sendfile -f file -t tcp", TCP_TARGET),
    _driver("splice -f pipe -t tcp", TCP_TARGET),
    _driver("sendto -t tcp -F zerocopy", TCP_TARGET),
    # io_uring and other processes.
    _driver("io_uring-read -f file"),
    _driver("io_uring-read -f file -F async"),
    _driver("io_uring-write -t file"),
    _driver("io_uring-read -f file -F sqpoll"),
    _driver("io_uring-send_zc -t tcp", TCP_TARGET),
    _driver("io_uring-recv -f tcp", TCP_TARGET),
    _driver("process_vm_readv"),
    # FUSE servers.
    *map(_server, ("splice", "splice-copy", "write", "splice-mapped", "direct-io", "halves")),
    # Built-in workloads.
    Workload("relay splice", "{rsplice} workload relay --mode splice --size 150001 --count 7"),
    Workload("serve sendfile", "{rsplice} workload serve --size 150001 --count 7", TCP_TARGET),
    Workload("fuse rsplice", "{rsplice} workload fuse --size 1M --count 2"),
    Workload("fuse copy", "{rsplice} workload fuse --mode copy --size 1M --count 2"),
)


@dataclass
class Row:
    """One path of a workload, both ways, in bytes.

    :param told: copy_bytes without measuring
    :param unknown: payload that is then of unknown disposition
    :param evidence: how *told* is known
    :param measured: counted where the kernel copies
    """

    path: str
    payload: int
    told: int
    unknown: int
    evidence: str
    measured: int

    @property
    def difference(self) -> int | None:
        """Measured less told; None where nothing was told."""
        return None if self.unknown else self.measured - self.told


@dataclass
class Comparison:
    """A workload both ways."""

    workload: str
    target: float
    rows: list[Row] = field(default_factory=list)
    outside: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether what was told is within the target of what was measured, on every path."""
        return not self.error and all(
            abs(row.difference) <= self.target * row.measured
            for row in self.rows
            if row.difference is not None
        )


def compare(told: Iterable[Tally], measured: Iterable[Tally], kernel: Version) -> list[Row]:
    """The paths as an audit tells of them without measuring, beside what was counted."""
    ledger = Ledger(kernel)
    for tally in told:
        ledger.add(tally)
    counted: dict[str, int] = {}
    for tally in measured:
        name = f"{tally.source} -> {tally.destination} via {tally.via}"
        nbytes = sum(tally.measured.values()) + sum(tally.extra.values())
        counted[name] = counted.get(name, 0) + nbytes
    return [
        Row(
            path.name,
            path.counts.payload_bytes,
            path.counts.copy_bytes,
            path.counts.unknown,
            path.counts.evidence.word,
            counted[path.name],
        )
        for path in ledger.audit().paths
    ]


def summary(comparisons: Iterable[Comparison]) -> str:
    """A Markdown table with one row for each workload: all its paths that are told of, in bytes."""
    rows = [
        "| workload | payload | told | measured | difference | told by |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for each in comparisons:
        known = [row for row in each.rows if row.difference is not None]
        told, measured = sum(row.told for row in known), sum(row.measured for row in known)
        by = sorted({row.evidence for row in known if row.payload})
        rows.append(
            f"| {escaped(each.workload)} | {sum(row.payload for row in known)} | {told} "
            f"| {measured} | {measured - told} | {', '.join(by)} |"
        )
    return "\n".join(rows) + "\n"


def escaped(text: str) -> str:
    """For a cell of a Markdown table."""
    return text.replace("|", "\\|")


class Run:
    """All workloads under one tracer, which knows by process what an audit adds up."""

    def __init__(self, drivers: Path, directory: Path) -> None:
        self.tracer = Tracer()
        self._words = {
            "driver": drivers / "driver",
            "server": drivers / "fuse_server",
            "rsplice": f"{shlex.quote(sys.executable)} -m rsplice",
            "directory": directory,
        }
        self._directory = directory
        self._known: set[int] = set()
        self._outside: dict[str, int] = {}

    def compare(self, workload: Workload) -> Comparison:
        """Runs a workload, and compares."""
        found = Comparison(workload.name, workload.target)
        command = workload.command.format(**self._words)
        with open(self._directory / "output", "w+b") as output:
            shell = ["/bin/sh", "-c", f"cd {shlex.quote(str(self._directory))} && {command}"]
            child = Command(shell, output=output.fileno())
            self.tracer.follow(child.pid)
            child.release()
            status = child.wait()
            output.seek(0)
            words = output.read().decode(errors="replace").strip()
        if status:
            found.error = words.splitlines()[-1] if words else f"exit status {status}"
        reading = self.tracer.counters.read()
        mine = {p.key for p in reading.processes} - self._known
        self._known |= mine
        told = self.tracer.counters.read(measured=False)
        found.rows = compare(
            (t for t in told.tallies if t.process in mine),
            (t for t in reading.tallies if t.process in mine),
            kernel_version(),
        )
        outside = reading.outside or {}
        found.outside = {k: n - self._outside.get(k, 0) for k, n in outside.items()}
        self._outside = outside
        # What the kernel says it copied of zero-copy sends, it copied in their packets.
        declared = [row for row in found.rows if row.evidence == "declared"]
        if len(declared) == 1:
            declared[0].measured += found.outside.get("packets", 0)
        return found


def prepare(directory: Path) -> None:
    """The files that the workloads read."""
    (directory / "into").mkdir()
    (directory / "big").write_bytes(bytes(range(251)) * 12289)
    (directory / "small").write_text("".join(f"{n * 7919 % 10007}\n" for n in range(4001)))


HEADING = (
    "| workload | path | payload | told | how | measured | difference |\n"
    "| --- | --- | ---: | ---: | --- | ---: | ---: |"
)


def lines(comparison: Comparison) -> str:
    """Rows of a Markdown table: the paths of a workload."""
    name = escaped(comparison.workload)
    if comparison.error:
        name += f" ({comparison.error})"
    rows = []
    for row in comparison.rows:
        told = f"{row.told}" if not row.unknown else f"{row.told} + {row.unknown} unknown"
        difference = "-" if row.difference is None else f"{row.difference}"
        rows.append(
            f"| {name} | {row.path} | {row.payload} | {told} | {row.evidence} "
            f"| {row.measured} | {difference} |"
        )
        name = ""
    return "\n".join(rows)


def main() -> int:
    """0 if all is within the targets, 1 if not, 2 if nothing can be measured here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--drivers", type=Path, help="where the test drivers are built")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it as JSON, too")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write a row per workload")
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsplice-accuracy-") as name:
        directory = Path(name)
        drivers = options.drivers or directory / "drivers"
        if not options.drivers:
            make = ["make", "-s", "-C", str(ROOT / "tests/drivers"), f"BUILD={drivers}"]
            subprocess.run(make, check=True)
        prepare(directory)
        found: list[Comparison] = []
        try:
            run = Run(drivers, directory)
        except RspliceError as error:
            print(f"accuracy: {error}", file=sys.stderr)
            return 2
        try:
            if not run.tracer.measures:
                print("accuracy: this kernel lets nothing be measured", file=sys.stderr)
                return 2
            measured_at = ", ".join(run.tracer.measured_at)
            print(f"Linux {os.uname().release}, measured at: {measured_at}")
            for missing in run.tracer.missing:
                print(f"missing: {missing.probe}: {missing.reason}")
            print(f"\n{HEADING}")
            for workload in WORKLOADS:
                if options.only in workload.name:
                    found.append(run.compare(workload))
                    print(lines(found[-1]), flush=True)
        finally:
            run.tracer.close()
    if options.summary:
        options.summary.write_text(summary(found))
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
    failed = [each.workload for each in found if not each.holds]
    print(f"\n{len(found) - len(failed)} of {len(found)} within target")
    for each in failed:
        print(f"not: {each}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
