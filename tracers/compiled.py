# SPDX-License-Identifier: MIT
"""The BPF text as instructions and descriptions of maps: compiled by BCC once, then kept on disk.

Compiling takes most of an audit's start, and the text is the same in every run on the same
kernel. What is kept is not trusted more than the text: the kernel's verifier checks it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.util
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsplice.caches import directory as _directory
from rsplice.caches import mine as _mine
from rsplice.errors import RspliceError

_HEADERS = Path(__file__).resolve().parent / "headers"
_FORMAT = 1  #: of the files
_KEPT = 60  #: files at most: there are a few, by options, kernels and boots
#: In a guest of ``rsplice kernel``: the device behind which its host compiles.
COMPILER = "RSPLICE_COMPILER"
_COMPILER_SECONDS = 100.0
_LOAD_MAP = struct.pack("BB", 0x18, 0x10)  # ld_imm64 of a map: BPF_PSEUDO_MAP_FD in src_reg
_FLAGS = ["-g0", "-w"]


@dataclass(frozen=True)
class MapSpec:
    """What bpf(2) needs to make a map; sizes in bytes."""

    name: str
    type: int  #: enum bpf_map_type
    key_size: int
    value_size: int
    entries: int
    flags: int


@dataclass(frozen=True)
class Compiled:
    """Functions by name; where one loads a map, its instruction holds the number in ``maps``."""

    functions: dict[str, bytes]
    maps: list[MapSpec]


def compiled(text: str, keep: bool = True) -> Compiled:
    """*text* compiled, now or before. RspliceError if BCC is missing or cannot compile it.

    :param keep: whether the same text will be asked for again
    """
    path = _directory() / f"{_key(text, _bcc_file())}.json"
    if not keep:
        return _compile(text)
    found = _read(path)
    if found is None:
        found = _compile(text)
        _write(path, found)
    return found


def map_places(code: bytes | bytearray) -> list[int]:
    """Where in *code* instructions load the address of a map."""
    return [at for at in range(0, len(code), 8) if _is_map(code[at : at + 2])]


def _is_map(start: bytes | bytearray) -> bool:
    # The second byte has the source register in its upper half, the destination in its lower.
    return start[0] == _LOAD_MAP[0] and start[1] & 0xF0 == _LOAD_MAP[1]


def _bcc_file() -> Path:
    """A file of the installed BCC, which is not imported: that takes a third of a second.

    RspliceError if there is none.
    """
    spec = importlib.util.find_spec("bcc")
    if spec and spec.origin:
        file = Path(spec.origin).with_name("libbcc.py")
        if file.exists():
            return file
    raise RspliceError(
        "BCC is not installed: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
        "(Fedora); PyPI's bcc is another package"
    )


def answer(request: bytes) -> bytes:
    """What a host sends back for a line that a guest sent; it compiles ten times faster."""
    reply: dict[str, Any] = {}
    with suppress(ValueError, KeyError, TypeError, RspliceError):
        asked = json.loads(request)
        reply["id"] = str(asked["id"])
        reply["compiled"] = _to_json(compiled(str(asked["text"])))
    return json.dumps(reply).encode() + b"\n"


def _ask_host(device: str, text: str) -> Compiled | None:
    """*text* compiled by the host of this guest; None if it cannot."""
    number = f"{os.getpid()}-{time.monotonic_ns()}"
    request = json.dumps({"id": number, "text": text}).encode() + b"\n"
    deadline = time.monotonic() + _COMPILER_SECONDS
    try:
        with open(_open_alone(device, deadline), "r+b", buffering=0) as port:
            while request:
                request = request[port.write(request) or 0 :]
            words = b""
            while select.select([port], [], [], max(0.0, deadline - time.monotonic()))[0]:
                words += port.read(1 << 20) or b""
                *lines, words = words.split(b"\n")
                for line in lines:
                    reply = json.loads(line)
                    if reply.get("id") == number:  # else: of one that asked and was killed
                        return _from_json(reply["compiled"]) if "compiled" in reply else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _open_alone(device: str, deadline: float) -> int:
    """The port, which one process at a time can open. OSError if that stays so."""
    while True:
        try:
            return os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _compile(text: str) -> Compiled:
    device = os.environ.get(COMPILER)
    found = _ask_host(device, text) if device else None
    return found or _compile_here(text)


def _compile_here(text: str) -> Compiled:
    """By a process of its own: what LLVM takes for fatal, as too much of a stack, ends that."""
    paths = os.pathsep.join(path or "." for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=text.encode(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": paths, "BCC_KERNEL_SOURCE": str(_HEADERS)},
    )
    try:
        return _from_json(json.loads(done.stdout))
    except (ValueError, KeyError, TypeError, AttributeError):
        why = _first_error(done.stderr.decode(errors="replace")) or f"status {done.returncode}"
        raise RspliceError(f"BCC cannot compile the probes: {why}") from None


def _first_error(words: str) -> str:
    """The first error that clang reported, else the last line."""
    lines = [line for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines[-1:] or [""])[0]


def _main() -> None:
    """Compiles the text that is the standard input; the result goes to the standard output."""
    from bcc import BPF
    from bcc.libbcc import lib

    program = BPF(text=sys.stdin.buffer.read(), cflags=_FLAGS)
    print(json.dumps(_to_json(_take(program.module, lib))))


def _ask(library: Any, function: str, kind: Any, module: Any, number: int) -> Any:
    """A function of libbcc that BCC's own bindings may not describe."""
    call = ctypes.CFUNCTYPE(kind, ctypes.c_void_p, ctypes.c_size_t)((function, library))
    return call(module, number)


def _take(module: Any, library: Any) -> Compiled:
    """Everything that a BCC module holds, with maps by number."""

    def number_of(what: str, table: int) -> int:
        return int(_ask(library, f"bpf_table_{what}", ctypes.c_int, module, table))

    def name_of(function: str, number: int) -> str:
        return str(_ask(library, function, ctypes.c_char_p, module, number).decode())

    tables = range(library.bpf_num_tables(module))
    fds = {number_of("fd_id", table): table for table in tables}
    maps = [
        MapSpec(
            name_of("bpf_table_name", table),
            number_of("type_id", table),
            number_of("key_size_id", table),
            number_of("leaf_size_id", table),
            number_of("max_entries_id", table),
            number_of("flags_id", table),
        )
        for table in tables
    ]
    functions = {}
    for number in range(library.bpf_num_functions(module)):
        name = name_of("bpf_function_name", number)
        size = library.bpf_function_size(module, name.encode())
        code = bytearray(ctypes.string_at(library.bpf_function_start(module, name.encode()), size))
        for at in map_places(code):
            (fd,) = struct.unpack_from("=i", code, at + 4)
            struct.pack_into("=i", code, at + 4, fds[fd])
        functions[name] = bytes(code)
    return Compiled(functions, maps)


def _key(text: str, bcc: Path) -> str:
    """Changes with the text, and with the BCC that compiles it."""
    status = bcc.stat()
    words = f"{_FORMAT} {_FLAGS} {bcc} {status.st_size} {status.st_mtime_ns}\n{text}"
    return hashlib.sha256(words.encode()).hexdigest()


def _read(path: Path) -> Compiled | None:
    """None where there is nothing of the kind that can be trusted."""
    try:
        if not _mine(os.stat(path.parent, follow_symlinks=False)):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not _mine(os.fstat(fd)):
                return None
            return _from_json(json.loads(file.read()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _from_json(data: dict[str, Any]) -> Compiled:
    functions = {name: bytes.fromhex(code) for name, code in data["functions"].items()}
    return Compiled(functions, [MapSpec(**spec) for spec in data["maps"]])


def _to_json(found: Compiled) -> dict[str, Any]:
    return {
        "functions": {name: code.hex() for name, code in found.functions.items()},
        "maps": [asdict(spec) for spec in found.maps],
    }


def _write(path: Path, found: Compiled) -> None:
    """Keeps it if that can be: it is no error if not."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _mine(os.stat(path.parent, follow_symlinks=False)):
            return
        fd, name = tempfile.mkstemp(dir=path.parent)
        try:
            with open(fd, "w") as file:
                json.dump(_to_json(found), file)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
        files = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for old in files[:-_KEPT]:
            old.unlink()


if __name__ == "__main__":
    _main()
