"""DAPO's dynamic sampling: groups of equal rewards are replaced, the same way in every run."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import chz
import pytest

from posttrain.backend.errors import ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import ModelInput
from rl import group_sources, train
from rl.group_sources import REFILL, GroupSource
from rl.likelihood_reward import LikelihoodRewardBuilder
from rl.rollouts import RolloutLimits
from rl.types import EnvGroupBuilder, RolloutError, StepResult, TrajectoryGroup
from tests.test_group_sources import (
    LowTokenBuilder,
    LowTokenDataset,
    LowTokenEnv,
    LowTokenGroup,
    config,
    metrics,
    weights,
)


class EqualAtFirst(LowTokenGroup):
    """Equal rewards, unless `differs`: then a member's reward is its number."""

    def __init__(self, number: int, differs: bool):
        super().__init__(number, 3, 0.0)
        self.differs = differs

    async def make_envs(self) -> Sequence[LowTokenEnv]:
        return [LowTokenEnv(self.number % 250, 0.0) for _ in range(self.size)]

    async def compute_group_rewards(self, trajectories_G, envs_G) -> list:  # noqa: ANN001
        rewards = [-t.reward + g * self.differs for g, t in enumerate(trajectories_G)]
        return [(reward, {}) for reward in rewards]


class EqualDataset(LowTokenDataset):
    """Place p differs after p replacements."""

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [EqualAtFirst(10 * (index % REFILL) + p, index // REFILL >= p) for p in range(4)]


def groups(client, max_refills: int, state: list | None = None) -> tuple[list[TrajectoryGroup], list]:  # noqa: ANN001
    async def sample() -> tuple[list[TrajectoryGroup], list]:
        async with GroupSource(EqualDataset(LowTokenBuilder()), 6, 4, max_refills=max_refills) as source:
            source.restore(state or [])
            source.set_policy(0, client.save_weights_and_get_sampling_client())
            while len(source.state()) < 4:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            saved = json.loads(json.dumps(source.state()))
            return [group async for part in source.minibatches(0) for group in part], saved

    return asyncio.run(sample())


def test_a_group_is_replaced_until_its_rewards_differ_or_the_limit_is_reached(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, seeds, rollout = torch_service.create_training_client("tiny"), [], group_sources.do_group_rollout
    monkeypatch.setattr(group_sources, "do_group_rollout", lambda *given: seeds.append(given[2]) or rollout(*given))
    sampled, state = groups(client, max_refills=2)
    tried = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]
    assert sorted(seed[2:] for seed in seeds) == [(refills * REFILL, p) for refills, p in tried]
    assert [group.refills for group in sampled] == [0, 1, 2, 2]
    assert [len(set(group.get_total_rewards())) for group in sampled] == [3, 3, 3, 1]
    # three members of up to 4 tokens in each discarded group
    assert sampled[0].refill_tokens == 0 and all(0 < g.refill_tokens <= 12 * g.refills for g in sampled[1:])
    restored, _ = groups(client, max_refills=2, state=state)
    for ours, there in zip(restored, sampled, strict=True):
        assert vars(ours) | {"builder": 0} == vars(there) | {"builder": 0}
        assert ours.builder.number == there.builder.number  # type: ignore[union-attr]
    assert [group.refills for group in groups(client, max_refills=0)[0]] == [0, 0, 0, 0]


def test_a_batch_is_read_once_for_all_its_groups(torch_service, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    read: list[int] = []
    get_batch = EqualDataset.get_batch
    monkeypatch.setattr(EqualDataset, "get_batch", lambda self, index: read.append(index) or get_batch(self, index))
    client = torch_service.create_training_client("tiny")
    _, state = groups(client, max_refills=3)
    assert sorted(read) == [REFILL * refills for refills in range(4)]
    read.clear()
    groups(client, max_refills=3, state=state)  # resumed
    assert sorted(read) == [REFILL * refills for refills in range(4)]


class OneOfThreeFails(LowTokenGroup):
    """Equal rewards; one member of three fails, in every group."""

    async def make_envs(self) -> Sequence[LowTokenEnv]:
        return [FailingEnv(self.number, 0.0), EqualEnv(0, 0.0), EqualEnv(0, 0.0)]


class EqualEnv(LowTokenEnv):
    async def step(self, action: list[int]) -> StepResult:
        return StepResult(1.0, True, ModelInput.empty())


class FailingEnv(LowTokenEnv):
    async def step(self, action: list[int]) -> StepResult:
        raise RolloutError("the tool is down")


class FailingDataset(LowTokenDataset):
    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [OneOfThreeFails(index % REFILL, 3, 0.0)]


# Trap: the failures of all replaced groups, as a part of the last group's rollouts.
def test_a_steps_failures_are_a_part_of_all_its_rollouts(torch_service) -> None:  # noqa: ANN001
    async def sample(limits: RolloutLimits) -> TrajectoryGroup:
        source = GroupSource(FailingDataset(LowTokenBuilder()), 1, 4, limits=limits, max_refills=4)
        async with source:
            source.set_policy(0, client)
            ((group,),) = [part async for part in source.minibatches(0)]
            return group

    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()
    group = asyncio.run(sample(RolloutLimits(max_retries=0, max_failed_fraction=0.5)))
    assert (len(group.errors), len(group.trajectories_G), group.refill_rollouts) == (5, 2, 8)
    with pytest.raises(RolloutError) as stopped:
        asyncio.run(sample(RolloutLimits(max_retries=0, max_failed_fraction=0.3)))
    assert "5 of 15 rollouts failed" in str(stopped.value.__notes__)


@pytest.mark.slow
@pytest.mark.cpu_only
def test_a_run_with_refills_resumes_bit_for_bit(tmp_path: Path) -> None:
    """One token: the rewards of two members are equal half of the time."""
    env = LowTokenBuilder(n_batches=3, group_size=2)
    settings = config(tmp_path / "whole", env=env, max_tokens=1, max_refills=3, model_name="micro")
    asyncio.run(train.main(settings))
    logged = metrics(tmp_path / "whole")
    assert sum(record["train/groups_refilled"] for record in logged[:3]) > 0
    assert all(record["train/refill_tokens"] == 2 * record["train/groups_refilled"] for record in logged[:3])
    cut = chz.replace(settings, log_path=str(tmp_path / "cut"), max_steps=1)
    asyncio.run(train.main(cut))
    asyncio.run(train.main(chz.replace(cut, max_steps=None, behavior_if_log_dir_exists="resume_changed")))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    asyncio.run(train.main(chz.replace(settings, log_path=str(tmp_path / "without"), max_refills=0)))
    assert weights(tmp_path / "without") != weights(tmp_path / "whole")


def test_options_that_would_refill_for_ever_or_in_vain_are_refused(tmp_path: Path) -> None:
    alone = config(tmp_path, env=LowTokenBuilder(group_size=1), max_refills=2)
    with pytest.raises(ConfigError, match="with group_size=1 all rewards of a group are equal"):
        asyncio.run(train.main(alone))
    scored = config(tmp_path, max_refills=2, batch_reward=LikelihoodRewardBuilder())
    with pytest.raises(ConfigError, match="a batch_reward is computed after the sampling"):
        asyncio.run(train.main(scored))
