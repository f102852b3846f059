# SPDX-License-Identifier: MIT
"""python -m rsplice.kernel.module [RELEASE]: builds the module rsplice_copies for a Debian kernel.

The module (tracers/kmod) tells of the kernel's copies at the copying functions themselves, which
BPF cannot be attached to. It is built with the kernel's own compiler against its own headers, in
a root directory that holds these and nothing more: apt fetches and verifies the packages (150 to
250 MB), none is installed. It is built once for each release and kept beside the kernels; its
path is printed, for insmod(8).
"""

from __future__ import annotations

import argparse
import os
import shlex
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
#: Before 5.14 files are written by iov_iter_copy_from_user_atomic(), which it does not know.
_TOO_OLD = ("5.10",)


#: What a build calls beside the compiler, which the headers depend on.
_TOOLS = "base-files binutils dash coreutils sed grep mawk findutils make"


def build(release: str) -> Path:
    """The module for *release* (as uname(1) prints it), built now if it is not kept.

    :raises RspliceError: its headers cannot be had, or it does not build, or is not for so old ones
    """
    if cache.series_of(release) in _TOO_OLD:
        raise RspliceError(f"the module is for Linux 6.1 and later, and that is {release}")
    kept = cache.directory().parent / "modules" / release / _NAME
    if kept.exists():
        return kept
    problems = []
    for suite in SUITES.get(cache.series_of(release), ()):
        with tempfile.TemporaryDirectory(prefix="rsplice-headers-") as scratch:
            try:
                root = _root(release, suite, Path(scratch))
            except Unavailable as problem:
                problems.append(f"{suite}: {problem}")
                continue
            made = _make(root, release)
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = kept.with_name(f"{_NAME}.{os.getpid()}")
            shutil.copyfile(made, new)
            new.replace(kept)
            return kept
    raise RspliceError(
        f"no headers of Linux {release} can be had from Debian"
        + (f": {'; '.join(problems)}" if problems else "")
    )


def _root(release: str, suite: str, scratch: Path) -> Path:
    """A root directory in which modules for *release* can be built."""
    apt = Apt(suite, scratch / "apt", whole=True)
    packages = apt.download_all((f"linux-headers-{release}", *_TOOLS.split()))
    root = scratch / "root"
    root.mkdir()
    # base-files has the links /bin and /lib, where the suite has them: they come first.
    for package in sorted(packages, key=lambda each: not each.name.startswith("base-files_")):
        unpack = f"dpkg-deb --fsys-tarfile {shlex.quote(str(package))} | "
        _run(("sh", "-c", unpack + f"tar -x --keep-directory-symlink -C {shlex.quote(str(root))}"))
        package.unlink()
    (root / "usr/bin/awk").symlink_to("mawk")  # which the package does when it is installed
    headers = root / "usr/src" / f"linux-headers-{release}"
    (headers / "vmlinux").unlink(missing_ok=True)  # or types are made for the module: minutes
    return root


def _make(root: Path, release: str) -> Path:
    """The module, built in *root*; who is not root has a user namespace for it."""
    place = root / "module"
    shutil.copytree(_SOURCES, place)
    binds = 'for each in dev proc; do mount --rbind "/$each" "$0/$each" || exit; done'
    script = f'{binds}; exec chroot "$0" "$@"'
    unshare = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    make = ("make", "-s", "-C", f"/usr/src/linux-headers-{release}", "M=/module", "modules")
    _run((*unshare, "sh", "-c", script, str(root), *make))
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
