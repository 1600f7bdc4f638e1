"""Environments in messages, and the adapter to an Env of tokens. EnvFromMessageEnv renders the
conversation and keeps sampled tokens unchanged (token in, token out); a ParsePolicy handles
unreadable responses. Left out: limits on turns and tokens (rl/rollouts.py), environments that
rewrite messages. Tools: rl/tool_env.py.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import chz

from posttrain.backend.errors import CookbookError, DataError
from posttrain.backend.ranges import NUMBER, WHOLE
from posttrain.backend.types import ModelInput
from posttrain.renderers.parts import get_thinking
from posttrain.renderers.turns import decode, encode
from posttrain.renderers.types import Message, Part, Renderer, TrainOnWhat
from rl import step_checks
from rl.types import (
    Action,
    Env,
    EnvGroupBuilder,
    EpisodeEnd,
    Logs,
    MalformedStep,
    Metrics,
    Observation,
    StepResult,
    StopCondition,
)
from supervised.rows import checked_messages

# why an episode ended, other than by the environment
MessageEnd = Literal[EpisodeEnd, "parse_error"]


class ParseError(CookbookError):
    """The model's message cannot be read. The text is shown to the model: say what was expected."""


@chz.chz
class ParsePolicy:
    """Handling of a response that is truncated or that the environment cannot read."""

    failed_parse_reward: float = chz.field(
        default=-1.0, validator=NUMBER, doc="reward of the unreadable response that ends an episode"
    )
    retries: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="unreadable responses of an episode that are answered with what was expected instead",
    )


@dataclass
class MessageStep:
    """`next_messages`, at least one, follow the model's message; ignored when `episode_done`."""

    reward: float
    episode_done: bool
    next_messages: Sequence[Message] = ()
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


class MessageEnv(ABC):
    """One episode in messages. Single-use."""

    @abstractmethod
    async def initial_messages(self) -> list[Message]:
        """The conversation's beginning. The assistant speaks next."""

    @abstractmethod
    async def step(self, message: Message) -> MessageStep:
        """Takes the model's message. ParseError, before any change of state, if it is unreadable."""

    async def cut_short(self, reason: MessageEnd) -> tuple[float, Metrics]:
        """A limit ended the episode: the reward to add, and metrics."""
        return 0.0, {}

    async def close(self) -> None:
        """Always called at the end: releases the episode's resources."""
        return


class EnvFromMessageEnv(Env):
    """A MessageEnv as an Env. Every turn has the metrics `parse_error` and `truncated`, 0 or 1; a
    truncated turn is a parse error, too.

    With the renderer's extension property, and before a tool's answer, an observation extends the
    previous observation and its sampled tokens, even where the text would be tokenized otherwise.
    Where the template rewrites what was said, the turn renders the conversation again, and
    rl/data_processing.py makes a Datum of each.
    """

    def __init__(self, renderer: Renderer, message_env: MessageEnv, parse: ParsePolicy | None = None):
        self.renderer, self.message_env, self.parse = renderer, message_env, parse or ParsePolicy()
        self.name = type(message_env).__name__
        self.conversation: list[Message] = []
        self.tokens: list[int] = []  # the latest observation
        self.parse_errors = 0

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return self.begin(await self._call("initial_messages"))

    def begin(self, messages: Sequence[Message]) -> tuple[Observation, StopCondition]:
        self.conversation = checked_messages(f"what {self.name}.initial_messages returned", messages)
        self.tokens = self.renderer.build_generation_prompt(self.conversation).to_ints()
        return ModelInput.from_ints(self.tokens), self.renderer.get_stop_sequences()

    async def step(self, action: Action) -> StepResult:
        message, stopped = self.renderer.parse_response(action)
        unread = {"parse_error": 0.0, "truncated": float(not stopped)}
        try:
            if not stopped:
                raise ParseError("Your answer was too long and was cut off. Be brief.")
            result = await self._answer(message)
        except ParseError as error:
            result, unread["parse_error"] = await self._unreadable(error), 1.0
        if not result.episode_done:
            next_messages = checked_messages(f"next_messages of {self.name}.step", result.next_messages)
            if not next_messages:
                raise MalformedStep(f"{self.name}.step neither ended the episode nor said anything")
            spoken = [*self.conversation, message]
            self.tokens = next_prompt(self.renderer, self.tokens, action, spoken, next_messages)
            self.conversation += [message, *next_messages]
        return StepResult(
            reward=result.reward,
            episode_done=result.episode_done,
            next_observation=ModelInput.empty() if result.episode_done else ModelInput.from_ints(self.tokens),
            next_stop_condition=self.renderer.get_stop_sequences(),
            metrics=unread | result.metrics,
            logs=result.logs,
        )

    async def _call(self, method: str, *arguments: object) -> Any:
        result = getattr(self.message_env, method)(*arguments)
        if not inspect.isawaitable(result):
            raise MalformedStep(f"{self.name}.{method} returned {result!r:.100} without being an `async def`")
        return await result

    async def _answer(self, message: Message) -> MessageStep:
        result = await self._call("step", message)
        if not isinstance(result, MessageStep):
            raise MalformedStep(f"{self.name}.step returned {result!r:.100}, not a MessageStep")
        if not isinstance(result.metrics, Mapping):
            raise MalformedStep(f"{self.name}.step: the metrics are {result.metrics!r:.100}, not a dict of numbers")
        return result

    async def _unreadable(self, error: ParseError) -> MessageStep:
        self.parse_errors += 1
        logs = {"parse error": str(error)}
        if self.parse_errors <= self.parse.retries:
            return MessageStep(0.0, False, [Message(role="user", content=str(error))], logs=logs)
        reward, metrics = step_checks.reward_and_metrics(await self._call("cut_short", "parse_error"))
        return MessageStep(self.parse.failed_parse_reward + reward, True, metrics=metrics, logs=logs)

    async def cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        return await self._call("cut_short", reason)

    async def close(self) -> None:
        await self._call("close")


def next_prompt(
    renderer: Renderer,
    prompt: list[int],
    action: Action,
    conversation: Sequence[Message],
    next_messages: Sequence[Message],
) -> list[int]:
    """The prompt after `next_messages`. `conversation` ends with the message of `action`, whose
    tokens stay as they were sampled after `prompt`, unless the renderer rewrites earlier turns."""
    rendered = renderer.build_generation_prompt([*conversation, *next_messages]).to_ints()
    # Templates that drop thinking, or trim, keep a message with calls until the tools have answered.
    of_tools = all(following["role"] == "tool" for following in next_messages)
    if not renderer.has_extension_property and not of_tools:
        return rendered
    end = _end_of_turn(renderer, conversation, rendered, of_tools)
    if end is None:
        # The reply may begin with a line break, which joins that of the prompt in one token. What follows the turn
        # is the same after another reply with these calls.
        parts: list[Part] = [part for part in conversation[-1].get("parts", ()) if part["type"] != "text"]
        other = Message(role="assistant", content="", parts=parts) if parts else Message(role="assistant", content="x")
        spoken = [*conversation[:-1], other]
        after = renderer.build_generation_prompt([*spoken, *next_messages]).to_ints()
        if (end := _end_of_turn(renderer, spoken, after, of_tools)) is not None:
            rendered = after
    return rendered if end is None else prompt + action + _missing_stop(renderer, action) + rendered[end:]


def _end_of_turn(
    renderer: Renderer, conversation: Sequence[Message], rendered: list[int], of_tools: bool
) -> int | None:
    """Where the renderer ends the model's turn: after the last weight. None where the next
    prompt writes the turn otherwise, e.g. role_colon's "User:" if another role speaks next."""
    try:
        tokens, weights = renderer.build_supervised_example(conversation, TrainOnWhat.LAST_ASSISTANT_MESSAGE)
        end = next(t for t in reversed(range(len(weights))) if weights[t] > 0) + 1
        if rendered[:end] == tokens[:end]:
            return end
    except DataError:
        pass
    if of_tools and not get_thinking(conversation[-1]):
        return _end_of_turn_without_thought(renderer, conversation[:-1], rendered)
    return None


def _end_of_turn_without_thought(renderer: Renderer, before: Sequence[Message], rendered: list[int]) -> int | None:
    """Likewise for a template that gives only the last message an empty thought: the first stop
    after the prompt."""
    prompt, stops = renderer.build_generation_prompt(before).to_ints(), renderer.get_stop_sequences()
    if rendered[: len(prompt)] != prompt:
        return None
    return next((t + 1 for t in range(len(prompt), len(rendered)) if rendered[t] in stops), None)


def _missing_stop(renderer: Renderer, action: Action) -> list[int]:
    """The stop before the next messages, where the model ended by EOS or was truncated."""
    stops, tokenizer = renderer.get_stop_sequences(), renderer.tokenizer
    stop = stops[0]
    if isinstance(stop, int):
        return [] if any(s in action for s in stops) else [stop]
    return [] if stop in decode(tokenizer, action) else encode(tokenizer, stop)


@dataclass(frozen=True)
class MessageEnvGroupBuilder(EnvGroupBuilder):
    """`num_envs` attempts at a task. Pickles if `env_thunk` does (functools.partial of a class)."""

    env_thunk: Callable[[], MessageEnv]
    num_envs: int
    renderer: Renderer
    parse: ParsePolicy = field(default_factory=ParsePolicy)
    tags: list[str] = field(default_factory=list)

    async def make_envs(self) -> Sequence[EnvFromMessageEnv]:
        envs_G = [self.env_thunk() for _ in range(self.num_envs)]
        if bad := [env for env in envs_G if not isinstance(env, MessageEnv)]:
            raise MalformedStep(f"in place of a MessageEnv there is {bad[0]!r:.100}")
        if len({id(env) for env in envs_G}) < len(envs_G):
            raise MalformedStep(f"{type(envs_G[0]).__name__}: each member of a group needs an environment of its own")
        return [EnvFromMessageEnv(self.renderer, env, self.parse) for env in envs_G]

    def logging_tags(self) -> list[str]:
        return self.tags
