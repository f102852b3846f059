# SPDX-License-Identifier: MIT
"""One module for each subcommand: ``prepare_parser(parser)``, ``run(args)``, and a docstring.

The docstring is the command's help: its first line says what the command does, the part from
EXAMPLES on stands at the end.
"""
