"""The balance score (B-STaR, Zeng et al. 2024, section 4.1) over a grid of temperatures and
thresholds.

    bs_i = min(n'_i / n*, 1) * n'_i / n_i       (0 if n_i = 0)          BS = mean of bs_i over all queries

n_i is the number of selected solutions of query i, n'_i the number of right ones among them, n* the
target number. The first factor measures exploration, the second exploitation.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

from posttrain.backend.errors import ConfigError, DataError
from recipes.bstar.records import Cell

Counts = tuple[int, int]  # (selected, right among them) of a query


def canonical(number: float | str) -> str:
    """The canonical text of a decimal: 0.50 and "0.5" are "0.5", 1.0 is "1", -0.0 is "0"."""
    try:
        decimal = Decimal(str(number))
    except InvalidOperation:
        raise ConfigError(f"{number!r} is not a decimal number") from None
    if not decimal.is_finite():
        raise ConfigError(f"{number!r} is not a finite number")
    text = f"{decimal.normalize():f}"
    return "0" if text == "-0" else text


def query_score(selected: int, right: int, n_star: float) -> float:
    if not 0 <= right <= selected:
        raise ValueError(f"{right} right of {selected} selected")
    return min(right / n_star, 1.0) * right / selected if selected else 0.0


def balance_score(counts_M: Sequence[Counts], n_star: float) -> float:
    """Mean over all M queries; exact summation makes it independent of their order."""
    return math.fsum(query_score(*counts, n_star) for counts in counts_M) / len(counts_M)


def surface(
    counts: Mapping[tuple[str, str], Sequence[Counts]],
    temperatures: Sequence[str],
    thresholds: Sequence[str],
    n_star: float,
) -> list[Cell]:
    """The score of every cell of the grid. DataError for a cell without counts."""
    grid = [(canonical(temperature), canonical(threshold)) for temperature in temperatures for threshold in thresholds]
    if missing := [cell for cell in grid if not counts.get(cell)]:
        raise DataError(
            f"no samples for (temperature, threshold) {', '.join(map(str, missing[:5]))}: sample the sweep again"
        )
    if more := sorted(counts.keys() - set(grid)):
        raise DataError(
            f"samples of (temperature, threshold) {', '.join(map(str, more[:5]))}, which the grid does not have"
        )
    return [Cell(*cell, balance_score(counts[cell], n_star)) for cell in dict.fromkeys(grid)]


def choose(cells: Sequence[Cell]) -> Cell:
    """The best cell; ties go to the lower temperature, then the higher threshold."""
    return max(cells, key=lambda cell: (cell.score, -Decimal(cell.temperature), Decimal(cell.threshold)))
