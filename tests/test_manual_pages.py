# SPDX-License-Identifier: MIT
"""The manual pages of librsplice: they render, say what the header says, and their examples run."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
MAN = SOURCES / "man"
HEADER = (SOURCES / "rsplice.h").read_text()
CALLS = MAN / "rsplice.3"
IDEAS = MAN / "rsplice.7"
PAGES = (CALLS, IDEAS)

FUNCTIONS = sorted(
    set(re.findall(r"\b(rsplice\w*)\(", re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)))
)
CONSTANTS = sorted(re.findall(r"^#define (RSPLICE_(?:F|WHY)_\w+)", HEADER, re.M))

#: Errors that parts of the library tell each other and nobody else.
INTERNAL_ERRORS = {"EMSGSIZE", "ENOSYS", "EINPROGRESS", "EBUSY"}

#: The sections of man-pages(7), as far as a page may have them.
ORDER = {
    CALLS: "NAME LIBRARY SYNOPSIS DESCRIPTION RETURN_VALUE ERRORS ATTRIBUTES VERSIONS STANDARDS "
    "HISTORY NOTES BUGS EXAMPLES SEE_ALSO",
    IDEAS: "NAME DESCRIPTION EXAMPLES HISTORY SEE_ALSO",
}

#: What stands for a character in the examples.
ESCAPES = {"e": "\\", "-": "-", "&": "", "[aq]": "'", "[ga]": "`", "[ha]": "^", "[ti]": "~"}

COMPILE = ["cc", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]

PAGE = 4096
MIB = 1 << 20


def rendered(page: Path) -> str:
    """A page as plain text, without hyphenation, as wide as its widest line."""
    run = subprocess.run(
        ["man", "-l", "--nh", "--nj", "-E", "UTF-8", page],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MANWIDTH": "160", "LC_ALL": "C.UTF-8", "MANROFFOPT": "-c"},
    )
    return re.sub(".\x08", "", run.stdout)


def section(page: Path, name: str) -> str:
    """The roff source of one section."""
    match = re.search(rf'^\.SH "?{name}"?\n(.*?)(?=^\.SH |\Z)', page.read_text(), re.M | re.S)
    assert match, f"{page.name} has no section {name}"
    return match[1]


def unescaped(lines: str) -> str:
    r"""What lines between .EX and .EE show. An escape that is not known is an error: KeyError."""
    return re.sub(r"\\(\[\w+\]|.)", lambda found: ESCAPES[found[1]], lines)


def examples() -> dict[str, str]:
    """The programs of rsplice(3) by name."""
    pattern = r'^\.\\" example: (\S+)\n.*?^\.EX\n(.*?)^\.EE'
    found = re.findall(pattern, CALLS.read_text(), re.M | re.S)
    return {name: unescaped(text) for name, text in found}


def structures(text: str) -> dict[str, list[tuple[str, str]]]:
    """The members, type and name, of each structure that C text defines."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return {
        name: re.findall(r"(\w[\w ]*?)\s+(\w+);", body)
        for name, body in re.findall(r"struct (\w+) \{(.*?)\}", text, re.S)
    }


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, needs: Callable[..., None]) -> Path:
    """The directory that the library was built in."""
    needs("make", "cc")
    build = tmp_path_factory.mktemp("librsplice")
    run = subprocess.run(
        ["make", "-s", "-C", SOURCES, f"BUILD={build}"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return build


@pytest.fixture(scope="module")
def programs(library: Path) -> Path:
    """The directory with the examples, compiled."""
    for name, text in examples().items():
        source = library / name
        source.write_text(text)
        run = subprocess.run(
            [*COMPILE, str(source), "-o", str(source.with_suffix(""))]
            + [f"-L{library}", "-lrsplice", f"-Wl,-rpath,{library}"],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    return library


# The text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_render_without_a_warning(page: Path, needs: Callable[..., None]) -> None:
    needs("groff")
    run = subprocess.run(
        ["groff", "-t", "-man", "-Tutf8", "-ww", "-z", page], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_fit_a_terminal_of_80_columns(page: Path, needs: Callable[..., None]) -> None:
    needs("man")
    run = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", page],
        capture_output=True,
        text=True,
        env={**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
    )
    assert run.stderr == ""
    assert [line for line in run.stdout.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sections_are_those_of_a_kernel_page_in_its_order(page: Path) -> None:
    names = [name.replace(" ", "_") for name in re.findall(r"^\.SH (.*)", page.read_text(), re.M)]
    assert [name for name in ORDER[page].split() if name in names] == names


def test_each_function_has_a_page(tmp_path: Path, needs: Callable[..., None]) -> None:
    needs("man")
    for number in "37":
        directory = tmp_path / f"man{number}"
        directory.mkdir()
        for page in MAN.glob(f"*.{number}"):
            shutil.copy(page, directory)
    assert {page.stem for page in MAN.glob("*.3")} == set(FUNCTIONS)
    for function in FUNCTIONS:
        run = subprocess.run(
            ["man", "-M", tmp_path, "3", function], capture_output=True, text=True, check=True
        )
        assert "have a source fill empty buffers" in re.sub(r"\s+", " ", run.stdout), function


def test_each_function_is_named_and_described_and_no_other() -> None:
    text = CALLS.read_text()
    named = section(CALLS, "NAME").partition(r" \- ")[0].replace("\n", " ").split(", ")
    assert sorted(named) == FUNCTIONS
    assert set(re.findall(r"\b(rsplice\w*) ?\(\)", text)) == set(FUNCTIONS)
    description = section(CALLS, "DESCRIPTION")
    assert [name for name in FUNCTIONS if not re.search(rf"\b{name} \(\)", description)] == []


def test_the_synopsis_is_that_of_the_header(tmp_path: Path, needs: Callable[..., None]) -> None:
    needs("cc", "man")
    text = rendered(CALLS).partition("SYNOPSIS\n")[2].partition("\nDESCRIPTION")[0]
    assert sorted(re.findall(r"\b(rsplice\w*)\(", text)) == FUNCTIONS
    source = tmp_path / "synopsis.c"
    source.write_text(text.replace("_Nullable ", ""))
    command = [*COMPILE, "-fsyntax-only", str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # A prototype that differs is an error, and so this test can fail.
    source.write_text(text.replace("_Nullable ", "").replace("size_t len", "int len"))
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_each_constant_is_described_and_none_that_is_not() -> None:
    described = re.findall(r"^\.TP\n\.B (RSPLICE_\w+)$", section(CALLS, "DESCRIPTION"), re.M)
    assert sorted(described) == CONSTANTS
    for page in PAGES:
        assert set(re.findall(r"\bRSPLICE_(?:F|WHY)_[A-Z]\w*", page.read_text())) <= set(CONSTANTS)


def test_structures_are_those_of_the_header() -> None:
    blocks = re.findall(r"^\.EX\n(struct.*?)^\.EE", CALLS.read_text(), re.M | re.S)
    shown = structures(unescaped("\n".join(blocks)))
    assert shown == structures(HEADER)
    assert set(shown) == {"rsplice_result", "rsplice_request"}


def test_each_probe_is_described_with_its_arguments() -> None:
    header = (SOURCES / "probes.h").read_text()
    probes = {
        name: [part.split()[-1] for part in arguments.split(",")]
        for name, arguments in re.findall(r"void rsplice_probe_(\w+)\(([^)]*)\)", header)
    }
    assert probes
    described = {
        name: re.findall(r"\w+", arguments)
        for name, arguments in re.findall(r"^\.BI (\w+)\( (.*) \)$", IDEAS.read_text(), re.M)
    }
    assert described == probes
    used = re.findall(r"usdt:\*:rsplice:(\w+)", IDEAS.read_text())
    assert used and set(used) <= set(probes)


def test_errors_that_the_library_gives_are_described() -> None:
    code = "".join(path.read_text() for path in SOURCES.glob("*.c"))
    given = set(re.findall(r"(?:-|errno = )(E[A-Z]+)\b", code))
    described = set(re.findall(r"\bE[A-Z]+\b", section(CALLS, "ERRORS")))
    assert "EOPNOTSUPP" in given
    assert given - INTERNAL_ERRORS - described == set()


def test_errors_stand_in_the_order_of_the_alphabet() -> None:
    names = re.findall(r"^\.TP\n\.BR? (E[A-Z]+)", section(CALLS, "ERRORS"), re.M)
    assert names == sorted(names)


def test_kernel_functions_are_cited_with_their_file() -> None:
    """In the form that docs/metrics.md has, so that one search finds them all."""
    text = "".join(page.read_text() for page in PAGES)
    cited = re.findall(r"\b((?:fs|mm|net|drivers)/[\w./-]+\.\S+?)(?: \(|\\f|$)", text, re.M)
    assert len(cited) > 10
    assert [name for name in cited if not re.fullmatch(r"[\w/-]+\.c:\w+", name)] == []


# The examples


def test_examples_read_on_a_terminal_as_they_compile(needs: Callable[..., None]) -> None:
    """No quote, dash or backslash of an example is lost on its way to who copies it."""
    needs("man")
    shown = {line.strip() for line in rendered(CALLS).splitlines()}
    for name, text in examples().items():
        assert [line for line in text.splitlines() if line.strip() not in shown] == [], name


def test_examples_compile(programs: Path) -> None:
    assert set(examples()) == {"rsend.c", "rload.c", "rrelay.c", "rmirror.c"}
    for name in examples():
        assert os.access((programs / name).with_suffix(""), os.X_OK)


def source_file(directory: Path, size: int) -> tuple[Path, bytes]:
    path = directory / f"source-{size}"
    data = os.urandom(size)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path, data


def numbers(line: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"([a-z]+) (\d+)", line)}


def test_rsend_moves_a_file_to_a_pipe(programs: Path, ext4: Path) -> None:
    path, data = source_file(ext4, 3 * MIB + 1234)
    run = subprocess.run([programs / "rsend", path], capture_output=True, check=True)
    assert run.stdout == data
    assert run.stderr == b"moved %d, copied 0, other 0\n" % len(data)


def test_rsend_says_why_it_copies(programs: Path) -> None:
    path, data = source_file(Path("/dev/shm"), 100_001)
    try:
        run = subprocess.run([programs / "rsend", path], capture_output=True, check=True)
    finally:
        path.unlink()
    assert run.stdout == data
    said, why = run.stderr.decode().splitlines()
    assert numbers(said) == {"moved": 0, "copied": 100_001, "other": 0}
    assert why == "copied: the source cannot be read with O_DIRECT"


def test_rsend_waits_for_who_reads_late(programs: Path) -> None:
    path, data = source_file(Path("/dev/shm"), 300_001)
    try:
        with subprocess.Popen(
            [programs / "rsend", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as run:
            time.sleep(0.2)  # the pipe is full by then, and rsend has to wait
            out, said = run.communicate()
    finally:
        path.unlink()
    assert (run.returncode, out == data) == (0, True), said


def test_rload_fills_memfds(programs: Path, ext4: Path) -> None:
    large, _ = source_file(ext4, 2 * MIB)
    small, _ = source_file(ext4, 10_000)
    run = subprocess.run(
        [programs / "rload", large, small], capture_output=True, text=True, check=True
    )
    first, second = run.stdout.splitlines()
    assert first == f"{large}: 1048576 bytes, direct 1048576, copied 0"
    said = numbers(second.partition(": ")[2])
    assert second.startswith(f"{small}: 10000 bytes, ")
    assert said["direct"] + said["copied"] == 10_000
    assert 0 < said["copied"] < PAGE


def test_rload_tells_of_each_request_that_failed(programs: Path, ext4: Path) -> None:
    path, _ = source_file(ext4, PAGE)
    run = subprocess.run([programs / "rload", "/", path], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == f"rload: /: {os.strerror(errno.EISDIR)}\n"
    assert run.stdout == f"{path}: 4096 bytes, direct 4096, copied 0\n"


def test_rrelay_delivers_each_byte_once(programs: Path) -> None:
    data = os.urandom(2 * MIB + 3)
    near, far = socket.socketpair()
    with near, far:
        run = subprocess.Popen([programs / "rrelay"], stdin=far.fileno(), stdout=subprocess.PIPE)
        far.close()

        def feed() -> None:
            near.sendall(data)
            near.close()

        feeder = threading.Thread(target=feed)
        feeder.start()
        out, _ = run.communicate()
        feeder.join()
    assert (run.returncode, out == data) == (0, True)


@dataclass
class Mirror:
    """rmirror at work, the file that it serves, and where."""

    process: subprocess.Popen[str]
    data: bytes
    point: Path


@pytest.fixture
def mirror(programs: Path, ext4: Path, tmp_path: Path) -> Iterator[Mirror]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.geteuid() != 0:
        pytest.skip("mounting a FUSE filesystem needs root and /dev/fuse")
    path, data = source_file(ext4, 4 * MIB + 1000)
    point = tmp_path / "mirror"
    point.touch()
    with subprocess.Popen(
        [programs / "rmirror", path, point], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None and not os.path.ismount(point):
                time.sleep(0.01)
            yield Mirror(process, data, point)
        finally:
            if process.poll() is None:
                subprocess.run(["umount", "-l", point], capture_output=True)
                process.kill()


def test_rmirror_moves_whole_pages(mirror: Mirror) -> None:
    assert mirror.point.read_bytes() == mirror.data
    subprocess.run(["umount", mirror.point], check=True)
    out, _ = mirror.process.communicate(timeout=10)
    assert mirror.process.returncode == 0
    said = numbers(out)
    assert said["copied"] == 1000
    assert said["moved"] == len(mirror.data) - 1000


# The errors


class Library:
    """rsplice() and rsplice_fuse_reply() as C has them."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), use_errno=True)
        offset = ctypes.POINTER(ctypes.c_int64)
        size, flags, result = ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
        number = ctypes.c_int
        self._rsplice = self._library.rsplice
        self._rsplice.restype = ctypes.c_ssize_t
        self._rsplice.argtypes = [number, offset, number, offset, size, flags, result]
        self._reply = self._library.rsplice_fuse_reply
        self._reply.restype = ctypes.c_ssize_t
        self._reply.argtypes = [number, ctypes.c_uint64, number, offset, size, flags, result]

    def rsplice(
        self,
        fd_in: int,
        fd_out: int,
        size: int = PAGE,
        flags: int = 0,
        off_in: int | None = None,
        off_out: int | None = None,
    ) -> int | str:
        """Bytes, or the name of the error."""
        offsets = [None if at is None else ctypes.c_int64(at) for at in (off_in, off_out)]
        done = self._rsplice(fd_in, offsets[0], fd_out, offsets[1], size, flags, None)
        return self._named(done)

    def reply(self, fuse_fd: int, fd_in: int, size: int = PAGE, flags: int = 0) -> int | str:
        at = ctypes.c_int64(0)
        return self._named(self._reply(fuse_fd, 1, fd_in, at, size, flags, None))

    @staticmethod
    def _named(done: int) -> int | str:
        if done >= 0:
            return int(done)
        name = errno.errorcode[ctypes.get_errno()]
        return "EOPNOTSUPP" if name == "ENOTSUP" else name  # one number, two names


@pytest.fixture(scope="module")
def calls(library: Path) -> Library:
    return Library(library / "librsplice.so")


class Descriptors:
    """Descriptors of every kind, closed when the test is over."""

    def __init__(self, directory: Path) -> None:
        self._opened: list[int] = []
        self.path, _ = source_file(directory, 100_000)
        self.file = self.open(self.path, os.O_RDONLY)
        self.reader, self.writer = self._keep(*os.pipe())
        self.near, self.far = self._keep(*(end.detach() for end in socket.socketpair()))
        self.memory = self.memfd()

    def _keep(self, *opened: int) -> tuple[int, ...]:
        self._opened += opened
        return opened

    def open(self, path: str | Path, flags: int) -> int:
        return self._keep(os.open(path, flags))[0]

    def memfd(self, seals: int = 0) -> int:
        (fd,) = self._keep(os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    def full_pipe(self) -> int:
        os.set_blocking(self.writer, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(self.writer, bytes(PAGE))
        os.set_blocking(self.writer, True)
        return self.writer

    def close(self, *which: int) -> None:
        for fd in which:
            self._opened.remove(fd)
            os.close(fd)

    def close_all(self) -> None:
        self.close(*self._opened[:])


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[Descriptors]:
    descriptors = Descriptors(tmp_path)
    yield descriptors
    descriptors.close_all()


def flag(name: str) -> int:
    found = re.search(rf"^#define RSPLICE_F_{name}\s+(0x\w+)u", HEADER, re.M)
    assert found
    return int(found[1], 16)


Case = Callable[[Library, Descriptors], int | str]

ERRORS: list[tuple[str, str, Case]] = [
    ("EAGAIN", "empty pipe", lambda c, d: c.rsplice(d.reader, d.memory, flags=flag("NONBLOCK"))),
    ("EAGAIN", "silent socket", lambda c, d: c.rsplice(d.near, d.memory, flags=flag("NONBLOCK"))),
    (
        "EAGAIN",
        "full pipe",
        lambda c, d: c.rsplice(d.file, d.full_pipe(), flags=flag("NONBLOCK")),
    ),
    ("EBADF", "closed source", lambda c, d: c.rsplice(1 << 20, d.writer)),
    ("EBADF", "closed consumer", lambda c, d: c.rsplice(d.file, 1 << 20)),
    (
        "EBADF",
        "source for writing",
        lambda c, d: c.rsplice(d.open(d.path, os.O_WRONLY), d.writer),
    ),
    ("EBADF", "consumer for reading", lambda c, d: c.rsplice(d.file, d.reader)),
    (
        "EBADF",
        "file in memory that cannot be read",
        lambda c, d: c.rsplice(d.file, d.open(f"/proc/self/fd/{d.memory}", os.O_WRONLY)),
    ),
    ("EFBIG", "end of all files", lambda c, d: c.rsplice(d.file, d.memory, off_out=(1 << 63) - 1)),
    ("EINVAL", "unknown flag", lambda c, d: c.rsplice(d.file, d.writer, flags=1 << 31)),
    ("EINVAL", "EXACT", lambda c, d: c.rsplice(d.file, d.writer, flags=flag("EXACT"))),
    ("EINVAL", "MORE of a reply", lambda c, d: c.reply(d.writer, d.file, flags=flag("MORE"))),
    ("EINVAL", "length", lambda c, d: c.rsplice(d.file, d.writer, 1 << 63)),
    ("EINVAL", "length of a reply", lambda c, d: c.reply(d.writer, d.file, (1 << 28) + 1)),
    ("EINVAL", "negative offset", lambda c, d: c.rsplice(d.file, d.writer, off_in=-1)),
    ("EINVAL", "negative offset out", lambda c, d: c.rsplice(d.file, d.memory, off_out=-1)),
    (
        "EINVAL",
        "terminal as source",
        lambda c, d: c.rsplice(d.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY), d.writer),
    ),
    (
        "EINVAL",
        "append",
        lambda c, d: c.rsplice(
            d.file, d.open(f"/proc/self/fd/{d.memory}", os.O_RDWR | os.O_APPEND)
        ),
    ),
    ("EINVAL", "itself", lambda c, d: c.rsplice(d.memory, d.memory)),
    ("EISDIR", "directory", lambda c, d: c.rsplice(d.open("/", os.O_RDONLY), d.writer)),
    ("EOPNOTSUPP", "regular file", lambda c, d: c.rsplice(d.file, d.open(d.path, os.O_RDWR))),
    (
        "EOPNOTSUPP",
        "generated, strict",
        lambda c, d: c.rsplice(d.open("/dev/zero", os.O_RDONLY), d.writer, flags=flag("STRICT")),
    ),
    (
        "EOPNOTSUPP",
        "pipe to memory, strict",
        lambda c, d: c.rsplice(d.reader, d.memory, flags=flag("STRICT")),
    ),
    (
        "EOPNOTSUPP",
        "socket, strict",
        lambda c, d: c.rsplice(d.near, d.writer, flags=flag("STRICT")),
    ),
    (
        "EPERM",
        "sealed against growth",
        lambda c, d: c.rsplice(d.file, d.memfd(fcntl.F_SEAL_GROW)),
    ),
    (
        "EPERM",
        "sealed against writing",
        lambda c, d: c.rsplice(d.file, d.memfd(fcntl.F_SEAL_WRITE)),
    ),
    ("ESPIPE", "offset of a pipe", lambda c, d: c.rsplice(d.reader, d.memory, off_in=0)),
    ("ESPIPE", "offset of a socket", lambda c, d: c.rsplice(d.near, d.memory, off_in=0)),
    ("ESPIPE", "offset into a pipe", lambda c, d: c.rsplice(d.file, d.writer, off_out=0)),
    ("ESPIPE", "offset into a socket", lambda c, d: c.rsplice(d.file, d.near, off_out=0)),
]


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=f"{name} {what}") for name, what, case in ERRORS]
)
def test_errors_have_the_cause_that_is_described(
    calls: Library, fds: Descriptors, name: str, case: Case
) -> None:
    got = case(calls, fds)
    assert got == name
    assert re.search(rf"^\.BR? {name}\b", section(CALLS, "ERRORS"), re.M)


def test_a_peer_that_is_gone_gives_epipe(calls: Library, fds: Descriptors) -> None:
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        fds.close(fds.reader, fds.far)
        assert calls.rsplice(fds.file, fds.writer) == "EPIPE"
        assert calls.rsplice(fds.file, fds.near) == "EPIPE"
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_fuse_device_without_a_filesystem_gives_eperm(calls: Library, fds: Descriptors) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse")
    device = fds.open("/dev/fuse", os.O_RDWR)
    assert calls.reply(device, fds.file) == "EPERM"
    # Tested before anything is sent: the file has less than the reply is to have.
    assert calls.reply(device, fds.file, MIB, flag("EXACT")) == "EIO"


def test_a_handler_interrupts_who_waits_for_data(calls: Library, fds: Descriptors) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        for source in (fds.reader, fds.near):
            # With SA_RESTART, as the page says that it makes no difference.
            signal.siginterrupt(signal.SIGALRM, False)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            assert calls.rsplice(source, fds.memory) == "EINTR"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
