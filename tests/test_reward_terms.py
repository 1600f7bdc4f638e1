"""Length penalties, the entropy bonus and Dr. GRPO's constant: by hand, and by their published formulas."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.backend.errors import ConfigError, DataError
from rl import train
from rl.data_processing import reduced, rows_of
from rl.kl import penalized_advantages
from rl.length import LengthPenalty, kimi, length_penalized, overlong
from rl.types import Trajectory, TrajectoryGroup
from tests.test_estimators import advantages, two_data
from tests.test_group_sources import LowTokenBuilder, config, metrics
from tests.test_rl import turn


def test_overlong_is_equation_13() -> None:
    lengths = np.array([1.0, 6.0, 7.0, 8.0, 10.0, 12.0])

    def published(length: float, limit: float, buffer: float) -> float:
        if length <= limit - buffer:
            return 0.0
        return (limit - buffer - length) / buffer if length <= limit else -1.0

    assert overlong(lengths, 10, 4).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert overlong(lengths, 10, 4).tolist() == pytest.approx([published(length, 10, 4) for length in lengths])


def test_kimis_reward_prefers_the_short_and_never_rewards_the_wrong() -> None:
    lengths, correct = np.array([10.0, 20.0, 30.0, 10.0]), np.array([True, True, False, False])
    assert kimi(lengths, correct).tolist() == pytest.approx([0.5, 0.0, -0.5, 0.0])
    assert kimi(np.array([7.0, 7.0]), np.array([True, False])).tolist() == [0.0, 0.0]


def group(*tokens: list[int], correct: bool | None = None) -> TrajectoryGroup:
    turns = [turn([1, 2], sampled, [-1.0] * len(sampled), 1.0) for sampled in tokens]
    for each in turns:
        each.metrics = {} if correct is None else {"correct": float(correct)}
    return TrajectoryGroup([Trajectory([each]) for each in turns], [0.0] * len(turns), [{} for _ in turns])


def test_the_penalty_is_in_the_reward_and_the_logged_reward_stays() -> None:
    original = group([3, 4, 5, 6], [7, 8])
    given = LengthPenalty(kind="overlong", limit=50).checked(max_tokens=100)
    assert (given.limit, given.buffer) == (50, 10)
    assert LengthPenalty(kind="kimi", buffer=9).checked(max_tokens=4).kind == "kimi"  # which reads neither
    penalty = LengthPenalty(kind="overlong", coef=2.0, buffer=2).checked(max_tokens=4)
    (penalized,), out = length_penalized([original], penalty)
    assert penalized.get_total_rewards() == [-1.0, 1.0] and original.get_total_rewards() == [1.0, 1.0]
    assert out == {"length_reward": -0.5}
    (short,), _ = length_penalized([group([3, 4, 5, 6], [7, 8], correct=True)], LengthPenalty(kind="kimi"))
    assert short.get_total_rewards() == [0.5, 1.5]
    idle = group([3, 4, 5, 6], [7, 8], correct=True)
    idle.trajectories_G.append(Trajectory([]))  # of a game that ended before its seat's first turn
    idle.final_rewards_G.append(0.5)
    (played,), out = length_penalized([idle], LengthPenalty(kind="kimi"))
    assert played.final_rewards_G == [-0.5, 0.5, 0.5] and out == {"length_reward": 0.0}
    with pytest.raises(DataError, match="needs the metric `correct` .*has none: return it in StepResult.metrics"):
        length_penalized([original], LengthPenalty(kind="kimi"))
    cut = group([3, 4, 5, 6], [7, 8], correct=True)  # Trap: the run ends with a game
    cut.trajectories_G[1].stop_reason, cut.trajectories_G[1].transitions[-1].metrics = "max_turns", {}
    (penalized,), _ = length_penalized([cut], LengthPenalty(kind="kimi"))
    assert penalized.final_rewards_G == [-0.5, 0.0]
    with pytest.raises(ConfigError, match=r"length.buffer=9 is more than the limit of 4 tokens"):
        LengthPenalty(kind="overlong", buffer=9).checked(max_tokens=4)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy() -> None:
    """Summed over all tokens a with their probability: sum of p(a) A(a) grad log p(a) = grad H."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(logprobs.exp() * logprobs).sum(), logits, retain_graph=True)
    sampled = [Trajectory([turn([1, 2], [a], [float(logprobs[a].detach())])]) for a in range(6)]
    rows = rows_of([TrajectoryGroup(sampled, [0.0] * 6, [{}] * 6)])
    rows = penalized_advantages(rows, [row.logprobs_T for row in rows], 1.0, 0.0)
    bonus = torch.tensor([float(row.advantages_T[-1]) for row in rows], dtype=torch.float64)
    (got,) = torch.autograd.grad((logprobs.exp().detach() * bonus * logprobs).sum(), logits)
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_dr_grpos_constant_is_the_most_tokens_of_all_rollouts() -> None:
    """Advantages 0.5 and -0.5, 2 rollouts of at most 8 tokens, whatever their lengths."""
    rows = reduced(two_data(), "max_tokens", max_tokens=8, num_rollouts=2)
    assert advantages(rows) == [pytest.approx([0, 0.5 / 16, 0.5 / 16]), pytest.approx([0, -0.5 / 16])]


def test_a_run_with_all_of_them(tmp_path: Path) -> None:
    settings = {"loss_reduction": "max_tokens", "entropy_coef": 0.01, "length": LengthPenalty(kind="overlong")}
    asyncio.run(train.main(config(tmp_path / "run", env=LowTokenBuilder(n_batches=1), model_name="micro", **settings)))
    record = metrics(tmp_path / "run")[0]
    assert record["length_reward"] == -1.0 and record["optim/grad_norm"] > 0, "every answer has max_tokens tokens"
    with pytest.raises(ConfigError, match="loss_reduction=max_tokens needs the whole batch"):
        asyncio.run(train.main(config(tmp_path / "other", num_minibatches=2, loss_reduction="max_tokens")))
