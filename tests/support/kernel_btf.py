# SPDX-License-Identifier: MIT
"""The BTF of kernels that are not running: taken out of Debian's kernel packages, and cached.

The packages are downloaded from the mirror that this machine's apt is set up for, checked by
apt's signatures, and never installed. What stays in the cache is the BTF alone, a few MB a kernel:
``btf-<release>`` (vmlinux) and ``btf-<release>-fuse`` (the module, split BTF). A second run needs
no network.
"""

from __future__ import annotations

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsplice import caches
from rsplice.errors import RspliceError
from rsplice.kernel import image
from rsplice.kernel.debian import SUITES, Apt, Unavailable, from_suites, members, natural
from rsplice.kernel.image import elf_section

__all__ = ["SUITES", "KernelBtf", "Unavailable", "fetch", "fetch_all"]

_DOWNLOADS = 3  # at a time


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
        except RspliceError as reason:
            return Unavailable(str(reason))

    with ThreadPoolExecutor(max_workers=_DOWNLOADS) as pool:
        return dict(zip(SUITES, pool.map(fetch_or_reason, SUITES), strict=True))


def fetch(series: str) -> KernelBtf:
    """The BTF of the newest kernel of *series*, from the cache if any is there.

    :raises Unavailable: not in the cache, and the packages cannot be downloaded or read
    """
    cache = caches.directory() / "btf"
    cached = _cached(cache, series)
    if cached:
        return cached
    cache.mkdir(parents=True, exist_ok=True)
    return from_suites(series, lambda apt: _download(apt, series, cache))


def _cached(cache: Path, series: str) -> KernelBtf | None:
    found = list(cache.glob(f"btf-{series}.*-amd64"))
    if not found:
        return None
    vmlinux = max(found, key=lambda path: natural(path.name))
    fuse = vmlinux.with_name(f"{vmlinux.name}-fuse")
    return KernelBtf(vmlinux.name.removeprefix("btf-"), vmlinux, fuse if fuse.exists() else None)


def _download(apt: Apt, series: str, cache: Path) -> KernelBtf:
    """Downloads the package of one kernel, puts its BTF into *cache*."""
    packages = apt.kernels(series)
    if not packages:
        raise Unavailable(f"no kernel {series}")
    package = max(packages, key=natural)
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


def _btf_of(deb: Path) -> tuple[bytes, bytes | None]:
    """The BTF of the kernel in a package, and that of its fuse module if it has one."""
    vmlinux = None
    for path, content in members(deb):
        if re.fullmatch(r"vmlinuz(-.*)?", path.name):
            vmlinux = elf_section(image.vmlinux(content.read()), b".BTF")
            if vmlinux and b"\0fuse_req\0" in vmlinux:
                return vmlinux, None
        elif vmlinux and re.fullmatch(r"fuse\.ko(\..*)?", path.name):
            return vmlinux, elf_section(image.decompressed(content.read()), b".BTF")
    if not vmlinux:
        raise Unavailable(f"no BTF in {deb.name}")
    return vmlinux, None
