# SPDX-License-Identifier: MIT
"""recvpage under audit: one copy of each byte on its way into the page cache, or two."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.run import Counts, Result, audit, counts_of, environment, named_here

pytestmark = pytest.mark.privileged

MEMORY, DEVICE, REPLY = "user memory", "fuse device", "fuse reply"
FILESYSTEM, SERVER, READER = "rsplice-recvpg", "rsplice-server", "rsplice-reader"
HEADER = 16  #: bytes of struct fuse_out_header, which goes into the pipe in front of the pages
COUNT, SIZE = 211, 70_001


@dataclass
class Audited:
    """One run of the workload: the audit's word, and its own."""

    result: Result
    own: Counts
    reported: dict[str, int]

    @property
    def payload(self) -> int:
        return self.reported["fuse_payload"]

    def path(self, source: str, destination: str, via: str) -> dict[str, Any]:
        """That path of the filesystem's process."""
        (found,) = [
            p
            for p in self.result.paths(FILESYSTEM)
            if (p["source"], p["destination"], p["via"]) == (source, destination, via)
        ]
        return found


def run(mode: str, scratch: Path) -> Audited:
    workload = [sys.executable, "-m", "rsplice", "workload", "recvpage", "--json", "--mode", mode]
    sizes = ["--size", str(SIZE), "--count", str(COUNT), "--threads", "2"]
    result = audit([*workload, *sizes], env={**environment(), "TMPDIR": str(scratch)})
    assert result.status == 0, result.stderr
    said = json.loads(result.stdout)
    return Audited(result, counts_of(said["calls"]), said["reported"])


@pytest.fixture(scope="module", params=["rsplice", "copy"])
def mode(request: pytest.FixtureRequest) -> str:
    if not importlib.util.find_spec("rsplice._fuse"):
        pytest.skip("rsplice was built without libfuse3")
    return str(request.param)


@pytest.fixture(scope="module")
def audited(mode: str, ext4: Path) -> Audited:
    return run(mode, ext4)


def test_own_counts_are_what_the_audit_saw(audited: Audited) -> None:
    """Of the readers, of the server, and of what the filesystem says to the server."""
    counts = audited.result.counts()
    assert audited.own == {key: counts[key] for key in audited.own}
    assert audited.own["readv", named_here("fuse"), MEMORY] == (COUNT, COUNT * SIZE)
    assert {key[0] for key in audited.own} == {"readv", "recvfrom", "sendto", "sendfile"}
    assert audited.result.json["accuracy"]["events_lost"] == 0


def test_each_byte_is_copied_once_or_twice(audited: Audited, mode: str) -> None:
    """Exactly, by the process that puts it into the page cache; headers are told apart."""
    received = audited.path("tcp", MEMORY, "recvfrom")
    written = audited.path(MEMORY, DEVICE, REPLY)
    _, headers = audited.result.counts(SERVER)["sendto", MEMORY, "tcp"]
    copies = {
        "received": received["copy_bytes"] - headers,
        "written": written["copy_bytes"] - audited.reported["fuse_control_bytes"],
    }
    replies, payload = audited.reported["fuse_replies"], audited.payload
    assert payload >= COUNT * SIZE
    if mode == "copy":
        assert copies == {"received": payload, "written": payload}
        assert written["operations"] == replies + audited.reported["fuse_control_replies"]
        assert not [p for p in audited.result.paths(FILESYSTEM) if p["via"] == "splice"]
        return
    assert copies == {"received": 0, "written": 0}
    spliced = audited.path("pipe", DEVICE, REPLY)
    assert (spliced["operations"], spliced["payload_bytes"]) == (replies, payload)
    assert (spliced["copied"], spliced["copy_bytes"]) == (payload, payload)
    assert spliced["evidence"] == audited.result.evidence("identity")
    lent = audited.path("tcp", "pipe", "splice")
    assert (lent["payload_bytes"], lent["shared"], lent["copy_bytes"]) == (payload, payload, 0)
    # Kept until the kernel has taken the reply, then dropped: no byte is touched.
    assert audited.path("pipe", "pipe", "tee")["shared"] == payload
    assert audited.path("pipe", "/dev/null", "splice")["discarded"] == payload
    assert audited.path(MEMORY, "pipe", "write")["copy_bytes"] - HEADER * replies in range(HEADER)
    assert audited.reported["fuse_copied"] == payload


def test_the_pages_enter_the_page_cache_of_the_readers(audited: Audited) -> None:
    inserted = sum(
        p["page_cache"]["inserted_pages"]
        for p in audited.result.json["processes"]
        if p["comm"] == READER
    )
    assert inserted >= audited.payload // 4096


def test_the_server_copies_nothing_but_headers(audited: Audited) -> None:
    (sent,) = [p for p in audited.result.paths(SERVER) if p["via"] == "sendfile"]
    assert (sent["source"], sent["destination"]) == ("ext4", "tcp")
    assert sent["payload_bytes"] == 2 * audited.payload, "both halves count"
    assert sent["copied"] == sent["copy_bytes"] == 0
