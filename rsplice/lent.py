# SPDX-License-Identifier: MIT
"""Verifies, when a run has ended, the files whose pages it has lent (rsplice audit --verify)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence

from rsplice.audit import Audit, Finding, MissingProbe
from rsplice.events import LentFile
from rsplice.handles import open_inode
from rsplice.pagecache import MEMORY, CachedFile, Kernel, Unchecked
from rsplice.verify import NAME, FileResult, Verifier, finding

#: Filesystems whose handles of files are known (rsplice.handles).
_OPENED = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs"))

COST = "whether its cached pages differ from the disk is not known"


def verify(audit: Audit, files: Sequence[LentFile]) -> None:
    """Compares what is cached of *files* with the disk; adds to *audit* what was found.

    What could not be compared is among its missing probes.
    """
    missing = audit.accuracy.probes_missing
    try:
        kernel = Kernel()
    except Unchecked as why:
        missing.append(MissingProbe("verify", str(why), COST, [NAME]))
        return
    results = []
    with Verifier(kernel) as verifier:
        for file in files:
            if file.filesystem in MEMORY or file.filesystem == "memfd":
                continue  # there is no disk below it
            results.append(_verify(verifier, file))
    unchecked: defaultdict[str, list[str]] = defaultdict(list)
    for result in results:
        for reason in result.reasons:
            unchecked[reason].append(result.name)
    for reason, names in unchecked.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        missing.append(MissingProbe(f"verify {names[0]}{others}", reason, COST))
    if found := finding(results):
        audit.findings.insert(0, _of_run(found, audit.duration_s))


def _verify(verifier: Verifier, file: LentFile) -> FileResult:
    result = FileResult(f"inode {file.inode} of {file.filesystem}", file.filesystem)
    if file.filesystem not in _OPENED:
        result.problem = f"files of {file.filesystem} cannot be opened by their inode"
        return result
    try:
        fd = open_inode(file.device, file.inode, file.generation)
    except OSError as error:
        result.problem = error.strerror
        return result
    try:
        path = f"/proc/self/fd/{fd}"
        result.name = os.readlink(path)
        with CachedFile(path) as cached:
            result.counts = verifier.verify(cached)
    except Unchecked as why:
        result.problem = str(why)
    except OSError as error:
        result.problem = error.strerror or str(error)
    finally:
        os.close(fd)
    return result


def _of_run(found: Finding, end: float) -> Finding:
    """The finding with the times of an audit: seconds since its start."""
    found.first["time"] = found.first["last"] = round(end, 6)
    found.first["file_offset"] = found.first.pop("offset") // 4096 * 4096
    return found
