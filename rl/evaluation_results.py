"""The numbers of an evaluation: a value of each metric for each problem, their means with standard
errors over problems (samples of one problem are one cluster), and differences of two models on the
same problems (Miller 2024, "Adding Error Bars to Evals").
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rl.evaluators import sample_values
from rl.metrics import mean_by_key
from rl.sample_metrics import mean_and_stderr, paired_difference, ratio_values, t_975
from rl.types import Trajectory, TrajectoryGroup

Values = Mapping[str, Sequence[float | None]]  # metric -> its value for each problem, None where it is missing
Ratios = Mapping[str, tuple[str, str]]  # metric -> the two whose sums over problems it divides
FIRST = ("correct", "pass@", "maj@", "reward", "best@")  # in a table
ROUNDING = 1e-12  # a smaller standard error is that of equal values


@dataclass(frozen=True)
class Estimate:
    """`stderr` is NaN for one problem."""

    mean: float
    stderr: float
    problems: int

    def __str__(self) -> str:
        stderr = self.stderr if self.stderr > ROUNDING else 0.0
        return f"{self.mean:.4g}" + (f" ± {stderr:.2g}" if self.problems > 1 else "")

    def to_json(self) -> dict[str, float | int | None]:
        numbers = {"mean": self.mean, "stderr": self.stderr}
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()} | {
            "problems": self.problems
        }


Estimates = dict[str, Estimate]


def problem_values(groups_P: Sequence[TrajectoryGroup], ks: Sequence[int]) -> Values:
    """Means over a problem's samples (its group's members), and pass@k, maj@k, best@k. A problem whose
    samples were all lost has None."""
    means_P = [_means(group) for group in groups_P]
    names = dict.fromkeys(name for means in means_P for name in means)
    values: dict[str, list[float | None]] = {name: [means.get(name) for means in means_P] for name in names}
    return values | {
        name: of_P for name, of_P in sample_values(groups_P, ks).items() if name not in ("best@1", "maj@1")
    }


def _means(group: TrajectoryGroup) -> dict[str, float]:
    """The mean of each metric over the group's finished members. A metric of an episode is the mean
    over the turns that have it."""
    rows = [
        _of_episode(trajectory) | metrics | {"reward": reward}
        for trajectory, metrics, reward in zip(
            group.trajectories_G, group.metrics_G, group.get_total_rewards(), strict=True
        )
    ]
    return mean_by_key(rows)


def _of_episode(trajectory: Trajectory) -> dict[str, float]:
    turns = trajectory.transitions
    counts = {"turns": float(len(turns)), "tokens": float(trajectory.num_sampled_tokens)}
    return mean_by_key(turn.metrics for turn in turns) | counts


def _with_ratios(values: Values, ratios: Ratios) -> Values:
    """And ratios of sums over these problems, as linearised values (`ratio_values`)."""
    found = {**values}
    for name, parts in ratios.items():
        if not values.keys() >= {*parts}:
            continue
        pairs_P = [*zip(*(values[part] for part in parts), strict=True)]
        present = [(x, y) for x, y in pairs_P if x is not None and y is not None]
        if sum(y for _, y in present):
            remaining = iter(ratio_values(*zip(*present, strict=True)))
            found[name] = [None if None in pair else next(remaining) for pair in pairs_P]
    return found


def estimates(values: Values, ratios: Ratios, places: Sequence[int] | None = None) -> Estimates:
    """The mean of each metric, of the problems at `places` (None: all), best known first."""
    if places is not None:
        values = {name: [of_P[place] for place in places] for name, of_P in values.items()}
    values, found = _with_ratios(values, ratios), Estimates()
    for name in sorted(values, key=_rank):
        present = [value for value in values[name] if value is not None]
        if present:
            mean, stderr = mean_and_stderr(present)
            found[name] = Estimate(mean, stderr if len(present) > 1 else float("nan"), len(present))
    return found


def differences(values: Values, baseline: Values, ratios: Ratios) -> Estimates:
    """Of the metrics that both models have. The problems must be the same, in the same order."""
    of_both = _of_both(values, baseline, ratios), _of_both(baseline, values, ratios)
    values, baseline = (_with_ratios(of_one, ratios) for of_one in of_both)
    found: Estimates = {}
    for name in sorted(values.keys() & baseline.keys(), key=_rank):
        mean, stderr, problems = paired_difference(values[name], baseline[name])
        if problems:
            found[name] = Estimate(mean, stderr if problems > 1 else float("nan"), problems)
    return found


def _of_both(values: Values, others: Values, ratios: Ratios) -> Values:
    """The values, those of the ratios' parts at the problems alone that the other model has, too."""
    parts = {part for pair in ratios.values() for part in pair} & values.keys() & others.keys()
    return {
        **values,
        **{
            part: [x if y is not None else None for x, y in zip(values[part], others[part], strict=True)]
            for part in parts
        },
    }


def interval_text(difference: Estimate) -> str:
    """The difference with its 95 % interval."""
    if not difference.stderr >= 0:
        return f"{difference.mean:+.3g}"
    margin = t_975(difference.problems) * difference.stderr
    return f"{difference.mean:+.3g} [{difference.mean - margin:+.3g}, {difference.mean + margin:+.3g}]"


def _rank(name: str) -> tuple[int, str, int]:
    """`correct` first; pass@2 before pass@16."""
    kind, _, k = name.partition("@")
    place = next((place for place, first in enumerate(FIRST) if name.startswith(first)), len(FIRST))
    return place, kind, int(k) if k.isdigit() else 0
