"""From finished groups to training data, as values: each step takes rows and returns new rows
(specs: tinker_semantics 2.1).

rows_of -> with_advantages, or (critic.py) -> (kl.py) -> (distill.py) -> normalized -> without_truncated -> reduced
-> (mismatch.py) -> Row.datum
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.types import Datum, KeptRow, ModelInput
from rl.advantages import AdvantageEstimator
from rl.types import Trajectory, TrajectoryGroup

T = TypeVar("T")

# Divisor of a token's loss: none, its trajectory's sampled tokens (GRPO), the batch's (DAPO).
# And a constant (Dr. GRPO): max_tokens times the batch's rollouts.
Reduction = Literal["sum", "sequence_mean", "token_mean", "max_tokens"]


@dataclass(frozen=True)
class Row:
    """A token sequence of a trajectory, which becomes a Datum. Position t predicts token t + 1;
    tracks are (T,) float32."""

    tokens: list[int]
    """T + 1 tokens."""
    logprobs_T: np.ndarray
    """The sampler's logprobs; 0 where `mask_T` is 0."""
    advantages_T: np.ndarray
    mask_T: np.ndarray
    """1 where the predicted token was sampled."""
    temperature_T: np.ndarray | None
    """None where every token was sampled at temperature 1."""
    turn_T: np.ndarray
    """int32: the trajectory's turn that the predicted token is of. Rows of conversations that take
    turns are not in the order of time."""
    origin: tuple[int, int] = (0, 0)
    """(group, member)."""
    values_T: np.ndarray | None = None
    """With a critic (critic.py): its values before, and the returns it learns; 0 where `mask_T` is 0."""
    returns_T: np.ndarray | None = None
    kept: KeptRow | None = None
    """The row in a batch reward's forward pass, which training continues."""
    supervised: tuple[tuple[Datum, KeptRow | None], ...] = ()
    """The trajectory's supervised sequences, at its first row."""

    def datum(self) -> Datum:
        inputs = {"target_tokens": np.array(self.tokens[1:], dtype=np.int64)}
        inputs |= {"logprobs": self.logprobs_T, "advantages": self.advantages_T, "mask": self.mask_T}
        if self.temperature_T is not None:
            inputs["temperature"] = self.temperature_T
        return Datum(ModelInput.from_ints(self.tokens[:-1]), inputs)


@dataclass
class _Tokens:
    """A token sequence under construction, with its per-token tracks."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)

    def observe(self, turn: int, tokens: list[int]) -> None:
        self.tokens += tokens
        self.turn += [turn] * len(tokens)
        for track, value in ((self.logprobs, 0.0), (self.advantages, 0.0), (self.mask, 0.0), (self.temperature, 1.0)):
            track += [value] * len(tokens)

    def act(
        self, turn: int, tokens: list[int], logprobs: list[float], advantages: list[float], temperature: float
    ) -> None:
        self.tokens += tokens
        self.turn += [turn] * len(tokens)
        self.logprobs += logprobs
        self.advantages += advantages
        for track, value in ((self.mask, 1.0), (self.temperature, temperature)):
            track += [value] * len(tokens)

    def row(self, with_temperature: bool) -> Row:
        tracks = (self.logprobs, self.advantages, self.mask, self.temperature)
        logprobs_T, advantages_T, mask_T, temperature_T = (np.array(track[1:], dtype=np.float32) for track in tracks)
        turn_T = np.array(self.turn[1:], dtype=np.int32)
        return Row(self.tokens, logprobs_T, advantages_T, mask_T, temperature_T if with_temperature else None, turn_T)


def trajectory_rows(trajectory: Trajectory, with_temperature: bool = False) -> list[Row]:
    """A Row, and a new Row for each observation that extends none of the rows so far: an agent's
    conversations may take turns. A row without a sampled token teaches nothing, and is left out.

    Advantages are a batch reward's `token_advantages`, else 0. Tokens are never decoded and encoded
    again. Greedy tokens (temperature 0) have the untempered distribution's logprobs.
    """
    rows: list[_Tokens] = []
    for turn, transition in enumerate(trajectory.transitions):
        ob = transition.ob.to_ints()
        extended = [row for row in rows if ob[: len(row.tokens)] == row.tokens]
        running = max(reversed(extended), key=lambda row: len(row.tokens), default=None) or _Tokens()
        if not running.tokens:
            rows.append(running)
        running.observe(turn, ob[len(running.tokens) :])
        ac = transition.ac
        advantages = transition.token_advantages or [0.0] * len(ac.tokens)
        if len(advantages) != len(ac.tokens):
            raise DataError(f"a turn has {len(ac.tokens)} sampled tokens and {len(advantages)} token_advantages")
        running.act(turn, ac.tokens, ac.logprobs, advantages, ac.temperature or 1.0)
    return [tokens.row(with_temperature) for tokens in rows if any(tokens.mask[1:])]


def rows_of(groups_P: Sequence[TrajectoryGroup]) -> list[Row]:
    """Rows of every trajectory, in order. The temperature track exists if any temperature is not 1."""
    tempered = any(
        tr.ac.temperature not in (0.0, 1.0) for group in groups_P for t in group.trajectories_G for tr in t.transitions
    )
    return [
        replace(
            row, origin=(p, g), kept=kept, supervised=() if r else tuple(_with_kept(t.supervised, t.kept_supervised))
        )
        for p, group in enumerate(groups_P)
        for g, t in enumerate(group.trajectories_G)
        for r, (row, kept) in enumerate(_with_kept(trajectory_rows(t, tempered), t.kept))
    ]


def _with_kept(items: Sequence[T], kept: Sequence[KeptRow]) -> list[tuple[T, KeptRow | None]]:
    return list(zip(items, kept if len(kept) == len(items) else [None] * len(items), strict=True))


def sampled_in_time(rows: Sequence[Row]) -> dict[tuple[int, int], np.ndarray]:
    """(group, member) -> the places of its sampled tokens in the rows laid end to end, in the order of
    time."""
    places_of: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    start = 0
    for row in rows:
        places_of[row.origin].append(start + np.flatnonzero(row.mask_T > 0))
        start += len(row.mask_T)
    turns = np.concatenate([row.turn_T for row in rows])
    joined = {origin: np.concatenate(places) for origin, places in places_of.items()}
    return {origin: place_N[np.argsort(turns[place_N], kind="stable")] for origin, place_N in joined.items()}


def sampled_advantages(rows: Sequence[Row]) -> dict[tuple[int, int], np.ndarray]:
    """(group, member) -> the advantages of its sampled tokens, in the order of time."""
    if not rows:
        return {}
    flat = np.concatenate([row.advantages_T for row in rows])
    return {origin: flat[place_N] for origin, place_N in sampled_in_time(rows).items()}


def split_by_row(rows: Sequence[Row], flat: np.ndarray) -> list[np.ndarray]:
    """The rows' parts of an array that lays them end to end."""
    return np.split(flat, np.cumsum([len(row.mask_T) for row in rows])[:-1])


def trainable_groups(
    groups_P: Sequence[TrajectoryGroup], estimator: AdvantageEstimator, remove_constant: bool, min_group_size: int = 1
) -> list[int]:
    """Indices of the groups with enough members for the estimator (of a game, all seats) and, if
    required, rewards that vary (compared exactly; of a game, those of a seat)."""
    return [
        p
        for p, group in enumerate(groups_P)
        if (size := len(group.trajectories_G)) >= max(1, min_group_size)
        and estimator.accepts(size)
        and not (remove_constant and not estimator.varies(np.array(group.get_total_rewards())))
    ]


def compute_advantages(groups_P: Sequence[TrajectoryGroup], estimator: AdvantageEstimator) -> list[np.ndarray]:
    """(G,) advantages of each group's members. ConfigError where an estimator returns another shape
    or a number that is not finite."""
    advantages_P_G = estimator.of_batch([np.array(group.get_total_rewards(), dtype=np.float64) for group in groups_P])
    for group, advantages_G in zip(groups_P, advantages_P_G, strict=True):
        size = len(group.trajectories_G)
        if np.shape(advantages_G) != (size,):
            raise ConfigError(
                f"advantage={type(estimator).__name__} returned the shape {np.shape(advantages_G)} for {size} rollouts: "
                "one number for each is needed"
            )
        if not np.isfinite(np.asarray(advantages_G, dtype=np.float64)).all():
            raise ConfigError(
                f"advantage={type(estimator).__name__} returned {advantages_G!r:.100} for the rewards "
                f"{group.get_total_rewards()!r:.100}: advantages must be finite"
            )
    return [np.asarray(advantages_G) for advantages_G in advantages_P_G]


def with_advantages(rows: Sequence[Row], advantages_P_G: Sequence[np.ndarray]) -> list[Row]:
    """Adds each member's advantage to its sampled tokens."""
    return [
        replace(row, advantages_T=row.advantages_T + np.float32(advantages_P_G[p][g]) * row.mask_T)
        for row in rows
        for p, g in [row.origin]
    ]


def normalized(rows: Sequence[Row]) -> list[Row]:
    """(A - mean) / (std + 1e-8) over the sampled tokens of all rows (REINFORCE++, Hu 2025; PPO's code)."""
    sampled = np.concatenate([row.advantages_T[row.mask_T > 0] for row in rows]).astype(np.float64)
    mean, std = np.float32(sampled.mean()), np.float32(sampled.std() + 1e-8)
    return [replace(row, advantages_T=(row.advantages_T - mean) / std * row.mask_T) for row in rows]


def without_truncated(rows: Sequence[Row], groups_P: Sequence[TrajectoryGroup]) -> list[Row]:
    """Drops trajectories with a truncated turn: their reward says nothing (DAPO, 3.4)."""

    def is_whole(p: int, g: int) -> bool:
        return all(turn.ac.stop_reason != "length" for turn in groups_P[p].trajectories_G[g].transitions)

    return [row for row in rows if is_whole(*row.origin)]


def reduced(rows: Sequence[Row], reduction: Reduction, max_tokens: int = 0, num_rollouts: int = 0) -> list[Row]:
    """Divides each trajectory's loss by its number of sampled tokens, by the batch's, or by the most
    that all `num_rollouts` of the batch could have: both advantages and the weights of the supervised
    sequences. Losses sum over tokens."""
    if reduction == "sum":
        return list(rows)
    tokens_of: dict[tuple[int, int], float] = defaultdict(float)
    for row in rows:
        tokens_of[row.origin] += float(row.mask_T.sum())
    total = sum(tokens_of.values()) if reduction == "token_mean" else float(max_tokens * num_rollouts)
    return [
        replace(
            row,
            advantages_T=row.advantages_T / divisor,
            supervised=tuple((_with_weights_divided(datum, divisor), kept) for datum, kept in row.supervised),
        )
        for row in rows
        for divisor in [np.float32(max(tokens_of[row.origin] if reduction == "sequence_mean" else total, 1.0))]
    ]


def _with_weights_divided(datum: Datum, divisor: np.float32) -> Datum:
    inputs = datum.loss_fn_inputs
    return Datum(datum.model_input, {**inputs, "weights": inputs["weights"].array / divisor})


def split_substeps(rows: Sequence[T], num_substeps: int) -> list[Sequence[T]]:
    """In order, cut as evenly as integers allow: 10 rows in 3 substeps are 3, 3 and 4."""
    edges = np.linspace(0, len(rows), min(num_substeps, len(rows)) + 1).astype(int)
    return [rows[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True)]
