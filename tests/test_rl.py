"""Flattening, advantages, metrics and rollouts, against hand-computed cases; and the estimator's
expectation against the true gradient.
"""

import asyncio
import time
from collections.abc import Sequence
from copy import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import Datum, ModelInput, TensorData
from posttrain.tracking.seeds import sampling_seed
from rl.advantages import BatchMean, GroupMean, GroupMeanStd, LeaveOneOut, NoBaseline, SeatMean
from rl.data_processing import compute_advantages, rows_of, split_substeps, trainable_groups, with_advantages
from rl.evaluation_results import problem_values
from rl.evaluators import sample_metrics
from rl.metrics import compute_sampling_metrics, compute_trajectory_metrics
from rl.rollouts import Policy, do_rollouts
from rl.step_checks import reward_and_metrics
from rl.types import (
    Env,
    EnvGroupBuilder,
    MalformedStep,
    Metrics,
    Observation,
    RolloutError,
    StepResult,
    StopCondition,
    TokensWithLogprobs,
    Trajectory,
    TrajectoryGroup,
    Transition,
)
from tests.conftest import full_logits, training_data


def turn(
    ob: list[int], ac: list[int], lp: list[float], reward: float = 0.0, temperature: float = 1.0, **metrics: float
) -> Transition:
    return Transition(ModelInput.from_ints(ob), TokensWithLogprobs(ac, lp, "stop", temperature), reward, False, metrics)


def group(rewards: Sequence[float], tags: Sequence[str] = (), **metrics: float) -> TrajectoryGroup:
    trajectories = [
        Trajectory([turn([1, 2], [3, 4 + i], [-0.1, -0.2], reward, **metrics)]) for i, reward in enumerate(rewards)
    ]
    return TrajectoryGroup(trajectories, [0.0] * len(rewards), [{}] * len(rewards), list(tags))


def tracks(datum) -> dict:  # noqa: ANN001
    return {"input": datum.model_input.to_ints()} | {
        key: pytest.approx(value.tolist()) for key, value in datum.loss_fn_inputs.items()
    }


def one_member(trajectory: Trajectory, advantage: float) -> list[Datum]:
    return training_data([TrajectoryGroup([trajectory], [0.0], [{}])], [np.array([advantage])])


# Trap: targets off by one.
def test_single_turn_is_shifted_by_one() -> None:
    (datum,) = one_member(Trajectory([turn([1, 2], [3, 4], [-0.1, -0.2])]), 0.5)
    assert tracks(datum) == {
        "input": [1, 2, 3],
        "target_tokens": [2, 3, 4],
        "logprobs": [0, -0.1, -0.2],
        "advantages": [0, 0.5, 0.5],
        "mask": [0, 1, 1],
    }


def test_turns_that_extend_each_other_are_one_datum_and_others_are_not() -> None:
    extending = Trajectory([turn([1, 2], [3], [-0.1]), turn([1, 2, 3, 9], [5, 6], [-0.5, -0.6])])
    (datum,) = one_member(extending, 2.0)
    assert tracks(datum)["input"] == [1, 2, 3, 9, 5]
    assert datum.loss_fn_inputs["mask"].tolist() == [0, 1, 0, 1, 1]
    assert datum.loss_fn_inputs["advantages"].tolist() == [0, 2, 0, 2, 2]
    breaking = Trajectory([turn([1, 2], [3], [-0.1]), turn([1, 9], [5], [-0.5])])
    first, second = one_member(breaking, 2.0)
    assert (first.model_input.to_ints(), second.model_input.to_ints()) == ([1, 2], [1, 9])
    assert second.loss_fn_inputs["target_tokens"].tolist() == [9, 5]


def test_temperature_track_appears_when_some_token_was_tempered() -> None:
    plain = training_data([group([0, 1])], [np.array([-0.5, 0.5])])
    assert all("temperature" not in datum.loss_fn_inputs for datum in plain)
    tempered = TrajectoryGroup([Trajectory([turn([1], [2, 3], [-1, -1], temperature=0.5)])], [0.0], [{}])
    (datum,) = training_data([tempered], [np.array([1.0])])
    assert datum.loss_fn_inputs["temperature"].tolist() == [0.5, 0.5]
    turns = [turn([1], [2], [-1], temperature=temperature) for temperature in (0.5, 1.0, 0.0)]
    mixed = rows_of([TrajectoryGroup([Trajectory([one]) for one in turns], [0.0] * 3, [{}] * 3)])
    assert [row.datum().loss_fn_inputs["temperature"].tolist() for row in mixed] == [[0.5], [1.0], [1.0]]


def test_advantage_estimators_by_hand() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    assert GroupMean()(rewards) == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])
    with pytest.raises(ConfigError, match="eps=0 must be above 0"):  # 0/0 in a group of equal rewards
        GroupMeanStd(eps=0)
    assert GroupMeanStd(eps=1e-12)(rewards) == pytest.approx(np.array([0.4, -0.6, -0.6, 0.4, 0.4]) / np.sqrt(0.24))
    assert LeaveOneOut()(rewards) == pytest.approx([1 - 2 / 4, 0 - 3 / 4, 0 - 3 / 4, 1 - 2 / 4, 1 - 2 / 4])
    assert NoBaseline()(rewards) == pytest.approx(rewards)
    assert GroupMean()(np.array([3.0])) == pytest.approx([0.0])
    with pytest.raises(ConfigError, match="group_size >= 2"):
        LeaveOneOut().check_group_size(1)


# Trap: the mean of three times 0.1 is not 0.1; Adam makes a step of what is left.
@pytest.mark.parametrize("reward", [0.1, -0.1, 7.3, 1e6 + 0.1, 999_999_999.1])
@pytest.mark.parametrize("size", [2, 4, 6, 10, 14])
def test_equal_rewards_have_an_advantage_of_exactly_0(reward: float, size: int) -> None:
    for estimator in (GroupMean(), GroupMeanStd(), LeaveOneOut(), BatchMean()):
        for rewards in (np.full(size, reward), np.full(size + 1, reward)):
            assert not estimator(rewards).any(), estimator
    assert not BatchMean().of_batch([np.full(size, reward), np.full(3, reward)])[0].any()
    # each seat has its own constant reward
    assert size < 4 or not SeatMean()(np.tile([reward, -1.0], size)).any()


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_leave_one_out_equals_its_definition(rewards: list[float]) -> None:
    expected = [r - np.mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    assert LeaveOneOut()(np.array(rewards)) == pytest.approx(expected, abs=1e-9)


# Trap: rewards and trajectories misaligned once groups are removed.
def test_removing_constant_groups_keeps_rewards_and_trajectories_aligned() -> None:
    groups = [group([1, 1]), group([0, 1, 0]), group([0, 0]), group([2, 1])]
    assert trainable_groups(groups, GroupMean(), remove_constant=True) == [1, 3]
    kept = [groups[1], groups[3]]
    rows = with_advantages(rows_of(kept), compute_advantages(kept, GroupMean()))
    assert [row.origin for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [row.advantages_T.max() for row in rows] == pytest.approx([0, 2 / 3, 0, 0.5, 0])
    assert trainable_groups(groups[:1], GroupMean(), remove_constant=True) == []
    assert trainable_groups([group([1])], LeaveOneOut(), remove_constant=False) == []
    games = [group([1, 0] * 2), group([1, 0, 1]), group([1, 0]), group([])]
    assert trainable_groups(games, SeatMean(), remove_constant=False) == [0]
    # the first seat always wins: every advantage is 0
    won = [group([1, -1, 1, -1]), group([1, -1, -1, 1]), group([1, -1, 1, -1, 1, 0])]
    assert trainable_groups(won, SeatMean(), remove_constant=True) == [1, 2]
    assert trainable_groups(won, GroupMean(), remove_constant=True) == [0, 1, 2]


def test_substeps_are_cut_in_order() -> None:
    data = training_data([group([0] * 10)], [np.zeros(10)])
    assert [len(part) for part in split_substeps(data, 3)] == [3, 3, 4]
    assert [d for part in split_substeps(data, 3) for d in part] == data
    assert [len(part) for part in split_substeps(data[:2], 5)] == [1, 1]


def test_sampler_against_trainer_metrics_by_hand() -> None:
    (datum,) = one_member(Trajectory([turn([1, 2], [3, 4], [-0.1, -0.2])]), 1.0)
    trained = TensorData(np.array([-9.0, -0.2, -0.3], dtype=np.float32))
    metrics = compute_sampling_metrics([datum], [trained])
    expected = {
        "kl_sample_train_v1": 0.1,
        "kl_sample_train_v2": 0.005,
        "logprob_gap_mean": 0.1,
        "logprob_gap_max": 0.1,
        "entropy": 0.15,
        "ratio_p50": np.exp(-0.1),
        "ratio_p01": np.exp(-0.1),
        "ratio_p99": np.exp(-0.1),
    }
    assert metrics == {f"optim/{name}": pytest.approx(value, abs=1e-6) for name, value in expected.items()}


# Trap: an environment's metric that takes the place of the run's own, or a tag that of all groups.
def test_the_names_of_the_runs_own_metrics_are_refused() -> None:
    plain = group([0, 1], [])
    plain.trajectories_G[0].stop_reason = "max_turns"
    of_training = [name.removeprefix("env/all/") for name in compute_trajectory_metrics([plain])]
    of_evaluation = [*problem_values([plain], [1, 2]), *sample_metrics([plain], [1, 2], "test")]
    for name in {*of_training, *(name.removeprefix("test/") for name in of_evaluation)} - {"turns"}:
        with pytest.raises(MalformedStep, match=f"'{name}', like one of the run's own: give it another name"):
            reward_and_metrics((0.0, {name: 1.0}))
    reward_and_metrics((0.0, {"turns": 1.0, "correct": 1.0, "reward/mine": 1.0}))


def test_trajectory_metrics_by_hand() -> None:
    mixed, good, bad = group([0, 1], ["a", "x"], correct=0.5), group([1, 1], ["b", "x"]), group([0, 0], ["c", "x"])
    metrics = compute_trajectory_metrics([mixed, good, good, bad])
    assert metrics["env/all/reward/total"] == pytest.approx(5 / 8)
    assert [metrics[f"env/{tag}/reward/total"] for tag in "abc"] == [0.5, 1.0, 0.0]
    assert not any(name.startswith("env/x/") for name in metrics), "all groups have it"
    assert metrics["env/all/correct"] == 0.5 and "env/b/correct" not in metrics
    fractions = [metrics[f"env/all/by_group/frac_{kind}"] for kind in ("mixed", "all_good", "all_bad")]
    assert fractions == [1 / 4, 2 / 4, 1 / 4]
    assert (
        metrics["env/all/total_episodes"],
        metrics["env/all/total_ac_tokens"],
        metrics["env/all/ob_tokens_per_turn"],
    ) == (
        8,
        16,
        2,
    )


class CountingEnv(Env):
    """Asks `turns` times; fails as it is told; takes `seconds` to answer, holding up the event
    loop.
    """

    def __init__(self, turns: int, failure: Exception | None = None, seconds: float = 0.0):
        self.turns, self.failure, self.seconds, self.seen = turns, failure, seconds, 0

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return ModelInput.from_ints([10, 11]), []

    async def step(self, action: list[int]) -> StepResult:
        self.seen += 1
        time.sleep(self.seconds)  # noqa: ASYNC251 - that is the point
        if self.failure:
            raise self.failure
        return StepResult(
            1.0, self.seen == self.turns, ModelInput.from_ints([10, 11, *action, 12]), [], {"turn": self.seen}
        )


class CountingBuilder(EnvGroupBuilder):
    def __init__(self, *envs: CountingEnv):
        self.envs = envs

    async def make_envs(self) -> Sequence[Env]:
        return [copy(env) for env in self.envs]

    async def compute_group_rewards(
        self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        return [(0.5, {"members": len(envs_G)}) for _ in trajectories_G]


def rollout(*builders: CountingBuilder, seed: int = 0, torch_service) -> list[TrajectoryGroup]:  # noqa: ANN001
    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()
    return asyncio.run(do_rollouts(builders, Policy(client, max_tokens=4), (seed,)))


def test_rollouts_take_turns_and_the_seed_decides(torch_service) -> None:  # noqa: ANN001
    def builders() -> list[CountingBuilder]:
        return [CountingBuilder(CountingEnv(1), CountingEnv(3)), CountingBuilder(CountingEnv(2))]

    first, again, other = (rollout(*builders(), seed=seed, torch_service=torch_service) for seed in (1, 1, 2))
    assert [[len(t.transitions) for t in g.trajectories_G] for g in first] == [[1, 3], [2]]
    assert [g.get_total_rewards() for g in first] == [[1.5, 3.5], [2.5]]
    sampled = [
        [t.ac.tokens for g in groups for tr in g.trajectories_G for t in tr.transitions]
        for groups in (first, again, other)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len({tuple(tokens) for tokens in sampled[0]}) == len(sampled[0]), "turns and members must not share a seed"


# Trap: bits that depend on the clock.
@pytest.mark.cpu_only
def test_slow_environments_change_no_bit_of_what_vllm_samples(vllm_client) -> None:  # noqa: ANN001
    """Which requests share a decoding step must not depend on the clock: it would show in the last
    digits of the logprobs.
    """
    client = vllm_client.save_weights_and_get_sampling_client()

    def run(seconds: float) -> list[list[float]]:
        rng = np.random.default_rng(0)
        builders = [
            CountingBuilder(*(CountingEnv(2 + g % 3, seconds=seconds * rng.random()) for g in range(4)))
            for _ in range(6)
        ]
        groups = asyncio.run(do_rollouts(builders, Policy(client, max_tokens=5), (3,)))
        return [turn.ac.logprobs for group in groups for t in group.trajectories_G for turn in t.transitions]

    assert run(0.0) == run(0.02)


# Trap: a rollout that failed scored 0.
def test_a_rollout_that_cannot_be_scored_leaves_its_group_and_is_counted(torch_service) -> None:  # noqa: ANN001
    (g,) = rollout(
        CountingBuilder(CountingEnv(1), CountingEnv(1, RolloutError("grader timed out"))), torch_service=torch_service
    )
    assert g.get_total_rewards() == [1.5] and g.metrics_G == [{"members": 1}]
    metrics = compute_trajectory_metrics([g])
    assert metrics["rollout_errors/RolloutError"] == 1 and metrics["env/all/reward/total"] == 1.5


# Trap: a bug taken for one.
def test_a_bug_in_an_environment_is_raised_as_itself_and_a_rare_failure_is_not(torch_service) -> None:  # noqa: ANN001
    def envs(failing: int) -> CountingBuilder:
        return CountingBuilder(*(CountingEnv(1, ZeroDivisionError("mine") if g < failing else None) for g in range(3)))

    with pytest.raises(ZeroDivisionError, match="mine"):
        rollout(envs(2), torch_service=torch_service)
    (g,) = rollout(envs(1), torch_service=torch_service)
    assert [type(error).__name__ for error in g.errors] == ["EnvError"] and len(g.trajectories_G) == 2


def test_policy_gradient_estimator_is_unbiased() -> None:
    """One sampled token of three: the estimator summed over all groups of two, weighted by
    probability, is the gradient of E[R].
    """
    trainer, prompt, choices, rewards = (
        Trainer("tiny", BackendConfig()),
        [7, 8, 9],
        [20, 21, 22],
        np.array([1.0, 0.2, 0.0]),
    )
    head = trainer.base.get_input_embeddings().weight  # tied

    def logprobs() -> torch.Tensor:
        return full_logits(trainer.base, prompt)[-1].log_softmax(-1)[choices]

    p = logprobs().exp().detach().double().numpy()
    # Members outside the three choices would have reward 0, too; restrict the policy's support by
    # conditioning on the choices.
    p_given = p / p.sum()
    (full_logits(trainer.base, prompt)[-1][choices].softmax(-1) * torch.tensor(rewards).float()).sum().backward()
    assert head.grad is not None
    exact = head.grad.clone()  # type: ignore
    trainer.zero_grad()
    total = torch.zeros_like(exact)
    for i in range(3):
        for j in range(3):
            advantages = LeaveOneOut()(rewards[[i, j]])
            for member, advantage in zip((i, j), advantages, strict=True):
                conditional = full_logits(trainer.base, prompt)[-1][choices].log_softmax(-1)[member]
                (gradient,) = torch.autograd.grad(conditional, head)  # type: ignore
                total += float(p_given[i] * p_given[j] * advantage / 2) * gradient
    assert torch.allclose(total, exact, atol=1e-6)


def test_a_seed_is_the_same_number_with_every_numpy():
    """Trap: numpy 1 shifts no unsigned number by a Python int, so that every RL run ended there."""
    assert [sampling_seed(entropy) for entropy in ([0], [1, 2, 3])] == [7896617691693857887, 6498626229777268288]
