# SPDX-License-Identifier: MIT
"""Says what this kernel, these privileges and this installation can see, what is missing, why,
what that costs, and how to get it. Exit status 0 if programs can be audited here, else 1.

EXAMPLES
  rsplice doctor           one line for each thing
  rsplice doctor --json    the same for programs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field

from rsplice.errors import RspliceError
from rsplice.journey import Request
from rsplice.tracers import capability, layout, providers, usdt
from rsplice.tracers.btf import RUNNING, Btf
from rsplice.tracers.journey import Follower
from rsplice.tracers.tracer import PROBES, TAILS, Tracer, with_fuse

_USDT = "librsplice"
_JOURNEY = "journey "  #: begins the names of what journeys lack


@dataclass
class Check:
    """One thing looked at.

    :param state: "ok" or "missing"
    :param cost: what cannot be told without it
    """

    name: str
    state: str
    detail: str
    cost: str = ""


@dataclass
class Diagnosis:
    """All that was looked at, and what follows."""

    kernel: str
    checks: list[Check] = field(default_factory=list)
    can: list[str] = field(default_factory=list)
    cannot: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        return bool(self.can)


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``rsplice doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Looks, and prints."""
    diagnosis = diagnose()
    if args.json:
        json.dump(asdict(diagnosis), sys.stdout, indent=1)
        print()
    else:
        _print(diagnosis)
    return 0 if diagnosis.works else 1


def diagnose() -> Diagnosis:
    """Tries everything that an audit needs, and takes it away again."""
    found = Diagnosis(os.uname().release)
    checks = found.checks
    checks.append(_check_btf())
    checks.append(_check_privilege())
    checks.append(_check_bcc())
    checks.append(_check_vm())
    try:
        if why_not := capability.reason():
            raise RspliceError(why_not)
        tracer = Tracer(files=usdt.find(), journeys=Follower(Request()))
    except RspliceError as error:
        checks += [Check(p.tracepoint, "missing", "not tried", p.cost) for p in PROBES]
        found.cannot.append(f"nothing can be audited: {error}")
        return found
    tracer.close()
    missing = {m.probe: m for m in tracer.missing}
    for probe in PROBES:
        gone = missing.get(probe.tracepoint)
        if not gone and probe.tracepoint not in tracer.attached:
            continue  # there is nothing for it here
        checks.append(
            Check(probe.tracepoint, "missing", gone.reason, gone.cost)
            if gone
            else Check(probe.tracepoint, "ok", "attached")
        )
    checks.append(Check("memory reads", "ok", _reads(tracer)))
    checks += _usdt_checks(tracer)
    checks += _observed_checks(tracer)
    checks += _journey_checks(tracer)
    _conclude(found, set(missing), tracer)
    if tracer.usdt_files:
        found.can.append("what librsplice meant to do, beside what the kernel did")
    return found


def _reads(tracer: Tracer) -> str:
    """How kernel memory is read, and why not faster."""
    if tracer.direct:
        return "direct loads"
    why = f"the kernel refused direct loads: {tracer.refused}"
    return f"bpf_probe_read_kernel (slower: {why if tracer.refused else 'needs Linux 6.2'})"


def _observed_checks(tracer: Tracer) -> list[Check]:
    """One for each thing that can be observed in several ways: which was taken, what was lost."""
    if tracer.measures:
        return [_observed_check(taken) for taken in tracer.observed]
    reason, cost = providers.NEITHER, "copies are inferred, not measured"
    others = [_observed_check(taken) for taken in tracer.unobserved if not taken.copies]
    return [Check("copies", "missing", reason, cost), *others]


def _observed_check(taken: providers.Taken) -> Check:
    name, cost = taken.observation.name, taken.observation.loss
    if taken.candidate is None:
        return Check(name, "missing", taken.reason, cost)
    lost = f", for {taken.reason}" if taken.lost else ""
    return Check(name, "ok", f"{taken.candidate.how.value} at {taken.candidate.function}{lost}")


def _journey_checks(tracer: Tracer) -> list[Check]:
    """One for each tracepoint that journeys lack."""
    return [
        Check(gone.probe, "missing", gone.reason, gone.cost)
        for gone in tracer.missing
        if gone.probe.startswith(_JOURNEY)
    ]


def _usdt_checks(tracer: Tracer) -> list[Check]:
    """One for each file with probes of librsplice; one that says so where there is none."""
    checks = [Check(_USDT, "ok", f"attached in {path}") for path in tracer.usdt_files]
    names = {probe.tracepoint for probe in PROBES} | {tail.function for tail in TAILS}
    names |= {taken.observation.functions[0] for taken in tracer.observed}
    checks += [
        Check(_USDT, "missing", f"{gone.probe}: {gone.reason}", gone.cost)
        for gone in tracer.missing
        if gone.probe not in names and not gone.probe.startswith(_JOURNEY)
    ]
    # Programs that do not use librsplice lack nothing.
    none = "no librsplice with probes is installed; a program's own is looked for in each audit"
    return checks or [Check(_USDT, "ok", none)]


def _check_btf() -> Check:
    try:
        resolved = layout.resolve(with_fuse(Btf()))
    except RspliceError as error:
        return Check("BTF", "missing", str(error), "nothing can be traced")
    if not resolved.missing:
        return Check("BTF", "ok", f"{RUNNING}, all fields found")
    lacking = "; ".join(f"{why} ({layout.FEATURES[f]})" for f, why in resolved.missing.items())
    return Check("BTF", "ok", f"{RUNNING}, but {lacking}")


def _check_privilege() -> Check:
    lacking = capability.missing_capabilities()
    if lacking:
        fix = f"{' and '.join(lacking)} missing: run as root, or grant them"
        return Check("BPF privilege", "missing", fix, "nothing can be traced")
    return Check("BPF privilege", "ok", "CAP_SYS_ADMIN, or CAP_BPF and CAP_PERFMON")


def _check_bcc() -> Check:
    try:
        import bcc
    except ImportError:
        fix = "install python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora)"
        return Check("BCC", "missing", fix, "nothing can be traced")
    if not hasattr(bcc, "BPF"):
        fix = "this is PyPI's bcc, another package: remove it and install python3-bpfcc"
        return Check("BCC", "missing", fix, "nothing can be traced")
    return Check("BCC", "ok", f"version {getattr(bcc, '__version__', 'unknown')}")


def _check_vm() -> Check:
    """Whether other kernels can be run."""
    from rsplice.kernel import vm

    if lacking := vm.missing_programs():
        fix = f"no {', '.join(lacking)}: apt-get install {vm.PACKAGES} gcc libc6-dev"
        return Check("other kernels", "missing", fix, "rsplice kernel and --kernel do not work")
    if not vm.kvm_device():
        return Check("other kernels", "ok", "emulated: /dev/kvm is missing or closed to this user")
    kvm = {
        None: "with KVM if it runs a guest, which is tried with the first one",
        True: "with KVM, which ran one since this machine booted",
        False: "emulated: KVM did not run one since this machine booted",
    }
    return Check("other kernels", "ok", kvm[vm.kvm_verdict()])


def _conclude(found: Diagnosis, missing: set[str], tracer: Tracer) -> None:
    """What can and what cannot be told here."""
    found.can.append("which calls carry how many bytes between which ends, per process")
    for probes, sentence in (
        ({"net_dev_start_xmit"}, "whether sendfile and splice send page-cache pages"),
        ({"skb_copy_datagram_iovec"}, "measured copies out of socket buffers"),
        ({"fuse_request_send", "fuse_request_end"}, "which pages a FUSE reply moves"),
        ({"io_uring_complete", "io_uring_submit_req"}, "io_uring operations"),
        ({"mm_filemap_add_to_page_cache"}, "page-cache inserts"),
        ({"mm_filemap_map_pages", "page_fault_user"}, "page-table references"),
    ):
        (found.cannot if probes & missing else found.can).append(sentence)
    if tracer.measured_at:
        found.can.append("how many bytes the kernel copies, counted where it copies them")
    else:
        found.cannot.append(
            "copies at the kernel's copying functions: reads and writes of files are inferred"
        )


def _print(found: Diagnosis) -> None:
    from rsplice.dashboards.text import sanitise

    print(f"rsplice doctor: Linux {sanitise(found.kernel)}")
    for check in found.checks:
        cost = f" -> {check.cost}" if check.cost else ""
        print(f"  {check.state:8} {check.name:30} {sanitise(check.detail)}{cost}")
    for heading, sentences in (("can tell", found.can), ("cannot tell", found.cannot)):
        for sentence in sentences:
            print(f"{heading}: {sanitise(sentence)}")
