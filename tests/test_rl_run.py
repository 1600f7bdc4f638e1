"""The two ends of an RL run: what it may be given from Python, when its state is collected, and
resumes that have nothing to do. And members without a turn, in everything that reads a
trajectory."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest

from envs.completion_env import ComparisonPrompts
from envs.kind_words import KindWordsComparisons
from envs.problem import Problem
from envs.problem_env import ProblemEnv
from posttrain.backend.errors import ConfigError
from posttrain.backend.losses import reinforce
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import ForwardBackwardOutput, ModelInput, TensorData
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message
from posttrain.tracking.progress import TrainingProgress
from preference.bradley_terry import ScalarBatchReward
from preference.prm import PrmReward, ProcessReward, StepScores
from rl import train
from rl.advantages import NoBaseline
from rl.data_processing import rows_of
from rl.evaluators import sample_metrics
from rl.group_sources import GroupSource
from rl.kl import KLPenalty
from rl.likelihood_reward import LikelihoodReward, LikelihoodRewardBuilder
from rl.metrics import compute_trajectory_metrics
from rl.step_checks import beyond_context, short_batches
from rl.transcripts import write_rollouts
from rl.types import EnvGroupBuilder, StepResult, TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition
from tests.conftest import rounded
from tests.test_group_sources import LowTokenBuilder, LowTokenDataset, LowTokenEnv, config, metrics

TINY = load_tokenizer("tiny")


def run(folder: Path, behavior: str = "delete", **settings: Any) -> dict[str, float]:
    settings = {"model_name": "micro", "behavior_if_log_dir_exists": behavior} | settings
    return asyncio.run(train.main(chz.replace(config(folder), **settings)))


def files(folder: Path) -> dict[str, bytes]:
    """All that a run has written, without pictures, the lock, the configuration and the record of
    the code.
    """
    kept = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "plots"]
    passed_over = ("config.json", "config_changes.jsonl", "code.diff", "lock")
    return {str(path): path.read_bytes() for path in kept if path.name not in passed_over}


# Trap: a finished run trained on, or written again, by a resume.
def test_a_run_that_is_resumed_at_its_end_or_past_it_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run(tmp_path, max_steps=2, save_every=0, eval_every=0)
    before = files(tmp_path)
    for max_steps in (2, 1):
        capsys.readouterr()
        again = run(tmp_path, "resume_changed", max_steps=max_steps, save_every=0, eval_every=0)
        assert files(tmp_path) == before
        assert again["env/all/reward/total"] == last["env/all/reward/total"]
        output = capsys.readouterr().out
        assert "nothing to train" in output and "env/all/reward/total" in output


def test_an_unfinished_run_past_the_steps_that_are_asked_for_is_left_as_it_is(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TrainingProgress, "update", lambda self, step, metrics: stop_at_step_3(step, Stop))
        run(tmp_path, max_steps=6, save_every=3, eval_every=0)
    before = files(tmp_path)
    run(tmp_path, "resume_changed", max_steps=2, eval_every=0)
    assert {path for path in files(tmp_path) if "checkpoints" in path} == {
        path for path in before if "checkpoints" in path
    }


def stop_at_step_3(step: int, error: type[Exception]) -> None:
    if step == 3:
        raise error


def test_a_function_may_be_the_loss(tmp_path: Path) -> None:
    run(tmp_path / "name", loss_fn="reinforce", max_steps=1)
    run(tmp_path / "function", loss_fn=reinforce, max_steps=1)
    # Not bit for bit: of a function nobody knows that an advantage of 0 has no gradient, so it is
    # computed.
    by_function, by_name = (
        [record["optim/loss"] for record in metrics(tmp_path / kind)] for kind in ("function", "name")
    )
    assert by_function == pytest.approx(by_name, rel=rounded(1e-4)) and len(by_name) == 1


# Trap: the group's advantage beside each token, where a critic, a teacher, KL or normalisation gave another one.
def test_a_transcript_shows_the_advantages_that_tokens_are_trained_with(tmp_path: Path) -> None:
    settings = {"normalize_advantages": True, "entropy_coef": 0.5, "transcript_every": 1, "num_groups_to_log": 9}
    run(tmp_path, max_steps=1, **settings)
    lines = (tmp_path / "transcripts" / "000000.jsonl").read_text().splitlines()
    shown = np.concatenate([turn["advantages"] for line in map(json.loads, lines) for turn in line["turns"]])
    assert (shown.mean(), shown.std()) == pytest.approx((0, 1), abs=rounded(1e-5)) and len(set(shown)) > len(shown) / 2


# Trap: a run whose rewards are all equal, which trains on nothing from its first step to its last, without a word.
@pytest.mark.parametrize(
    ("reward", "settings", "said"),
    [
        (1.0, {}, "step 1: nothing to learn: all 12 rollouts have the reward 1, so"),
        (None, {}, "all rollouts have the same reward, so every advantage is 0. max_tokens cut off 12 of 12 answers"),
        (1.0, {"kl": KLPenalty(coef=0.1)}, "so every advantage is 0"),
        (1.0, {"entropy_coef": 0.1}, None),
        (1.0, {"advantage": NoBaseline()}, None),
    ],
)
def test_steps_that_teach_nothing_are_said_once(
    reward: float | None, settings: Any, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    async def step(self: LowTokenEnv, action: list[int]) -> StepResult:
        return StepResult(self.number if reward is None else reward, True, ModelInput.empty())

    monkeypatch.setattr(LowTokenEnv, "step", step)
    run(tmp_path, max_steps=2, **settings)
    output = capsys.readouterr().out
    assert output.count("nothing to learn") == (said is not None) and (said or "") in output


def test_finished_groups_become_json_only_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(GroupSource, "state", lambda self: calls.append(1) or [])
    run(tmp_path, max_steps=3, save_every=2)
    assert len(calls) == 1


def test_a_resume_with_smaller_batches_is_refused_by_name() -> None:
    async def restore() -> None:
        group = {"trajectories": [], "final_rewards": [], "metrics": [], "tags": [], "errors": []}
        saved = {"batch": 1, "place": 3, "group": group | {"num_retries": 0, "sampled_at_step": 0}}
        async with GroupSource(LowTokenDataset(LowTokenBuilder(batch_size=2)), 6, 4) as source:
            source.restore([saved])

    with pytest.raises(
        ConfigError, match=r"group 3 of batch 1, and LowTokenDataset.get_batch\(1\) now has only 2 groups"
    ):
        asyncio.run(restore())


# --- members without a turn ---------------------------------------------------------------------


class Answered(EnvGroupBuilder):
    answer_tokens = [9, 9]

    def rationale(self, action: list[int]) -> tuple[list[int], bool]:
        return action, True

    async def make_envs(self) -> Sequence[Any]:
        return []


def test_a_reward_that_cannot_read_the_groups_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LowTokenGroup has no answer_tokens and rationale"):
        asyncio.run(train.main(config(tmp_path / "run", batch_reward=LikelihoodRewardBuilder())))
    assert not (tmp_path / "run").exists()


def two_members() -> TrajectoryGroup:
    """One turn that is right, and none."""
    turn = Transition(
        ModelInput.from_ints([1, 2]),
        TokensWithLogprobs([3, 4], [-0.1, -0.2]),
        1.0,
        True,
        {"correct": 1.0},
        {"extracted": "4"},
    )
    return TrajectoryGroup([Trajectory([turn]), Trajectory([])], [0.0, -1.0], [{}, {}], builder=Answered())


class ConstantScores:
    """A reward model, a process reward model and a training client that score all they are asked
    for with 0.5.
    """

    max_length = 100

    async def score_tokens(self, tokens_D: Sequence[Any]) -> list[float]:
        return [0.5 for _ in tokens_D]

    async def score(self, responses_D: Sequence[Any]) -> list[StepScores]:
        return [StepScores(np.array([0.5]), [0, 2], None) for _ in responses_D]

    async def forward_terms(self, terms: Sequence[Any], keep: bool) -> list[ForwardBackwardOutput]:
        return [
            ForwardBackwardOutput(
                [{"logprobs": TensorData(np.full(d.model_input.length, -0.25))} for d in term.data_D], {"loss:sum": 0.0}
            )
            for term in terms
        ]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (ScalarBatchReward(ConstantScores(), 2.0), 2.0),  # type: ignore[arg-type]
        (ProcessReward(ConstantScores(), PrmReward(path="", coef=1.0)), 1.5),  # type: ignore[arg-type]
        (ProcessReward(ConstantScores(), PrmReward(path="", per_step=True)), 1.0),  # type: ignore[arg-type]
        (LikelihoodReward(ConstantScores(), LikelihoodRewardBuilder()), 0.5),  # type: ignore[arg-type]
    ],
    ids=["reward model", "process reward", "process reward per step", "likelihood"],
)
def test_a_member_without_a_turn_keeps_its_reward_and_has_nothing_to_score(reward: Any, expected: float) -> None:
    group = two_members()
    asyncio.run(reward([group]))
    assert group.get_total_rewards() == [expected, -1.0] and not group.trajectories_G[1].supervised


def test_a_member_without_a_turn_counts_in_the_metrics_and_not_in_the_data(tmp_path: Path) -> None:
    group = two_members()
    found = compute_trajectory_metrics([group])
    assert (found["env/all/reward/total"], found["env/all/total_episodes"], found["env/all/total_turns"]) == (0.0, 2, 1)
    assert sample_metrics([group], [1, 2], "test")["test/pass@1"] == 0.5
    assert [row.origin for row in rows_of([group])] == [(0, 0)]
    lines = write_rollouts(tmp_path, 0, [group], [np.array([1.0, -1.0])], TINY).with_suffix(".jsonl").read_text()
    assert [len(json.loads(line)["turns"]) for line in lines.splitlines()] == [1, 0]
    nobody = TrajectoryGroup([Trajectory([])], [2.0], [{}])
    assert compute_trajectory_metrics([nobody]) == {"env/all/total_episodes": 1.0}


# --- names and prompts of the user's ------------------------------------------------------------


def test_a_problem_may_have_a_prompt_of_its_own() -> None:
    class Poem(ProblemEnv):
        prompt = "a poem about "

        def build_prompt(self) -> ModelInput:
            return self.renderer.build_generation_prompt([Message(role="user", content=self.prompt + self.question())])

    env = Poem(Problem("rain", ""), get_renderer("plain", TINY))
    assert "a poem about rain" in TINY.decode(env.build_prompt().to_ints()) and env.prompt == "a poem about "


def test_fewer_problems_than_a_batch_are_trained_on_and_said() -> None:
    class Few(LowTokenDataset):
        def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
            return super().get_batch(index)[:3]

    whole, few = LowTokenBuilder(n_batches=1), LowTokenBuilder(n_batches=2)
    assert short_batches(whole, LowTokenDataset(whole)) is None and short_batches(few, Few(few)) is None
    assert (
        short_batches(whole, Few(whole))
        == "env.batch_size=4 is more than the 3 problems: every batch holds all of them"
    )


def test_answers_longer_than_the_context_are_said_to_be_cut_off() -> None:
    """AIME asks for 8,192 tokens, and the context is 4,096 unless backend.max_length says otherwise."""
    context = TINY.model_max_length
    assert beyond_context(context - 1, TINY) is None
    assert f"max_tokens={context}, but the context is {context} tokens" in (beyond_context(context, TINY) or "")


def test_equal_prompts_of_comparisons_are_counted_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    train_prompts, _ = ComparisonPrompts(comparisons=KindWordsComparisons(num_train=200, test_size=20))()
    output = capsys.readouterr().out
    assert f"200 training comparisons are of {len(train_prompts)} different prompts" in output
    assert len({json.dumps(prompt) for prompt in train_prompts}) == len(train_prompts) < 200
