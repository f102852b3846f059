# SPDX-License-Identifier: MIT
"""A real project's tests: those of aiofiles, which move files and sockets with asyncio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Pinned: this very file, so that what is run does not change.
NAME, VERSION = "aiofiles", "25.1.0"
SHA256 = "a8d728f0a29de45dc521f18f07297428d56992a742f0cd2701ba86e44d23d5b2"


def fetch(folder: Path) -> Path:
    """The unpacked source distribution, from the package index that pip is set up for.

    :raises OSError: it cannot be fetched
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    _run([*command, "--no-deps", "--no-binary", NAME, "-d", str(folder), "-r", str(wanted)])
    archive = str(folder / f"{NAME}-{VERSION}.tar.gz")
    _run(["tar", "-xzf", archive, "--no-same-owner", "-C", str(folder)])
    return folder / f"{NAME}-{VERSION}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        why = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise OSError(f"{NAME} {VERSION} cannot be fetched: {why}")
