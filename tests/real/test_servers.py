# SPDX-License-Identifier: MIT
"""Web servers and curl, each audited on its own: 0 copies at a sendfile server, one at curl."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.attached import wait_for_command
from tests.support.filesystems import Scratch
from tests.support.independent import CrossChecked, cross_check
from tests.support.run import Result, audit
from tests.support.servers import free_port, nginx_config, wait_for_port

pytestmark = pytest.mark.privileged

USER = "user memory"
REQUESTS = 23
SIZE = 65536 + 101
Needs = Callable[..., None]


@dataclass
class Nginx:
    """An nginx under audit, which ends when ``finish()`` is called."""

    port: int
    audited: CrossChecked

    def finish(self) -> Result:
        """Stops nginx; its audit, compared with strace."""
        os.kill(wait_for_command(self.audited.running.pid, "nginx"), signal.SIGQUIT)
        result, _ = self.audited.finish()
        assert result.status == 0, result.stderr
        return result


@pytest.fixture
def www(scratch: Scratch) -> Path:
    """A directory whose www/ holds one clean file."""
    (scratch.path / "www").mkdir()
    scratch.file("www/page", SIZE)
    return scratch.path


@pytest.fixture
def nginx(www: Path, tmp_path: Path, needs: Needs) -> Callable[[bool], Nginx]:
    needs("nginx", "curl", "strace")

    def start(sendfile: bool) -> Nginx:
        port = free_port()
        config = nginx_config(tmp_path, www / "www", port, sendfile=sendfile)
        audited = CrossChecked(["nginx", "-p", tmp_path, "-e", "stderr", "-c", config])
        wait_for_port(port)
        return Nginx(port, audited)

    return start


def curl(port: int) -> list[str]:
    """23 requests over one connection, to /dev/null."""
    return [
        "curl",
        "-sS",
        "--no-buffer",
        "-o",
        "/dev/null",
        f"http://127.0.0.1:{port}/page?[1-{REQUESTS}]",
    ]


def test_nginx_with_sendfile_copies_nothing_and_curl_once(
    nginx: Callable[[bool], Nginx], scratch: Scratch
) -> None:
    server = nginx(True)
    client, _ = cross_check(curl(server.port))
    result = server.finish()

    sent = result.path(scratch.kind, "tcp", "sendfile")
    assert sent["operations"] >= REQUESTS
    assert sent["payload_bytes"] == 2 * REQUESTS * SIZE, "both halves count"
    assert (sent["shared"], sent["copied"], sent["copy_bytes"]) == (2 * REQUESTS * SIZE, 0, 0)
    assert sent["evidence"] == "identity"
    assert sent["avoided_bytes"] == 2 * REQUESTS * SIZE
    assert {p["via"] for p in result.paths() if p["source"] == scratch.kind} == {"sendfile"}

    received = client.path("tcp", USER, "recvfrom")
    assert received["copied"] == received["payload_bytes"] == received["copy_bytes"]
    headers = received["payload_bytes"] - REQUESTS * SIZE
    assert 0 < headers < REQUESTS * 1000


def test_nginx_without_sendfile_copies_twice(
    nginx: Callable[[bool], Nginx], scratch: Scratch
) -> None:
    """The twin: the same requests, a copy in and a copy out."""
    server = nginx(False)
    audit(curl(server.port))
    result = server.finish()
    read = result.path(scratch.kind, USER, "pread64")
    assert read["copied"] == read["payload_bytes"] == REQUESTS * SIZE
    assert result.path(USER, "tcp", "writev")["copied"] > REQUESTS * SIZE
    assert not [p for p in result.paths() if p["via"] == "sendfile"]


def test_python_http_server(www: Path, scratch: Scratch, needs: Needs) -> None:
    needs("curl", "strace")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "-b",
        "127.0.0.1",
        "-d",
        str(www / "www"),
    ]
    audited = CrossChecked(command)
    wait_for_port(port)
    client = audit(curl(port))
    os.kill(wait_for_command(audited.running.pid, Path(sys.executable).name), signal.SIGTERM)
    result, _ = audited.finish()
    assert result.status == 128 + signal.SIGTERM
    assert result.path(scratch.kind, USER, "read")["copied"] == REQUESTS * SIZE
    assert result.path(USER, "tcp", "sendto")["copied"] > REQUESTS * SIZE
    assert client.path("tcp", USER, "recvfrom")["copied"] > REQUESTS * SIZE
