# SPDX-License-Identifier: MIT
"""Kernels that are here: one directory each, with the image, the modules and an initramfs.

``kernels/RELEASE/`` below the cache directory holds ``image``, ``lib/modules/RELEASE`` and
``source``, the packages or files that it was made from. A directory is made under another name
and renamed when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rsplice import caches
from rsplice.errors import RspliceError
from rsplice.kernel import debian, image
from rsplice.kernel.debian import SUITES, Apt, Unavailable, natural

#: Drivers of hardware that the VM does not have: more than half of all modules.
_LEFT_OUT = re.compile(
    r"/kernel/(sound|drivers/(accel|bluetooth|comedi|gpu|hid|hwmon|iio|infiniband/hw|input|isdn|"
    r"media|mfd|mmc|mtd|net/(can|ethernet|wireless)|platform|power|staging|thunderbolt|usb))/"
)

Say = Callable[[str], None]  #: is told what is being done, for those who wait


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache.

    :param release: as uname(1) prints it
    :param directory: where it is kept
    """

    release: str
    directory: Path

    @property
    def image(self) -> Path:
        return self.directory / "image"

    @property
    def modules(self) -> Path:
        """The directory of its modules, as depmod(8) left it; empty if it has none."""
        return self.directory / "lib/modules" / self.release

    @property
    def source(self) -> str:
        """The packages or files that it was made from."""
        return (self.directory / "source").read_text().strip()

    @property
    def series(self) -> str:
        return series_of(self.release)


def directory() -> Path:
    """Where kernels are kept.

    :raises RspliceError: somebody else may write there
    """
    path = caches.directory() / "kernels"
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    for each in (path.parent, path):
        each.mkdir(mode=0o700, exist_ok=True)
        if not caches.mine(os.stat(each, follow_symlinks=False)):
            raise RspliceError(f"{each}: others can write there: kernels are not kept in it")
    return path


def series_of(release: str) -> str:
    """ "6.12" of "6.12.117+deb12-amd64"."""
    return ".".join(re.findall(r"\d+", release)[:2])


def kernels() -> list[Kernel]:
    """Those in the cache, oldest release first."""
    found = [Kernel(each.parent.name, each.parent) for each in directory().glob("*/source")]
    return sorted(
        (each for each in found if not each.directory.name.startswith(".")),
        key=lambda kernel: natural(kernel.release),
    )


def find(version: str) -> Kernel | None:
    """The newest kernel in the cache of a series such as "6.12", or the one of that release."""
    return next((k for k in reversed(kernels()) if version in (k.series, k.release)), None)


def find_or_fetch(version: str, say: Say) -> Kernel:
    """The same, fetched now if it is not here.

    :raises RspliceError: it is neither here nor can it be fetched
    """
    return find(version) or fetch(version, say)


def fetch(version: str, say: Say) -> Kernel:
    """Downloads the newest kernel of a series from Debian into the cache.

    :raises Unavailable: there is none, or it cannot be downloaded
    """
    if version not in SUITES:
        known = ", ".join(SUITES)
        raise Unavailable(
            f"no kernel {version} here, and the versions that can be fetched are {known} "
            "(others: rsplice kernel fetch FILE.deb)"
        )
    say(f"looking for Linux {version} in Debian")
    try:
        return debian.from_suites(version, lambda apt: _download(apt, version, say))
    except Unavailable as problem:
        raise Unavailable(f"kernel {version} cannot be fetched: {problem}") from None


def _download(apt: Apt, series: str, say: Say) -> Kernel:
    packages = apt.kernels(series)
    if not packages:
        raise Unavailable(f"no kernel {series}")
    package = max(packages, key=natural)
    files = []
    for part in apt.parts(package):
        say(f"downloading {part}")
        files.append(apt.download(part))
    return add_packages(files, say)


def add_packages(files: Sequence[Path], say: Say) -> Kernel:
    """Takes a kernel out of Debian packages: an image, and its modules if they are apart.

    :raises RspliceError: they hold no kernel, or cannot be read
    """
    with _under_construction() as place:
        for file in files:
            say(f"unpacking {file.name}")
            for path, content in debian.members(file):
                if re.fullmatch(r"/boot/vmlinuz-.*|(/usr)?/lib/modules/[^/]+/vmlinuz", str(path)):
                    (place / "vmlinuz").write_bytes(content.read())
                elif (kept := _module_file(path)) and not _LEFT_OUT.search(str(path)):
                    target = place / "lib/modules" / kept
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
        if not (place / "vmlinuz").exists():
            raise RspliceError(f"no kernel image in {', '.join(file.name for file in files)}")
        return _finish(place, " ".join(file.name for file in files), say)


def add_image(file: Path, modules: Path | None, say: Say) -> Kernel:
    """Takes a vmlinuz or vmlinux, and the directory of its modules (lib/modules/RELEASE).

    :raises RspliceError: it is no kernel, or the modules are those of another
    """
    with _under_construction() as place, _named(file):
        shutil.copyfile(file, place / "vmlinuz")
        if modules:
            release = image.release((place / "vmlinuz").read_bytes())
            if not any(modules.rglob("*.ko*")):
                raise RspliceError(f"{modules}: there are no modules in it")
            say(f"copying {modules}")
            skip = shutil.ignore_patterns("build", "source")
            shutil.copytree(modules, place / "lib/modules" / release, ignore=skip, symlinks=True)
        return _finish(place, str(file.resolve()), say)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Has the message about an image that cannot be read name its file."""
    try:
        yield
    except image.BadImage as problem:
        raise RspliceError(
            f"{file}: {problem}: give a kernel's .deb, its vmlinuz or its vmlinux"
        ) from None


def _module_file(path: PurePosixPath) -> str | None:
    """RELEASE/... of a file below lib/modules."""
    found = re.fullmatch(r"(?:/usr)?/lib/modules/([^/]+/(?!vmlinuz|vdso/).+)", str(path))
    return found[1] if found and ".." not in path.parts else None


@contextmanager
def _under_construction() -> Iterator[Path]:
    """A directory that is gone again unless it was renamed."""
    place = Path(tempfile.mkdtemp(prefix=".new-", dir=directory()))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _finish(place: Path, source: str, say: Say) -> Kernel:
    """Makes what is in *place* a kernel of the cache."""
    packed = (place / "vmlinuz").read_bytes()
    elf = packed if image.is_elf(packed) else image.vmlinux(packed)
    release = image.release(packed)
    if not re.fullmatch(r"[0-9A-Za-z][\w.+~-]*", release):
        raise RspliceError("the kernel's release is no name that can be used for a directory")
    # An emulated CPU takes a second to decompress what this one has in no time.
    (place / "image").write_bytes(elf if image.boots_directly(elf) else packed)
    (place / "vmlinuz").unlink()
    modules = place / "lib/modules" / release
    modules.mkdir(parents=True, exist_ok=True)
    if others := [each.name for each in modules.parent.iterdir() if each.name != release]:
        raise RspliceError(f"the modules are those of Linux {others[0]}, the image is {release}")
    for name in ("order", "builtin", "builtin.modinfo"):
        (modules / f"modules.{name}").touch()  # or depmod complains
    say(f"indexing the modules of Linux {release}")
    _depmod(place, release)
    (place / "source").write_text(source + "\n")
    final = directory() / release
    if final.exists():
        # A guest that runs it now keeps what it has open.
        os.rename(final, place / "old")
    os.rename(place, final)
    shutil.rmtree(final / "old", ignore_errors=True)
    return Kernel(release, final)


def _depmod(base: Path, release: str) -> None:
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    depmod = shutil.which("depmod", path=path)
    if not depmod:
        raise RspliceError("depmod is not installed: install kmod")
    done = subprocess.run((depmod, "-b", base, release), capture_output=True, text=True)
    if done.returncode:
        raise RspliceError(f"depmod: {done.stderr.strip() or done.returncode}")
