# SPDX-License-Identifier: MIT
"""Probes: they see kernel events and add them up. Nothing here knows how results are shown."""
