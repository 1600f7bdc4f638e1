"""Tasksets of another library, in another process. The library is played by a module of a few lines
with the names that are used of it.
"""

import asyncio
import pickle
import sys
from pathlib import Path

import pytest

import envs.verifiers_adapter as adapter
from envs.problem import GraderError
from envs.verifiers_adapter import VerifiersBuilder, VerifiersEnv
from posttrain.backend.errors import ConfigError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode, encode, eos
from rl.message_env import MessageEnvGroupBuilder
from rl.types import RLDataset

RENDERER = get_renderer("plain", character_tokenizer(512))
# The protocol of verifiers_worker.py, without verifiers: reversing words, and misbehaving when
# asked to.
STAND_IN = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request.get("taskset") == "tools":
        reply = {"failed": "ValueError: task 0 has tools"}
    elif "taskset" in request:
        words = request["config"].get("words", ["ant", "bee", "cat"])[: request["limit"]]
        reply = {"tasks": [[{"role": "user", "content": word}] for word in words]}
    elif request["answer"] == "hang":
        time.sleep(60)
    elif request["answer"] == "die":
        os._exit(3)
    elif request["answer"] == "raise":
        reply = {"failed": "KeyError: 'x'"}
    else:
        right = float(request["answer"] == words[request["task"]][::-1])
        reply = {"reward": right + 0.1, "rewards": {"exact": right, "letters": 0.1}, "metrics": {"length": len(request["answer"])}}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "worker.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(adapter, "WORKER", path)
    monkeypatch.setattr(adapter, "_WORKERS", workers := {})
    yield
    for worker in workers.values():
        worker.stop()


def builder(**options) -> VerifiersBuilder:
    return VerifiersBuilder(
        **{"taskset": "reverse", "python": sys.executable, "batch_size": 2, "scoring_seconds": 5.0} | options
    )


def step(answer: str, **options):
    train, _ = asyncio.run(builder(**options)(RENDERER))

    async def episode():
        group = pickle.loads(pickle.dumps(train.get_batch(0)[0]))
        env = (await group.make_envs())[0]
        ob, _ = await env.initial_observation()
        word = decode(RENDERER.tokenizer, ob.to_ints())
        text = answer.replace("RIGHT", word[::-1])
        return await env.step(encode(RENDERER.tokenizer, text) + eos(RENDERER.tokenizer))

    return asyncio.run(episode())


def test_prompts_and_scores_are_the_tasksets():
    result = step("RIGHT", taskset_config='{"words": ["abc", "de"]}')
    assert result.episode_done and result.reward == pytest.approx(1.1)
    assert result.metrics["reward/exact"] == 1.0 and result.metrics["reward/letters"] == pytest.approx(0.1)
    assert step("nonsense").reward == pytest.approx(0.1)


def test_every_task_is_trained_on_or_held_out():
    train, test = asyncio.run(builder(num_test=1)(RENDERER))
    assert test is not None
    tasks = [task for i in range(len(train)) for task in numbers(train, i)]
    assert sorted(tasks + numbers(test, 0)) == [0, 1, 2]
    assert numbers(train, 5) == numbers(train, 5)


def numbers(dataset: RLDataset, index: int) -> list[int]:
    groups = [group for group in dataset.get_batch(index) if isinstance(group, MessageEnvGroupBuilder)]
    return [env.task for group in groups if isinstance(env := group.env_thunk(), VerifiersEnv)]


# Trap: another library's scoring that hangs, or answers the last question.
@pytest.mark.parametrize(
    ("answer", "why"), [("raise", "KeyError"), ("die", "exit status 3"), ("hang", "more than 1 s")]
)
def test_scoring_that_fails_is_no_score_and_the_next_one_works(answer, why):
    with pytest.raises(GraderError, match=why):
        step(answer, scoring_seconds=1.0)
    assert step("RIGHT", scoring_seconds=1.0).reward == pytest.approx(1.1)


def test_what_cannot_be_run_is_refused_with_the_reason():
    for options, why in (
        ({"taskset": "tools"}, "has tools"),
        ({"python": "/no/such/python"}, "make a virtual environment"),
        ({"taskset_config": "{"}, "not JSON"),
        ({"num_test": 3}, "3 tasks"),
    ):
        with pytest.raises(ConfigError, match=why):
            asyncio.run(builder(**options)(RENDERER))


def test_an_interpreter_without_the_library_is_told_so(monkeypatch):
    monkeypatch.setattr(adapter, "WORKER", Path(adapter.__file__).with_name("verifiers_worker.py"))
    with pytest.raises(ConfigError, match=r"verifiers>=0\.4"):
        asyncio.run(builder()(RENDERER))
