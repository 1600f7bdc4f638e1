"""Agents as they are: any program that speaks the OpenAI API is one episode's harness, and the
policy is the model it asks (agent_endpoint.py). Every request is a turn; a conversation's turns
make one row of training data, a sub-agent's conversation a row of its own. A function of what was
said gives the reward. A crashed agent is a failed rollout.
"""

import asyncio
import inspect
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from posttrain.backend.types import ModelInput, StopReason
from posttrain.renderers.types import Message, Renderer
from rl.agent_endpoint import Call, Endpoint, Rollout
from rl.types import (
    Action,
    Env,
    EnvGroupBuilder,
    EpisodeEnd,
    Metrics,
    Observation,
    RolloutError,
    StepResult,
    StopCondition,
)

STDERR_CHARS = 300  # of a crashed program, in the error
# A coroutine function, or a function that runs in a thread; its result goes to the reward.
Agent = Callable[[Endpoint], Any]


class AgentCrashed(RolloutError):
    """The agent raised, exited with another status than 0, or never asked the policy."""


@dataclass(frozen=True)
class AgentRun:
    """What a reward judges. `conversations` in the order of their ends; `result` is what the agent
    returned or printed, None where a limit of the run cut it short."""

    conversations: list[list[Message]]
    result: Any = None
    cut_short: EpisodeEnd | None = None


Reward = Callable[[AgentRun], float | Awaitable[float]]


@dataclass(frozen=True)
class Program:
    """An agent that is a command. It reads `stdin` and prints its result; the endpoint is in
    OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL."""

    argv: Sequence[str]
    stdin: str = ""

    async def __call__(self, endpoint: Endpoint) -> str:
        around = {**os.environ, **endpoint.environment(), "NO_PROXY": "127.0.0.1"}
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self.argv, stdin=pipe, stdout=pipe, stderr=pipe, env=around, start_new_session=True
            )
        except OSError as error:
            raise AgentCrashed(f"{self.argv[0]} cannot be started: {error}") from error
        try:
            out, err = await process.communicate(self.stdin.encode())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            await process.wait()
        if process.returncode:
            last = err.decode(errors="replace").strip()[-STDERR_CHARS:]
            raise AgentCrashed(f"{' '.join(self.argv)} ended with status {process.returncode}: {last}")
        return out.decode(errors="replace")


class AgentEnv(Env):
    """One episode of an agent. Metrics of the last turn: `agent_calls`, `conversations`."""

    def __init__(self, renderer: Renderer, agent: Agent, reward: Reward):
        self.renderer, self.agent, self.reward = renderer, agent, reward
        self.call: Call | None = None  # whose tokens are being sampled
        self.calls = 0

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        self.rollout = Rollout(self.renderer)
        self.task = asyncio.create_task(self._run(self.rollout.endpoint))
        if not await self._next_call():
            raise AgentCrashed("the agent ended without asking the policy")
        return self._observation()

    async def _run(self, endpoint: Endpoint) -> Any:
        try:
            if inspect.iscoroutinefunction(self.agent) or inspect.iscoroutinefunction(type(self.agent).__call__):
                return await self.agent(endpoint)
            return await asyncio.to_thread(self.agent, endpoint)
        except (Exception, SystemExit) as error:
            if isinstance(error, RolloutError):
                raise
            raise AgentCrashed(f"the agent raised {type(error).__name__}: {error}") from error

    async def _next_call(self) -> bool:
        """Waits for the agent's next request, or its end. False if it has ended."""
        while True:
            request = asyncio.create_task(self.rollout.calls.get())
            try:
                await asyncio.wait({request, self.task}, return_when=asyncio.FIRST_COMPLETED)
                if self.task.done():
                    self.task.result()
                    return False
                if (call := request.result()).answer.set_running_or_notify_cancel():  # else the agent hung up
                    self.call = call
                    return True
            finally:
                request.cancel()

    def _observation(self) -> tuple[Observation, StopCondition]:
        assert self.call
        return ModelInput.from_ints(self.call.conversation.prompt), self.call.stop  # type: ignore[return-value]

    async def step(self, action: Action, extra: dict[str, StopReason] | None = None) -> StepResult:
        assert self.call
        self.rollout.reply(self.call, action, (extra or {}).get("stop_reason", "stop"))
        self.calls += 1
        if await self._next_call():
            return StepResult(0.0, False, *self._observation())
        result = self.task.result()
        reward, metrics = await self._judged(AgentRun(self._conversations(), result))
        return StepResult(reward, True, ModelInput.empty(), None, metrics, {"result": str(result)})

    async def cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        self._stop()
        return await self._judged(AgentRun(self._conversations(), None, reason))

    async def _judged(self, run: AgentRun) -> tuple[float, Metrics]:
        reward = self.reward(run)
        value = await reward if isinstance(reward, Awaitable) else reward
        return value, {"agent_calls": float(self.calls), "conversations": float(len(run.conversations))}

    def _conversations(self) -> list[list[Message]]:
        return [c.messages for c in self.rollout.conversations if not c.continued]

    def _stop(self) -> None:
        self.rollout.close()
        self.task.cancel()

    async def close(self) -> None:
        if hasattr(self, "task"):
            self._stop()
            await asyncio.wait({self.task})
            if not self.task.cancelled():
                self.task.exception()  # seen: asyncio would report it otherwise


@dataclass(frozen=True)
class AgentGroupBuilder(EnvGroupBuilder):
    """`num_envs` attempts of an agent at a task."""

    agent: Agent
    reward: Reward
    num_envs: int
    renderer: Renderer
    tags: list[str] = field(default_factory=list)

    async def make_envs(self) -> Sequence[AgentEnv]:
        return [AgentEnv(self.renderer, self.agent, self.reward) for _ in range(self.num_envs)]

    def logging_tags(self) -> list[str]:
        return self.tags
