"""An agent of a library, `openai-agents`, unchanged, in an interpreter of its own: its calls are
recorded as one trajectory. Skipped where the library is not installed:

    python -m venv agents && agents/bin/pip install openai-agents && export AGENTS_PYTHON=agents/bin/python
"""

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer, get_tool_calls
from posttrain.renderers.turns import decode, encode
from posttrain.tracking.metrics_log import read_metrics
from recipes.agent.shop import use_tool
from recipes.agent.train import Config, demonstration, main
from rl.agent_env import AgentGroupBuilder, AgentRun, Program
from rl.data_processing import trajectory_rows
from rl.rollouts import Policy, RolloutLimits, do_group_rollout
from tests.conftest import Scripted

INTERPRETER = Path(os.environ.get("AGENTS_PYTHON", "agents/bin/python"))
SCRIPT = '''
import os, sys
from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)

@function_tool
def price(item: str) -> str:
    """The price of an item."""
    return {"tea": "17"}.get(item, "unknown")

model = OpenAIChatCompletionsModel(model=os.environ["OPENAI_MODEL"], openai_client=AsyncOpenAI(max_retries=0))
shop = Agent(name="shop", instructions="Use the tools.", tools=[price], model=model)
print(Runner.run_sync(shop, sys.stdin.read()).final_output)
'''
CALL = '<tool_call>\n{"name": "price", "arguments": {"item": "tea"}}\n</tool_call><|im_end|>'
TOKENIZER = load_tokenizer("tiny")


def call_then_repeat(prompt: list[int]) -> list[int]:
    """Calls the tool, and repeats what it said."""
    answered = "<tool_response>\n17" in decode(TOKENIZER, prompt)
    return encode(TOKENIZER, "It costs 17.<|im_end|>" if answered else CALL)


def library_is_missing() -> str | None:
    if not INTERPRETER.exists():
        return f"openai-agents is not installed: {INTERPRETER} does not exist (set AGENTS_PYTHON)"
    probe = subprocess.run([INTERPRETER, "-c", "import agents"], capture_output=True, text=True)
    return f"{INTERPRETER} cannot import openai-agents" if probe.returncode else None


@pytest.mark.slow
def test_an_agent_of_a_library_is_one_trajectory() -> None:
    if reason := library_is_missing():
        pytest.skip(reason)
    runs: list[AgentRun] = []

    def reward(run: AgentRun) -> float:
        runs.append(run)
        return float("17" in run.result)

    client = Scripted(call_then_repeat)
    program = Program([str(INTERPRETER), "-c", SCRIPT], stdin="What does tea cost?")
    builder = AgentGroupBuilder(program, reward, 1, get_renderer("chat_template", TOKENIZER))
    limits = RolloutLimits(max_retries=0, env_seconds=300)
    group = asyncio.run(do_group_rollout(builder, Policy(client, 96), (0,), limits))
    assert not group.errors and group.get_total_rewards() == [1.0] and runs[0].result.strip() == "It costs 17."
    prompt = decode(TOKENIZER, client.prompts[0])
    assert "The price of an item." in prompt and "Use the tools." in prompt
    (conversation,) = runs[0].conversations
    assert [message["role"] for message in conversation] == ["system", "user", "assistant", "tool", "assistant"]
    (call,) = get_tool_calls(conversation[2])
    assert call["type"] == "tool_call" and (call["name"], call["arguments"]) == ("price", {"item": "tea"})
    (trajectory,) = group.trajectories_G
    (row,) = trajectory_rows(trajectory)  # the second request extends the first, token for token
    sampled = [token for turn in trajectory.transitions for token in turn.ac.tokens]
    assert [token for token, mask in zip(row.tokens[1:], row.mask_T, strict=True) if mask] == sampled


@pytest.mark.slow
def test_the_recipe_trains_an_agent(tmp_path: Path) -> None:
    """Two steps of each stage, for the plumbing; its README has the curve."""
    config = Config(seeds="0", model_name="micro", warm_start_steps=2, num_steps=2, log_path=str(tmp_path))
    asyncio.run(main(config))
    records = [r for r in read_metrics(tmp_path / "seed_0" / "rl") if "env/all/agent_calls" in r]
    assert len(records) == 2 and all(record["env/all/agent_calls"] >= 1 for record in records)
    assert (tmp_path / "agent.png").exists()


def test_the_recipes_demonstrations_and_tools() -> None:
    rng = np.random.default_rng(0)
    shown = [demonstration(rng) for _ in range(400)]
    right = [messages[0]["content"].split()[0] == called(messages) for messages in shown]
    assert 0.58 < np.mean(right) < 0.72
    assert all(messages[-1]["content"] == messages[-2]["content"] for messages in shown)
    assert use_tool("price", '{"item": "tea"}') == "13" and use_tool("stock", '{"item": "oil"}') == "91"
    assert {use_tool("x", "{}"), use_tool("price", "no JSON"), use_tool("price", "[]")} == {
        "there is no such tool or item"
    }


def called(messages: list[dict[str, Any]]) -> str:
    return messages[1]["tool_calls"][0]["function"]["name"]
