# SPDX-License-Identifier: MIT
"""``rsplice audit --kernel``: the audit is made in the guest, its report on this side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from rsplice.audit import Audit
from rsplice.errors import RspliceError
from rsplice.kernel import cache, vm
from rsplice.kernel.initramfs import PORTS, Job
from rsplice.kernel.live import check
from rsplice.recording import parse_audit

_PORT = "audit"
_AUDIT_MAX = 1 << 28  #: bytes


def audit(
    args: argparse.Namespace, job_of: Callable[[list[str]], Job], setup: vm.Setup
) -> Audit | int:
    """The audit of ``args.command`` on ``args.kernel``; an exit status if rsplice failed there.

    :param args: the options of ``rsplice audit``
    :param job_of: makes the job of a command
    :param setup: with sinks for what the command prints
    :raises RspliceError: the options rule each other out, or the guest failed
    """
    check(args.pids, args.everything, args.command)
    kernel = cache.find_or_fetch(args.kernel, setup.say)
    received: list[bytes] = []

    def receive(data: bytes) -> None:
        received.append(data)
        if sum(map(len, received)) > _AUDIT_MAX:
            raise BrokenPipeError

    setup.last_words = vm.LAST_WORDS
    setup.sinks = {**setup.sinks, _PORT: receive}
    command = [sys.executable, "-m", "rsplice", "audit", "-q", "--json", f"{PORTS}/{_PORT}"]
    status = vm.run(kernel, job_of([*command, *_options(args), "--", *args.command]), setup)
    if not received:
        # It has said why.
        return status or 125
    try:
        found = parse_audit(json.loads(b"".join(received)))
    except (ValueError, RecursionError) as error:
        raise RspliceError(f"the guest sent something else than an audit: {error}") from error
    found.kernel_where = "vm"
    return found


def _options(args: argparse.Namespace) -> list[str]:
    """Those that decide what is counted; what becomes of the counts is decided on this side."""
    options = [f"--identity={args.identity}"]
    for name in ("user", "duration", "interval", "journey", "journey_file", "journey_finding"):
        value = getattr(args, name)
        if value is not None:
            options.append(f"--{name.replace('_', '-')}={value}")
    asked = (args.journey, args.journey_file, args.journey_finding)
    if args.journey_json is not None and asked == (None, None, None):
        options.append("--journey")
    if args.integrity:
        options.append("--integrity")
    if args.verbose:
        options.append("-v")
    return options
