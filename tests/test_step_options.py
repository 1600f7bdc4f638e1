"""The options of a step, any of them together, against the formulas of docs/algorithms.md written out
token by token: what each sampled token's loss is weighed by."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, Datum, ModelInput
from rl.advantages import BatchMean, GroupMean, GroupMeanStd, LeaveOneOut, NoBaseline
from rl.config import Config, check_config
from rl.critic import Critic, CriticConfig
from rl.data_processing import Row
from rl.distill import Distillation
from rl.kl import KLPenalty, Reference
from rl.length import LengthPenalty
from rl.mismatch import MismatchCorrection
from rl.train_step import Learner, StepOutcome, _prepare, train_step
from rl.types import TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition
from tests.conftest import rounded
from tests.test_group_sources import config

REFERENCE, TEACHER, TRAINER = 1, 2, 3
LIMIT = 8  # max_tokens


def logprob(model: int, token: int, position: int) -> float:
    """Of a model that looks at nothing but the token and its place."""
    return -0.5 - ((token * 31 + position * 17 + model * 7) % 23) / 20


def logprobs_of(model: int, datum: Datum) -> np.ndarray:
    targets = datum.loss_fn_inputs["target_tokens"].array.tolist()
    return np.array([logprob(model, token, t + 1) for t, token in enumerate(targets)], np.float32)


class Model:
    """A reference, a teacher, and the trained policy."""

    def __init__(self, number: int):
        self.number = number

    async def logprobs(self, data_D: Sequence[Datum]) -> list[np.ndarray]:
        return [logprobs_of(self.number, datum) for datum in data_D]

    async def difference(self, groups_P: Sequence[TrajectoryGroup], rows: Sequence[Row]) -> Any:
        read_D = await self.logprobs([row.datum() for row in rows])
        return [(row.logprobs_T - read_T) * row.mask_T for row, read_T in zip(rows, read_D, strict=True)], {}

    async def forward(self, data_D: Sequence[Datum], loss_fn: str, all_logprobs: bool) -> Any:
        logprobs_D = await self.logprobs(data_D)
        return SimpleNamespace(loss_fn_outputs=[{"logprobs": SimpleNamespace(array=p_T)} for p_T in logprobs_D])


def random_trajectory(rng: np.random.Generator) -> Trajectory:
    """Turns extend the one before, after tokens that were not sampled, or begin another conversation."""
    turns, ob = [], [1, 2]
    for _ in range(rng.integers(1, 4)):
        tokens = rng.integers(3, 60, rng.integers(1, 4)).tolist()
        sampled = TokensWithLogprobs(
            tokens, (-2 * rng.random(len(tokens))).tolist(), "length" if rng.random() < 0.2 else "stop"
        )
        turns.append(Transition(ModelInput.from_ints(ob), sampled, float(rng.integers(2)), False))
        ob = [*ob, *tokens, 70, 71] if rng.random() < 0.6 else rng.integers(100, 200, 3).tolist()
    return Trajectory(turns)


def random_groups(rng: np.random.Generator) -> list[TrajectoryGroup]:
    groups = []
    for size in rng.integers(1, 5, 4):
        group = [random_trajectory(rng) for _ in range(size)]
        groups.append(TrajectoryGroup(group, rng.integers(2, size=size).astype(float).tolist(), [{} for _ in group]))
    equal = [Trajectory([turn]) for turn in (random_trajectory(rng).transitions[0] for _ in range(3))]
    groups.append(TrajectoryGroup(equal, [0.1 - t.reward for t in equal], [{} for _ in equal]))
    return groups


Token = tuple[int, int, int, int]  # group, member, turn, place in it


def written_out(groups: Sequence[TrajectoryGroup], c: Config) -> dict[Token, float]:
    """The weight of each sampled token that is trained on."""
    enough = [p for p, group in enumerate(groups) if len(group.trajectories_G) >= c.advantage.min_group_size]
    if c.remove_constant_reward_groups:
        enough = [p for p in enough if len(set(groups[p].get_total_rewards())) > 1]
    members = [(p, g) for p in enough for g in range(len(groups[p].trajectories_G))]
    q, ref, teacher, trainer = {}, {}, {}, {}
    for p, g in members:
        for k, turn in enumerate(groups[p].trajectories_G[g].transitions):
            for j, (token, sampled) in enumerate(zip(turn.ac.tokens, turn.ac.logprobs, strict=True)):
                place, position = (p, g, k, j), turn.ob.length + j
                q[place] = sampled
                for numbers, model in ((ref, REFERENCE), (teacher, TEACHER), (trainer, TRAINER)):
                    numbers[place] = logprob(model, token, position)
    of_member = {member: sorted(place for place in q if place[:2] == member) for member in members}  # in time
    rewards = {(p, g): groups[p].get_total_rewards()[g] for p, g in members}
    for member, places in of_member.items():
        if c.kl.coef and c.kl.where == "reward":
            rewards[member] -= c.kl.coef * sum(q[place] - ref[place] for place in places)
        if c.length.kind == "overlong":  # 0 up to 6 of 8 tokens
            rewards[member] += c.length.coef * min(0.0, max(-1.0, (6 - len(places)) / 2))
    weight: dict[Token, float] = {}
    for p, g in members:
        of_group = [rewards[member] for member in members if member[0] == p]
        mean, size = sum(of_group) / len(of_group), len(of_group)
        others = (sum(of_group) - rewards[p, g]) / max(size - 1, 1)
        of_batch = sum(rewards.values()) / len(rewards)
        deviation = (sum((reward - mean) ** 2 for reward in of_group) / size) ** 0.5
        advantage = {
            GroupMean: rewards[p, g] - mean,
            GroupMeanStd: (rewards[p, g] - mean) / (deviation + 1e-6),
            LeaveOneOut: rewards[p, g] - others,
            BatchMean: rewards[p, g] - of_batch,
            NoBaseline: rewards[p, g],
        }[type(c.advantage)]
        weight |= dict.fromkeys(of_member[p, g], advantage)

    def penalize(model: dict[Token, float], coef: float, discount: float, centre: bool = True) -> None:
        d = {place: q[place] - model.get(place, 0.0) for place in q}
        mean = sum(d.values()) / len(d) if centre and not discount else 0.0
        for places in of_member.values():
            for n, place in enumerate(places):
                later = sum(discount**k * d[at] for k, at in enumerate(places[n:])) if discount else d[place]
                weight[place] += coef * (mean - later)

    if c.kl.coef and c.kl.where == "advantage":
        penalize(ref, c.kl.coef, c.kl.discount)
    if c.entropy_coef:
        penalize({}, c.entropy_coef, 0.0)
    if c.distill.teacher:
        penalize(teacher, c.distill.coef, c.distill.discount, c.distill.centre)
    if c.normalize_advantages:
        mean, deviation = np.mean([*weight.values()]), np.std([*weight.values()])
        weight = {place: (value - float(mean)) / (float(deviation) + 1e-8) for place, value in weight.items()}
    for p, g in members:
        turns = groups[p].trajectories_G[g].transitions
        if not c.train_on_truncated and any(turn.ac.stop_reason == "length" for turn in turns):
            for place in of_member[p, g]:
                del weight[place]
    whole, rollouts = len(weight), sum(len(group.trajectories_G) for group in groups)
    for place in weight:
        divisors = {"sum": 1, "sequence_mean": len(of_member[place[:2]]), "token_mean": whole}
        weight[place] /= (divisors | {"max_tokens": LIMIT * rollouts})[c.loss_reduction]
        ratio = np.exp(trainer[place] - q[place])
        if c.mismatch.mode == "truncate":
            weight[place] *= min(ratio, c.mismatch.high)
        elif c.mismatch.mode == "mask":
            weight[place] *= ratio if c.mismatch.low <= ratio <= c.mismatch.high else 0.0
    return weight


def trained(rows: Sequence[Row]) -> dict[Token, float]:
    found, counts = {}, defaultdict(int)
    for row in rows:
        assert not row.advantages_T[row.mask_T == 0].any()
        for t in np.flatnonzero(row.mask_T):
            turn = (*row.origin, int(row.turn_T[t]))
            found[(*turn, counts[turn])] = float(row.advantages_T[t])
            counts[turn] += 1
    return found


CHOICES: dict[str, list[Any]] = {
    "advantage": [GroupMean(), GroupMeanStd(), LeaveOneOut(), BatchMean(), NoBaseline()],
    "kl": [
        *(KLPenalty(), KLPenalty(coef=0.3), KLPenalty(coef=0.3, where="reward")),
        *(KLPenalty(coef=0.3, discount=0.7), KLPenalty(coef=0.3, discount=1.0)),
    ],
    "length": [LengthPenalty(), LengthPenalty(kind="overlong", coef=0.5, buffer=2)],
    "entropy_coef": [0.0, 0.2],
    "distill": [
        *(Distillation(), Distillation(teacher="t", coef=0.5), Distillation(teacher="t", centre=False)),
        Distillation(teacher="t", discount=0.9),
    ],
    "normalize_advantages": [False, True],
    "remove_constant_reward_groups": [False, True],
    "train_on_truncated": [True, False],
    "loss_reduction": ["sum", "sequence_mean", "token_mean", "max_tokens"],
    "mismatch": [
        *(MismatchCorrection(), MismatchCorrection(mode="truncate", high=1.2)),
        MismatchCorrection(mode="mask", low=0.6, high=1.7),
    ],
}


@pytest.mark.parametrize("seed", range(40))
def test_options_of_a_step_together_are_their_formulas_token_by_token(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    chosen = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
    settings, groups = config(tmp_path, max_tokens=LIMIT, **chosen), random_groups(rng)
    check_config(settings)
    learner: Any = Learner(settings, Model(TRAINER), None, Model(REFERENCE) if settings.kl.coef else None)  # type: ignore[arg-type]
    learner.teachers = Model(TEACHER) if settings.distill.teacher else None
    before = [group.get_total_rewards() for group in groups]
    rows, _ = asyncio.run(_prepare(learner, groups, 0, outcome := StepOutcome(), {}))
    # the rows number the groups that are trained on
    places = [p for p, advantages_G in enumerate(outcome.advantages_P) if advantages_G is not None]
    got = {(places[p], *rest): value for (p, *rest), value in trained(rows).items()}
    expected = written_out(groups, settings)
    assert got.keys() == expected.keys(), chosen
    assert got == {
        place: pytest.approx(value, rel=rounded(2e-4), abs=rounded(2e-5)) for place, value in expected.items()
    }, chosen
    assert [group.get_total_rewards() for group in groups] == before  # penalties are in no reward that is logged


NOTHING = [Trajectory([Transition(ModelInput.from_ints([1, 2]), TokensWithLogprobs([], []), r, True)]) for r in (0, 1)]


class TwoParts:
    """A GroupSource of two minibatches: of one no token was sampled."""

    num_minibatches, max_refills, max_steps_off_policy = 2, 0, 0

    def __init__(self, *parts: Sequence[TrajectoryGroup]):
        self.parts = parts

    async def minibatches(self, step: int) -> Any:
        for part in self.parts:
            yield part


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"kl": KLPenalty(coef=0.3)}, {"kl": KLPenalty(coef=0.3, where="reward")}, {"entropy_coef": 0.2}),
        *({"mismatch": MismatchCorrection(mode="mask")}, {"critic": CriticConfig(model="policy")}),
    ],
)
def test_a_minibatch_without_a_sampled_token_changes_nothing(
    options: dict[str, Any], tmp_path: Path, torch_service: ServiceClient
) -> None:
    client, settings = torch_service.create_training_client("micro", None, 0), config(tmp_path, **options)
    reference = Reference(torch_service.create_training_client("micro", None, 1)) if settings.kl.coef else None
    scalar = torch_service.create_scalar_client("micro", None, 0)
    some = TrajectoryGroup([random_trajectory(np.random.default_rng(s)) for s in range(3)], [0.0, 1.0, 3.0], [{}] * 3)
    none = TrajectoryGroup(NOTHING, [0.0, 1.0], [{}] * 2)

    def metrics(*parts: Sequence[TrajectoryGroup]) -> dict[str, float]:
        critic = Critic(settings.critic, scalar, 1.0) if settings.critic.model else None
        learner = Learner(settings, client, None, reference, critic=critic)  # type: ignore[arg-type]
        still, found = AdamParams(learning_rate=0.0), {}
        asyncio.run(train_step(learner, TwoParts(*parts), 0, still, found))  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if name.split("/")[0] not in ("time", "train")}

    assert metrics([none]) == metrics([none], [none])
    expected = metrics([some])
    for parts in ([none], [some]), ([some], [none]):
        assert metrics(*parts) == pytest.approx(expected, rel=rounded(1e-5)), options
