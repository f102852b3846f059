# SPDX-License-Identifier: MIT
"""Compiles the C extension modules; all else stands in pyproject.toml."""

import runpy

from setuptools import setup

BUILD = "rsplice/_build.py"

modules = [f"{BUILD}:native"]
if runpy.run_path(BUILD)["has_fuse"]():
    modules.append(f"{BUILD}:fuse")
setup(cffi_modules=modules)
