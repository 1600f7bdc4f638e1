"""The cost of a run (samples, steps, tokens), printed before it starts. All methods get the same
number of samples per round, and the same steps and batch size.

With `sweep_cost=charged` a sweep counts against that number. With `given` the number grows for all
methods by the largest sweep: those without a sweep sample each query more often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.backend.errors import ConfigError
from recipes.bstar.methods import Method

SweepCost = Literal["given", "charged"]


@dataclass(frozen=True)
class Plan:
    """Samples per round of one method; `test` does not count against the budget."""

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
    """`samples`: samples per training and dev query. ConfigError if the sweep leaves too few."""
    largest_sweep = temperatures * dev * samples
    budget = queries * samples + (largest_sweep if sweep_cost == "given" else 0)
    chooses = method.temperature is None or method.threshold is None
    sweep = (temperatures if method.temperature is None else 1) * dev * samples if chooses else 0
    affordable = (budget - sweep) // queries
    per_query = method.samples or affordable
    if not 1 <= per_query <= affordable:
        raise ConfigError(
            f"a sweep of {sweep:,} of the {budget:,} samples of a round leaves {affordable} per query, and "
            f"{max(per_query, 1)} are needed: set sweep_cost=given, or make the grid or task.num_dev smaller"
        )
    return Plan(sweep, per_query, per_query * queries, test * (eval_samples + 1))


def print_plan(
    plans: Mapping[str, Plan], rounds: int, steps: Mapping[str, int], batch_size: int, max_tokens: int
) -> None:
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
    for name, costs in plans.items():
        sampled = costs.sweep + costs.train
        at_most = projected_tokens([costs], rounds, max_tokens)
        table.add_row(
            name,
            *(
                f"{n:,}"
                for n in (costs.sweep, costs.train, costs.samples_per_query, sampled, costs.test, steps[name], at_most)
            ),
        )
    get_console().print(table)


def projected_tokens(plans: Sequence[Plan], rounds: int, max_tokens: int) -> int:
    """Upper bound: every sample has `max_tokens`."""
    return sum(costs.sweep + costs.train + costs.test for costs in plans) * rounds * max_tokens


def check_budget(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise ConfigError(
            f"up to {tokens:,} tokens would be sampled, more than max_sampled_tokens={limit:,}: raise it, or "
            "lower rounds, samples, methods or task.num_train"
        )
