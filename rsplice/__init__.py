# SPDX-License-Identifier: MIT
"""rsplice: how many bytes a program's "zero-copy" path really copies, and why.

The names below are of librsplice (rsplice(3)); they are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
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
    "discard",
    "pending",
    "rsplice",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rsplice import library

    value = globals()[name] = getattr(library, name)
    return value
