# SPDX-License-Identifier: MIT
"""An emulated machine, which is ten to twenty times slower: waited for longer, and asked for less.

RSPLICE_TEST_PATIENCE says by what factor, 1 by default.
"""

from __future__ import annotations

import os

PATIENCE = int(os.environ.get("RSPLICE_TEST_PATIENCE", "1"))

#: Seconds after which a run is given up.
DEADLINE = 60 * PATIENCE

#: How many of something are many: a prime.
MANY = 1009 if PATIENCE == 1 else 101
