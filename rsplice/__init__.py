# SPDX-License-Identifier: MIT
"""rsplice: how many bytes a program's "zero-copy" path really copies, and why.

trace() is of rsplice.tracing (docs/python.md), the other names are of librsplice (rsplice(3)). They
are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rsplice.errors import RspliceError
    from rsplice.library import (
        F_MORE,
        F_NONBLOCK,
        F_SHARE,
        F_STRICT,
        WHY_ALIGNMENT,
        WHY_GENERATED,
        WHY_NO_DIRECT,
        WHY_PARTIAL,
        WHY_PIPE,
        WHY_SLOTS,
        WHY_SOCKET,
        Result,
        discard,
        pending,
        rsplice,
    )
    from rsplice.tracing import Trace, trace

__all__ = [
    "F_MORE",
    "F_NONBLOCK",
    "F_SHARE",
    "F_STRICT",
    "WHY_ALIGNMENT",
    "WHY_GENERATED",
    "WHY_NO_DIRECT",
    "WHY_PARTIAL",
    "WHY_PIPE",
    "WHY_SLOTS",
    "WHY_SOCKET",
    "Result",
    "RspliceError",
    "Trace",
    "discard",
    "pending",
    "rsplice",
    "trace",
]

#: Where a name is, if not in rsplice.library.
_MODULES = {"RspliceError": "errors", "Trace": "tracing", "trace": "tracing"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"rsplice.{_MODULES.get(name, 'library')}")
    value = globals()[name] = getattr(module, name)
    return value
