# SPDX-License-Identifier: MIT
"""What rsplice costs the programs it follows, beside other tracers: ``python -m benchmarks``."""
