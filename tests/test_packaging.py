# SPDX-License-Identifier: MIT
"""What is installed, under which licence, and whether the manual tells of what there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

import pytest

import rsplice
from rsplice._build import has_fuse

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSES", "csrc", "rsplice", "tracers",
         "dashboards")  # fmt: skip
#: What an editable install leaves in the packages: the compiled modules and their C text.
BUILT = ("__pycache__", "*.so", "_native.c", "_fuse.c")
CODE = {".py", ".c", ".h", ".sh", ".toml", ".bt"}
MANUAL = ROOT / "docs" / "rsplice.1"
#: The actions of commands whose options belong to these.
ACTIONS = {"kernel": [("list",), ("fetch",), ("run",)]}


def project_files() -> list[Path]:
    """The files that belong to the project: what git knows or would add, links left out."""
    names = subprocess.run(
        [
            "git",
            "-c",
            "safe.directory=*",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    paths = (ROOT / name for name in names if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="needs git and a clone, to know which files are the project's",
)


def package_files() -> Iterator[str]:
    """Every file of the packages as it has to be named in a wheel."""
    for directory, below, names in os.walk(ROOT / "rsplice", followlinks=True):
        below[:] = [name for name in below if name != "__pycache__"]
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in BUILT):
                yield str((Path(directory) / name).relative_to(ROOT))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: setuptools leaves build/ and *.egg-info where it works."""
    pytest.importorskip("setuptools", "77", reason='needs setuptools 77: pip install -e ".[dev]"')
    tree = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignore = shutil.ignore_patterns(*BUILT)
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / part, tree / part)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*command, "-w", out, tree], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_nothing_but_rsplice_lands_in_site_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"rsplice", f"rsplice-{rsplice.__version__}.dist-info"}


def test_the_wheel_holds_the_packages_whole(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if name.startswith("rsplice/")}
    modules = {name for name in held if name.endswith(".so")}
    assert held - modules == set(package_files())
    built = {name.split(".")[0] for name in modules}
    assert built == {"rsplice/_native", *(["rsplice/_fuse"] if has_fuse() else [])}


def test_the_command_runs_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['rsplice', '--help']\n"
        f"import rsplice; assert rsplice.__file__.startswith({str(tmp_path)!r})\n"
        "from rsplice.cli import main; sys.exit(main())"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "audit" in run.stdout


def test_the_wheel_names_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "rsplice = rsplice.cli:main" in wheel.read(name).decode()


def test_the_wheel_asks_pip_for_no_bcc(metadata: Message) -> None:
    needed = {
        re.split(r"[^\w-]", requirement)[0]
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in requirement
    }
    assert needed == {"cffi", "rich"}


def test_the_wheel_carries_both_licences(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "MIT AND GPL-2.0-only"
    texts = {Path(n).name for n in wheel.namelist() if ".dist-info/licenses/" in n}
    assert texts == {"GPL-2.0-only.txt", "MIT.txt"}


def spdx_of(path: Path) -> str | None:
    """The licence that the first line names, or the second after a #! line."""
    lines = path.read_text().splitlines()[:2]
    if lines and lines[0].startswith("#!"):
        del lines[0]
    found = re.search(r"SPDX-License-Identifier: (\S+)", lines[0]) if lines else None
    return found[1] if found else None


def is_code(path: Path) -> bool:
    return path.suffix in CODE or path.name == "Makefile" or path.parent.name == ".ci"


def licence_of(path: Path) -> str:
    """BPF programs and kernel modules are GPL-2.0-only, for what is GPL-only; the rest is MIT."""
    return "GPL-2.0-only" if path.parent.name in ("bpf", "kmod") else "MIT"


def test_make_test_runs_each_test_module() -> None:
    """Those in directories come last: testpaths names them, and could miss a new one."""
    tests = ROOT / "tests"
    found = set(tests.glob("test_*.py")) | set((tests / "real").rglob("test_*.py"))
    assert found == set(tests.rglob("test_*.py"))


@needs_git
def test_each_source_file_names_its_licence_first() -> None:
    pages = [path for path in project_files() if path.match("docs/*.md")]
    sources = [path for path in project_files() if is_code(path)] + pages
    assert {ROOT / "Makefile", ROOT / "docs/metrics.md"} <= set(sources)
    wrong = {str(p.relative_to(ROOT)): spdx_of(p) for p in sources if spdx_of(p) != licence_of(p)}
    assert wrong == {}


@needs_git
def test_recordings_and_pages_name_no_working_directory() -> None:
    """Paths below /tmp are those of the workload's own scratch directory."""
    texts = [path for path in project_files() if path.suffix in (".jsonl", ".md", ".svg")]
    assert ROOT / "dashboards/demo.jsonl" in texts
    found = {
        (path.name, place)
        for path in texts
        for place in re.findall(r'"(/[^"]*)/rsplice/_\w+\.abi3\.so"', path.read_text())
    }
    assert found == {("demo.jsonl", "/usr/lib")}


def test_the_licence_check_tells_a_missing_line(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text('"""No licence."""\n# SPDX-License-Identifier: MIT\n')
    assert spdx_of(path) is None
    path.write_text("#!/bin/sh\n# SPDX-License-Identifier: MIT\n")
    assert spdx_of(path) == "MIT"


@pytest.mark.parametrize("name", ["MIT", "GPL-2.0-only"])
def test_each_licence_has_its_text(name: str) -> None:
    title = {"MIT": "MIT License", "GPL-2.0-only": "GNU GENERAL PUBLIC LICENSE"}[name]
    assert title in (ROOT / "LICENSES" / f"{name}.txt").read_text()


def test_the_readme_names_only_targets_that_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", (ROOT / "README.md").read_text()))
    assert {"live", "test"} <= named
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff (package groff-base)")
def test_the_manual_is_clean_roff() -> None:
    run = subprocess.run(["groff", "-man", "-ww", "-z", MANUAL], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def manual_commands() -> dict[str, str]:
    """The text of the manual's COMMANDS section, by command."""
    section = MANUAL.read_text().partition(".SH COMMANDS")[2].partition("\n.SH ")[0]
    section = section.replace("\\-", "-")
    parts = re.split(r"^\.SS rsplice ([\w-]+).*$", section, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def command_help(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "rsplice", *arguments, "--help"],
        cwd=ROOT,
        env=dict(os.environ, COLUMNS="200", NO_COLOR="1"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def manual_options(roff: str) -> set[str]:
    """The options that *roff* introduces."""
    headings = re.findall(r"^\.TP\n(.*)", roff.replace("\\-", "-"), re.MULTILINE)
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(headings)))


def help_options(text: str) -> set[str]:
    """The options that a help text introduces; --help goes without saying."""
    headings = re.findall(r"^ +(-.*?)(?:  |$)", text, re.MULTILINE)
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(headings))) - {"-h", "--help"}


def test_the_manual_tells_of_the_commands_that_there_are() -> None:
    overview = command_help()
    assert manual_commands()
    missing = [name for name in manual_commands() if not re.search(rf"\b{name}\b", overview)]
    assert missing == []


@pytest.mark.parametrize("command", sorted(manual_commands()))
def test_the_manual_tells_of_each_option(command: str) -> None:
    texts = [command_help(command, *action) for action in ACTIONS.get(command, [()])]
    assert manual_options(manual_commands()[command]) == help_options("\n".join(texts))
