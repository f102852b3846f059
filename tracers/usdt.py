# SPDX-License-Identifier: MIT
"""The USDT probes of librsplice (csrc/probes.h): which files have them, and where in these.

A probe is a nop, and a note in the ELF section ``.note.stapsdt`` that says at which address it
stands and in which registers or places of memory its arguments are.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rsplice.audit import MissingProbe
from rsplice.tracers.program import BpfError, Program

PROVIDER = "rsplice"

#: The probes, in the order of bpf/usdt.c, and how many arguments each has.
PROBES = {"reserve": 4, "fill": 3, "publish": 6, "fallback": 3, "abort": 2}
NAMES = tuple(PROBES)

COST = "what the librsplice in it meant to do is not shown"

_TABLE_SIZE = 1024  # bpf/usdt.c: NR_SITES
_SITES_MAX = 512  #: places in one file
_NOTES_MAX = 1 << 20  #: bytes
_SECTIONS_MAX = 4096

# Elf64_Ehdr, Elf64_Shdr, Elf64_Phdr, Elf64_Nhdr (elf.h)
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_ADDRESSES = struct.Struct("<QQQ")
_IDENT = b"\x7fELF\x02\x01"  # 64-bit, little-endian
_X86_64 = 62
_PT_LOAD, _PF_X = 1, 1
_NT_STAPSDT = 3

# bpf/usdt.c: struct argument and struct site
_CONSTANT, _REGISTER, _MEMORY = range(3)
_ARGUMENT = struct.Struct("=QIIII")
_ARGUMENTS_MAX = 6

# Where each register stands in struct pt_regs (arch/x86/include/asm/ptrace.h).
_SAVED = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs flags rsp"
_PLACES = {name: 8 * i for i, name in enumerate(_SAVED.split())}


def _registers() -> dict[str, int]:
    """All names of the general registers, of their low halves, words and bytes."""
    names: dict[str, int] = {}
    for old in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp"):
        low = old[0] + "l" if old.endswith("x") else old + "l"
        names |= dict.fromkeys(("r" + old, "e" + old, old, low), _PLACES["r" + old])
    for number in range(8, 16):
        for suffix in ("", "d", "w", "b"):
            names[f"r{number}{suffix}"] = _PLACES[f"r{number}"]
    return names


_REGISTERS = _registers()
_OPERAND = re.compile(
    r"(-?)([1248])@(?:\$(?P<constant>-?\d+)"
    r"|%(?P<register>\w+)"
    r"|(?P<offset>-?\d*)\(%(?P<base>\w+)\))"
)


@dataclass(frozen=True)
class Site:
    """A place in a file where a probe stands.

    :param probe: its name, one of PROBES
    :param offset: of its instruction, in bytes from the start of the file
    :param arguments: as the note has them: "-8@%rdi -8@$1"
    """

    probe: str
    offset: int
    arguments: str

    def encoded(self) -> bytes:
        """The place as bpf/usdt.c reads it; ValueError if an argument is somewhere unheard of."""
        operands = self.arguments.split()
        if len(operands) != PROBES[self.probe]:
            raise ValueError(f"probe {self.probe} with {len(operands)} arguments")
        encoded = b"".join(map(_operand, operands))
        head = struct.pack("=II", NAMES.index(self.probe), len(operands))
        return head + encoded.ljust(_ARGUMENT.size * _ARGUMENTS_MAX, b"\0")


def _operand(text: str) -> bytes:
    match = _OPERAND.fullmatch(text)
    name = match and (match["register"] or match["base"])
    if match is None or (name and name not in _REGISTERS):
        raise ValueError(f"argument {text} cannot be read")
    if match["constant"]:
        place, value = _CONSTANT, int(match["constant"])
    else:
        place = _REGISTER if match["register"] else _MEMORY
        value = int(match["offset"] or 0)
    shift = 64 - 8 * int(match[2])
    register = _REGISTERS[name] if name else 0
    return _ARGUMENT.pack(value % (1 << 64), place, register, shift, bool(match[1]))


@dataclass
class File:
    """A file with probes of librsplice.

    :param path: its name
    :param fd: an open descriptor, so that what was read is what the probes are attached to
    """

    path: str
    fd: int
    sites: list[Site] = field(default_factory=list)

    def close(self) -> None:
        os.close(self.fd)


def find(argv: Sequence[str] = (), pids: Sequence[int] = ()) -> list[File]:
    """The files with probes that what is going to be traced may use, each once.

    They are looked for in rsplice's own extension modules, in the librsplice.so that the dynamic
    linker knows, in the program *argv* itself, and in all that the processes *pids* have mapped.

    :return: open files; the caller closes them
    """
    found: dict[tuple[int, int], File] = {}
    for path in dict.fromkeys(_candidates(argv, pids)):
        with suppress(OSError):
            _look(path, found)
    return list(found.values())


def _look(path: str, found: dict[tuple[int, int], File]) -> None:
    """Adds the file to *found* if it has probes. OSError if it cannot be opened."""
    # Whatever else it is, a FIFO or a device must not be waited for.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino
        sites = [] if key in found else read_sites(fd)
        if sites:
            found[key] = File(os.readlink(f"/proc/self/fd/{fd}"), os.dup(fd), sites)
    finally:
        os.close(fd)


def _candidates(argv: Sequence[str], pids: Sequence[int]) -> Iterator[str]:
    for name in ("rsplice._native", "rsplice._fuse"):
        with suppress(ImportError, ValueError):
            spec = find_spec(name)
            if spec and spec.origin:
                yield spec.origin
    yield from _linked()
    if argv:
        yield shutil.which(argv[0]) or argv[0]
    for pid in pids:
        yield from _mapped(pid)


def _linked() -> Iterator[str]:
    """librsplice.so where a program that is started from here would find it."""
    for folder in os.environ.get("LD_LIBRARY_PATH", "").replace(";", ":").split(":"):
        if folder:
            yield from map(str, sorted(Path(folder).glob("librsplice.so*")))
    with suppress(OSError):
        # The strings in it are what `ldconfig -p` prints, which takes 50 times as long.
        cache = Path("/etc/ld.so.cache").read_bytes()
        for path in re.findall(rb"\0(/[^\0]{0,4000}/librsplice\.so[^\0/]{0,100})(?=\0)", cache):
            yield os.fsdecode(path)


def _mapped(pid: int) -> Iterator[str]:
    """The files whose code process *pid* has mapped, by names that hold in any mount namespace."""
    yield f"/proc/{pid}/exe"
    mapped: dict[bytes, bytes] = {}
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            parts = line.rstrip(b"\n").split(None, 5)
            if len(parts) == 6 and b"x" in parts[1] and parts[5].startswith(b"/"):
                mapped.setdefault(parts[5], parts[0])
    for path, addresses in mapped.items():
        # The first is the very file, but takes CAP_SYS_ADMIN.
        start, _, end = addresses.partition(b"-")
        yield f"/proc/{pid}/map_files/{int(start, 16):x}-{int(end, 16):x}"
        yield f"/proc/{pid}/root{os.fsdecode(path)}"


def attach(
    program: Program, files: Sequence[File], attached: list[str], missing: list[MissingProbe]
) -> None:
    """Attaches to the probes in *files*, and notes which are attached and which are missing."""
    number = 0
    table = program.map("usdt_sites") if files else None
    for file in files:
        places: list[tuple[int, int]] = []
        for site in file.sites:
            try:
                encoded = site.encoded()
            except ValueError as error:
                missing.append(_missing(file, str(error)))
                continue
            if table is None or number >= _TABLE_SIZE:
                missing.append(_missing(file, "there are too many in too many files"))
                break
            table.put(struct.pack("=I", number), encoded)
            places.append((site.offset, number))
            number += 1
        try:
            _attach(program, file, places)
            attached.append(file.path)
        except BpfError as error:
            missing.append(_missing(file, str(error)))


def _attach(program: Program, file: File, places: list[tuple[int, int]]) -> None:
    """By one link if the kernel can, else probe by probe. BpfError if neither works."""
    for many in (True, False):
        try:
            descriptor = program.load_uprobe("usdt_mark" if many else "usdt_mark_each", many)
            try:
                program.attach_uprobes(descriptor, many, file.fd, places)
            finally:
                os.close(descriptor)
            return
        except BpfError as error:
            if not many or error.errno == errno.EPERM:
                raise


def _missing(file: File, reason: str) -> MissingProbe:
    return MissingProbe(f"probes in {file.path}", reason, COST, ["leaked"])


def read_sites(fd: int) -> list[Site]:
    """The probes of librsplice in the open file *fd*; none if it is no ELF file of this machine."""
    try:
        return list(_read_sites(fd))
    except (struct.error, ValueError, OSError, OverflowError):
        return []


def _read_sites(fd: int) -> Iterator[Site]:
    head = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    ident, _, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = head
    if not ident.startswith(_IDENT) or machine != _X86_64:
        return
    if (phentsize, shentsize) != (_SEGMENT.size, _SECTION.size) or shnum > _SECTIONS_MAX:
        return
    sections = list(_SECTION.iter_unpack(os.pread(fd, shnum * shentsize, shoff)))
    names = _contents(fd, sections[shstrndx]) if shstrndx < len(sections) else b""
    named = {names[s[0] :].split(b"\0", 1)[0]: s for s in sections}
    notes = named.get(b".note.stapsdt")
    if notes is None:
        return
    segments = list(_SEGMENT.iter_unpack(os.pread(fd, phnum * phentsize, phoff)))
    base = named[b".stapsdt.base"][3] if b".stapsdt.base" in named else None
    for count, (address, base_then, probe, arguments) in enumerate(_notes(_contents(fd, notes))):
        if count >= _SITES_MAX:
            return
        # A prelinked file has been moved since the note was written.
        moved = base - base_then if base is not None and base_then else 0
        offset = _file_offset(segments, address + moved)
        if offset is not None:
            yield Site(probe, offset, arguments)


def _contents(fd: int, section: tuple[int, ...]) -> bytes:
    return os.pread(fd, min(section[5], _NOTES_MAX), section[4])


def _file_offset(segments: list[tuple[int, ...]], address: int) -> int | None:
    for kind, flags, offset, start, _, size, _, _ in segments:
        if kind == _PT_LOAD and flags & _PF_X and start <= address < start + size:
            return address - start + offset
    return None


def _notes(data: bytes) -> Iterator[tuple[int, int, str, str]]:
    """(address, base, probe, arguments) of each note of our provider."""
    at = 0
    while at + _NOTE.size <= len(data):
        name_size, size, kind = _NOTE.unpack_from(data, at)
        start = at + _NOTE.size + (name_size + 3 & ~3)
        note = data[start : start + size]
        at = start + (size + 3 & ~3)
        if kind != _NT_STAPSDT or len(note) < _ADDRESSES.size:
            continue
        address, base, _ = _ADDRESSES.unpack_from(note)
        texts = note[_ADDRESSES.size :].decode(errors="replace").split("\0")
        if len(texts) >= 3 and texts[0] == PROVIDER and texts[1] in PROBES:
            yield address, base, texts[1], texts[2]
