# SPDX-License-Identifier: MIT
"""What the benchmark found, as a table on the terminal and as docs/overhead.md."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from benchmarks.calls import RUNS, SPECS
from benchmarks.footprint import LIVE_CALLS_PER_S
from benchmarks.stats import Target
from benchmarks.tracers import UNTRACED
from benchmarks.web import LOAD, SIZES

MIB = 1 << 20

#: What stands behind it in docs/overhead.md is of other measurements.
KEPT = "<!-- what follows is kept: benchmarks.measuring -->"

#: The load average of the last minute up to which a machine counts as quiet.
QUIET_LOAD = 0.5

#: The specs whose calls an audit counts.
_COUNTED = ("splice-4K", "splice-64K", "copy-4K")


def targets(result: dict[str, Any]) -> list[Target]:
    """The targets beside what was read."""

    def ratio(tracer: str) -> float | None:
        row = result["calls"].get(tracer)
        return float(row["splice-64K"]["ratio"]["median"]) if row else None

    def added(tracer: str, specs: tuple[str, ...]) -> float | None:
        row = result["calls"].get(tracer)
        return max(row[s]["added_ns_per_call"]["median"] for s in specs) if row else None

    def compared(tracer: str, other: str) -> float | None:
        mine, theirs = added(tracer, ("splice-64K",)), added(other, ("splice-64K",))
        # The floor of 1 ns keeps noise around nothing from turning a quotient round.
        return None if mine is None or theirs is None else theirs / max(mine, 1.0)

    web = [row["audited_fewer_per_cent"]["median"] for row in result["web"].values()]
    found = result["footprint"]
    memory = sum(found["memory"].values()) / MIB if "memory" in found else None
    start = max(found["start_s"]) if "start_s" in found else None
    live = found["live_cpu"]["per_cent"] if "live_cpu" in found else None
    every = tuple(spec.key for spec in SPECS)
    return [
        Target("splice 64 KiB, rsplice all", 1.5, "x untraced", ratio("all")),
        Target("splice 64 KiB, rsplice sample", 1.15, "x untraced", ratio("sample")),
        Target("a counted call, worst", 60, "ns more", added("off", _COUNTED)),
        Target("a call not followed, worst", 45, "ns more", added("not-followed", every)),
        _beaten("bpftrace against rsplice off", 1, compared("off", "bpftrace")),
        _beaten("bpftrace against rsplice all", 1, compared("all", "bpftrace")),
        _beaten("strace against rsplice all", 50, compared("all", "strace")),
        Target("nginx requests, worst", 3, "% fewer", max(web) if web else None),
        Target("memory with BPF maps", 150, "MiB", memory),
        Target("dashboard", 5, "% of a CPU", live),
        Target("start to first call, worst", 1, "s", start),
    ]


def _beaten(what: str, times: float, reading: float | None) -> Target:
    """The other tracer adds at least so many times what rsplice adds, at 64 KiB."""
    return Target(what, times, "x ns added", reading, at_least=True)


def show(console: Console, result: dict[str, Any], titles: dict[str, str]) -> None:
    """Prints the tables."""
    if result["machine"]["load"] > QUIET_LOAD:
        console.print(_BUSY)
    table = plain_table("Time per pair of calls: times untraced, and ns added to each call")
    table.add_column(no_wrap=True)
    for spec in SPECS:
        # The first of them holds the reason why a row is empty.
        width = len("not installed") if spec is SPECS[0] else None
        table.add_column(spec.title, justify="right", min_width=width)
    for tracer, title in titles.items():
        table.add_row(title, *(Text(cell) for cell in _cells(result, tracer)))
    console.print(table)
    table = plain_table("Targets")
    for heading in ("", "target", "reading", ""):
        justify: JustifyMethod = "right" if heading == "reading" else "left"
        table.add_column(heading, justify=justify, no_wrap=True)
    for target in targets(result):
        table.add_row(*target_cells(target))
    console.print(table)
    for what, reason in _reasons(result, titles).items():
        console.print(Text(f"not measured: {what}: {reason}"))


def plain_table(title: str) -> Table:
    """A table as every table of the benchmarks looks on the terminal."""
    return Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _cells(result: dict[str, Any], tracer: str) -> list[str]:
    if tracer not in result["calls"]:
        absent = result["missing"].get(tracer, "").endswith("not installed")
        return ["not installed" if absent else "not measured"]
    row = result["calls"][tracer]
    if tracer == UNTRACED.key:
        return [f"{row[spec.key]['ns_per_pair']['median']:,.0f} ns" for spec in SPECS]
    return [
        f"{_ratio(row[spec.key]['ratio']['median'])} "
        f"{row[spec.key]['added_ns_per_call']['median']:+,.0f}"
        for spec in SPECS
    ]


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:,.0f}x"


def target_cells(target: Target) -> list[str]:
    """A row: what, the limit, the reading, and whether it was met."""
    bound = "at least" if target.at_least else "at most"
    reading = "not measured" if target.reading is None else f"{target.reading:,.2f}"
    verdict = {None: "", True: "met", False: "MISSED"}[target.met]
    return [target.what, f"{bound} {target.limit:g} {target.unit}", reading, verdict]


def _reasons(result: dict[str, Any], titles: dict[str, str]) -> dict[str, str]:
    reasons = {titles.get(key, key): why for key, why in result["missing"].items()}
    return {**reasons, **result["footprint"]["missing"]}


def markdown(result: dict[str, Any], titles: dict[str, str]) -> str:
    """docs/overhead.md."""
    return "\n\n".join(
        (
            _INTRODUCTION,
            machine_line(result),
            _targets_section(result),
            _calls_section(result, titles),
            _web_section(result),
            _footprint_section(result),
            _missing_section(result, titles),
            _METHOD.format(rounds=result["rounds"], runs=RUNS, load=" ".join(LOAD),
                           live=LIVE_CALLS_PER_S),
        )
    ).replace("\n\n\n", "\n")  # fmt: skip


_INTRODUCTION = """\
<!-- SPDX-License-Identifier: MIT -->
# Overhead

What following a program costs that program, and what rsplice takes itself. `make bench` measures it
all again, `python -m benchmarks --write-docs` writes this page. The figures are of one machine:"""

_BUSY = "Other work was running: these readings are not to be trusted."

_METHOD = """\
## How it was measured

- The driver, `benchmarks/loop.c`, makes pairs of calls: splice(file -> pipe) and splice(pipe ->
  /dev/null), or pread and pwrite on files in the page cache, or getppid twice, a call that no audit
  counts. Each launch times {runs} runs of tens of thousands of pairs (hundreds under strace and
  perf) and keeps the fastest, since disturbance only adds time. A tracer's start is not part of it.
- All rows run in turn, {rounds} rounds, every other round backwards. Ratios and added times compare
  a launch with the untraced launch of its round. Tables show the median, and in parentheses the
  least and the greatest.
- "empty BPF program": one on the raw tracepoint sys_exit that returns at once
  (`benchmarks/floor.c`). No tracer of system calls through BPF can cost less.
- "rsplice, not followed": the driver runs while `rsplice audit` follows another, idle program.
- "rsplice, off", "sample" and "all": `rsplice audit --identity off` and so on, of the driver. "off"
  counts calls and bytes; "sample" compares the pages of some calls, "all" those of each, and alone
  looks for lifecycle findings: it has a second probe, on sys_enter.
- "journeys" and "integrity" are "all" with more: `--journey=2` follows two pages of the driver,
  `--integrity` sums up the bytes of each page as it is queued in a pipe and as it is taken out.
- bpftrace counts splice, pread64 and pwrite64 of one process and nothing else: no bytes, no
  endpoints, no children.
- nginx is one process with `sendfile on` that serves a file from the page cache to `{load}` on
  the same machine, with and without `rsplice audit` in turn, in twice as many rounds.
  The empty BPF program is measured too, in the same rounds: every system call of nginx and of wrk
  pays for it, so that it is the least that any tracer of system calls through BPF costs them.
- The start is that of an audit whose BPF programs were compiled before, as all but the first after
  an update of rsplice, BCC or the kernel are. The first takes one or two seconds more.
- Where a librsplice with USDT probes is installed, an audit attaches to them: its start and end
  take some 50 ms more each, and a probe that a program meets costs it about 1 us.
- Memory is the peak of rsplice's resident memory (VmHWM) and the memory of its BPF maps, during an
  audit of the workload `mixed`.
- The dashboard's processor time is that of `rsplice live` in a terminal of 80x24, beside the driver
  at {live:,} calls a second. What its BPF programs cost the driver is in the tables above.
"""


def machine_line(result: dict[str, Any]) -> str:
    """What the readings were taken on."""
    m = result["machine"]
    busy = f" {_BUSY}" if m["load"] > QUIET_LOAD else ""
    return (
        f"{m['processor']}, {m['processors']} processors, {m['memory_gib']} GiB of memory, "
        f"Linux {m['kernel']}; load average when it started: {m['load']:.2f}.{busy}"
    )


def kept(page: str) -> str:
    """The part of docs/overhead.md that stays when the rest is written anew."""
    return "".join(page.partition(f"\n{KEPT}")[1:])


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def spread(summary: dict[str, float], form: str) -> str:
    """The median, and the least and the greatest in parentheses."""
    low, high = format(summary["low"], form), format(summary["high"], form)
    return f"{format(summary['median'], form)} ({low} to {high})"


def _targets_section(result: dict[str, Any]) -> str:
    rows = [target_cells(target) for target in targets(result)]
    section = "## Targets\n\n" + markdown_table(["", "target", "reading", ""], rows)
    if "floor" not in result["calls"]:
        return section
    least = [row["added_ns_per_call"]["median"] for row in result["calls"]["floor"].values()]
    return (
        f"{section}\n\n"
        "An empty BPF program on sys_exit, the least that a BPF tracer of system calls costs,\n"
        f"adds {min(least):.0f} to {max(least):.0f} ns to a call here."
    )


def _calls_section(result: dict[str, Any], titles: dict[str, str]) -> str:
    heading = ["", *(spec.title for spec in SPECS)]
    sections = ["## Calls"]
    for text, figure, form in (
        ("Nanoseconds per pair of calls:", "ns_per_pair", ",.0f"),
        ("Times untraced:", "ratio", ",.2f"),
        ("Nanoseconds added to each call:", "added_ns_per_call", "+,.0f"),
    ):
        rows = [
            [title, *(spread(result["calls"][key][spec.key][figure], form) for spec in SPECS)]
            for key, title in titles.items()
            if key in result["calls"] and (key != UNTRACED.key or figure == "ns_per_pair")
        ]
        sections += [text, markdown_table(heading, rows)]
    return "\n\n".join(sections)


def _web_section(result: dict[str, Any]) -> str:
    rows = [
        [
            size,
            spread(result["web"][size]["untraced"], ",.0f"),
            spread(result["web"][size]["audited"], ",.0f"),
            spread(result["web"][size]["audited_fewer_per_cent"], ".1f"),
            spread(result["web"][size]["floor_fewer_per_cent"], ".1f"),
        ]
        for size in SIZES
        if size in result["web"]
    ]
    heading = [
        "file",
        "requests/s untraced",
        "under rsplice audit",
        "% fewer",
        "% fewer with an empty BPF program",
    ]
    return "## nginx with sendfile\n\n" + (
        markdown_table(heading, rows) if rows else "Not measured."
    )


def _footprint_section(result: dict[str, Any]) -> str:
    found = result["footprint"]
    rows = []
    if "memory" in found:
        rows.append(["peak memory of rsplice", f"{found['memory']['process_bytes'] / MIB:.1f} MiB"])
        rows.append(["memory of its BPF maps", f"{found['memory']['maps_bytes'] / MIB:.1f} MiB"])
    if "live_cpu" in found:
        rows.append(["dashboard", _live(found["live_cpu"])])
    if "start_s" in found:
        starts = ", ".join(f"{s:.2f}" for s in found["start_s"])
        rows.append(["from start to the command's start", f"{starts} s"])
    return "## rsplice itself\n\n" + (
        markdown_table(["", "reading"], rows) if rows else "Not measured."
    )


def _live(found: dict[str, float]) -> str:
    return f"{found['per_cent']:.1f} % of one processor, at {found['calls_per_s']:,.0f} calls/s"


def _missing_section(result: dict[str, Any], titles: dict[str, str]) -> str:
    reasons = _reasons(result, titles)
    if not reasons:
        return ""
    lines = [f"- {what}: {reason}" for what, reason in reasons.items()]
    return "## Not measured\n\n" + "\n".join(lines)
