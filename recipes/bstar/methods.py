"""B-STaR and the methods it is compared with: one loop, with a few settings.

STaR (Zelikman et al. 2022) trains on one greedy answer per query, without rationalization; ReST-EM
(Singh et al. 2023) on many samples. Both train from the warm start each round. Iterative RFT goes
on from the last weights with a fresh optimizer, online RFT with the same optimizer and schedule.
B-STaR is online RFT with temperature and threshold chosen each round. `online_rft` has the paper's
fixed settings, `online_rft_tNN` a better threshold, at three temperatures. Controls: B-STaR with an
exact reward (`bstar_oracle`), with another n* (`bstar_nN`); ReST-EM with the steps of all rounds in
each (`rest_em_long`).
"""

from typing import Literal

import chz

from posttrain.backend.ranges import COUNT, POSITIVE
from recipes.bstar.balance import canonical

RewardName = Literal["configured", "outcome", "oracle"]
CHOSEN = None  # from the grid, by the balance score
INFORMED = "0.5"  # a threshold that no wrong answer passes, and few right ones fail


@chz.chz
class Method:
    """How a round samples, selects and trains. Temperatures and thresholds: canonical decimals."""

    temperature: str | None = chz.field(
        default="1", doc="of sampling; None = chosen each round", munger=lambda _, t: _decimal(t)
    )
    threshold: str | None = chz.field(
        default="0", doc="of the reward; None = chosen each round", munger=lambda _, t: _decimal(t)
    )
    start: Literal["last", "warm_start"] = chz.field(default="last", doc="initial weights of a round's training")
    keep_optimizer: bool = chz.field(
        default=True, doc="one optimizer and schedule over all rounds; False = fresh ones each round"
    )
    samples: int | None = chz.field(
        default=None, validator=COUNT, doc="samples per query; None = all that the budget allows"
    )
    reward: RewardName = chz.field(default="configured", doc="the reward that selects")
    n_star: float | None = chz.field(
        default=None, validator=POSITIVE, doc="n* of the balance score, instead of the configured one"
    )
    step_factor: int = chz.field(
        default=1, validator=COUNT, doc="steps of a round, in configured ones; above 1 if no optimizer is kept"
    )


def _decimal(value: str | None) -> str | None:
    return None if value is None else canonical(value)


METHODS = {
    "bstar": Method(temperature=CHOSEN, threshold=CHOSEN),
    "online_rft": Method(),
    **{
        f"online_rft_t{temperature.replace('.', '')}": Method(temperature=temperature, threshold=INFORMED)
        for temperature in ("0.5", "0.7", "1.0")
    },
    "rest_em": Method(start="warm_start", keep_optimizer=False),
    "iterative_rft": Method(keep_optimizer=False),
    "star": Method(temperature="0", samples=1, start="warm_start", keep_optimizer=False, reward="outcome"),
    "temperature_only": Method(temperature=CHOSEN, threshold=INFORMED),
    "threshold_only": Method(threshold=CHOSEN),
    "bstar_oracle": Method(temperature=CHOSEN, threshold=CHOSEN, reward="oracle"),
    **{f"bstar_n{n_star}": Method(temperature=CHOSEN, threshold=CHOSEN, n_star=n_star) for n_star in (3, 6, 24)},
    "rest_em_long": Method(start="warm_start", keep_optimizer=False, step_factor=6),
}
