# SPDX-License-Identifier: MIT
"""Which probe a kernel gets, decided on what the BTF of real kernels says (data/functions.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplice.tracers import copies, providers
from rsplice.tracers.program import source_text
from rsplice.tracers.providers import ALL, Candidate, How, Kernel, Observation

#: Series -> functions of vmlinux, with how many arguments they have.
FUNCTIONS: dict[str, dict[str, int]] = json.loads(
    (Path(__file__).parent / "data/functions.json").read_text()
)
SERIES = pytest.mark.parametrize("series", FUNCTIONS)


#: What makes kprobes unnecessary, on the kernels that have it.
TOLD = frozenset({"fuse_request_end", "mm_filemap_map_pages"})


def kernel(
    series: str,
    fexit: bool = False,
    kprobes: bool = False,
    module: bool = False,
    tracepoints: frozenset[str] = frozenset(),
) -> Kernel:
    return Kernel(FUNCTIONS[series].get, fexit, kprobes, module, tracepoints)


def named(name: str) -> Observation:
    (found,) = (each for each in ALL if each.name == name)
    return found


def chosen(name: str, series: str, **offers: Any) -> list[Candidate]:
    return providers.candidates(named(name), kernel(series, **offers))[0]


@SERIES
def test_fexit_is_preferred_to_a_kretprobe(series: str) -> None:
    for observation in ALL:
        found, _ = providers.candidates(observation, kernel(series, fexit=True, kprobes=True))
        hows = [candidate.how for candidate in found]
        assert hows == sorted(hows, key=list(How).index)


@SERIES
def test_a_kernel_without_either_has_no_candidates(series: str) -> None:
    assert not kernel(series).measures
    for observation in ALL:
        assert providers.candidates(observation, kernel(series))[0] == []


@SERIES
def test_every_debian_kernel_measures_files_pipes_and_sockets(series: str) -> None:
    for name in (
        "copies out of a page cache",
        "copies into a page cache",
        "copies out of a pipe",
        "copies into a pipe",
        "copies out of tmpfs",
        "copies out of socket buffers",
        "copies into unix sockets",
        "copies into udp sockets",
        "copies into tcp sockets",
        "copies of vmsplice",
    ):
        assert [c.how for c in chosen(name, series, fexit=True)] == [How.FEXIT], name


def test_names_follow_the_kernel() -> None:
    def function(name: str, series: str) -> str:
        return chosen(name, series, fexit=True)[0].function

    assert function("copies out of a page cache", "5.10") == "generic_file_buffered_read"
    assert function("copies out of a page cache", "6.1") == "filemap_read"
    assert function("copies into a pipe", "6.12") == "pipe_write"
    assert function("copies into a pipe", "6.18") == "anon_pipe_write"


def test_the_result_stands_behind_as_many_arguments_as_the_kernel_has() -> None:
    programs = {
        series: chosen("copies into a page cache by iomap", series, fexit=True)[0].program
        for series in ("6.1", "6.12", "7.3")
    }
    assert programs == {"6.1": "copied_out_3", "6.12": "copied_out_4", "7.3": "copied_out_5"}


def test_functions_of_modules_are_tried_by_kretprobe() -> None:
    """vmlinux's BTF says nothing of 6.1's fuse, which is a module; 6.12 has it built in."""
    fuse = "copies of FUSE messages"
    assert chosen(fuse, "6.1", fexit=True) == []
    assert chosen(fuse, "6.1", fexit=True, kprobes=True) == [
        Candidate(How.KRETPROBE, "fuse_copy_do", "copied_out_ax")
    ]
    assert [c.how for c in chosen(fuse, "6.12", fexit=True, kprobes=True)] == [
        How.FEXIT,
        How.KRETPROBE,
    ]


def test_what_needs_arguments_has_no_kretprobe() -> None:
    for name in ("copies out of a page cache", "copies out of tmpfs", "copies into tcp sockets"):
        assert chosen(name, "6.12", kprobes=True) == []


def test_the_module_comes_first_but_for_what_it_cannot_probe() -> None:
    offers = {"fexit": True, "kprobes": True, "module": True}
    assert chosen("copies into a pipe", "6.12", **offers)[0].how is How.MODULE
    assert chosen("copies of FUSE messages", "6.12", **offers)[0].how is How.FEXIT


@SERIES
def test_moves_are_told_by_tracepoints_or_else_by_what_the_kernel_calls(series: str) -> None:
    moves = "moves into a page cache"
    (told,) = chosen(moves, series, fexit=True, tracepoints=TOLD)
    assert (told.how, told.function) == (How.TRACEPOINT, "fuse_request_end")
    (probed,) = chosen(moves, series, fexit=True)
    name = "replace_page_cache_" + ("page" if series in ("5.10", "6.1") else "folio")
    assert (probed.how, probed.function) == (How.FEXIT, name)
    for kind in ("anonymous", "page-cache", "user", "filled"):
        (steal,) = chosen(f"refused moves of {kind} buffers", series, fexit=True)
        assert steal.program == ("steal_filled" if kind == "filled" else "steal_buffer")


def test_a_function_with_other_arguments_is_passed_over_with_the_reason() -> None:
    changed = Kernel({"filemap_read": 9, "generic_perform_write": 9}.get, fexit=True)
    for name in ("copies out of a page cache", "copies into a page cache"):
        found, reasons = providers.candidates(named(name), changed)
        assert found == []
        assert "has 9 arguments here" in reasons[0]


def test_a_missing_function_is_a_reason_and_no_error() -> None:
    empty = dict[str, int]()
    found, reasons = providers.candidates(
        named("copies out of a pipe"), Kernel(empty.get, fexit=True)
    )
    assert found == []
    assert reasons == ["this kernel has no anon_pipe_read", "this kernel has no pipe_read"]


@SERIES
def test_every_candidate_is_a_program_of_the_text(series: str) -> None:
    text = source_text("")
    for observation in ALL:
        offers = kernel(series, fexit=True, kprobes=True, module=True)
        for candidate in providers.candidates(observation, offers)[0]:
            name = candidate.program.removeprefix("copied_")
            assert f"int {candidate.program}(u64 *ctx)" in text or f", {name}, " in text


def test_no_function_is_observed_twice() -> None:
    names = [name for each in ALL for name in each.functions]
    assert len(names) == len(set(names))


SIDES = st.tuples(st.integers(0, 2**50), st.integers(0, 2**50))


@given(SIDES)
def test_bytes_by_leg_are_neither_lost_nor_made(sides: tuple[int, int]) -> None:
    for two_legs in (False, True):
        legs = copies.by_leg(sides, two_legs)
        assert sum(legs.values()) == sum(sides)
        assert set(legs) <= ({0, 1} if two_legs else {0})


def test_each_half_of_a_sendfile_has_what_was_copied_on_its_side() -> None:
    assert copies.by_leg((7, 11), two_legs=True) == {0: 7, 1: 11}
    assert copies.by_leg((7, 11), two_legs=False) == {0: 18}


@given(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_a_copy_that_was_counted_and_seen_is_one(counted: int, seen: int, moved: int) -> None:
    measured = {(0, "copied"): counted}
    identity = {(0, "copied"): seen, (0, "moved"): moved}
    copies.once(measured, identity)
    assert measured[0, "copied"] + identity[0, "copied"] == max(counted, seen)
    assert identity[0, "moved"] == moved


def test_copies_of_the_other_leg_are_not_touched() -> None:
    identity = {(1, "copied"): 101}
    copies.once({(0, "copied"): 101}, identity)
    assert identity == {(1, "copied"): 101}
