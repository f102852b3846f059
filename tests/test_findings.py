# SPDX-License-Identifier: MIT
"""What follows from states that no sound kernel shows, or that come about by chance only.

The text that decides runs in the kernel; here it is compiled as a library of this machine's.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from hypothesis import given
from hypothesis import strategies as st

from rsplice.limits import FINDINGS
from rsplice.tracers import findings, program
from rsplice.tracers.findings import NAMES, REASONS, meaning

TEXT = Path(program.__file__).parent / "bpf" / "judgements.h"
BITS = {"WRITEBACK": 1, "DIRTY": 4, "LRU": 5, "PRIVATE": 14, "SWAPBACKED": 17}
ANONYMOUS, CACHE, USER, FILLED, NOSTEAL, OTHER = range(6)
GIFT, CAN_MERGE = 0x04, 0x10
FILE, OTHER_FILE, ANONYMOUS_MAPPING = 0xFFFF888000001000, 0xFFFF888000002000, 0xFFFF888000001001


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, needs: Callable[..., None]) -> Any:
    """The functions of judgements.h."""
    needs("cc")
    folder = tmp_path_factory.mktemp("judgements")
    defines = "".join(f"#define PG_{name}_BIT {bit}\n" for name, bit in BITS.items())
    (folder / "judge.c").write_text(
        f'{defines}#include "{TEXT}"\n'
        "unsigned buffer(struct waiting *b) { return judge_buffer(b); }\n"
        "unsigned reason(unsigned n, int c) { return reason_of(n, c); }\n"
        "unsigned refused(struct facts *f) { return why_refused(f); }\n"
        "unsigned published(struct facts *b, struct facts *n, int e)"
        " { return judge_published(b, n, e); }\n"
        "unsigned insert(struct facts *f, unsigned b) { return judge_insert(f, b); }\n"
        "unsigned put_back(struct facts *f) { return why_put_back(f); }\n"
        "unsigned fragment(unsigned long long m, unsigned f) { return judge_fragment(m, f); }\n"
        "unsigned tail(unsigned long long *w) { return judge_tail(w); }\n"
    )
    library = folder / "judge.so"
    options = ["-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *options, "-o", library, folder / "judge.c"], check=True)
    ffi = FFI()
    ffi.cdef(
        "struct facts { unsigned long long page, mapping, page_flags; unsigned references;"
        " int mapcount; unsigned pages, class, flags, offset, length, moment; };"
        "struct waiting { unsigned class, flags; unsigned long long mapping;"
        " int mapped, published, changed; };"
        "unsigned buffer(struct waiting *); unsigned reason(unsigned, int);"
        "unsigned refused(struct facts *);"
        "unsigned published(struct facts *, struct facts *, int);"
        "unsigned insert(struct facts *, unsigned); unsigned put_back(struct facts *);"
        "unsigned fragment(unsigned long long, unsigned); unsigned tail(unsigned long long *);"
    )
    functions: Any = ffi.dlopen(str(library))

    class Judge:
        library = functions

        @staticmethod
        def waiting(*seen: int) -> tuple[str, str]:
            """What is found of a buffer: the name, and the reason."""
            changed = seen[5]
            name = functions.buffer(ffi.new("struct waiting *", seen))
            reason = REASONS[functions.reason(name, changed)]
            return NAMES[name], reason.reason if reason else ""

        @staticmethod
        def facts(page_flags: tuple[str, ...] = (), /, **seen: int) -> Any:
            sound = {"references": 1, "mapcount": -1, "pages": 1, "length": 4096} | seen
            bits = sum(1 << BITS[name] for name in page_flags)
            return ffi.new("struct facts *", sound | {"page_flags": bits})

    return Judge


@pytest.mark.parametrize(
    ("kind", "flags", "mapping", "mapped", "name"),
    [
        (CACHE, CAN_MERGE, FILE, 0, "merge-flag-on-page-cache"),
        (CACHE, CAN_MERGE, 0, 0, "merge-flag-on-page-cache"),
        (CACHE, 0, FILE, 1, ""),
        (CACHE, 0, 0, 0, "truncated-in-flight"),
        (ANONYMOUS, CAN_MERGE, 0, 0, ""),  # what a pipe's own pages are
        (USER, GIFT, ANONYMOUS_MAPPING, 1, "gift-still-mapped"),
        (USER, GIFT, ANONYMOUS_MAPPING, 0, ""),
        (USER, 0, ANONYMOUS_MAPPING, 1, "changed-in-flight"),
        (USER, 0, ANONYMOUS_MAPPING, 0, ""),
        (FILLED, 0, 0, 0, ""),
        (NOSTEAL, 0, 0, 0, ""),
        (OTHER, CAN_MERGE, FILE, 0, ""),
    ],
)
def test_buffers_in_a_pipe(
    judge: Any, kind: int, flags: int, mapping: int, mapped: int, name: str
) -> None:
    found = name, "could change" if name == "changed-in-flight" else ""
    assert judge.waiting(kind, flags, mapping, mapped, 0, 0) == found
    # Offered by librsplice, which unmaps what it gives away.
    if name == "gift-still-mapped":
        found = "published-while-mapped", "offered by librsplice"
    assert judge.waiting(kind, flags, mapping, mapped, 1, 0) == found


DID = ("changed-in-flight", "did change")


@pytest.mark.parametrize(
    ("kind", "flags", "mapping", "mapped", "found"),
    [
        (CACHE, CAN_MERGE, FILE, 0, ("merge-flag-on-page-cache", "")),
        (CACHE, 0, FILE, 0, DID),
        (CACHE, 0, 0, 0, ("truncated-in-flight", "")),
        (USER, GIFT, ANONYMOUS_MAPPING, 1, ("gift-still-mapped", "written later")),
        (USER, GIFT, ANONYMOUS_MAPPING, 0, ("gift-still-mapped", "written later")),
        (USER, 0, ANONYMOUS_MAPPING, 1, DID),
        (USER, 0, ANONYMOUS_MAPPING, 0, DID),
        (ANONYMOUS, 0, 0, 0, ("", "")),
    ],
)
def test_buffers_whose_content_is_another(
    judge: Any, kind: int, flags: int, mapping: int, mapped: int, found: tuple[str, str]
) -> None:
    assert judge.waiting(kind, flags, mapping, mapped, 0, 1) == found


CLEAN = {"class": CACHE, "mapping": FILE}
REFUSED: list[tuple[tuple[str, ...], dict[str, int], str | None]] = [
    (("LRU",), {**CLEAN, "references": 2}, None),
    (("LRU", "PRIVATE"), {**CLEAN, "references": 3}, None),
    ((), {**CLEAN, "references": 3}, "not yet on the LRU"),
    (("PRIVATE",), {**CLEAN, "references": 4}, "not yet on the LRU"),
    (("LRU",), {**CLEAN, "references": 3}, "extra reference"),
    ((), {**CLEAN, "references": 4}, "extra reference"),
    (("LRU", "DIRTY"), {**CLEAN, "references": 2}, "dirty"),
    (("LRU", "DIRTY"), {**CLEAN, "references": 5, "pages": 4}, "large folio"),
    (("LRU", "SWAPBACKED"), {**CLEAN, "references": 2}, "swap-backed"),
    (("LRU",), {**CLEAN, "references": 3, "mapcount": 0}, "still mapped"),
    (("LRU",), {"class": CACHE}, "the page has left its file"),
    ((), {"class": ANONYMOUS}, None),
    ((), {"class": FILLED}, None),
    ((), {"class": FILLED, "references": 2}, "extra reference"),
    ((), {"class": NOSTEAL}, "no-steal buffer"),
    (("SWAPBACKED",), {"class": USER, "mapping": ANONYMOUS_MAPPING}, "not a gift"),
    (
        ("SWAPBACKED",),
        {"class": USER, "flags": GIFT, "mapping": ANONYMOUS_MAPPING},
        "swap-backed",
    ),
    (
        ("SWAPBACKED",),
        {"class": USER, "flags": GIFT, "mapping": ANONYMOUS_MAPPING, "mapcount": 0},
        "still mapped",
    ),
]


@pytest.mark.parametrize(("flags", "seen", "reason"), REFUSED)
def test_why_a_page_is_not_taken(
    judge: Any, flags: tuple[str, ...], seen: dict[str, int], reason: str | None
) -> None:
    known = REASONS[judge.library.refused(judge.facts(flags, **seen))]
    assert (known.reason if known else None) == reason


@pytest.mark.parametrize(
    ("before", "flags", "now", "elsewhere", "name"),
    [
        (1, (), {"references": 3}, 0, ""),
        (1, ("LRU",), {"references": 2}, 0, ""),
        (1, (), {"references": 3}, 1, "double-owner"),
        (1, (), {"references": 3, "mapcount": 0}, 0, "published-while-mapped"),
        (1, ("SWAPBACKED",), {"references": 3}, 0, "published-activated"),
        (1, ("DIRTY",), {"references": 3}, 0, "published-activated"),
        (1, ("WRITEBACK",), {"references": 3}, 0, "published-activated"),
        (2, (), {"references": 4}, 0, "published-while-referenced"),
        (1, (), {"references": 9}, 0, ""),  # lookups that wait for the page
        (2, (), {"references": 3}, 0, ""),  # the other one has let go in between
    ],
)
def test_pages_that_were_moved(
    judge: Any, before: int, flags: tuple[str, ...], now: dict[str, int], elsewhere: int, name: str
) -> None:
    offered = judge.facts(references=before, **{"class": FILLED})
    moved = judge.facts(flags, mapping=OTHER_FILE, **now)
    assert NAMES[judge.library.published(offered, moved, elsewhere)] == name


@pytest.mark.parametrize(
    ("before", "flags", "seen", "name"),
    [
        (1, (), {}, ""),
        (0, (), {"pages": 16}, ""),
        (0, ("LRU",), {"references": 2}, ""),  # what was before is not known
        (1, (), {"references": 2}, ""),  # a lookup that comes at this very moment
        (2, (), {}, ""),  # and one that has gone by now
        (2, (), {"references": 2}, "published-while-referenced"),
        (1, (), {"mapcount": 0}, "published-while-mapped"),
        (0, (), {"mapcount": 3, "pages": 16}, "published-while-mapped"),
        (1, ("SWAPBACKED",), {}, "published-activated"),
        (0, ("DIRTY",), {}, "published-activated"),
        (1, ("WRITEBACK",), {}, "published-activated"),
        (1, (), {"mapping": FILE}, "double-owner"),
        (0, (), {"mapping": FILE, "mapcount": 0}, "double-owner"),
        (0, (), {"mapping": ANONYMOUS_MAPPING}, ""),  # not of another file
    ],
)
def test_pages_that_are_about_to_enter_a_page_cache(
    judge: Any, before: int, flags: tuple[str, ...], seen: dict[str, int], name: str
) -> None:
    assert NAMES[judge.library.insert(judge.facts(flags, **seen), before)] == name


@pytest.mark.parametrize(
    ("flags", "seen", "reason"),
    [
        ((), {}, None),
        ((), {"references": 2}, None),  # its pipe would not have given it away
        ((), {"mapping": 0, "class": CACHE}, None),  # out of its file by now, as it should be
        (("SWAPBACKED",), {}, "swap-backed"),
        (("SWAPBACKED",), {"mapcount": 0}, "still mapped"),
        ((), {"pages": 4}, "large folio"),
        (("DIRTY",), {}, "dirty"),
    ],
)
def test_why_a_page_that_its_pipe_gave_away_stayed(
    judge: Any, flags: tuple[str, ...], seen: dict[str, int], reason: str | None
) -> None:
    known = REASONS[judge.library.put_back(judge.facts(flags, **seen))]
    assert (known.reason if known else None) == reason


@pytest.mark.parametrize(
    ("mapping", "flags", "name"),
    [
        (FILE, 0, "shared-frag-lost"),
        (FILE, 1, "shared-frag-lost"),
        (FILE, 2, ""),
        (FILE, 3, ""),
        (0, 0, ""),
        (ANONYMOUS_MAPPING, 0, ""),
    ],
)
def test_fragments_of_packets(judge: Any, mapping: int, flags: int, name: str) -> None:
    assert NAMES[judge.library.fragment(mapping, flags)] == name


@given(st.binary(min_size=64, max_size=64) | st.just(bytes(64)))
def test_what_lies_behind_what_was_filled_is_zero_or_stale(judge: Any, tail: bytes) -> None:
    words = struct.unpack("=8Q", tail)
    name = NAMES[judge.library.tail(list(words))]
    assert name == ("stale-content-exposed" if tail.strip(b"\0") else "")


@pytest.mark.parametrize("at", range(64))
def test_a_single_byte_that_was_left_is_seen(judge: Any, at: int) -> None:
    left = bytearray(64)
    left[at] = 1
    words = list(struct.unpack("=8Q", left))
    assert NAMES[judge.library.tail(words)] == "stale-content-exposed"


# --- words ----------------------------------------------------------------------------------------


def enumerators(name: str) -> list[str]:
    """The members of an enum of judgements.h."""
    body = TEXT.read_text().split(f"enum {name} {{", 1)[1].split("}", 1)[0]
    return [word.strip() for word in body.split(",") if word.strip()]


def test_names_stand_in_the_order_of_the_text() -> None:
    assert [n.lower().replace("_", "-") for n in enumerators("finding_name")[1:]] == list(NAMES[1:])
    assert len(enumerators("reason")) == len(REASONS)
    moments = re.findall(
        r"[A-Z_]+(?=,)", TEXT.read_text().split("enum moment {", 1)[1].split("}")[0]
    )
    assert [m.lower().replace("_", " the ") for m in moments] == list(findings.MOMENTS)
    assert len(enumerators("buffer_class")) == len(findings.CLASSES) + 1


#: The reasons that are not of missed moves, and what they are of.
OTHERS = {
    "offered by librsplice": "published-while-mapped",
    "could change": "changed-in-flight",
    "did change": "changed-in-flight",
    "written later": "gift-still-mapped",
    "mapped to be written to": "changed-in-flight",
}


def test_every_finding_is_one_of_the_catalogue_and_says_what_to_do() -> None:
    always = ("steal-refused", "changed-in-flight")  # have one
    catalogue = [(name, 0) for name in NAMES[1:] if name not in always]
    catalogue += [(OTHERS.get(r.reason, "steal-refused"), i) for i, r in enumerate(REASONS) if r]
    for name, reason in catalogue:
        means = meaning(name, reason, "ext4")
        assert name in FINDINGS[means.kind.replace(" ", "-")]
        assert means.expected and means.advice.endswith((".", ";"))
        assert "{" not in means.advice
        assert bool(means.reason) == bool(reason)


def test_a_reason_that_nobody_knows_is_not_known() -> None:
    assert meaning("steal-refused", 10_000, "ext4").reason == "not known"
