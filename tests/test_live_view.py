# SPDX-License-Identifier: MIT
"""The live dashboard: what it draws, and how it behaves on a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path as File

import pytest
from rich.cells import cell_len
from rich.console import Console

from rsplice import dashboards
from rsplice.audit import Audit, Finding, Process
from rsplice.dashboards.frames import Frame
from rsplice.dashboards.live import LiveView
from rsplice.dashboards.spark import Sample, spark
from rsplice.dashboards.terminal import read_keys
from rsplice.journey import Journeys, Step, Story
from rsplice.recording import Recording
from tests.test_report import (
    EVIL,
    EVIL_SHOWN,
    audit_of,
    bounced_path,
    read_path,
    sample,
    splice_path,
    unknown_path,
)

ROOT = File(__file__).parent.parent
PATIENCE = 60.0  #: seconds until a terminal test gives up
FINDINGS = ["\t", "\t"]  #: keys that lead to them
DETAIL = [*FINDINGS, "enter"]


def view_of(*audits: Audit, recorded: bool = False) -> LiveView:
    """A view fed with *audits*, one a second from 1 s on."""
    view = LiveView(recorded=recorded)
    for at, audit in enumerate(audits, start=1):
        view.feed(replace(audit, duration_s=float(at)), float(at))
    return view


def pressed(view: LiveView, *keys: str) -> LiveView:
    """The view after *keys*."""
    for key in keys:
        assert view.press(key)
    return view


def screen(view: LiveView, width: int = 80, height: int = 24) -> str:
    """What the view draws, as plain text."""
    console = Console(
        record=True, width=width, height=height, file=io.StringIO(), force_terminal=True
    )
    console.print(view)
    return console.export_text()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (23, 3), (131, 53)])
@pytest.mark.parametrize(
    "keys", [[], ["\t"], FINDINGS, DETAIL, [*DETAIL, *["down"] * 99], [*DETAIL, "?"], ["?"], ["p"]]
)
def test_it_fits(width: int, height: int, keys: list[str]) -> None:
    audit = sample()
    audit.paths *= 11
    audit.processes *= 23
    audit.findings *= 13
    view = view_of(audit, audit, recorded=True)
    for key in keys:
        view.press(key)
    lines = screen(view, width, height).splitlines()
    assert len(lines) == height
    assert max(map(cell_len, lines)) <= width
    assert "RECORDED" in lines[0]
    assert "RECORDED" not in screen(view_of(audit))


def test_the_picture_of_paths() -> None:
    lines = screen(view_of(sample(), sample())).splitlines()
    assert lines[0].rstrip() == "rsplice 2.00 s cp a 'b c'"
    assert lines[1] == "                  now      so far  last minute"
    assert lines[2].startswith("copied          0 B/s   >=108 KiB  ")
    assert lines[3].startswith("avoided         0 B/s  <=1020 KiB  ")
    assert lines[4] == "                    -      <=91 %  payload 1.10 MiB"
    assert lines[6] == " paths 4   processes 2   findings 2  VIOLATION  by copied"
    assert lines[8].startswith(
        "ext4 -> user memory via pread64  92.0 KiB   92.0 KiB      0 B/s   1.00"
    )
    assert "page cache: 7 pages inserted, 11 removed" in lines
    assert lines[-3].startswith("accuracy: 13 probes attached, 1 missing (filemap_read: ")
    assert lines[-1] == " q quit   p pause   s sort   tab view   ? help "


def test_names_are_text_in_every_view() -> None:
    view = view_of(sample())
    for key, found in (("", False), ("\t", True), ("\t", False), ("enter", True), ("?", False)):
        view.press(key)
        text = screen(view)
        assert (EVIL_SHOWN in text) is found
        assert all(char.isprintable() or char == "\n" for char in text)


def test_rates_are_of_the_time_between_two_snapshots() -> None:
    view = LiveView()
    view.feed(audit_of(read_path(2)), 1.0)
    view.feed(audit_of(read_path(25), splice_path()), 3.0)
    lines = screen(view).splitlines()
    assert lines[2].split()[:4] == ["copied", "46.0", "KiB/s", "100"]
    assert lines[3].split()[:5] == ["avoided", "512", "KiB/s", "1.00", "MiB"]
    assert lines[4].split()[:4] == ["91", "%", "91", "%"]
    view.feed(audit_of(read_path(25), splice_path()), 4.0)
    assert screen(view).splitlines()[2].split()[:3] == ["copied", "0", "B/s"]


def test_a_second_snapshot_of_the_same_time_keeps_the_rates() -> None:
    frame = Frame().next(audit_of(read_path(2)), 1.0).next(audit_of(read_path(25)), 2.0)
    again = frame.next(audit_of(read_path(25)), 2.0)
    assert again.now == frame.now
    assert frame.now.copy_bytes == 23 * 4096


def test_unknown_bytes_are_never_0_copied() -> None:
    text = screen(view_of(audit_of(unknown_path())))
    assert text.splitlines()[2].split()[:3] == ["copied", "?/s", "?"]
    assert "0 B" not in text
    twin = screen(view_of(audit_of(splice_path())))
    assert twin.splitlines()[2].split()[:5] == ["copied", "0", "B/s", "0", "B"]


def test_negative_avoided_bytes_are_shown() -> None:
    lines = screen(view_of(audit_of(bounced_path()))).splitlines()
    assert lines[3].split()[:5] == ["avoided", "-8.00", "KiB/s", "-8.00", "KiB"]
    assert lines[3].endswith("-")


def test_pause_holds_the_picture() -> None:
    view = view_of(audit_of(read_path(2)))
    view.press("p")
    view.feed(audit_of(read_path(25)), 2.0)
    assert "PAUSED" in screen(view)
    assert "8.00 KiB" in screen(view)
    view.press("p")
    assert "PAUSED" not in screen(view)
    assert "100 KiB" in screen(view)


def test_sorting_goes_round() -> None:
    view = view_of(sample(), sample())
    firsts = []
    for _ in range(5):
        lines = screen(view).splitlines()
        firsts.append((lines[6].rsplit("by ", 1)[1], lines[8].split(" via")[0]))
        view.press("s")
    assert firsts[0] == ("copied", "ext4 -> user memory")
    assert firsts[2] == ("payload", "ext4 -> pipe")
    assert firsts[3] == ("name", "ext4 -> pipe")
    assert firsts[4] == firsts[0]
    assert view.press("x")
    assert not view.press("q")


def test_findings_can_be_sorted() -> None:
    view = pressed(view_of(sample()), *FINDINGS)
    assert screen(view).splitlines()[8].split()[1:3] == ["violation", "double-owner"]
    view.press("s")
    assert screen(view).splitlines()[8].split()[1:4] == ["missed", "move", "steal-refused"]


def many_findings() -> Audit:
    """Findings of several names, kinds and reasons, as the ledger sorts them: by count."""
    audit = sample()
    audit.findings = [
        Finding("steal-refused", "missed move", 128, {"reason": "large folio", "time": 0.5}, "a"),
        Finding("stranded", "hazard", 23, {"time": 1.25, "last": 75.0}, "drain"),
        Finding("steal-refused", "missed move", 5, {"reason": "dirty", "time": EVIL}, "fsync"),
        Finding("double-owner", "violation", 1, {"time": 3.0, "last": float("nan")}, "report"),
    ]
    return audit


def test_findings_of_a_name_stand_together_with_count_first_and_last() -> None:
    lines = screen(pressed(view_of(many_findings()), *FINDINGS)).splitlines()
    assert lines[7].split() == ["KIND", "FINDING", "COUNT", "FIRST", "LAST"]
    assert [" ".join(line.split()) for line in lines[8:12]] == [
        "> violation double-owner 1 3.00 s -",
        "hazard stranded 23 1.25 s 1:15",
        "missed move steal-refused: dirty 5 - -",
        "missed move steal-refused: large folio 128 0.50 s -",
    ]


def test_a_finding_is_chosen_opened_and_left() -> None:
    view = pressed(view_of(many_findings()), *FINDINGS)
    for keys, name in (
        ([], "double-owner"),
        (["down"], "stranded"),
        (["down", "j"], "steal-refused: large folio"),
        (["down"], "steal-refused: large folio"),
        (["up", "k"], "stranded"),
        (["page up"], "double-owner"),
    ):
        pressed(view, *keys)
        (line,) = [line for line in screen(view).splitlines() if line.startswith(">")]
        assert name in line
    for back in ("enter", "escape"):
        text = screen(pressed(view, "enter"))
        assert "violation: double-owner, once, first after 3.00 s, last after -" in text
        assert "advice       report" in text and "stranded" not in text
        assert text.splitlines()[-1] == " q quit   p pause   up/down scroll   enter back   ? help "
        assert "stranded" in screen(pressed(view, back))
    assert " paths 4 " in screen(pressed(view, "enter", "\t"))


def test_the_chosen_one_stays_when_others_are_found() -> None:
    audit = many_findings()
    view = pressed(view_of(audit), *FINDINGS, "down", "enter")
    more = replace(audit, findings=[*audit.findings])
    more.findings.insert(0, Finding("changed-in-flight", "hazard", 7, {}, "copy"))
    more.findings[2] = replace(more.findings[2], count=24)
    view.feed(more, 2.0)
    assert "hazard: stranded, 24 times" in screen(view)


def test_more_findings_than_lines_are_scrolled() -> None:
    audit = sample()
    audit.findings = [Finding(f"name-{n:02}", "hazard", 1, {}, "") for n in range(41)]
    view = pressed(view_of(audit), *FINDINGS)
    seen: set[str] = set()
    for _ in range(41):
        text = screen(view)
        assert " of 41" in text
        seen |= {word for word in text.split() if word.startswith("name-")}
        (chosen,) = [line for line in text.splitlines() if line.startswith(">")]
        view.press("down")
    assert len(seen) == 41
    assert "name-40" in chosen


def test_without_findings_there_is_nothing_to_open() -> None:
    view = pressed(view_of(audit_of(read_path())), *FINDINGS, "enter", "down", "escape")
    lines = screen(view).splitlines()
    assert "nothing was found" in lines
    assert "enter" not in lines[-1]


def followed_finding(*labels: str) -> Audit:
    """A finding with all that may be known of it, and pages that *labels* are about."""
    audit = sample()
    first = {
        "reason": "large folio", "pid": 7, "comm": "pll", "page_frame": 4711, "file": "big",
        "file_offset": 8192, "operation": "pipe -> fuse device via fuse reply", "time": 0.5,
        "last": 0.75, "expected": "the page is moved", "seen": EVIL, "new": ["x"],
    }  # fmt: skip
    audit.findings = [Finding("steal-refused", "missed move", 23, first, "try O_DIRECT")]
    stories = [
        Story(number, [Step(0, "found"), Step(5, "queued", f"of page {number}")],
              findings=[label], frame=4711 + 100 * (number - 2), pages=4)
        for number, label in enumerate(labels, start=1)
    ]  # fmt: skip
    audit.journeys = Journeys(1, stories=stories, finding="any")
    return audit


def test_all_that_is_known_of_a_finding_is_told() -> None:
    label = "steal-refused: large folio"
    text = screen(pressed(view_of(followed_finding(label, label, "other")), *DETAIL), height=40)
    for line in (
        "  reason       large folio",
        "  process      pll[7]",
        "  operation    pipe -> fuse device via fuse reply",
        "  file         big, at 8192",
        "  page frame   4711",
        "  expected     the page is moved",
        f"  seen         {EVIL_SHOWN}",
        "  new          ['x']",
        "  advice       try O_DIRECT",
    ):
        assert line in text.splitlines()
    assert "first after 0.50 s, last after 0.75 s" in text
    assert "of page 2" in text, "the page of the first occurrence is preferred"
    assert "of page 1" not in text and "of page 3" not in text


def test_a_finding_whose_page_was_not_followed_says_so() -> None:
    text = screen(pressed(view_of(followed_finding("stranded")), *DETAIL))
    assert "journey      none: no page that was followed is one of this finding" in text
    audit = followed_finding()
    audit.journeys = None
    text = screen(pressed(view_of(audit), *DETAIL))
    assert "rsplice live --journey" in text


def test_a_long_finding_is_scrolled_to_its_end_and_no_further() -> None:
    audit = followed_finding("steal-refused: large folio")
    assert audit.journeys
    audit.journeys.stories[0].steps += [Step(n, "queued", f"step {n}") for n in range(100)]
    view = pressed(view_of(audit), *DETAIL)
    assert "step 99" not in screen(view)
    pressed(view, *["page down"] * 99)
    assert "step 99" in screen(view)
    pressed(view, "up")
    assert "step 99" not in screen(view)


def test_what_does_not_fit_is_counted() -> None:
    audit = sample()
    audit.processes = [Process(pid, "true") for pid in range(1, 24)]
    view = view_of(audit)
    view.press("\t")
    lines = screen(view).splitlines()
    shown = sum(line.startswith("true[") for line in lines)
    assert f"and {23 - shown} more" in lines
    assert 0 < shown < 23
    assert not any("more" in line for line in screen(view, height=53).splitlines())


def test_help_names_what_is_missing() -> None:
    view = view_of(sample())
    view.press("?")
    assert "missing filemap_read: no kprobes here -> read copies are inferred" in screen(view)
    view.press("\t")
    assert "missing filemap_read: no" not in screen(view)
    assert " paths 4 " in screen(view)


def test_the_block_without_a_terminal() -> None:
    lines = view_of(sample(), recorded=True).block().splitlines()
    assert lines[0] == "RECORDED rsplice 1.00 s cp a 'b c'"
    assert lines[1] == "payload 1.10 MiB, copied >=108 KiB, avoided <=1020 KiB (<=91 %)"
    assert lines[-2].startswith("accuracy: 13 probes attached, 1 missing, 0 events lost")
    assert all(line.isprintable() and len(line) <= 80 for line in lines)


def test_the_packaged_demo_shows_findings_with_their_journeys() -> None:
    demo = Recording(str(File(dashboards.__file__).parent / "demo.jsonl"))
    audit = demo.final
    view = view_of(audit, recorded=True)
    pressed(view, *FINDINGS)
    assert len(audit.findings) >= 3
    for _ in audit.findings:
        text = screen(pressed(view, "enter"), 100, 60)
        assert "  advice  " in text
        assert text.index("  queued  ") < text.index("  finding  ")
        pressed(view, "escape", "down")


def test_sparks() -> None:
    samples = [Sample(58.0, 59.0, 8.0), Sample(59.0, 60.0, 1.0)]
    assert spark(samples, 60.0, 60, 8.0, False) == " " * 58 + "█▁"
    assert spark(samples, 60.0, 30, 8.0, True) == " " * 29 + "@"
    assert spark([Sample(0.0, 60.0, 0.001)], 60.0, 7, 8.0, True) == "." * 7
    assert spark([Sample(0.0, 60.0, -3.0)], 60.0, 7, 8.0, False) == "-" * 7
    assert spark([], 0.0, 7, 0.0, False) == " " * 7
    assert spark(samples, 60.0, 0, 8.0, False) == ""


def test_history_is_a_minute_long() -> None:
    frame = Frame()
    for at in range(1, 101):
        frame = frame.next(audit_of(read_path(at)), float(at))
    assert [sample.end for sample in frame.copied] == [float(at) for at in range(41, 101)]


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"sp\t?", [*"sp\t?"]),
        (b"\x1b[A\x1bOA\x1b[B\x1bOB", ["up", "up", "down", "down"]),
        (b"\x1b[5~\x1b[6~", ["page up", "page down"]),
        (b"\r\n\x7f", ["enter", "enter", "escape"]),
        (b"\x1b[C\x1bOq\x1b[15~s", ["s"]),
        (b"\x1bq", []),
        (b"\x1b", ["escape"]),
        (b"\xc3\xa9", []),
        (b"", ["q"]),
    ],
)
def test_keys(data: bytes, keys: list[str]) -> None:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    assert read_keys(reader) == keys
    os.close(reader)


def test_a_key_whose_bytes_come_one_by_one_is_one_key() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"\x1b")
    late = threading.Timer(0.001, os.write, (writer, b"[A"))
    late.start()
    try:
        assert read_keys(reader) == ["up"]
    finally:
        late.join()
        os.close(reader)
        os.close(writer)


# On a real terminal. The snapshots come an hour apart, so that what is drawn after the first is
# drawn for a key, a signal or a new size.
DRIVER = """
import sys
from rich.console import Console
from rsplice.dashboards.live import run_live
from tests.test_report import sample

class Source:
    running = True
    def snapshot(self):
        audit = sample()
        audit.duration_s = 23.0
        return audit

print("before", flush=True)
audit = run_live(Source(), Console(), interval=3600)
print("audit of", audit.totals.operations)
"""


@dataclass
class Session:
    """The driver on a terminal of its own."""

    process: subprocess.Popen[bytes]
    master: int
    slave: int
    output: bytes = b""

    def until(self, text: str, start: int = 0) -> int:
        """Reads until *text* appears after position *start*; the position behind it."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.output.find(text.encode(), start)) < 0:
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} did not appear in {self.output[start:]!r}"
            self.output += os.read(self.master, 1 << 16)
        return found + len(text)

    def press(self, keys: str) -> int:
        """Types *keys*; the position where what follows begins."""
        start = len(self.output)
        os.write(self.master, keys.encode())
        return start

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def end(self) -> int:
        """The exit status."""
        return self.process.wait(PATIENCE)


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def session() -> Iterator[Session]:
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    yield Session(process, master, slave)
    process.kill()
    process.communicate()
    for number in (master, slave):
        try:
            os.close(number)
        except OSError:
            continue


ENTER, LEAVE, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


def _assert_restored(session: Session, modes: list[object]) -> None:
    session.until(LEAVE)
    session.until(SHOW_CURSOR)
    assert termios.tcgetattr(session.slave) == modes


def test_keys_are_obeyed_at_once(session: Session) -> None:
    modes = termios.tcgetattr(session.slave)
    session.until(" q quit", session.until(ENTER))
    assert termios.tcgetattr(session.slave) != modes
    session.until("FAULTS", session.press("\t"))
    session.until("double-owner", session.press("\t"))
    session.until("by count", session.press("s"))
    session.until("> violation", session.press("\x1b[B"))
    session.until("enter back", session.press("\n"))
    session.until("enter open", session.press("\x1b"))
    session.until("C/BYTE", session.press("?"))
    session.until("PAUSED", session.press("p\x1b[Ap"))
    session.press("q")
    session.until("audit of 44")
    assert session.end() == 0
    _assert_restored(session, modes)


def test_a_new_size_is_drawn_at_once(session: Session) -> None:
    session.until(" q quit", session.until(ENTER))
    start = len(session.output)
    session.resize(30, 131)
    wide = "PATH".ljust(131 - 48) + "  PAYLOAD"
    session.until(wide, start)
    session.press("q")
    assert session.end() == 0


def test_ctrl_c_leaves_with_the_audit(session: Session) -> None:
    modes = termios.tcgetattr(session.slave)
    session.until(" q quit", session.until(ENTER))
    session.press("\x03")
    session.until("audit of 44")
    assert session.end() == 0
    _assert_restored(session, modes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_kill_it_after_the_terminal_is_restored(
    session: Session, number: signal.Signals
) -> None:
    modes = termios.tcgetattr(session.slave)
    session.until(" q quit", session.until(ENTER))
    session.process.send_signal(number)
    assert session.end() == -number
    _assert_restored(session, modes)
    assert b"audit of" not in session.output


def test_a_terminal_that_goes_away_ends_it(session: Session) -> None:
    session.until(" q quit", session.until(ENTER))
    os.close(session.slave)
    os.close(session.master)
    assert session.end() != 0
    assert session.process.stderr is not None
    assert b"Traceback" not in session.process.stderr.read()


PLAIN = """
import sys
from rich.console import Console
from rsplice.dashboards.live import run_live
from tests.test_report import sample

class Source:
    taken = 0
    @property
    def running(self):
        return self.taken < 2
    def snapshot(self):
        self.taken += 1
        audit = sample()
        audit.duration_s = float(self.taken)
        return audit

run_live(Source(), Console(), interval=0.01, recorded="recorded" in sys.argv)
"""


@pytest.mark.parametrize("mark", ["recorded", "live"])
def test_without_a_terminal_it_prints_a_block_for_each_snapshot(mark: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, mark],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE,
        check=True,
    )
    assert run.stdout.count("rsplice ") == 3
    assert run.stdout.count("RECORDED rsplice ") == (3 if mark == "recorded" else 0)
    assert "\x1b" not in run.stdout
    assert run.stderr == ""


def test_without_a_reader_it_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, "live"],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        timeout=PATIENCE,
        check=False,
    )
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, b"")
