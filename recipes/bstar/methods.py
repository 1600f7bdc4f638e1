"""B-STaR and what it is compared with: one loop, and what differs is these few fields.

STaR (Zelikman et al. 2022) is here without rationalization: one greedy answer, kept if right,
training from the warm start again. ReST-EM (Singh et al. 2023) samples many and also begins again;
iterative RFT goes on from the last weights with a fresh optimizer, online RFT with the optimizer
and its schedule. B-STaR is online RFT whose temperature and threshold are chosen each round.
"""

from typing import Literal

import chz

from posttrain.backend.ranges import COUNT
from recipes.bstar.balance import canonical

CHOSEN = None  # by the balance score, of the grid


@chz.chz
class Method:
    """How a round samples, selects and trains. Temperatures and thresholds are canonical
    decimals.
    """

    temperature: str | None = chz.field(
        default="1", doc="of sampling; None = chosen each round", munger=lambda _, t: _decimal(t)
    )
    threshold: str | None = chz.field(
        default="0", doc="of the reward; None = chosen each round", munger=lambda _, t: _decimal(t)
    )
    start: Literal["last", "warm_start"] = chz.field(
        default="last", doc="the weights that a round's training starts from"
    )
    keep_optimizer: bool = chz.field(
        default=True, doc="optimizer state and one schedule over all rounds, or fresh ones each round"
    )
    samples: int | None = chz.field(
        default=None, validator=COUNT, doc="samples of a query; None = what the budget allows"
    )
    outcome_only: bool = chz.field(default=False, doc="select by the answer alone, whatever the reward is otherwise")


def _decimal(value: str | None) -> str | None:
    return None if value is None else canonical(value)


METHODS = {
    "bstar": Method(temperature=CHOSEN, threshold=CHOSEN),
    "online_rft": Method(),
    "online_rft_cold": Method(temperature="0.5"),
    "rest_em": Method(start="warm_start", keep_optimizer=False),
    "iterative_rft": Method(keep_optimizer=False),
    "star": Method(temperature="0", samples=1, start="warm_start", keep_optimizer=False, outcome_only=True),
    "temperature_only": Method(temperature=CHOSEN),
    "threshold_only": Method(threshold=CHOSEN),
}
