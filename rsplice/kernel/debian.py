# SPDX-License-Identifier: MIT
"""Debian's kernel packages: found and downloaded by apt, verified by its signatures.

The mirror is the one that this machine's apt is set up for. apt works with a sources list and a
state of its own: nothing of this machine's apt changes, and nothing is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar
from urllib.parse import urlsplit

from rsplice.errors import RspliceError

T = TypeVar("T")

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


class Unavailable(RspliceError):
    """A kernel that cannot be had here; the message says why."""


def from_suites(series: str, take: Callable[[Apt], T]) -> T:
    """What *take* makes of the first of a series' suites from which it can take its kernel.

    :param take: is given apt in a scratch directory that is gone afterwards
    :raises Unavailable: from none; the message has the reason of each
    """
    problems = []
    for suite in SUITES[series]:
        try:
            with tempfile.TemporaryDirectory(prefix="rsplice-apt-") as scratch:
                return take(Apt(suite, Path(scratch)))
        except RspliceError as problem:
            problems.append(f"{suite}: {problem}")
    raise Unavailable("; ".join(problems))


class Apt:
    """apt with one suite of Debian, and a state of its own in *scratch*.

    :param whole: with the release that the suite adds to, too: all that its packages depend on
    :raises Unavailable: apt, the keyring or the mirror is missing, or does not answer
    """

    def __init__(self, suite: str, scratch: Path, *, whole: bool = False) -> None:
        if not _KEYRING.exists():
            raise Unavailable(f"no {_KEYRING}: install debian-archive-keyring")
        self._scratch = scratch
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (scratch / directory).mkdir(parents=True)
        (scratch / "status").touch()
        suites = dict.fromkeys((suite, suite.partition("-")[0]) if whole else (suite,))
        sources = "".join(
            f"deb [arch=amd64 signed-by={_KEYRING}] {_mirror(each)} {each} main\n"
            for each in suites
        )
        (scratch / "sources.list").write_text(sources)
        (scratch / "apt.conf").write_text(_configuration(scratch))
        self._run("apt-get", "-q", "update", "--error-on=any")
        self._names = [
            line.split()[0] for line in self._run("apt-cache", "search", "linux-").splitlines()
        ]

    def kernels(self, series: str) -> list[str]:
        """The suite's packages that hold an image of *series*: linux-binary from 7.x on."""
        versioned = rf"linux-(image|binary)-{re.escape(series)}\.\d+(-\d+|\+deb\d+)-amd64"
        found = [name for name in self._names if re.fullmatch(versioned, name)]
        # Where there is a linux-binary, linux-image is empty and depends on it.
        return [name for name in found if name.startswith("linux-binary-")] or found

    def parts(self, package: str) -> list[str]:
        """*package*, an image, and the packages of its modules where they have their own."""
        release = package_release(package)
        others = [f"linux-{part}-{release}" for part in ("modules", "base")]
        return [package, *(name for name in others if name in self._names)]

    def download(self, package: str) -> Path:
        """The package as a file, verified."""
        before = set(self._scratch.glob("*.deb"))
        self._run("apt-get", "-q", "download", package)
        (new,) = set(self._scratch.glob("*.deb")) - before
        return new

    def download_all(self, packages: Sequence[str]) -> list[Path]:
        """The packages and all that they depend on, as files, verified."""
        options = ("-q", "-y", "--no-install-recommends", "--download-only")
        self._run("apt-get", *options, "install", *packages)
        return sorted((self._scratch / "cache/archives").glob("*.deb"))

    def _run(self, *command: str) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._scratch / "apt.conf"), "LC_ALL": "C"}
        return _run(command, self._scratch, environment)


def package_release(package: str) -> str:
    """The kernel release that a package such as "linux-image-6.1.0-56-amd64" is named for."""
    return package.split("-", 2)[2]


def natural(name: str) -> list[int]:
    """The order of versions: by the numbers in them."""
    return [int(number) for number in re.findall(r"\d+", name)]


def members(deb: Path) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """Path and open content of the regular files of a package, as they come. Read each at once.

    :raises Unavailable: it is no package
    """
    with subprocess.Popen(
        ("dpkg-deb", "--fsys-tarfile", str(deb)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it complains of a reader that has seen enough
    ) as unpack:
        assert unpack.stdout is not None
        try:
            with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content:
                        yield PurePosixPath("/") / member.name, content
        except tarfile.TarError as error:
            raise Unavailable(f"{deb}: not a Debian package ({error})") from error
        finally:
            unpack.stdout.close()


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
