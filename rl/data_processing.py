"""From finished groups to training data: advantages per member, trajectories flattened to Datums (specs: tinker_semantics 2.1)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Literal, TypeVar

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.backend.types import Datum, ModelInput
from rl.advantages import AdvantageEstimator
from rl.types import Trajectory, TrajectoryGroup

T = TypeVar("T")

# What a token's loss is divided by: nothing, its trajectory's sampled tokens (GRPO), all sampled tokens of the batch (DAPO).
Reduction = Literal["sum", "sequence_mean", "token_mean"]


@dataclass
class TrainingData:
    """`origin_D[d]` is the (group, member) that datum d came from. `supervised_D[d]` are its trajectory's supervised sequences, listed at
    the trajectory's first datum."""

    data_D: list[Datum]
    origin_D: list[tuple[int, int]]
    supervised_D: list[list[Datum]]

    def select(self, chosen: Sequence[bool]) -> "TrainingData":
        kept = list(compress(zip(self.data_D, self.origin_D, self.supervised_D, strict=True), chosen))
        return TrainingData([datum for datum, _, _ in kept], [origin for _, origin, _ in kept], [extra for _, _, extra in kept])


@dataclass
class _Tokens:
    """One token sequence under construction, with a track of each per-token number."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)

    def observe(self, tokens: list[int]) -> None:
        self.tokens += tokens
        for track, value in ((self.logprobs, 0.0), (self.advantages, 0.0), (self.mask, 0.0), (self.temperature, 1.0)):
            track += [value] * len(tokens)

    def act(self, tokens: list[int], logprobs: list[float], advantages: list[float], temperature: float) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.advantages += advantages
        for track, value in ((self.mask, 1.0), (self.temperature, temperature)):
            track += [value] * len(tokens)

    def datum(self, with_temperature: bool) -> Datum:
        """Shifted by one: position t predicts token t + 1."""
        inputs = {"target_tokens": np.array(self.tokens[1:], dtype=np.int64)}
        tracks = {"logprobs": self.logprobs, "advantages": self.advantages, "mask": self.mask}
        if with_temperature:
            tracks["temperature"] = self.temperature
        inputs |= {key: np.array(track[1:], dtype=np.float32) for key, track in tracks.items()}
        return Datum(ModelInput.from_ints(self.tokens[:-1]), inputs)


def trajectory_to_data(trajectory: Trajectory, advantage: float, with_temperature: bool = False) -> list[Datum]:
    """One Datum where every observation extends what came before it; a new Datum from each observation that does not.

    A token's advantage is the member's plus its own, where a batch reward gave it one.

    Tokens are never decoded and encoded again. Greedy tokens (temperature 0) have the untempered distribution's logprobs.
    """
    finished, running = [], _Tokens()
    for transition in trajectory.transitions:
        ob = transition.ob.to_ints()
        if running.tokens and ob[: len(running.tokens)] != running.tokens:
            finished.append(running)
            running = _Tokens()
        running.observe(ob[len(running.tokens) :])
        ac = transition.ac
        token_advantages = transition.token_advantages or [0.0] * len(ac.tokens)
        if len(token_advantages) != len(ac.tokens):
            raise DataError(f"a turn has {len(ac.tokens)} sampled tokens and {len(token_advantages)} token_advantages")
        running.act(ac.tokens, ac.logprobs, [advantage + own for own in token_advantages], ac.temperature or 1.0)
    return [tokens.datum(with_temperature) for tokens in [*finished, running] if len(tokens.tokens) >= 2]


def compute_advantages(groups_P: Sequence[TrajectoryGroup], estimator: AdvantageEstimator) -> list[np.ndarray]:
    """Per group the (G,) advantages of its members."""
    return estimator.of_batch([np.array(group.get_total_rewards(), dtype=np.float64) for group in groups_P])


def trainable_groups(
    groups_P: Sequence[TrajectoryGroup], estimator: AdvantageEstimator, remove_constant: bool, min_group_size: int = 1
) -> list[TrajectoryGroup]:
    """Groups with enough members left for the estimator and, if asked, with more than one distinct reward (compared exactly)."""
    kept = [group for group in groups_P if len(group.trajectories_G) >= max(1, estimator.min_group_size, min_group_size)]
    return [group for group in kept if len(set(group.get_total_rewards())) > 1] if remove_constant else kept


def assemble_training_data(
    groups_P: Sequence[TrajectoryGroup], advantages_P_G: Sequence[np.ndarray] | None = None
) -> TrainingData:
    """Every trajectory of every group, flattened. The temperature track is there when some token was not sampled at 1.

    Without `advantages_P_G` the members' own are still to come, by `add_advantages`.
    """
    tempered = any(
        tr.ac.temperature not in (0.0, 1.0) for group in groups_P for t in group.trajectories_G for tr in t.transitions
    )
    out = TrainingData([], [], [])
    for p, group in enumerate(groups_P):
        for g, trajectory in enumerate(group.trajectories_G):
            data = trajectory_to_data(trajectory, 0.0, tempered)
            out.data_D += data
            out.origin_D += [(p, g)] * len(data)
            out.supervised_D += [trajectory.supervised, *([] for _ in data[1:])] if data else []
    if advantages_P_G is not None:
        add_advantages(out, advantages_P_G)
    return out


def add_advantages(training_data: TrainingData, advantages_P_G: Sequence[np.ndarray]) -> None:
    """Each member's advantage to each of its sampled tokens, in place."""
    for datum, (p, g) in zip(training_data.data_D, training_data.origin_D, strict=True):
        inputs = datum.loss_fn_inputs
        inputs["advantages"].array += np.float32(advantages_P_G[p][g]) * inputs["mask"].array


def without_truncated(training_data: TrainingData, groups_P: Sequence[TrajectoryGroup]) -> TrainingData:
    """Leaves out the trajectories in which some turn ran into the token limit: they say nothing of the answer's worth (DAPO, 3.4)."""
    return training_data.select(
        [
            all(turn.ac.stop_reason != "length" for turn in groups_P[p].trajectories_G[g].transitions)
            for p, g in training_data.origin_D
        ]
    )


def scale_losses(training_data: TrainingData, reduction: Reduction) -> None:
    """Divides each trajectory's loss by the number of its sampled tokens, or by that of all. The losses sum over tokens.

    Both halves are divided: the advantages in place, and the weights of the supervised sequences, which become new Datums, since the
    trajectories hold the old ones.
    """
    if reduction == "sum":
        return
    counts_D = [float(datum.loss_fn_inputs["mask"].array.sum()) for datum in training_data.data_D]
    of_trajectory: dict[tuple[int, int], float] = defaultdict(float)
    for origin, tokens in zip(training_data.origin_D, counts_D, strict=True):
        of_trajectory[origin] += tokens
    for d, (datum, origin) in enumerate(zip(training_data.data_D, training_data.origin_D, strict=True)):
        tokens = np.float32(max(of_trajectory[origin] if reduction == "sequence_mean" else sum(counts_D), 1.0))
        datum.loss_fn_inputs["advantages"].array /= tokens
        training_data.supervised_D[d] = [_with_weights_divided(extra, tokens) for extra in training_data.supervised_D[d]]


def _with_weights_divided(datum: Datum, divisor: np.float32) -> Datum:
    inputs = datum.loss_fn_inputs
    return Datum(datum.model_input, {**inputs, "weights": inputs["weights"].array / divisor})


def split_substeps(data_D: Sequence[T], num_substeps: int) -> list[Sequence[T]]:
    """In order, unshuffled, cut as evenly as integers allow: 10 data in 3 substeps are 3, 3 and 4."""
    edges = np.linspace(0, len(data_D), min(num_substeps, len(data_D)) + 1).astype(int)
    return [data_D[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True)]
