# SPDX-License-Identifier: MIT
"""rsplice: how many bytes a program's "zero-copy" path really copies, and why."""

__version__ = "0.1.0"
