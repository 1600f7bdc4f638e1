"""Agents that are careless guests: programs that leave processes or flood their output, functions that never
return, and HTTP libraries that ask again."""

import asyncio
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer, get_tool_calls
from posttrain.renderers.turns import encode
from posttrain.serve.openai_answers import with_call_ids
from rl import agent_env
from rl.agent_endpoint import GATEWAY, Endpoint
from rl.agent_env import Agent, AgentCrashed, AgentGroupBuilder, AgentRun, Program
from rl.data_processing import trajectory_rows
from rl.rollouts import Policy, RolloutLimits, do_group_rollout
from rl.tools import answer_call, tool, tools_by_name
from rl.types import TrajectoryGroup
from tests.conftest import Scripted
from tests.processes import PATIENCE, runs, wait_until

TOKENIZER = load_tokenizer("tiny")
HELLO = [{"role": "user", "content": "hi"}]
# asks once, as a program without the openai package does
ASKS = """
import json, os, subprocess, sys, urllib.request
head = {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
body = json.dumps({"model": "x", "messages": [{"role": "user", "content": "hi"}]}).encode()
urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, head)).read()
"""


def roll_out(agent: Agent, answer: Any = lambda prompt: said("hello"), **limits: Any) -> tuple[TrajectoryGroup, Any]:
    judged: list[AgentRun] = []
    builder = AgentGroupBuilder(
        agent, lambda run: judged.append(run) or 1.0, 1, get_renderer("chat_template", TOKENIZER)
    )
    limits = {"max_retries": 0, "env_seconds": PATIENCE} | limits
    policy = Policy(Scripted(answer), 96)
    return asyncio.run(do_group_rollout(builder, policy, (0,), RolloutLimits(**limits))), judged


def said(text: str) -> list[int]:
    return encode(TOKENIZER, f"{text}<|im_end|>")


def ask(endpoint: Endpoint, messages: list[Any], timeout: float | None = None, **fields: Any) -> dict[str, Any]:
    head, body = {"authorization": f"Bearer {endpoint.api_key}"}, {"model": "x", "messages": messages} | fields
    answer = httpx.post(f"{endpoint.base_url}/chat/completions", json=body, headers=head, timeout=timeout)
    return answer.raise_for_status().json()["choices"][0]["message"]


def program(code: str) -> Program:
    return Program([sys.executable, "-c", ASKS + code])


# Trap: the end of the output waited for, which a server that the program has started never ends.
@pytest.mark.parametrize("leaves", [False, True], ids=["its session", "a session of its own"])
def test_a_program_has_ended_though_what_it_started_goes_on(leaves: bool) -> None:
    started = "import time; time.sleep(300)"
    group, (run,) = roll_out(
        program(f"p = subprocess.Popen([sys.executable, '-c', {started!r}], start_new_session={leaves})\nprint(p.pid)")
    )
    pid = int(run.result)
    assert group.get_total_rewards() == [1.0]
    if leaves:
        os.kill(pid, 9)
    wait_until(lambda: not runs(pid))


def test_a_flood_of_output_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_env, "MOST_OUTPUT", 2**20)
    group, _ = roll_out(program("while True: print('x' * 1000)"))
    assert [type(error) for error in group.errors] == [AgentCrashed]
    assert "printed more than 1 MiB" in str(group.errors[0])
    group, (run,) = roll_out(program("sys.stderr.write('x' * 3 * 2**20); print('done')"))
    assert run.result == "done\n" and not group.errors
    group, _ = roll_out(program("sys.stderr.write('x' * 3 * 2**20); sys.exit('the last words')"))
    assert "status 1" in str(group.errors[0]) and str(group.errors[0]).endswith("the last words")


def test_a_program_reaches_the_endpoint_where_the_machine_has_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intranet")
    group, (run,) = roll_out(program("print(os.environ['no_proxy'], os.environ['NO_PROXY'])"))
    assert not group.errors and run.result == "intranet,127.0.0.1 intranet,127.0.0.1\n"


# Trap: functions in threads of a pool, which those that never return fill; all later ones then wait for ever.
def test_functions_that_never_return_keep_nobody_waiting() -> None:
    release = threading.Event()

    def hangs(endpoint: Endpoint) -> None:
        ask(endpoint, HELLO)
        release.wait()

    @tool
    def waits() -> str:
        """Waits."""
        return str(release.wait())

    @tool
    def answers() -> str:
        """Answers."""
        return "42"

    async def rollouts() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        renderer, policy = get_renderer("chat_template", TOKENIZER), Policy(Scripted(lambda prompt: said("hello")), 96)
        groups = []
        for agent, seconds in ((hangs, 0.5), (lambda endpoint: ask(endpoint, HELLO)["content"], PATIENCE)):
            builder = AgentGroupBuilder(agent, lambda run: float(run.result == "hello"), 2, renderer)
            limits = RolloutLimits(max_retries=0, env_seconds=seconds)
            groups.append((await do_group_rollout(builder, policy, (0,), limits)).get_total_rewards())
        for name, seconds in (("waits", 0.1), ("answers", PATIENCE)):
            call: Any = {"type": "tool_call", "name": name, "arguments": {}}
            try:
                groups.append(await answer_call(call, tools_by_name([waits, answers]), seconds))
            except Exception as error:
                groups.append(str(error))
        return groups

    try:
        assert asyncio.run(rollouts()) == [[], [1.0, 1.0], "waits took longer than 0.1 s", "42"]
    finally:
        release.set()


# Trap: a turn sampled twice, of which the agent saw one; both are trained with what came of the one.
def test_a_request_repeated_after_a_time_out_gets_the_answer_it_did_not_wait_for() -> None:
    answers = iter(["one", "two", "three"])
    gave_up = threading.Event()

    def agent(endpoint: Endpoint) -> str:
        rollout = GATEWAY.rollouts[endpoint.api_key]
        with pytest.raises(httpx.ReadTimeout):
            ask(endpoint, HELLO, timeout=0.2)
        wait_until(lambda: any(call.hung_up for call in list(rollout._waiting)))
        gave_up.set()
        first = ask(endpoint, HELLO)
        again = ask(endpoint, HELLO)  # on purpose: another sample
        then = ask(endpoint, [*HELLO, {"role": "assistant", "content": first["content"]}, *HELLO])
        return " ".join(message["content"] for message in (first, again, then))

    def answer(prompt: list[int]) -> list[int]:
        gave_up.wait(PATIENCE)
        return said(next(answers))

    group, (run,) = roll_out(agent, answer)
    (trajectory,) = group.trajectories_G
    assert run.result == "one two three" and len(trajectory.transitions) == 3
    assert [len(messages) for messages in run.conversations] == [2, 4] and len(trajectory_rows(trajectory)) == 2


# Trap: the history compared as text: what a program in JavaScript sends back of 1.0 is 1.
def test_arguments_that_were_written_again_continue_the_conversation() -> None:
    calls = [{"name": "f", "arguments": {"b": 1.0, "a": "\u00e9"}}, {"name": "g", "arguments": {"x": [2.0, None]}}]
    text = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]

    def agent(endpoint: Endpoint) -> None:
        message = ask(endpoint, HELLO, tools=tools)
        told = [call["function"] for call in message["tool_calls"]]
        told[0]["arguments"], told[1]["arguments"] = '{"a":"é","b":1}', '{"x":[2,null]}'
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in message["tool_calls"]]
        # libraries add fields of their own, and leave out what is null
        kept = {"role": "assistant", "tool_calls": message["tool_calls"], "refusal": None, "audio": None}
        ask(endpoint, [*HELLO, kept, *results], tools=tools)

    answers = iter([said(text), said("done")])
    group, (run,) = roll_out(agent, lambda prompt: next(answers))
    assert not group.errors and len(run.conversations) == 1
    (trajectory,) = group.trajectories_G
    (row,) = trajectory_rows(trajectory)
    sampled = [token for turn in trajectory.transitions for token in turn.ac.tokens]
    assert [token for token, mask in zip(row.tokens[1:], row.mask_T, strict=True) if mask] == sampled


# Trap: calls counted anew in each answer. openai-agents refuses an id that an earlier call had, and some chat
# templates look for a tool's name by it.
@pytest.mark.parametrize("stream", [False, True])
def test_no_two_calls_of_a_conversation_have_one_id(stream: bool) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

    def agent(endpoint: Endpoint) -> list[str]:
        client = openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0)
        messages: list[Any] = [*HELLO]
        for _ in range(2):
            asked: Any = {"model": "x", "messages": messages, "tools": tools}
            if stream:
                with client.chat.completions.stream(**asked) as events:
                    message = events.get_final_completion().choices[0].message
            else:
                message = client.chat.completions.create(**asked).choices[0].message
            messages += [message.model_dump(include={"role", "content", "tool_calls"})]
            messages += [{"role": "tool", "tool_call_id": c.id, "content": "ok"} for c in message.tool_calls or []]
        ask(endpoint, messages, tools=tools)
        return [message["tool_call_id"] for message in messages if message["role"] == "tool"]

    answers = iter([said(f"{call}\n{call}"), said(call), said("done")])
    group, (run,) = roll_out(agent, lambda prompt: next(answers))
    assert not group.errors and len(run.conversations) == 1
    calls = [call for message in run.conversations[0] for call in get_tool_calls(message)]
    assert [call["id"] for call in calls] == run.result and len({*run.result}) == 3
    assert all(len(name) == 9 and name.isalnum() for name in run.result)  # as Mistral's template wants them


def test_an_id_of_a_call_is_a_function_of_prompt_and_call_and_the_models_own_stays() -> None:
    def named(identity: str, prompt: list[int]) -> str:
        part: Any = {"type": "tool_call", "id": identity, "name": "f", "arguments": {}}
        (call,) = get_tool_calls(with_call_ids({"role": "assistant", "content": "", "parts": [part]}, prompt))
        return call["id"]

    assert named("call00001", [1, 2]) == named("call00001", [1, 2]) != named("call00001", [1, 3])
    assert named("a1B2c3D4e", [1, 2]) == "a1B2c3D4e"
