"""Agents that ask the policy through the OpenAI API: recorded tokens, joined conversations, failures."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from envs.agent import AgentBuilder
from envs.problem import Problem
from envs.single_turn import QuestionFile
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import ModelInput
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import encode
from rl.agent_endpoint import Endpoint
from rl.agent_env import Agent, AgentCrashed, AgentGroupBuilder, AgentRun, Program
from rl.data_processing import trajectory_rows
from rl.rollouts import Policy, RolloutLimits, do_group_rollout
from rl.types import TrajectoryGroup
from tests.conftest import Scripted


@pytest.fixture(scope="module")
def client() -> Iterator[SamplingClient]:
    with ServiceClient(BackendConfig(engine="torch")) as service:
        yield service.create_sampling_client(base_model="micro")


def roll_out(
    client: SamplingClient,
    agent: Agent,
    reward: Any = lambda run: 1.0,
    num_envs: int = 1,
    renderer: str = "chat_template",
    **limits: Any,
) -> TrajectoryGroup:
    builder = AgentGroupBuilder(agent, reward, num_envs, get_renderer(renderer, client.get_tokenizer()))
    limits = {"max_retries": 0} | limits
    return asyncio.run(do_group_rollout(builder, Policy(client, 6), (0,), RolloutLimits(**limits)))


def asking(endpoint: Endpoint) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0)


async def say(client: openai.AsyncOpenAI, messages: list[Any], text: str, **options: Any) -> str:
    """Adds the user's `text` and the policy's answer to `messages`."""
    messages.append({"role": "user", "content": text})
    answer = await client.chat.completions.create(model="any", messages=messages, **options)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    return answer.choices[0].message.content or ""


# Trap: sampled tokens decoded and encoded again on the way into the next prompt.
@pytest.mark.parametrize("renderer", ["chat_template", "role_colon"])
def test_each_conversation_is_one_row_of_the_tokens_that_were_sampled(client: SamplingClient, renderer: str) -> None:
    runs: list[AgentRun] = []

    async def agent(endpoint: Endpoint) -> str:
        policy = asking(endpoint)
        mine: list[Any] = [{"role": "system", "content": "Be brief."}]
        helper: list[Any] = []
        await say(policy, mine, "first")
        await say(policy, helper, "a sub-task")
        await say(policy, mine, "second")
        await say(policy, helper, "more of it")
        return await say(policy, mine, "third")

    def reward(run: AgentRun) -> float:
        runs.append(run)
        return 0.25

    group = roll_out(client, agent, reward, renderer=renderer)
    (trajectory,) = group.trajectories_G
    assert trajectory.reward == 0.25 and len(trajectory.transitions) == 5 and not group.errors
    assert trajectory.transitions[-1].metrics == {"agent_calls": 5.0, "conversations": 2.0}
    ((helper, mine),) = [run.conversations for run in runs]
    assert [message["content"] for message in mine][:4:2] == ["Be brief.", mine[2]["content"]]
    assert [message["role"] for message in helper] == ["user", "assistant"] * 2
    assert runs[0].result == mine[-1]["content"]
    rows = trajectory_rows(trajectory)
    assert len(rows) == 2 and rows[0].mask_T.sum() > rows[1].mask_T.sum()
    sampled = [turn.ac.tokens for turn in trajectory.transitions]
    for row, turns in ((rows[0], [0, 2, 4]), (rows[1], [1, 3])):
        masked = [token for token, mask in zip(row.tokens[1:], row.mask_T, strict=True) if mask]
        assert masked == [token for turn in turns for token in sampled[turn]]
        exact: Any = client.compute_logprobs(ModelInput.from_ints(row.tokens)).result()
        np.testing.assert_allclose(row.logprobs_T[row.mask_T > 0], np.array(exact[1:])[row.mask_T > 0], atol=1e-4)


# Trap: what the agent sends back compared with what was sampled: it was told less, or something else.
@pytest.mark.parametrize(
    ("first", "options"),
    [
        ("Thought: x\nObservation:", {"stop": ["Answer:", "Observation:"]}),
        ('I ask.\n<tool_call>\n{"name": "f", "arguments": {bad\n</tool_call><|im_end|>', {}),
    ],
    ids=["stop", "malformed call"],
)
def test_what_the_agent_was_told_continues_its_conversation(first: str, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer("tiny")
    replies = iter([encode(tokenizer, text) for text in (first, "two<|im_end|>", "three<|im_end|>")])
    runs: list[AgentRun] = []

    async def agent(endpoint: Endpoint) -> list[Any]:
        policy, messages = asking(endpoint), []
        for text in ("Q", "Go on.", "And now?"):
            await say(policy, messages, text, **options)
        return messages

    renderer = get_renderer("chat_template", tokenizer)
    builder = AgentGroupBuilder(agent, lambda run: runs.append(run) or 1.0, 1, renderer)
    group = asyncio.run(do_group_rollout(builder, Policy(Scripted(lambda prompt: next(replies)), 96), (0,)))
    (trajectory,), (run,) = group.trajectories_G, runs
    (row,) = trajectory_rows(trajectory)
    (conversation,) = run.conversations
    assert [message["role"] for message in conversation] == ["user", "assistant"] * 3
    assert not run.result[1]["content"].endswith(("Observation:", "</tool_call>"))  # what it was told
    sampled = [token for turn in trajectory.transitions for token in turn.ac.tokens]
    assert [token for token, mask in zip(row.tokens[1:], row.mask_T, strict=True) if mask] == sampled


def test_streams_tools_several_choices_and_text_completions(client: SamplingClient) -> None:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

    async def agent(endpoint: Endpoint) -> str:
        policy = asking(endpoint)
        await say(policy, [], "hi", tools=[tool])
        await say(policy, [], "hi", n=2)
        await policy.completions.create(model="x", prompt="abc", stop=["z"])
        text = ""
        async for chunk in await policy.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "hi"}], stream=True
        ):
            text += chunk.choices[0].delta.content or ""
        with pytest.raises(openai.BadRequestError, match="not offered during a rollout"):
            await say(policy, [], "hi", logprobs=True)
        return text

    texts: list[str] = []
    group = roll_out(client, agent, lambda run: texts.append(run.result) or 1.0)
    (trajectory,) = group.trajectories_G
    assert len(trajectory.transitions) == 6
    last = trajectory.transitions[4].ac.tokens
    tokenizer = client.get_tokenizer()
    assert "look" in tokenizer.decode(trajectory.transitions[0].ob.to_ints())
    assert texts == [get_renderer("chat_template", tokenizer).parse_response(last)[0]["content"]]
    assert len({tuple(turn.ac.tokens) for turn in trajectory.transitions[1:3]}) == 2


def crashes(endpoint: Endpoint) -> None:
    httpx.post(
        f"{endpoint.base_url}/completions",
        json={"model": "x", "prompt": "a"},
        headers={"authorization": f"Bearer {endpoint.api_key}"},
    ).raise_for_status()
    raise ValueError("a bug")


def silent(endpoint: Endpoint) -> None:
    return None


def leaves(endpoint: Endpoint) -> None:
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("agent", "says"),
    [
        (crashes, "the agent raised ValueError: a bug"),
        (silent, "without asking the policy"),
        (leaves, "raised SystemExit"),
        (Program([sys.executable, "-c", "raise KeyError('lost')"]), "ended with status 1: .*KeyError: 'lost'"),
        (Program(["/no/such/program"]), "cannot be started"),
    ],
    ids=["raises", "silent", "exits", "program", "missing"],
)
def test_a_crashed_agent_is_a_failed_rollout(client: SamplingClient, agent: Agent, says: str) -> None:
    group = roll_out(client, agent, num_envs=2, max_retries=1)
    assert group.trajectories_G == [] and group.final_rewards_G == [] and group.num_retries == 2
    assert [type(error) for error in group.errors] == [AgentCrashed] * 2
    with pytest.raises(AgentCrashed, match=f"(?s){says}"):
        raise group.errors[0]


def test_a_limit_of_the_run_ends_the_agent_with_a_reward(client: SamplingClient) -> None:
    ends, endpoints = [], []

    async def agent(endpoint: Endpoint) -> None:
        endpoints.append(endpoint)
        policy, messages = asking(endpoint), []
        try:
            while True:
                await say(policy, messages, "go on")
        finally:
            ends.append("cancelled")

    def reward(run: AgentRun) -> float:
        assert len(run.conversations[0]) == 4 and run.result is None
        return {"max_turns": -0.5}.get(str(run.cut_short), 9.0)

    group = roll_out(client, agent, reward, max_turns=2)
    assert (
        group.get_total_rewards() == [-0.5]
        and ends == ["cancelled"]
        and group.trajectories_G[0].stop_reason == "max_turns"
    )
    late = httpx.get(f"{endpoints[0].base_url}/models/x", headers={"authorization": f"Bearer {endpoints[0].api_key}"})
    assert late.status_code == 401 and "has ended" in late.json()["error"]["message"]
    full = roll_out(client, agent, lambda run: float(run.cut_short == "context_length"))
    assert full.get_total_rewards() == [1.0]  # and not an error that the agent would have to handle


SCRIPT = """
import sys, openai
task = sys.stdin.read()
client = openai.OpenAI()
answer = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": task}])
print(task, len(answer.choices[0].message.content))
"""


def test_a_program_with_the_openai_package(client: SamplingClient) -> None:
    results = []
    program = Program([sys.executable, "-c", SCRIPT], stdin="a task")
    group = roll_out(client, program, lambda run: results.append(run.result) or 2.0)
    assert group.get_total_rewards() == [2.0] and results[0].startswith("a task ")
    assert "a task" in client.get_tokenizer().decode(group.trajectories_G[0].transitions[0].ob.to_ints())


async def adds(problem: Problem, endpoint: Endpoint) -> str:
    await say(asking(endpoint), [], problem.question)
    return problem.gold if problem.question == "1+1" else "no"


def test_the_builder_pairs_problems_with_an_agent(client: SamplingClient, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+2", "answer": "4"}\n')
    problems = QuestionFile(train_path=str(path), answer_field="answer")
    builder = AgentBuilder(problems=problems, agent=f"{__name__}:adds", batch_size=2, group_size=2)
    renderer = get_renderer(None, client.get_tokenizer())
    train, test = asyncio.run(builder(renderer))
    groups = [asyncio.run(do_group_rollout(group, Policy(client, 4), (0,))) for group in train.get_batch(0)]
    assert sorted(group.get_total_rewards() for group in groups) == [[0.0, 0.0], [1.0, 1.0]] and test is None
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "give one of the two"),
        ({"agent": "a:b", "command": "x"}, "give one of the two"),
        ({"agent": "no_such_module:f"}, "No module named"),
        ({"agent": f"{__name__}:SCRIPT"}, "not a function"),
    ]
    for options, says in bad:
        with pytest.raises(ConfigError, match=says):
            asyncio.run(AgentBuilder(problems=problems, **options)(renderer))
