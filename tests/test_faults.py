"""Environments that raise, hang or return nonsense, limits that end episodes, and many environments
at once.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import chz
import numpy as np
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import read_metrics
from rl import train
from rl.advantages import SeatMean
from rl.data_processing import rows_of
from rl.metrics import compute_trajectory_metrics
from rl.rollouts import Policy, RolloutLimits, do_rollouts
from rl.types import (
    BatchReward,
    BatchRewardBuilder,
    Env,
    EnvGroupBuilder,
    EpisodeEnd,
    Metrics,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    RolloutError,
    SeatLost,
    StepResult,
    StopCondition,
    Trajectory,
    TrajectoryGroup,
)

PROMPT = ModelInput.from_ints([10, 11])


class ScriptedEnv(Env):
    """Never ends by itself; `on_step` is called before each answer, and may raise, wait, or replace
    the result.
    """

    def __init__(self, on_step: Callable[[], object] | None = None):
        self.on_step, self.closed, self.tokens = on_step, False, PROMPT.to_ints()

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return PROMPT, []

    async def step(self, action: list[int]) -> StepResult:
        result = self.on_step() if self.on_step else None
        if asyncio.iscoroutine(result):
            result = await result
        self.tokens += [*action, 12]
        return result if result is not None else StepResult(1.0, False, ModelInput.from_ints(self.tokens), [])  # type: ignore[return-value]

    async def cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        return -5.0, {"cut": 1.0}

    async def close(self) -> None:
        self.closed = True


class ScriptedGroup(EnvGroupBuilder):
    def __init__(self, *scripts: Callable[[], object] | None, independent: bool = True):
        self.scripts, self.members_are_independent, self.envs = scripts, independent, []

    async def make_envs(self) -> Sequence[Env]:
        made = [ScriptedEnv(script) for script in self.scripts]
        self.envs += made
        return made


def rollout(service, *groups: EnvGroupBuilder, max_tokens: int = 3, **limits) -> list[TrajectoryGroup]:  # noqa: ANN001, ANN003
    client = service.create_training_client("tiny").save_weights_and_get_sampling_client()
    return asyncio.run(do_rollouts(groups, Policy(client, max_tokens), (0,), RolloutLimits(**limits)))


def finished(trajectory: Trajectory) -> tuple[EpisodeEnd, int, float]:
    return trajectory.stop_reason, len(trajectory.transitions), trajectory.reward


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_turns": 4}, ("max_turns", 4, 4 - 5)),
        # turns of 3, 3 and the 1 that is left
        ({"max_sampled_tokens": 7}, ("max_sampled_tokens", 3, 3 - 5)),
        # 2, 6, 10, then 2 of 3 fit: 12 and the reply
        ({"max_trajectory_tokens": 12}, ("max_trajectory_tokens", 3, 3 - 5)),
        ({"rollout_seconds": 1e-9}, ("timeout", 1, 1 - 5)),
    ],
)
def test_limits_end_the_episode_softly_with_their_name(limits: dict, expected: tuple, torch_service) -> None:  # noqa: ANN001
    builder = ScriptedGroup(None, None)
    (group,) = rollout(torch_service, builder, **limits)
    assert [finished(trajectory) for trajectory in group.trajectories_G] == [expected] * 2
    metrics = compute_trajectory_metrics([group])
    assert metrics[f"env/all/ended_by/{expected[0]}"] == 1.0 and metrics["env/all/cut"] == 1.0
    assert all(env.closed for env in builder.envs) and not group.errors


# Trap: a penalty that vanishes from the reward with the turn that is not to be trained on.
def test_a_turn_that_group_rewards_remove_is_not_trained_on_and_its_reward_counts(torch_service) -> None:  # noqa: ANN001
    class MasksTheFirst(ScriptedGroup):
        async def compute_group_rewards(
            self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
        ) -> list[tuple[float, Metrics]]:
            del trajectories_G[0].transitions[0]
            return [(10.0, {}) for _ in trajectories_G]

    (group,) = rollout(torch_service, MasksTheFirst(None, None), max_turns=3)
    assert [len(trajectory.transitions) for trajectory in group.trajectories_G] == [2, 3]
    assert group.get_total_rewards() == [10 + 3 - 5, 10 + 3 - 5]
    first, whole = rows_of([group])
    assert [int(row.mask_T.sum()) for row in (first, whole)] == [6, 9]


def test_a_full_context_ends_the_episode_and_an_overlong_first_prompt_is_no_reward(torch_service) -> None:  # noqa: ANN001
    (group,) = rollout(torch_service, ScriptedGroup(None), max_tokens=200)
    assert finished(group.trajectories_G[0])[:2] == ("context_length", 3)

    class Overlong(ScriptedGroup):
        async def make_envs(self) -> Sequence[Env]:
            env = ScriptedEnv()
            env.initial_observation = lambda: asyncio.sleep(0, (ModelInput.from_ints([5] * 600), []))  # type: ignore[method-assign]
            return [env]

    (group,) = rollout(torch_service, Overlong(), max_failed_fraction=1.0)
    assert not group.trajectories_G and "the first observation" in str(group.errors[0])


def raising(error: Exception) -> Callable[[], object]:
    def script() -> object:
        raise error

    return script


def test_each_kind_of_failure_has_its_type_and_leaves_the_rewards_alone(torch_service) -> None:  # noqa: ANN001
    scripts = {
        "EnvError": raising(KeyError("tool")),
        "EnvTimeout": lambda: asyncio.sleep(60),
        "MalformedStep": lambda: StepResult(float("nan"), True, PROMPT),
        "RolloutError": raising(RolloutError("grader down")),
    }
    builder = ScriptedGroup(*scripts.values(), lambda: "no StepResult", *[None] * 6)
    (group,) = rollout(torch_service, builder, max_turns=2, env_seconds=0.05, max_retries=2)
    assert [type(error).__name__ for error in group.errors] == [*scripts, "MalformedStep"]
    assert group.get_total_rewards() == [2.0 - 5.0] * 6 and group.num_retries == 2 * 5
    metrics = compute_trajectory_metrics([group])
    assert (metrics["rollout_errors/total"], metrics["rollout_errors/retries"]) == (5, 10)
    assert metrics["env/all/reward/total"] == -3.0
    assert "KeyError" in str(group.errors[0]) and isinstance(group.errors[0].__cause__, KeyError)
    assert all(env.closed for env in builder.envs)


def test_a_game_is_retried_as_a_whole_and_a_single_member_alone(torch_service) -> None:  # noqa: ANN001
    def fails_first() -> Callable[[], object]:
        calls = iter([True])
        return lambda: raising(OSError("once"))() if next(calls, False) else None

    alone, game = ScriptedGroup(fails_first(), None), ScriptedGroup(fails_first(), None, independent=False)
    groups = rollout(torch_service, alone, game, max_turns=1, max_retries=1)
    assert [group.num_retries for group in groups] == [1, 2] and not any(group.errors for group in groups)
    first, second = ([trajectory.transitions[0].ac.tokens for trajectory in group.trajectories_G] for group in groups)
    again = rollout(torch_service, ScriptedGroup(None, None), max_turns=1)[0]
    assert first[1] == again.trajectories_G[1].transitions[0].ac.tokens, (
        "the member beside the one retried is as it was"
    )
    assert second[1] != first[1], "a second game is sampled anew"


# Trap: a baseline over the seats that are left, which are then counted as other seats.
def test_a_game_that_lost_a_seat_is_lost_whole(torch_service) -> None:  # noqa: ANN001
    def broken() -> Callable[[], object]:
        return raising(RolloutError("tool down"))

    alone, game = (ScriptedGroup(None, broken(), None, None, independent=free) for free in (True, False))
    groups = rollout(torch_service, alone, game, max_turns=1, max_failed_fraction=1.0)
    assert [len(group.trajectories_G) for group in groups] == [3, 0]
    assert [type(error) for error in groups[1].errors] == [RolloutError, *[SeatLost] * 3]
    assert "tool down" in str(groups[1].errors[-1]) and len(groups[0].errors) == 1


@chz.chz
class DropsAMember(BatchRewardBuilder):
    groups: int = 1

    async def __call__(
        self, service: ServiceClient, training_client: TrainingClient, renderer: Renderer
    ) -> BatchReward:
        async def reward(groups_P: Sequence[TrajectoryGroup]) -> Metrics:
            for group in groups_P[: self.groups]:
                group.drop_member(1, RolloutError("the judge is down"))
            return {}

        return reward  # type: ignore[return-value]


class GameDataset(RLDataset):
    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [ScriptedGroup(None, None, None, None, independent=False) for _ in range(3)]

    def __len__(self) -> int:
        return 1


@chz.chz
class GameBuilder(RLDatasetBuilder):
    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
        return GameDataset(), None


def test_a_batch_reward_that_drops_a_seat_loses_its_game(tmp_path: Path) -> None:
    settings = train.Config(
        env=GameBuilder(batch_size=2, group_size=4),
        advantage=SeatMean(),
        batch_reward=DropsAMember(),
        max_tokens=1,
        limits=RolloutLimits(max_turns=1),
        log_path=str(tmp_path),
        backend=BackendConfig(engine="torch"),
    )
    record = asyncio.run(train.main(settings))
    assert record["env/all/total_episodes"] == 8 and record["train/groups_removed"] == 1
    assert (
        record["train/groups_constant"] == 2 and record["env/all/by_group/frac_mixed"] == 0
    )  # of the two that are left
    assert record["rollout_errors/RolloutError"] == 1 and record["rollout_errors/SeatLost"] == 3


# Trap: a run that goes on, though a reward model can score hardly any answer.
def test_a_batch_reward_that_drops_too_many_ends_the_run(tmp_path: Path) -> None:
    settings = train.Config(
        env=GameBuilder(batch_size=3, group_size=4),
        advantage=SeatMean(),
        batch_reward=DropsAMember(groups=2),
        max_tokens=1,
        limits=RolloutLimits(max_turns=1),
        log_path=str(tmp_path),
        backend=BackendConfig(engine="torch"),
    )
    with pytest.raises(RolloutError, match="the judge is down"):
        asyncio.run(train.main(settings))


def test_a_thousand_environments_run_at_once_in_one_process(torch_service) -> None:  # noqa: ANN001
    waiting = 0
    enough = asyncio.Event()

    async def wait() -> None:
        nonlocal waiting
        waiting += 1
        if waiting > 500:
            enough.set()
        await enough.wait()

    groups = rollout(torch_service, *(ScriptedGroup(*[wait] * 8) for _ in range(125)), max_tokens=1, max_turns=1)
    assert sum(len(group.trajectories_G) for group in groups) == 1000


class FaultyEnv(Env):
    """One token, reward 1; raises in 10% of its calls, hangs in 5%, returns nonsense in 5%."""

    def __init__(self, fate: float):
        self.fate = fate

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return PROMPT, []

    async def step(self, action: list[int]) -> StepResult:
        if self.fate < 0.10:
            raise ConnectionError("the tool is down")
        if self.fate < 0.15:
            await asyncio.sleep(3600)
        if self.fate < 0.20:
            return StepResult(float("inf"), True, PROMPT)
        return StepResult(1.0 + (action[0] < 130), True, ModelInput.empty())


class FaultyGroup(EnvGroupBuilder):
    def __init__(self, rng: np.random.Generator, size: int, fate: float | None):
        self.rng, self.size, self.fate = rng, size, fate

    async def make_envs(self) -> Sequence[Env]:
        return [FaultyEnv(fate if self.fate is None else self.fate) for fate in self.rng.random(self.size)]


class FaultyDataset(RLDataset):
    def __init__(self, builder: "FaultyBuilder"):
        self.builder = builder

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        seeds = ((self.builder.seed, index, p) for p in range(self.builder.batch_size))
        return [FaultyGroup(np.random.default_rng(seed), self.builder.group_size, self.builder.fate) for seed in seeds]

    def __len__(self) -> int:
        return 50


@chz.chz
class FaultyBuilder(RLDatasetBuilder):
    fate: float | None = chz.field(default=None, doc="of every environment; None = drawn")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
        return FaultyDataset(self), None


def test_a_batch_without_survivors_is_counted_and_moves_nothing(tmp_path: Path) -> None:
    settings = train.Config(
        env=FaultyBuilder(batch_size=2, group_size=2, fate=0.0),
        max_tokens=1,
        max_steps=2,
        limits=RolloutLimits(max_retries=0, max_failed_fraction=1.0),
        log_path=str(tmp_path),
        backend=BackendConfig(engine="torch"),
    )
    asyncio.run(train.main(settings))
    for record in read_metrics(tmp_path):
        assert record["rollout_errors/EnvError"] == 4 and record["train/groups_removed"] == 2
        assert (
            record["env/all/total_episodes"] == 0
            and "optim/loss" not in record
            and "env/all/reward/total" not in record
        )


# Trap: environments that raise, hang or return nonsense, scored 0 or stopping the run.
def test_fifty_steps_on_a_faulty_environment_end_with_clean_rewards(tmp_path: Path) -> None:
    settings = train.Config(
        env=FaultyBuilder(batch_size=4, group_size=4),
        max_tokens=1,
        learning_rate=1e-3,
        limits=RolloutLimits(env_seconds=0.05, max_retries=1, min_group_size=2),  # those that do not hang do not wait
        max_steps_off_policy=1,
        save_every=0,
        log_path=str(tmp_path),
        behavior_if_log_dir_exists="delete",
        backend=BackendConfig(engine="torch"),
    )
    asyncio.run(train.main(settings))
    records = read_metrics(tmp_path)
    lost, retried = (sum(r.get(f"rollout_errors/{name}", 0) for r in records) for name in ("total", "retries"))
    assert len(records) == 50
    assert 100 < retried < 230 and 10 < lost < 70, "20% of 800 fail, 4% fail twice"
    assert sum(r["env/all/total_episodes"] for r in records) == 800 - lost
    assert all(1.0 <= r["env/all/reward/total"] <= 2.0 for r in records), "a failure never counts as a reward"
    assert records[-1]["env/all/reward/total"] > 1.8, "and the policy has learnt from the others"
    shown = "".join(file.read_text() for file in (tmp_path / "transcripts").glob("*.jsonl"))
    assert "ConnectionError" in shown and "took more than" in shown
