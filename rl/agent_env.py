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
from rl.threads import in_own_thread
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
MOST_OUTPUT = 2**24  # bytes of a program's standard output
CHUNK, POLL_SECONDS = 2**16, 0.2
CLOSING_SECONDS = 1.0  # for the last of the output after a program's end
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
        pipe, around = asyncio.subprocess.PIPE, {**os.environ, **endpoint.environment(), **_without_proxy()}
        question = self.stdin.encode()
        try:
            process = await asyncio.create_subprocess_exec(
                *self.argv, stdin=pipe, stdout=pipe, stderr=pipe, env=around, start_new_session=True
            )
        except OSError as error:
            raise AgentCrashed(f"{self.argv[0]} cannot be started: {error}") from error
        assert process.stdin and process.stdout and process.stderr
        out, err = _Output(process.stdout), _Output(process.stderr, is_log=True)
        streams = [asyncio.create_task(stream) for stream in (out.read(), err.read(), _feed(process.stdin, question))]
        # some versions of Python then wait for the end of its output, too, which what it has started may keep open
        ended = asyncio.create_task(process.wait())
        try:
            while process.returncode is None and not out.is_too_long:
                await asyncio.wait({ended}, timeout=POLL_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            while process.returncode is None:
                await asyncio.wait({ended}, timeout=POLL_SECONDS)
            await asyncio.wait(streams, timeout=CLOSING_SECONDS)
            for task in (ended, *streams):
                task.cancel()
            process._transport.close()  # type: ignore[attr-defined]  # what has left the session keeps the pipes open
        command = " ".join(self.argv)
        if out.is_too_long:
            raise AgentCrashed(
                f"{command} printed more than {MOST_OUTPUT // 2**20} MiB: what it prints is the result; write logs to "
                "standard error"
            )
        if process.returncode:
            last = err.text().strip()[-STDERR_CHARS:]
            raise AgentCrashed(f"{command} ended with status {process.returncode}: {last}")
        return out.text()


class _Output:
    """What a program writes: the first MOST_OUTPUT bytes, or of a log the last."""

    def __init__(self, stream: asyncio.StreamReader, is_log: bool = False):
        self._stream, self._is_log, self._written = stream, is_log, bytearray()
        self.is_too_long = False

    async def read(self) -> None:
        while not self.is_too_long and (chunk := await self._stream.read(CHUNK)):
            self._written += chunk
            if self._is_log:
                del self._written[: -4 * STDERR_CHARS]
            self.is_too_long = len(self._written) > MOST_OUTPUT

    def text(self) -> str:
        return self._written.decode(errors="replace")


async def _feed(stream: asyncio.StreamWriter, content: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # a program need not read
        stream.write(content)
        await stream.drain()
        stream.close()


def _without_proxy() -> dict[str, str]:
    """The endpoint is reached without the machine's proxy, as are the hosts that the machine names. The name
    in small letters is the first that programs look for."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = ",".join([*([hosts] if hosts else []), "127.0.0.1"])
    return {"no_proxy": hosts, "NO_PROXY": hosts}


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
            return await in_own_thread(self.agent, endpoint)
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
                call = request.result()
                is_open = call.answer.set_running_or_notify_cancel()  # else the agent hung up
                if is_open and not self.rollout.is_repetition(call):
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
