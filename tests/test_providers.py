# SPDX-License-Identifier: MIT
"""Which probe a kernel gets, decided on what the BTF of real kernels says (data/functions.json)."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplice.tracers import copies, providers
from rsplice.tracers.program import BpfError, Program, source_text
from rsplice.tracers.providers import ALL, Candidate, How, Kernel, Observation, Serves

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
    assert chosen(fuse, "6.12", fexit=True, kprobes=True) == [
        Candidate(How.FEXIT, "fuse_copy_do", "copied_fuse_copy_do"),
        Candidate(
            How.KRETPROBE, "fuse_copy_do", "copied_fuse_copy_do_return", "copied_fuse_copy_do_entry"
        ),
        Candidate(How.KRETPROBE, "fuse_copy_do", "copied_out_ax"),
    ]


def test_a_result_alone_does_not_tell_what_fuse_copied_over_a_ring() -> None:
    """It would be taken for the thread's next call."""
    offers = replace(kernel("7.3", fexit=True, kprobes=True), fuse_ring=True)
    found, reasons = providers.candidates(named("copies of FUSE messages"), offers)
    assert [c.program for c in found] == ["copied_fuse_copy_do", "copied_fuse_copy_do_return"]
    assert reasons == ["the result of fuse_copy_do does not tell what went over a ring"]


def test_what_ublk_servers_copy_is_their_own_calls_result() -> None:
    for name, function, program in (
        ("copies out of ublk requests", "ublk_ch_read_iter", "copied_in_ax"),
        ("copies into ublk requests", "ublk_ch_write_iter", "copied_out_ax"),
    ):
        found = chosen(name, "7.3", fexit=True, kprobes=True)
        assert found == [Candidate(How.KRETPROBE, function, program)]


def test_a_module_that_is_not_loaded_copies_nothing() -> None:
    ublk = named("copies into ublk requests")
    assert replace(ublk, module="no such module").is_idle
    assert not replace(ublk, module="").is_idle


def test_what_failed_for_one_reason_is_told_together() -> None:
    lost = ["kretprobe at one: gone", "kretprobe at two: gone", "one has 9 arguments here"]
    taken = providers.Taken(ALL[0], None, lost)
    assert taken.reason == "kretprobe at one, kretprobe at two: gone; one has 9 arguments here"
    assert providers.Taken(ALL[0], None, []).reason == "not tried"


def test_what_needs_arguments_keeps_them_from_a_breakpoint_at_the_entry() -> None:
    for name, program in (
        ("copies out of a page cache", "copied_filemap_read"),
        ("refused moves of user buffers", "steal_buffer"),
        ("ends of page-table references", "jm_unmapped"),
        ("mappings of pages that are in pipes", "map_range"),
    ):
        (found,) = chosen(name, "6.12", kprobes=True)
        assert (found.how, found.program) == (How.KRETPROBE, f"{program}_return")
        assert found.entry == f"{program}_entry"


@SERIES
def test_breakpoints_do_wherever_fentry_does(series: str) -> None:
    for observation in ALL:
        by_fentry = {c.function for c in chosen(observation.name, series, fexit=True)}
        by_kprobe = {c.function for c in chosen(observation.name, series, kprobes=True)}
        assert by_fentry <= by_kprobe


def test_the_module_comes_first_but_for_what_it_cannot_probe() -> None:
    offers = {"fexit": True, "kprobes": True, "module": True}
    assert chosen("copies into a pipe", "6.12", **offers)[0].how is How.MODULE
    assert chosen("copies of FUSE messages", "6.12", **offers)[0].how is How.FEXIT


@SERIES
def test_what_no_tracepoint_tells_is_told_by_what_the_kernel_calls(series: str) -> None:
    around = "pages mapped by fault-around"
    (told,) = chosen(around, series, fexit=True, tracepoints=TOLD)
    assert (told.how, told.function) == (How.TRACEPOINT, "mm_filemap_map_pages")
    (probed,) = chosen(around, series, fexit=True)
    assert (probed.how, probed.function) == (How.FEXIT, "filemap_map_pages")
    (probed,) = chosen("moves into a page cache", series, fexit=True)
    name = "replace_page_cache_" + ("page" if series in ("5.10", "6.1") else "folio")
    assert (probed.how, probed.function) == (How.FENTRY, name)
    for kind in ("anonymous", "page-cache", "user", "filled"):
        (steal,) = chosen(f"refused moves of {kind} buffers", series, fexit=True)
        assert steal.program == ("steal_filled" if kind == "filled" else "steal_buffer")


#: What happens to a page -> the function that is probed, by the kernels of its name.
AT_THAT_MOMENT: dict[str, dict[str, str]] = {
    "inserts into a page cache": {
        "5.10": "__add_to_page_cache_locked",
        "6.1 6.12 6.18 7.2 7.3": "__filemap_add_folio",
    },
    "moves into a page cache": {
        "5.10 6.1": "replace_page_cache_page",
        "6.12 6.18 7.2 7.3": "replace_page_cache_folio",
    },
    "page-table references": {
        "5.10 6.1": "page_add_file_rmap",
        "6.12 6.18 7.2 7.3": "folio_add_file_rmap_ptes",
    },
    "page-table references of new memory": {
        "5.10 6.1": "page_add_new_anon_rmap",
        "6.12 6.18 7.2 7.3": "folio_add_new_anon_rmap",
    },
    "ends of page-table references": {
        "5.10 6.1": "page_remove_rmap",
        "6.12 6.18 7.2 7.3": "folio_remove_rmap_ptes",
    },
    "releases of anonymous buffers": {"5.10 6.1 6.12 6.18 7.2 7.3": "anon_pipe_buf_release"},
    "releases of page-cache and user buffers": {
        "5.10 6.1 6.12 6.18 7.2 7.3": "page_cache_pipe_buf_release"
    },
    "releases of filled buffers": {"5.10 6.1 6.12 6.18 7.2 7.3": "generic_pipe_buf_release"},
}


@pytest.mark.parametrize("name", AT_THAT_MOMENT)
def test_moments_are_probed_at_what_each_kernel_calls(name: str) -> None:
    functions = {s: f for series, f in AT_THAT_MOMENT[name].items() for s in series.split()}
    assert functions.keys() == FUNCTIONS.keys()
    how = How.FENTRY if named(name).at_entry else How.FEXIT
    for series, function in functions.items():
        found = chosen(name, series, fexit=True)
        assert [(c.how, c.function) for c in found] == [(how, function)], series


@SERIES
def test_entries_have_breakpoints_too_where_there_is_no_fentry(series: str) -> None:
    for observation in ALL:
        found = chosen(observation.name, series, kprobes=True)
        if observation.at_entry:
            (breakpoint,) = found
            assert breakpoint.how is How.KPROBE
            assert breakpoint.program.endswith("_regs")
        else:
            assert all(candidate.how is How.KRETPROBE for candidate in found)


@SERIES
def test_an_insert_is_looked_at_by_its_tracepoint_where_nothing_better_is(series: str) -> None:
    inserts = "inserts into a page cache"
    told = frozenset({"mm_filemap_add_to_page_cache"})
    hows = [c.how for c in chosen(inserts, series, fexit=True, kprobes=True, tracepoints=told)]
    assert hows == [How.FENTRY, How.KPROBE, How.TRACEPOINT]
    assert [c.how for c in chosen(inserts, series, tracepoints=told)] == [How.TRACEPOINT]


class Refusing:
    """A program that the kernel refuses in whole or in part."""

    def __init__(self, refused: Container[str]) -> None:
        self.refused = refused
        self.attached: list[str] = []

    def has(self, function: str) -> bool:
        return not function.startswith("jm_born")  # as if it were not compiled in

    def attach_trampoline(self, function: str, kernel_function: str, at_return: bool) -> None:
        if "trampoline" in self.refused or kernel_function in self.refused:
            raise BpfError(errno.EINVAL, "invalid mem access")
        self.attached.append(kernel_function)

    def attach_kprobe(self, function: str, kernel_function: str, at_return: bool) -> None:
        if "kprobe" in self.refused or kernel_function in self.refused:
            raise BpfError(errno.ENOENT)
        self.attached.append(kernel_function)


@SERIES
def test_what_is_refused_is_told_and_stops_nothing(series: str) -> None:
    offers = kernel(series, fexit=True, kprobes=True)
    for refused in ({"trampoline"}, {"trampoline", "kprobe"}, {"replace_page_cache_folio"}):
        program = Refusing(refused)
        taken = providers.attach(cast(Program, program), offers, set(Serves))
        assert [each.observation for each in taken] == list(ALL)
        for each in taken:
            assert each.candidate is None or each.candidate.function in program.attached
            assert each.candidate or each.reason != "not tried"
            assert each.observation.loss
        gone = {each.observation.name for each in taken if not each.candidate}
        assert "page-table references of new memory" in gone
        if "kprobe" in refused:
            assert gone == {each.name for each in ALL}


def test_only_what_a_run_is_to_tell_of_is_attached() -> None:
    offers = kernel("6.12", fexit=True)
    for serves in ({Serves.COPIES}, {Serves.COPIES, Serves.FINDINGS}):
        program = Refusing(())
        taken = providers.attach(cast(Program, program), offers, serves)
        assert {each.observation.serves for each in taken} == serves
        assert "folio_remove_rmap_ptes" not in program.attached


def test_a_second_function_of_the_kind_is_probed_too_where_there_is_one() -> None:
    for series, also in (("6.1", 0), ("6.12", 1)):
        program = Refusing(())
        providers.attach(cast(Program, program), kernel(series, fexit=True), {Serves.JOURNEYS})
        assert program.attached.count("folio_add_file_rmap_pmd") == also
        assert program.attached.count("folio_remove_rmap_pmd") == also


def test_nothing_is_observed_where_tracepoints_are_all_there_is() -> None:
    told = frozenset({"mm_filemap_add_to_page_cache", "mm_filemap_map_pages"})
    taken = {
        each.observation.name: each
        for each in providers.unattached(kernel("6.18", tracepoints=told))
    }
    assert taken.keys() == {each.name for each in ALL}
    assert {name for name, each in taken.items() if each.candidate} == {
        "inserts into a page cache",
        "pages mapped by fault-around",
    }
    assert {each.reason for each in taken.values()} == {providers.NEITHER}


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
            shared = re.sub("_(regs|return)$", "", candidate.program)
            rmap = f"AT_RMAP({shared.removesuffix('_page')}, "
            macro = "AT_ENTRY" if observation.at_entry else "AT_RETURN"
            assert (
                f"int {candidate.program}(u64 *ctx)" in text
                or f", {name}, " in text
                or re.search(rf"{macro}\({shared}[,)]", text)
                or rmap in text
            )
            assert candidate.entry in ("", f"{shared}_entry")


def test_no_function_is_observed_twice() -> None:
    found = [(name, e.at_entry) for e in ALL for name in (*e.functions, *e.also)]
    found += [(function, e.at_entry) for e in ALL for function, _, _ in e.others]
    assert len(found) == len(set(found))
    twice = {name for name, at_entry in found if (name, not at_entry) in found}
    assert twice == {"io_issue_sqe"}  # its begin and its end


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
