# SPDX-License-Identifier: MIT
"""The initramfs of the small VM: an init, the modules to reach this machine's files, the job."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rsplice.errors import RspliceError
from rsplice.kernel.cache import Kernel, directory
from rsplice.kernel.image import decompressed

_INIT = Path(__file__).with_name("init.c")
#: Where init.c and the command find what is theirs.
OWN = "/run/rsplice"
PORTS = f"{OWN}/ports"

#: What the guest needs before it has a root, with whatever these depend on. One that a kernel has
#: built in, or does not have, is passed over.
_MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "9pnet_virtio",
    "9p",
    "crc32c_generic",
    "ext4",
    "overlay",
)
_NETWORK_MODULES = ("virtio_net",)


@dataclass
class Job:
    """What the guest is to do.

    :param argv: the command, as bytes that execve(2) takes
    :param cwd: an absolute directory of this machine
    :param environment: the command's
    :param ports: further ports, that the command finds below PORTS
    :param shown: directories that are seen though what they lie in, /tmp for one, is empty
    :param files: what the command finds below OWN
    """

    argv: list[bytes]
    cwd: bytes
    environment: Mapping[bytes, bytes]
    host: bytes = b"rsplice"
    network: bool = False
    ports: Sequence[str] = ()
    shown: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


def build(kernel: Kernel, job: Job) -> bytes:
    """The whole archive: the kernel unpacks several that follow each other."""
    names = (*_MODULES, *(_NETWORK_MODULES if job.network else ()))
    paths, modules = _modules_archive(kernel, names)
    own = {"modprobe": f'#!/bin/sh\nexec modprobe -d {OWN} "$@"\n'.encode(), **job.files}
    files = {
        "init": _init(),
        "job": _text(kernel, job, paths),
        **{f"rsplice/{name}": content for name, content in own.items()},
    }
    return modules + _archive(files)


def _text(kernel: Kernel, job: Job, modules: Iterable[str]) -> bytes:
    lines = [f"module=/{path}".encode() for path in modules]
    lines += [
        b"modules=" + os.fsencode(kernel.modules),
        b"cwd=" + job.cwd,
        b"host=" + job.host,
        *([b"network=1"] if job.network else []),
        *(b"show=" + os.fsencode(path) for path in job.shown),
        *(b"port=" + os.fsencode(name) for name in job.ports),
        *(b"env=" + name + b"=" + value for name, value in job.environment.items()),
        *(b"arg=" + word for word in job.argv),
    ]
    return b"".join(line + b"\0" for line in lines)


# --- the init -------------------------------------------------------------------------------------


def _init() -> bytes:
    """The init, compiled now or before."""
    source = _INIT.read_bytes()
    path = directory() / f"init-{hashlib.sha256(source).hexdigest()[:16]}"
    with suppress(FileNotFoundError):
        return path.read_bytes()
    with tempfile.TemporaryDirectory(prefix=".init-", dir=directory()) as place:
        made = Path(place) / "init"
        try:
            done = subprocess.run(
                ("cc", "-static", "-O2", "-o", made, _INIT), capture_output=True, text=True
            )
        except FileNotFoundError:
            raise RspliceError("no C compiler for the guest's init: install gcc") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["cc failed"]
            why = [line for line in lines if "error" in line] or lines
            raise RspliceError(
                "the guest's init cannot be compiled: install gcc and a static libc (libc6-dev; "
                f"Fedora: glibc-static): {why[0]}"
            )
        os.replace(made, path)
    return path.read_bytes()


# --- modules --------------------------------------------------------------------------------------


def _modules_archive(kernel: Kernel, names: Iterable[str]) -> tuple[list[str], bytes]:
    """Where the modules *names*, and those they need, lie in an archive, in order; and that."""
    wanted = _in_order(_dependencies(kernel.modules), names)
    inside = [f"modules/{Path(path).name.partition('.')[0]}.ko" for path in wanted]
    kept = kernel.directory / f"modules-{hashlib.sha256(repr(inside).encode()).hexdigest()[:16]}"
    with suppress(FileNotFoundError):
        return inside, kept.read_bytes()
    contents = [decompressed((kernel.modules / path).read_bytes()) for path in wanted]
    archive = _archive(dict(zip(inside, contents, strict=True)))
    fd, made = tempfile.mkstemp(dir=kernel.directory)
    with open(fd, "wb") as file:
        file.write(archive)
    os.replace(made, kept)
    return inside, archive


def _dependencies(modules: Path) -> dict[str, list[str]]:
    """modules.dep: a module's name -> what to load, in order: those it needs, and its file."""
    found = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        found[_name(path)] = [*reversed(needed.split()), path]
    return found


def _in_order(dependencies: Mapping[str, list[str]], names: Iterable[str]) -> list[str]:
    ordered: dict[str, None] = {}
    for name in names:
        ordered.update(dict.fromkeys(dependencies.get(name, ())))
    return list(ordered)


def _name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


# --- cpio -----------------------------------------------------------------------------------------


def _archive(files: Mapping[str, bytes]) -> bytes:
    """A cpio archive as the kernel takes it: Documentation/driver-api/early-userspace/
    buffer-format.rst, newc. All files may be executed; their directories come first."""
    parts = []
    directories: dict[str, None] = {}
    for name in files:
        for parent in reversed(Path(name).parents[:-1]):
            directories[str(parent)] = None
    for number, name in enumerate(directories, 1):
        parts.append(_entry(number, name, stat.S_IFDIR | 0o755, b""))
    for number, (name, content) in enumerate(files.items(), len(directories) + 1):
        parts.append(_entry(number, name, stat.S_IFREG | 0o755, content))
    parts.append(_entry(0, "TRAILER!!!", 0, b""))
    return b"".join(parts)


def _entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % each for each in fields) + encoded
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


# --- the disk -------------------------------------------------------------------------------------


def scratch(mebibytes: int) -> Path:
    """A disk image with an empty ext4; it takes next to no space, and is never written to."""
    path = directory() / f"scratch-{mebibytes}.ext4"
    if path.exists():
        return path
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    mkfs = shutil.which("mkfs.ext4", path=search)
    if not mkfs:
        raise RspliceError("mkfs.ext4 is not installed: install e2fsprogs")
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=directory()) as place:
        made = Path(place) / "disk"
        with open(made, "wb") as file:
            file.truncate(mebibytes << 20)
        done = subprocess.run(
            (mkfs, "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", made),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RspliceError(f"mkfs.ext4: {done.stderr.strip()}")
        os.replace(made, path)
    return path
