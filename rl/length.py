"""Penalties on long answers, added to the reward before the baseline; lengths are sampled tokens.

overlong  DAPO (Yu et al. 2025, eq. 13): 0 up to limit - buffer, then falling to -1 at the limit
kimi      Kimi k1.5 (2025, 2.3.3): l = 0.5 - (length - shortest) / (longest - shortest) of the
          group; min(0, l) if wrong
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import chz
import numpy as np

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, NON_NEGATIVE
from rl.types import Metrics, Trajectory, TrajectoryGroup


@chz.chz
class LengthPenalty:
    kind: Literal["none", "overlong", "kimi"] = chz.field(
        default="none",
        doc="none; overlong: DAPO's penalty near the limit; kimi: Kimi k1.5's, relative to the lengths in the group",
    )
    coef: float = chz.field(default=1.0, validator=NON_NEGATIVE, doc="weight of the penalty in the reward")
    limit: int | None = chz.field(
        default=None, validator=COUNT, doc="overlong: answer length in tokens with the full penalty; None = max_tokens"
    )
    buffer: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="overlong: tokens before the limit at which the penalty begins; None = a fifth of the limit",
    )

    def checked(self, max_tokens: int) -> "LengthPenalty":
        """With limit and buffer. ConfigError if the buffer is longer than the limit."""
        limit = self.limit or max_tokens
        buffer = self.buffer or max(1, limit // 5)
        if self.kind == "overlong" and buffer > limit:
            raise ConfigError(f"length.buffer={buffer} is more than the limit of {limit} tokens")
        return chz.replace(self, limit=limit, buffer=buffer)


def overlong(lengths_G: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    return -np.clip((lengths_G - (limit - buffer)) / buffer, 0.0, 1.0)


def kimi(lengths_G: np.ndarray, correct_G: np.ndarray) -> np.ndarray:
    """0 for all where all lengths are equal."""
    shortest, longest = lengths_G.min(), lengths_G.max()
    if shortest == longest:
        return np.zeros(len(lengths_G))
    scores_G = 0.5 - (lengths_G - shortest) / (longest - shortest)
    return np.where(correct_G, scores_G, np.minimum(scores_G, 0.0))


def length_penalized(
    groups_P: Sequence[TrajectoryGroup], config: LengthPenalty
) -> tuple[list[TrajectoryGroup], Metrics]:
    """New groups, with the penalty in each member's reward, and its mean."""
    out, added = [], []
    for group in groups_P:
        lengths_G = np.array([trajectory.num_sampled_tokens for trajectory in group.trajectories_G], dtype=np.float64)
        if config.kind == "overlong":
            assert config.limit and config.buffer
            terms_G = overlong(lengths_G, config.limit, config.buffer)
        else:
            terms_G, played = np.zeros(len(lengths_G)), [bool(t.transitions) for t in group.trajectories_G]
            if any(played):  # a seat whose game ended before its first turn has no length to compare
                correct_G = np.array([_correct(t) for t in group.trajectories_G if t.transitions])
                terms_G[played] = kimi(lengths_G[played], correct_G)
        added += terms_G.tolist()
        rewards_G = [reward + config.coef * float(x) for reward, x in zip(group.final_rewards_G, terms_G, strict=True)]
        out.append(replace(group, final_rewards_G=rewards_G))
    return out, {"length_reward": float(np.mean(added))} if added else {}


def _correct(trajectory: Trajectory) -> bool:
    """An episode that a limit of the run ended is wrong, unless its environment says otherwise."""
    metrics = trajectory.transitions[-1].metrics
    if "correct" not in metrics and trajectory.stop_reason == "done":
        raise DataError(
            "length.kind=kimi needs the metric `correct` (0 or 1) in a rollout's last turn, and this environment's has "
            f"{', '.join(metrics) or 'none'}: return it in StepResult.metrics, or set length.kind=overlong"
        )
    return metrics.get("correct", 0.0) > 0
