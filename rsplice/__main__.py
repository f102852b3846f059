# SPDX-License-Identifier: MIT
"""``python -m rsplice``."""

import sys

from rsplice.cli import main

sys.exit(main())
