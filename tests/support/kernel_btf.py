# SPDX-License-Identifier: MIT
"""The BTF of kernels that are not running: taken out of Debian's kernel packages, and cached.

The packages are downloaded from the mirror that this machine's apt is set up for, checked by
apt's signatures, and never installed. What stays in the cache is the BTF alone, a few MB a kernel:
``btf-<release>`` (vmlinux) and ``btf-<release>-fuse`` (the module, split BTF). A second run needs
no network.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import lzma
import os
import re
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

#: Kernel series -> the Debian suites that carry it; the first has the smallest index.
SUITES: dict[str, tuple[str, ...]] = {
    "5.10": ("bullseye-security", "bullseye"),
    "6.1": ("bookworm-security", "bookworm"),
    "6.12": ("bookworm-security", "trixie"),
    "7.2": ("trixie-backports", "sid"),
    "7.3": ("trixie-backports", "sid"),
}

#: For machines whose own apt knows no Debian mirror: the address of one.
MIRROR_VARIABLE = "RSPLICE_DEBIAN_MIRROR"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_COMMAND_SECONDS = 100
_DOWNLOADS = 3  # at a time


class Unavailable(Exception):
    """A kernel's BTF cannot be had here; the message says why."""


@dataclass(frozen=True)
class KernelBtf:
    """The BTF of one kernel, as files.

    :param release: as uname(1) prints it
    :param vmlinux: raw BTF of the kernel
    :param fuse: raw split BTF of its fuse module; None where fuse is built in, and before 5.11,
        when modules had no BTF
    """

    release: str
    vmlinux: Path
    fuse: Path | None


@functools.cache
def fetch_all() -> dict[str, KernelBtf | Unavailable]:
    """The BTF of every series in SUITES, or the reason why it cannot be had."""

    def fetch_or_reason(series: str) -> KernelBtf | Unavailable:
        try:
            return fetch(series)
        except Unavailable as reason:
            return reason

    with ThreadPoolExecutor(max_workers=_DOWNLOADS) as pool:
        return dict(zip(SUITES, pool.map(fetch_or_reason, SUITES), strict=True))


def fetch(series: str) -> KernelBtf:
    """The BTF of the newest kernel of *series*, from the cache if any is there.

    :raises Unavailable: not in the cache, and the packages cannot be downloaded or read
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsplice/kernels"
    cached = _cached(cache, series)
    if cached:
        return cached
    cache.mkdir(parents=True, exist_ok=True)
    problems = []
    for suite in SUITES[series]:
        try:
            with tempfile.TemporaryDirectory(prefix="rsplice-apt-") as scratch:
                return _download(series, suite, Path(scratch), cache)
        except Unavailable as problem:
            problems.append(f"{suite}: {problem}")
    raise Unavailable("; ".join(problems))


def _cached(cache: Path, series: str) -> KernelBtf | None:
    found = list(cache.glob(f"btf-{series}.*-amd64"))
    if not found:
        return None
    vmlinux = max(found, key=lambda path: _natural(path.name))
    fuse = vmlinux.with_name(f"{vmlinux.name}-fuse")
    return KernelBtf(vmlinux.name.removeprefix("btf-"), vmlinux, fuse if fuse.exists() else None)


def _download(series: str, suite: str, scratch: Path, cache: Path) -> KernelBtf:
    """Downloads the package of one kernel into *scratch*, puts its BTF into *cache*."""
    apt = _Apt(suite, scratch)
    packages = apt.kernels(series)
    if not packages:
        raise Unavailable(f"no kernel {series}")
    package = max(packages, key=_natural)
    btf, fuse = _btf_of(apt.download(package))
    path = cache / f"btf-{package.split('-', 2)[2]}"
    # The vmlinux BTF comes last: it is what tells that the kernel is in the cache.
    if fuse:
        _write(path.with_name(f"{path.name}-fuse"), fuse)
    _write(path, btf)
    found = _cached(cache, series)
    assert found is not None
    return found


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _natural(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


# --- apt ------------------------------------------------------------------------------------------


class _Apt:
    """apt with one suite of Debian, and a state of its own in *scratch*."""

    def __init__(self, suite: str, scratch: Path) -> None:
        if not _KEYRING.exists():
            raise Unavailable(f"no {_KEYRING}: install debian-archive-keyring")
        self._scratch = scratch
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (scratch / directory).mkdir(parents=True)
        (scratch / "status").touch()
        source = f"deb [arch=amd64 signed-by={_KEYRING}] {_mirror(suite)} {suite} main\n"
        (scratch / "sources.list").write_text(source)
        (scratch / "apt.conf").write_text(_configuration(scratch))
        self._run("apt-get", "-q", "update", "--error-on=any")

    def kernels(self, series: str) -> list[str]:
        """The suite's packages that hold an image of *series*: linux-binary from 7.x on."""
        versioned = rf"linux-(image|binary)-{re.escape(series)}\.\d+(-\d+|\+deb\d+)-amd64"
        names = [
            line.split()[0] for line in self._run("apt-cache", "search", "linux-").splitlines()
        ]
        found = [name for name in names if re.fullmatch(versioned, name)]
        # Where there is a linux-binary, linux-image is empty and depends on it.
        return [name for name in found if name.startswith("linux-binary-")] or found

    def download(self, package: str) -> Path:
        """The package as a file, verified."""
        self._run("apt-get", "-q", "download", package)
        return next(self._scratch.glob("*.deb"))

    def _run(self, *command: str) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._scratch / "apt.conf"), "LC_ALL": "C"}
        return _run(command, self._scratch, environment)


def _mirror(suite: str) -> str:
    """The address to get *suite* from, as this machine's apt has it."""
    archive = "debian-security" if suite.endswith("-security") else "debian"
    if archive == "debian" and MIRROR_VARIABLE in os.environ:
        return os.environ[MIRROR_VARIABLE]
    targets = _run(
        ("apt-get", "indextargets", "--format", "$(REPO_URI) $(COMPONENT)", "Created-By: Packages")
    )
    for uri, component in (line.split() for line in targets.splitlines()):
        # .stem, for a list of mirrors is a file such as debian.list.
        if component == "main" and PurePosixPath(urlsplit(uri).path).stem == archive:
            return uri
    raise Unavailable(
        f"apt here has no mirror of {archive}: set {MIRROR_VARIABLE} to a mirror of Debian"
    )


def _configuration(scratch: Path) -> str:
    """A private apt configuration that keeps the machine's proxies, but none of its hooks."""
    dump = _run(("apt-config", "dump")).splitlines()
    kept = [line for line in dump if re.match(r"Acquire::(https?|Check-\w[\w-]*)[:\s]", line)]
    own = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::sourcelist": str(scratch / "sources.list"),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": str(scratch / "state"),
        "Dir::State::status": str(scratch / "status"),
        "Dir::Cache": str(scratch / "cache"),
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "10",
        "Acquire::https::Timeout": "10",
    }
    return "\n".join([*kept, *(f'{key} "{value}";' for key, value in own.items())]) + "\n"


def _run(
    command: tuple[str, ...], cwd: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    """A command's standard output; Unavailable, with what it complained of, if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            text=True,
            capture_output=True,
            timeout=_COMMAND_SECONDS,
            check=True,
        )
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"no answer to {command[0]} in {_COMMAND_SECONDS} s") from None
    except subprocess.CalledProcessError as failed:
        lines = failed.stderr.strip().splitlines() or [f"{command[0]} failed"]
        # apt's first error is the cause, the others follow from it.
        cause = next((line for line in lines if line.startswith("E: ")), lines[-1])
        raise Unavailable(cause.removeprefix("E: ")) from None
    return done.stdout


# --- what is inside -------------------------------------------------------------------------------


def _btf_of(deb: Path) -> tuple[bytes, bytes | None]:
    """The BTF of the kernel in a package, and that of its fuse module if it has one."""
    vmlinux = None
    for name, content in _members(deb, r"vmlinuz(-.*)?|fuse\.ko(\..*)?"):
        if not name.startswith("fuse"):
            vmlinux = _elf_section(_vmlinux(content), b".BTF")
            if vmlinux and b"\0fuse_req\0" in vmlinux:
                return vmlinux, None
        elif vmlinux:
            return vmlinux, _elf_section(_decompressed(content), b".BTF")
    if not vmlinux:
        raise Unavailable(f"no BTF in {deb.name}")
    return vmlinux, None


def _members(deb: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a package whose names match *wanted*, as they come."""
    with (
        subprocess.Popen(
            ("dpkg-deb", "--fsys-tarfile", str(deb)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it complains of a reader that has seen enough
        ) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name = PurePosixPath(member.name).name
            content = archive.extractfile(member) if re.fullmatch(wanted, name) else None
            if content:
                yield name, content.read()


def _vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage (Documentation/arch/x86/boot.rst, from protocol 2.08 on)."""
    if image[0x202:0x206] != b"HdrS":
        raise Unavailable("the kernel image is not a bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the size of what is inside.
    return _decompressed(image[start : start + length - 4])


def _decompressed(data: bytes) -> bytes:
    """*data* out of whatever the kernel build compresses with."""
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.decompress(data)
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    for magic, command in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")):
        if data.startswith(magic):
            return _filtered((command, "-dc"), data)
    return data


def _filtered(command: tuple[str, ...], data: bytes) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(command, input=data, capture_output=True)
        if done.returncode == 0:
            return done.stdout
        raise Unavailable(f"{command[0]} cannot read the kernel image")
    raise Unavailable(f"{command[0]} is not installed")


def _elf_section(elf: bytes, name: bytes) -> bytes | None:
    """The contents of section *name* of a 64-bit little-endian ELF file."""
    if not elf.startswith(b"\x7fELF\x02\x01"):
        raise Unavailable("the kernel image holds no ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)

    def header(index: int) -> tuple[int, int, int]:
        """(offset of the name, offset, size)"""
        at = table + index * entry_size
        return (*struct.unpack_from("<I", elf, at), *struct.unpack_from("<QQ", elf, at + 0x18))

    names = header(names_index)[1]
    for name_offset, offset, size in map(header, range(count)):
        at = names + name_offset
        if elf[at : at + len(name) + 1] == name + b"\0":
            return elf[offset : offset + size]
    return None
