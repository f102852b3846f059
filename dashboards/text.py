# SPDX-License-Identifier: MIT
"""Text that may come from anybody, on its way to a terminal, a file or a page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import IO

from rsplice.errors import RspliceError


def sanitise(text: str) -> str:
    r"""*text* with all that a terminal could act upon made visible.

    Control characters (C0 and C1), line breaks, bidirectional and other format controls, lone
    surrogates and unassigned characters become ``\x1b``, ``\u202e`` and the like; a surrogate that
    stands for an undecodable byte becomes that byte's ``\xff``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _visible(ord(c)) for c in text)


def _visible(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def command_line(command: Sequence[str]) -> str:
    """*command* as one would type it into a shell, safe to show."""
    return sanitise(shlex.join(command))


def emit(file: IO[str], text: str) -> bool:
    """Writes *text* to *file* and flushes it.

    What the file's encoding lacks is written as a backslash escape.

    :return: False when the reader has gone away (a closed pipe), which is no error
    :raises RspliceError: the text cannot be written (a full disk)
    """
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        file.flush()
    except BrokenPipeError:
        silence(file)
        return False
    except OSError as error:
        silence(file)
        raise RspliceError(f"cannot write {_name(file)}: {error.strerror}") from error
    return True


def silence(file: IO[str]) -> None:
    """Sends the rest of *file* to /dev/null, so that what it still buffers cannot fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, file.fileno())
    os.close(null)


def _name(file: IO[str]) -> str:
    name = str(getattr(file, "name", "the output"))
    standard = {"<stdout>": "standard output", "<stderr>": "standard error"}
    return standard.get(name, sanitise(name))
