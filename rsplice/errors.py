# SPDX-License-Identifier: MIT
"""The one exception that reaches a user, as one line and an exit status."""

from __future__ import annotations

EXIT_FAIL_ON = 120  #: a --fail-on condition held
EXIT_FAILED = 125  #: rsplice itself failed
EXIT_CANNOT_RUN = 126  #: the command was found but cannot be run
EXIT_NOT_FOUND = 127  #: the command was not found


class RspliceError(Exception):
    """An error to show as one line: what happened, why, and what to do.

    :param message: the line, without the leading "rsplice: "
    :param exit_status: what the process then exits with
    """

    def __init__(self, message: str, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_status = exit_status
