"""What is in a message, and messages as the OpenAI API and chat templates write them: thinking in
`reasoning_content`, calls in `tool_calls`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.backend.errors import DataError
from posttrain.renderers.types import (
    Message,
    Part,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolSpec,
    UnparsedToolCallPart,
)

# where other programs write thinking
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
# pieces of a content that are its text
TEXT_TYPES = ("text", "input_text", "output_text")
# where other programs write a tool's parameters (Anthropic, MCP)
SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema")


def get_text_content(message: Message) -> str:
    """The text of a message without thinking and calls, named as in the cookbook."""
    if "parts" not in message:
        return message["content"]
    return text_in(message["parts"])


def get_thinking(message: Message) -> str:
    """The thinking in a message; "" without."""
    return thinking_in(message.get("parts", ()))


def get_tool_calls(message: Message) -> list[ToolCallPart | UnparsedToolCallPart]:
    """The calls in a message, also those that could not be read, in order."""
    return calls_in(message.get("parts", ()))


def text_in(parts: Sequence[Part]) -> str:
    """The text among `parts`."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def thinking_in(parts: Sequence[Part]) -> str:
    """The thinking among `parts`, a line break between two; "" without."""
    return "\n".join(part["thinking"] for part in parts if part["type"] == "thinking")


def calls_in(parts: Sequence[Part]) -> list[ToolCallPart | UnparsedToolCallPart]:
    """The calls among `parts`, also those that could not be read."""
    return [part for part in parts if part["type"] == "tool_call" or part["type"] == "unparsed_tool_call"]


def join_parts(parts: list[Part]) -> list[Part]:
    """Neighbouring pieces of text, or of thinking, as one part."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and last["type"] == "text" and part["type"] == "text":
            joined[-1] = TextPart(type="text", text=last["text"] + part["text"])
        elif last and last["type"] == "thinking" and part["type"] == "thinking":
            joined[-1] = ThinkingPart(type="thinking", thinking=last["thinking"] + part["thinking"])
        else:
            joined.append(part)
    return joined


def to_openai(message: Message) -> dict[str, Any]:
    """The message with `content`, `reasoning_content` and `tool_calls`. A call that could not be
    read stays in `content`, as the model wrote it."""
    fields: dict[str, Any] = {key: value for key, value in message.items() if key in ("role", "name", "tool_call_id")}
    parts = message.get("parts", ())
    calls = [part for part in parts if part["type"] == "tool_call"]
    unread = [part["text"] for part in parts if part["type"] == "unparsed_tool_call"]
    fields["content"] = "\n".join(text for text in (get_text_content(message), *unread) if text)
    if thinking := get_thinking(message):
        fields["reasoning_content"] = thinking
    if calls:
        fields["tool_calls"] = [openai_call(call) for call in calls]
    return fields


def openai_call(call: ToolCallPart) -> dict[str, Any]:
    """An entry of `tool_calls`."""
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": call["id"], "type": "function", "function": function}


def from_openai(fields: Mapping[str, Any]) -> Message:
    """A message of the OpenAI API: `content` may be null or a list of texts; `arguments` may be an
    object, too. `reasoning` and `thinking` are read as `reasoning_content`. DataError for anything else."""
    content = fields.get("content")
    if isinstance(content, list):
        kinds = [(p.get("type") or "text") if isinstance(p, Mapping) else type(p).__name__ for p in content]
        if others := [kind for kind in kinds if kind not in TEXT_TYPES]:
            raise DataError(
                f"'content' has a piece of the type {str(others[0])!r:.40}: only texts are read there, no images or "
                "sound; thinking is 'reasoning_content', calls are 'tool_calls'"
            )
        if not all(isinstance(piece.get("text"), str) for piece in content):
            raise DataError(f"'content' is a list of something other than texts: {str(content)[:80]}")
        content = "".join(piece["text"] for piece in content)
    thinking = next((fields[key] for key in THINKING_KEYS if fields.get(key)), None)
    calls = fields.get("tool_calls") or []
    if content is None and (calls or thinking):
        content = ""
    if not isinstance(content, str) or not isinstance(fields.get("role"), str):
        raise DataError(f"a message needs a 'role' and a 'content' of text, not {str(dict(fields))[:80]}")
    message = Message(role=fields["role"], content=content)
    message.update({key: fields[key] for key in ("name", "tool_call_id", "trainable") if fields.get(key) is not None})  # type: ignore[typeddict-item]
    if not calls and not thinking:
        return message
    if thinking is not None and not isinstance(thinking, str):
        raise DataError(f"'reasoning_content' is a {type(thinking).__name__}, not a text")
    if not isinstance(calls, list):
        raise DataError(f"'tool_calls' is a {type(calls).__name__}, not a list")
    parts: list[Part] = [ThinkingPart(type="thinking", thinking=thinking)] if thinking else []
    parts += [TextPart(type="text", text=content)] if content else []
    message["parts"] = [*parts, *(_call_of(call, i) for i, call in enumerate(calls))]
    message["content"] = ""
    return message


def as_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages to render: those in the form of the OpenAI API are translated, which a template or a
    renderer of text would write as Python writes a list, or leave out. DataError with the message's number."""
    return [_as_message(i, message) for i, message in enumerate(messages)]


def _as_message(i: int, message: Mapping[str, Any]) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"message {i} must have a 'role' and a 'content', not be {message!r:.40}")
    is_ours = isinstance(message.get("content"), str) and isinstance(message.get("role"), str)
    if is_ours and not any(message.get(key) for key in ("tool_calls", *THINKING_KEYS)):
        return message  # type: ignore[return-value]
    try:
        return from_openai(message)
    except DataError as error:
        raise DataError(f"message {i}: {error}") from None


def _call_of(call: Any, i: int) -> ToolCallPart:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")  # of a tool without parameters, some servers write nothing
        except ValueError as error:
            raise DataError(f"tool_calls[{i}]: 'arguments' is no JSON ({error}): {arguments[:80]}") from None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise DataError(f"tool_calls[{i}] needs a function's 'name' and 'arguments', an object: {str(call)[:80]}")
    return {"type": "tool_call", "id": str(call.get("id") or f"call_{i}"), "name": name, "arguments": arguments}


def tool_spec(fields: Any) -> ToolSpec:
    """A tool as the OpenAI API writes it, {"type": "function", "function": {...}}, or the inner
    object alone, also with Anthropic's `input_schema`. DataError without a name, or with parameters
    that are no schema of an object."""
    function = fields.get("function", fields) if isinstance(fields, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool needs a 'name': {str(fields)[:80]}")
    schemas = (function[key] for key in SCHEMA_KEYS if function.get(key))
    parameters = next(schemas, {"type": "object", "properties": {}})
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise DataError(f"the tool {function['name']!r}: 'parameters' must be a JSON schema with type 'object'")
    return {
        "name": function["name"],
        "description": str(function.get("description") or ""),
        "parameters": dict(parameters),
    }
