# SPDX-License-Identifier: MIT
"""What is of rsplice's kind in the kernel itself: the pages of a request, filled by its server.

FUSE over io_uring, ublk and FUSE passthrough, each against servers that copy. The servers count
what they do themselves, and their clients check every byte. Each server lacks some kernels: then
it says so, and its tests are skipped with that reason.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.run import RSPLICE, Counts, Driver, Result, audit, environment, own_count

pytestmark = pytest.mark.privileged

PAGES = 211
SIZE = PAGES * 4096
TAIL = 101  #: of files that need no whole blocks
USER, DEVICE, REPLY = "user memory", "fuse device", "fuse reply"
REQUEST, FIXED_READ, FIXED_WRITE = "fuse request", "io_uring read_fixed", "io_uring write_fixed"
COMMAND = "io_uring uring_cmd"
ENABLE = Path("/sys/module/fuse/parameters/enable_uring")

#: Server, and bytes of its file beyond PAGES pages.
MODES = {
    "ring-copy": ("fuse_ring", TAIL),
    "ring-cached": ("fuse_ring", TAIL),
    "ring-zero": ("fuse_ring", TAIL),
    "direct-copy": ("fuse_ring", 0),
    "direct-zero": ("fuse_ring", 0),
    "write-copy": ("fuse_ring", 0),
    "write-zero": ("fuse_ring", 0),
    "ublk-copy": ("ublk_server", 0),
    "ublk-buffer": ("ublk_server", 0),
    "ublk-cached": ("ublk_server", 0),
    "ublk-zero": ("ublk_server", 0),
}


#: A server that says too early that a page is filled, and serves one page.
EARLY = "early-zero"


@dataclass
class Served:
    """One audit of a server in each mode, and of its client: processes named like the mode."""

    result: Result
    directory: Path

    def check(self, mode: str) -> None:
        """Skips the test where this kernel lacks what the mode is about."""
        status = int((self.directory / f"{mode}.status").read_text())
        said = (self.directory / f"{mode}.said").read_text()
        if status == 77:
            pytest.skip(said.splitlines()[0])
        assert status == 0, said

    def own(self, mode: str) -> Counts:
        return own_count(self.directory / f"{mode}.json")

    def counts(self, mode: str) -> Counts:
        return self.result.counts(mode) | self.result.counts(f"{mode}-r")

    def path(self, mode: str, source: str, destination: str, via: str) -> dict[str, Any]:
        (found,) = [
            p
            for p in self.result.paths(mode)
            if (p["source"], p["destination"], p["via"]) == (source, destination, via)
        ]
        return found

    def copied(self, mode: str) -> int:
        """Bytes that the CPU copied for the server, with all messages."""
        return sum(p["copy_bytes"] for p in self.result.paths(mode))

    @property
    def evidence(self) -> str:
        """How copies are known here."""
        return "measured" if self.measured else "inferred"

    @property
    def measured(self) -> list[str]:
        return list(self.result.json["accuracy"]["measured_at"])


@pytest.fixture(scope="module")
def over_ring() -> Iterator[None]:
    """FUSE may use io_uring meanwhile, where the kernel can."""
    before = ENABLE.read_text() if ENABLE.exists() else None
    if before:
        ENABLE.write_text("1")
    yield
    if before:
        ENABLE.write_text(before)


@pytest.fixture(scope="module")
def served(
    over_ring: None, driver: Driver, ext4: Path, tmp_path_factory: pytest.TempPathFactory
) -> Served:
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "ublk_drv"])  # without it the servers say what is missing
    directory = tmp_path_factory.mktemp("served")
    lines = []
    for mode, (server, tail) in {**MODES, EARLY: ("fuse_ring", 0)}.items():
        command = [driver.program.with_name(server), mode, "-n", 1 if mode == EARLY else PAGES]
        command += ["-d", ext4, "-o", directory / f"{mode}.json"]
        if server == "fuse_ring":
            command += ["-t", tail]
        said, status = directory / f"{mode}.said", directory / f"{mode}.status"
        lines.append(f"{shlex.join(map(str, command))} 2>{said}; echo $? >{status}\n")
    return Served(audit(["/bin/sh", "-c", "".join(lines)]), directory)


Mode = Callable[[str], Served]


@pytest.fixture
def mode(served: Served) -> Mode:
    def checked(mode: str) -> Served:
        served.check(mode)
        return served

    return checked


@pytest.mark.parametrize("name", MODES)
def test_counts_equal_the_servers_own(name: str, mode: Mode) -> None:
    """Each operation and each byte: of the server, of its client, and of the rings between."""
    served = mode(name)
    assert served.counts(name) == served.own(name)


@pytest.mark.parametrize("name", MODES)
def test_the_client_did_a_prime_number_of_operations(name: str, mode: Mode) -> None:
    whole = PAGES + (1 if MODES[name][1] else 0)
    (path,) = mode(name).result.paths(f"{name}-r")
    assert (path["operations"], path["payload_bytes"]) == (whole, SIZE + MODES[name][1])


@pytest.mark.parametrize(("name", "tail"), [("ring-zero", TAIL), ("direct-zero", 0)])
def test_the_device_fills_the_folios_of_the_request(name: str, tail: int, mode: Mode) -> None:
    """From the disk into the client's page cache, or memory: the server copies messages alone."""
    served = mode(name)
    read = served.path(name, "ext4 O_DIRECT", REQUEST, FIXED_READ)
    assert (read["payload_bytes"], read["direct"]) == (SIZE + tail, SIZE + tail)
    assert (read["copied"], read["copy_bytes"], read["unknown"]) == (0, 0, 0)
    assert read["operations"] == (served.own(name)[FIXED_READ, "ext4 O_DIRECT", REQUEST][0])
    assert served.copied(name) < 4096


@pytest.mark.parametrize("name", ["direct-zero"])
def test_one_read_is_one_request_without_a_page_cache(name: str, mode: Mode) -> None:
    read = mode(name).path(name, "ext4 O_DIRECT", REQUEST, FIXED_READ)
    assert read["operations"] == PAGES


@pytest.mark.parametrize("name", ["ring-cached"])
def test_from_a_page_cache_the_folios_are_copied_into(name: str, mode: Mode) -> None:
    """The same ring and the same folios: READ_FIXED of a file without O_DIRECT copies once."""
    served = mode(name)
    read = served.path(name, "ext4", REQUEST, FIXED_READ)
    assert read["payload_bytes"] == read["copied"] == read["copy_bytes"] == SIZE + TAIL
    assert read["evidence"] == served.evidence


@pytest.mark.parametrize(("name", "tail"), [("ring-copy", TAIL), ("direct-copy", 0)])
def test_the_twin_copies_every_byte_of_its_replies(name: str, tail: int, mode: Mode) -> None:
    served = mode(name)
    reply = served.path(name, USER, DEVICE, REPLY)
    assert reply["payload_bytes"] == served.own(name)[REPLY, USER, DEVICE][1] > SIZE + tail
    assert reply["copied"] == reply["copy_bytes"] == reply["payload_bytes"]
    assert reply["evidence"] == served.evidence


@pytest.mark.parametrize("name", ["write-zero"])
def test_the_device_drains_the_folios_of_a_write(name: str, mode: Mode) -> None:
    served = mode(name)
    write = served.path(name, REQUEST, "ext4 O_DIRECT", FIXED_WRITE)
    assert (write["operations"], write["payload_bytes"]) == (PAGES, SIZE)
    assert (write["direct"], write["copied"], write["copy_bytes"]) == (SIZE, 0, 0)
    assert served.path(name, DEVICE, USER, COMMAND)["payload_bytes"] < 4096


@pytest.mark.parametrize("name", ["write-copy"])
def test_the_twin_copies_every_byte_of_a_write(name: str, mode: Mode) -> None:
    served = mode(name)
    request = served.path(name, DEVICE, USER, COMMAND)
    assert SIZE < request["payload_bytes"] < SIZE + 4096
    assert request["copied"] == request["copy_bytes"] == request["payload_bytes"]
    assert request["evidence"] == served.evidence


@pytest.mark.parametrize("name", [EARLY])
def test_a_server_that_answers_too_early_changes_what_was_read(name: str, mode: Mode) -> None:
    """The client has seen it happen, or it would not have ended: the kernel does not wait."""
    served = mode(name)
    assert served.counts(name) == served.own(name)
    read = served.path(name, "pipe", REQUEST, FIXED_READ)
    how = "copied" if served.measured else "unknown"
    assert read["payload_bytes"] == read[how] == 4096


@pytest.mark.parametrize("name", ["ublk-zero"])
def test_the_device_fills_the_pages_of_a_ublk_request(name: str, mode: Mode) -> None:
    served = mode(name)
    read = served.path(name, "ext4 O_DIRECT", "ublk request", FIXED_READ)
    assert (read["payload_bytes"], read["direct"], read["copy_bytes"]) == (SIZE, SIZE, 0)
    assert served.copied(name) == 0


@pytest.mark.parametrize("name", ["ublk-cached"])
def test_from_a_page_cache_the_pages_of_a_ublk_request_are_copied_into(
    name: str, mode: Mode
) -> None:
    served = mode(name)
    read = served.path(name, "ext4", "ublk request", FIXED_READ)
    assert read["payload_bytes"] == read["copied"] == read["copy_bytes"] == SIZE
    assert read["evidence"] == served.evidence


@pytest.mark.parametrize("name", ["ublk-copy"])
def test_a_ublk_server_that_copies_copies_every_byte(name: str, mode: Mode) -> None:
    served = mode(name)
    write = served.path(name, USER, "ublk device", "pwrite64")
    # Older kernels look for partitions as well.
    assert write["payload_bytes"] == served.own(name)["pwrite64", USER, "ublk device"][1] >= SIZE
    assert write["copied"] == write["copy_bytes"] == write["payload_bytes"]
    assert write["evidence"] == served.evidence


@pytest.mark.parametrize("name", ["ublk-buffer"])
def test_what_ublk_copies_by_itself_is_no_leg(name: str, mode: Mode) -> None:
    """The command that answers a request copies: no other leg is blamed for it."""
    served = mode(name)
    assert served.copied(name) == 0
    (read,) = served.result.paths(name)
    assert (read["via"], read["direct"]) == ("pread64", read["payload_bytes"])


@pytest.mark.parametrize("name", ["ublk-copy", "ublk-buffer", "ublk-cached", "ublk-zero"])
def test_the_page_cache_of_a_ublk_disk_is_copied_out_of_once(name: str, mode: Mode) -> None:
    served = mode(name)
    read = served.path(f"{name}-r", "ublk disk", USER, "read")
    assert read["copied"] == read["copy_bytes"] == read["payload_bytes"] == SIZE
    assert read["evidence"] == served.evidence


@dataclass
class Workload:
    """A run of ``rsplice workload fuse``, audited."""

    result: Result
    own: dict[str, Any]

    def sums(self, comm: str) -> dict[str, int]:
        """What all paths of a process add up to."""
        names = ("payload_bytes", "copy_bytes", "copied", "moved", "direct", "unknown")
        return {n: sum(p[n] for p in self.result.paths(comm)) for n in names}


@pytest.fixture(scope="module")
def passthrough(ext4: Path) -> Workload:
    if not importlib.util.find_spec("rsplice._fuse"):
        pytest.skip("rsplice was built without libfuse3")
    options = ["--mode", "passthrough", "--size", str(SIZE), "--count", "1", "--threads", "1"]
    result = audit(
        [*RSPLICE, "workload", "fuse", *options, "--json"],
        env={**environment(), "TMPDIR": str(ext4)},
    )
    if result.status and "passthrough" in result.stderr.splitlines()[0]:
        pytest.skip(result.stderr.splitlines()[0])
    assert result.status == 0, result.stderr
    return Workload(result, json.loads(result.stdout))


def test_no_data_goes_through_the_server_of_a_passthrough_file(passthrough: Workload) -> None:
    """It copies messages: names, attributes, what it is linked with."""
    assert passthrough.own["reported"]["fuse_replies"] == 0
    files = [p for p in passthrough.result.paths("rsplice-fuse") if p["source"].startswith("ext4")]
    assert sum(p["payload_bytes"] for p in files) < SIZE / 100
    assert passthrough.sums("rsplice-fuse")["copy_bytes"] < SIZE / 10


def test_a_passthrough_file_is_copied_once_out_of_the_backing_files_cache(
    passthrough: Workload,
) -> None:
    (read,) = [
        p for p in passthrough.result.paths("rsplice-reader") if p["source"] == "fuse passthrough"
    ]
    assert read["payload_bytes"] == read["copied"] == read["copy_bytes"] == SIZE
    measured = passthrough.result.json["accuracy"]["measured_at"]
    assert read["evidence"] == ("measured" if measured else "inferred")
