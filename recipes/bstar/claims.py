"""What the paper claims of B-STaR, tested over seeds: each run folder is one.

    python -m recipes.bstar.claims runs/bstar runs/bstar_1 runs/bstar_2

The differences between B-STaR and each other method after their last round, at the same seed, with
the 95% interval of their mean by Student's t; then, for each run:

    (a) pass@K-4: the coldest fixed run ends below its best round, B-STaR no lower than after the first.
    (b) After the middle round B-STaR still gains in pass@1, and more than every fixed run.
    (c) The chosen temperature ends above its first value; the balance score never falls by more
        than `NOISE`.

The rounds of the differences, (a) and (b) are those that were evaluated.
"""

import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path

from posttrain.backend.errors import DataError
from posttrain.tracking.command_line import run_on_folders
from recipes.bstar.methods import METHODS
from recipes.bstar.pictures import middle, samples_of, value
from recipes.bstar.records import Summary
from recipes.bstar.report import read_methods
from recipes.intervals import mean_and_margin

NOISE = 0.02


def read_rounds(run: Path) -> dict[str, list[Summary]]:
    """The rounds of all methods, B-STaR's first. DataError if it or all fixed online runs are missing."""
    rounds = read_methods(run)
    if "bstar" not in rounds or not fixed_online(rounds):
        raise DataError(f"{run}: needs bstar and an online method with fixed settings")
    if short := [name for name, summaries in rounds.items() if len(summaries) < 3]:
        raise DataError(f"{run}: {', '.join(short)} has fewer than two finished rounds")
    return rounds


def fixed_online(names: Iterable[str]) -> list[str]:
    """Methods like B-STaR but for the choice, the coldest first."""
    methods = {name: METHODS[name] for name in names if name in METHODS}
    fixed = {
        n: Decimal(m.temperature) for n, m in methods.items() if m.temperature and m.threshold and m.keep_optimizer
    }
    return sorted(fixed, key=lambda name: fixed[name])


def claims(run: Path) -> dict[str, tuple[bool, str]]:
    """Claim -> whether it holds in this run, and the figures."""
    rounds = read_rounds(run)
    fixed = fixed_online(rounds)
    wide = f"test/pass@{samples_of(rounds['bstar'])}-4"
    cold, bstar = (_curve(rounds[name], wide) for name in (fixed[0], "bstar"))
    holds = cold[-1] < max(cold[1:]) and bstar[-1] >= bstar[1]
    outcomes = {"a": (holds, f"{wide[5:]}: {fixed[0]} {_path(cold)}; bstar {_path(bstar)}")}
    late = {name: _late(rounds[name]) for name in ("bstar", *fixed)}
    holds = late["bstar"] > max(0.0, *(late[name] for name in fixed))
    shown = ", ".join(f"{name} {gain:+.3f}" for name, gain in late.items())
    return outcomes | {"b": (holds, f"after the middle round: {shown}"), "c": _chosen(rounds["bstar"][1:])}


def _curve(rounds: Sequence[Summary], key: str) -> list[float]:
    """The metric in the rounds that were evaluated."""
    return [number for summary in rounds if not math.isnan(number := value(summary, key))]


def _late(rounds: Sequence[Summary]) -> float:
    """The gain in pass@1 after the middle round."""
    return _curve(rounds, "test/pass@1")[-1] - value(rounds[middle(rounds)], "test/pass@1")


def _chosen(rounds: Sequence[Summary]) -> tuple[bool, str]:
    temperatures, scores = ([value(summary, key) for summary in rounds] for key in ("temperature", "balance"))
    rising = all(after >= before - NOISE for before, after in zip(scores[:-1], scores[1:], strict=True))
    thresholds = ", ".join(str(summary.threshold) for summary in rounds)
    shown = f"T {', '.join(f'{t:g}' for t in temperatures)}; threshold {thresholds}; balance {_path(scores)}"
    return rising and temperatures[-1] > temperatures[0], shown


def _path(values: Sequence[float]) -> str:
    return " ".join(f"{number:.3f}" for number in values)


def differences(folders: Sequence[Path]) -> list[str]:
    """A line for each metric and method that all runs have: B-STaR less the method."""
    runs = [read_rounds(run) for run in folders]
    others = [name for name in runs[0] if name != "bstar" and all(name in rounds for rounds in runs)]
    lines = []
    for key in ("test/pass@1", "test/greedy", f"test/pass@{samples_of(runs[0]['bstar'])}-4"):
        ends = {name: [_curve(rounds[name], key)[-1] for rounds in runs] for name in ("bstar", *others)}
        for name in others:
            more_S = [b - other for b, other in zip(ends["bstar"], ends[name], strict=True)]
            mean, margin = mean_and_margin(more_S)
            within = f" ± {margin:.3f}" if len(runs) > 1 else ""
            level = mean_and_margin(ends[name])[0]
            above = sum(more > 0 for more in more_S)
            lines.append(
                f"{key[5:]:10s} bstar - {name:18s} {mean:+.3f}{within}; above in {above} of {len(runs)} "
                f"({mean_and_margin(ends['bstar'])[0]:.3f} - {level:.3f})"
            )
    return lines


def text(folders: Sequence[Path]) -> str:
    lines = differences(folders)
    for run in folders:
        shown = (
            f"  ({name}) {'holds' if holds else 'fails'}: {figures}" for name, (holds, figures) in claims(run).items()
        )
        lines += [str(run), *shown]
    return "\n".join(lines)


if __name__ == "__main__":
    run_on_folders(text)
