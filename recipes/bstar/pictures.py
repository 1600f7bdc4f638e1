"""Figures of report.py and compare.py: metrics by round, balance surfaces, time and tokens.

Left out: smoothing, and error bars of single runs.
"""

import io
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from posttrain.tracking.figures import (
    COLORS,
    SHARE,
    Panel,
    curves_by_label,
    draw_panels,
    finish_axis,
    panel_axes,
    read_curve,
)
from recipes.bstar.records import Choice, Summary

PAGE_INCHES = 13.2  # a figure of this width fills the page
# in the order they run
STAGES = ("sweep", "choose", "sample", "score", "select", "train", "greedy", "test")


def record(summary: Summary) -> dict[str, float]:
    """The round's metrics and chosen settings as a record; its step is the round."""
    chosen = {"temperature": summary.temperature, "threshold": summary.threshold, "balance": summary.balance}
    known = {name: float(number) for name, number in chosen.items() if number is not None}
    return {"step": summary.round} | known | summary.metrics


def value(summary: Summary, key: str) -> float:
    """A metric, or "temperature", "threshold" or "balance"; NaN if the round has none."""
    return record(summary).get(key, float("nan"))


def evaluated(summaries: Sequence[Summary]) -> list[int]:
    """The rounds after which the test set was sampled: `eval_every` leaves out others."""
    return [summary.round for summary in summaries if "test/pass@1" in summary.metrics]


def middle(summaries: Sequence[Summary]) -> int:
    """The middle one of the evaluated rounds: 2 of 0, 2, 4 and 6."""
    found = evaluated(summaries)
    return found[(len(found) - 1) // 2]


def samples_of(summaries: Sequence[Summary]) -> int:
    """K of the test set's pass@K."""
    matches = [re.fullmatch(r"test/pass@(\d+)", key) for key in summaries[0].metrics]
    return max(int(match[1]) for match in matches if match)


def test_keys(summaries: Sequence[Summary]) -> dict[str, str]:
    """Column -> metric, of the tables of final results."""
    k = samples_of(summaries)
    return {
        "P@1": "test/pass@1",
        "greedy": "test/greedy",
        f"P@{k}": f"test/pass@{k}",
        f"pass@{k}-4": f"test/pass@{k}-4",
    }


def panels(summaries: Sequence[Summary]) -> list[Panel]:
    """Panels of one method, without those that no round has data for."""
    k, records = samples_of(summaries), [record(summary) for summary in summaries]
    shares = {
        "test accuracy": {"greedy": "test/greedy", "pass@1": "test/pass@1", f"pass@{k}": f"test/pass@{k}"},
        f"exploration: {k} samples with S distinct right ones": {
            f"pass@{k}-{s}": f"test/pass@{k}-{s}" for s in (2, 4, 8, 16)
        },
        "exploitation: the S best by the reward model are right": {
            f"reward@{k}-{s}": f"test/reward@{k}-{s}" for s in (1, 2, 4)
        },
        "diversity: distinct steps of all": {"test": "test/diversity", "training": "train/diversity"},
        "training set": {"right": "train/selected_accuracy", "queries with any": "train/selected_queries"},
        "faults": {
            f"{fault}, {split}": f"{split}/{fault}"
            for fault in ("truncated", "unparsable")
            for split in ("train", "test")
        },
    }
    watched = [
        Panel(title, {label: [read_curve(records, key)] for label, key in lines.items()}, limits=SHARE, xlabel="round")
        for title, lines in shares.items()
    ]
    chosen = {"temperature": "temperature", "threshold": "threshold", "balance score": "balance"}
    watched += [Panel(title, {"": [read_curve(records, key)]}, xlabel="round") for title, key in chosen.items()]
    return [panel for panel in watched if not panel.empty]


def draw_surfaces(choices_R: Mapping[int, Choice]) -> Any:
    """A heat map of balance scores per round, all on one scale; the chosen cell is framed."""
    figure, axes = panel_axes(len(choices_R), "")
    scores = [cell.score for choice in choices_R.values() for cell in choice.surface]
    image = None
    for axis, (number, choice) in zip(axes, choices_R.items(), strict=True):
        temperatures = sorted({cell.temperature for cell in choice.surface}, key=Decimal)
        thresholds = sorted({cell.threshold for cell in choice.surface}, key=Decimal)
        grid = np.full((len(thresholds), len(temperatures)), np.nan)
        for cell in choice.surface:
            grid[thresholds.index(cell.threshold), temperatures.index(cell.temperature)] = cell.score
        image = axis.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=min(scores), vmax=max(scores))
        x, y = temperatures.index(choice.temperature), thresholds.index(choice.threshold)
        axis.add_patch(_frame(x, y))
        title = f"round {number}: {choice.score:.3f} at T {choice.temperature}, threshold {choice.threshold}"
        finish_axis(axis, title, False, "temperature")
        every = max(1, len(thresholds) // 10)
        axis.set_xticks(range(len(temperatures)), temperatures)
        axis.set_yticks(range(0, len(thresholds), every), thresholds[::every])
        axis.grid(False)
        axis.set_ylabel("threshold", fontsize=8, color="#4a525c")
    figure.colorbar(image, ax=axes, label="balance score", shrink=0.8, pad=0.01)
    return figure


def _frame(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#e5383b", linewidth=2, zorder=3)


def draw_costs(summaries: Sequence[Summary]) -> Any:
    """Seconds and tokens of each round by stage."""
    figure, axes = panel_axes(2, "")
    rounds = [summary.round for summary in summaries]
    for axis, title in zip(axes, ("seconds", "tokens"), strict=True):
        bottom = np.zeros(len(summaries))
        for number, stage in enumerate(STAGES):
            heights = np.array([getattr(summary, title).get(stage, 0.0) for summary in summaries], dtype=float)
            if heights.any():
                axis.bar(rounds, heights, bottom=bottom, label=stage, color=COLORS[number], width=0.7)
                bottom += heights
        finish_axis(axis, f"{title} of a round", False, "round")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def draw_comparison(runs_by_method: Mapping[str, Sequence[Sequence[Summary]]]) -> Any:
    """Curves of all methods, of one seed or several."""
    runs = {
        method: [[record(summary) for summary in run] for run in runs_S] for method, runs_S in runs_by_method.items()
    }
    k = samples_of(next(iter(runs_by_method.values()))[0])
    wanted = {
        "P@1, test": "test/pass@1",
        f"P@{k}, test": f"test/pass@{k}",
        f"pass@{k}-4, test": f"test/pass@{k}-4",
        "temperature": "temperature",
        "threshold": "threshold",
        "accuracy of the training set": "train/selected_accuracy",
    }
    drawn = [Panel(title, curves_by_label(runs, key), xlabel="round") for title, key in wanted.items()]
    drawn = [panel for panel in drawn if not panel.empty]
    return draw_panels(drawn, shared_legend=True)


def as_svg(figure: Any) -> str:
    """The figure as an SVG element whose text stays text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bstar", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"font-family: [^;]*; ", "", buffer.getvalue())  # use the page's font
    width = f'width="{min(100.0, 100 * figure.get_figwidth() / PAGE_INCHES):.0f}%"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', width, text[text.index("<svg") :], count=1)
