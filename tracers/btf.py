# SPDX-License-Identifier: MIT
"""Reads struct layouts from a kernel's BTF, through libbpf.

Layouts come from the BTF of the running kernel (/sys/kernel/btf/vmlinux) or of a file that
holds raw BTF, so that no kernel headers are needed. libbpf is opened at run time (cffi, ABI
mode): its BTF functions used here exist from libbpf 0.3 to 1.x.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from cffi import FFI

from rsplice.errors import RspliceError

RUNNING = "/sys/kernel/btf/vmlinux"

# include/uapi/linux/btf.h
_KIND_STRUCT, _KIND_UNION, _KIND_ENUM = 4, 5, 6
_KIND_INT, _KIND_PTR, _KIND_ARRAY = 1, 2, 3
_KIND_TYPEDEF, _KIND_VOLATILE, _KIND_CONST, _KIND_RESTRICT = 8, 9, 10, 11
_KIND_FUNC, _KIND_FUNC_PROTO, _KIND_TYPE_TAG, _KIND_ENUM64 = 12, 13, 18, 19
_MODIFIERS = {_KIND_TYPEDEF, _KIND_VOLATILE, _KIND_CONST, _KIND_RESTRICT, _KIND_TYPE_TAG}

_ffi = FFI()
_ffi.cdef(
    """
    struct btf;
    struct btf_type { uint32_t name_off; uint32_t info; uint32_t size_or_type; };
    struct btf_member { uint32_t name_off; uint32_t type; uint32_t offset; };
    struct btf_array { uint32_t type; uint32_t index_type; uint32_t nelems; };
    struct btf_enum { uint32_t name_off; int32_t val; };
    struct btf_enum64 { uint32_t name_off; uint32_t val_lo32; uint32_t val_hi32; };
    struct btf_param { uint32_t name_off; uint32_t type; };
    struct btf *btf__parse(const char *path, void *btf_ext);
    struct btf *btf__parse_split(const char *path, struct btf *base);
    void btf__free(struct btf *btf);
    int32_t btf__find_by_name_kind(const struct btf *btf, const char *name, uint32_t kind);
    const struct btf_type *btf__type_by_id(const struct btf *btf, uint32_t id);
    const char *btf__name_by_offset(const struct btf *btf, uint32_t offset);
    int64_t btf__resolve_size(const struct btf *btf, uint32_t id);
    long libbpf_get_error(const void *ptr);
    void *libbpf_set_print(void *fn);
    """
)
_library: Any = None


def _libbpf() -> Any:
    """libbpf, opened once. RspliceError where it is not installed."""
    global _library
    if _library is None:
        for name in ("libbpf.so.1", "libbpf.so.0"):
            try:
                _library = _ffi.dlopen(name)
                break
            except OSError:
                continue
        else:
            raise RspliceError("libbpf is not installed: install libbpf1 (or libbpf0, libbpf)")
        _library.libbpf_set_print(_ffi.NULL)
    return _library


@dataclass(frozen=True)
class Member:
    """Where a member lies in its outermost struct: offset and size in bytes."""

    offset: int
    size: int


class Btf:
    """The types of one kernel. Use as a context manager, or let it be collected.

    :param path: a file of raw BTF or an ELF file with a .BTF section
    :param base: the vmlinux BTF that a module's split BTF builds on
    """

    def __init__(self, path: str = RUNNING, base: Btf | None = None) -> None:
        if not os.access(path, os.R_OK):
            raise RspliceError(
                f"no BTF at {path}: struct layouts cannot be known; "
                "use a kernel built with CONFIG_DEBUG_INFO_BTF"
            )
        lib = _libbpf()
        encoded = os.fsencode(path)
        handle = (
            lib.btf__parse_split(encoded, base._btf) if base else lib.btf__parse(encoded, _ffi.NULL)
        )
        if handle == _ffi.NULL or lib.libbpf_get_error(handle):
            raise RspliceError(f"cannot read the BTF in {path}: it is damaged or not BTF")
        self._base = base  # split BTF refers to it: keep it alive
        self._btf: Any = _ffi.gc(handle, lib.btf__free)

    def id_of(self, name: str, kind: int) -> int | None:
        """The id of the type *name* of *kind*, None where the kernel has none."""
        found = int(_libbpf().btf__find_by_name_kind(self._btf, name.encode(), kind))
        return found if found > 0 else None

    def struct_id(self, name: str) -> int | None:
        """The id of ``struct name``."""
        return self.id_of(name, _KIND_STRUCT)

    def function_id(self, name: str) -> int | None:
        """The id of the kernel function *name* (a kfunc, for one)."""
        return self.id_of(name, _KIND_FUNC)

    def function_arguments(self, name: str) -> int | None:
        """How many arguments the kernel function *name* has, None where there is none."""
        tid = self.function_id(name)
        if tid is None:
            return None
        return int(self._type(self._type(tid).size_or_type).info & 0xFFFF)

    def tracepoint_id(self, name: str) -> int | None:
        """The id of ``btf_trace_<name>``, which a tp_btf program attaches to."""
        return self.id_of(f"btf_trace_{name}", _KIND_TYPEDEF)

    def tracepoint_args(self, name: str) -> list[str] | None:
        """The types of a raw tracepoint's arguments, e.g. ["struct folio *"]; None if absent."""
        tid = self.tracepoint_id(name)
        if tid is None:
            return None
        proto = self._skip(self._type(self._type(tid).size_or_type).size_or_type)
        params = _ffi.cast("struct btf_param *", proto + 1)
        # The first argument is the tracepoint's own private pointer.
        return [self._spell(params[i].type) for i in range(1, proto.info & 0xFFFF)]

    def sizeof(self, name: str) -> int | None:
        """The size of ``struct name`` in bytes, None where the kernel has none."""
        tid = self.struct_id(name)
        return None if tid is None else int(self._type(tid).size_or_type)

    def enumerator(self, enum: str, name: str) -> int | None:
        """The value of *name* in ``enum enum``, None where there is none."""
        for kind, ctype in (
            (_KIND_ENUM, "struct btf_enum *"),
            (_KIND_ENUM64, "struct btf_enum64 *"),
        ):
            tid = self.id_of(enum, kind)
            if tid is None:
                continue
            t = self._type(tid)
            values = _ffi.cast(ctype, t + 1)
            for i in range(t.info & 0xFFFF):
                if self._name(values[i].name_off) == name:
                    return int(values[i].val if kind == _KIND_ENUM else values[i].val_lo32)
        return None

    def member(self, path: str) -> Member | None:
        """The place of ``struct.member[.member...]``; members of anonymous members count as own.

        None where the kernel lacks the struct or a member. RspliceError for a bitfield, which
        has no byte offset.
        """
        struct, *names = path.split(".")
        tid = self.struct_id(struct)
        if tid is None:
            return None
        offset = 0
        for name in names:
            found = self._find(tid, name)
            if found is None:
                return None
            bits, tid = found
            if bits < 0 or bits % 8:
                raise RspliceError(f"{path} is a bitfield: it has no byte offset")
            offset += bits // 8
        size = int(_libbpf().btf__resolve_size(self._btf, tid))
        return Member(offset, size)

    def bit(self, path: str) -> int | None:
        """The place, in bits, of the bitfield ``struct.member``; None where the kernel has none."""
        struct, name = path.split(".")
        tid = self.struct_id(struct)
        t = self._type(tid) if tid is not None else None
        if t is None or not t.info >> 31:
            return None
        members = _ffi.cast("struct btf_member *", t + 1)
        places = (
            m.offset
            for m in map(members.__getitem__, range(t.info & 0xFFFF))
            if self._name(m.name_off) == name
        )
        found = next(places, None)
        return None if found is None or not found >> 24 else int(found & 0xFFFFFF)

    def _type(self, tid: int) -> Any:
        return _libbpf().btf__type_by_id(self._btf, tid)

    def _name(self, offset: int) -> str:
        name = _ffi.string(_libbpf().btf__name_by_offset(self._btf, offset))
        assert isinstance(name, bytes)
        return name.decode()

    def _skip(self, tid: int) -> Any:
        """The type behind typedefs and qualifiers."""
        t = self._type(tid)
        while (t.info >> 24) & 0x1F in _MODIFIERS:
            t = self._type(t.size_or_type)
        return t

    def _find(self, tid: int, name: str) -> tuple[int, int] | None:
        """(bit offset, type id) of member *name*; -1 as the offset of a bitfield."""
        t = self._skip(tid)
        if (t.info >> 24) & 0x1F not in (_KIND_STRUCT, _KIND_UNION):
            return None
        bitfields = t.info >> 31
        members = _ffi.cast("struct btf_member *", t + 1)
        for i in range(t.info & 0xFFFF):
            m = members[i]
            offset = m.offset & 0xFFFFFF if bitfields else m.offset
            own = self._name(m.name_off)
            if own == name:
                return (-1 if bitfields and m.offset >> 24 else offset), m.type
            if not own:
                inner = self._find(m.type, name)
                if inner is not None:
                    return (inner[0] if inner[0] < 0 else offset + inner[0]), inner[1]
        return None

    def _spell(self, tid: int) -> str:
        """A type as C spells it, without qualifiers."""
        if tid == 0:
            return "void"
        t = self._type(tid)
        kind = (t.info >> 24) & 0x1F
        if kind == _KIND_PTR:
            return f"{self._spell(t.size_or_type)} *".replace("* *", "**")
        if kind in _MODIFIERS - {_KIND_TYPEDEF}:
            return self._spell(t.size_or_type)
        prefix = {_KIND_STRUCT: "struct ", _KIND_UNION: "union ", _KIND_ENUM: "enum "}.get(kind, "")
        return prefix + self._name(t.name_off)
