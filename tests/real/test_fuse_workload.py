# SPDX-License-Identifier: MIT
"""rsplice audit of ``rsplice workload fuse``: which pages of which mode became the page cache."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rsplice.workloads import WORKLOADS
from rsplice.workloads.fuse import make_tree
from tests.support.run import RSPLICE, Counts, Result, audit, counts_of, environment, named_here

pytestmark = pytest.mark.privileged

PAGE = 4096
SIZE = 211 * PAGE  # more than one READ's worth
SERVER, READER = "rsplice-fuse", "rsplice-reader"
USER, PIPE, DEVICE, REPLY = "user memory", "pipe", "fuse device", "fuse reply"
MODES = WORKLOADS["fuse"].modes
#: What the server tells its watchdog, through a pipe.
TOLD = ("write", USER, PIPE)
TOLD_BYTES = 8
#: Of librsplice itself, which the workload does not count.
LIBRARY = {("splice", "pipe", "pipe"), ("splice", "ext4 O_DIRECT", "pipe")}


@dataclass
class Run:
    """An audited run, and what the workload said itself."""

    result: Result
    own: dict[str, Any]
    sizes: list[int]  #: of the files that were read, in this order, from a cold cache

    def path(self, comm: str, source: str, destination: str, via: str) -> dict[str, Any]:
        (found,) = [
            p
            for p in self.result.paths(comm)
            if (p["source"], p["destination"], p["via"]) == (source, destination, via)
        ]
        return found

    @property
    def own_counts(self) -> Counts:
        return counts_of(self.own["calls"])

    @property
    def shown(self) -> str:
        """What the audit calls a file of the mount."""
        return "fuse passthrough" if self.own["mode"] == "passthrough" else named_here("fuse")

    @property
    def payload(self) -> int:
        return sum(self.sizes)

    @property
    def tails(self) -> int:
        """Bytes in pages that are not whole."""
        return sum(size % PAGE for size in self.sizes)

    def inserted(self, comm: str) -> int:
        (process,) = [p for p in self.result.json["processes"] if p["comm"] == comm]
        return int(process["page_cache"]["inserted_pages"])


Runs = Callable[[str], Run]


@pytest.fixture(scope="module")
def runs(ext4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Audits each mode once: every file of the tree read by one reader, one after the other."""
    if not importlib.util.find_spec("rsplice._fuse"):
        pytest.skip("rsplice was built without libfuse3")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error.strerror}")
    sizes = [f.size for f in make_tree(tmp_path_factory.mktemp("tree") / "source", SIZE)]
    done: dict[str, Run] = {}

    def run(mode: str) -> Run:
        if mode not in done:
            options = ["--mode", *mode.split(), "--size", str(SIZE), "--count", str(2 * len(sizes))]
            result = audit(
                [*RSPLICE, "workload", "fuse", *options, "--threads", "1", "--json"],
                env={**environment(), "TMPDIR": str(ext4)},
            )
            if "passthrough" in result.stderr.splitlines()[0] and result.status:
                pytest.skip(result.stderr.splitlines()[0])
            assert result.status == 0, result.stderr
            done[mode] = Run(result, json.loads(result.stdout), 2 * sizes)
        return done[mode]

    yield run


@pytest.mark.parametrize("mode", MODES)
def test_the_workloads_own_count_is_the_audits(mode: str, runs: Runs) -> None:
    """Of the server's calls that answer READs, and of the reader's."""
    run = runs(mode)
    seen = {**run.result.counts(SERVER), **run.result.counts(READER)}
    seen[TOLD] = (seen[TOLD][0] - 1, seen[TOLD][1] - TOLD_BYTES)
    for key, counted in run.own_counts.items():
        if key == (REPLY, USER, DEVICE):
            # Answers to other requests are written too.
            assert seen[key][0] > counted[0] and seen[key][1] > counted[1]
        else:
            assert seen[key] == counted, key
    assert run.own_counts["readv", run.shown, USER][1] == run.payload
    if mode == "rsplice":
        assert seen.keys() >= LIBRARY
    else:
        assert not LIBRARY & seen.keys()


def test_rsplice_moves_each_whole_page_and_copies_the_tails_alone(runs: Runs) -> None:
    run = runs("rsplice")
    reply = run.path(SERVER, PIPE, DEVICE, REPLY)
    assert run.tails > 0
    assert reply["payload_bytes"] == run.payload
    assert (reply["moved"], reply["copied"]) == (run.payload - run.tails, run.tails)
    assert reply["copy_bytes"] == run.tails
    assert reply["evidence"] == "identity"
    filled = run.path(SERVER, "ext4 O_DIRECT", PIPE, "splice")
    assert filled["copied"] == 0
    reported = run.own["reported"]
    assert (reported["fuse_moved"], reported["fuse_copied"]) == (reply["moved"], reply["copied"])


def test_what_reading_ahead_has_copied_is_told_by_both(runs: Runs) -> None:
    run = runs("rsplice --readahead 1016K")
    reply = run.path(SERVER, PIPE, DEVICE, REPLY)
    reported = run.own["reported"]
    assert (reported["fuse_moved"], reported["fuse_copied"]) == (reply["moved"], reply["copied"])
    assert reply["evidence"] == "identity"
    assert reply["copied"] % PAGE == run.tails % PAGE
    assert run.tails < reply["copied"] < run.payload // 4


def test_rsplice_leaves_the_sources_pages_out_of_the_cache(runs: Runs) -> None:
    """Its twin reads them into the page cache, in the server."""
    assert runs("rsplice").inserted(SERVER) < 23
    assert runs("copy").inserted(SERVER) >= runs("copy").payload // PAGE


def test_copy_copies_twice(runs: Runs) -> None:
    run = runs("copy")
    read = run.path(SERVER, "ext4", USER, "pread64")
    assert (read["copied"], read["moved"]) == (read["payload_bytes"], 0)
    reply = run.path(SERVER, USER, DEVICE, REPLY)
    assert (reply["copied"], reply["moved"]) == (reply["payload_bytes"], 0)
    assert reply["payload_bytes"] > run.payload, "with the other replies"


def test_splice_lends_the_page_cache_and_copies_what_it_cannot_steal(runs: Runs) -> None:
    """Single clean pages are taken away from the source; large folios and tails are copied."""
    run = runs("splice")
    lent = run.path(SERVER, "ext4", PIPE, "splice")
    assert lent["shared"] == lent["payload_bytes"] == run.payload
    reply = run.path(SERVER, PIPE, DEVICE, REPLY)
    moves = reply["moved"] > 0
    assert reply["evidence"] == ("identity" if moves else run.result.evidence("identity"))
    assert reply["copied"] + reply["moved"] == reply["payload_bytes"] == run.payload
    assert reply["copied"] >= run.tails
    assert reply["moved"] % PAGE == 0
    assert runs("splice").inserted(SERVER) >= run.payload // PAGE


def test_passthrough_leaves_the_server_out(runs: Runs) -> None:
    run = runs("passthrough")
    from_disk = [p for p in run.result.paths(SERVER) if p["source"].startswith("ext4")]
    assert sum(p["payload_bytes"] for p in from_disk) < run.payload / 100, "libraries at most"
    assert run.own["reported"]["fuse_replies"] == 0
    assert run.path(READER, run.shown, USER, "readv")["payload_bytes"] == run.payload


def test_the_readers_own_copy_is_the_same_in_every_mode(runs: Runs) -> None:
    for mode in MODES:
        read = runs(mode).path(READER, runs(mode).shown, USER, "readv")
        assert (read["copied"], read["moved"]) == (runs(mode).payload, 0)
