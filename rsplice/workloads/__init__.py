# SPDX-License-Identifier: MIT
"""The built-in workloads, by name: something to audit on any machine."""

from __future__ import annotations

from rsplice.workloads import fuse, gift, memfd, mixed, recvpage, relay, serve, tee
from rsplice.workloads.core import Workload

WORKLOADS: dict[str, Workload] = {
    module.WORKLOAD.name: module.WORKLOAD
    for module in (mixed, relay, serve, gift, tee, memfd, fuse, recvpage)
}
