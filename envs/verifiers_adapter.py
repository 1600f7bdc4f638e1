"""Tasksets of the verifiers library (0.4), or its classic environments (0.1), in this process: several
turns, tools, users that answer, judges, the library's own rewards and metrics. A taskset is the name
of an installed package, also as the library's hub writes it (owner/name@version).

    python -m pip install -e '.[verifiers]' my-taskset
    python -m rl.train_cli env=verifiers env.taskset=my-taskset

Left out: containers and remote runtimes, histories that an environment rewrites, several agents
that learn.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import chz
import numpy as np
from packaging.version import Version

from envs.problem import GraderError
from envs.verifiers_calls import Answerer
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.extras import how_to_install
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.renderers import from_openai, to_openai, with_tools
from posttrain.renderers.parts import tool_spec
from posttrain.renderers.types import Message, Renderer, ToolSpec
from posttrain.tracking.datasets import ListDataset, held_out
from rl.message_env import EnvFromMessageEnv, MessageEnd, MessageEnv, MessageStep, ParsePolicy
from rl.step_checks import is_reserved
from rl.types import EnvGroupBuilder, Metrics, Observation, RLDataset, RLDatasetBuilder, StopCondition

CLASSIC, TASKSETS = Version("0.1.14"), Version("0.4")  # the oldest whose names are known here


class Host(Protocol):
    """An environment that is loaded: envs/verifiers_host.py, envs/verifiers_classic.py."""

    tasks: list[Any]

    def content(self, index: int) -> object:
        """What the task is, to be compared: without its place in the taskset."""
        ...

    async def open(self) -> None: ...

    async def play(self, index: int, answerer: Answerer) -> tuple[float, Metrics]: ...


@cache
def host(taskset: str, config: str, limit: int) -> Host:
    """The environment, loaded once, by the library's version. ConfigError if it cannot be."""
    try:
        found = Version(version("verifiers"))
        if found < CLASSIC or Version("0.2") <= found < TASKSETS:
            raise ConfigError(
                f"verifiers {found} is installed, and {TASKSETS} is needed, or {CLASSIC} for classic environments: "
                f"{how_to_install('verifiers')}"
            )
        if found < TASKSETS:
            from envs.verifiers_classic import ClassicHost as Loaded
        else:
            from envs.verifiers_host import Host as Loaded
    except ImportError as error:
        raise ConfigError(f"env=verifiers needs the library ({error}): {how_to_install('verifiers')}") from error
    try:
        return Loaded(taskset, _config(config), limit)
    except ModuleNotFoundError as error:  # its cause: perhaps a module that the package imports
        raise ConfigError(
            f"taskset={taskset}: {error.__cause__ or error}; install its package first (prime env install {taskset}, or pip)"
        ) from error
    except Exception as error:  # another project's code may raise anything
        raise ConfigError(f"the taskset {taskset} cannot be used: {type(error).__name__}: {error}") from error


def _config(written: str) -> dict[str, Any]:
    try:
        config = json.loads(written)
    except ValueError as error:
        raise ConfigError(f"env_config={written!r} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"env_config={written!r} is no JSON object")
    return config


class VerifiersEnv(MessageEnv):
    """An episode of the library, run as a task: it asks for a message, and waits for `step`."""

    def __init__(self, source: tuple[str, str, int], task: int):
        self.source, self.task = source, task
        self.tools: list[ToolSpec] = []
        self._seen: list[Message] = []
        self._requests: asyncio.Queue[tuple[list[Any], list[Any], asyncio.Future[Any]]] = asyncio.Queue()
        self._reply: asyncio.Future[Any] | None = None
        self._episode: asyncio.Task[tuple[float, Metrics]] | None = None

    async def initial_messages(self) -> list[Message]:
        running = host(*self.source)
        await running.open()
        self._episode = asyncio.create_task(running.play(self.task, self._answer))
        if not await self._next_request():
            self._result()
            raise GraderError(f"{self._name()}: the episode ended before the policy was asked")
        return list(self._seen)

    async def _answer(self, messages: list[Any], tools: list[Any]) -> Message | None:
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests.put_nowait((messages, tools, reply))
        return await reply

    async def _next_request(self) -> bool:
        """Waits until the library asks (its messages are then `_seen`), or has scored the episode."""
        assert self._episode is not None
        asked = asyncio.ensure_future(self._requests.get())
        try:
            await asyncio.wait({asked, self._episode}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        if not asked.done() or asked.cancelled():
            return False
        messages, tools, self._reply = asked.result()
        self._seen = [from_openai(message) for message in messages]
        self.tools = self.tools or [tool_spec(tool) for tool in tools]
        return True

    async def step(self, message: Message) -> MessageStep:
        before, written = self._seen, to_openai(message)
        await self._reply_with(message)
        logs = {"answer": message["content"]}
        if not await self._next_request():
            reward, metrics = self._result()
            return MessageStep(reward, True, metrics=metrics, logs=logs)
        kept, new = self._seen[: len(before)], self._seen[len(before) + 1 :]
        if kept != before or not new or self._seen[len(before)] != from_openai(written):
            raise GraderError(f"{self._name()}: the environment rewrote the conversation, which is not supported")
        return MessageStep(0.0, False, new, logs=logs)

    async def _reply_with(self, message: Message | None) -> None:
        """GraderError if the library no longer waits, as after its time limit on the agent: its score
        would be that of a conversation without this message."""
        assert self._reply is not None and self._episode is not None
        if self._reply.cancelled():
            await asyncio.wait({self._episode})
            self._result()
            raise GraderError(f"{self._name()}: the episode ended while the policy answered (a time limit of its own?)")
        self._reply.set_result(message)

    def _name(self) -> str:
        return f"{self.source[0]}, task {self.task}"

    def _result(self) -> tuple[float, Metrics]:
        assert self._episode is not None
        try:
            reward, metrics = self._episode.result()
        except Exception as error:  # another project's code may raise anything
            raise GraderError(f"{self._name()}: {error}") from error
        # names that the library's user cannot change
        return reward, {f"{name}_" if is_reserved(name) else name: value for name, value in metrics.items()}

    async def cut_short(self, reason: MessageEnd) -> tuple[float, Metrics]:
        """The library scores what was said; an answer that could not be read has no score."""
        if reason == "parse_error":
            return 0.0, {}
        await self._reply_with(None)
        if await self._next_request():
            raise GraderError(f"{self._name()}: it asked again after the end ({reason})")
        return self._result()

    async def close(self) -> None:
        if self._episode is not None:
            self._episode.cancel()
            await asyncio.gather(self._episode, return_exceptions=True)


class VerifiersTokenEnv(EnvFromMessageEnv):
    """The episode in tokens, with the tools that it offers."""

    message_env: VerifiersEnv

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        messages = await self.message_env.initial_messages()
        if self.message_env.tools:
            self.renderer = with_tools(self.renderer, self.message_env.tools)
        return self.begin(messages)


@dataclass(frozen=True)
class VerifiersGroupBuilder(EnvGroupBuilder):
    """`num_envs` episodes of one task. Pickles: the library is loaded where they are made."""

    source: tuple[str, str, int]
    task: int
    num_envs: int
    renderer: Renderer
    parse: ParsePolicy

    async def make_envs(self) -> Sequence[VerifiersTokenEnv]:
        return [
            VerifiersTokenEnv(self.renderer, VerifiersEnv(self.source, self.task), self.parse)
            for _ in range(self.num_envs)
        ]

    def logging_tags(self) -> list[str]:
        return [self.source[0]]


@chz.chz
class VerifiersBuilder(RLDatasetBuilder):
    """A taskset of the verifiers library."""

    taskset: str = chz.field(doc="name of an installed taskset, or as the library's hub writes it: owner/name@version")
    env_config: str = chz.field(
        default="{}",
        doc='the library\'s environment configuration, as JSON: {"taskset": {...}, "agent": {"max_turns": 4}}',
    )
    num_tasks: int = chz.field(default=1000, validator=COUNT, doc="number of tasks, the first ones")
    num_test: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="held-out tasks, drawn by split_seed; the training set has no task equal to one of them",
    )
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the choice of held-out tasks")
    parse: ParsePolicy = chz.field(default_factory=ParsePolicy, doc="treatment of a truncated answer")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        source = (self.taskset, self.env_config, self.num_tasks)
        running = host(*source)
        count = len(running.tasks)
        if not count:
            raise DataError(f"the taskset {self.taskset} has no tasks")
        if not 0 <= self.num_test < count:
            raise ConfigError(
                f"num_test={self.num_test}: the taskset {self.taskset} has {count} tasks; set it to 0 to {count - 1}"
            )
        order_D = np.random.default_rng(self.split_seed).permutation(count)
        test_D = sorted(order_D[: self.num_test].tolist())
        held = {running.content(task) for task in test_D}
        train_D = [task for task in range(count) if not held or running.content(task) not in held]
        if not train_D:
            raise ConfigError(
                f"num_test={self.num_test}: each of the {count} tasks of {self.taskset} is equal to a held-out one; "
                "set it to 0, or tell the tasks apart in their data (a number or an id is not enough)"
            )

        def groups(tasks_D: list[int], num_envs: int) -> list[VerifiersGroupBuilder]:
            return [VerifiersGroupBuilder(source, task, num_envs, renderer, self.parse) for task in tasks_D]

        train = ListDataset(groups(train_D, self.group_size), self.batch_size, self.seed)
        return train, held_out(groups(test_D, 1), self.batch_size)
