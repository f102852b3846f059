# SPDX-License-Identifier: MIT
"""The built-in workloads, by name: something to audit on any machine."""

from __future__ import annotations

from rsplice.workloads import mixed, relay, serve
from rsplice.workloads.core import Workload

WORKLOADS: dict[str, Workload] = {
    workload.name: workload for workload in (mixed.WORKLOAD, relay.WORKLOAD, serve.WORKLOAD)
}
