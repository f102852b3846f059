# SPDX-License-Identifier: MIT
"""The set-up script, run with stand-ins for apt, sudo and Python that note how they were called."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["true", "sh", "cat", "dirname", "grep", "sed", "tr", "sha256sum", "rm", "chmod", "touch",
         "find", "sort", "xargs"]  # fmt: skip
RUN_PACKAGES = {"python3-bpfcc", "python3-venv", "libbpf1", "gcc", "libc6-dev", "python3-dev"}
#: What the C code is built with where it is offered.
BUILD_PACKAGES = {"pkg-config", "liburing-dev", "libfuse3-dev", "fuse3", "systemtap-sdt-dev"}

#: Each notes its name and arguments in "calls", then plays its part.
NOTE = '#!/bin/sh\necho "$(basename "$0") $*" >>{home}/calls\n'
STAND_INS = {
    "dpkg-query": """
for p; do :; done
grep -qxF "$p" {home}/installed && echo installed && exit
grep -qxF "$p" {home}/removed && echo config-files && exit
exit 1""",
    "apt-cache": 'grep -qxF "$2" {home}/offered && echo "  Candidate: 1.0" || '
    'echo "  Candidate: (none)"',
    "apt-get": """
case $1 in
update) exit $(cat {home}/update_status) ;;
install) for p; do echo "$p" >>{home}/installed; done; ls {home}/policy >>{home}/policies ;;
esac""",
    "id": "cat {home}/uid",
    # The policy file's path is taken to one of the test's own.
    "sudo": """
case $1 in
sh) code=$3; shift 5; exec sh -c "$code" sh {home}/policy "$@" ;;
*) exec "$@" ;;
esac""",
    "systemctl": "",
    "cc": "",
    "python": """
case "$1 $2" in
"-c import bcc"*) exit $(cat {home}/bcc_status) ;;
"-c import ctypes"*) exit $(cat {home}/libbpf_status) ;;
"-c import os, sysconfig"*) exit $(cat {home}/headers_status) ;;
"-c import sys"*) exit $(cat {home}/version_status) ;;
"-V "* | "-VV "*) echo Python 3.9.2 ;;
"-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
"-m pip"*) exit $(cat {home}/pip_status) ;;
esac""",
}
STATUSES = ("update_status", "bcc_status", "libbpf_status", "headers_status", "version_status",
            "pip_status")  # fmt: skip


COPIED = (".ci/setup.sh", ".ci/as-root", "pyproject.toml", "setup.py", "rsplice/__init__.py",
          "rsplice/_build.py", "csrc/rsplice.c")  # fmt: skip


class Machine:
    """A copy of the project on a machine made of stand-ins."""

    def __init__(self, home: Path, without: tuple[str, ...] = (), uid: int = 1000) -> None:
        self.home = home
        self.bin = home / "bin"
        self.tree = home / "tree"
        for directory in (self.bin, *(self.tree / name for name in (".ci", "rsplice", "csrc"))):
            directory.mkdir(parents=True)
        for name in COPIED:
            shutil.copy(ROOT / name, self.tree / name)
        for name in [*TOOLS, "basename", "cp", "ls", "mkdir"]:
            real = shutil.which(name)
            assert real, f"{name} is not on PATH"
            (self.bin / name).symlink_to(real)
        for name, body in STAND_INS.items():
            if name not in without:
                script = self.bin / name
                script.write_text((NOTE + body).replace("{home}", str(home)))
                script.chmod(0o755)
        for name in STATUSES:
            (home / name).write_text("0")
        (home / "uid").write_text(str(uid))
        for name in ("installed", "removed", "offered", "calls", "policies"):
            (home / name).touch()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs *command* there; "calls" then holds what it called."""
        (self.home / "calls").write_text("")
        return subprocess.run(
            command,
            cwd=self.tree,
            env={"PATH": str(self.bin), "RSPLICE_PYTHON": str(self.bin / "python")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def setup(self, what: str = "run") -> subprocess.CompletedProcess[str]:
        return self.run(".ci/setup.sh", what)

    def calls(self, start: str) -> list[str]:
        lines = (self.home / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(start)]

    def installed_by_apt(self) -> set[str]:
        words = " ".join(self.calls("apt-get install")).split()
        return {w for w in words[2:] if not w.startswith("-") and "Lock" not in w}

    def set(self, name: str, *values: str | int) -> None:
        (self.home / name).write_text("".join(f"{v}\n" for v in values))


def test_a_fresh_machine_gets_the_missing_packages_and_a_venv(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES)
    machine.set("installed", "python3-venv")
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    assert machine.installed_by_apt() == RUN_PACKAGES - {"python3-venv"}
    assert len(machine.calls("apt-get update")) == 1
    assert machine.calls("python -m venv") == [
        "python -m venv --clear --system-site-packages .venv"
    ]
    assert [c.split()[-2:] for c in machine.calls("python -m pip")] == [["-e", "."]]


def test_a_release_with_the_older_libbpf_gets_that_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES - {"libbpf1"}, "libbpf0")
    assert machine.setup().returncode == 0
    assert "libbpf0" in machine.installed_by_apt()


def test_either_libbpf_will_do(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES - {"libbpf1"}, "libbpf0", *BUILD_PACKAGES)
    assert machine.setup().returncode == 0
    assert machine.calls("apt-get") == []


def test_a_package_removed_but_not_purged_is_missing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES - {"python3-bpfcc"}, *BUILD_PACKAGES)
    machine.set("removed", "python3-bpfcc")
    machine.set("offered", "python3-bpfcc")
    assert machine.setup().returncode == 0
    assert machine.installed_by_apt() == {"python3-bpfcc"}


def test_the_second_run_installs_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES)
    assert machine.setup().returncode == 0
    assert machine.setup().returncode == 0
    assert machine.calls("apt-get") == []
    assert machine.calls("sudo") == []
    assert machine.calls("python -m") == []


def test_a_changed_pyproject_makes_the_venv_anew(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES, *BUILD_PACKAGES)
    assert machine.setup().returncode == 0
    with (machine.tree / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert machine.setup().returncode == 0
    assert len(machine.calls("python -m venv")) == 1
    assert len(machine.calls("python -m pip")) == 1


def test_a_failed_pip_is_tried_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES, *BUILD_PACKAGES)
    machine.set("pip_status", 1)
    failed = machine.setup()
    assert failed.returncode == 1
    assert "pip could not install" in failed.stderr
    machine.set("pip_status", 0)
    assert machine.setup().returncode == 0
    assert len(machine.calls("python -m pip")) == 1


def test_the_test_tools_come_on_top_and_leave_the_rest_alone(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES, *BUILD_PACKAGES)
    machine.set("offered", "strace", "nginx")
    assert machine.setup().returncode == 0
    result = machine.setup("test")
    assert result.returncode == 0, result.stderr
    assert machine.installed_by_apt() == {"strace", "nginx"}
    assert "no apt source offers gcc-multilib" in result.stderr
    assert machine.calls("python -m venv") == []
    assert [c.split()[-1] for c in machine.calls("python -m pip")] == [".[dev]"]
    assert machine.setup("test").returncode == 0
    assert machine.calls("apt-get") == []


def test_no_server_is_started_and_the_policy_file_is_taken_away(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES, *BUILD_PACKAGES)
    machine.set("offered", "nginx")
    assert machine.setup("test").returncode == 0
    policy = tmp_path / "policy"
    assert (tmp_path / "policies").read_text() == f"{policy}\n"
    assert not policy.exists()
    assert machine.calls("systemctl") == ["systemctl disable nginx"]


def test_a_policy_file_that_was_there_stays(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES)
    machine.set("policy", "mine")
    assert machine.setup().returncode == 0
    assert (tmp_path / "policy").read_text() == "mine\n"


def test_without_root_and_sudo_the_command_is_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path, without=("sudo",))
    machine.set("offered", *RUN_PACKAGES)
    result = machine.setup()
    assert result.returncode == 1
    assert "apt-get install python3-bpfcc python3-venv libbpf1" in result.stderr
    assert machine.calls("apt-get") == []


def test_a_user_whom_sudo_refuses_is_told_the_command(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES)
    (machine.bin / "sudo").write_text("#!/bin/sh\nexit 1\n")
    result = machine.setup()
    assert result.returncode == 1
    assert "As root, run: apt-get update && apt-get install python3-bpfcc" in result.stderr
    assert machine.calls("apt-get") == []


def test_a_failed_apt_is_an_error(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES)
    (machine.bin / "apt-get").write_text('#!/bin/sh\n[ "$1" = update ]\n')
    result = machine.setup()
    assert result.returncode == 1
    assert "apt-get could not install" in result.stderr
    assert machine.calls("python") == []


def test_a_needed_package_that_no_source_offers_is_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES - {"python3-bpfcc"})
    result = machine.setup()
    assert result.returncode == 1
    assert "no apt source offers python3-bpfcc" in result.stderr
    assert machine.calls("apt-get install") == []


def test_one_bad_apt_source_does_not_stop_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("offered", *RUN_PACKAGES)
    machine.set("update_status", 100)
    result = machine.setup()
    assert result.returncode == 0
    assert "apt-get update failed" in result.stderr


def test_without_apt_the_missing_packages_are_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path, without=("apt-get", "dpkg-query"))
    machine.set("bcc_status", 1)
    result = machine.setup()
    assert result.returncode == 1
    for name in ("python3-bpfcc (Debian, Ubuntu)", "python3-bcc (Fedora", "python-bcc (Arch)"):
        assert name in result.stderr
    assert "libbpf1" not in result.stderr
    assert machine.calls("python -m") == []


def test_without_apt_but_with_everything_there_it_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path, without=("apt-get", "dpkg-query"))
    result = machine.setup("test")
    assert result.returncode == 0, result.stderr
    assert "strace" in result.stderr
    assert len(machine.calls("python -m pip")) == 1


def test_without_apt_a_missing_compiler_and_headers_are_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path, without=("apt-get", "dpkg-query", "cc"))
    machine.set("headers_status", 1)
    result = machine.setup()
    assert result.returncode == 1
    for name in ("gcc and libc6-dev (Debian, Ubuntu)", "python3-devel (Fedora"):
        assert name in result.stderr
    assert machine.calls("python -m") == []


def test_what_the_c_code_is_built_with_comes_along_where_it_is_offered(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES)
    machine.set("offered", "libfuse3-dev", "fuse3")
    result = machine.setup()
    assert result.returncode == 0, result.stderr
    assert machine.installed_by_apt() == {"libfuse3-dev", "fuse3"}
    assert "no apt source offers liburing-dev" in result.stderr


def test_changed_c_code_is_compiled_again_in_the_same_venv(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES, *BUILD_PACKAGES)
    assert machine.setup().returncode == 0
    with (machine.tree / "csrc/rsplice.c").open("a") as file:
        file.write("\n")
    assert machine.setup().returncode == 0
    assert machine.calls("python -m venv") == []
    assert len(machine.calls("python -m pip")) == 1


def test_an_old_python_is_refused_with_its_version(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.set("installed", *RUN_PACKAGES, *BUILD_PACKAGES)
    machine.set("version_status", 1)
    result = machine.setup()
    assert result.returncode == 1
    assert "is Python 3.9.2, and 3.10 is the oldest" in result.stderr
    assert machine.calls("python -m") == []


@pytest.mark.parametrize("arguments", [(), ("everything",)])
def test_bad_usage_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = Machine(tmp_path).run(".ci/setup.sh", *arguments)
    assert result.returncode == 1
    assert result.stderr == "rsplice setup: usage: .ci/setup.sh run|test|bench\n"


def test_as_root_goes_through_sudo_where_it_may(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (machine.bin / "sudo").write_text('#!/bin/sh\n[ "$1" = -n ] || echo "as root: $*"\n')
    assert machine.run(".ci/as-root", "ls", "-d", ".").stdout == "as root: ls -d .\n"


def test_as_root_falls_back_to_the_user(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (machine.bin / "sudo").write_text("#!/bin/sh\nexit 1\n")
    result = machine.run(".ci/as-root", "ls", "-d", ".")
    assert (result.stdout, result.returncode) == (".\n", 0)


def test_as_root_asks_nothing_of_root(tmp_path: Path) -> None:
    machine = Machine(tmp_path, uid=0)
    assert machine.run(".ci/as-root", "ls", "-d", ".").stdout == ".\n"
    assert machine.calls("sudo") == []
