"""Rows of a dataset, and the conversations in them; what is malformed is a DataError that says what a row should have had."""

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, DataError
from renderers.types import Message

Fields = Mapping[str, Any]
Row = tuple[str, Fields]  # where it stands, for errors: "path:line" or "name[split]:index"; and what it holds
ROLES = ("system", "developer", "user", "assistant", "tool")


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The objects of a JSONL file; blank lines are passed over."""
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = [sibling.name for sibling in file.parent.iterdir()] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, siblings, n=1)
        raise DataError(f"{path}: no such file" + (f"; did you mean {file.parent / near[0]}?" if near else ""))
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise DataError(f"{path}:{number}: a {type(fields).__name__}, where an object with fields is needed")
            rows.append((f"{path}:{number}", fields))
    if not rows:
        raise DataError(f"{path}: the file has no examples")
    return rows


def conversation(fields: Fields, name: str) -> list[Message]:
    """The messages in the field `name`."""
    messages = _field(fields, name, list)
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{name}[{i}] needs a 'role' and a 'content' of text, not {str(message)[:80]}")
        if message.get("role") not in ROLES:
            raise DataError(f"{name}[{i}] has the role {message.get('role')!r}; roles are {', '.join(ROLES)}")
    return messages


def exchange(fields: Fields, prompt_field: str, completion_field: str, prompt_template: str) -> list[Message]:
    """A user's message, which is `prompt_template` with {prompt} filled in, and the assistant's answer."""
    if "{prompt}" not in prompt_template:
        raise ConfigError(f"prompt_template={prompt_template!r} has no {{prompt}} in it")
    prompt = prompt_template.replace("{prompt}", _field(fields, prompt_field, str))
    completion = _field(fields, completion_field, str)
    return [Message(role="user", content=prompt), Message(role="assistant", content=completion)]


def _field(fields: Fields, name: str, kind: type) -> Any:
    if name not in fields:
        raise DataError(f"no field {name!r}; the fields are {', '.join(map(repr, fields))}")
    if not isinstance(fields[name], kind):
        raise DataError(f"the field {name!r} is a {type(fields[name]).__name__}, not a {kind.__name__}")
    return fields[name]
