"""The critic: GAE, the value loss, values of the right positions, runs and their checkpoints."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import chz
import numpy as np
import pytest
import torch

from posttrain.backend.errors import CheckpointError, ConfigError
from posttrain.backend.types import AdamParams, Datum, ModelInput
from rl import train
from rl.advantages import NoReward
from rl.critic import ActorCritic, Critic, CriticConfig, gae, token_rewards, value_loss
from rl.data_processing import normalized, rows_of
from rl.types import Trajectory, TrajectoryGroup
from tests.conftest import rounded
from tests.test_estimators import advantages, two_data
from tests.test_group_sources import LowTokenBuilder, config, metrics, weights
from tests.test_rl import turn


def test_gae_by_hand_and_as_the_published_sum() -> None:
    rewards, values = np.array([0.0, 0.5, 1.0]), np.array([0.1, 0.2, 0.4])
    # deltas: 0.9 * 0.2 - 0.1 = 0.08, 0.5 + 0.9 * 0.4 - 0.2 = 0.66, 1 - 0.4 = 0.6
    assert gae(rewards, values, 0.9, 0.5).tolist() == pytest.approx([0.08 + 0.45 * (0.66 + 0.45 * 0.6), 0.93, 0.6])
    rng = np.random.default_rng(0)
    rewards, values, gamma, lam = rng.normal(size=6), rng.normal(size=6), 0.97, 0.8
    after = np.append(values, 0.0)
    # eq. 16: the average of the n-step advantages with weights (1 - lambda) lambda^(n - 1); the rest at the end
    for t in range(6):
        steps = [
            sum(gamma**i * rewards[t + i] for i in range(n)) + gamma**n * after[t + n] - values[t]
            for n in range(1, 7 - t)
        ]
        expected = sum((1 - lam) * lam**n * a for n, a in enumerate(steps[:-1])) + lam ** (len(steps) - 1) * steps[-1]
        assert gae(rewards, values, gamma, lam)[t] == pytest.approx(expected)


def test_the_value_loss_is_the_larger_of_clipped_and_unclipped() -> None:
    values = torch.tensor([1.0, 1.0, 0.1], requires_grad=True)
    inputs = {
        "returns": torch.tensor([2.0, -1.0, 2.0]),
        "values": torch.tensor([0.5, 0.5, 0.0]),
        "weights": torch.ones(3),
    }
    loss, out = value_loss(values, inputs, clip=0.2)
    # clipped to 0.7 twice, not at all at the end
    assert loss.tolist() == pytest.approx([0.5 * 1.3**2, 0.5 * 2.0**2, 0.5 * 1.9**2])
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.0, 2.0, -1.9])
    assert value_loss(values, inputs, clip=0.0)[0].tolist() == pytest.approx([0.5, 2.0, 0.5 * 1.9**2])
    assert out["value_loss"].tolist() == pytest.approx(loss.tolist())


def test_a_turns_reward_is_at_its_last_token_and_the_groups_at_the_very_last() -> None:
    turns = [turn([1, 2], [3, 4], [-1.0, -2.0], 0.5), turn([1, 2, 3, 4, 9], [5], [-0.5], 0.25)]
    assert token_rewards(Trajectory(turns), final=1.0).tolist() == [0.0, 0.5, 1.25]


# Trap: a value that has read the token it is the baseline of.
def test_values_have_read_the_tokens_before_the_action_and_go_into_the_advantages(torch_service) -> None:  # noqa: ANN001
    client = torch_service.create_scalar_client("tiny")
    head = client._trainer.scalar_head.data
    head.copy_(torch.empty(head.shape).normal_(generator=torch.Generator().manual_seed(0)))
    # the second turn extends the first: one row; of the third trajectory each turn is a row
    one_row = Trajectory([turn([1, 2], [3, 4], [-1.0, -2.0], 0.5), turn([1, 2, 3, 4, 9], [5], [-0.5], 0.25)])
    two_rows = Trajectory([turn([1, 2], [6], [-1.0], 0.0), turn([8], [7], [-0.5], 1.0)])
    group = TrajectoryGroup([one_row, two_rows], [1.0, 0.0], [{}, {}])
    critic = Critic(CriticConfig(discount=0.9, gae_lambda=0.5), client, 1.0)
    rows, out = asyncio.run(critic.with_advantages([group], rows_of([group])))

    def value(tokens: list[int]) -> float:
        datum = Datum(ModelInput.from_ints(tokens), {"mask": [1.0] * len(tokens)})
        scalars = client.forward([datum], lambda v, _: (0 * v, {})).result().loss_fn_outputs[0]["scalars"].array
        return float(scalars[-1])

    read = [[[1, 2], [1, 2, 3], [1, 2, 3, 4, 9]], [[1, 2], [8]]]
    for trajectory, prefixes, final, of_trajectory in zip(
        group.trajectories_G, read, group.final_rewards_G, (rows[:1], rows[1:]), strict=True
    ):
        values = np.array([value(tokens) for tokens in prefixes])
        expected = gae(token_rewards(trajectory, final), values, 0.9, 0.5)
        got, returns = (
            np.concatenate([getattr(row, name)[row.mask_T > 0] for row in of_trajectory])
            for name in ("advantages_T", "returns_T")
        )
        assert got == pytest.approx(expected, abs=rounded(1e-5)) and returns == pytest.approx(
            expected + values, abs=rounded(1e-5)
        )
    assert all((row.advantages_T[row.mask_T == 0] == 0).all() for row in rows)
    flat = {
        name: np.concatenate([getattr(row, name)[row.mask_T > 0] for row in rows]) for name in ("values_T", "returns_T")
    }
    left = np.var(flat["returns_T"] - flat["values_T"]) / np.var(flat["returns_T"])
    assert out == pytest.approx(
        {"critic/value_mean": flat["values_T"].mean(), "critic/explained_variance": 1 - left}, abs=rounded(1e-5)
    )
    client._trainer.scalar_head.data.zero_()
    critic, losses = Critic(CriticConfig(clip=0.0, gae_lambda=1.0), client, 1.0), []
    rows, _ = asyncio.run(critic.with_advantages([group], rows_of([group])))
    for _ in range(30):
        critic.forward_backward(rows)
        trained_on = critic._outputs[-1].result().metrics
        assert trained_on["loss:sum"] == pytest.approx(trained_on["value_loss:mean"]), "the mean over sampled tokens"
        critic.optim_step(AdamParams(1e-2))
        losses.append(asyncio.run(critic.metrics())["critic/value_loss"])
    assert losses[-1] < 0.1 * losses[0]
    norms = []
    for passes in (1, 3):  # Trap: a value loss that is as many times as large as a batch has minibatches
        for _ in range(passes):
            critic.forward_backward(rows, passes)
        critic.optim_step(AdamParams(0.0))
        norms.append(asyncio.run(critic.metrics())["critic/grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=rounded(1e-5))


def test_the_critics_rate_is_in_proportion_to_the_policys() -> None:
    class Client:
        def optim_step(self, adam: AdamParams) -> None:
            rates.append(adam.learning_rate)

    rates: list[float] = []
    critic = Critic(CriticConfig(), Client(), rate=4.0)  # type: ignore[arg-type]
    critic.optim_step(AdamParams(0.125))
    assert rates == [0.5]


def test_metrics_of_several_passes_are_their_mean() -> None:
    critic = Critic(CriticConfig(), None, rate=1.0)  # type: ignore[arg-type]

    async def passed(**metrics: float) -> Any:
        return SimpleNamespace(metrics=metrics)

    async def read() -> Any:
        critic._outputs = [passed(**{"value_loss:mean": loss}) for loss in (1.0, 2.0)]  # type: ignore[assignment]
        critic._steps = [passed(grad_norm=norm) for norm in (3.0, 5.0)]  # type: ignore[assignment]
        return await critic.metrics()

    assert asyncio.run(read()) == {"critic/value_loss": 1.5, "critic/grad_norm": 4.0}


# Trap: a critic that is to be a copy of the policy, without the weights the policy begins with.
@pytest.mark.parametrize("takes_policy", [True, False])
def test_policy_and_critic_have_their_checkpoints_together(takes_policy: bool, tmp_path: Path) -> None:
    policy, critic = MagicMock(), MagicMock()
    policy.checkpoint_bytes.return_value, critic.checkpoint_bytes.return_value = 3, 4
    both = ActorCritic(policy, critic, tmp_path / "critic", takes_policy)
    both.load_state("begin")
    assert critic.load_state.call_args_list == [call("begin")] * takes_policy
    assert policy.load_state.call_args_list == [call("begin")] and both.checkpoint_bytes() == 7
    for folder in ("checkpoints/kept", "critic/kept", "critic/gone"):
        (tmp_path / folder).mkdir(parents=True)
    both.save_state(str(tmp_path / "checkpoints" / "new"), extra={"next_step": 2})
    assert [folder.name for folder in (tmp_path / "critic").iterdir()] == ["kept"]


# Trap: rows of conversations that take turns, laid end to end, are not in the order of time.
def test_a_reward_stays_at_its_turn_where_conversations_take_turns(torch_service) -> None:  # noqa: ANN001
    """A sub-agent (9) answers within its parent's conversation, which then earns 1."""
    client = torch_service.create_scalar_client("tiny")
    client._trainer.scalar_head.data.zero_()
    turns = [
        turn([1, 2], [3], [-1.0], 0.0),
        turn([9, 9], [8, 8], [-1.0, -1.0], 0.5),
        turn([1, 2, 3, 4], [5], [-1.0], 1),
    ]
    group = TrajectoryGroup([Trajectory(turns)], [0.0], [{}])
    critic = Critic(CriticConfig(discount=0.5, gae_lambda=1.0), client, 1.0)
    rows, _ = asyncio.run(critic.with_advantages([group], rows_of([group])))
    parent, sub_agent = (np.array(row.returns_T) for row in rows)
    # discounted rewards of the tokens 3, 8, 8, 5: 0, 0, 0.5, 1
    assert parent[[1, 3]].tolist() == [0.25, 1.0] and sub_agent[1:].tolist() == [0.5, 1.0]


def test_normalized_advantages_have_mean_0_and_deviation_1_over_tokens() -> None:
    """0.5 on two tokens and -0.5 on one: mean 1/6, deviation sqrt(2) / 3."""
    rows = normalized(two_data())
    high, low = (0.5 - 1 / 6) / (2**0.5 / 3), (-0.5 - 1 / 6) / (2**0.5 / 3)
    assert advantages(rows) == [pytest.approx([0, high, high]), pytest.approx([0, low])]


def critic_run(folder: Path, **settings: object) -> train.Config:
    common = {
        "save_every": 1,
        "env": LowTokenBuilder(n_batches=3),
        "advantage": NoReward(),
        "num_substeps": 2,
        "model_name": "micro",
    }
    critic = CriticConfig(model="policy")
    return config(folder, **({"critic": critic, "loss_fn": "ppo", "normalize_advantages": True} | common | settings))


@pytest.mark.slow
@pytest.mark.cpu_only
def test_a_run_with_a_critic_resumes_both_bit_for_bit(tmp_path: Path) -> None:
    asyncio.run(train.main(critic_run(tmp_path / "whole")))
    assert {"critic/value_loss", "critic/grad_norm", "critic/value_mean"} <= metrics(tmp_path / "whole")[0].keys()
    cut = critic_run(tmp_path / "cut", max_steps=2, keep_checkpoints=1)
    asyncio.run(train.main(cut))
    resume = chz.replace(cut, max_steps=None, behavior_if_log_dir_exists="resume_changed")
    asyncio.run(train.main(resume))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    heads = [
        (tmp_path / name / "critic" / "final" / "scalar_head.safetensors").read_bytes() for name in ("cut", "whole")
    ]
    assert heads[0] == heads[1]
    # an older critic beside a newer policy is not taken
    final = tmp_path / "whole" / "critic" / "final"
    final.rename(final.with_name("moved"))
    (tmp_path / "whole" / "critic" / "000001").rename(final)
    longer = chz.replace(critic_run(tmp_path / "whole", num_epochs=2), behavior_if_log_dir_exists="resume_changed")
    with pytest.raises(CheckpointError, match="is the critic before step 1, .* the policy before step 3"):
        asyncio.run(train.main(longer))


def test_options_that_contradict_a_critic_are_refused(tmp_path: Path) -> None:
    both = config(tmp_path / "run", critic=CriticConfig(model="policy"))
    with pytest.raises(ConfigError, match="set advantage=no_reward"):
        asyncio.run(train.main(both))
    parts = critic_run(tmp_path / "run", num_minibatches=2)
    with pytest.raises(ConfigError, match="normalize_advantages needs the whole batch"):
        asyncio.run(train.main(parts))
    assert not (tmp_path / "run").exists()
