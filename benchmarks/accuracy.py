# SPDX-License-Identifier: MIT
"""python -m benchmarks.accuracy: are the numbers right?

Every workload is traced both ways at once: what rsplice tells from calls, file types and pages,
and what was counted where the kernel copies. It needs a kernel with fentry or kprobes, such as
that of a distribution: `rsplice kernel run 6.12 -- python -m benchmarks.accuracy`. The scratch
files lie under TMPDIR, which should be on ext4. `--across FILE...` makes one table of what
`--json` wrote on several kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
#: File systems of a guest's root and working directory.
_MACHINE = ("9p", "overlay")
#: What may differ where data travels as packets: retransmissions.
TCP_TARGET = 0.001


@dataclass(frozen=True)
class Workload:
    """A command to trace.

    :param command: for a shell; {driver} and {server} are the test drivers, {rsplice} is the
        command, {python} the interpreter, {directory} is scratch, {btrfs} and {xfs} are mounted
    :param target: the largest difference that is right, as a share of the copied bytes
    :param since: the first kernel that has what it calls
    """

    name: str
    command: str
    target: float = 0.0
    since: Version = (5, 10)


def _driver(
    arguments: str, target: float = 0.0, where: str = "", since: Version = (5, 10)
) -> Workload:
    command = f"{{driver}} {arguments} -n 23 -d {{{where or 'directory'}}} -o own"
    return Workload(f"{where} {arguments}".strip(), command, target, since)


def _server(mode: str) -> Workload:
    return Workload(f"fuse server {mode}", f"{{server}} {mode} -n 64 -t 101 -d {{directory}}")


def _served(name: str, server: str, port: int) -> Workload:
    """A file fetched from a server, which is ended then."""
    command = (
        f"{server} 2>server.err & trap 'kill $! 2>/dev/null; wait' EXIT; n=0; "
        f"until curl -fsS -o out http://127.0.0.1:{port}/big 2>curl.err; "
        "do n=$((n + 1)); test $n -lt 300 || exit 1; sleep 0.1; done; "
        "cmp big out"
    )
    return Workload(f"{name} | curl, tcp", command, TCP_TARGET)


def _fio(engine: str) -> Workload:
    job = (
        f"fio --name=it --filename=data --size=1M --bs=4K --rw=rw --randseed=7 --ioengine={engine}"
    )
    return Workload(f"fio {engine}", f"{job} --output=fio.out")


def _on(filesystem: str) -> tuple[Workload, ...]:
    """What is done with files of another file system than the scratch directory's."""
    copy = f"{{{filesystem}}}/copy"
    calls = (
        "read -f file", "write -t file", "read -f direct", "write -t direct",
        "sendfile -f file -t file", "copy_file_range -f file -t file",
        "splice -f file -t pipe", "splice -f pipe -t file",
    )  # fmt: skip
    return (
        Workload(
            f"{filesystem} cp, cat", f"cp --reflink=never big {copy} && cat {copy} >/dev/null"
        ),
        Workload(f"{filesystem} cp --reflink", f"cp --reflink=always {copy} {copy}-2"),
        *(_driver(call, where=filesystem) for call in calls),
    )


FILESYSTEMS = ("btrfs", "xfs")

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
    *map(_fio, ("psync", "pvsync2", "mmap", "splice", "libaio", "io_uring")),
    _served("nginx sendfile", "nginx -e {directory}/nginx.err -c {directory}/sendfile.conf", 23831),
    _served("nginx", "nginx -e {directory}/nginx.err -c {directory}/read.conf", 23833),
    _served("http.server", "{python} -m http.server --bind 127.0.0.1 23837 >/dev/null", 23837),
    Workload(
        "socat, tcp",
        "socat -u FILE:big TCP-LISTEN:23839,bind=127.0.0.1,reuseaddr & "
        "trap 'kill $! 2>/dev/null; wait' EXIT; "
        "socat -u TCP:127.0.0.1:23839,retry=100,interval=0.1 CREATE:out && cmp big out",
        TCP_TARGET,
    ),
    Workload("socat, unix", "socat -u FILE:big EXEC:'cat' >out && cmp big out"),
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
    _driver("splice -f /dev/zero -t pipe", since=(6, 5)),
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
    _driver("io_uring-read -f file -F async,defer", since=(6, 1)),
    _driver("io_uring-write -t file -F async,defer", since=(6, 1)),
    _driver("io_uring-send_zc -t tcp", TCP_TARGET, since=(6, 0)),
    _driver("io_uring-recv -f tcp", TCP_TARGET),
    _driver("process_vm_readv"),
    # Other file systems.
    *(workload for each in FILESYSTEMS for workload in _on(each)),
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

    @property
    def cell(self) -> str:
        """Of a table: the bytes measured on all paths that are told of, and what differs.

        Programs and libraries, which a guest reads from this machine, are left out of the bytes.
        """
        known = [row for row in self.rows if row.difference is not None]
        measured = sum(row.measured for row in known if not row.path.startswith(_MACHINE))
        difference = sum(row.difference or 0 for row in known)
        if self.error:
            return escaped(self.error)
        return f"{measured} ({difference:+})" if difference else f"{measured}"

    @property
    def evidence(self) -> set[str]:
        """How what is told is known."""
        return {row.evidence for row in self.rows if row.difference is not None and row.payload}


@dataclass
class Results:
    """One run on one kernel.

    :param measured_at: where copies were counted
    """

    release: str
    measured_at: list[str]
    comparisons: list[Comparison] = field(default_factory=list)

    def named(self, workload: str) -> Comparison | None:
        return next((each for each in self.comparisons if each.workload == workload), None)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def parse(text: str) -> Results:
        """Out of what text() gave."""
        found = Results(**json.loads(text))
        found.comparisons = [Comparison(**each) for each in found.comparisons]  # type: ignore[arg-type]
        for each in found.comparisons:
            each.rows = [Row(**row) for row in each.rows]  # type: ignore[arg-type]
        return found


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


def escaped(text: str) -> str:
    """For a cell of a Markdown table."""
    return text.replace("|", "\\|")


class Run:
    """All workloads under one tracer, which knows by process what an audit adds up."""

    def __init__(self, drivers: Path, directory: Path) -> None:
        self.tracer = Tracer()
        python = shlex.quote(sys.executable)
        self._words = {
            "driver": drivers / "driver",
            "server": drivers / "fuse_server",
            "rsplice": f"{python} -m rsplice",
            "python": python,
            "directory": directory,
            **{each: directory / each for each in FILESYSTEMS},
        }
        self._directory = directory
        self._known: set[int] = set()
        self._outside: dict[str, int] = {}

    def compare(self, workload: Workload) -> Comparison:
        """Runs a workload, and compares."""
        found = Comparison(workload.name, workload.target)
        command = workload.command.format(**self._words)
        with open(self._directory / "output", "w+b") as output:
            shell = ["/bin/sh", "-c", f"cd {shlex.quote(str(self._directory))} || exit; {command}"]
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


_NGINX = """\
daemon off;
master_process off;
pid {directory}/nginx.pid;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile {sendfile};
    client_body_temp_path {directory}/nginx;
    proxy_temp_path {directory}/nginx;
    fastcgi_temp_path {directory}/nginx;
    uwsgi_temp_path {directory}/nginx;
    scgi_temp_path {directory}/nginx;
    server {{ listen 127.0.0.1:{port}; root {directory}; }}
}}
"""


def prepare(directory: Path) -> None:
    """The files that the workloads read."""
    (directory / "into").mkdir()
    (directory / "big").write_bytes(bytes(range(251)) * 12289)
    (directory / "small").write_text("".join(f"{n * 7919 % 10007}\n" for n in range(4001)))
    for name, sendfile, port in (("sendfile", "on", 23831), ("read", "off", 23833)):
        text = _NGINX.format(directory=directory, sendfile=sendfile, port=port)
        (directory / f"{name}.conf").write_text(text)


@contextmanager
def mounted(filesystem: str, directory: Path) -> Iterator[str]:
    """*filesystem* on a disk of its own below *directory*; gives why not, "" if it is there."""
    image, place = directory / f"{filesystem}.image", directory / filesystem
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(512 << 20)
    why_not = _why_not(f"mkfs.{filesystem}", "-q", image) or _why_not(
        "mount", "-t", filesystem, "-o", "loop", image, place
    )
    try:
        yield why_not
    finally:
        if not why_not:
            subprocess.run(("umount", place), check=True)


def _why_not(*command: str | Path) -> str:
    """Runs a command; the last line that it prints if it fails, else ""."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"{command[0]} failed"])[-1]


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


def across(runs: Sequence[Results]) -> str:
    """A Markdown table of several kernels: a row for each workload, what was measured of it.

    Behind it stands by how much that differs from what was told, if it does.
    """
    series = [run.release.split("-")[0].split("+")[0] for run in runs]
    rows = [
        f"| workload | {' | '.join(series)} | told by |",
        f"| --- |{' ---: |' * len(runs)} --- |",
    ]
    names = dict.fromkeys(each.workload for run in runs for each in run.comparisons)
    for name in names:
        found = [run.named(name) for run in runs]
        cells = [each.cell if each else "-" for each in found]
        by = sorted({word for each in found if each for word in each.evidence})
        rows.append(f"| {escaped(name)} | {' | '.join(cells)} | {', '.join(by)} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """0 if all is within the targets, 1 if not, 2 if nothing can be measured here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--drivers", type=Path, help="where the test drivers are built")
    parser.add_argument(
        "--json", metavar="FILE", help="write it as JSON, too; -: that, and the rest on errors"
    )
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--across", nargs="+", type=Path, metavar="FILE", help="make a table")
    options = parser.parse_args()
    if options.across:
        print(across([Results.parse(path.read_text()) for path in options.across]), end="")
        return 0
    words = sys.stderr if options.json == "-" else sys.stdout
    with ExitStack() as stack:
        prefix = "rsplice-accuracy-"
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
        drivers = (options.drivers or directory / "drivers").resolve()
        if not options.drivers:
            make = ["make", "-s", "-C", str(ROOT / "tests/drivers"), f"BUILD={drivers}"]
            subprocess.run(make, check=True)
        prepare(directory)
        # Where these are modules they have to be there before the probes.
        _why_not("modprobe", "fuse")
        left_out = {
            fs: why for fs in FILESYSTEMS if (why := stack.enter_context(mounted(fs, directory)))
        }
        try:
            run = Run(drivers, directory)
        except RspliceError as error:
            print(f"accuracy: {error}", file=sys.stderr)
            return 2
        stack.callback(run.tracer.close)
        if not run.tracer.measures:
            print("accuracy: this kernel lets nothing be measured", file=sys.stderr)
            return 2
        found = Results(os.uname().release, run.tracer.measured_at)
        print(f"Linux {found.release}, measured at: {', '.join(found.measured_at)}", file=words)
        for missing in run.tracer.missing:
            print(f"missing: {missing.probe}: {missing.reason}", file=words)
        for filesystem, why in left_out.items():
            print(f"left out: {filesystem}: {why}", file=words)
        print(f"\n{HEADING}", file=words)
        for workload in WORKLOADS:
            missing_here = workload.name.split()[0] in left_out or workload.since > kernel_version()
            if options.only in workload.name and not missing_here:
                found.comparisons.append(run.compare(workload))
                print(lines(found.comparisons[-1]), file=words, flush=True)
    if options.json == "-":
        print(found.text())
    elif options.json:
        Path(options.json).write_text(found.text())
    failed = [each.workload for each in found.comparisons if not each.holds]
    count = len(found.comparisons)
    print(f"\n{count - len(failed)} of {count} within target", file=words)
    for each in failed:
        print(f"not: {each}", file=words)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
