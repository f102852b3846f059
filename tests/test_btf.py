# SPDX-License-Identifier: MIT
"""The BTF reader, on BTF made by hand: each case is a few types whose places are known."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplice.errors import RspliceError
from rsplice.tracers.btf import Btf, Member

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FORWARD, TYPEDEF = range(1, 9)
CONST, FUNC, FUNC_PROTO, ENUM64 = 10, 12, 13, 19


class Types:
    """Writes raw BTF (Documentation/bpf/btf.rst). Each method returns the new type's id.

    :param base: what split BTF builds on: ids and names count on from it
    """

    def __init__(self, base: Types | None = None) -> None:
        self._first_name: int = base._first_name + len(base._names) if base else 0
        self._last: int = base._last if base else 0
        self._names: bytes = b"" if base else b"\0"
        self._types = b""

    def add(
        self,
        kind: int,
        name: str,
        size_or_type: int,
        *extra: int,
        count: int = 0,
        flag: bool = False,
    ) -> int:
        """A type: *extra* are the words that follow the three of every type."""
        info = flag << 31 | kind << 24 | count
        self._types += struct.pack(
            f"<{3 + len(extra)}I", self.name(name), info, size_or_type, *extra
        )
        self._last += 1
        return self._last

    def integer(self, name: str = "int", size: int = 4) -> int:
        return self.add(INT, name, size, size * 8)

    def compound(self, kind: int, name: str, size: int, *members: tuple[str, int, int]) -> int:
        """A struct or union of (name, type, offset in bytes)."""
        return self.bits(kind, name, size, *((m, t, offset * 8, 0) for m, t, offset in members))

    def bits(self, kind: int, name: str, size: int, *members: tuple[str, int, int, int]) -> int:
        """The same of (name, type, offset in bits, width of a bitfield or 0)."""
        words = [
            word
            for member, tid, offset, width in members
            for word in (self.name(member), tid, width << 24 | offset)
        ]
        flag = any(width for *_, width in members)
        return self.add(kind, name, size, *words, count=len(members), flag=flag)

    def prototype(self, *arguments: int) -> int:
        words = [word for tid in arguments for word in (0, tid)]
        return self.add(FUNC_PROTO, "", 0, *words, count=len(arguments))

    def enum(self, name: str, **values: int) -> int:
        words = [word for n, value in values.items() for word in (self.name(n), value)]
        return self.add(ENUM, name, 4, *words, count=len(values))

    def raw(self) -> bytes:
        header = struct.pack(
            "<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self._types), len(self._types), len(self._names)
        )
        return header + self._types + self._names

    def name(self, name: str) -> int:
        """The place of *name* among the names, where it is put."""
        if not name:
            return 0
        self._names += name.encode() + b"\0"
        return self._first_name + len(self._names) - len(name) - 1


@pytest.fixture
def types() -> Types:
    return Types()


def load(directory: Path, types: Types) -> Btf:
    path = directory / "btf"
    path.write_bytes(types.raw())
    return Btf(str(path))


def the_line_of(error: pytest.ExceptionInfo[RspliceError]) -> str:
    line = str(error.value)
    assert line and line.isprintable()
    return line


def test_members_of_anonymous_members_count_as_the_structs_own(
    types: Types, tmp_path: Path
) -> None:
    word = types.integer()
    inner = types.compound(STRUCT, "", 8, ("low", word, 0), ("high", word, 4))
    either = types.compound(UNION, "", 8, ("", inner, 0), ("whole", word, 0))
    types.compound(STRUCT, "outer", 24, ("first", word, 0), ("", either, 8), ("last", word, 16))
    btf = load(tmp_path, types)
    places = {
        name: btf.member(f"outer.{name}") for name in ("first", "low", "high", "whole", "last")
    }
    assert places == {
        "first": Member(0, 4),
        "low": Member(8, 4),
        "high": Member(12, 4),
        "whole": Member(8, 4),
        "last": Member(16, 4),
    }


def test_named_members_add_up_through_typedefs_and_qualifiers(types: Types, tmp_path: Path) -> None:
    word = types.integer()
    inner = types.compound(STRUCT, "inner", 12, ("a", word, 0), ("b", word, 8))
    alias = types.add(TYPEDEF, "inner_t", types.add(CONST, "", inner))
    middle = types.compound(STRUCT, "middle", 32, ("in", alias, 20))
    types.compound(STRUCT, "outer", 64, ("mid", middle, 32))
    btf = load(tmp_path, types)
    assert btf.member("outer.mid.in.b") == Member(32 + 20 + 8, 4)
    assert btf.member("outer.mid.in") == Member(52, 12)
    assert btf.member("outer") == Member(0, 64)


def test_sizes_of_arrays_and_pointers(types: Types, tmp_path: Path) -> None:
    word = types.integer("short", 2)
    row = types.add(ARRAY, "", 0, word, word, 7)
    grid = types.add(ARRAY, "", 0, row, word, 11)
    inner = types.compound(STRUCT, "inner", 8, ("a", word, 0))
    pointer = types.add(PTR, "", inner)
    types.compound(STRUCT, "s", 200, ("grid", grid, 2), ("pointer", pointer, 160))
    btf = load(tmp_path, types)
    assert btf.member("s.grid") == Member(2, 2 * 7 * 11)
    assert btf.member("s.pointer") == Member(160, 8)
    assert btf.member("s.pointer.a") is None, "a pointer is not followed"
    assert btf.member("s.grid.a") is None


@pytest.mark.parametrize("offset", [32, 35], ids=["at a byte", "within a byte"])
@pytest.mark.parametrize("nested", [False, True], ids=["own", "of an anonymous member"])
def test_a_bitfield_is_refused(types: Types, tmp_path: Path, offset: int, nested: bool) -> None:
    word = types.integer()
    name = "" if nested else "s"
    inner = types.bits(
        STRUCT, name, 8, ("plain", word, 0, 0), ("flag", word, offset, 1), ("after", word, 40, 0)
    )
    if nested:
        types.compound(STRUCT, "s", 16, ("", inner, 8))
    btf = load(tmp_path, types)
    with pytest.raises(RspliceError) as error:
        btf.member("s.flag")
    assert "s.flag is a bitfield" in the_line_of(error)
    shift = 8 if nested else 0
    assert btf.member("s.plain") == Member(shift, 4)
    assert btf.member("s.after") == Member(shift + 5, 4), "what stands beside one is no bitfield"


def test_what_a_kernel_lacks_is_none(types: Types, tmp_path: Path) -> None:
    word = types.integer()
    types.compound(STRUCT, "s", 4, ("a", word, 0))
    types.compound(UNION, "u", 4, ("a", word, 0))
    types.add(FORWARD, "forward", 0)
    types.enum("e", A=1)
    btf = load(tmp_path, types)
    for path in ("s.b", "s.a.b", "absent.a", "forward.a", "u.a", "forward"):
        assert btf.member(path) is None, path
    assert btf.struct_id("absent") is None
    assert btf.struct_id("u") is None, "a union is no struct"
    assert btf.sizeof("forward") is None
    assert btf.enumerator("e", "B") is None
    assert btf.enumerator("absent", "A") is None
    assert btf.tracepoint_id("absent") is None
    assert btf.tracepoint_args("absent") is None
    assert btf.function_id("absent") is None


def test_enumerators_functions_and_sizes(types: Types, tmp_path: Path) -> None:
    types.enum("e", A=3, B=5)
    wide = (types.name("C"), 17, 0)
    types.add(ENUM64, "wide", 8, *wide, count=1)
    types.compound(STRUCT, "s", 23)
    function = types.add(FUNC, "f", types.prototype())
    btf = load(tmp_path, types)
    assert (btf.enumerator("e", "A"), btf.enumerator("e", "B")) == (3, 5)
    assert btf.enumerator("wide", "C") == 17
    assert btf.sizeof("s") == 23
    assert btf.function_id("f") == function
    assert btf.function_id("s") is None


def test_a_tracepoints_arguments_without_its_private_pointer(types: Types, tmp_path: Path) -> None:
    word = types.integer("long int", 8)
    void = types.add(PTR, "", 0)
    folio = types.add(PTR, "", types.add(CONST, "", types.compound(STRUCT, "folio", 64)))
    alias = types.add(TYPEDEF, "gfp_t", word)
    table = types.add(PTR, "", folio)
    proto = types.add(PTR, "", types.prototype(void, void, word, folio, alias, table))
    tracepoint = types.add(TYPEDEF, "btf_trace_insert", proto)
    btf = load(tmp_path, types)
    assert btf.tracepoint_id("insert") == tracepoint
    assert btf.tracepoint_args("insert") == [
        "void *",
        "long int",
        "struct folio *",
        "gfp_t",
        "struct folio **",
    ]


def test_a_modules_types_build_on_the_kernels(types: Types, tmp_path: Path) -> None:
    word = types.integer()
    inner = types.compound(STRUCT, "inner", 8, ("a", word, 4))
    module = Types(types)
    module.compound(STRUCT, "outer", 32, ("b", inner, 16))
    kernel = load(tmp_path, types)
    path = tmp_path / "module"
    path.write_bytes(module.raw())
    split = Btf(str(path), kernel)
    del kernel  # the module's types keep what they build on
    assert split.member("outer.b.a") == Member(20, 4)
    assert split.member("inner.a") == Member(4, 4)


@given(
    st.recursive(
        st.just(None),
        lambda below: st.lists(st.tuples(st.booleans(), below), min_size=1, max_size=3),
        max_leaves=23,
    )
)
@settings(max_examples=97, deadline=None)
def test_any_nesting_of_anonymous_structs_and_unions(
    tmp_path_factory: pytest.TempPathFactory, tree: object
) -> None:
    """A tree of (union or struct, what is inside), with integers for leaves."""
    types = Types()
    word = types.integer()
    expected: dict[str, Member] = {}

    def build(node: object, start: int, name: str, union: bool) -> tuple[int, int]:
        """(type, size) of *node*, which lies at *start* in the outermost struct."""
        assert isinstance(node, list)
        members, at, end = [], 0, 0
        for inner_union, below in node:
            if below is None:
                leaf = f"m{len(expected)}"
                expected[leaf] = Member(start + at, 4)
                members.append((leaf, word, at))
                size = 4
            else:
                tid, size = build(below, start + at, "", inner_union)
                members.append(("", tid, at))
            end = max(end, at + size)
            at = 0 if union else end
        return types.compound(UNION if union else STRUCT, name, end, *members), end

    _, size = build(tree if isinstance(tree, list) else [(False, None)], 0, "outer", False)
    btf = load(tmp_path_factory.mktemp("nesting"), types)
    assert {name: btf.member(f"outer.{name}") for name in expected} == expected
    assert btf.sizeof("outer") == size


def test_a_missing_file_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    path = str(tmp_path / "absent")
    with pytest.raises(RspliceError) as error:
        Btf(path)
    line = the_line_of(error)
    assert path in line and "CONFIG_DEBUG_INFO_BTF" in line


def test_a_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RspliceError) as error:
        Btf(str(tmp_path))
    assert str(tmp_path) in the_line_of(error)


def test_a_file_cut_short_anywhere_is_one_line(types: Types, tmp_path: Path) -> None:
    word = types.integer()
    types.compound(STRUCT, "s", 8, ("a", word, 0), ("b", word, 4))
    whole = types.raw()
    path = tmp_path / "btf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RspliceError) as error:
            Btf(str(path))
        assert "damaged or not BTF" in the_line_of(error), length
    path.write_bytes(whole)
    assert Btf(str(path)).member("s.b") == Member(4, 4)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 97, b"\x7fELF", b"#!/bin/sh\n", struct.pack("<HBB", 0xEB9F, 1, 0) + b"\xff" * 97],
    ids=["empty", "zeros", "ELF magic", "a script", "absurd header"],
)
def test_a_file_that_is_not_btf_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "btf"
    path.write_bytes(content)
    with pytest.raises(RspliceError) as error:
        Btf(str(path))
    assert str(path) in the_line_of(error)
