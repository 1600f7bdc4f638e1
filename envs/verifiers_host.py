"""The verifiers library (0.4) in this process: its episodes run as they are, and every call of a
model is handed to the policy. The library's own loop for chats and tools would be a subprocess for
each rollout; here it is a coroutine. Imported by verifiers_adapter.py only, for it needs the extra.
"""

# pyright: reportMissingImports=false
# (verifiers is an extra)

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import verifiers.v1 as vf
from verifiers.v1.clients import Client, ModelContext, TrainClientConfig
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.errors import HarnessError, model_error
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.interception import InterceptionServer
from verifiers.v1.runtimes import ProgramResult
from verifiers.v1.utils.loaders import default_harness_id, load_environment, resolve_env_config

from envs.verifiers_calls import Answerer, EpisodeFailed, chat_completion

HARNESS = "posttrain_chat"  # the library finds a harness by its module
sys.modules.setdefault(f"verifiers.v1.harnesses.{HARNESS}", sys.modules[__name__])
__all__ = ["ChatHarness"]
_ANSWERERS: dict[str, Answerer] = {}  # of the episodes in flight, by the address of their client


# --- the model ------------------------------------------------------------------------------------


class PolicyClient(Client):
    """A client that asks the Answerer of its episode."""

    def __init__(self, answerer: Answerer):
        self.answerer = answerer

    async def get_response(self, dialect: Any, body: dict[str, Any], *_: Any, **__: Any) -> Any:
        if not isinstance(body.get("messages"), list):
            raise model_error(f"only chat completions are served, not {type(dialect).__name__}", status_code=400)
        message = await self.answerer(body["messages"], body.get("tools") or [])
        if message is None:
            raise model_error("maximum context length exceeded: a limit of the run", status_code=400)
        raw = chat_completion(message, str(body.get("model")))
        response = dialect.parse_response(dialect.validate_response(raw))
        response.raw = raw
        return response


class PolicyServer(InterceptionServer):
    """The library's server of model calls, on the loopback address, with the policy as a model."""

    def _client(self, config: Any) -> Any:
        answerer = _ANSWERERS.get(config.base_url)
        return PolicyClient(answerer) if answerer else super()._client(config)


class ChatHarnessConfig(HarnessConfig):
    pass


class ChatHarness(Harness[ChatHarnessConfig]):
    """The conversation until the model calls no tool, in this process."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    SUPPORTS_TOOL_INTERCEPTION = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: Mapping[str, str],
        data: Any,
        tool_interception_url: str | None = None,
    ) -> ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        messages += (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else [message_to_wire(message) for message in prompt or []]
        )
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        headers = {"Authorization": f"Bearer {secret}"}
        async with AsyncExitStack() as stack, httpx.AsyncClient(timeout=None, headers=headers, trust_env=False) as http:
            tools, *connected = await connect_mcp({"mcpServers": servers}, stack, set())
            while True:
                body = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
                reply = await http.post(f"{endpoint}/chat/completions", json=body)
                if reply.status_code != 200:
                    if trace.stop_condition is None and "maximum context length" not in reply.text:
                        raise HarnessError(f"the model call failed: {reply.text[:300]}")
                    break
                messages.append(reply.json()["choices"][0]["message"])
                calls = messages[-1].get("tool_calls")
                if not calls:
                    break
                messages += [await _result(call, connected, http, tool_interception_url) for call in calls]
        return ProgramResult(0, "", "")


async def _result(call: Mapping[str, Any], connected: Any, http: httpx.AsyncClient, gate: str | None) -> dict[str, Any]:
    """A tool's answer; what is wrong with a call is told to the model."""
    dispatch, servers = connected
    name, written = call["function"]["name"], call["function"]["arguments"] or "{}"
    answer = {"role": "tool", "tool_call_id": call["id"], "name": name}
    try:
        arguments = json.loads(written)
    except ValueError as error:
        return answer | {"content": f"error: the arguments are no JSON ({error})"}
    if gate:
        asked = await http.post(gate, json={"tool_call_id": call["id"], "name": name, "arguments": arguments})
        decision = asked.raise_for_status().json()
        if decision["action"] == "stop":
            raise HarnessError(decision["reason"])
        if decision["action"] == "deny":
            return decision["message"]
    if not isinstance(arguments, dict):
        return answer | {"content": "error: the arguments must be a JSON object"}
    if name not in dispatch:
        return answer | {"content": f"error: there is no tool {name!r}"}
    return answer | {"content": await call_mcp(servers, dispatch, name, arguments)}


# --- an environment -------------------------------------------------------------------------------


class Host:
    """An environment of the library with its first `limit` tasks. Any exception of the library may
    come out of the constructor."""

    def __init__(self, taskset: str, config: Mapping[str, Any], limit: int):
        logging.getLogger("verifiers").setLevel(logging.ERROR)
        _let_tools_import()
        settings = resolve_env_config(_with_defaults(taskset, config))
        seats = agent_config_fields(settings)
        played = [name for name, agent in seats.items() if agent.client is None]
        if len(played) != 1:
            raise ValueError(
                f"its agents are {', '.join(seats)}; the policy plays one: give the others a model and a client"
            )
        self.seat = played[0]
        self.env = load_environment(settings)
        self.tasks = list(self.env.taskset.take(limit))
        for task in self.tasks:
            if task.NEEDS_CONTAINER or task.data.image:
                raise ValueError(f"task {task.data.idx} needs a container")
        self._serving: dict[asyncio.AbstractEventLoop, tuple[asyncio.Task[None], asyncio.Future[None]]] = {}

    def content(self, index: int) -> str:
        """The task's data without its labels. A task without a prompt may be made from its number
        (a game's seed): it keeps them, and equals no other."""
        data = self.tasks[index].data
        return data.model_dump_json(exclude={"idx", "id", "name", "description"} if data.prompt else None)

    async def open(self) -> None:
        """Starts the library's servers, once for an event loop; they end with it."""
        loop = asyncio.get_running_loop()
        if loop not in self._serving:
            ready: asyncio.Future[None] = loop.create_future()
            self._serving = {loop: (loop.create_task(self._serve(ready)), ready)}
        await asyncio.shield(self._serving[loop][1])

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        try:
            async with self._servers():
                ready.set_result(None)
                await asyncio.Event().wait()
        except Exception as error:
            if not ready.done():
                ready.set_exception(error)
            else:
                raise

    @asynccontextmanager
    async def _servers(self):
        """As Env.serving, with the policy's server."""
        env = self.env
        async with env.shared_tools() as shared:
            secrets = tuple(server.state_secret for server in shared.values() if server.state_secret)
            async with PolicyServer(state_service_secrets=secrets) as server:
                env._shared_tools, env._interception = shared, server
                try:
                    await env.start()
                    yield
                finally:
                    await env.stop()

    async def play(self, index: int, answerer: Answerer) -> tuple[float, dict[str, float]]:
        """One episode: the policy's reward, and the library's metrics and weighted rewards.
        EpisodeFailed, with its reason, where the library cannot score it."""
        address = f"posttrain://{uuid4().hex}"
        _ANSWERERS[address] = answerer
        try:
            context = ModelContext("policy", TrainClientConfig(base_url=address, api_key_var=""), vf.Sampling())
            episode = await self.env.run_episode(self.tasks[index], context)
        finally:
            del _ANSWERERS[address]
        traces = [trace for trace in episode.traces if trace.agent.name in (None, self.seat)]
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if not episode.ok or len(traces) != 1:
            raise EpisodeFailed(
                "; ".join(f"{error.type}: {error.message}" for error in errors[:2])
                or f"the policy played {len(traces)} times, not once"
            )
        trace = traces[0]
        unscored = [name for name, reward in trace.rewards.items() if reward is None]
        if unscored or trace.stop_condition in ("finalize_timeout", "scoring_timeout"):  # which the library counts as 0
            raise EpisodeFailed(f"{trace.stop_condition}: no value of {', '.join(unscored) or 'its rewards'}")
        values = {f"reward/{name}": reward.value for name, reward in trace.rewards.items() if reward is not None}
        values |= {name: value for name, value in trace.metrics.items() if value is not None}
        return trace.reward, values


def _let_tools_import() -> None:
    """A tool's process runs a module of the taskset, in a folder of its own: PYTHONPATH names the folders,
    beside Python's, where this process finds modules. The library waits 180 s for a process that is dead."""
    pythons = (os.path.join(sys.prefix, ""), os.path.join(sys.base_prefix, ""))
    folders = [os.path.abspath(folder) for folder in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if not folder.startswith(pythons))


def _with_defaults(taskset: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the taskset's name, and for each agent this file's harness and a local runtime."""
    settings = dict(config)
    settings["taskset"] = {**settings.get("taskset", {}), "id": taskset}
    seats = agent_config_fields(resolve_env_config({**settings}))
    defaults: dict[str, Any] = {"runtime": {"type": "subprocess"}}
    if default_harness_id(taskset) == "bash":  # the library's own; it would let the model run programs here
        defaults["harness"] = {"id": HARNESS}
    for name in seats:
        settings[name] = defaults | dict(settings.get(name, {}))
    return settings
