# SPDX-License-Identifier: MIT
"""What `make -C csrc install` leaves: libraries, header, pkg-config file, manual, and their use."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rsplice import __version__

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = r"""
#include <fcntl.h>
#include <rsplice.h>
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct rsplice_result result;
    int64_t offset = 0;
    int ends[2], fd = open(argv[argc - 1], O_RDONLY);
    ssize_t done;

    if (pipe(ends))
        return 1;
    done = rsplice(fd, &offset, ends[1], NULL, 8192, 0, &result);
    printf("%s %zd %d\n", rsplice_version(), done,
           (uint64_t)done == result.moved + result.copied + result.unknown);
    return 0;
}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, needs: Callable[..., None]) -> Path:
    """The DESTDIR of an installation with PREFIX=/usr."""
    needs("make", "cc", "pkg-config", "nm", "readelf")
    build, root = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("root")
    command = ["make", "-s", "-C", str(ROOT / "csrc"), f"BUILD={build}", "install"]
    done = subprocess.run(
        [*command, f"DESTDIR={root}", "PREFIX=/usr"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root


def functions() -> set[str]:
    """The functions that rsplice.h declares."""
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc/rsplice.h").read_text(), flags=re.DOTALL)
    return set(re.findall(r"\b(rsplice\w*)\(", header))


def output(*command: str | Path, env: dict[str, str] | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def test_everything_lies_where_it_is_looked_for(installed: Path) -> None:
    lib = installed / "usr/lib"
    assert os.readlink(lib / "librsplice.so") == "librsplice.so.0"
    assert os.readlink(lib / "librsplice.so.0") == f"librsplice.so.{__version__}"
    assert (installed / "usr/include/rsplice.h").read_text() == (
        ROOT / "csrc/rsplice.h"
    ).read_text()
    assert {page.name for page in (installed / "usr/share/man/man7").iterdir()} == {"rsplice.7"}
    pages = {page.name for page in (installed / "usr/share/man/man3").iterdir()}
    assert pages == {f"{name}.3" for name in functions()}


def test_nothing_is_exported_but_what_the_header_declares(installed: Path) -> None:
    library = installed / "usr/lib/librsplice.so"
    lines = output("nm", "-D", "--defined-only", library).splitlines()
    exported = {line.split()[-1] for line in lines if " T " in line}
    assert exported == {f"{name}@@RSPLICE_0.1" for name in functions()}
    assert "Library soname: [librsplice.so.0]" in output("readelf", "-d", library)


@pytest.mark.parametrize("way", ["shared", "static"])
def test_a_program_is_built_with_what_pkg_config_says(
    way: str, installed: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "PKG_CONFIG_PATH": str(installed / "usr/lib/pkgconfig"),
        "PKG_CONFIG_SYSROOT_DIR": str(installed),
        "LD_LIBRARY_PATH": str(installed / "usr/lib"),
    }
    assert output("pkg-config", "--modversion", "rsplice", env=environment).strip() == __version__
    static = ["--static"] if way == "static" else []
    flags = output("pkg-config", "--cflags", "--libs", *static, "rsplice", env=environment).split()
    if way == "static":
        archive = str(installed / "usr/lib/librsplice.a")
        flags = [archive if flag == "-lrsplice" else flag for flag in flags]
    source, program, file = (tmp_path / name for name in ("use.c", "use", "file"))
    source.write_text(PROGRAM)
    file.write_bytes(bytes(8192))
    warnings = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(["cc", *warnings, "-o", program, source, *flags], check=True)
    assert output(program, file, env=environment) == f"{__version__} 8192 1\n"


def test_a_wheel_of_python_calls_the_same_library() -> None:
    library = pytest.importorskip("rsplice.library", reason="rsplice._native is not built")
    assert library.ffi.string(library.lib.rsplice_version()).decode() == __version__
