"""B-STaR and the methods it is compared with: one loop, with a few settings.

STaR (Zelikman et al. 2022) trains on one greedy answer per query, without rationalization; ReST-EM
(Singh et al. 2023) on many samples. Both train from the warm start each round. Iterative RFT goes
on from the last weights with a fresh optimizer, online RFT with the same optimizer and schedule.
B-STaR is online RFT with temperature and threshold chosen each round. `online_rft` has the paper's
fixed settings, `online_rft_tNN` a better threshold, at three temperatures.
"""

from typing import Literal

import chz

from posttrain.backend.ranges import COUNT
from recipes.bstar.balance import canonical

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
    outcome_only: bool = chz.field(default=False, doc="select by the outcome reward, whatever the configured one")


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
    "star": Method(temperature="0", samples=1, start="warm_start", keep_optimizer=False, outcome_only=True),
    "temperature_only": Method(temperature=CHOSEN, threshold=INFORMED),
    "threshold_only": Method(threshold=CHOSEN),
}
