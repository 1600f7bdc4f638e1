"""Elo ratings from scores: the Bradley-Terry model by maximum likelihood (Bradley and Terry 1952; when
a finite maximum exists: Hunter 2004, section 2). A draw is half a win and half a loss, so a fitted
player's expected points are its points, as Elo defines a rating. Left out: ratings over time; an
advantage of the first seat (let every pair play both seats).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.backend.errors import DataError

ELO = 400 / np.log(10)  # Elo points per nat: 400 are odds of ten to one
TOLERANCE, NEWTON_STEPS, LARGEST_STEP = 1e-10, 200, 2.0  # nats


@dataclass(frozen=True)
class Ratings:
    """Elo points. `covariance_NN` has the anchor's row and column 0."""

    elo_N: np.ndarray
    covariance_NN: np.ndarray

    @property
    def stderr_N(self) -> np.ndarray:
        """Of each rating minus the anchor's."""
        return np.sqrt(np.diag(self.covariance_NN))

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """The rating of i minus that of j, and its standard error."""
        covariance = self.covariance_NN
        variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
        return float(self.elo_N[i] - self.elo_N[j]), float(np.sqrt(max(variance, 0.0)))


def elo_ratings(
    points_NN: np.ndarray, names: Sequence[str], anchor: int = 0, anchor_rating: float = 0.0, prior_draws: float = 1.0
) -> Ratings:
    """`points_NN[i, j]` are i's points in its games against j: 1, 1/2 or 0 a game, or a share for a
    game of several seats. `anchor` has the rating `anchor_rating`.

    `prior_draws` are added to the games of each pair that met, which keeps ratings finite; 0 is the
    plain maximum. Standard errors come from the Fisher information of games that are independent and
    without draws; a draw varies less, so with draws the errors are upper bounds. DataError where
    points are negative, or there is no finite maximum.
    """
    if (points_NN < 0).any() or not np.isfinite(points_NN).all():
        raise DataError("points of games must be finite and not negative")
    met_NN = (points_NN + points_NN.T) > 0
    points_NN = points_NN + met_NN * prior_draws / 2
    _check_connected(points_NN, names, anchor)
    games_NN = points_NN + points_NN.T
    free = np.arange(len(names)) != anchor
    theta_N = np.zeros(len(names))
    for _ in range(NEWTON_STEPS):
        expected_NN = 1 / (1 + np.exp(theta_N[None, :] - theta_N[:, None]))
        gradient_N = (points_NN - games_NN * expected_NN).sum(1)
        weights_NN = games_NN * expected_NN * (1 - expected_NN)
        information_NN = np.diag(weights_NN.sum(1)) - weights_NN
        step = np.linalg.solve(information_NN[np.ix_(free, free)], gradient_N[free])
        theta_N[free] += step * min(1.0, LARGEST_STEP / max(np.abs(step).max(initial=0.0), 1e-300))
        if np.abs(step).max(initial=0.0) < TOLERANCE:
            break
    else:
        raise DataError("the ratings did not converge: more games are needed, or prior_draws above 0")
    covariance_NN = np.zeros_like(points_NN)
    covariance_NN[np.ix_(free, free)] = np.linalg.inv(information_NN[np.ix_(free, free)])
    return Ratings(anchor_rating + ELO * theta_N, ELO**2 * covariance_NN)


def _check_connected(points_NN: np.ndarray, names: Sequence[str], anchor: int) -> None:
    """Hunter's assumption 1: from each player a chain of points leads to every other one."""
    reached_NN = (points_NN > 0) | np.eye(len(names), dtype=bool)
    for _ in range(len(names).bit_length()):  # chains of 2, 4, 8, ... games
        reached_NN = reached_NN @ reached_NN
    for i, name in enumerate(names):
        if not reached_NN[i, anchor] and not reached_NN[anchor, i]:
            raise DataError(f"no chain of games connects {name} with {names[anchor]}, so it has no rating")
        if not (reached_NN[i, anchor] and reached_NN[anchor, i]):
            outcome = "lost" if reached_NN[anchor, i] else "won"
            raise DataError(
                f"{name} {outcome} every game on each chain to {names[anchor]}: its rating is infinite; set prior_draws "
                "above 0"
            )
