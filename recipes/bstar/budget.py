"""What a run will cost, said before it starts: samples, steps, tokens. Every method gets the same
number of samples a round.

The sweep of a method that chooses is paid from that number (`sweep_cost=charged`), or the number is
raised for all by what the largest sweep costs (`given`): methods without a sweep then sample each
query more often. Steps and batch size are the same for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.backend.errors import ConfigError
from recipes.bstar.methods import Method

SweepCost = Literal["given", "charged"]


@dataclass(frozen=True)
class Plan:
    """Samples per round of one method: `sweep` and `train` count to the budget, `test` does not."""

    sweep: int
    samples_per_query: int
    train: int
    test: int


def plan(
    method: Method,
    *,
    queries: int,
    dev: int,
    test: int,
    samples: int,
    temperatures: int,
    eval_samples: int,
    sweep_cost: SweepCost,
) -> Plan:
    """`samples` are those of a query of the training and of the dev set; ConfigError if the sweep
    leaves too little.
    """
    largest_sweep = temperatures * dev * samples
    budget = queries * samples + (largest_sweep if sweep_cost == "given" else 0)
    chooses = method.temperature is None or method.threshold is None
    sweep = (temperatures if method.temperature is None else 1) * dev * samples if chooses else 0
    affordable = (budget - sweep) // queries
    per_query = method.samples or affordable
    if not 1 <= per_query <= affordable:
        raise ConfigError(
            f"a sweep of {sweep:,} samples leaves {affordable} a query of the {budget:,} of a round, and "
            f"{max(per_query, 1)} are "
            "wanted: set sweep_cost=given, or make the grid or task.num_dev smaller"
        )
    return Plan(sweep, per_query, per_query * queries, test * (eval_samples + 1))


def print_plan(plans: Mapping[str, Plan], rounds: int, steps: int, batch_size: int, max_tokens: int) -> None:
    from rich import get_console
    from rich.table import Table

    columns = (
        "method",
        "sweep",
        "train",
        "a query",
        "sum",
        "test",
        f"steps of {batch_size}",
        "tokens sampled, at most",
    )
    table = Table(
        *columns, title=f"{rounds} rounds; samples and steps of one round", title_justify="left", header_style="dim"
    )
    for name, one in plans.items():
        sampled = one.sweep + one.train
        at_most = projected_tokens([one], rounds, max_tokens)
        table.add_row(
            name, *(f"{n:,}" for n in (one.sweep, one.train, one.samples_per_query, sampled, one.test, steps, at_most))
        )
    get_console().print(table)


def projected_tokens(plans: Sequence[Plan], rounds: int, max_tokens: int) -> int:
    """An upper bound: every sample at its longest."""
    return sum(one.sweep + one.train + one.test for one in plans) * rounds * max_tokens


def check_budget(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise ConfigError(
            f"up to {tokens:,} tokens would be sampled, more than max_sampled_tokens={limit:,}: raise it, or ask for "
            "less "
            "(rounds, samples, methods, task.num_train)"
        )
