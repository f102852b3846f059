# SPDX-License-Identifier: MIT
"""The report as text and as a page, and the words that all views use."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from html.parser import HTMLParser
from pathlib import Path as File

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplice.audit import (
    Accuracy,
    Audit,
    Counts,
    Evidence,
    Finding,
    MissingProbe,
    PageCounts,
    Path,
    Paths,
    Process,
)
from rsplice.dashboards import phrases
from rsplice.dashboards.html import render_html
from rsplice.dashboards.report import print_report
from rsplice.dashboards.text import command_line, emit, sanitise
from rsplice.errors import RspliceError
from rsplice.journey import Journeys, Step, Story

EVIL = "\x1b[31m[red]evil\n"
EVIL_SHOWN = r"\x1b[31m[red]evil\x0a"


def read_path(operations: int = 23) -> Path:
    """A path of reads of one page each, all copied."""
    nbytes = operations * 4096
    counts = Counts(
        nbytes, nbytes, nbytes, copied=nbytes, operations=operations, evidence=Evidence.MEASURED
    )
    return Path("ext4", "user memory", "pread64", counts, "pread64 copies from the page cache")


def splice_path() -> Path:
    """A path of splices that share every page."""
    counts = Counts(1 << 20, 0, 1 << 20, shared=1 << 20, operations=17, evidence=Evidence.IDENTITY)
    return Path("ext4", "pipe", "splice", counts, "the pipe refers to the page cache's own pages")


def unknown_path() -> Path:
    """A path of which nothing is known."""
    return Path("tcp", "user memory", "recvfrom", Counts(4099, 0, 4099, unknown=4099, operations=3))


def bounced_path() -> Path:
    """A path whose bytes are copied twice, under a name too long for its column."""
    counts = Counts(8192, 16384, 8192, copied=8192, operations=1, evidence=Evidence.INFERRED)
    return Path("user memory", "block device /dev/nvme0n1p1", "io_uring write", counts, "bounced")


def audit_of(*paths: Path) -> Audit:
    """An audit of *paths* with consistent totals."""
    audit = Audit(["cp", "a", "b c"], 0, 0.42, "6.18.0", paths=Paths(paths))
    for path in paths:
        audit.totals.add(path.counts)
    audit.accuracy = Accuracy(["probe"] * 13, [], 0, audit.totals.unknown)
    return audit


def sample() -> Audit:
    """An audit with something of everything."""
    audit = audit_of(read_path(), bounced_path(), splice_path(), unknown_path())
    audit.pages = PageCounts(3, 5, 2, 7, 11)
    audit.processes = [
        Process(7, "cp", [read_path(), bounced_path()], PageCounts(3, 5, 0, 7, 11)),
        Process(11, EVIL, [splice_path(), unknown_path()]),
    ]
    audit.findings = [
        Finding(
            "steal-refused", "missed move", 3, {"pid": 7, "seen": "large folio"}, "try O_DIRECT"
        ),
        Finding("double-owner", "violation", 1, {"comm": EVIL, "page_frame": 4711}, "report it"),
    ]
    missing = MissingProbe("filemap_read", "no kprobes here", "read copies are inferred")
    audit.accuracy.probes_missing = [missing]
    return audit


EXPECTED = r"""rsplice: cp a 'b c', exit status 0, 0.42 s, Linux 6.18.0
payload 1.10 MiB, copied >=108 KiB, avoided <=1020 KiB (<=91 %)

PATH                                  OPS  PAYLOAD     COPIED COPIES/B  EVIDENCE
ext4 -> user memory via pread64        23 92.0 KiB   92.0 KiB     1.00  measured
    pread64 copies from the page cache
user memory -> block device /dev/nvme0n1p1 via io_uring write
                                        1 8.00 KiB   16.0 KiB     2.00  inferred
    bounced
ext4 -> pipe via splice                17 1.00 MiB        0 B     0.00  identity
    shared 1.00 MiB
    the pipe refers to the page cache's own pages
tcp -> user memory via recvfrom         3 4.00 KiB          ?        ?  none
    unknown 4.00 KiB

violation: double-owner, once
    first: comm \x1b[31m[red]evil\x0a, page frame 4711
    report it
missed move: steal-refused, 3 times
    first: pid 7, seen large folio
    try O_DIRECT

PROCESS                               OPS  PAYLOAD     COPIED COPIES/B  EVIDENCE
cp[7]                                  24  100 KiB    108 KiB     1.08  inferred
    page tables: 3 faults, 5 pages mapped by fault-around, 0 queued while mapped
    page cache: 7 pages inserted, 11 removed
\x1b[31m[red]evil\x0a[11]              20 1.00 MiB          ?        ?  identity

page tables: 3 faults, 5 pages mapped by fault-around, 2 queued while mapped
page cache: 7 pages inserted, 11 removed
accuracy: 13 probes attached, 1 missing (filemap_read: no kprobes here ->
    read copies are inferred), 0 events lost, 4099 bytes unknown
"""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(audit: Audit, width: int | None = None) -> str:
    """The text that print_report() writes to a file."""
    file = io.StringIO()
    print_report(audit, file, width)
    return file.getvalue()


def test_exact_text_at_80_columns() -> None:
    assert report(sample()) == EXPECTED


def test_wide_reports_use_the_room() -> None:
    lines = report(sample(), 120).splitlines()
    assert lines[3] == "PATH".ljust(74) + EXPECTED.splitlines()[3][34:]
    name = "user memory -> block device /dev/nvme0n1p1 via io_uring write"
    assert any(line.startswith(name) and line.endswith("inferred") for line in lines)


@pytest.mark.parametrize(("columns", "width"), [(0, 80), (50, 64), (131, 131)])
def test_the_width_is_the_terminals(columns: int, width: int) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with open(slave, "w") as file, open(master, "rb", buffering=0) as screen:
        print_report(audit_of(splice_path()), file, color=False)
        lines = screen.read(4096).decode().splitlines()
    assert lines[3] == "PATH".ljust(width - 46) + EXPECTED.splitlines()[3][34:]


def test_colour_only_on_a_terminal_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = _Terminal()
    print_report(sample(), file)
    assert "\x1b[" in file.getvalue()
    assert "\x1b[31m[red]" not in file.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = _Terminal()
    print_report(sample(), plain)
    assert plain.getvalue() == EXPECTED


def test_dumb_terminals_get_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = _Terminal()
    print_report(sample(), file)
    assert file.getvalue() == EXPECTED


def test_forced_colour_does_not_reach_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert report(sample()) == EXPECTED


def test_recorded_audits_say_so() -> None:
    file = io.StringIO()
    print_report(sample(), file, recorded=True)
    assert file.getvalue().startswith("RECORDED rsplice: cp")
    assert "RECORDED" not in EXPECTED


def test_no_markup_and_no_control_bytes_from_names() -> None:
    audit = audit_of(Path(EVIL, "[bold]x[/bold]", "read", Counts(2, 2, 2, copied=2), EVIL))
    audit.command = [EVIL]
    text = report(audit)
    assert text.count(EVIL_SHOWN) == 3
    assert "[bold]x[/bold]" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_unknown_bytes_are_never_0_copied() -> None:
    text = report(audit_of(unknown_path()))
    assert "copied ?, avoided ? (?)" in text
    assert "0 B" not in text
    assert "copied 0 B, avoided 1.00 MiB (100 %)" in report(audit_of(splice_path()))


def test_lost_events_are_never_0_copied() -> None:
    audit = audit_of(splice_path())
    audit.accuracy.events_lost = 1
    text = report(audit)
    assert "copied ?," in text
    assert "1 event lost" in text


def test_negative_avoided_bytes_are_shown() -> None:
    text = report(audit_of(bounced_path()))
    assert "avoided -8.00 KiB (-100 %)" in text


def test_one_process_is_not_listed_again() -> None:
    audit = sample()
    del audit.processes[1:]
    assert "PROCESS" not in report(audit)
    assert "PROCESS" in EXPECTED


def test_many_processes_are_cut_and_counted() -> None:
    audit = sample()
    audit.processes = [Process(pid, "true") for pid in range(1, 24)]
    text = report(audit)
    assert "true[20]" in text
    assert "true[21]" not in text
    assert "and 3 more" in text


def test_an_empty_audit() -> None:
    text = report(Audit())
    assert "payload 0 B, copied 0 B, avoided 0 B (-)" in text
    assert "no call that carries payload was seen" in text


def test_no_line_is_wider_than_80() -> None:
    audit = sample()
    audit.paths[0].why = "word " * 97
    audit.accuracy.probes_missing *= 5
    audit.findings[0].advice = "x" * 211
    assert max(map(len, report(audit).splitlines())) <= 80


def test_an_ascii_file_gets_escapes(tmp_path: File) -> None:
    audit = sample()
    audit.command = ["caf\u00e9"]
    with open(tmp_path / "out", "w+", encoding="ascii") as file:
        print_report(audit, file)
        file.seek(0)
        assert file.readline().startswith("rsplice: 'caf\\xe9', exit")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10235, "10.0 KiB"),
        (102300, "99.9 KiB"),
        (102399, "100 KiB"),
        (1048575, "1.00 MiB"),
        (1023 << 10, "1023 KiB"),
        (3 << 30, "3.00 GiB"),
        (5 << 40, "5.00 TiB"),
        (-8192, "-8.00 KiB"),
    ],
)
def test_size(nbytes: int, text: str) -> None:
    assert phrases.size(nbytes) == text


@given(st.integers(min_value=0, max_value=1 << 63))
def test_sizes_and_counts_fit_their_columns(number: int) -> None:
    assert len(phrases.size(number)) <= 8
    assert len(phrases.count(number % 10**12)) <= 6


@pytest.mark.parametrize(
    ("baseline", "copies", "text"),
    [
        (0, 0, "-"),
        (100, 0, "100 %"),
        (1000, 1, "99 %"),
        (1000, 999, "<1 %"),
        (1000, 1000, "0 %"),
        (1000, 1001, "-1 %"),
        (100, 150, "-50 %"),
    ],
)
def test_percent(baseline: int, copies: int, text: str) -> None:
    assert phrases.percent(Counts(1000, copies, baseline)) == text


def test_few_copies_are_not_none() -> None:
    assert phrases.copies_per_byte(Counts(1 << 20, 1, 1 << 20)) == "<0.01"
    assert phrases.copies_per_byte(Counts(1 << 20, 0, 1 << 20)) == "0.00"
    assert phrases.copies_per_byte(Counts()) == "-"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.423, "0.42 s"), (23.45, "23.4 s"), (62, "1:02"), (3723, "1:02:03")]
)
def test_duration(seconds: float, text: str) -> None:
    assert phrases.duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9 \u4e2d", "plain \u00e9 \u4e2d"),
        (EVIL, EVIL_SHOWN),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("a\u2028b\u200fc\t", r"a\u2028b\u200fc\x09"),
        ("\udcff\ud800", r"\xff\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_sanitise(text: str, shown: str) -> None:
    assert sanitise(text) == shown


@given(st.text(st.characters(codec=None, categories=None)))
def test_sanitised_text_is_printable_and_stays(text: str) -> None:
    shown = sanitise(text)
    assert shown.isprintable()
    assert sanitise(shown) == shown
    shown.encode()


def test_command_lines_are_quoted() -> None:
    assert command_line(["sh", "-c", "echo\x1b"]) == r"sh -c 'echo\x1b'"


def test_emit_to_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file:
        assert not emit(file, "text")


def test_emit_to_a_full_disk_is_one_line() -> None:
    with (
        open("/dev/full", "w") as file,
        pytest.raises(RspliceError, match=r"^cannot write /dev/full: No space left on device$"),
    ):
        emit(file, "text")


class _Page(HTMLParser):
    """The text and the tags of a page; fails on unbalanced tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onerror"}
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_escapes_everything() -> None:
    audit = sample()
    attack = "<script>alert(1)</script>\"'><img src=x onerror=y>\x1b\udc80"
    audit.command = [attack]
    audit.kernel_release = attack
    audit.processes[0].comm = attack
    audit.paths[0].source = audit.paths[0].why = attack
    audit.findings[0] = Finding(attack, attack, 1, {attack: attack}, attack)
    audit.accuracy.probes_missing = [MissingProbe(attack, attack, attack)]
    page = render_html(audit)
    page.encode()
    assert not {"script", "img"} & _Page(page).tags
    assert page.count("&lt;script&gt;") >= 11
    assert all(char.isprintable() or char == "\n" for char in page)


def test_the_page_tells_the_whole_audit() -> None:
    page = render_html(sample())
    text = " ".join(_Page(page).texts)
    for path in sample().paths:
        assert path.name in text
    for line in ("double-owner, once", "cp[7]", EVIL_SHOWN, "4099 bytes unknown", "copied >="):
        assert line in text
    assert 'title="94208 bytes"' in page


def followed(*labels: str, finding: str = "any") -> Journeys:
    """Pages that findings are about, one of each of *labels*."""
    stories = [
        Story(n, [Step(0, "found", EVIL), Step(1500, "queued", "", 7, EVIL, 1, 0, [], EVIL)],
              frame=4711, findings=[label], unkept=3)
        for n, label in enumerate(labels, start=1)
    ]  # fmt: skip
    return Journeys(2, "", stories, 2, finding)


def test_journeys_of_findings_are_told_with_them() -> None:
    audit = sample()
    audit.journeys = followed("double-owner", "steal-refused", "double-owner", finding="any")
    lines = report(audit).splitlines()
    places = [next(i for i, line in enumerate(lines) if word in line) for word in (
        "violation: double-owner", "page 1", "page 3", "missed move: steal-refused", "page 2",
        "JOURNEYS: 3 pages of findings, told with each finding",
    )]  # fmt: skip
    assert places == sorted(places)
    assert sum("  queued" in line for line in lines) == 3
    audit.journeys = followed(finding="stranded")
    assert "JOURNEYS: no page of stranded was followed" in report(audit)


def test_the_page_has_findings_and_journeys_in_full_and_escaped() -> None:
    audit = sample()
    attack = "<b>&\x1b"
    audit.findings[0] = Finding("steal-refused", "missed move", 3, {"time": 0.5, "pid": 7}, attack)
    audit.journeys = followed("steal-refused", "other")
    audit.journeys.stories[0].steps[0] = Step(0, attack, attack, 7, attack, 1, 0, [attack], attack)
    for finding, shown in (("any", 1), ("", 2)):
        audit.journeys.finding = finding
        page = render_html(audit)
        parsed = _Page(page)
        text = " ".join(parsed.texts)
        assert "b" not in parsed.tags
        assert all(char.isprintable() or char == "\n" for char in page)
        assert text.count(", frame 4711") == shown
        assert text.count("1.5 us") == shown
        assert "first after 0.50 s, last after -" in text
        assert "page frame 4711" in text, "of the violation, which was not followed"
        assert "2 events lost" in text and "and 3 events more, not kept" in text


def test_pages_that_nobody_counted_are_not_zero() -> None:
    audit = Audit(pages=PageCounts(faults=23, inserted_pages=7))
    audit.accuracy.uncounted = ["mapped_pages", "queued_mapped_pages", "removed_pages"]
    shown = report(audit)
    assert "page tables: 23 faults, ? pages mapped by fault-around, ? queued while mapped" in shown
    assert "page cache: 7 pages inserted, ? removed" in shown
    audit.accuracy.uncounted = []
    assert "?" not in report(audit)
