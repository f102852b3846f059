# SPDX-License-Identifier: MIT
"""What a GitHub Actions runner takes for a command in a step's output.

Written from the rules of actions/runner: src/Runner.Common/ActionCommand.cs (TryParseV2, TryParse)
and src/Runner.Worker/ActionCommandManager.cs (TryProcessCommand).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = {
    "internal-set-repo-path", "set-env", "set-output", "save-state", "add-mask", "add-path",
    "add-matcher", "remove-matcher", "warning", "error", "notice", "debug", "group", "endgroup",
    "echo",
}  # fmt: skip
_STOP = "stop-commands"


@dataclass(frozen=True)
class Command:
    """One command: its name, its properties and its text, unescaped."""

    name: str
    properties: dict[str, str]
    text: str


def commands_in(output: str) -> list[Command]:
    """The commands that a runner would obey, in their order."""
    obeyed: list[Command] = []
    token: str | None = None
    for line in re.split(r"\r\n|\r|\n", output):
        names = _NAMES | {_STOP, *([token] if token else [])}
        command = _second_form(line, names) or _first_form(line, names)
        if command is None:
            continue
        if token is not None:
            token = None if command.name.lower() == token.lower() else token
        elif command.name == _STOP:
            token = command.text
        else:
            obeyed.append(command)
    return obeyed


def _second_form(line: str, names: set[str]) -> Command | None:
    """``::name key=value,key=value::text`` at the beginning of a line."""
    line = line.lstrip()
    if not line.startswith("::") or (end := line.find("::", 2)) < 0:
        return None
    name, _, rest = line[2:end].partition(" ")
    if name.lower() not in names:
        return None
    pairs = (pair.split("=", 1) for pair in rest.strip().split(",") if "=" in pair)
    properties = {key: _unescaped(value, ":,") for key, value in pairs}
    return Command(name, properties, _unescaped(line[end + 2 :], ""))


def _first_form(line: str, names: set[str]) -> Command | None:
    """``##[name key=value;key=value]text`` anywhere in a line."""
    start = line.find("##[")
    end = line.find("]", start)
    if start < 0 or end < 0:
        return None
    name, _, rest = line[start + 3 : end].partition(" ")
    if name.lower() not in names:
        return None
    pairs = (pair.split("=", 1) for pair in rest.split(";") if "=" in pair)
    properties = {key: _unescaped(value, ";]") for key, value in pairs}
    return Command(name, properties, _unescaped(line[end + 1 :], ";]"))


def _unescaped(text: str, characters: str) -> str:
    for character in ("\r", "\n", *characters, "%"):
        text = text.replace(f"%{ord(character):02X}", character)
    return text
