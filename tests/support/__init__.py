# SPDX-License-Identifier: MIT
"""What the tests share: runs of rsplice, independent counts, servers and filesystems."""
