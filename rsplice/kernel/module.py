# SPDX-License-Identifier: MIT
"""python -m rsplice.kernel.module [RELEASE]: builds the module rsplice_copies for a Debian kernel.

The module (tracers/kmod) tells of the kernel's copies at the copying functions themselves, which
BPF cannot be attached to. It is built once for each release, against headers that apt fetches and
verifies and that are not installed, and kept beside the kernels; its path is printed, for
insmod(8). It takes a compiler that knows the options the kernel was built with: Debian's own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rsplice.errors import RspliceError
from rsplice.kernel import cache
from rsplice.kernel.debian import SUITES, Apt, Unavailable

_SOURCES = Path(__file__).resolve().parents[1] / "tracers" / "kmod"
_NAME = "rsplice_copies.ko"
_SECONDS = 120


def build(release: str) -> Path:
    """The module for *release* (as uname(1) prints it), built now if it is not kept.

    :raises RspliceError: its headers cannot be had, or it does not build
    """
    kept = cache.directory().parent / "modules" / release / _NAME
    if kept.exists():
        return kept
    series = cache.series_of(release)
    problems = []
    for suite in SUITES.get(series, ()):
        with tempfile.TemporaryDirectory(prefix="rsplice-headers-") as scratch:
            try:
                tree = _headers(release, suite, Path(scratch))
            except Unavailable as problem:
                problems.append(f"{suite}: {problem}")
                continue
            made = _make(tree, Path(scratch) / "module")
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = kept.with_name(f"{_NAME}.{os.getpid()}")
            shutil.copyfile(made, new)
            new.replace(kept)
            return kept
    raise RspliceError(
        f"no headers of Linux {release} can be had from Debian"
        + (f": {'; '.join(problems)}" if problems else "")
    )


def _headers(release: str, suite: str, scratch: Path) -> Path:
    """A tree of headers that modules can be built in: Debian splits it in three packages."""
    apt = Apt(suite, scratch / "apt")
    flavour = release.rpartition("-")[2]  # "amd64"
    version = release.removesuffix(f"-{flavour}")
    unpacked = scratch / "unpacked"
    for package in (
        f"linux-headers-{version}-common",
        f"linux-headers-{release}",
        f"linux-kbuild-{version}",
    ):
        _run(("dpkg-deb", "-x", str(apt.download(package)), str(unpacked)))
    common = unpacked / f"usr/src/linux-headers-{version}-common"
    own = unpacked / f"usr/src/linux-headers-{release}"
    makefile = (common / "Makefile").read_bytes()
    for name in ("scripts", "tools"):  # links from one package into the other
        (own / name).unlink(missing_ok=True)
        (common / name).unlink(missing_ok=True)
    shutil.copytree(own, common, symlinks=True, dirs_exist_ok=True)
    (common / "Makefile").write_bytes(makefile)  # the flavour's includes the other by its path
    for name in ("scripts", "tools"):
        (kbuild,) = (unpacked / "usr/lib").glob("linux-kbuild-*")
        if (kbuild / name).is_dir():
            shutil.copytree(kbuild / name, common / name, symlinks=True, dirs_exist_ok=True)
    (common / "vmlinux").unlink(missing_ok=True)  # or the build asks for pahole
    return common


def _make(tree: Path, place: Path) -> Path:
    """The module, built in *place* against the headers in *tree*."""
    shutil.copytree(_SOURCES, place)
    _run(("make", "-s", "-C", str(tree), f"M={place}", "modules"))
    return place / _NAME


def _run(command: Sequence[str]) -> None:
    """RspliceError, with the first error it printed, if a command fails."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RspliceError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = done.stdout.splitlines()
        told = next((line for line in lines if "error" in line), (lines or ["it failed"])[-1])
        raise RspliceError(f"{command[0]}: {told.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rsplice.kernel.module")
    parser.description = "Builds the module rsplice_copies, and prints where it is."
    parser.add_argument(
        "release", nargs="?", default=os.uname().release, help="the running kernel's by default"
    )
    try:
        print(build(parser.parse_args().release))
    except RspliceError as error:
        print(f"rsplice: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
