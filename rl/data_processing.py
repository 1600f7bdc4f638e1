"""From finished groups to training data: advantages per member, trajectories flattened to Datums (specs: tinker_semantics 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backend.types import Datum, ModelInput
from rl.advantages import AdvantageEstimator
from rl.types import Trajectory, TrajectoryGroup


@dataclass
class TrainingData:
    """`origin_D[d]` is the (group, member) that datum d came from."""

    data_D: list[Datum]
    origin_D: list[tuple[int, int]]


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

    def act(self, tokens: list[int], logprobs: list[float], advantage: float, temperature: float) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        for track, value in ((self.advantages, advantage), (self.mask, 1.0), (self.temperature, temperature)):
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
        running.act(ac.tokens, ac.logprobs, advantage, ac.temperature or 1.0)
    return [tokens.datum(with_temperature) for tokens in [*finished, running] if len(tokens.tokens) >= 2]


def compute_advantages(groups_P: Sequence[TrajectoryGroup], estimator: AdvantageEstimator) -> list[np.ndarray]:
    """Per group the (G,) advantages of its members."""
    return [estimator(np.array(group.get_total_rewards())) for group in groups_P]


def trainable_groups(
    groups_P: Sequence[TrajectoryGroup], estimator: AdvantageEstimator, remove_constant: bool
) -> list[TrajectoryGroup]:
    """Groups with enough members left for the estimator and, if asked, with more than one distinct reward (compared exactly)."""
    kept = [group for group in groups_P if len(group.trajectories_G) >= max(1, estimator.min_group_size)]
    return [group for group in kept if len(set(group.get_total_rewards())) > 1] if remove_constant else kept


def assemble_training_data(groups_P: Sequence[TrajectoryGroup], advantages_P_G: Sequence[np.ndarray]) -> TrainingData:
    """Every trajectory of every group, flattened. The temperature track is there when some token was not sampled at 1."""
    tempered = any(
        tr.ac.temperature not in (0.0, 1.0) for group in groups_P for t in group.trajectories_G for tr in t.transitions
    )
    out = TrainingData([], [])
    for p, (group, advantages_G) in enumerate(zip(groups_P, advantages_P_G, strict=True)):
        for g, (trajectory, advantage) in enumerate(zip(group.trajectories_G, advantages_G, strict=True)):
            data = trajectory_to_data(trajectory, float(advantage), tempered)
            out.data_D += data
            out.origin_D += [(p, g)] * len(data)
    return out


def split_substeps(data_D: list[Datum], num_substeps: int) -> list[list[Datum]]:
    """In order, unshuffled, cut as evenly as integers allow: 10 data in 3 substeps are 3, 3 and 4."""
    edges = np.linspace(0, len(data_D), min(num_substeps, len(data_D)) + 1).astype(int)
    return [data_D[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True)]
