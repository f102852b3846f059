# SPDX-License-Identifier: MIT
"""What happens to pages, at the moment when it does: on kernels with fentry or kprobes.

Where the kernel has neither, as that of a development machine may, these tests say so; they run
on others with make test-kernels. Those of inserts run everywhere.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rsplice.journey import PAGES_MAX, Request, Story, tell
from rsplice.tracers import providers
from rsplice.tracers.btf import Btf
from rsplice.tracers.findings import LEARNED
from rsplice.tracers.journey import Follower
from rsplice.tracers.program import BpfError
from rsplice.tracers.providers import How
from rsplice.tracers.tracer import Tracer
from tests.support.run import Driver
from tests.support.watch import COUNT, READS, Seen, Watch, offering, trampolines

pytestmark = pytest.mark.privileged

PAGE = 4096
EACH = 3  #: pages of each kind whose journeys are told
FOLLOWED_PAGES = 7  #: of each FUSE reply that is followed: PAGES_MAX is for all of them
REPLY_PAGES = 13
STEAL = "steal-refused"


def needs_functions() -> None:
    if not providers.running(Btf()).measures:
        pytest.skip(providers.NEITHER)


# --- journeys -------------------------------------------------------------------------------------

#: Gifts that are unmapped before they are read, gifts that are not; pages of files that are mapped
#: while they are queued, pages that are not: EACH of each, in this order.
PAGES = f"""
import gc, time
def gift(unmap):
    memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:4] = b"gift"
    vmsplice(memory, 8)
    gc.collect()
    if unmap:
        memory.close()
    assert os.read(r, PAGE)[:4] == b"gift"
    memory.close()
def lend(name, map):
    file = os.open(name, os.O_RDWR | os.O_CREAT)
    os.write(file, b"x" * PAGE)
    assert os.splice(file, w, PAGE, offset_src=0) == PAGE
    if map:
        memory = mmap.mmap(file, PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        assert memory[0] == 120
        memory.close()
    assert len(os.read(r, PAGE)) == PAGE
    os.close(file)
os.chdir(os.path.dirname(__file__))
for unmap in True, False:
    for _ in range({EACH}):
        gift(unmap)
for map in True, False:
    for number in range({EACH}):
        lend(f"lent{{number}}-{{map}}", map)
"""


class Followed(Watch):
    """A tracer that follows pages, whose stories are told once."""

    def __init__(self, direct: bool | None) -> None:
        super().__init__(direct, journeys=Follower(Request(PAGES_MAX)))

    def stories(self) -> list[Story]:
        followed = self.tracer.journeys
        assert followed is not None
        events = followed.read(self.tracer.counters.kind, self.tracer.frame_of)
        told = tell(events, followed.request, followed.beyond(), followed.lost())
        assert told.events_lost == 0
        return told.stories


@pytest.fixture(scope="module", params=READS)
def followed(request: pytest.FixtureRequest) -> Iterator[Followed]:
    needs_functions()
    with offering(request.param):
        followed = Followed(READS[request.param])
    try:
        assert followed.lost == []
        assert bool(trampolines(followed.tracer)) == (request.param != "breakpoints")
        yield followed
    finally:
        followed.tracer.close()


def told(story: Story, *words: str) -> list[tuple[str, str]]:
    """The steps of those names, in their order, each with its moment."""
    return [(step.what, step.moment) for step in story.steps if step.what in words]


def test_a_page_is_mapped_unmapped_and_released_when_it_is(
    followed: Followed, tmp_path: Path
) -> None:
    pid = followed.script(tmp_path, PAGES).pid
    stories = followed.stories()
    assert len(stories) == 4 * EACH
    unmapped, kept, mapped, plain = (stories[at * EACH :][:EACH] for at in range(4))
    words = ("mapped", "queued", "unmapped", "released")
    at_once = {word: (word, "exact") for word in words} | {"queued": ("queued", "snapshot")}
    for story in unmapped:
        assert told(story, *words) == [at_once[word] for word in words]
    for story in kept:
        order = ("mapped", "queued", "released", "unmapped")
        assert told(story, *words) == [at_once[word] for word in order]
    for story in mapped:
        order = ("queued", "mapped", "unmapped", "released")
        assert told(story, *words) == [at_once[word] for word in order]
    for story in plain:
        assert told(story, *words) == [at_once["queued"], at_once["released"]]
    # Whose doing it was, and how the page was then.
    for story in (*unmapped, *kept, *mapped):
        (end,) = (step for step in story.steps if step.what == "unmapped")
        assert (end.pid, end.mapcount) == (pid, 0)
        assert end.detail == "from the last page table"
    for story in mapped:
        (begin,) = (step for step in story.steps if step.what == "mapped")
        assert (begin.pid, begin.mapcount) == (pid, 1)
    for story in stories:
        (release,) = (step for step in story.steps if step.what == "released")
        assert release.pid == pid
        assert release.refcount is not None and release.refcount >= 1


# --- FUSE replies ---------------------------------------------------------------------------------


def serve(
    watch: Watch, driver: Driver, directory: Path, mode: str, pages: int = REPLY_PAGES
) -> Seen:
    server = driver.program.with_name("fuse_server")
    return watch.run(server, mode, "-n", pages, "-t", 0, "-d", directory)


#: Mode of the FUSE server -> why the kernel, which asked for each page, did not take it.
ASKED = {
    "gift": "still mapped",
    "gift-unmapped": "swap-backed",
    "teed": "extra reference",
    "splice-mapped": "still mapped",
    "vmspliced": "not a gift",
    "socket": "no-steal buffer",
    "splice": "",
    "whole": "",
}
#: What has no try_steal() is not asked for.
UNASKED = ("socket",)


@pytest.fixture(scope="module", params=READS)
def watch(request: pytest.FixtureRequest) -> Iterator[Watch]:
    with offering(request.param):
        watch = Watch(READS[request.param])
    assert watch.lost == []
    if request.param == "breakpoints":
        assert trampolines(watch.tracer) == []
    yield watch
    watch.tracer.close()


@pytest.mark.parametrize("mode", ASKED)
def test_why_a_page_was_not_taken_is_told_as_it_was_asked_for(
    mode: str, watch: Watch, driver: Driver, ext4: Path
) -> None:
    needs_functions()
    seen = serve(watch, driver, ext4, mode)
    refused = [f for f in seen.findings if f.name == STEAL]
    reasons = {f.first["reason"]: (f.count, f.first["moment"]) for f in refused}
    moment = "snapshot" if mode in UNASKED else "at the steal"
    if mode in UNASKED and "fuse_request_end" not in watch.tracer.attached:
        assert not reasons  # nothing was asked for, and no tracepoint tells of the rest
    elif ASKED[mode]:
        assert reasons == {ASKED[mode]: (REPLY_PAGES, moment)}
    else:
        assert reasons == {}
    assert not [f for f in seen.findings if f.kind == "violation"]


def test_a_stolen_page_is_asked_for_moved_and_released_in_this_order(
    followed: Followed, driver: Driver, ext4: Path
) -> None:
    serve(followed, driver, ext4, "splice", FOLLOWED_PAGES)
    serve(followed, driver, ext4, "teed", FOLLOWED_PAGES)
    stories = followed.stories()
    kinds = ("asked", "stolen", "released")
    steps = Counter(
        tuple((step.what, step.detail.split()[-1], step.moment) for step in story.steps
              if step.what in kinds)
        for story in stories
    )  # fmt: skip
    stolen = (
        ("asked", "given", "exact"),
        ("stolen", "reply", "exact"),
        ("released", "pipe", "exact"),
    )
    assert steps[stolen] == FOLLOWED_PAGES
    refused = [told_ for told_ in steps if ("asked", "refused", "exact") in told_]
    assert sum(steps[told_] for told_ in refused) == FOLLOWED_PAGES
    assert not any(word == "stolen" for told_ in refused for word, _, _ in told_)


# --- who did it -----------------------------------------------------------------------------------

#: Lends a page of each of COUNT files, and maps it before it is read or after.
MAP = """
os.chdir(os.path.dirname(__file__))
def map(file, who):
    if who == "child":
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        open("/proc/self/comm", "w").write("mapper")
    memory = mmap.mmap(file, PAGE, mmap.{flags}, {protection})
    assert memory[0] == 120
    if who == "child":
        os._exit(0)
for number in range(COUNT):
    file = os.open(f"mapped{{number}}", os.O_RDWR | os.O_CREAT)
    os.write(file, b"x" * PAGE)
    assert os.splice(file, w, PAGE, offset_src=0) == PAGE
    if {when} == "queued":
        map(file, {who!r})
    assert len(os.read(r, PAGE)) == PAGE
    if {when} == "read":
        map(file, {who!r})
    os.close(file)
"""
READ, WRITE = "mmap.PROT_READ", "mmap.PROT_READ | mmap.PROT_WRITE"


@pytest.mark.parametrize(
    ("flags", "protection", "when", "who", "count"),
    [
        ("MAP_SHARED", WRITE, "queued", "self", COUNT),
        ("MAP_SHARED", WRITE, "queued", "child", COUNT),
        ("MAP_SHARED", WRITE, "read", "self", 0),
        ("MAP_SHARED", READ, "queued", "self", 0),
        ("MAP_PRIVATE", WRITE, "queued", "self", 0),
    ],
)
def test_a_page_that_is_mapped_to_be_written_to_while_it_is_queued_is_told_at_once(
    flags: str, protection: str, when: str, who: str, count: int, watch: Watch, tmp_path: Path
) -> None:
    needs_functions()
    body = MAP.format(flags=flags, protection=protection, when=repr(when), who=who)
    seen = watch.script(tmp_path, body)
    told_ = ("changed-in-flight", "mapped to be written to")
    assert seen.counts == ({told_: count} if count else {})
    for finding in seen.findings:
        assert finding.kind == "hazard"
        assert finding.first["moment"] == "at the map"
        assert finding.first["pid"] == seen.pid  # who has lent it
        assert finding.first["since"] == pytest.approx(finding.first["time"], abs=0.1)
        assert Path(finding.first["file"]).name == "mapped0"
        if who == "child":
            assert finding.first["by"].startswith("mapper[")
        else:
            assert finding.first["by"].endswith(f"[{seen.pid}]")


#: A page leaves its file while it is queued, by this process or by a child.
LEAVE = """
def truncate(who):
    if who == "child":
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        open("/proc/self/comm", "w").write("truncater")
    os.ftruncate(source, 0)
    if who == "child":
        os._exit(0)
for _ in range(COUNT):
    os.ftruncate(source, PAGE)
    os.pwrite(source, b"x" * PAGE, 0)
    assert os.splice(source, w, PAGE, offset_src=0) == PAGE
    {}
    assert len(os.read(r, PAGE)) == PAGE
"""


@pytest.mark.parametrize("who", ["self", "child", ""])
def test_who_took_a_queued_page_out_of_its_file_is_told_and_when(
    who: str, watch: Watch, tmp_path: Path
) -> None:
    seen = watch.script(tmp_path, LEAVE.format(f"truncate({who!r})" if who else "pass"))
    assert seen.counts == ({("truncated-in-flight", ""): COUNT} if who else {})
    for finding in seen.findings:
        first = finding.first
        assert first["moment"] == "snapshot"  # it was found as it was read
        assert 0 < first["since"] < first["time"]
        if who == "child":
            assert first["by"].startswith("truncater[")
        else:
            assert first["by"].endswith(f"[{seen.pid}]")


#: Gifts that are mapped as they are read: by the giver, or by a child too.
GIVE = """
open("/proc/self/comm", "w").write("giver")
memory = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _ in range(COUNT):
    memory[:4] = b"gift"
    vmsplice(memory, 8)
    if {forks}:
        out, into = os.pipe()
        child = os.fork()
        if not child:
            os.close(into)
            os.read(out, 1)
            os._exit(0)
    assert os.read(r, PAGE)[:4] == b"gift"
    if {forks}:
        os.close(into)
        os.waitpid(child, 0)
        os.close(out)
"""


@pytest.mark.parametrize("forks", [False, True])
def test_the_only_process_that_maps_a_page_is_named(
    forks: bool, watch: Watch, tmp_path: Path
) -> None:
    seen = watch.script(tmp_path, GIVE.format(forks=forks))
    assert seen.counts == {("gift-still-mapped", ""): COUNT}
    mapper = seen.only("gift-still-mapped").first.get("mapped_by")
    assert mapper == (None if forks else f"giver[{seen.pid}]")


# --- inserts --------------------------------------------------------------------------------------


def buffer_page(tracer: Tracer, pipe: int, class_: int) -> int:
    """The address of the struct page of a pipe's first buffer."""
    program = tracer.program
    program.run_once("learn_buffer", pipe, class_)
    (value,) = program.map("learned").get(class_.to_bytes(4, "little")) or [b""]
    return int(LEARNED.unpack(value)[0])


@contextmanager
def queued(kind: str) -> Iterator[int]:
    """A pipe that holds a page: of its own, of memory that is mapped, or of a file."""
    with ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        if kind == "pipe":
            os.write(writer, b"x" * PAGE)
        else:
            file = os.memfd_create("file")
            stack.callback(os.close, file)
            os.write(file, b"x" * PAGE)
            if kind == "mapped":
                memory = mmap.mmap(file, PAGE, mmap.MAP_SHARED)
                stack.callback(memory.close)
                assert memory[0] == 120
            assert os.splice(file, writer, PAGE, offset_src=0) == PAGE
        yield writer


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    """Its programs are run by the tests themselves, as if the kernel had called them."""
    tracer = Tracer(direct=False)
    tracer.follow(os.getpid())
    yield tracer
    tracer.close()


#: Program -> its arguments, from the address of the page that is about to be inserted.
INSERTS: dict[str, Callable[[int], tuple[int, int]]] = {
    "tp_mm_filemap_add_to_page_cache": lambda page: (page, 0),
    "insert_folio": lambda page: (0, page),
    "insert_page": lambda page: (page, 0),
    "move_page": lambda page: (0, page),
}
#: What is inserted -> what is wrong with it, after it has been inserted and before.
WRONG = {
    "pipe": ("", ""),
    "file": ("published-activated", "double-owner"),  # memory of a memfd is swap-backed
    "mapped": ("published-while-mapped", "double-owner"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("program", INSERTS)
def test_a_page_in_use_that_is_inserted_is_told_each_time(
    program: str, kind: str, tracer: Tracer
) -> None:
    is_tracepoint = program.startswith("tp_")
    if not is_tracepoint:
        needs_functions()
    elif tracer.measures:
        flag = tracer.program.map("inserts_probed")
        flag.put(bytes(4), bytes(4))  # as where nothing better could be attached
    before = Counter[str]()
    for finding in tracer.counters.read().findings:
        before[finding.name] += finding.count
    with queued(kind) as pipe:
        page = buffer_page(tracer, pipe, 0)
        for _ in range(COUNT):
            tracer.program.run_once(program, *INSERTS[program](page))
    found = [f for f in tracer.counters.read().findings if f.kind == "violation"]
    after = Counter[str]()
    for finding in found:
        after[finding.name] += finding.count
    name = WRONG[kind][0 if is_tracepoint else 1]
    assert after - before == Counter({name: COUNT} if name else {})
    for finding in found:
        assert finding.first["moment"] == "at the insert"
        assert finding.first["operation"].startswith("insert into the page cache of ")
        assert finding.first["seen"].startswith("a page that is about to enter a page cache")


# --- probes ---------------------------------------------------------------------------------------


def lost_moments(tracer: Tracer) -> list[str]:
    """Why what this kernel can be asked at that moment is not told by a trampoline."""
    lost = []
    for taken in tracer.observed:
        if taken.observation in (*providers.PAGES, *providers.MOMENTS):
            if not taken.candidate:
                lost.append(taken.reason)
            elif taken.candidate.how not in (How.FENTRY, How.FEXIT, How.TRACEPOINT):
                lost.append(f"{taken.candidate}: {taken.reason}")
    return lost


@pytest.mark.parametrize("direct", [None, False], ids=["direct loads", "probe reads"])
def test_what_is_seen_at_an_entry_can_be_seen_by_a_breakpoint_too(direct: bool | None) -> None:
    needs_functions()
    tracer = Tracer(direct=direct, journeys=Follower(Request()))
    try:
        btf = Btf()
        entries = [each for each in providers.ALL if each.at_entry]
        offers = providers.Kernel(btf.function_arguments, kprobes=True)
        for each in entries:
            (candidate,) = providers.candidates(each, offers)[0]
            assert candidate.how is How.KPROBE
            tracer.program.attach_kprobe(candidate.program, candidate.function, False)
        assert len(entries) == 6
        assert lost_moments(tracer) == []
        with pytest.raises(BpfError):
            tracer.program.attach_kprobe("move_page_regs", "no_such_function_at_all", False)
        reader, writer = os.pipe()
        os.write(writer, b"x")
        os.close(reader)
        os.close(writer)
        assert tracer.program.missed() == 0
    finally:
        tracer.close()
