# SPDX-License-Identifier: MIT
"""Following a few pages: the probes of bpf/journey.c, and the events that they leave."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rsplice.audit import MissingProbe, finding_label
from rsplice.errors import RspliceError
from rsplice.journey import (
    ANY_FINDING,
    AT_ONCE,
    HOWS,
    MARKS,
    PAGES_MAX,
    SHARE,
    STEPS,
    Event,
    Request,
)
from rsplice.tracers import findings, operations
from rsplice.tracers.btf import Btf
from rsplice.tracers.layout import Field, Layout
from rsplice.tracers.program import BpfError, Program

#: Kernel fields that only journeys need, and what is not told without them.
FEATURES = {
    "journey": "no page can be followed",
    "name": "files have no names in journeys",
    "block": "what a device fills or writes back is not seen in journeys",
}
FIELDS = (
    Field("J_MAPPING_HOST", ("address_space.host",), "journey"),
    Field("J_FOLIO_INDEX", ("folio.index", "page.index"), "journey"),
    Field("J_INODE_INO", ("inode.i_ino",), "journey"),
    Field("J_SB_DEV", ("super_block.s_dev",), "journey"),
    Field("J_BUF_OFFSET", ("pipe_buffer.offset",), "journey"),
    Field("J_INODE_DENTRY", ("inode.i_dentry.first",), "name"),
    Field("J_DENTRY_ALIAS", ("dentry.d_u.d_alias", "dentry.d_alias"), "name"),
    Field("J_DENTRY_NAME", ("dentry.d_name.name",), "name"),
    Field("J_BIO_VCNT", ("bio.bi_vcnt",), "block"),
    Field("J_BIO_SIZE", ("bio.bi_iter.bi_size",), "block"),
    Field("J_BIO_INDEX", ("bio.bi_iter.bi_idx",), "block"),
    Field("J_BIO_DONE", ("bio.bi_iter.bi_bvec_done", "bio.bi_iter.bi_offset"), "block"),
    Field("J_BIO_VECS", ("bio.bi_io_vec",), "block"),
    Field("J_BIO_OPF", ("bio.bi_opf",), "block"),
    Field("J_BIO_STATUS", ("bio.bi_status",), "block"),
    Field("J_BIO_NEXT", ("bio.bi_next",), "block"),
    Field("J_RQ_BIO", ("request.bio",), "block"),
    Field("J_RQ_LENGTH", ("request.__data_len",), "block"),
    Field("J_BVEC_PAGE", ("bio_vec.bv_page",), "block"),
    Field("J_BVEC_LEN", ("bio_vec.bv_len",), "block"),
    Field("J_BVEC_OFFSET", ("bio_vec.bv_offset",), "block"),
    Field("J_FUSE_ERROR", ("fuse_req.out.h.error",), "fuse"),
)


@dataclass(frozen=True)
class Hook:
    """One program of bpf/journey.c, ``jt_<tracepoint>``, and what is not told without it."""

    tracepoint: str
    cost: str
    feature: str = "journey"
    older: str = ""  #: its name on older kernels, with the same first argument
    required: bool = False  #: stories would be wrong without it
    probed: str = ""  #: the program of bpf/moments.c that tells the same at that very moment
    instead: str = ""  #: the same, where the kernel has no such tracepoint

    def name_on(self, btf: Btf) -> str:
        """The tracepoint's name on this kernel, "" if it has none."""
        names = (self.tracepoint, self.older)
        return next((n for n in names if n and btf.tracepoint_id(n) is not None), "")


#: Attached in this order, and before the audit's own: see jt_fuse_request_end.
HOOKS = (
    Hook("mm_page_free", "the ends of pages are not seen in journeys", required=True),
    Hook("mm_page_alloc", "allocations are not seen in journeys"),
    Hook("block_bio_queue", "pages that are allocated in bulk seem to come from nowhere", "block"),
    Hook("block_rq_complete", FEATURES["block"], "block"),
    Hook("block_bio_complete", "what devices made of others fill is not seen in journeys", "block"),
    Hook("mm_filemap_add_to_page_cache", "page-cache inserts are not seen in journeys"),
    Hook("mm_filemap_delete_from_page_cache", "page-cache removals are not seen in journeys"),
    Hook("mm_filemap_map_pages", "pages mapped by fault-around are not seen in journeys",
         probed="jm_mapped"),
    Hook("mm_filemap_fault", "pages mapped by a fault are not seen in journeys",
         probed="jm_mapped"),
    Hook("rss_stat", "pages mapped by a fault, and unmapped, are not seen in journeys",
         probed="jm_unmapped"),
    Hook("mm_lru_insertion", "LRU lists are not seen in journeys"),
    Hook("writeback_dirty_folio", "dirtied pages are not seen in journeys", "journey",
         "writeback_dirty_page"),
    Hook("fuse_request_end", "pages moved by FUSE replies are not seen in journeys", "fuse",
         instead="move_page"),
    Hook("net_dev_start_xmit", "pages that are sent are not seen in journeys", "network"),
    Hook("sys_exit", "pages in pipes are not seen in journeys", required=True),
)  # fmt: skip

#: Programs that jt_sys_exit ends in, by their place in journey_programs.
TAILS = ("jt_scan", "jt_complete")

_FLAGS = ("locked", "referenced", "uptodate", "dirty", "lru", "active", "writeback", "swapbacked")
_PAGE = mmap.PAGESIZE
# bpf/journey.c: struct journey_event
_EVENT = struct.Struct("=13Q6I2i8I16s16s32s")
_TARGET = struct.Struct("=QQQ")  # struct target
_NUMBER = struct.Struct("=I")  # of a page: also the first word of struct journey
# include/uapi/linux/bpf.h
_BUSY, _DISCARD, _HEADER = 1 << 31, 1 << 30, 8


#: Where pages of findings are followed: so many are kept, of the PAGES_MAX that are followed.
_KEPT = 24
#: Events that are kept of a page from its finding on, its end not counted.
_AFTER = 16
#: Pages that are tried at most between two looks at the ring, which holds their events.
_TRIES = 1024


def finding_bits(name: str) -> int:
    """The bit of the finding *name*, in the order of findings.NAMES; "any" is all, "" none."""
    names = findings.NAMES
    return sum(1 << n for n, known in enumerate(names) if known and name in (ANY_FINDING, known))


def ring_pages(pages: int) -> int:
    """The ring's size: room for all events that so many pages may have, and for marks."""
    wanted = 2 * pages * (SHARE + 8) * (_EVENT.size + _HEADER)
    size = 16
    while size * _PAGE < wanted:
        size *= 2
    return size


@dataclass
class Follower:
    """The part of a tracer that follows pages.

    :param request: which pages
    :raises RspliceError: they cannot be followed here
    """

    request: Request

    def __post_init__(self) -> None:
        self._missing: dict[str, str] = {}
        self._flags: dict[int, str] = {}
        self._file = -1
        self._program: Program | None = None
        self._ring: Ring | None = None
        self._findings = finding_bits(self.request.finding)
        #: pages that are followed at the same time
        self._places = PAGES_MAX if self._findings else self.request.pages
        if self.request.file is not None:
            self._file = _open(self.request.file)

    def defines(self, btf: Btf, layout: Layout) -> str:
        """The constants of bpf/journey.c as C text. RspliceError if it cannot work here."""
        if not layout.has("identity"):
            raise RspliceError(f"--journey cannot follow pages here: {layout.missing['identity']}")
        constants, self._missing = _resolve(btf)
        if "journey" in self._missing:
            raise RspliceError(f"--journey cannot follow pages here: {self._missing['journey']}")
        self._flags = _flags(btf)
        for feature in ("network", "fuse"):
            if feature in layout.missing:
                self._missing[feature] = layout.missing[feature]
        constants |= {
            "JOURNEY": 1,
            "JOURNEY_MAX": self._places,
            "JOURNEY_SHARE": SHARE,
            "JOURNEY_HITS": max(8, 1 << (2 * self._places - 1).bit_length()),
            "JOURNEY_FILE": int(self._file >= 0),
            "JOURNEY_FINDINGS": self._findings,
            "JOURNEY_EACH": self.request.pages,
            "JOURNEY_KEPT": _KEPT,
            "JOURNEY_AFTER": _AFTER,
            "JOURNEY_RING_PAGES": ring_pages(self._places),
            "J_HAVE_NAME": int("name" not in self._missing),
            "J_HAVE_BLOCK": int("block" not in self._missing),
            # Before 5.12 the queue came first.
            "J_BIO_ARGUMENT": len(btf.tracepoint_args("block_bio_queue") or [""]) - 1,
        }
        return "".join(f"#define {name} {value}\n" for name, value in constants.items())

    def attach(
        self,
        program: Program,
        btf: Btf,
        attached: list[str],
        missing: list[MissingProbe],
        strict: bool,
        probed: Container[str] = (),
    ) -> None:
        """Attaches all programs that this kernel has tracepoints for.

        BpfError if the kernel refuses one: any if *strict*, else one that none can do without.

        :param probed: programs of bpf/moments.c that are attached
        """
        self._program = program
        names = self._names(btf, missing, probed)
        with ThreadPoolExecutor() as pool:
            tails = [pool.submit(program.load, function, "sys_exit") for function in TAILS]
            loads = [pool.submit(program.load, f"jt_{h.tracepoint}", n) for h, n in names.items()]
        for index, tail in enumerate(tails):
            program.set_tail("journey_programs", index, tail.result())
            os.close(tail.result())  # the array holds it
        for (hook, name), load in zip(names.items(), loads, strict=True):
            try:
                program.attach(load.result(), name)
                attached.append(f"journey {hook.tracepoint}")
            except BpfError as error:
                if strict or hook.required:
                    raise
                missing.append(MissingProbe(f"journey {hook.tracepoint}", str(error), hook.cost))

    def _names(
        self, btf: Btf, missing: list[MissingProbe], probed: Container[str]
    ) -> dict[Hook, str]:
        """The tracepoints of this kernel; those that it lacks are noted as missing."""
        names: dict[Hook, str] = {}
        for hook in HOOKS:
            if hook.probed in probed:
                continue
            name = hook.name_on(btf)
            reason = self._missing.get(hook.feature)
            if name and not reason:
                names[hook] = name
                continue
            if not name and hook.instead in probed:
                continue
            reason = reason or "this kernel has no such tracepoint"
            missing.append(MissingProbe(f"journey {hook.tracepoint}", reason, hook.cost))
        if "name" in self._missing:
            reason = self._missing["name"]
            missing.append(MissingProbe("journey names", reason, FEATURES["name"]))
        return names

    def begin(self) -> None:
        """Begins to read; to be called once everything is attached."""
        assert self._program is not None
        if self._ring is not None:
            self._ring.close()
        self._ring = Ring(self._program.map("journey_ring").fd, ring_pages(self._places))
        self._allow_more()
        if self._file >= 0:
            self._find_file(self._program)

    def _find_file(self, program: Program) -> None:
        """Has the kernel side look up the file behind our descriptor, at a call of ours."""
        target, key = program.map("journey_target"), bytes(4)
        target.put(key, _TARGET.pack(self._file + 1, 0, os.getpid()))
        # Any call that carries something; to read the file would put it into the page cache.
        reader, writer = os.pipe()
        os.write(writer, b"x")
        os.close(reader)
        os.close(writer)
        values = target.get(key)
        if not values or not _TARGET.unpack(values[0])[1]:
            raise RspliceError("--journey-file: the file's page cache was not found")

    def read(self, kind: Callable[[int], str], frame: Callable[[int], int | None]) -> list[Event]:
        """The events since the last time.

        :param kind: the name of an end, from its word
        :param frame: the page frame's number, from the address of its struct page
        """
        if self._ring is None:
            return []
        records = self._ring.drain()
        self._allow_more()
        return [_event(record, kind, frame, self._flags) for record in records]

    def _allow_more(self) -> None:
        """Lets further pages be chosen: of findings so many more, else those asked for."""
        assert self._program is not None
        limit, key = self.request.pages, bytes(4)
        if self._findings:
            (taken,) = _NUMBER.unpack((self._program.map("journey_taken").get(key) or [key])[0])
            limit = taken + _TRIES
        self._program.map("journey_limit").put(key, _NUMBER.pack(limit))

    def live(self) -> set[int]:
        """The numbers of the pages that are followed now."""
        if self._program is None:
            return set()
        values = self._program.map("journeys").items()
        return {_NUMBER.unpack_from(v[0])[0] for _, v in values}

    def lost(self) -> int:
        """Events for which the ring had no room."""
        if self._program is None:
            return 0
        values = self._program.map("journey_unkept").items()
        return sum(struct.unpack("=Q", v[0])[0] for _, v in values)

    def beyond(self) -> dict[int, int]:
        """How many events beyond its share each page had."""
        if self._program is None:
            return {}
        table = self._program.map("journey_beyond").items()
        return {struct.unpack("=I", k)[0]: struct.unpack("=Q", v[0])[0] for k, v in table}

    def close(self) -> None:
        """Lets go of the ring and of the file."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._program = None


class Ring:
    """A BPF ring buffer, read without libbpf (Documentation/bpf/ringbuf.rst).

    x86 keeps loads in order, so that what a position covers is there when the position is.

    :param fd: of the map
    :param pages: its size in pages, a power of two
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._size = pages * _PAGE
        self._consumer = mmap.mmap(fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The data follow the producer's page, twice, so that no record is cut in two.
        self._producer = mmap.mmap(
            fd, _PAGE + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE
        )

    def drain(self) -> list[bytes]:
        """The records that are complete, oldest first."""
        records = []
        (at,) = struct.unpack_from("=Q", self._consumer)
        (end,) = struct.unpack_from("=Q", self._producer)
        while at < end:
            place = _PAGE + at % self._size
            (head,) = struct.unpack_from("=I", self._producer, place)
            if head & _BUSY:
                break  # it is being written
            length = head & ~(_BUSY | _DISCARD)
            if not head & _DISCARD:
                records.append(self._producer[place + _HEADER : place + _HEADER + length])
            at += (length + _HEADER + 7) & ~7
        struct.pack_into("=Q", self._consumer, 0, at)
        return records

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()


def _resolve(btf: Btf) -> tuple[dict[str, int], dict[str, str]]:
    """The constants of this kernel, and what it lacks for each feature."""
    constants: dict[str, int] = {}
    missing: dict[str, str] = {}
    for wanted in FIELDS:
        found = next((m for m in map(btf.member, wanted.paths) if m is not None), None)
        if found is None:
            missing.setdefault(wanted.feature, f"this kernel has no {wanted.paths[0]}")
            constants[wanted.name] = 0
        else:
            constants[wanted.name] = found.offset
    size = btf.sizeof("bio_vec")
    if size is None:
        missing.setdefault("block", "this kernel has no struct bio_vec")
    constants["J_BVEC_SIZE"] = size or 0
    return constants, missing


def _open(path: str) -> int:
    """A descriptor of the file to be followed. RspliceError if it has no page cache."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RspliceError(f"--journey-file: cannot open {path}: {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return descriptor
    os.close(descriptor)
    raise RspliceError(f"--journey-file: {path} is neither a file nor a block device")


def _flags(btf: Btf) -> dict[int, str]:
    """The page flags that are worth telling, by their bit in page.flags."""
    bits = {name: btf.enumerator("pageflags", f"PG_{name}") for name in _FLAGS}
    return {1 << bit: name for name, bit in bits.items() if bit is not None}


def _event(
    record: bytes,
    kind: Callable[[int], str],
    frame: Callable[[int], int | None],
    names: Mapping[int, str],
) -> Event:
    fields = _EVENT.unpack(record[: _EVENT.size])
    (time, mapping, flags, index, inode, end, call, call_time, call_filled, born, filled, address,
     born_mapped, number, step, via, how, pid, tid, refcount, mapcount, pages, device, born_pid,
     born_exact, first, direct, slots, exact, comm, born_comm, name) = fields  # fmt: skip
    is_mark = STEPS[step] == "mark"
    is_finding = STEPS[step] == "finding"
    is_device = STEPS[step] == "filled" and HOWS[how] == "device"
    return Event(
        time=time,
        page=number,
        frame=frame(address),
        step=MARKS[filled] if is_mark else STEPS[step],
        how=str(how) if is_mark else "" if is_finding else HOWS[how],
        via=operations.via_name(via) if end else "",
        end=kind(end) + (" O_DIRECT" if direct else "") if end else "",
        pid=pid,
        tid=tid,
        comm=_text(comm),
        call=call,
        call_time=call_time,
        call_filled=0 if is_mark else call_filled,
        nbytes=call_filled if is_mark else 0,
        is_mark=is_mark,
        finding=_label(how, filled) if is_finding else "",
        refcount=refcount,
        mapcount=mapcount,
        flags=tuple(word for bit, word in names.items() if flags & bit),
        anonymous=bool(mapping & 3),
        cached=bool(mapping and not mapping & 3),
        inode=inode,
        device=device,
        name=_text(name),
        index=index,
        pages=pages,
        slots=slots,
        first=bool(first),
        born=born,
        born_pid=born_pid,
        born_comm=_text(born_comm),
        born_exact=bool(born_exact),
        born_mapped=born_mapped,
        exact=bool(exact) or STEPS[step] in AT_ONCE or is_device,
        filled=0 if is_mark or is_finding else filled,
    )


def _label(number: int, reason: int) -> str:
    name = findings.NAMES[number]
    return finding_label(name, findings.meaning(name, reason, "").reason)


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="surrogateescape")
