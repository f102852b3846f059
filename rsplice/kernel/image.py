# SPDX-License-Identifier: MIT
"""What is inside a kernel image: its release, the ELF file, sections such as BTF."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import re
import struct
import subprocess

from rsplice.errors import RspliceError

_NOTE_PHYS32_ENTRY = 18  # include/xen/interface/elfnote.h: where a PVH loader enters


class BadImage(RspliceError):
    """A kernel image that cannot be read; the message says why."""


def is_elf(image: bytes) -> bool:
    """Whether *image* is an uncompressed kernel."""
    return image.startswith(b"\x7fELF\x02\x01")


def release(image: bytes) -> str:
    """The release, as uname(1) prints it, of a bzImage or of the ELF file in one.

    :raises BadImage: it is neither
    """
    if is_elf(image):
        found = re.search(rb"Linux version ([\x21-\x7e]+) ", image)
    else:
        _check_boot_header(image)
        (at,) = struct.unpack_from("<H", image, 0x20E)
        found = re.match(rb"([\x21-\x7e]+)", image[at + 0x200 : at + 0x280])
    if not found:
        raise BadImage("the kernel image does not name its release")
    return found[1].decode()


def vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage (Documentation/arch/x86/boot.rst, from protocol 2.08 on).

    :raises BadImage: it is no bzImage, or cannot be decompressed here
    """
    _check_boot_header(image)
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the size of what is inside.
    return decompressed(image[start : start + length - 4])


def _check_boot_header(image: bytes) -> None:
    if image[0x202:0x206] != b"HdrS":
        raise BadImage("the kernel image is not a bzImage")


def decompressed(data: bytes) -> bytes:
    """*data* out of whatever the kernel build compresses with. BadImage if that fails."""
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
        raise BadImage(f"{command[0]} cannot read the kernel image")
    raise BadImage(f"{command[0]} is not installed: install it to read this kernel image")


def boots_directly(elf: bytes) -> bool:
    """Whether a VM can start the ELF kernel as it is, with no time spent on decompression.

    That is what CONFIG_PVH adds a note for (arch/x86/platform/pvh/head.S).
    """
    notes = elf_section(elf, b".notes") or b""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        if kind == _NOTE_PHYS32_ENTRY and notes[at + 12 : at + 16] == b"Xen\0":
            return True
        at += 12 + (name_size + 3 & ~3) + (size + 3 & ~3)
    return False


def elf_section(elf: bytes, name: bytes) -> bytes | None:
    """The contents of section *name* of a 64-bit little-endian ELF file.

    :raises BadImage: it is no such file
    """
    if not is_elf(elf):
        raise BadImage("the kernel image holds no ELF file")
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
