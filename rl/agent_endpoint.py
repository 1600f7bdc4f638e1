"""The endpoint that agents ask: one server of this process on a loopback port, and a key for each
rollout. A request becomes a Call, which the rollout's environment answers with the policy's tokens.
Calls that continue a conversation keep its sampled tokens. The run decides how to sample: of a
request's sampling options only `stop` counts.
"""

import asyncio
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request

from posttrain.backend.types import SampledSequence, SampleResponse, SamplingParams, StopReason
from posttrain.renderers import from_openai, get_text_content, get_tool_calls
from posttrain.renderers.turns import decode
from posttrain.renderers.types import Message, Renderer
from posttrain.serve.local_server import LocalServer
from posttrain.serve.openai_answers import OnTokens, answered, with_call_ids
from posttrain.serve.openai_api import no_endpoint, openai_routes
from posttrain.serve.openai_requests import Refusal
from rl.message_env import next_prompt

UNLIMITED = 2**31  # the rollout ends where the context does; its agent gets no error


@dataclass(frozen=True)
class Endpoint:
    """Where the agent of one rollout finds the policy. Any model name will do."""

    base_url: str
    api_key: str
    model: str = "policy"

    def environment(self) -> dict[str, str]:
        """Environment variables for a program that uses the `openai` package."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key, "OPENAI_MODEL": self.model}


@dataclass(eq=False)
class Conversation:
    """Messages up to the model's latest, and their tokens up to the prompt of it. `told`: the same
    messages as the agent knows them."""

    messages: list[Message]
    told: list[Message]
    renderer: Renderer
    prompt: list[int]
    action: list[int] = field(default_factory=list)
    continued: bool = False

    def is_start_of(self, messages: Sequence[Message], renderer: Renderer) -> bool:
        return (
            renderer is self.renderer
            and len(self.told) < len(messages)
            and all(_content(a) == _content(b) for a, b in zip(self.told, messages, strict=False))
        )


def _as_told(message: Message, stop: list[str | int] | None) -> Message:
    """A sampled message as the endpoint answers it: cut at its stops, unreadable calls as text."""
    return from_openai(answered(message, [text for text in stop or () if isinstance(text, str)]))


def _content(message: Message) -> tuple[Any, ...]:
    """What agents send back of a message: thinking is mostly left out, white space trimmed."""
    calls = [
        (call["name"], call["arguments"])  # equal, too, if programs in JavaScript write 1 for 1.0
        for call in get_tool_calls(message)
        if call["type"] == "tool_call"
    ]
    return message["role"], get_text_content(message).strip(), calls, message.get("tool_call_id")


@dataclass(eq=False)
class Call:
    """One sampled turn that the agent waits for."""

    conversation: Conversation
    stop: list[str | int] | None
    answer: "Future[SampledSequence]" = field(default_factory=Future)
    hung_up: bool = False  # the client, while the turn was sampled

    def asks_as(self, other: "Call") -> bool:
        mine, its = self.conversation, other.conversation
        return mine.renderer is its.renderer and mine.prompt == its.prompt and self.stop == other.stop


class Rollout:
    """The policy as an agent's endpoint sees it (openai_answers.Served). `calls` belongs to `loop`,
    the environment's; requests come from the server's thread."""

    max_length = UNLIMITED

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self.loop, self.calls = asyncio.get_running_loop(), asyncio.Queue[Call]()
        self.conversations: list[Conversation] = []
        self._lock = threading.Lock()  # of `conversations`
        self._prompts: dict[tuple[int, ...], Conversation] = {}
        self._waiting: set[Call] = set()
        self._unheard: list[Call] = []  # answered when their clients had hung up
        self.key = secrets.token_urlsafe(24)
        self.endpoint = Endpoint(f"{_gateway().url}/v1", self.key)
        GATEWAY.rollouts[self.key] = self

    # --- in the server's thread ------------------------------------------------------------------

    def prompt(self, renderer: Renderer, messages: Sequence[Message]) -> list[int]:
        with self._lock:
            # the longest, mostly the latest: a long episode is not compared with all its turns at each turn
            by_length = sorted(self.conversations, key=lambda c: len(c.messages))
        start = next((c for c in reversed(by_length) if c.is_start_of(messages, renderer)), None)
        known = [*start.messages, *messages[len(start.messages) :]] if start else [*messages]
        tokens = _prompt_after(start, known) if start else renderer.build_generation_prompt(known).to_ints()
        self._prompts[tuple(tokens)] = Conversation(known, [*messages], renderer, tokens)
        return tokens

    async def sample(self, prompt: list[int], n: int, params: SamplingParams, on_tokens: OnTokens) -> SampleResponse:
        text = Message(role="user", content=decode(self.renderer.tokenizer, prompt))  # of a text completion
        known = self._prompts.get(tuple(prompt)) or Conversation([text], [text], self.renderer, prompt)
        stop: Any = params.stop
        calls = [Call(Conversation([*known.messages], [*known.told], known.renderer, prompt), stop) for _ in range(n)]
        self._waiting |= set(calls)
        if self.key not in GATEWAY.rollouts:
            raise _ended()
        for call in calls:
            self.loop.call_soon_threadsafe(self.calls.put_nowait, call)
        try:
            return SampleResponse(await asyncio.gather(*(asyncio.wrap_future(call.answer) for call in calls)))
        except asyncio.CancelledError:
            for call in calls:
                call.hung_up = not call.answer.cancel()
            raise

    async def score(self, tokens: list[int], k: int) -> SampleResponse:
        raise Refusal("logprobs are not offered during a rollout", "logprobs")

    # --- in the environment's thread -------------------------------------------------------------

    def reply(self, call: Call, action: list[int], stop_reason: StopReason) -> None:
        """Sends the sampled tokens, and remembers the conversation they are in."""
        conversation = call.conversation
        message = with_call_ids(conversation.renderer.parse_response(action)[0], conversation.prompt)
        with self._lock:
            for earlier in self.conversations:
                earlier.continued = earlier.continued or earlier.is_start_of(conversation.told, conversation.renderer)
            conversation.messages.append(message)
            conversation.told.append(_as_told(message, call.stop))
            conversation.action = action
            self.conversations.append(conversation)
        if call.hung_up:
            self._unheard.append(call)
        self._send(call, SampledSequence(action, [0.0] * len(action), stop_reason))

    def is_repetition(self, call: Call) -> bool:
        """Whether the agent asks again for an answer that it did not get, as HTTP libraries do after a time-out; it
        then gets that answer, and no second turn is sampled."""
        for earlier in self._unheard:
            if earlier.asks_as(call):
                self._unheard.remove(earlier)
                self._send(call, earlier.answer.result())
                return True
        return False

    def _send(self, call: Call, sequence: SampledSequence) -> None:
        self._waiting.discard(call)
        call.answer.set_result(sequence)

    def close(self) -> None:
        """Later requests are refused, and those that wait."""
        GATEWAY.rollouts.pop(self.key, None)
        for call in list(self._waiting):
            with suppress(InvalidStateError):  # answered, or its client hung up
                call.answer.set_exception(_ended())


def _prompt_after(start: Conversation, known: list[Message]) -> list[int]:
    said = len(start.messages)
    return next_prompt(start.renderer, start.prompt, start.action, known[:said], known[said:])


def _ended() -> Refusal:
    return Refusal("this rollout has ended", status=401, code="invalid_api_key")


class _Gateway:
    """What the server serves (openai_api.Models)."""

    def __init__(self) -> None:
        self.rollouts: dict[str, Rollout] = {}
        self.server: LocalServer | None = None
        self.lock = threading.Lock()

    def names(self) -> list[str]:
        return ["policy"]

    async def open(self, name: str, request: Request) -> Rollout:
        rollout = self.rollouts.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if rollout is None:
            raise _ended()
        return rollout


GATEWAY = _Gateway()


def _gateway() -> LocalServer:
    with GATEWAY.lock:
        app = Starlette(routes=openai_routes(GATEWAY), exception_handlers={HTTPException: no_endpoint})
        GATEWAY.server = GATEWAY.server or LocalServer(app)
        return GATEWAY.server
