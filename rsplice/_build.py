# SPDX-License-Identifier: MIT
"""Builds the C extension modules with cffi, in API mode: setup.py calls it at install.

``rsplice._native`` is librsplice and the few calls that Python lacks; ``rsplice._fuse``, the
filesystems of the workloads, is built where libfuse3 is there to build with.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
CSRC = "csrc"
#: The workloads' C code that needs nothing but libc; the rest needs libfuse3.
NATIVE = ("calls",)

#: rsplice() for a caller that has no int64_t to point to: offsets of -1 stand for NULL, and
#: errors are returned as -errno.
SHIM_DECLARATION = """
ssize_t rsplice_at(int fd_in, int64_t off_in, int fd_out, int64_t off_out, size_t len,
                   unsigned int flags, struct rsplice_result *result);
"""
SHIM = """
static ssize_t rsplice_at(int fd_in, int64_t off_in, int fd_out, int64_t off_out, size_t len,
                          unsigned int flags, struct rsplice_result *result)
{
    ssize_t done = rsplice(fd_in, off_in < 0 ? NULL : &off_in, fd_out,
                           off_out < 0 ? NULL : &off_out, len, flags, result);

    return done < 0 ? -errno : done;
}
"""


def _text(name: str) -> str:
    return (ROOT / CSRC / name).read_text()


def _pkg_config(*packages: str) -> list[str] | None:
    """What pkg-config says to build with *packages*; None if one is not there."""
    try:
        done = subprocess.run(
            ["pkg-config", "--cflags", "--libs", *packages], capture_output=True, text=True
        )
    except OSError:
        return None
    return None if done.returncode else shlex.split(done.stdout)


def _public_declarations() -> str:
    """rsplice.h as cdef() reads it: constants, structures and prototypes, without directives."""
    header = _text("rsplice.h")
    constants = re.findall(r"^#define (RSPLICE_[FW]\w+)\s+0x", header, re.MULTILINE)
    body = header[header.index("/* What became of the bytes of one call") :]
    body = body[: body.index("#pragma GCC visibility pop")]
    return "".join(f"#define {name} ...\n" for name in constants) + body


def _workload_declarations(name: str) -> str:
    """What a header of csrc/workloads declares between its two marks."""
    header = _text(f"workloads/{name}.h")
    return header.split("/* cdef begin */")[1].split("/* cdef end */")[0]


def _fuse_workloads() -> tuple[str, ...]:
    names = (path.stem for path in (ROOT / CSRC / "workloads").glob("*.c"))
    return tuple(sorted(name for name in names if name not in NATIVE))


def _version() -> str:
    found = re.search(r'^__version__ = "(.*)"', (ROOT / "rsplice/__init__.py").read_text(), re.M)
    assert found
    return found[1]


def _library_sources() -> list[str]:
    return sorted(f"{CSRC}/{path.name}" for path in (ROOT / CSRC).glob("*.c"))


def _extension(
    module: str, declarations: str, text: str, workloads: tuple[str, ...], flags: list[str]
) -> FFI:
    uring = _pkg_config("liburing")
    flags = [*flags, *(uring or [])]
    builder = FFI()
    builder.cdef(declarations)
    builder.set_source(
        module,
        text,
        sources=[*_library_sources(), *(f"{CSRC}/workloads/{name}.c" for name in workloads)],
        include_dirs=[CSRC, f"{CSRC}/workloads"],
        define_macros=[
            ("RSPLICE_VERSION", f'"{_version()}"'),
            *([("HAVE_LIBURING", "1")] if uring is not None else []),
        ],
        extra_compile_args=[
            "-O2",
            "-fvisibility=hidden",
            *(f for f in flags if not f.startswith("-l")),
        ],
        libraries=[f[2:] for f in flags if f.startswith("-l")],
    )
    return builder


def native() -> FFI:
    """The builder of ``rsplice._native``."""
    includes = "".join(f'#include "{name}.h"\n' for name in NATIVE)
    return _extension(
        "rsplice._native",
        _public_declarations()
        + SHIM_DECLARATION
        + "".join(_workload_declarations(name) for name in NATIVE),
        f'#include <errno.h>\n#include "rsplice.h"\n{includes}{SHIM}',
        NATIVE,
        [],
    )


def has_fuse() -> bool:
    """Whether ``rsplice._fuse`` can be built here."""
    return _pkg_config("fuse3") is not None


def fuse() -> FFI:
    """The builder of ``rsplice._fuse``."""
    flags = _pkg_config("fuse3") or []
    headers = ("fs", "recvpage")
    includes = "".join(f'#include "{name}.h"\n' for name in headers)
    return _extension(
        "rsplice._fuse",
        _public_declarations() + "".join(_workload_declarations(name) for name in headers),
        f'#include "rsplice.h"\n{includes}',
        _fuse_workloads(),
        flags,
    )
