# SPDX-License-Identifier: MIT
"""Where the programs find the contents of pages (bpf/contents.h): in the kernel's direct map.

No file shows where that begins. So a page of known content is made here, and looked for.
"""

from __future__ import annotations

import mmap
import os
import struct

from cffi import FFI

from rsplice.audit import MissingProbe
from rsplice.tracers.findings import LEARNED, frame_of, one
from rsplice.tracers.program import BpfError, Program

COST = "what is in pages is not looked at"

_PAGE = 4096
# bpf/learn.c
_PUD_SHIFT, _PLACES = 30, 512
_RUNS = 128  #: of learn_direct_map, so that 64 TiB of memory are looked through


def learn(program: Program, vmemmap: int | None) -> list[MissingProbe]:
    """Tells the programs where pages can be read.

    :param vmemmap: the address of the first struct page; None where it is not known
    :return: what is missing, if it could not be found out
    """
    if vmemmap is None:
        return [_missing("page frame numbers are not known")]
    places = program.map("direct_map")
    first = struct.pack("=I", 0)
    places.put(first, struct.pack("=QQ", vmemmap, 0))
    _, _, ring = LEARNED.unpack(one(program.map("learned"), 0))
    highest = ring >> _PUD_SHIFT << _PUD_SHIFT
    words = os.urandom(16)
    ffi = FFI()
    try:
        with mmap.mmap(-1, _PAGE) as memory:
            memory[:16] = words
            view = ffi.from_buffer(memory)
            frame = frame_of(int(ffi.cast("uintptr_t", view)))
            ffi.release(view)
            for run in range(_RUNS if frame and ring else 0):
                place = highest - (run * _PLACES << _PUD_SHIFT)
                program.run_once(
                    "learn_direct_map", frame, *struct.unpack("=QQ", words), place % (1 << 64)
                )
                if one(places, 0) != struct.pack("=QQ", vmemmap, 0):
                    return []
    except (OSError, BpfError) as error:
        return [_missing(str(error))]
    return [_missing("the kernel's map of memory was not found")]


def _missing(reason: str) -> MissingProbe:
    return MissingProbe("page contents", reason, COST)
