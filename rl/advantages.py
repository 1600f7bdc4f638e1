"""Advantage estimators, chosen in the config: a group's rewards in, one advantage per member out."""

from collections.abc import Sequence

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, POSITIVE


@chz.chz
class AdvantageEstimator:
    min_group_size = 1  # class constants: smaller groups have no estimate
    needs_whole_batch = False  # whether the advantages of a group depend on the other groups

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        """(G,) rewards to (G,) advantages, float64."""
        raise NotImplementedError

    def of_batch(self, rewards_P_G: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The advantages of all groups of a batch."""
        return [self(rewards_G) for rewards_G in rewards_P_G]

    def accepts(self, group_size: int) -> bool:
        """Whether a group of this size, which may have lost members, has an estimate."""
        return group_size >= self.min_group_size

    def varies(self, rewards_G: np.ndarray) -> bool:
        """Whether rewards that are compared with each other differ."""
        return bool((rewards_G != rewards_G[0]).any())

    def check_group_size(self, group_size: int) -> None:
        if not self.accepts(group_size):
            raise ConfigError(f"{type(self).__name__} needs group_size >= {self.min_group_size}, not {group_size}")


def baseline(rewards: np.ndarray) -> np.ndarray:
    """The mean along the first axis. Of equal rewards it is their value: a mean that rounds would leave an
    advantage that Adam makes a step of."""
    return np.where((rewards == rewards[0]).all(axis=0), rewards[0], rewards.mean(axis=0))


@chz.chz
class GroupMean(AdvantageEstimator):
    """R - mean(R). Division by the deviation would favour problems almost always or never solved."""

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        return rewards_G - baseline(rewards_G)


@chz.chz
class GroupMeanStd(AdvantageEstimator):
    """(R - mean(R)) / (std(R) + eps), GRPO: Shao et al. 2024, section 4.1; population std (ddof 0)."""

    eps: float = chz.field(default=1e-6, validator=POSITIVE, doc="added to the standard deviation")

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        return (rewards_G - baseline(rewards_G)) / (rewards_G.std() + self.eps)


@chz.chz
class LeaveOneOut(AdvantageEstimator):
    """R_g - mean of the rest, RLOO: Ahmadian et al. 2024, eq. 8. Equals GroupMean times G / (G -
    1)."""

    min_group_size = 2

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        size = len(rewards_G)
        self.check_group_size(size)
        if (rewards_G == rewards_G[0]).all():  # their sum may round
            return np.zeros(size)
        return (size * rewards_G - rewards_G.sum()) / (size - 1)


@chz.chz
class SeatMean(AdvantageEstimator):
    """R - the mean of the same seat, for groups of several games from one position; members are
    ordered game by game. The mean over a zero-sum game is 0 and no baseline. SPIRAL (Liu et al.
    2025) keeps a running mean of each role; here the baseline comes from the group's games."""

    num_seats: int = chz.field(default=2, validator=COUNT, doc="players of the game")

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        rewards_GS = rewards_G.reshape(-1, self.num_seats)
        return (rewards_GS - baseline(rewards_GS)).reshape(-1)

    def varies(self, rewards_G: np.ndarray) -> bool:
        rewards_GS = rewards_G.reshape(-1, self.num_seats)
        return bool((rewards_GS != rewards_GS[0]).any())

    def accepts(self, group_size: int) -> bool:
        return group_size % self.num_seats == 0 and group_size >= 2 * self.num_seats

    def check_group_size(self, group_size: int) -> None:
        if not self.accepts(group_size):
            raise ConfigError(
                f"SeatMean needs two or more games of {self.num_seats} seats in a group, not group_size={group_size}"
            )


@chz.chz
class NoBaseline(AdvantageEstimator):
    """R itself: plain REINFORCE."""

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        return rewards_G.astype(np.float64)


@chz.chz
class NoReward(AdvantageEstimator):
    """0: the reward is a metric only. Token advantages (distill.py, batch rewards) are all there is."""

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        return np.zeros(len(rewards_G))


@chz.chz
class BatchMean(AdvantageEstimator):
    """R - mean(R) over the batch: REINFORCE with one baseline (the Q# star graphs, "baseline 1")."""

    needs_whole_batch = True

    def __call__(self, rewards_G: np.ndarray) -> np.ndarray:
        return rewards_G - baseline(rewards_G)

    def of_batch(self, rewards_P_G: Sequence[np.ndarray]) -> list[np.ndarray]:
        mean = baseline(np.concatenate(rewards_P_G)) if rewards_P_G else 0.0
        return [rewards_G - mean for rewards_G in rewards_P_G]
