"""Responses that are read while they arrive give the parts of the whole."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.renderers import ResponseStream
from posttrain.renderers.parts import join_parts
from posttrain.renderers.plain import PlainRenderer
from posttrain.renderers.role_colon import RoleColonRenderer
from posttrain.renderers.turns import encode
from tests.test_message_parts import ARGUMENTS, HERMES_CALL, TOKENIZERS, WITH_TOOLS, call, text, thinking

PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    HERMES_CALL,
    "\n",
    "日本 é",
    "a < b",
    "</",
    "{",
    ARGUMENTS,
]
PIECES += [
    "<|channel|>analysis<|message|>",
    "<|channel|>commentary to=functions.f<|message|>",
    "<|end|>",
    "<|start|>assistant",
]
PIECES += [
    "[TOOL_CALLS]",
    "calculator[ARGS]",
    "[THINK]",
    "[/THINK]",
    '{"name": "f", "parameters": {}}',
    "<|python_tag|>",
]


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(WITH_TOOLS)),
    pieces=st.lists(st.sampled_from(PIECES), max_size=8),
    cuts=st.lists(st.integers(1, 9), min_size=1),
    ends=st.booleans(),
)
def test_a_stream_gives_the_parts_of_the_whole(name: str, pieces: list[str], cuts: list[int], ends: bool):
    renderer = WITH_TOOLS[name]
    tokens = encode(renderer.tokenizer, "".join(pieces)) + [renderer.end_of_turn] * ends
    message, ended = renderer.parse_response(tokens)
    stream, parts, at = ResponseStream(renderer), [], 0
    while at < len(tokens):
        size = cuts[at % len(cuts)]
        parts += stream.feed(tokens[at : at + size])
        at += size
    parts = join_parts(parts + stream.close())
    whole = message.get("parts", [text(message["content"])] if message["content"] else [])
    assert parts == whole and stream.ended == ended


def test_a_stream_gives_text_at_once_and_a_call_when_it_is_whole():
    renderer = WITH_TOOLS["qwen3"]
    stream, seen = ResponseStream(renderer), []
    for token in encode(renderer.tokenizer, f"<think>\nA 日.\n</think>\n\nOne <b>\n{HERMES_CALL}<|im_end|>"):
        seen += [stream.feed([token])]
    parts = [part for step in seen for part in step]
    assert join_parts(parts) == [thinking("A 日."), text("One <b>"), call("1+2")]
    assert sum(part["type"] == "tool_call" for part in parts) == 1 and sum(part["type"] == "text" for part in parts) > 3
    assert stream.ended and stream.feed(encode(renderer.tokenizer, "more")) == [] and stream.close() == []


@pytest.mark.parametrize(("kind", "stop"), [(PlainRenderer, "<|endoftext|>"), (RoleColonRenderer, "\n\nUser:")])
def test_a_stream_of_text_alone_ends_at_its_stop(kind: Any, stop: str):
    renderer = kind(TOKENIZERS["chatml"])
    stream = ResponseStream(renderer)
    parts = [part for token in encode(renderer.tokenizer, f" a\n\nb{stop}c") for part in stream.feed([token])]
    lead = "" if kind is RoleColonRenderer else " "
    assert join_parts(parts + stream.close()) == [text(f"{lead}a\n\nb")] and stream.ended
