"""KL penalties, mismatch weights, normalisers, batch baselines and batch rewards: by hand, and
through a training step.
"""

import asyncio
import math
from pathlib import Path

import chz
import numpy as np
import pytest

from envs.star_graph import StarGraph
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import check_vocabulary
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, ModelInput, TensorData
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import parse
from recipes.star_graph.model import make_model
from rl import train
from rl.advantages import BatchMean, GroupMean, GroupMeanStd, NoBaseline, NoReward
from rl.algorithms import ALGORITHMS
from rl.config import check_config
from rl.critic import CriticConfig
from rl.data_processing import Row, compute_advantages, reduced, rows_of, with_advantages, without_truncated
from rl.distill import Distillation
from rl.kl import (
    KLPenalty,
    Reference,
    kl_metrics,
    other_model,
    penalized_advantages,
    penalized_rewards,
    sampled_minus_reference,
)
from rl.length import LengthPenalty
from rl.metrics import TokenMean
from rl.mismatch import MismatchCorrection, corrected, correction_weights
from rl.rollouts import RolloutLimits
from rl.train_cli import ADVANTAGES, CLIConfig
from rl.train_step import metrics_of_step
from rl.types import BatchReward, BatchRewardBuilder, TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition
from tests.conftest import gradients, policy_data, rounded
from tests.test_group_sources import LowTokenBuilder, config, metrics, weights
from tests.test_rl import group, turn


def two_data() -> list[Row]:
    """One group of two: prompt [1, 2]; 2 sampled tokens, then 1."""
    long = Trajectory([turn([1, 2], [3, 4], [-1.0, -2.0], 1.0)])
    short = Trajectory([turn([1, 2], [5], [-0.5], 0.0)])
    return with_advantages(rows_of([TrajectoryGroup([long, short], [0.0, 0.0], [{}, {}])]), [np.array([0.5, -0.5])])


# d = .5, -1 and .3
REFERENCE = [np.array([0.0, -1.5, -1.0], np.float32), np.array([0.0, -0.8], np.float32)]


def advantages(rows: list[Row]) -> list[list[float]]:
    return [row.datum().loss_fn_inputs["advantages"].tolist() for row in rows]


def test_kl_in_the_advantage_is_centred_and_leaks_nowhere() -> None:
    data = two_data()
    d = sampled_minus_reference(data, REFERENCE)
    k3 = sum(math.exp(-x) - 1 + x for x in (0.5, -1.0, 0.3)) / 3
    assert kl_metrics(data, d) == pytest.approx({"kl_policy_base": -0.2 / 3, "kl_policy_base_k3": k3})
    data = penalized_advantages(data, d, coef=0.1, discount=0.0)
    assert all(row.advantages_T.dtype == np.float32 for row in data)
    mean = -0.2 / 3
    assert advantages(data)[0] == pytest.approx([0.0, 0.5 + 0.1 * (mean - 0.5), 0.5 + 0.1 * (mean + 1.0)])
    assert advantages(data)[1] == pytest.approx([0.0, -0.5 + 0.1 * (mean - 0.3)])


# Trap: KL that reaches prompt tokens through its discount.
def test_discounted_kl_pays_for_later_tokens_and_never_touches_the_prompt() -> None:
    data = two_data()
    data = penalized_advantages(data, sampled_minus_reference(data, REFERENCE), coef=0.1, discount=0.5)
    assert advantages(data)[0] == pytest.approx([0.0, 0.5 + 0.1 * (-0.5 + 0.5 * 1.0), 0.5 + 0.1 * 1.0])


# Trap: a tool's long answer that discounts, or a sub-agent's row that is not seen.
def test_discounted_kl_counts_the_sampled_tokens_of_all_rows_in_time() -> None:
    """A sub-agent (9) says 8 between its parent's 3 and 5, before which are two tokens that were not sampled."""
    turns = [turn([1, 2], [3], [-1.0]), turn([9, 9], [8], [-1.0]), turn([1, 2, 3, 4, 4], [5], [-1.0])]
    rows = rows_of([TrajectoryGroup([Trajectory(turns)], [0.0], [{}])])
    d = [np.array([9.0, 0.5, 9.0, 9.0, 0.25], np.float32), np.array([9.0, 1.0], np.float32)]
    parent, sub_agent = advantages(penalized_advantages(rows, d, coef=1.0, discount=0.5))
    assert parent == [0.0, -(0.5 + 0.5 * 1.125), 0.0, 0.0, -0.25] and sub_agent == [0.0, -(1.0 + 0.5 * 0.25)]


def test_discounted_kl_does_not_pay_for_length() -> None:
    """The mean of d, summed over the tokens to come, would: here nothing is left of the penalty."""
    data = two_data()
    paid = penalized_advantages(data, [0.3 * row.mask_T for row in data], coef=1.0, discount=1.0)
    assert advantages(paid) == [pytest.approx([0.0, 0.5 - 0.6, 0.5 - 0.3]), pytest.approx([0.0, -0.5 - 0.3])]


def test_kl_in_the_reward_goes_through_the_baseline_and_leaves_the_logged_reward() -> None:
    data = two_data()
    original = TrajectoryGroup(
        [Trajectory([turn([1, 2], [3, 4], [-1.0, -2.0], 1.0)]), Trajectory([turn([1, 2], [5], [-0.5])])],
        [0.0, 0.0],
        [{}, {}],
    )
    (penalized,) = penalized_rewards([original], data, sampled_minus_reference(data, REFERENCE), coef=0.1)
    assert penalized.get_total_rewards() == pytest.approx([1.0 - 0.1 * -0.5, 0.0 - 0.1 * 0.3])
    assert original.get_total_rewards() == [1.0, 0.0]


def test_kl_of_the_starting_weights_is_zero_and_training_is_held_back(tmp_path: Path) -> None:
    final = {}
    for coef in (0.0, 5.0):
        asyncio.run(train.main(config(tmp_path / str(coef), kl=KLPenalty(coef=coef, where="reward"), temperature=0.8)))
        final[coef] = metrics(tmp_path / str(coef))
    assert abs(final[5.0][0]["kl_policy_base"]) < rounded(1e-6) and "kl_policy_base" not in final[0.0][0]
    assert weights(tmp_path / "0.0") != weights(tmp_path / "5.0")
    assert final[5.0][0]["env/all/reward/total"] == final[0.0][0]["env/all/reward/total"]


@pytest.mark.parametrize(
    "kind", ["another architecture", "full for a LoRA run", "LoRA for a full run", "plain peft adapter", "preset"]
)
def test_the_reference_may_be_any_model_of_the_same_vocabulary(kind: str, tmp_path: Path) -> None:
    """Its logprobs are those of the model that was saved, opened by itself."""
    lora = LoraConfig(rank=2, alpha=8.0) if kind in ("LoRA for a full run", "plain peft adapter") else None
    name = "gpt2-tiny" if kind == "another architecture" else "micro"
    path, rank = str(tmp_path / "saved"), 4 if kind == "full for a LoRA run" else 0
    data = policy_data(3)
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        saved = service.create_training_client(name, lora, seed=0)
        for _ in range(3):
            saved.forward_backward(data, "importance_sampling")
            saved.optim_step(AdamParams(1e-2)).result()
        expected = saved.forward(data, "importance_sampling", all_logprobs=False).result()
        saved.save_state(path).result()
        if kind == "plain peft adapter":
            for file in Path(path).rglob("*"):
                if file.is_file() and "adapter" not in file.name:
                    file.unlink()
        policy = service.create_training_client("tiny")
        check_vocabulary("reference", path, policy.get_tokenizer())
        reference = Reference(other_model(service, "llama-tiny" if kind == "preset" else path, policy))
        logprobs = asyncio.run(reference.logprobs(data))
    if kind != "preset":
        assert all(
            np.allclose(ours, out["logprobs"].array, atol=rounded(1e-6), equal_nan=True)
            for ours, out in zip(logprobs, expected.loss_fn_outputs, strict=True)
        )
    settings = config(
        tmp_path / "run", env=LowTokenBuilder(n_batches=1), kl=KLPenalty(coef=0.1, reference_path=path), lora_rank=rank
    )
    assert asyncio.run(train.main(settings))["kl_policy_base_k3"] > 0


def test_a_reference_that_cannot_serve_is_refused_before_the_run(tmp_path: Path) -> None:
    numerals = asyncio.run(make_model(StarGraph(2, 3, 10), tmp_path / "numerals"))
    with pytest.raises(ConfigError, match="its tokenizer has .* tokens, the policy's 260"):
        asyncio.run(train.main(config(tmp_path / "run", kl=KLPenalty(coef=0.1, reference_path=str(numerals)))))
    assert not (tmp_path / "run").exists()
    longer = config(tmp_path / "run", model_name="small", kl=KLPenalty(coef=0.1, reference_path="tiny"))
    with pytest.raises(ConfigError, match="backend.max_length=512"):
        asyncio.run(train.main(longer))


def test_normalisers_divide_by_the_right_number_of_tokens() -> None:
    expected = {"sum": [0.5, -0.5], "sequence_mean": [0.5 / 2, -0.5 / 1], "token_mean": [0.5 / 3, -0.5 / 3]}
    for reduction, (long, short) in expected.items():
        data = reduced(two_data(), reduction)  # type: ignore[arg-type]
        assert advantages(data)[0] == pytest.approx([0, long, long]) and advantages(data)[1] == pytest.approx(
            [0, short]
        )


# Trap: one half of a loss normalised and the other not.
@pytest.mark.parametrize(
    ("reduction", "long", "short"),
    [("sum", 1, 1), ("sequence_mean", 2, 1), ("token_mean", 3, 3)],
    ids=lambda value: str(value),
)
def test_normalisers_divide_supervised_sequences_as_the_policys_tokens(reduction: str, long: int, short: int) -> None:
    """Both halves of a trajectory's loss carry one factor: 1 / (2 or 1 sampled tokens of its own,
    or 3 of the batch).
    """
    trajectories = [Trajectory([turn([1, 2], [3, 4], [-1.0, -2.0])]), Trajectory([turn([1, 2], [5], [-0.5])])]
    for trajectory, weight in zip(trajectories, (1.0, 0.6), strict=True):
        inputs = {"target_tokens": [6, 7, 8], "weights": [0.0, weight, weight]}
        trajectory.supervised = [Datum(ModelInput.from_ints([1, 2, 6]), inputs)]
    rows = with_advantages(rows_of([TrajectoryGroup(trajectories, [0.0] * 2, [{}] * 2)]), [np.array([0.5, -0.5])])
    data = reduced(rows, reduction)  # type: ignore[arg-type]
    weights = [extra.loss_fn_inputs["weights"].tolist() for row in data for extra, _ in row.supervised]
    assert weights == [pytest.approx([0, 1 / long, 1 / long]), pytest.approx([0, 0.6 / short, 0.6 / short])]
    assert advantages(data) == [pytest.approx([0, 0.5 / long, 0.5 / long]), pytest.approx([0, -0.5 / short])]
    kept = [t.supervised[0].loss_fn_inputs["weights"].tolist() for t in trajectories]
    assert kept == [pytest.approx([0, 1, 1]), pytest.approx([0, 0.6, 0.6])], (
        "a trajectory's own sequences stay as they are"
    )


def test_batch_mean_uses_all_groups_and_nothing_else() -> None:
    out = BatchMean().of_batch([np.array([1.0, 0.0]), np.array([3.0])])
    assert [a.tolist() for a in out] == [pytest.approx([-1 / 3, -4 / 3]), pytest.approx([5 / 3])]
    assert BatchMean().of_batch([]) == []
    assert NoReward()(np.array([1.0, 3.0])).tolist() == [0, 0]


def test_truncated_rollouts_can_be_left_out() -> None:
    cut = TrajectoryGroup(
        [
            Trajectory([Transition(ModelInput.from_ints([1]), TokensWithLogprobs([2], [-1.0], reason), 0.0, True)])
            for reason in ("stop", "length")
        ],
        [0.0, 0.0],
        [{}, {}],
    )
    assert [row.origin for row in without_truncated(rows_of([cut]), [cut])] == [(0, 0)]


def test_mismatch_weights_by_hand() -> None:
    w = np.array([0.2, 0.9, 1.5, 8.0], np.float32)
    assert correction_weights(w, MismatchCorrection(mode="truncate", high=2.0)).tolist() == pytest.approx(
        [0.2, 0.9, 1.5, 2.0]
    )
    assert correction_weights(w, MismatchCorrection(mode="mask", low=0.5, high=2.0)).tolist() == pytest.approx(
        [0, 0.9, 1.5, 0]
    )


@pytest.mark.parametrize(
    ("correction", "cut", "size"),
    [
        (MismatchCorrection(mode="truncate", high=2.0), [0.25, 1.0, 2.0], 3.25**2 / (3 * (0.25**2 + 1 + 4))),
        (MismatchCorrection(mode="mask", low=0.25, high=2.0), [0.25, 1.0, 0.0], 1.25**2 / (3 * (0.25**2 + 1))),
        (MismatchCorrection(mode="mask", low=5.0, high=9.0), [0.0, 0.0, 0.0], 0.0),
    ],
)
def test_mismatch_correction_and_its_metrics_by_hand(
    correction: MismatchCorrection, cut: list[float], size: float
) -> None:
    w = np.array([0.25, 1.0, 4.0])
    trained = np.log(w) + [-1.0, -2.0, -0.5]

    class Trained:
        async def forward(self, *_: object, **__: object) -> ForwardBackwardOutput:
            outputs = [{"logprobs": TensorData([np.nan, *part])} for part in (trained[:2], trained[2:])]
            return ForwardBackwardOutput(outputs, {})

    rows, found = asyncio.run(corrected(Trained(), two_data(), correction))  # type: ignore[arg-type]
    assert advantages(rows) == [pytest.approx([0.0, 0.5 * cut[0], 0.5 * cut[1]]), pytest.approx([0.0, -0.5 * cut[2]])]
    assert np.concatenate([row.logprobs_T for row in rows]) == pytest.approx([0.0, *trained[:2], 0.0, trained[2]])
    assert {name.removeprefix("mismatch/"): value for name, value in found.items() if "mismatch/" in name} == (
        pytest.approx(
            {
                "weight_mean": 1.75,
                "weight_max": 4.0,
                "frac_changed": np.mean(cut != w),
                "effective_sample_size": size,
            }
        )
    )


def test_mismatch_correction_weighs_the_trainers_own_policy_gradient(torch_service) -> None:  # noqa: ANN001
    """With weight p / q and a ratio that starts at 1, the gradient is that of plain importance
    sampling, as long as nothing is cut.
    """
    client = torch_service.create_training_client("tiny")

    def rows() -> list[Row]:
        noisy = [Trajectory([turn([1, 2], [30 + i, 40], [-5.4 + 0.1 * i, -5.6], float(i))]) for i in range(3)]
        return with_advantages(rows_of([TrajectoryGroup(noisy, [0.0] * 3, [{}] * 3)]), [np.array([-1.0, 0.0, 1.0])])

    def gradient(rows: list[Row], loss: str) -> dict:
        client.forward_backward([row.datum() for row in rows], loss).result()
        grads = gradients(client._trainer)
        client.optim_step(AdamParams(0.0)).result()
        return grads

    plain = gradient(rows(), "importance_sampling")
    weighted, out = asyncio.run(corrected(client, rows(), MismatchCorrection(mode="truncate", high=1e9)))
    assert out["mismatch/frac_changed"] == 0 and out["optim/logprob_gap_mean"] > 0.01
    for loss in ("importance_sampling", "ppo", "reinforce"):
        for name, expected in gradient(weighted, loss).items():
            assert (expected - plain[name]).norm() <= rounded(2e-6) * plain[name].norm() + 1e-9, (loss, name)


def test_every_algorithm_preset_builds_and_an_option_given_wins() -> None:
    presets = {"algorithm": {name: algorithm.settings for name, algorithm in ALGORITHMS.items()}}
    needs = {"distill": ["distill.teacher=micro"]}
    for name in ALGORITHMS:
        built = parse(
            CLIConfig,
            [f"algorithm={name}", "env=envs.arithmetic:ArithmeticBuilder", *needs.get(name, [])],
            {"advantage": ADVANTAGES},
            presets,
        )
        check_config(chz.replace(built, max_tokens=4))
        assert built.algorithm == name
    mine = parse(
        CLIConfig,
        ["algorithm=ppo", "num_substeps=2", "loss_fn_config.clip_high_threshold=1.3"],
        {"advantage": ADVANTAGES},
        presets,
    )
    assert (mine.num_substeps, mine.loss_fn) == (2, "ppo")
    with pytest.raises(ConfigError, match="did you mean grpo"):
        parse(CLIConfig, ["algorithm=grppo"], {}, presets)


@chz.chz
class LikesToken(BatchRewardBuilder):
    """Adds to the reward, to single tokens, and trains on token 77 after the prompt."""

    async def __call__(
        self, service: ServiceClient, training_client: TrainingClient, renderer: Renderer
    ) -> BatchReward:
        async def reward(groups_P: list[TrajectoryGroup]) -> dict[str, float]:
            for g in groups_P:
                g.final_rewards_G = [10.0 * i for i in range(len(g.trajectories_G))]
                for trajectory in g.trajectories_G:
                    prompt = trajectory.transitions[0].ob.to_ints()
                    inputs = {"target_tokens": np.array([*prompt[1:], 77]), "weights": np.array([0.0, 1.0], np.float32)}
                    trajectory.supervised = [Datum(ModelInput.from_ints(prompt), inputs)]
                    trajectory.transitions[0].token_advantages = [1.0] * len(trajectory.transitions[0].ac.tokens)
            return {"likes": float(len(groups_P))}

        return reward  # type: ignore[return-value]


def test_a_batch_reward_reaches_rewards_tokens_and_the_supervised_loss(tmp_path: Path) -> None:
    settings = config(
        tmp_path, env=LowTokenBuilder(n_batches=30), batch_reward=LikesToken(), learning_rate=3e-3, num_substeps=2
    )
    asyncio.run(train.main(settings))
    records = metrics(tmp_path)
    assert records[0]["likes"] == 4 and records[0]["env/all/reward/total"] >= 10.0, (
        "0, 10 and 20 beside what the environment gives"
    )
    assert records[0]["optim/supervised_loss"] > 12 * 4.0, "twelve tokens of about ln 260"
    assert records[-1]["optim/supervised_loss"] < 12 * 1.0


@chz.chz
class SlowReward(BatchRewardBuilder):
    async def __call__(
        self, service: ServiceClient, training_client: TrainingClient, renderer: Renderer
    ) -> BatchReward:
        async def reward(groups_P: list[TrajectoryGroup]) -> dict[str, float]:
            calls.append(len(groups_P))
            await asyncio.sleep(0.1)
            return {"call_max": float(len(calls)), "call": float(len(calls))}

        calls: list[int] = []
        return reward  # type: ignore[return-value]


# Trap: seconds of a streaming step, averaged over its minibatches.
def test_a_steps_metrics_are_those_of_all_its_minibatches(tmp_path: Path) -> None:
    record = asyncio.run(train.main(config(tmp_path, batch_reward=SlowReward(), num_minibatches=4, max_steps=1)))
    assert record["time/batch_reward"] > 0.39 and (record["call_max"], record["call"]) == (4.0, 2.5)
    parts: list[dict[str, float]] = [
        {"kl_policy_base": TokenMean(1.0, 20), "time/critic": 0.5, "teacher_kl/b": TokenMean(1.0, 3)},
        {"kl_policy_base": TokenMean(4.0, 10), "teacher_kl/b": TokenMean(5.0, 1)},  # tokens of its tag, not of all
        {},
    ]
    assert metrics_of_step(parts) == {"kl_policy_base": 2.0, "time/critic": 0.5, "teacher_kl/b": 2.0}


# Trap: metrics of the mismatch correction, which are those of a minibatch, averaged over minibatches of other lengths.
def test_the_sampling_metrics_of_minibatches_are_those_of_all_their_tokens(torch_service) -> None:  # noqa: ANN001
    client = torch_service.create_training_client("tiny")
    long, short = two_data()
    correction = MismatchCorrection(mode="truncate")
    (_, whole), *parts = (asyncio.run(corrected(client, rows, correction)) for rows in ([long, short], [long], [short]))
    joined = metrics_of_step([part for _, part in parts])
    means = {name for name in whole if "ratio_p" not in name and name != "mismatch/effective_sample_size"}
    assert {name: joined[name] for name in means} == pytest.approx(
        {name: whole[name] for name in means}, rel=rounded(1e-5)
    )


DISTILLED = {"distill": Distillation(teacher="small"), "advantage": NoReward()}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"env": LowTokenBuilder(group_size=1)}, "advantage=GroupMean: .*every advantage is 0"),
        ({"env": LowTokenBuilder(group_size=1), "advantage": GroupMeanStd()}, "advantage=GroupMeanStd: .* is 0"),
        (
            {"env": LowTokenBuilder(group_size=1), "advantage": BatchMean(), "remove_constant_reward_groups": True},
            "no group would be trained on",
        ),
        ({"limits": RolloutLimits(min_group_size=4)}, "min_group_size=4 is more than group_size=3"),
        ({"critic": CriticConfig(model="policy"), "advantage": NoReward(), "learning_rate": 0.0}, "a tiny one"),
        ({**DISTILLED, "kl": KLPenalty(coef=0.1, where="reward")}, "kl.where=reward changes the reward, which"),
        ({**DISTILLED, "length": LengthPenalty(kind="kimi")}, "length.kind=kimi changes the reward, which"),
        ({"kl": KLPenalty(coef=0.1, where="reward", discount=0.5)}, "kl.discount=0.5 needs kl.where=advantage"),
        (
            {"loss_fn": "ppo", "loss_fn_config": {"clip_high_threshold": 0.28}},
            "clip_high_threshold=0.28 .*for an epsilon of 0.2 give 0.8 or 1.2",
        ),
        ({"loss_fn": "gspo", "loss_fn_config": {"clip_low_threshold": 1.1}}, "clip_low_threshold=1.1 clips tokens"),
        ({"mismatch": MismatchCorrection(mode="mask", low=3.0, high=4.0)}, "mismatch.low=3.0 clips tokens"),
        ({"mismatch": MismatchCorrection(mode="truncate", high=0.2)}, "mismatch.high=0.2 clips tokens"),
    ],
)
def test_options_that_would_have_no_effect_or_teach_nothing_are_refused(
    settings: dict, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_config(config(tmp_path, **settings))
    alone = {"env": LowTokenBuilder(group_size=1), "loss_fn": "ppo", "loss_fn_config": {"clip_low_threshold": 0.2}}
    for advantage in (BatchMean(), NoBaseline()):
        check_config(config(tmp_path, advantage=advantage, **alone))
    check_config(config(tmp_path, env=LowTokenBuilder(group_size=1), distill=Distillation(teacher="small")))


# Trap: an estimator's matrix, or its list of another length, of which the first numbers are taken.
def test_an_estimator_of_the_users_gives_one_number_for_each_rollout() -> None:
    @chz.chz
    class Wrong(GroupMean):
        def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
            return np.append(rewards_G, 0.0)

    @chz.chz
    class Listed(GroupMean):
        def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
            return [1.0] * len(rewards_G)  # type: ignore[return-value]

    with pytest.raises(ConfigError, match=r"advantage=Wrong returned the shape \(4,\) for 3 rollouts"):
        compute_advantages([group([0, 1, 1])], Wrong())
    assert compute_advantages([group([0, 1, 1])], Listed())[0].tolist() == [1.0, 1.0, 1.0]

    @chz.chz
    class OneInfinite(GroupMean):
        def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
            return np.append(rewards_G[1:], np.inf)

    with pytest.raises(ConfigError, match="advantage=OneInfinite returned .*must be finite"):
        compute_advantages([group([0, 1, 1])], OneInfinite())


def test_token_advantages_are_added_to_the_members() -> None:
    trajectory = Trajectory([turn([1, 2], [3, 4], [-1.0, -2.0])])
    trajectory.transitions[0].token_advantages = [0.25, -0.25]
    scored = TrajectoryGroup([trajectory], [0.0], [{}])
    (datum,) = [row.datum() for row in with_advantages(rows_of([scored]), [np.array([1.0])])]
    assert datum.loss_fn_inputs["advantages"].tolist() == [0, 1.25, 0.75]
    trajectory.transitions[0].token_advantages = [1.0]
    with pytest.raises(DataError, match="2 sampled tokens and 1 token_advantages"):
        rows_of([scored])


def test_constant_empty_and_truncated_batches_are_counted_and_move_nothing(tmp_path: Path) -> None:
    # every rollout runs into max_tokens
    settings = config(tmp_path, env=LowTokenBuilder(n_batches=2), train_on_truncated=False)
    asyncio.run(train.main(settings))
    assert [record["env/all/frac_truncated"] for record in metrics(tmp_path)] == [1.0, 1.0]
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        service.create_training_client("tiny").save_state(str(tmp_path / "untouched")).result()
    assert weights(tmp_path) == (tmp_path / "untouched" / "model.safetensors").read_bytes()
    constant = [group([1, 1]), group([0, 1])]
    assert compute_advantages(constant, GroupMean())[0].tolist() == [0, 0]
