"""Whether a chat template can write a message of parts as an example: all of it, and in the format
that models of this template write. It renders a small message with the same parts; what a template
keeps does not depend on the words. Left out: prompts, where a client's message may lose a part other than
a call.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from posttrain.renderers.formats import FORMATS
from posttrain.renderers.parts import THINKING_KEYS, calls_in, text_in, thinking_in
from posttrain.renderers.types import Message, Part

THOUGHT, SAID, CALLS = "qthought", "qsaid", ("qfirst", "qsecond")
_THINKING: Part = {"type": "thinking", "thinking": THOUGHT}
_TEXT: Part = {"type": "text", "text": SAID}


class Shape(NamedTuple):
    """Which parts a message has; of calls at most two."""

    thinking: bool
    text: bool
    calls: int


def shape_of(parts: Sequence[Part]) -> Shape:
    return Shape(bool(thinking_in(parts)), bool(text_in(parts).strip()), min(len(calls_in(parts)), len(CALLS)))


def unwritable(render: Callable[[Message], str], template: str, is_known: bool, shape: Shape, trained: bool) -> str:
    """Why a message of this shape cannot be an example; "" if it can. `render` gives the text of a
    conversation that ends with a message. `is_known`: the format of calls is one of the table."""
    if shape.calls and not is_known and re.search(r"\btool_calls\b", template):
        return (
            "the chat template writes tool calls in no format that is known here "
            f"({', '.join(row.name for row in FORMATS)}): add a row to posttrain/renderers/formats.py, or put the "
            "calls into 'content' as the model writes them"
        )
    if shape.thinking and _has_markup_of_its_own(render):
        return (
            "the chat template writes thinking between markers of its own, not in <think>: put it into 'content' as "
            "the model writes it"
        )
    # of earlier turns a template may drop the thinking
    lost = [part for part in _lost(render, shape) if trained or part != "thinking"]
    if lost == ["thinking"] and not shape.calls:
        return "the chat template leaves out its thinking: take it out of the row"
    if lost:
        return (
            f"the chat template leaves out its {' and '.join(lost)}: make a message of each call, without text or "
            "thinking beside it, and let each call's answer follow it"
        )
    return ""


def _lost(render: Callable[[Message], str], shape: Shape) -> list[str]:
    parts = [*[_THINKING] * shape.thinking, *[_TEXT] * shape.text, *map(_call, CALLS[: shape.calls])]
    written = render(Message(role="assistant", content="", parts=parts))
    names = {THOUGHT: "thinking", SAID: "text", CALLS[0]: "tool call", CALLS[1]: "calls after the first"}
    asked = [THOUGHT] * shape.thinking + [SAID] * shape.text + list(CALLS[: shape.calls])
    return [names[marker] for marker in asked if marker not in written]


def _call(name: str) -> Part:
    return {"type": "tool_call", "id": f"{name:0<9}", "name": name, "arguments": {"q": 1}}


def _has_markup_of_its_own(render: Callable[[Message], str]) -> bool:
    """Whether the template, given thinking, writes something else than <think>."""
    ours = render(Message(role="assistant", content="", parts=[_THINKING, _TEXT]))
    theirs = [
        render({"role": "assistant", "content": SAID, key: THOUGHT})  # type: ignore[typeddict-unknown-key]
        for key in THINKING_KEYS
    ]
    return any(THOUGHT in text and text != ours for text in theirs)
