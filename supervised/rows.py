"""Rows of a dataset and the conversations in them. A malformed row is a DataError that says what is
needed.
"""

import codecs
import difflib
import gzip
import os
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.backend.errors import ConfigError, CookbookError, DataError
from posttrain.renderers.parts import THINKING_KEYS, from_openai, tool_spec
from posttrain.renderers.types import Message, ToolSpec
from posttrain.tracking.jsonl import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
Fields = Mapping[str, Any]
# The place, for errors: "path:line" or "name[split]:index"; and the fields.
Row = tuple[str, Fields]
# ShareGPT's and LLaMA-Factory's names of roles; the latter's `function_call` is read apart
ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "observation": "tool"}
# 0 or false in an assistant's message: it is read, and not trained on (OpenAI, ShareGPT, Axolotl)
MARKS = ("weight", "loss", "train", "training")
# Fields of a message that change what is trained on, and what to do.
NOT_READ = {
    "function_call": "write it as 'tool_calls', a list",
    "function_calls": "write them as 'tool_calls', a list",
    "tool_plan": "write it as 'reasoning_content'",
    **dict.fromkeys(("tools", "functions"), "write them as the field 'tools' of the row"),
    **dict.fromkeys(
        ("train_detail", "training_detail"), "whole messages are trained on or not: mark them with 'train'"
    ),
}
WRITTEN = ("role", "content", "parts", "name", "tool_call_id")  # what renderers read of a message, but for marks
SYSTEM = ("system", "system_prompt")

JSON_ENDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")  # of the names of files for `read_rows`
LONG_LINE = 1 << 20  # bytes of an example that is announced: tokenizing 20 MB takes a minute


def read_rows(path: str | os.PathLike[str], most: int | None = None) -> list[Row]:
    """The objects of a JSONL file, or of a JSON file that is a list of them, or its first `most`; both
    perhaps compressed by gzip. Blank lines are skipped. DataError, with the line and a remedy, for
    anything else."""
    file = _data_file(path)
    rows: list[Row] = []
    try:
        with file.open("rb") as raw, _unzipped(raw) as lines:
            for where, fields in _objects(lines, str(path)):
                if not isinstance(fields, dict):
                    raise DataError(
                        f"{where}: a {type(fields).__name__}, where an object with fields is needed, one per line"
                    )
                rows.append((where, fields))
                if len(rows) == most:
                    break
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({error}) after {len(rows):,} examples: compress it again") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); check its permissions, or choose another file"
        ) from error
    if not rows:
        raise DataError(f"{path}: the file has no examples")
    return rows


def _unzipped(raw: BinaryIO) -> BinaryIO:
    is_zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if is_zipped else raw  # type: ignore[return-value]


def _objects(lines: BinaryIO, path: str) -> Iterator[tuple[str, Any]]:
    """The values in a file, each with its place."""
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            _check_text(line, where)
            if line.lstrip().startswith(b"["):
                yield from _listed(line + lines.read(), path)
                return
        if not line.strip():
            continue
        if len(line) > LONG_LINE:
            print(f"{where}: one example of {len(line) / 1e6:.0f} MB, which takes a while to read", flush=True)
        yield where, parse_json(line, where, "repair or delete that line")


def _listed(text: bytes, path: str) -> Iterator[tuple[str, Any]]:
    try:
        values = parse_json(text, path, "repair it, or write one object a line, as FILE.jsonl")
    except DataError:
        lines = text.splitlines()
        if len(lines) > 1 and lines[0].rstrip().endswith(b"]"):
            raise DataError(f"{path}:1: a list, where each line is to be one object") from None
        raise
    for number, value in enumerate(values, start=1):
        yield f"{path}:row {number}", value


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
    if line.strip() == b"{":
        raise DataError(f"{where}: an object of several lines, where each line is one: jq -c . FILE > FILE.jsonl")
    if b"\0" in line:
        raise DataError(
            f"{where}: a binary file, not lines of JSON; is it compressed otherwise than by gzip, or Parquet? The "
            "latter's name must end in .parquet"
        )


# --- what a user's builder returns ---------------------------------------------------------------


def called(builder: object, method: str, fields: Fields) -> Any:
    """`builder.method(fields)`. What it raises becomes a DataError with the method and the line."""
    try:
        return getattr(builder, method)(fields)
    except CookbookError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raised = f"{type(builder).__name__}.{method} raised {type(error).__name__}: {error}"
        raise DataError(f"{raised} ({place.filename}:{place.lineno})") from error


def checked_rows(builder: object, given: Any) -> tuple[Sequence[Row], Sequence[Row]]:
    """What `builder.rows` returned; of each part the first row is looked at. DataError for anything else."""
    name = f"{type(builder).__name__}.rows"
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(_is_list(part) for part in given):
        raise DataError(f"{name} returned {given!r:.80}, not two lists: rows to train on, and rows held out")
    if not given[0]:
        raise DataError(f"{name} returned no rows to train on")
    for part in given:
        row = part[0] if part else ("", {})
        if not isinstance(row, tuple) or len(row) != 2 or not isinstance(row[0], str):
            raise DataError(f"{name} returned the row {row!r:.80}, not a pair of a place, for errors, and its fields")
    return given[0], given[1]


def checked_messages(name: str, given: Any) -> list[Message]:
    """DataError, with `name`, for what is no list of messages."""
    if not _is_list(given):
        raise DataError(f"{name} is {given!r:.80}, not a list of messages")
    for message in given:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{name} has {message!r:.80}: a message has a 'role' and a 'content', both texts")
        if message["role"] not in ROLES:
            raise DataError(f"{name} has the role {message['role']!r:.80}; roles are {', '.join(ROLES)}")
    return list(given)


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


# --- fields --------------------------------------------------------------------------------------


def text_of(where: str, fields: Fields, name: str) -> str:
    """The text in the field `name`."""
    try:
        return _field(fields, name, str)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def conversation(fields: Fields, name: str) -> list[Message]:
    """The messages in the field `name`; thinking and tool calls as the OpenAI API writes them, or as
    ShareGPT and LLaMA-Factory do. Where one is marked as trained on or not, all have a `trainable` mark."""
    messages = [_given(message, f"{name}[{i}]") for i, message in enumerate(_field(fields, name, list))]
    trained = [is_trained(message, f"{name}[{i}]") for i, message in enumerate(messages)]
    for i, message in enumerate(messages):
        for field, remedy in NOT_READ.items():
            if isinstance(message, dict) and message.get(field):
                raise DataError(f"{name}[{i}] has a {field!r}: {remedy}")
        of_api = ("tool_calls", *THINKING_KEYS)
        if isinstance(message, dict) and (
            any(message.get(key) for key in of_api) or isinstance(message.get("content"), list)
        ):
            try:
                messages[i] = message = {
                    **from_openai(message),
                    **{key: message[key] for key in MARKS if key in message},
                }
            except DataError as error:
                raise DataError(f"{name}[{i}]: {error}") from None
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{name}[{i}] needs a 'role' and a 'content' of text, not {str(message)[:80]}")
        if message.get("role") not in ROLES:
            raise DataError(f"{name}[{i}] has the role {message.get('role')!r}; roles are {', '.join(ROLES)}")
    if all(trained) and not any("trainable" in message for message in messages):
        return messages
    default = [message.get("trainable", message["role"] == "assistant") for message in messages]
    return [
        {**message, "trainable": bool(given and unmarked)}  # type: ignore[misc]
        for message, given, unmarked in zip(messages, default, trained, strict=True)
    ]


def _given(message: Any, where: str) -> Any:
    """A message without fields that are null, as those of other messages are in a table. ShareGPT's
    `from` and `value` are its role and content."""
    if not isinstance(message, Mapping):
        return message
    given = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "from" in given:
        given["role"], given["content"] = given.pop("from"), given.pop("value", None)
    if given.get("role") == "function_call":
        calls = given["content"]
        if isinstance(calls, str):
            calls = parse_json(calls, f"{where}, a function_call", "write {'name': ..., 'arguments': {...}}, or a list")
        return given | {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return given | {"role": ROLE_NAMES.get(str(given["role"]), given["role"])} if "role" in given else given


def without_nulls(value: Any) -> Any:
    """The value without null fields of the objects in it: a table's objects have all each other's fields."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def unmarked(message: Message, also: Sequence[str] = ()) -> Message:
    """The message without its `trainable` mark and fields that no renderer reads; `also` stay."""
    return {key: value for key, value in message.items() if key in (*WRITTEN, *also)}  # type: ignore[return-value]


def is_trained(message: Any, where: str = "") -> bool:
    """False for an assistant's message that is marked as not trained on."""
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return True
    given = {key: message[key] for key in MARKS if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise DataError(f"{where}: {key!r} is {str(value)[:40]!r}; it is 0 or 1, false or true")
    return all(given.values())


def system_of(fields: Fields) -> str:
    """The text in the row's field `system`; "" without."""
    given = {name: fields[name] for name in SYSTEM if fields.get(name)}
    for name, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"the field {name!r} is a {type(value).__name__}, not a text")
    if len(set(given.values())) > 1:
        raise DataError(f"the fields {' and '.join(map(repr, given))} differ: keep one of them")
    return next(iter(given.values()), "")


def after_system(system: str, messages: list[Message]) -> list[Message]:
    """The messages after a system message; unchanged if `system` is ""."""
    if not system:
        return messages
    if messages and messages[0].get("role") in ("system", "developer"):
        if messages[0].get("content") == system:
            return messages
        raise DataError("the row has a field 'system' and a system message of another text: keep one of them")
    first = Message(role="system", content=system)
    if any("trainable" in message for message in messages):
        first["trainable"] = False
    return [first, *messages]


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
    if kind is str and isinstance(fields[name], int | float) and not isinstance(fields[name], bool):
        raise DataError(
            f"the field {name!r} is the number {fields[name]}, not a text: write it in quotes; of a table, read the "
            "file by a ChatDatasetBuilder of your own (docs/data_formats.md)"
        )
    if not isinstance(fields[name], kind):
        wanted = "text" if kind is str else "text or a list of messages" if name != "messages" else "list of messages"
        raise DataError(f"the field {name!r} is a {type(fields[name]).__name__}, not a {wanted}")
    return fields[name]
