#!/bin/sh
# SPDX-License-Identifier: MIT
# Installs what this machine lacks and makes .venv/bin/rsplice.
#
#   .ci/setup.sh run      what rsplice needs
#   .ci/setup.sh test     and what its linters and tests need
#   .ci/setup.sh bench    and what it is compared with
#
# Only packages that are missing are installed, by apt; nothing is removed, and pip writes to .venv
# alone. Where nothing is missing nothing is asked of the network.
set -eu

cd "$(dirname "$0")/.."
# BCC's bindings belong to the distribution's own Python.
PYTHON=${RSPLICE_PYTHON:-/usr/bin/python3}
# Packages that were looked for in vain: not looked for again until .venv is made anew.
UNOFFERED=.venv/unoffered
unoffered=

# "a|b": one of them, the first that this release offers.
RUN_PACKAGES="
    python3-bpfcc
    python3-venv
    libbpf1|libbpf0
    gcc libc6-dev python3-dev
"
# What librsplice and its workloads are built with where they are there: io_uring, FUSE, USDT probes.
BUILD_PACKAGES="pkg-config|pkgconf liburing-dev libfuse3-dev fuse3 systemtap-sdt-dev"
# gcc-multilib builds the 32-bit caller that a test expects to be told apart.
TEST_PACKAGES="
    make gcc-multilib cppcheck groff-base man-db git
    btrfs-progs xfsprogs e2fsprogs util-linux procps
    clang libclang-rt-14-dev|libclang-rt-dev valgrind
    bpftool strace curl nginx-light|nginx rsync socat tar tmux zstd debian-archive-keyring
    cmake meson ninja-build cargo golang-go fio
"
# What "rsplice kernel" boots other kernels with; an audit of the running one needs none of them.
KERNEL_PACKAGES="qemu-system-x86 kmod e2fsprogs zstd debian-archive-keyring"
BENCH_PACKAGES="bpftrace linux-perf|linux-tools-generic wrk"

say() {
    echo "rsplice setup: $*" >&2
}

die() {
    say "$@"
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

may_be_root() {
    [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && sudo true; }
}

installed() {
    dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed
}

offered() {
    apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [^(]'
}

# Those of the named choices of which no package is installed.
missing() {
    for choice; do
        found=$(grep -sxF "$choice" $UNOFFERED) || true
        for package in $(echo "$choice" | tr '|' ' '); do
            if installed "$package"; then
                found=yes
            fi
        done
        [ "$found" ] || echo "$choice"
    done
}

first_offered() {
    for package in $(echo "$1" | tr '|' ' '); do
        if offered "$package"; then
            echo "$package"
            return
        fi
    done
}

# A package just installed must not start its server: nginx would take port 80.
apt_install() {
    policy=/usr/sbin/policy-rc.d
    as_root sh -c '
        policy=$1
        shift
        if [ ! -e "$policy" ]; then
            trap "rm -f $policy" EXIT
            trap "exit 1" HUP INT TERM
            printf "#!/bin/sh\nexit 101\n" >"$policy"
            chmod 755 "$policy"
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends --no-remove \
            -o DPkg::Lock::Timeout=300 "$@" </dev/null
    ' sh "$policy" "$@"
}

updated=
update_lists() {
    [ -z "$updated" ] || return 0
    updated=yes
    as_root apt-get update -q -o DPkg::Lock::Timeout=300 </dev/null ||
        say "apt-get update failed: going on with the package lists that are here"
}

# install_packages needed|useful PACKAGE...: a useful one may not exist on this release.
install_packages() {
    need=$1
    shift
    lacking=$(missing "$@")
    [ "$lacking" ] || return 0
    may_be_root ||
        die "missing packages, and neither root nor sudo to install them. As root, run:" \
            "apt-get update && apt-get install" $(echo "$lacking" | sed 's/|.*//')
    update_lists
    wanted=
    for choice in $lacking; do
        package=$(first_offered "$choice")
        if [ "$package" ]; then
            wanted="$wanted $package"
        elif [ "$need" = needed ]; then
            die "no apt source offers $choice (on Ubuntu it is in \"universe\":" \
                "add-apt-repository universe)"
        else
            say "no apt source offers $choice: what needs it is skipped"
            unoffered="$unoffered $choice"
        fi
    done
    [ "$wanted" ] || return 0
    say "installing$wanted"
    apt_install $wanted || die "apt-get could not install them: see its message above"
    case " $wanted " in
    *" nginx"*) as_root systemctl disable nginx >/dev/null 2>&1 || true ;;
    esac
}

# Without apt the same is checked by use, and named as each distribution names it.
check_without_apt() {
    lacking=
    "$PYTHON" -c 'import bcc.libbcc' 2>/dev/null || lacking="$lacking
  BCC for Python     python3-bpfcc (Debian, Ubuntu), python3-bcc (Fedora, RHEL, openSUSE),
                     python-bcc (Arch), py3-bcc (Alpine)"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || lacking="$lacking
  Python's venv      python3-venv (Debian, Ubuntu), python3 and python3-pip (Fedora, RHEL,
                     openSUSE, Alpine), python (Arch)"
    "$PYTHON" -c 'import ctypes; ctypes.CDLL("libbpf.so.1")' 2>/dev/null ||
        "$PYTHON" -c 'import ctypes; ctypes.CDLL("libbpf.so.0")' 2>/dev/null || lacking="$lacking
  libbpf             libbpf1 (Debian, Ubuntu, openSUSE), libbpf (Fedora, RHEL, Arch, Alpine)"
    command -v cc >/dev/null || lacking="$lacking
  a C compiler       gcc and libc6-dev (Debian, Ubuntu), gcc (Fedora, RHEL, openSUSE, Arch),
                     build-base (Alpine)"
    "$PYTHON" -c 'import os, sysconfig
raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || lacking="$lacking
  Python's headers   python3-dev (Debian, Ubuntu, Alpine), python3-devel (Fedora, RHEL, openSUSE),
                     python (Arch)"
    [ -z "$lacking" ] || die "this machine has no apt-get, so packages are yours to install. Missing," \
        "by their usual names:$lacking
Then run this again. (PyPI's \"bcc\" is another program: do not install it with pip.)"
    if [ "$1" != run ]; then
        say "no apt-get: tests whose programs are missing are skipped. They use:" $TEST_PACKAGES
    fi
}

system_packages() {
    if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
        check_without_apt "$1"
        return
    fi
    install_packages needed $RUN_PACKAGES
    case $1 in
    run) install_packages useful $BUILD_PACKAGES ;;
    test) install_packages useful $BUILD_PACKAGES $TEST_PACKAGES $KERNEL_PACKAGES ;;
    bench) install_packages useful $BUILD_PACKAGES $TEST_PACKAGES $BENCH_PACKAGES ;;
    esac
}

# What the contents of .venv follow from. A venv can be neither moved nor kept across Pythons.
venv_key() {
    {
        pwd -P
        "$PYTHON" -VV
        cat pyproject.toml setup.py rsplice/__init__.py rsplice/_build.py .ci/setup.sh
    } | sha256sum
}

# What the extension modules are compiled from.
native_key() {
    find csrc -name '*.[ch]' | LC_ALL=C sort | xargs cat | sha256sum
}

# pip_install REQUIREMENT STAMP...: unless every .venv/STAMP says that it was done.
pip_install() {
    requirement=$1
    shift
    for stamp; do
        if [ ! -e ".venv/$stamp" ]; then
            .venv/bin/python -m pip install -q --disable-pip-version-check -e "$requirement" \
                </dev/null || die "pip could not install rsplice into .venv: see its message above"
            for stamp; do
                echo "$key" >".venv/$stamp"
            done
            return
        fi
    done
}

venv() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$PYTHON is $("$PYTHON" -V 2>&1), and 3.10 is the oldest that will do" \
            "(Debian 12, Ubuntu 22.04 and later have it)"
    key=$(venv_key)
    if [ "$(cat .venv/run.stamp 2>/dev/null)" != "$key" ]; then
        say "making .venv"
        "$PYTHON" -m venv --clear --system-site-packages .venv
    fi
    native=$(native_key)
    [ "$(cat .venv/native.stamp 2>/dev/null)" = "$native" ] || rm -f .venv/run.stamp
    if [ "$1" = run ]; then
        pip_install . run.stamp
    else
        pip_install ".[dev]" run.stamp test.stamp
    fi
    echo "$native" >.venv/native.stamp
}

case ${1-} in
run | test | bench) ;;
*) die "usage: .ci/setup.sh run|test|bench" ;;
esac
system_packages "$1"
venv "$1"
for choice in $unoffered; do
    echo "$choice" >>$UNOFFERED
done
