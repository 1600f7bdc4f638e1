"""Episodes of another library as environments. Without the library its part is played by a few
lines; with it (`pip install -e .[verifiers]`) real tasksets are written and run.
"""

import asyncio
import importlib.metadata
import importlib.util
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import envs.verifiers_adapter as adapter
from envs.problem import GraderError
from envs.verifiers_adapter import VerifiersBuilder, VerifiersGroupBuilder
from posttrain.backend.errors import ConfigError
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Renderer
from rl.message_env import ParsePolicy
from rl.rollouts import Policy, RolloutLimits, do_group_rollout
from rl.types import EnvGroupBuilder, RLDataset, TokensWithLogprobs, TrajectoryGroup

TOKENIZER = load_tokenizer("tiny")
RENDERER = get_renderer("role_colon", TOKENIZER)
LIBRARY = importlib.metadata.version("verifiers") if importlib.util.find_spec("verifiers") else ""
needs_library = pytest.mark.skipif(
    not LIBRARY or LIBRARY.startswith("0.1."), reason="the extra `verifiers` is not installed"
)


@dataclass(frozen=True)
class Turns(Policy):
    """Says the t-th text in turn t."""

    says: tuple[str, ...] = ()

    async def __call__(self, ob, stop, seed, max_tokens=None) -> TokensWithLogprobs:
        tokens = [*TOKENIZER.encode(self.says[seed[-1]]), TOKENIZER.eos_token_id]
        return TokensWithLogprobs(tokens, [0.0] * len(tokens))


async def groups(builder: VerifiersBuilder, renderer: Renderer = RENDERER) -> list[EnvGroupBuilder]:
    train, _ = await builder(renderer)
    return [group for index in range(len(train)) for group in train.get_batch(index)]


def play(
    builder: VerifiersBuilder,
    *says: str,
    limits: RolloutLimits | None = None,
    renderer: Renderer = RENDERER,
) -> TrajectoryGroup:
    async def first() -> TrajectoryGroup:
        group = (await groups(builder, renderer))[0]
        return await do_group_rollout(group, Turns(client=None, max_tokens=64, says=says), (0,), limits)  # type: ignore[arg-type]

    return asyncio.run(first())


def builder(taskset: str = "stand-in", **options: Any) -> VerifiersBuilder:
    return VerifiersBuilder(**{"taskset": taskset, "batch_size": 1, "group_size": 1} | options)


# --- with a stand-in for the library --------------------------------------------------------------


class StandIn:
    """A Host of tasks "q0", "q1", ...; `script` is an episode."""

    def __init__(self, script: Callable[..., Any], tasks: int = 3):
        self.script, self.tasks = script, list(range(tasks))

    def content(self, index: int) -> int:
        return self.tasks[index]

    async def open(self) -> None:
        pass

    async def play(self, index: int, answerer: Any) -> tuple[float, dict[str, float]]:
        return await self.script(index, answerer)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(script: Callable[..., Any], tasks: int = 3) -> None:
        standing_in = StandIn(script, tasks)
        monkeypatch.setattr(adapter, "host", lambda *source: standing_in)

    return use


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def two_turns(index: int, answerer: Any) -> tuple[float, dict[str, float]]:
    messages = [user(f"q{index}")]
    for follow_up in ("again", None):
        message = await answerer([*messages], [])
        messages += [{"role": "assistant", "content": message["content"]}]
        messages += [user(follow_up)] if follow_up else []
    return float(messages[-1]["content"] == "b"), {"reward/exact": 1.0, "turns": 2.0}


def test_an_episode_of_two_turns_extends_the_sampled_tokens(stand_in):
    stand_in(two_turns)
    group = play(builder(), " a \n", "b")
    first, second = group.trajectories_G[0].transitions
    assert group.get_total_rewards() == [1.0] and second.metrics["turns"] == 2.0 and second.metrics["reward/exact"] == 1
    assert second.ob.to_ints()[: first.ob.length + len(first.ac.tokens)] == first.ob.to_ints() + first.ac.tokens
    assert "again" in TOKENIZER.decode(second.ob.to_ints()) and group.tags == ["stand-in"]


def test_a_metric_with_the_name_of_the_runs_own_is_renamed(stand_in):
    """A user of the library cannot rename it, and would lose every rollout."""

    async def totals(index: int, answerer: Any) -> tuple[float, dict[str, float]]:
        await answerer([user("q")], [])
        return 1.0, {"reward/total": 0.25, "length": 3.0}

    stand_in(totals)
    (turn,) = play(builder(), "a").trajectories_G[0].transitions
    assert turn.metrics["reward/total_"] == 0.25 and turn.metrics["length"] == 3.0


# Trap: a library that fails, scored as 0.
def test_what_the_library_cannot_score_is_a_failed_rollout(stand_in):
    async def fails(index: int, answerer: Any) -> tuple[float, dict[str, float]]:
        await answerer([user("q")], [])
        raise KeyError("x")

    stand_in(fails)
    group = play(builder(), "a", "a")
    assert group.trajectories_G == [] and "stand-in, task" in str(group.errors[0]) and "'x'" in str(group.errors[0])

    async def silent(index: int, answerer: Any) -> tuple[float, dict[str, float]]:
        return 1.0, {}

    stand_in(silent)
    assert "ended before the policy was asked" in str(play(builder(), "a").errors[0])


def test_a_history_that_is_rewritten_is_a_failed_rollout(stand_in):
    async def forgets(index: int, answerer: Any) -> tuple[float, dict[str, float]]:
        await answerer([user("q")], [])
        await answerer([user("a summary"), user("go on")], [])
        return 1.0, {}

    stand_in(forgets)
    assert "rewrote the conversation" in str(play(builder(), "a", "b").errors[0])


def test_a_limit_of_the_run_ends_the_episode_and_it_is_scored(stand_in):
    async def endless(index: int, answerer: Any) -> tuple[float, dict[str, float]]:
        messages = [user("q")]
        while (message := await answerer([*messages], [])) is not None:
            messages += [{"role": "assistant", "content": message["content"]}, user("more")]
        return float(len(messages)), {"cut": 1.0}

    stand_in(endless)
    group = play(builder(), "a", "b", "c", limits=RolloutLimits(max_turns=2))
    assert group.trajectories_G[0].stop_reason == "max_turns" and group.get_total_rewards() == [5.0]
    assert group.trajectories_G[0].transitions[-1].metrics["cut"] == 1.0


def tasks_of(dataset: RLDataset | None) -> Sequence[int]:
    assert dataset is not None
    return sorted(group.task for index in range(len(dataset)) for group in dataset.get_batch(index))  # type: ignore[attr-defined]


def test_held_out_tasks_are_drawn_and_groups_pickle(stand_in):
    stand_in(two_turns, tasks=10)
    train, test = asyncio.run(builder(num_test=3)(RENDERER))
    assert len(tasks_of(test)) == 3 and sorted([*tasks_of(train), *tasks_of(test)]) == list(range(10))
    group = VerifiersGroupBuilder(("a", "{}", 3), 0, 2, RENDERER, ParsePolicy())
    assert pickle.loads(pickle.dumps(group)).task == 0
    with pytest.raises(ConfigError, match="num_test=10: the taskset stand-in has 10 tasks"):
        asyncio.run(builder(num_test=10)(RENDERER))


@pytest.mark.skipif(bool(LIBRARY), reason="the library is installed")
def test_without_the_library_the_error_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[verifiers\]'"):
        asyncio.run(builder()(RENDERER))


# --- with the library -----------------------------------------------------------------------------

MODULES = {
    "pt_reverse": """
import asyncio
import verifiers.v1 as vf

class Config(vf.TasksetConfig):
    words: list[str] = ["ant", "bee"]

class Data(vf.TaskData):
    answer: str

class Reverse(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def exact(self, trace: vf.Trace) -> float:
        if trace.last_reply == "raise":
            raise KeyError("x")
        if trace.last_reply == "sleep":
            await asyncio.Event().wait()
        return float(trace.last_reply == self.data.answer)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))

class Words(vf.Taskset[Reverse, Config]):
    def load(self):
        for word in self.config.words:
            yield Reverse(Data(prompt=word, answer=word[::-1], system_prompt="Reverse."), self.config.task)

__all__ = ["Words"]
""",
    "pt_broken": "import no_such_module",
    "pt_dialogue": """
import verifiers.v1 as vf

class Counted(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def turns(self, trace: vf.Trace) -> float:
        return float(len(trace.assistant_messages))

class Dialogue(vf.SingleAgentEnv):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as interaction:
            for turn in ("first", "second", "third"):
                if (await interaction.turn(turn)).terminated:
                    break

class Endless(vf.Taskset[Counted, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        while True:
            yield Counted(vf.TaskData(prompt=None), self.config.task)

__all__ = ["Endless", "Dialogue"]
""",
    "pt_echo": '''
import verifiers.v1 as vf
from verifiers.v1.types import content_text

class Echo(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "echo"

    @vf.tool
    def back(self, message: str) -> str:
        """Says the message again, with a stamp."""
        return f"{message} [ok-7f3]"

class Config(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()

class EchoTask(vf.Task[vf.TaskData, vf.State, Config]):
    @classmethod
    def toolsets(cls, config):
        return [Echo(config.tools)]

    @vf.reward
    async def echoed(self, trace: vf.Trace) -> float:
        return float(any("ok-7f3" in content_text(m.content) for m in trace.tool_messages))

class TasksetConfig(vf.TasksetConfig):
    task: Config = Config()

class EchoTaskset(vf.Taskset[EchoTask, TasksetConfig]):
    def load(self):
        return [EchoTask(vf.TaskData(prompt="Call the tool."), self.config.task)]

__all__ = ["EchoTaskset"]
if __name__ == "__main__":
    Echo.run()
''',
    "pt_container": """
import verifiers.v1 as vf

class Boxed(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    NEEDS_CONTAINER = True

class Boxes(vf.Taskset[Boxed, vf.TasksetConfig]):
    def load(self):
        return [Boxed(vf.TaskData(prompt="?"), self.config.task)]

__all__ = ["Boxes"]
""",
}


@pytest.fixture
def tasksets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")  # which the host sets for the tools' processes


@needs_library
def test_rewards_metrics_and_failures_are_the_librarys(tasksets):
    """As the hub writes its names: owner/name@version."""
    right, wrong = (play(builder("me/pt-reverse@1.0", seed=1), says) for says in ("tna", "eeb"))
    assert {right.get_total_rewards()[0], wrong.get_total_rewards()[0]} == {2.0, 0.0}
    metrics = right.trajectories_G[0].transitions[0].metrics
    assert metrics["length"] == 3.0 and metrics["reward/exact"] == right.get_total_rewards()[0]
    assert "Reverse." in TOKENIZER.decode(right.trajectories_G[0].transitions[0].ob.to_ints())
    failed = play(builder("pt-reverse"), "raise")
    assert (
        failed.trajectories_G == []
        and isinstance(failed.errors[0], GraderError)
        and "KeyError" in str(failed.errors[0])
    )
    assert asyncio.run(groups(builder("pt-reverse", env_config='{"taskset": {"words": ["a", "b", "c"]}}')))[2:]


# Trap: a reward that ran out of time, which the library counts as 0.
@needs_library
@pytest.mark.parametrize(
    ("stage", "message"),
    [("scoring", "scoring_timeout: no value of exact"), ("rollout", "the episode ended while the policy answered")],
)
def test_what_ran_out_of_its_own_time_is_a_failed_rollout(tasksets, monkeypatch, stage, message):
    say = Turns.__call__

    async def slowly(*args: Any, **kwargs: Any) -> TokensWithLogprobs:
        await asyncio.sleep(0.2 * (stage == "rollout"))
        return await say(*args, **kwargs)

    monkeypatch.setattr(Turns, "__call__", slowly)
    config = json.dumps({"agent": {"timeout": {stage: 0.05}}})
    group = play(builder("pt-reverse", env_config=config), "sleep")
    assert group.trajectories_G == [] and message in str(group.errors[0])


# Trap: tasks told apart by their numbers alone (the seed of a game), taken as one.
@needs_library
def test_no_training_task_is_equal_to_a_held_out_one(tasksets):
    words = ["ant", "bee", "ant", "cow"] * 3

    def split(taskset: str, num_test: int, **config: Any) -> tuple[Sequence[int], Sequence[int]]:
        written = json.dumps({"taskset": config})
        train, test = asyncio.run(builder(taskset, num_tasks=12, num_test=num_test, env_config=written)(RENDERER))
        return tasks_of(train), tasks_of(test)

    train, test = split("pt-reverse", 2, words=words)
    assert len(test) == 2 and train == [i for i in range(12) if words[i] not in {words[j] for j in test}]
    assert list(map(len, split("pt-dialogue", 2))) == [10, 2]
    with pytest.raises(ConfigError, match="each of the 3 tasks of pt-reverse is equal to a held-out one"):
        split("pt-reverse", 1, words=["ant"] * 3)


@needs_library
def test_a_user_that_answers_and_a_limit_on_turns(tasksets):
    group = play(builder("pt-dialogue", num_tasks=2), "a", " b \n", "c")
    assert group.get_total_rewards() == [3.0] and len(group.trajectories_G[0].transitions) == 3
    cut = play(builder("pt-dialogue", num_tasks=2), "a", "b", limits=RolloutLimits(max_turns=2))
    assert cut.get_total_rewards() == [2.0] and cut.trajectories_G[0].stop_reason == "max_turns"
    turns = builder("pt-dialogue", num_tasks=2, env_config='{"agent": {"max_turns": 1}}')
    assert play(turns, "a", "b").get_total_rewards() == [1.0]


@needs_library
def test_a_tool_is_called(tasksets):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = '<tool_call>\n{"name": "echo_back", "arguments": {"message": "hi"}}\n</tool_call>'
    group = play(builder("pt-echo"), call, "done", renderer=get_renderer("chat_template", tokenizer))
    assert group.get_total_rewards() == [1.0]
    second = group.trajectories_G[0].transitions[1]
    assert "hi [ok-7f3]" in TOKENIZER.decode(second.ob.to_ints())


@needs_library
@pytest.mark.parametrize(
    ("taskset", "config", "message"),
    [
        ("pt-nothing", "{}", "pt-nothing.*install its package first"),
        ("pt-broken", "{}", "No module named 'no_such_module'"),
        ("pt-container", "{}", "needs a container"),
        ("pt-reverse", "[]", "no JSON object"),
        ("pt-reverse", "{", "is not JSON"),
        ("pt-reverse", '{"taskset": {"wrods": []}}', "wrods"),
        ("pt-reverse", '{"id": "user-sim"}', "its agents are assistant, user"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(tasksets, taskset, config, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        asyncio.run(builder(taskset, env_config=config)(RENDERER))


# Trap: the taskset blamed for what a version of the library lacks.
@pytest.mark.parametrize("found", ["0.1.12", "0.2.1", "0.3.1"])
def test_a_version_of_the_library_that_is_not_known_is_named(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "version", lambda package: found)
    with pytest.raises(ConfigError, match=rf"verifiers {found} is installed, and 0.4 is needed, or 0.1.14 for classic"):
        adapter.host("no-such-taskset", "{}", 1)
