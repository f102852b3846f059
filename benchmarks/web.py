# SPDX-License-Identifier: MIT
"""Requests per second that nginx with sendfile serves, untraced and followed by an audit."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.stats import fewer_per_cent, paired, summarize
from benchmarks.tracers import AUDIT, ROOT, Unavailable, end, require

SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20}
LOAD = ("wrk", "-t1", "-c8")

_CONFIGURATION = """\
daemon off;
master_process off;
pid {directory}/nginx.pid;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 100000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{ listen 127.0.0.1:{port}; root {directory}/www; }}
}}
"""


def measure(
    directory: Path, floor: Path, rounds: int, seconds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Requests per second by file size: untraced, under an empty program, audited. Unavailable.

    :param floor: the built floor.c
    """
    require(("nginx", "wrk"))
    port = _prepare(directory)
    nginx = ("nginx", "-e", f"{directory}/error.log", "-c", f"{directory}/nginx.conf")
    ways = {
        "untraced": nginx,
        "floor": (str(floor), *nginx),
        "audited": (*AUDIT, "--", *nginx),
    }
    rates: dict[str, dict[str, list[float]]] = {s: {w: [] for w in ways} for s in SIZES}
    for number in range(rounds):
        for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
            say(f"nginx, round {number + 1} of {rounds}: {way}")
            with _serving(ways[way], directory, port):
                for size in SIZES:
                    rates[size][way].append(_load(port, SIZES[size], seconds))
    return {size: compare(rates[size]) for size in SIZES}


def compare(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the rates, and by how many per cent those of a tracer are lower."""
    row: dict[str, Any] = {way: summarize(each).to_json() for way, each in rates.items()}
    for way in ("floor", "audited"):
        fewer = paired(rates["untraced"], rates[way], fewer_per_cent)
        row[f"{way}_fewer_per_cent"] = fewer.to_json()
    return row


def parse_rate(output: str) -> float:
    """Requests per second from what wrk prints. Unavailable if requests failed."""
    match = re.search(r"^Requests/sec: +([\d.]+)$", output, re.MULTILINE)
    if not match or "Non-2xx" in output or "Socket errors" in output:
        raise Unavailable("wrk saw failed requests")
    return float(match[1])


def _prepare(directory: Path) -> int:
    (directory / "www").mkdir()
    for size in SIZES.values():
        (directory / "www" / str(size)).write_bytes(os.urandom(size))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    text = _CONFIGURATION.format(directory=directory, port=port)
    (directory / "nginx.conf").write_text(text)
    return port


@contextmanager
def _serving(command: tuple[str, ...], directory: Path, port: int) -> Iterator[None]:
    output = directory / "output"
    with (
        output.open("wb") as file,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT
        ) as process,
    ):
        try:
            _wait_for(process, port, output)
            yield
        finally:
            _stop(process, directory / "nginx.pid")


def _wait_for(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    lines = output.read_text(errors="replace").strip().splitlines()
    raise Unavailable(f"nginx did not start: {lines[-1] if lines else 'no word'}")


def _stop(process: subprocess.Popen[bytes], pid_file: Path) -> None:
    """Ends nginx itself, as its user would; an audit around it then ends too."""
    try:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    except (OSError, ValueError):
        process.terminate()
    end(process)


def _load(port: int, size: int, seconds: int) -> float:
    url = f"http://127.0.0.1:{port}/{size}"
    done = subprocess.run([*LOAD, f"-d{seconds}s", url], capture_output=True, text=True)
    return parse_rate(done.stdout)
