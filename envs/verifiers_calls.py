"""What both hosts of the verifiers library share: how a call of a model reaches the policy."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from posttrain.renderers import to_openai
from posttrain.renderers.types import Message

# messages and tools in OpenAI's form -> the policy's message; None: a limit of the run ends the
# episode, as if the model's context were full, and it is scored
Answerer = Callable[[list[dict[str, Any]], list[dict[str, Any]]], Awaitable[Message | None]]


class EpisodeFailed(Exception):
    """The library could not score an episode."""


def chat_completion(message: Message, model: str) -> dict[str, Any]:
    """The response of an OpenAI endpoint that says `message`."""
    written = to_openai(message)
    reason = "tool_calls" if written.get("tool_calls") else "stop"
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "finish_reason": reason, "message": written}],
    }
