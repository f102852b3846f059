# SPDX-License-Identifier: MIT
"""Other kernels: fetched into a cache, and booted in a small VM to run one command."""
