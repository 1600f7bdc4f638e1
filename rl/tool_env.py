"""An agent's episode: calls are answered by tools, the first message without a call is the answer.

A call that cannot be carried out is counted and answered with its error, never scored. Calls of one
message run together; those of functions that are not async run one after another, in order. Left
out: tools that end the episode, answers that are not text.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import chz

from posttrain.backend.ranges import COUNT, POSITIVE, WHOLE
from posttrain.renderers.parts import get_text_content, get_tool_calls
from posttrain.renderers.types import Message, ToolCallPart, UnparsedToolCallPart
from rl.message_env import MessageEnd, MessageEnv, MessageStep
from rl.step_checks import reward_and_metrics
from rl.tools import MalformedCall, Tool, ToolError, answer_call, tools_by_name
from rl.types import Logs, MalformedStep, Metrics

Score = float | tuple[float, Metrics]


@chz.chz
class ToolLimits:
    """What an agent may do before it has to answer."""

    max_calls: int = chz.field(
        default=8, validator=WHOLE, doc="most calls of an episode; more are not carried out, and the model is told"
    )
    max_turns: int = chz.field(
        default=8, validator=COUNT, doc="most messages with calls in an episode; one more ends it without an answer"
    )
    call_timeout: float = chz.field(default=10.0, validator=POSITIVE, doc="seconds that one call may take")


class ToolEnv(MessageEnv):
    """`score` takes the text of the answer: the reward, or the reward and metrics. A reward of 1 or
    more is a right answer.

    Metrics of a turn with calls: `well_formed` and `tool_error`, shares of its calls. At the end:
    `calls`, `malformed_calls`, `tool_errors`, `refused_calls` (over a limit), `call_turns`, and
    `answered` and `correct`, 0 or 1. The renderer must offer the same tools (renderers.with_tools)."""

    def __init__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool | Callable[..., Any]],
        score: Callable[[str], Score | Awaitable[Score]],
        limits: ToolLimits | None = None,
    ):
        self.messages, self.tools = list(messages), tools_by_name(tools)
        self.score, self.limits = score, limits or ToolLimits()
        self.counts = dict.fromkeys(("calls", "malformed_calls", "tool_errors", "refused_calls", "call_turns"), 0)

    async def initial_messages(self) -> list[Message]:
        return self.messages

    async def step(self, message: Message) -> MessageStep:
        calls = get_tool_calls(message)
        if not calls:
            return await self._answer(get_text_content(message))
        self.counts["call_turns"] += 1
        if self.counts["call_turns"] > self.limits.max_turns:
            self.counts["refused_calls"] += len(calls)
            reward, metrics = await self.cut_short("max_turns")
            return MessageStep(
                reward, True, metrics=metrics, logs={"end": f"calls in {self.limits.max_turns + 1} turns"}
            )
        allowed = max(0, self.limits.max_calls - self.counts["calls"])
        self.counts["calls"] += len(calls[:allowed])
        self.counts["refused_calls"] += len(calls[allowed:])
        in_order = asyncio.Lock()
        answered = await asyncio.gather(*(self._carry_out(call, in_order) for call in calls[:allowed]))
        refusal = f"error: there are no more than {self.limits.max_calls} calls. Answer now."
        texts = [text for text, _ in answered] + [refusal] * len(calls[allowed:])
        kinds = [kind for _, kind in answered]
        self.counts["malformed_calls"] += kinds.count(MalformedCall)
        self.counts["tool_errors"] += kinds.count(ToolError)
        metrics: Metrics = {}
        if kinds:
            metrics["well_formed"] = 1 - kinds.count(MalformedCall) / len(kinds)
            metrics["tool_error"] = kinds.count(ToolError) / len(kinds)
        replies = [_reply(call, text) for call, text in zip(calls, texts, strict=True)]
        return MessageStep(0.0, False, replies, metrics, _logs(calls, texts))

    async def _carry_out(
        self, call: ToolCallPart | UnparsedToolCallPart, in_order: asyncio.Lock
    ) -> tuple[str, type[ToolError] | None]:
        try:
            if call["type"] == "unparsed_tool_call":
                raise MalformedCall(f"this call cannot be read, {call['error']}")
            called = self.tools.get(call["name"])
            if called and not inspect.iscoroutinefunction(called.function):
                async with in_order:
                    return await answer_call(call, self.tools, self.limits.call_timeout), None
            return await answer_call(call, self.tools, self.limits.call_timeout), None
        except ToolError as error:
            return f"error: {error}", MalformedCall if isinstance(error, MalformedCall) else ToolError

    async def _answer(self, text: str) -> MessageStep:
        scored = self.score(text)
        if inspect.isawaitable(scored):
            scored = await scored
        try:
            reward, metrics = reward_and_metrics(scored if isinstance(scored, tuple) else (scored, {}))
        except MalformedStep as error:
            raise MalformedStep(f"the function `score` of {type(self).__name__}: {error}") from error
        return MessageStep(reward, True, metrics=self._episode(True, reward >= 1) | metrics)

    def _episode(self, answered: bool, correct: bool) -> Metrics:
        return {**self.counts, "answered": float(answered), "correct": float(correct)}

    async def cut_short(self, reason: MessageEnd) -> tuple[float, Metrics]:
        return 0.0, self._episode(answered=False, correct=False)


def _reply(call: ToolCallPart | UnparsedToolCallPart, text: str) -> Message:
    return Message(role="tool", content=text, name=call["name"], tool_call_id=call["id"])


def _logs(calls: Sequence[ToolCallPart | UnparsedToolCallPart], texts: Sequence[str]) -> Logs:
    written = [
        f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"
        if call["type"] == "tool_call"
        else call["text"]
        for call in calls
    ]
    return {f"call {i + 1}": f"{call} = {text}" for i, (call, text) in enumerate(zip(written, texts, strict=True))}
