"""Rows of a dataset and the conversations in them. A malformed row is a DataError that says what is
needed.
"""

import codecs
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.backend.errors import ConfigError, DataError
from posttrain.renderers.parts import from_openai, tool_spec
from posttrain.renderers.types import Message, ToolSpec
from posttrain.tracking.jsonl import parse_json

Fields = Mapping[str, Any]
# The place, for errors: "path:line" or "name[split]:index"; and the fields.
Row = tuple[str, Fields]
ROLES = ("system", "developer", "user", "assistant", "tool")


LONG_LINE = 1 << 20  # bytes of an example that is announced: tokenizing 20 MB takes a minute


def read_rows(path: str | os.PathLike[str], most: int | None = None) -> list[Row]:
    """The objects of a JSONL file, or its first `most`; blank lines are skipped. DataError, with the
    line and a remedy, for anything else."""
    file = _data_file(path)
    rows = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    _check_text(line, where)
                if not line.strip():
                    continue
                if len(line) > LONG_LINE:
                    print(f"{where}: one example of {len(line) / 1e6:.0f} MB, which takes a while to read", flush=True)
                fields = parse_json(line, where, "repair or delete that line")
                if not isinstance(fields, dict):
                    raise DataError(
                        f"{where}: a {type(fields).__name__}, where an object with fields is needed, one in a line"
                    )
                rows.append((where, fields))
                if len(rows) == most:
                    break
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check its permissions, or choose another file"
        ) from error
    if not rows:
        raise DataError(f"{path}: the file has no examples")
    return rows


def _data_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path).expanduser()
    try:
        if file.is_dir():
            names = sorted(sibling.name for sibling in file.glob("*.jsonl"))
            raise DataError(f"{path} is a folder; give a file in it" + (f", as {file / names[0]}" if names else ""))
        if not file.is_file():
            siblings = [sibling.name for sibling in file.parent.iterdir()] if file.parent.is_dir() else []
            near = difflib.get_close_matches(file.name, siblings, n=1)
            raise DataError(f"{path}: no such file" + (f"; did you mean {file.parent / near[0]}?" if near else ""))
    except (OSError, ValueError) as error:  # a folder of another user, a null byte in the name
        raise DataError(f"{path} cannot be read ({error}); check the path and its permissions") from error
    return file


def _check_text(line: bytes, where: str) -> None:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{where}: the file is in UTF-16; save it as UTF-8")
    if b"\0" in line:
        raise DataError(
            f"{where}: a binary file, not lines of JSON; is it compressed, or Parquet? For the latter "
            "dataset=huggingface"
        )
    if line.lstrip().startswith(b"["):
        raise DataError(
            f"{where}: a list, where each line is to be one object: jq -c '.[]' FILE.json > FILE.jsonl makes that of a "
            "JSON file"
        )


def text_of(where: str, fields: Fields, name: str) -> str:
    """The text in the field `name`."""
    try:
        return _field(fields, name, str)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def conversation(fields: Fields, name: str) -> list[Message]:
    """The messages in the field `name`; thinking and tool calls as the OpenAI API writes them."""
    messages = list(_field(fields, name, list))
    for i, message in enumerate(messages):
        if isinstance(message, dict) and any(
            message.get(key) for key in ("tool_calls", "reasoning_content", "thinking")
        ):
            try:
                messages[i] = message = from_openai(message)
            except DataError as error:
                raise DataError(f"{name}[{i}]: {error}") from None
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{name}[{i}] needs a 'role' and a 'content' of text, not {str(message)[:80]}")
        if message.get("role") not in ROLES:
            raise DataError(f"{name}[{i}] has the role {message.get('role')!r}; roles are {', '.join(ROLES)}")
    return messages


def tools_of(fields: Fields) -> list[ToolSpec]:
    """The tools in the field `tools`, a list or its JSON; [] without the field."""
    tools = fields.get("tools") or []
    if isinstance(tools, str):
        tools = parse_json(tools, "the field 'tools'", "write a list of tools, or drop the field")
    if not isinstance(tools, list):
        raise DataError(f"the field 'tools' is a {type(tools).__name__}, not a list of tools")
    return [tool_spec(tool) for tool in tools]


def exchange(fields: Fields, prompt_field: str, completion_field: str, prompt_template: str) -> list[Message]:
    """The user's message, `prompt_template` with {prompt} filled in, and the assistant's answer."""
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
