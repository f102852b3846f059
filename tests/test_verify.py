# SPDX-License-Identifier: MIT
"""Which difference between cache and disk counts, which does not, and what is said of it."""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rsplice.commands import verify as command
from rsplice.limits import FINDINGS
from rsplice.pagecache import (
    MEMORY,
    NETWORK,
    PAGE,
    Buffer,
    CachedFile,
    FromCache,
    Kernel,
    Kind,
    Unchecked,
    Unreadable,
    busy,
    kind_of,
    mounts,
)
from rsplice.targets import Target, local, mapped, setuid
from rsplice.verify import (
    CHUNK,
    NAME,
    SCHEMA,
    Counts,
    FileResult,
    Layout,
    Verifier,
    alike,
    difference,
    divided,
    finding,
    runs,
)

ROOT = Path(__file__).parent.parent
UPTODATE, DIRTY, WRITEBACK, HEAD, TAIL = 1 << 3, 1 << 4, 1 << 8, 1 << 15, 1 << 16
PAUSES = (0.0, 0.0, 0.0, 0.0)
EVIL = "a\x1b[31m\nb\u202e[bold]\udcff"
EVIL_SHOWN = r"a\x1b[31m\nb\u202e[bold]\xff".replace(r"\n", r"\x0a")
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="reads /proc/kpageflags: needs root")


def nothing(_: Fake) -> None:
    pass


@dataclass
class Fake:
    """A file of which each page, its place and its state are made up; also what maps it."""

    cache: bytearray
    on_disk: bytearray
    kinds: list[tuple[int, int, int]] = field(default_factory=list)
    flags_of: dict[int, int] = field(default_factory=dict)  #: by page; else clean
    absent: set[int] = field(default_factory=set)
    after_read: Callable[[Fake], None] = nothing
    frame: int = 1000
    time: int = 0
    filesystem: str = "fake"
    refused: str | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)
    address: int = 0
    _pages: int = 0

    @property
    def size(self) -> int:
        return len(self.cache)

    @property
    def stamp(self) -> tuple[int, int, int]:
        return self.size, self.time, 0

    def cached(self, offset: int, pages: int) -> bool:
        first = offset // PAGE
        return not self.absent.issuperset(range(first, first + pages))

    @contextmanager
    def window(self, offset: int, pages: int) -> Iterator[Fake]:
        view = Fake(self.cache, self.on_disk, absent=self.absent, address=offset, _pages=pages)
        yield view

    def resident(self) -> bytes:
        first = self.address // PAGE
        return bytes(first + n not in self.absent for n in range(self._pages))

    def copy(self, first: int, count: int, to: Buffer) -> int:
        at = first * PAGE
        part = self.cache[self.address + at : self.address + at + count * PAGE]
        to.memory[at : at + len(part)] = bytes(part)
        return -(-len(part) // PAGE)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        yield from self.kinds

    def disk(self, offset: int, length: int, written: int, to: Buffer, at: int) -> int:
        self.reads.append((offset, written))
        part = bytes(self.on_disk[offset : offset + length])
        to.memory[at : at + len(part)] = part
        self.after_read(self)
        return len(part)

    # What Kernel does.

    def frames(self, address: int, count: int) -> list[int]:
        return [self.frame + address // PAGE + n for n in range(count)]

    def flags(self, frames: list[int]) -> list[int]:
        return [self.flags_of.get(f - self.frame, UPTODATE) if f else 0 for f in frames]


def fake(pages: int, **what: object) -> Fake:
    data = bytearray(os.urandom(pages * PAGE))
    made = Fake(data, bytearray(data), [(0, len(data), Kind.DATA)])
    for name, value in what.items():
        setattr(made, name, value)
    return made


def verified(file: Fake) -> Counts:
    with Verifier(file, PAUSES) as verifier:
        return verifier.verify(file)


def summary(counts: Counts) -> tuple[int, int, int, list[int]]:
    return counts.same, counts.busy, counts.unchecked.total(), sorted(counts.differing)


# What counts.


def test_what_is_the_same_is_silent() -> None:
    assert summary(verified(fake(CHUNK * 2 + 3))) == (CHUNK * 2 + 3, 0, 0, [])


def test_an_empty_file_has_no_pages() -> None:
    assert summary(verified(fake(0))) == (0, 0, 0, [])


@pytest.mark.parametrize("page", [0, 7, CHUNK - 1, CHUNK, CHUNK + 9])
def test_a_page_that_differs_is_found(page: int) -> None:
    file = fake(CHUNK + 10)
    at = page * PAGE + 77
    file.on_disk[at] ^= 1
    file.on_disk[at + 5] ^= 0xFF
    counts = verified(file)
    assert summary(counts) == (CHUNK + 9, 0, 0, [page])
    found = counts.differing[page]
    assert (found.offset, found.first, found.differing) == (page * PAGE, at, 2)
    assert found.frame == 1000 + page
    assert found.cached == file.cache[at : at + 16]
    assert found.disk == file.on_disk[at : at + 16]


def test_pages_that_differ_all_over_are_all_found() -> None:
    file = fake(CHUNK * 2)
    file.on_disk = bytearray(len(file.cache))
    assert summary(verified(file)) == (0, 0, 0, list(range(CHUNK * 2)))


def test_it_is_looked_at_once_more_than_there_are_pauses() -> None:
    file = fake(3)
    file.on_disk[PAGE] ^= 1
    verified(file)
    assert file.reads == [(0, 3 * PAGE)] + [(PAGE, PAGE)] * len(PAUSES)


@pytest.mark.parametrize("looks", range(1, len(PAUSES) + 1))
def test_one_look_without_a_difference_acquits(looks: int) -> None:
    def mend(file: Fake) -> None:
        if len(file.reads) == looks:
            file.on_disk = bytearray(file.cache)

    file = fake(3, after_read=mend)
    file.on_disk[PAGE] ^= 1
    assert summary(verified(file)) == (3, 0, 0, [])


@pytest.mark.parametrize("side", ["cache", "on_disk"])
def test_a_difference_that_changes_is_work_in_progress(side: str) -> None:
    def change(file: Fake) -> None:
        getattr(file, side)[PAGE + 9] = len(file.reads)

    file = fake(3, after_read=change)
    file.on_disk[PAGE] ^= 1
    assert summary(verified(file)) == (2, 1, 0, [])


@pytest.mark.parametrize("state", [DIRTY | UPTODATE, WRITEBACK | UPTODATE, 0])
def test_a_busy_page_is_left_alone(state: int) -> None:
    file = fake(5, flags_of={2: state})
    file.on_disk[2 * PAGE] ^= 1
    assert summary(verified(file)) == (4, 1, 0, [])
    # Nor is the disk below it read: that would write it out.
    assert file.reads == [(0, 2 * PAGE), (3 * PAGE, 2 * PAGE)]


def test_a_page_that_becomes_dirty_meanwhile_does_not_count() -> None:
    def dirty(file: Fake) -> None:
        file.flags_of = {1: UPTODATE | DIRTY}

    file = fake(3, after_read=dirty)
    file.on_disk[PAGE] ^= 1
    assert summary(verified(file)) == (2, 1, 0, [])


def test_a_page_that_is_replaced_meanwhile_does_not_count() -> None:
    def replace(file: Fake) -> None:
        file.frame += 1

    file = fake(3, after_read=replace)
    file.on_disk[PAGE] ^= 1
    assert summary(verified(file)) == (2, 1, 0, [])


def test_what_is_not_cached_is_not_read() -> None:
    file = fake(6, absent={0, 3})
    file.on_disk[3 * PAGE] ^= 1
    assert summary(verified(file)) == (4, 0, 0, [])
    assert file.reads == [(PAGE, 2 * PAGE), (4 * PAGE, 2 * PAGE)]


def test_spans_without_a_cached_page_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsplice.verify.SPAN", 2 * CHUNK)
    pages = 5 * CHUNK
    file = fake(pages, absent=set(range(pages)) - {4, 4 * CHUNK + 1})
    assert summary(verified(file)) == (2, 0, 0, [])
    assert sorted(file.reads) == [(4 * PAGE, PAGE), ((4 * CHUNK + 1) * PAGE, PAGE)]


def test_only_bytes_of_the_file_count() -> None:
    file = fake(2)
    del file.cache[PAGE + 100 :], file.on_disk[PAGE + 100 :]
    assert summary(verified(file)) == (2, 0, 0, [])
    file.on_disk[PAGE + 99] ^= 1
    assert summary(verified(file)) == (1, 0, 0, [1])


def test_a_file_that_is_cut_meanwhile() -> None:
    def cut(file: Fake) -> None:
        del file.cache[PAGE:], file.on_disk[PAGE:]

    file = fake(CHUNK * 3, after_read=cut)
    file.on_disk[2 * PAGE] ^= 1
    assert not verified(file).differing
    file = fake(3)
    del file.on_disk[PAGE:]  # the disk has the new size already
    assert summary(verified(file)) == (0, 3, 0, [])


# What lies where.


@pytest.mark.parametrize("kinds", [[], [(0, 3 * PAGE, Kind.ZERO)]], ids=["hole", "unwritten"])
def test_where_nothing_was_written_the_cache_holds_zeros(
    kinds: list[tuple[int, int, int]],
) -> None:
    file = fake(3, kinds=kinds)
    file.cache[:] = bytes(3 * PAGE)
    assert summary(verified(file)) == (3, 0, 0, [])
    file.cache[PAGE + 5] = 1
    assert summary(verified(file)) == (2, 0, 0, [1])
    assert file.reads == []


def test_what_waits_for_its_place_is_being_written() -> None:
    file = fake(2, kinds=[(0, PAGE, Kind.LATER), (PAGE, 2 * PAGE, Kind.DATA)])
    assert summary(verified(file)) == (1, 1, 0, [])


@pytest.mark.parametrize("kind", [Kind.COMPRESSED, Kind.ENCRYPTED, Kind.PACKED, Kind.UNKNOWN])
def test_what_has_no_blocks_of_its_own_is_not_checked(kind: int) -> None:
    file = fake(3, kinds=[(0, PAGE, Kind.DATA), (PAGE, 3 * PAGE, kind)])
    file.on_disk[2 * PAGE] ^= 1
    assert summary(verified(file)) == (1, 0, 2, [])
    assert file.reads == [(0, PAGE)]


def test_a_refused_file_is_not_read_and_counts_what_is_cached() -> None:
    file = fake(5, refused="no way", absent={1})
    counts = verified(file)
    assert (summary(counts), file.reads) == ((0, 0, 4, []), [])
    assert counts.unchecked == {"no way": 4}


def raising(error: Unchecked) -> Callable[[Fake], None]:
    def fail(_: Fake) -> None:
        raise error

    return fail


def test_a_disk_that_cannot_be_read_is_no_difference() -> None:
    file = fake(3, after_read=raising(Unchecked("Input/output error")))
    counts = verified(file)
    assert counts.unchecked == {"Input/output error": 3}
    assert summary(counts) == (0, 0, 3, [])


def test_an_unreadable_block_is_one_page() -> None:
    def fail(file: Fake) -> None:
        offset, written = file.reads[-1]
        if offset <= 5 * PAGE < offset + written:
            raise Unreadable("unreadable")

    file = fake(9, after_read=fail)
    file.on_disk[5 * PAGE] ^= 1
    file.on_disk[6 * PAGE] ^= 1
    assert summary(verified(file)) == (7, 0, 1, [6])


def test_an_answer_from_the_cache_proves_nothing() -> None:
    file = fake(CHUNK * 2, after_read=raising(FromCache("from the cache")))
    assert verified(file).unchecked == {"from the cache": CHUNK * 2}
    assert file.refused == "from the cache"


def test_an_answer_from_the_cache_while_blocks_move_is_work_in_progress() -> None:
    def punch(file: Fake) -> None:
        file.kinds = []
        raise FromCache("from the cache")

    file = fake(3, after_read=punch)
    assert summary(verified(file)) == (0, 3, 0, [])
    assert file.refused is None

    def write(file: Fake) -> None:
        file.time += 1
        raise FromCache("from the cache")

    assert summary(verified(fake(3, after_read=write))) == (0, 3, 0, [])


def test_extents_that_end_within_a_page() -> None:
    file = fake(3, kinds=[(0, 1024, Kind.DATA), (PAGE - 1024, PAGE + 1024, Kind.DATA)])
    layout = Layout(file, 0, 3)
    assert layout.kinds == [Kind.DATA, Kind.DATA, Kind.ZERO]
    assert layout.written(0, 3 * PAGE) == 3072
    assert layout.written(512, PAGE) == 512 + 1024
    file.kinds = [(0, PAGE, Kind.DATA), (100, 200, Kind.PACKED)]
    assert Layout(file, 0, 1).kinds == [Kind.PACKED]
    assert not layout.holds(file)


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (0x0, Kind.DATA),
        (0x1, Kind.DATA),  # the last one
        (0x1000 | 0x2000, Kind.DATA),  # merged, shared: a reflink
        (0x800, Kind.ZERO),
        (0x2 | 0x4, Kind.LATER),
        (0x2, Kind.UNKNOWN),
        (0x8, Kind.COMPRESSED),
        (0x8 | 0x80, Kind.ENCRYPTED),
        (0x100 | 0x200, Kind.PACKED),
        (0x100 | 0x400 | 0x8, Kind.PACKED),
        (0x800 | 0x8, Kind.COMPRESSED),
    ],
)
def test_kinds_of_extents(flags: int, kind: int) -> None:
    assert kind_of(flags) == kind


def test_flags_of_pages() -> None:
    assert not busy(UPTODATE)
    assert busy(0) and busy(UPTODATE | DIRTY) and busy(UPTODATE | WRITEBACK)


def test_a_tail_page_is_as_dirty_as_its_folio(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [0, HEAD | UPTODATE | DIRTY, TAIL, TAIL, HEAD | UPTODATE, TAIL, 0, TAIL]

    def read(_: Kernel, frame: int, count: int) -> list[int]:
        return table[frame : frame + count]

    monkeypatch.setattr(Kernel, "_flags_from", read)
    kernel = object.__new__(Kernel)

    def states(*frames: int) -> list[int]:
        return [flags & ~(HEAD | TAIL) for flags in kernel.flags(list(frames))]

    assert states(1, 2, 3, 4, 5) == [UPTODATE | DIRTY] * 3 + [UPTODATE] * 2
    assert states(3, 5) == [UPTODATE | DIRTY, UPTODATE]
    assert states(5, 3, 0, 2) == [UPTODATE, UPTODATE | DIRTY, 0, UPTODATE | DIRTY]
    assert states(0, 1, 0) == [0, UPTODATE | DIRTY, 0]
    assert busy(states(7)[0]), "its folio has just been freed"


def test_runs() -> None:
    assert list(alike([1, 1, None, 2, 2, 1])) == [(0, 2, 1), (3, 5, 2), (5, 6, 1)]
    assert list(alike([])) == []
    assert list(runs([1, 2, 3, 7, 9, 10])) == [(1, 3), (7, 1), (9, 2)]
    assert list(divided(5, 2)) == [(0, 2), (2, 2), (4, 1)]
    assert list(divided(0, 2)) == []
    assert list(runs(list(range(CHUNK + 2)))) == [(0, CHUNK), (CHUNK, 2)]


# What is said.


def result(name: str = "f", **what: object) -> FileResult:
    made = FileResult(name, "ext4", Counts(same=3))
    for key, value in what.items():
        setattr(made.counts if hasattr(made.counts, key) else made, key, value)
    return made


def differing(count: int = 1) -> dict[int, object]:
    return {n: difference(n * PAGE, 9 + n, b"\1" * PAGE, b"\2" * PAGE) for n in range(count)}


def test_the_finding_is_of_the_catalogue() -> None:
    assert NAME in FINDINGS["violation"]
    assert finding([result()]) is None
    found = finding([result(), result("g", differing=differing(3))], 7)
    assert found is not None
    assert (found.name, found.kind, found.count) == (NAME, "violation", 3)
    first = found.first
    assert (first["pid"], first["operation"], first["file"]) == (7, "verify", "g")
    assert (first["page_frame"], first["offset"]) == (9, 0)
    assert first["expected"].startswith("02 02") and first["seen"].startswith("01 01")
    assert found.advice


@pytest.mark.parametrize(
    ("results", "pid", "status"),
    [
        ([result()], None, 0),
        ([result(busy=5)], None, 0),
        ([result(differing=differing())], None, 1),
        ([result(differing=differing()), result(problem="gone")], None, 1),
        ([result(), result(problem="gone")], None, 2),
        ([result(unchecked={"compressed": 1})], None, 2),
        ([result(problem="no disk", in_memory=True)], None, 2),
        ([result(problem="no disk", in_memory=True)], 7, 0),
    ],
)
def test_exit_status(results: list[FileResult], pid: int | None, status: int) -> None:
    assert command.Verification(results, pid=pid).status == status


def test_the_report_names_what_differs_and_what_was_not_checked() -> None:
    found = result("bad", differing=differing(12), busy=2)
    done = command.Verification([found, result("gone", problem="No such file or directory")])
    text = command._text(done, verbose=False)
    assert "12 differ; 2 pages being written, left alone" in " ".join(text.split())
    assert f"violation: {NAME}, 12 pages" in text
    assert "page at 4096, frame 0xa: 4096 bytes, from 4096 on" in text
    assert "and 4 more, all in the JSON" in text
    assert "not checked: gone: No such file or directory" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("verbose", [False, True])
def test_names_of_files_do_nothing_to_a_terminal(verbose: bool) -> None:
    done = command.Verification(
        [result(EVIL, differing=differing()), result(EVIL, problem="no\x1b")]
    )
    text = command._text(done, verbose)
    assert EVIL_SHOWN in text
    assert text.replace("\n", "").isprintable()


def test_json_has_everything() -> None:
    done = command.Verification(
        [result(EVIL, differing=differing(12)), result("g", problem="gone")], 0.5
    )
    data = json.loads(json.dumps(done.to_json()))
    assert (data["schema"], data["exit_status"]) == (SCHEMA, 1)
    assert data["totals"]["differing_pages"] == len(data["files"][0]["differing"]) == 12
    assert data["totals"]["compared_pages"] == 18
    assert data["files"][1]["unchecked"] == [{"reason": "gone", "pages": 0}]
    assert data["findings"][0]["name"] == NAME


# What is verified.


def test_filesystems_that_are_entered() -> None:
    assert local("ext4") and local("btrfs") and local("overlay") and local("zfs")
    assert not any(map(local, ["proc", "tmpfs", "nfs4", "fuse.sshfs", "fuseblk"]))
    assert not MEMORY & NETWORK
    assert b"/proc" in [point for _, point, _ in mounts()]


def test_executables_that_give_privileges(tmp_path: Path) -> None:
    modes = {"plain": 0o755, "setuid": 0o4755, "setgid": 0o2755, "sub/setuid": 0o4711}
    (tmp_path / "sub").mkdir()
    for name, mode in modes.items():
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "link").symlink_to("setuid")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "fifo", 0o755)
    found = {t.name for t in setuid(str(tmp_path), lambda *_: pytest.fail("unreadable"))}
    assert found == {str(tmp_path / n) for n in ("setuid", "setgid", "sub/setuid")}


@pytest.mark.skipif(os.geteuid() != 0, reason="giving capabilities needs root")
def test_file_capabilities_give_privileges(tmp_path: Path) -> None:
    file = tmp_path / EVIL.replace("/", "")
    file.touch()
    file.chmod(0o755)
    try:
        # Revision 2, CAP_NET_RAW permitted, as setcap(8) writes it.
        value = b"\x00\x00\x00\x02" + (1 << 13).to_bytes(4, "little") + bytes(12)
        os.setxattr(file, "security.capability", value)
    except OSError as error:
        pytest.skip(f"no file capabilities here: {error.strerror}")
    found = list(setuid(str(tmp_path), lambda *_: None))
    assert [t.name for t in found] == [str(file)]


def test_a_directory_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    failed: list[tuple[str, str]] = []
    assert list(setuid(str(tmp_path), lambda *what: failed.append(what))) == []
    assert failed == [(str(tmp_path), "Permission denied")]


@NEEDS_ROOT
def test_the_files_that_a_process_has_mapped() -> None:
    names = [target.name for target in mapped(os.getpid())]
    assert os.path.realpath(sys.executable) in names
    assert any("/libc" in name for name in names)
    # Memory that is shared without a file has one name for all of it.
    named = [name for name in names if not name.endswith(" (deleted)")]
    assert len(set(named)) == len(named)


def test_a_file_that_cannot_be_looked_at(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for name, why in {
        "none": "No such file or directory",
        "": "No such file or directory",
        "a\0b": "no such name is possible",
        "x" * 300: "File name too long",
        "fifo": "not a regular file",
        ".": "not a regular file",
    }.items():
        with pytest.raises(Unchecked, match=why):
            CachedFile(str(tmp_path / name) if name else "")


def test_devices_are_not_opened() -> None:
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(Unchecked, match="not a regular file"):
        CachedFile("/dev/null")


# The command line.


def rsplice(*words: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rsplice", "verify", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
        user=user,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to verify"),
        (["--setuid", "file"], "say what to verify"),
        (["--setuid", "--mapped", "1"], "say what to verify"),
        (["--mapped", "x"], "not a pid"),
        (["--mapped", "0"], "not a pid"),
        (["--mapped", "-5"], "--mapped"),
        (["--mapped", "9" * 30], "not a pid"),
        (["--mapped"], "expected one argument"),
        (["--nonsense", "f"], "--nonsense"),
    ],
)
def test_bad_arguments_are_one_line(words: list[str], message: str) -> None:
    run = rsplice(*words)
    assert run.returncode == 125
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("rsplice: ") and message in run.stderr


@NEEDS_ROOT
def test_a_process_that_is_not_there_cannot_be_checked() -> None:
    run = rsplice("--mapped", str(2**22 + 1))
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"rsplice: there is no process {2**22 + 1}\n"


@NEEDS_ROOT
def test_missing_files_are_named_and_quiet_is_quiet() -> None:
    run = rsplice("/no/such\x1b[31m")
    assert (run.returncode, run.stderr) == (2, "")
    assert r"not checked: /no/such\x1b[31m: No such file or directory" in run.stdout
    run = rsplice("-q", "/no/such")
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "")


@NEEDS_ROOT
def test_without_privilege_nothing_is_claimed() -> None:
    """Run by nobody, who may not see which pages are dirty."""
    run = rsplice(os.path.realpath(sys.executable), user=65534)
    if "No module named" in run.stderr or "Permission denied: '/" in run.stderr:
        pytest.skip("nobody cannot read this directory")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("rsplice: nothing can be checked: /proc/kpageflags: ")
    assert len(run.stderr.splitlines()) == 1


def test_help_shows_examples() -> None:
    parser = argparse.ArgumentParser()
    command.prepare_parser(parser)
    assert parser.parse_args(["--mapped", "12"]).mapped == 12
    assert "EXAMPLES" in rsplice("--help").stdout


def test_a_target_is_opened_where_it_is_and_shown_by_its_name(tmp_path: Path) -> None:
    gone = Target("shown", str(tmp_path / "none"))
    done = command.verify_file(Verifier(fake(0), ()), gone)
    assert (done.name, done.problem) == ("shown", "No such file or directory")
