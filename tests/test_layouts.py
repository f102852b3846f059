# SPDX-License-Identifier: MIT
"""The layouts of real kernels, from the BTF of Debian's packages and of the running kernel.

What the library finds is compared, field by field, with another reader of BTF that shares no code
with it; and what each kernel lacks, with tables kept here.
"""

from __future__ import annotations

import functools
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from rsplice.errors import RspliceError
from rsplice.tracers import layout
from rsplice.tracers.btf import RUNNING, Btf
from rsplice.tracers.layout import FEATURES, FIELDS, Field, Layout, resolve
from rsplice.tracers.tracer import PROBES
from tests.support.kernel_btf import SUITES, KernelBtf, Unavailable, fetch_all

# The first test that needs a kernel waits for the downloads of all of them.
pytestmark = pytest.mark.timeout(600)

AT_LEAST = 3

#: What is switched off on each kernel, and the field for the lack of which it is.
OFF: dict[str, dict[str, str]] = {
    "5.10": {
        "folio": "folio._nr_pages",
        "mapcount": "folio._large_mapcount",
        "fuse": "fuse_req.args",
        "io_uring": "io_kiocb.cqe.user_data",
        "fuse_ring": "fuse_req.ring_queue",
        "registered": "io_kiocb.buf_node",
    },
    "6.1": {
        "mapcount": "folio._large_mapcount",
        "fuse": "fuse_req.args",
        "fuse_ring": "fuse_req.ring_queue",
        "registered": "io_kiocb.buf_node",
    },
    "6.12": {"fuse_ring": "fuse_req.ring_queue", "registered": "io_kiocb.buf_node"},
    "7.2": {},
    "7.3": {},
}

#: The tracepoints that a kernel does not have.
NO_TRACEPOINT: dict[str, set[str]] = {
    "5.10": {
        "mm_filemap_map_pages",
        "fuse_request_send",
        "fuse_request_end",
        "io_uring_submit_req",
    },
    "6.1": {
        "mm_filemap_map_pages",
        "fuse_request_send",
        "fuse_request_end",
        "io_uring_submit_req",
    },
    "6.12": set(),
    "7.2": set(),
    "7.3": set(),
}

#: Which alternative of a field each kernel has; None for none.
ALTERNATIVES: dict[str, dict[str, str | None]] = {
    "PAGE_HEAD": {
        "5.10": "page.compound_head",
        "6.1": "page.compound_head",
        "6.12": "page.compound_head",
        "7.2": "page.compound_info",
        "7.3": "page.compound_info",
    },
    "PAGE_MAPPING": {
        "5.10": "page.mapping",
        "6.1": "folio.mapping",
        "6.12": "folio.mapping",
        "7.2": "folio.mapping",
        "7.3": "folio.mapping",
    },
    "FOLIO_PAGES": {
        "5.10": None,
        "6.1": "folio._folio_nr_pages",
        "6.12": "folio._folio_nr_pages",
        "7.2": "folio._nr_pages",
        "7.3": "folio._nr_pages",
    },
    "FRAG_PAGE": {
        "5.10": "bio_vec.bv_page",
        "6.1": "bio_vec.bv_page",
        "6.12": "skb_frag.netmem",
        "7.2": "skb_frag.netmem",
        "7.3": "skb_frag.netmem",
    },
    "FILE_REF": {
        "5.10": "file.f_count",
        "6.1": "file.f_count",
        "6.12": "file.f_count",
        "7.2": "file.f_ref",
        "7.3": "file.f_ref",
    },
    "PAGE_INDEX": {
        "5.10": "page.index",
        "6.1": "folio.index",
        "6.12": "folio.index",
        "7.2": "folio.index",
        "7.3": "folio.index",
    },
    "KIOCB_TASK": {
        "5.10": "io_kiocb.task",
        "6.1": "io_kiocb.task",
        "6.12": "io_kiocb.task",
        "7.2": "io_kiocb.tctx",
        "7.3": "io_kiocb.tctx",
    },
}

#: The arguments that the BPF programs take, by place: any one of the types.
ARGUMENTS: dict[str, dict[int, tuple[str, ...]]] = {
    "sys_exit": {0: ("struct pt_regs *",), 1: ("long int",)},
    "sys_enter": {0: ("struct pt_regs *",), 1: ("long int",)},
    "sched_process_fork": {0: ("struct task_struct *",), 1: ("struct task_struct *",)},
    "sched_process_exit": {0: ("struct task_struct *",)},
    "sched_process_exec": {0: ("struct task_struct *",), 1: ("pid_t",)},
    "mm_filemap_add_to_page_cache": {0: ("struct folio *", "struct page *")},
    "mm_filemap_delete_from_page_cache": {0: ("struct folio *", "struct page *")},
    "mm_filemap_map_pages": {1: ("long unsigned int",), 2: ("long unsigned int",)},
    "page_fault_user": {},
    "skb_copy_datagram_iovec": {0: ("struct sk_buff *",), 1: ("int",)},
    "net_dev_start_xmit": {0: ("struct sk_buff *",), 1: ("struct net_device *",)},
    "signal_deliver": {},
    "fuse_request_send": {0: ("struct fuse_req *",)},
    "fuse_request_end": {0: ("struct fuse_req *",)},
    "io_uring_submit_req": {0: ("struct io_kiocb *",)},
    # The request is the second argument; the result follows it, by value or as a completion.
    "io_uring_complete": {1: ("void *",), 2: ("struct io_uring_cqe *", "u64")},
}


#: Fields of which the BPF programs read, on purpose, more or less than they are wide (bytes).
OTHER_WIDTHS = {
    "KIOCB_FLAGS": 4,  # the low half has all flags that are looked at
    "DISK_NAME": 8,  # how it begins
}

BPF_SOURCES = Path(layout.__file__).parent / "bpf"


# --- another reader -------------------------------------------------------------------------------

_KIND_INT, _KIND_PTR, _KIND_ARRAY, _KIND_STRUCT, _KIND_UNION, _KIND_ENUM = range(1, 7)
_KIND_TYPEDEF, _KIND_FUNC_PROTO, _KIND_ENUM64 = 8, 13, 19
_QUALIFIERS = {9, 10, 11, 18}
# Bytes behind the three words of a type: fixed, and for each element.
_FIXED = {_KIND_INT: 4, _KIND_ARRAY: 12, 14: 4, 17: 4}
_EACH = {_KIND_STRUCT: 12, _KIND_UNION: 12, _KIND_ENUM: 8, _KIND_FUNC_PROTO: 8, 15: 12, 19: 12}


@dataclass(frozen=True)
class Type:
    name: str
    kind: int
    size_or_type: int
    elements: list[tuple[int, ...]]
    has_bitfields: bool


class Walker:
    """Reads raw BTF (Documentation/bpf/btf.rst) with nothing but struct.unpack."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        header, types, length, names, _ = struct.unpack_from("<4x5I", self._data)
        self._names = header + names
        self._places = [-1]
        self._ids: dict[tuple[str, int], int] = {}
        at, end = header + types, header + types + length
        while at < end:
            name, info, _ = struct.unpack_from("<III", self._data, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            self._ids.setdefault((self._name(name), kind), len(self._places))
            self._places.append(at)
            at += 12 + _FIXED.get(kind, 0) + _EACH.get(kind, 0) * count

    def _type(self, tid: int) -> Type:
        if not tid:
            return Type("void", 0, 0, [], False)
        at = self._places[tid]
        name, info, size_or_type = struct.unpack_from("<III", self._data, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        each, count = (12, 1) if kind == _KIND_ARRAY else (_EACH.get(kind, 0), count)
        elements = self._data[at + 12 : at + 12 + each * count]
        words = list(struct.iter_unpack(f"<{each // 4}I", elements)) if each else []
        return Type(self._name(name), kind, size_or_type, words, bool(info >> 31))

    def _name(self, offset: int) -> str:
        start = self._names + offset
        return self._data[start : self._data.index(b"\0", start)].decode()

    def _bare(self, tid: int) -> Type:
        t = self._type(tid)
        while t.kind in _QUALIFIERS | {_KIND_TYPEDEF}:
            t = self._type(t.size_or_type)
        return t

    def _size(self, tid: int) -> int:
        t = self._bare(tid)
        if t.kind == _KIND_PTR:
            return 8
        if t.kind == _KIND_ARRAY:
            element, _, count = t.elements[0]
            return count * self._size(element)
        return t.size_or_type

    def _members(self, t: Type) -> dict[str, tuple[int, int]]:
        """name -> (offset in bits, type), those of anonymous members among them."""
        found: dict[str, tuple[int, int]] = {}
        for name_offset, tid, place in t.elements:
            bits = place & 0xFFFFFF if t.has_bitfields else place
            if name_offset:
                found[self._name(name_offset)] = bits, tid
            else:
                inner = self._members(self._bare(tid))
                found.update({n: (bits + at, inner_tid) for n, (at, inner_tid) in inner.items()})
        return found

    def place(self, path: str) -> tuple[int, int] | None:
        """(offset, size) of ``struct.member...``, in bytes."""
        name, *members = path.split(".")
        tid, bits = self._ids.get((name, _KIND_STRUCT)), 0
        for member in members:
            t = self._bare(tid) if tid else None
            inside = self._members(t) if t and t.kind in (_KIND_STRUCT, _KIND_UNION) else {}
            if member not in inside:
                return None
            bits, tid = bits + inside[member][0], inside[member][1]
        return (bits // 8, self._size(tid)) if tid else None

    def bit(self, struct: str, name: str) -> int | None:
        """The place of a member in bits."""
        tid = self._ids.get((struct, _KIND_STRUCT))
        return self._members(self._type(tid)).get(name, (None,))[0] if tid else None

    def enumerator(self, enum: str, name: str) -> int | None:
        tid = self._ids.get((enum, _KIND_ENUM))
        values = self._type(tid).elements if tid else []
        return next((value for at, value in values if self._name(at) == name), None)

    def arguments(self, tracepoint: str) -> list[str] | None:
        """The types of a raw tracepoint's arguments, as C spells them."""
        tid = self._ids.get((f"btf_trace_{tracepoint}", _KIND_TYPEDEF))
        if tid is None:
            return None
        prototype = self._type(self._type(self._type(tid).size_or_type).size_or_type)
        return [self._spelled(argument) for _, argument in prototype.elements[1:]]

    def _spelled(self, tid: int) -> str:
        t = self._type(tid)
        if t.kind in _QUALIFIERS:
            return self._spelled(t.size_or_type)
        if t.kind == _KIND_PTR:
            return f"{self._spelled(t.size_or_type)} *"
        return {_KIND_STRUCT: "struct "}.get(t.kind, "") + t.name


# --- the kernels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    series: str
    btf: Btf
    walker: Walker

    @functools.cached_property
    def layout(self) -> Layout:
        return resolve(self.btf)


@functools.cache
def read(series: str) -> Kernel | str:
    """The kernel, or why it cannot be looked at."""
    if series == "running":
        path = Path(RUNNING)
        if not path.exists():
            return f"this kernel has no {RUNNING}"
    else:
        fetched = fetch_all()[series]
        if isinstance(fetched, Unavailable):
            return f"the BTF of Linux {series} could not be fetched: {fetched}"
        path = fetched.vmlinux
    return Kernel(series, Btf(str(path)), Walker(path))


@pytest.fixture(params=SUITES)
def debian(request: pytest.FixtureRequest) -> Kernel:
    """Each of Debian's kernels."""
    kernel = read(request.param)
    if isinstance(kernel, str):
        pytest.skip(kernel)
    return kernel


@pytest.fixture(params=[*SUITES, "running"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each of Debian's kernels, and the one that runs here."""
    kernel = read(request.param)
    if isinstance(kernel, str):
        pytest.skip(kernel)
    return kernel


def chosen(kernel: Kernel, field: Field) -> str | None:
    """The alternative of *field* that the other reader finds first."""
    return next((path for path in field.paths if kernel.walker.place(path)), None)


def test_enough_kernels_are_checked() -> None:
    reasons = [why for series in SUITES if isinstance(why := read(series), str)]
    if len(SUITES) - len(reasons) < AT_LEAST:
        complaint = "\n".join([f"fewer than {AT_LEAST} kernels are checked:", *reasons])
        if os.environ.get("CI") == "true":
            pytest.fail(complaint, pytrace=False)
        pytest.skip(complaint)


def test_every_offset_is_the_one_that_another_reader_finds(kernel: Kernel) -> None:
    expected: dict[str, int] = {}
    for field in FIELDS:
        path = chosen(kernel, field)
        place = kernel.walker.place(path) if path else None
        if place:
            expected[field.name] = place[0]
            if field.sized:
                expected[f"{field.name}_SIZE"] = place[1]
    assert len(expected) > len(FIELDS) // 2
    found = kernel.layout.constants
    assert {name: found.get(name) for name in expected} == expected
    absent = {field.name for field in FIELDS} - expected.keys()
    assert not absent & found.keys()


def test_the_features_switched_off_are_those_that_lack_a_field(kernel: Kernel) -> None:
    lacking = {field.feature for field in FIELDS if chosen(kernel, field) is None}
    assert kernel.layout.missing.keys() == lacking
    assert lacking <= FEATURES.keys() - {"core"}


def test_what_is_switched_off_on_each_kernel_and_why(debian: Kernel) -> None:
    reasons = {
        feature: f"this kernel has no {path}" for feature, path in OFF[debian.series].items()
    }
    assert debian.layout.missing == reasons
    assert all(debian.layout.has(feature) != (feature in reasons) for feature in FEATURES)
    assert f"#define HAVE_FUSE {int('fuse' not in reasons)}\n" in debian.layout.defines()


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_the_alternative_that_each_kernel_has(debian: Kernel, name: str) -> None:
    (field,) = (field for field in FIELDS if field.name == name)
    path = ALTERNATIVES[name][debian.series]
    place = debian.walker.place(path) if path else None
    assert chosen(debian, field) == path
    assert debian.layout.constants.get(name) == (place[0] if place else None)


def widths_in_bpf_text() -> dict[str, set[int]]:
    """Constant -> bytes read at it, from every ``read<bits>(... + CONSTANT)``."""
    text = "".join(path.read_text() for path in sorted(BPF_SOURCES.glob("*.[ch]")))
    widths: dict[str, set[int]] = {}
    for constant in re.finditer(r"\b([A-Z][A-Z0-9_]+)\)", text):
        at, depth = constant.start(), 1
        while depth:
            at -= 1
            depth += {")": 1, "(": -1}.get(text[at], 0)
        read = re.search(r"\bread(8|16|32|64)$", text[at - 8 : at])
        if read:
            widths.setdefault(constant[1], set()).add(int(read[1]) // 8)
    return widths


def test_the_programs_read_as_many_bytes_as_a_field_has(kernel: Kernel) -> None:
    widths = widths_in_bpf_text()
    looked_at = [field for field in FIELDS if field.name in widths]
    assert len(looked_at) > len(FIELDS) // 2
    for field in looked_at:
        path = chosen(kernel, field)
        place = kernel.walker.place(path) if path else None
        allowed = {place[1], OTHER_WIDTHS.get(field.name)} if place else set()
        assert not place or widths[field.name] <= allowed, path


def test_sizes_of_what_is_walked_as_an_array(kernel: Kernel) -> None:
    constants = kernel.layout.constants
    for name, structs in (
        ("BUF_SIZE", ("pipe_buffer",)),
        ("PAGE_SIZE_OF", ("page",)),
        ("FRAG_SIZE", ("skb_frag", "bio_vec")),
    ):
        places = [place for struct_name in structs if (place := kernel.walker.place(struct_name))]
        assert constants[name] == places[0][1]


def test_what_differs_by_more_than_an_offset(kernel: Kernel) -> None:
    constants, walker = kernel.layout.constants, kernel.walker
    tctx = walker.place("io_kiocb.tctx")
    task = walker.place("io_uring_task.task")
    send = walker.place("io_sr_msg.flags")
    assert constants["KIOCB_TASK_IS_TCTX"] == int(tctx is not None)
    assert not tctx or (task and constants["TCTX_TASK"] == task[0])
    assert constants["IO_SEND_FLAGS"] == (send[0] if send else 0)
    assert constants["SOCK_ZEROCOPY_BIT"] == walker.enumerator("sock_flags", "SOCK_ZEROCOPY")
    for name in ("writeback", "dirty", "lru", "private", "swapbacked"):
        bit = walker.enumerator("pageflags", f"PG_{name}")
        assert bit is not None
        assert constants[f"PG_{name.upper()}_BIT"] == bit
    bit = walker.bit("fuse_args", "zero_copy")
    queue = walker.place("fuse_ring_queue.zero_copy")
    assert constants["FUSE_ZERO_COPY"] == int(queue is not None and bit is not None)
    assert constants["FUSE_ARGS_ZERO_COPY"] == (bit or 0)
    assert constants["FUSE_QUEUE_ZERO_COPY"] == (queue[0] if queue else 0)
    assert kernel.series != "7.3" or bit
    assert constants["FILE_REF_ONE"] == int(walker.place("file.f_ref") is None)
    assert constants["PG_HEAD_BIT"] == walker.enumerator("pageflags", "PG_head")
    by_completion = "struct io_uring_cqe *" in (walker.arguments("io_uring_complete") or [])
    assert constants["URING_COMPLETE_HAS_CQE"] == int(by_completion)


def test_the_tracepoints_that_each_kernel_lacks(debian: Kernel) -> None:
    wanted = {probe.tracepoint for probe in PROBES}
    lacking = {name for name in wanted if debian.btf.tracepoint_id(name) is None}
    assert lacking == NO_TRACEPOINT[debian.series]
    assert not lacking & {probe.tracepoint for probe in PROBES if probe.required}


@pytest.mark.parametrize("tracepoint", [probe.tracepoint for probe in PROBES])
def test_arguments_are_of_the_types_that_the_programs_take(kernel: Kernel, tracepoint: str) -> None:
    (probe,) = (probe for probe in PROBES if probe.tracepoint == tracepoint)
    types = kernel.btf.tracepoint_args(tracepoint)
    assert types == kernel.walker.arguments(tracepoint)
    if types is None or not kernel.layout.has(probe.feature):
        return  # not attached
    for place, allowed in ARGUMENTS[tracepoint].items():
        assert types[place] in allowed


def test_the_types_of_a_module_on_top_of_its_kernel(debian: Kernel) -> None:
    fetched = fetch_all()[debian.series]
    assert isinstance(fetched, KernelBtf)
    if debian.series != "6.1":
        assert fetched.fuse is None
        return
    module = Btf(str(fetched.fuse), debian.btf)
    assert debian.btf.struct_id("fuse_req") is None
    assert "fuse" not in resolve(module).missing


def test_a_kernel_without_the_core_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "btf"
    path.write_bytes(struct.pack("<HBB5I", 0xEB9F, 1, 0, 24, 0, 0, 0, 1) + b"\0")
    with pytest.raises(RspliceError) as error:
        resolve(Btf(str(path)))
    assert str(error.value).startswith("cannot trace this kernel: this kernel has no ")
    assert str(error.value).isprintable()
