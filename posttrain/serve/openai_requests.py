"""The bodies of OpenAI-compatible requests, read and checked. What would change the answer and is
not offered is refused by name, never ignored; null is as good as absent.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from posttrain.backend.errors import CookbookError, DataError
from posttrain.renderers import from_openai
from posttrain.renderers.parts import tool_spec
from posttrain.renderers.types import Message, ToolSpec
from posttrain.serve.body import read_json

MAX_BODY_BYTES = 16 * 2**20
MAX_CHOICES, MAX_PROMPTS, MAX_STOPS, MAX_TOP_LOGPROBS = 128, 256, 16, 20
# They change no answer of this server.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "prediction"),
}
# What is not offered, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "chat_template_kwargs": ({},),
    "web_search_options": (),
}


class Refusal(CookbookError):
    """A request that is answered with an error. `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Options:
    """What both endpoints take. `logprobs`: None = none, k = also of the k most likely tokens."""

    model: str
    n: int
    stop: list[str]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int | None
    seed: int | None
    stream: bool
    include_usage: bool
    logprobs: int | None


@dataclass(frozen=True)
class ChatRequest:
    options: Options
    messages: list[Message]
    tools: list[ToolSpec]


@dataclass(frozen=True)
class CompletionRequest:
    """`prompts` are texts or token ids."""

    options: Options
    prompts: list[str | list[int]]
    echo: bool


class Fields:
    """A JSON object whose fields are taken one by one."""

    def __init__(self, fields: dict[str, Any]):
        self._left = {name: value for name, value in fields.items() if value is not None}
        self._taken: list[str] = []

    def take(self, name: str, kind: type, default: Any = None, least: float = -math.inf, most: float = math.inf) -> Any:
        """The field, or `default`. Refusal for another type, or a number out of range."""
        self._taken.append(name)
        value = self._left.pop(name, None)
        if value is None:
            return default
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
            raise Refusal(f"{name}={value!r:.60} must be {names.get(kind, f'a {kind.__name__}')}", name)
        if isinstance(value, int | float) and not least <= value <= most:
            limits = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
            raise Refusal(f"{name}={value} must be {limits}", name)
        return value

    def take_any(self, name: str) -> Any:
        self._taken.append(name)
        return self._left.pop(name, None)

    def check_rest(self) -> None:
        """Refusal for a field that would change the answer, or that nobody knows."""
        for name, value in self._left.items():
            if name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            if name in NEUTRAL:
                raise Refusal(f"{name} is not offered by this server", name)
            near = difflib.get_close_matches(name, self._taken, n=1)
            raise Refusal(f"unknown field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), name)


async def read_fields(request: Request) -> Fields:
    """Refusal, or BodyError, unless it is a JSON object of at most MAX_BODY_BYTES."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal("the content-type must be application/json", status=415)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise Refusal(f"the body has more than {MAX_BODY_BYTES} bytes", status=413)
    fields = read_json(data)
    if not isinstance(fields, dict):
        raise Refusal("the body must be a JSON object")
    return Fields(fields)


def chat_request(body: Fields) -> ChatRequest:
    messages = body.take("messages", list)
    if not messages:
        raise Refusal("messages must hold at least one message", "messages")
    wants_logprobs = body.take("logprobs", bool, False)
    top = body.take("top_logprobs", int, 0, 0, MAX_TOP_LOGPROBS)
    if top and not wants_logprobs:
        raise Refusal("top_logprobs needs logprobs=true", "top_logprobs")
    newer = body.take("max_completion_tokens", int, None, 1)
    max_tokens = body.take("max_tokens", int, None, 1)
    tools, choice = body.take("tools", list, []), body.take_any("tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise Refusal(
            f"tool_choice={choice!r:.60}: the model is free to choose here (auto), or has no tools (none)",
            "tool_choice",
        )
    if choice == "none" or not tools:
        body.take_any("parallel_tool_calls")
    try:
        tools = [tool_spec(tool) for tool in tools] if choice == "auto" else []
    except DataError as error:
        raise Refusal(str(error), "tools") from error
    options = _options(body, newer or max_tokens, top if wants_logprobs else None)
    return ChatRequest(options, [_message(i, message) for i, message in enumerate(messages)], tools)


def completion_request(body: Fields) -> CompletionRequest:
    prompts = _prompts(body.take_any("prompt"))
    echo = body.take("echo", bool, False)
    logprobs = body.take("logprobs", int, None, 0, MAX_TOP_LOGPROBS)
    max_tokens = body.take("max_tokens", int, 16, 0 if echo else 1)
    request = CompletionRequest(_options(body, max_tokens, logprobs), prompts, echo)
    if request.options.stream and echo:
        raise Refusal("echo is not offered with stream", "echo")
    return request


def _options(body: Fields, max_tokens: int | None, logprobs: int | None) -> Options:
    stream_options = body.take("stream_options", dict, {})
    options = Options(
        model=body.take("model", str, ""),
        n=body.take("n", int, 1, 1, MAX_CHOICES),
        stop=_stops(body.take_any("stop")),
        temperature=float(body.take("temperature", float, 1.0, 0, 2)),
        top_p=float(body.take("top_p", float, 1.0, 1e-6, 1)),
        top_k=body.take("top_k", int, -1, -1),
        max_tokens=max_tokens,
        seed=body.take("seed", int, None, -(2**63), 2**63 - 1),
        stream=body.take("stream", bool, False),
        include_usage=stream_options.get("include_usage") is True,
        logprobs=logprobs,
    )
    if options.stream and logprobs is not None:
        raise Refusal("logprobs are not offered with stream", "logprobs")
    body.check_rest()
    return options


def _stops(stop: object) -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise Refusal("stop must be a text or a list of texts, none of them empty", "stop")
    if len(stops) > MAX_STOPS:
        raise Refusal(f"stop holds {len(stops)} texts, at most {MAX_STOPS} are taken", "stop")
    return stops


def _prompts(prompt: object) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _are_tokens(prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(p, str) or _are_tokens(p) for p in prompt):
        raise Refusal("prompt must be a text, token ids, or a list of one of these", "prompt")
    if len(prompt) > MAX_PROMPTS:
        raise Refusal(f"{len(prompt)} prompts in one request: at most {MAX_PROMPTS} are taken", "prompt")
    return prompt


def _are_tokens(tokens: object) -> bool:
    return isinstance(tokens, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens)


def _message(i: int, fields: object) -> Message:
    if not isinstance(fields, dict) or not isinstance(fields.get("role"), str):
        raise Refusal(f"messages[{i}] must be an object with a role and a content", "messages")
    role = "system" if fields["role"] == "developer" else fields["role"]
    if role not in ("system", "user", "assistant", "tool"):
        raise Refusal(f"messages[{i}] has the role {role!r:.40}: system, user, assistant or tool is needed", "messages")
    content = "" if fields.get("content") is None else fields["content"]
    try:
        return from_openai({k: v for k, v in fields.items() if k != "trainable"} | {"role": role, "content": content})
    except DataError as error:
        raise Refusal(f"messages[{i}]: {error}", "messages") from error
