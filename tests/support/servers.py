# SPDX-License-Identifier: MIT
"""Servers on 127.0.0.1, and how to know that they serve."""

from __future__ import annotations

import socket
import time
from pathlib import Path


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_for_port(port: int, seconds: float = 20) -> None:
    """Returns when something listens on *port*; TimeoutError if nothing does in time.

    The table of sockets is read, since a connection would be one more for the server to serve.
    """
    listening = f"0100007F:{port:04X} 00000000:0000 0A"
    until = time.monotonic() + seconds
    while listening not in Path("/proc/net/tcp").read_text():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing listens on port {port}")
        time.sleep(0.02)


def nginx_config(directory: Path, root: Path, port: int, *, sendfile: bool) -> Path:
    """Writes a configuration that serves *root* from one process in the foreground."""
    config = directory / "nginx.conf"
    temporary = "\n".join(
        f"    {module}_temp_path {directory}/{module};"
        for module in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"""daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log stderr crit;
events {{}}
http {{
    access_log off;
    sendfile {"on" if sendfile else "off"};
{temporary}
    server {{
        listen 127.0.0.1:{port};
        root {root};
    }}
}}
"""
    )
    return config
