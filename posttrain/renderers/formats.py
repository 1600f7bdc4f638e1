"""How models write thinking and tool calls: one row per format, the markers that a reader
(stream.py) follows, the reading of a call, and what a chat template is given. Sources: the chat
templates of Qwen 2.5 and 3, Llama 3.1, gpt-oss and Mistral; openai.com/harmony. Left out: calls
written as code (Llama's pythonic ones) or as XML (Qwen3-Coder), built-in tools.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.renderers.parts import calls_in, text_in, thinking_in
from posttrain.renderers.types import Part, ToolCallPart, ToolSpec, UnparsedToolCallPart

Kind = Literal["text", "thinking", "call", "header"]
# Within text, thinking, ...: the markers that end it, and what follows each.
Markers = Mapping[Kind, Mapping[str, Kind]]


@dataclass(frozen=True)
class MessageFormat:
    """`read_call(header, body)` gives the calls in the text between two markers. `call_stops` are
    tokens that end a message with calls, beside the template's end of turn. `write` gives a
    message's parts as the content that the template copies; None: the template writes them from
    the keys of `template_message`."""

    name: str
    evidence: Sequence[str]  # a chat template with all of these has this format
    markers: Markers
    read_call: Callable[[str, str], list[Part]]
    write: Callable[[Sequence[Part]], str] | None
    starts_with: Kind = "text"
    call_stops: Sequence[str] = ()


class _BadCall(ValueError):
    """Why a call cannot be read. The model reads the text."""


def _refuse(constant: str) -> float:
    raise _BadCall(f"{constant} is not JSON")


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise _BadCall(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _BadCall("not JSON: nested too deeply") from None


def _call(value: Any, arguments_key: str) -> ToolCallPart:
    """`id` is "" where the model wrote none; the reader counts."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise _BadCall('an object with a "name" is needed')
    if not isinstance(value.get(arguments_key), dict):
        raise _BadCall(f'"{arguments_key}" must be an object')
    identity = str(value.get("id") or "")
    return {"type": "tool_call", "id": identity, "name": value["name"], "arguments": value[arguments_key]}


def _unparsed(text: str, error: Exception, name: str = "") -> UnparsedToolCallPart:
    return {"type": "unparsed_tool_call", "id": "", "name": name, "text": text, "error": str(error)}


def dumps(value: Any) -> str:
    """JSON as the chat templates' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


# --- Hermes: Qwen 2.5 and 3 ---------------------------------------------------------------------


def read_hermes_call(header: str, body: str) -> list[Part]:
    try:
        return [_call(_json(body), "arguments")]
    except _BadCall as error:
        return [_unparsed(body, error)]


def write_hermes(parts: Sequence[Part]) -> str:
    """<think> lines, the text, <tool_call> lines."""
    calls = []
    for part in parts:
        if part["type"] == "tool_call":
            calls.append(f'{{"name": "{part["name"]}", "arguments": {dumps(part["arguments"])}}}')
        elif part["type"] == "unparsed_tool_call":
            calls.append(part["text"].strip("\n"))
    lines = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    return _written_text(parts) + ("\n" if calls and text_in(parts) else "") + lines


def _written_text(parts: Sequence[Part]) -> str:
    thinking = "\n".join(part["thinking"].strip("\n") for part in parts if part["type"] == "thinking")
    return (f"<think>\n{thinking}\n</think>\n\n" if thinking else "") + text_in(parts)


THINK_TAGS: Markers = {"text": {"<think>": "thinking"}, "thinking": {"</think>": "text"}}

# --- Llama 3.1 ----------------------------------------------------------------------------------

# A Llama's call is a whole message: an object that begins with one of these keys.
CALL_KEYS = ("name", "parameters", "type", "function")


def is_llama_call(text: str) -> bool:
    return bool(re.match(r'\s*\{\s*"(' + "|".join(CALL_KEYS) + ')"', text))


def might_be_llama_call(text: str) -> bool:
    """Whether a message that begins with `text` can be a call; any other JSON is text."""
    beginning = re.match(r'\s*\{\s*(?:"([^"]*)("?))?', text)
    if not beginning or beginning[1] is None:
        return not text.strip() or bool(re.fullmatch(r"\s*\{\s*", text))
    key, whole = beginning[1], bool(beginning[2])
    return key in CALL_KEYS if whole else any(known.startswith(key) for known in CALL_KEYS)


def read_llama_call(header: str, body: str) -> list[Part]:
    try:
        value = _json(body)
        if isinstance(value, dict) and isinstance(value.get("function"), str):  # {"type": "function", "function": name}
            value = {**value, "name": value.get("name", value["function"])}
        return [_call(value, "parameters")]
    except _BadCall as error:
        return [_unparsed(body, error)]


def write_llama(parts: Sequence[Part]) -> str:
    """A call is the whole message; the template takes one."""
    for part in parts:
        if part["type"] == "tool_call":
            return f'{{"name": "{part["name"]}", "parameters": {dumps(part["arguments"])}}}'
        if part["type"] == "unparsed_tool_call":
            return part["text"]
    return _written_text(parts)


# --- harmony: gpt-oss ---------------------------------------------------------------------------

HARMONY_ENDS: Mapping[str, Kind] = dict.fromkeys(
    ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"), "header"
)


def harmony_kind(header: str) -> Kind:
    """What follows a header such as `analysis` or `commentary to=functions.add json`."""
    if re.search(r"\bto=", header):
        return "call"
    return "thinking" if "analysis" in header else "text"


def read_harmony_call(header: str, body: str) -> list[Part]:
    recipient = re.search(r"\bto=([^\s<]*)", header)
    name = (recipient[1] if recipient else "").removeprefix("functions.")
    try:
        return [_call({"name": name, "arguments": _json(body)}, "arguments")]
    except _BadCall as error:
        return [_unparsed(body, error, name)]


# --- Mistral ------------------------------------------------------------------------------------


def read_mistral_calls(header: str, body: str) -> list[Part]:
    """[{"name": ..., "arguments": ...}], or since 2025 name[ARGS]{...} with an optional [CALL_ID]."""
    if named := re.fullmatch(r"\s*(\S+?)\s*(?:\[CALL_ID\](\w*))?\[ARGS\](.*)", body, re.DOTALL):
        name, identity, arguments = named.groups()
        try:
            return [_call({"name": name, "arguments": _json(arguments), "id": identity}, "arguments")]
        except _BadCall as error:
            return [_unparsed(body, error, name)]
    try:
        values = _json(body)
        if not isinstance(values, list) or not values:
            raise _BadCall("a list of calls is needed")
        return [_call(value, "arguments") for value in values]
    except _BadCall as error:
        return [_unparsed(body, error)]


# --- the table ----------------------------------------------------------------------------------

HERMES = MessageFormat(
    name="hermes",
    evidence=("</tool_call>", 'arguments": '),
    markers={
        "text": {"<think>": "thinking", "<tool_call>": "call"},
        "thinking": {"</think>": "text"},
        "call": {"</tool_call>": "text"},
    },
    read_call=read_hermes_call,
    write=write_hermes,
)
FORMATS = (
    MessageFormat(
        name="harmony",
        evidence=("<|channel|>", "<|message|>"),
        markers={
            "header": {"<|message|>": "text"},  # or what `harmony_kind` says
            "text": HARMONY_ENDS,
            "thinking": HARMONY_ENDS,
            "call": HARMONY_ENDS,
        },
        read_call=read_harmony_call,
        write=None,
        starts_with="header",
        call_stops=("<|call|>",),
    ),
    MessageFormat(
        name="mistral",
        evidence=("[TOOL_CALLS]",),
        markers={
            "text": {"[THINK]": "thinking", "[TOOL_CALLS]": "call"},
            "thinking": {"[/THINK]": "text"},
            "call": {"[TOOL_CALLS]": "call"},
        },
        read_call=read_mistral_calls,
        write=None,
    ),
    MessageFormat(
        name="llama3",
        evidence=("<|start_header_id|>", "ipython"),
        markers={**THINK_TAGS, "text": {"<think>": "thinking", "<|python_tag|>": "call"}},
        read_call=read_llama_call,
        write=write_llama,
        call_stops=("<|eom_id|>",),
    ),
    HERMES,
)


def format_of(chat_template: str) -> MessageFormat | None:
    """The row that a chat template belongs to; None if it is of no known format."""
    return next((row for row in FORMATS if all(text in chat_template for text in row.evidence)), None)


def template_message(row: MessageFormat, parts: Sequence[Part]) -> dict[str, Any]:
    """The keys of an assistant's message for a template that writes the parts itself. A call that
    cannot be read is a call with a text for arguments: what the template writes after it is right,
    and sampled tokens are kept by those who have them."""
    calls = [
        {
            "id": part["id"],
            "type": "function",
            "function": {
                "name": part["name"] or "unreadable",
                "arguments": part["arguments"] if part["type"] == "tool_call" else part["text"],
            },
        }
        for part in calls_in(parts)
    ]
    thinking, text = thinking_in(parts), text_in(parts)
    if row.name == "mistral":
        fields: dict[str, Any] = {"content": (f"[THINK]{thinking}[/THINK]" if thinking else "") + text}
    elif calls:  # gpt-oss has one analysis before a call, and no text
        fields = {"content": "", "thinking": "\n".join(piece for piece in (thinking, text) if piece)}
    else:
        fields = {"content": text} | ({"thinking": thinking} if thinking else {})
    return fields | ({"tool_calls": calls} if calls else {})


def tools_as_text(tools: Sequence[ToolSpec]) -> str:
    """The tools for a template that has no place for them, to be called as in Hermes."""
    listed = "\n".join(dumps(tool) for tool in tools)
    return f'{listed}\nTo call: <tool_call>\n{{"name": ..., "arguments": {{...}}}}\n</tool_call>'
