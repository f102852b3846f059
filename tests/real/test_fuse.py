# SPDX-License-Identifier: MIT
"""FUSE replies: which pages became the file's page cache, by their identity at both ends.

The server counts what it does itself, and its client checks every byte it reads.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.run import Counts, Driver, Result, audit, named_here, own_count

pytestmark = pytest.mark.privileged

PAGES, TAIL = 211, 101  # more than one READ's worth
WHOLE = PAGES * 4096
SIZE = WHOLE + TAIL
USER, DEVICE, REPLY = "user memory", "fuse device", "fuse reply"

#: What answers from a pipe, and why nothing moves if so.
COPYING = {
    "splice-copy": "SPLICE_F_MOVE is not set",
    "splice-mapped": "the pages are in page tables",
    "direct-io": "the client has no page cache",
}
MODES = ["write", "splice", *COPYING, "broken"]


@dataclass
class Served:
    """One audit of all modes, each a process that is named like it."""

    result: Result
    directory: Path

    def own(self, mode: str) -> Counts:
        return own_count(self.directory / f"{mode}.json")

    def path(self, mode: str, source: str, destination: str, via: str) -> dict[str, Any]:
        (found,) = [
            p
            for p in self.result.paths(mode)
            if (p["source"], p["destination"], p["via"]) == (source, destination, via)
        ]
        return found

    def inserted(self, comm: str) -> int:
        (process,) = [p for p in self.result.json["processes"] if p["comm"] == comm]
        return int(process["page_cache"]["inserted_pages"])


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def serve(driver: Driver, ext4: Path, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Audits a run of each mode; skips where this kernel cannot mount FUSE, and says so."""
    server = driver.program.with_name("fuse_server")

    def run(*options: str) -> Served:
        directory = tmp_path_factory.mktemp("fuse")
        lines = []
        for mode in MODES:
            report = str(directory / f"{mode}.json")
            command = [server, mode, "-n", PAGES, "-t", TAIL, "-d", ext4, "-o", report]
            lines.append(f"{shlex.join(map(str, command))} || exit\n")
        result = audit(["/bin/sh", "-c", "".join(lines)], *options)
        if result.status == 77:
            pytest.skip(result.stderr.splitlines()[0])
        assert result.status == 0, result.stderr
        return Served(result, directory)

    return run


@pytest.fixture(scope="module")
def served(serve: Serve) -> Served:
    return serve()


@pytest.mark.parametrize("mode", MODES)
def test_counts_equal_the_servers_own(mode: str, served: Served) -> None:
    """Of the server and its client together; a reply's 16 bytes of header are no payload."""
    total = served.result.counts(mode) | served.result.counts(f"{mode}-r")
    assert total == served.own(mode)


def test_whole_pages_are_moved_and_only_the_tail_is_copied(served: Served) -> None:
    reply = served.path("splice", "pipe", DEVICE, REPLY)
    assert reply["operations"] > 3, "one READ asks for 64 pages at most"
    assert reply["payload_bytes"] == SIZE
    assert (reply["moved"], reply["copied"], reply["copy_bytes"]) == (WHOLE, TAIL, TAIL)
    assert reply["evidence"] == "identity"
    assert served.path("splice", "ext4 O_DIRECT", "pipe", "splice")["direct"] == SIZE


@pytest.mark.parametrize("mode", COPYING, ids=str)
def test_what_cannot_move_is_copied(mode: str, served: Served) -> None:
    reply = served.path(mode, "pipe", DEVICE, REPLY)
    assert (reply["moved"], reply["copied"], reply["payload_bytes"]) == (0, SIZE, SIZE)
    assert reply["evidence"] == served.result.evidence("identity")
    assert reply["why"]


def test_a_written_reply_is_copied(served: Served) -> None:
    reply = served.path("write", USER, DEVICE, REPLY)
    assert reply["payload_bytes"] > SIZE, "the other replies are written too"
    assert (reply["moved"], reply["copied"]) == (0, reply["payload_bytes"])


def test_a_reply_without_pages_is_not_judged_by_those_of_a_read_that_failed(
    served: Served,
) -> None:
    reply = served.path("broken", "pipe", DEVICE, REPLY)
    how = "copied" if served.result.measures else "unknown"
    assert reply[how] == reply["payload_bytes"] > 0


@pytest.mark.parametrize("mode", ["write", "splice", "splice-copy", "splice-mapped"])
def test_each_page_enters_the_clients_page_cache_once(mode: str, served: Served) -> None:
    assert served.inserted(f"{mode}-r") == PAGES + 1


def test_direct_io_puts_nothing_into_a_page_cache(served: Served) -> None:
    assert served.inserted("direct-io-r") == 0


def test_reads_without_a_page_cache_are_not_taken_for_copies_out_of_it(served: Served) -> None:
    """The reply has copied into the client's own pages already."""
    assert served.path("direct-io-r", named_here("fuse O_DIRECT"), USER, "read")["unknown"] == SIZE
    assert served.path("write-r", named_here("fuse"), USER, "read")["copied"] == SIZE


def test_without_identity_a_spliced_reply_is_unknown(serve: Serve) -> None:
    without = serve("--identity", "off")
    reply = without.path("splice", "pipe", DEVICE, REPLY)
    assert (reply["unknown"], reply["payload_bytes"]) == (SIZE, SIZE)
    reply = without.path("write", USER, DEVICE, REPLY)
    assert (reply["copied"], reply["evidence"]) == (reply["payload_bytes"], "inferred")
