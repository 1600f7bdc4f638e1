"""The pictures of report.py and compare.py: what is watched, round by round; the balance surfaces; where the time went.

Left out: smoothing, and error bars of single runs; a line is what was measured.
"""

import io
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from posttrain.tracking.figures import COLORS, SHARE, Curve, Panel, draw_panels, finish_axis, panel_axes
from recipes.bstar.records import Choice, Summary

PAGE_INCHES = 13.2  # a figure of this width fills the page
STAGES = ("sweep", "choose", "sample", "score", "select", "train", "greedy", "test")  # in the order they run


def value(summary: Summary, key: str) -> float:
    """A metric by name, or the chosen temperature, threshold or balance score; NaN where the round has none."""
    found = getattr(summary, key) if key in ("temperature", "threshold", "balance") else summary.metrics.get(key)
    return float("nan") if found is None else float(found)


def samples_of(summaries: Sequence[Summary]) -> int:
    """K of the test set's pass@K."""
    found = [re.fullmatch(r"test/pass@(\d+)", key) for key in summaries[0].metrics]
    return max(int(match[1]) for match in found if match)


def panels(summaries: Sequence[Summary]) -> dict[str, dict[str, str]]:
    """Title -> label -> key; what no round has is left out."""
    k, known = samples_of(summaries), {key for summary in summaries for key in summary.metrics}
    wanted = {
        "test accuracy": {"greedy": "test/greedy", "pass@1": "test/pass@1", f"pass@{k}": f"test/pass@{k}"},
        f"exploration: {k} samples with S distinct right ones": {f"pass@{k}-{s}": f"test/pass@{k}-{s}" for s in (2, 4, 8, 16)},
        "exploitation: the S best by the reward model are right": {f"reward@{k}-{s}": f"test/reward@{k}-{s}" for s in (1, 2, 4)},
        "diversity: distinct steps of all": {"test": "test/diversity", "training": "train/diversity"},
        "what is trained on": {"right": "train/selected_accuracy", "queries with any": "train/selected_queries"},
        "faults": {
            f"{fault}, {split}": f"{split}/{fault}" for fault in ("truncated", "unparsable") for split in ("train", "test")
        },
    }
    chosen = {"temperature": "temperature", "threshold": "threshold", "balance score": "balance"}
    present = {
        title: {label: key for label, key in lines.items() if key in known} for title, lines in wanted.items()
    } | {
        title: {"": key} for title, key in chosen.items() if any(not np.isnan(value(one, key)) for one in summaries)
    }  # fmt: skip
    return {title: lines for title, lines in present.items() if lines}


def draw_curves(summaries: Sequence[Summary]) -> Any:
    """What is watched of one method, over the rounds."""
    drawn = []
    for title, lines in panels(summaries).items():
        curves = {label: [_curve(summaries, key)] for label, key in lines.items()}
        drawn.append(Panel(title, curves, limits=None if "" in lines else SHARE, xlabel="round"))
    return draw_panels(drawn)


def _curve(summaries: Sequence[Summary], key: str) -> Curve:
    return Curve([summary.round for summary in summaries], [value(summary, key) for summary in summaries])


def draw_surfaces(choices_R: Mapping[int, Choice]) -> Any:
    """Balance scores over temperature and threshold, one map for each round, on one scale; the chosen cell is framed."""
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
    handles = {bar.get_label(): bar for axis in axes for bar in axis.containers}
    names = [stage for stage in STAGES if stage in handles]
    figure.legend([handles[name] for name in names], names, loc="outside right center", fontsize=8, frameon=False)
    return figure


def draw_comparison(runs_by_method: Mapping[str, Sequence[Sequence[Summary]]]) -> Any:
    """Methods over one another, of one seed or several."""
    some = next(iter(runs_by_method.values()))[0]
    k = samples_of(some)
    wanted = {
        "P@1, test": "test/pass@1",
        f"P@{k}, test": f"test/pass@{k}",
        f"pass@{k}-4, test": f"test/pass@{k}-4",
        "temperature": "temperature",
        "threshold": "threshold",
        "accuracy of what is trained on": "train/selected_accuracy",
    }
    drawn = [
        Panel(title, {method: [_curve(run, key) for run in runs_S] for method, runs_S in runs_by_method.items()}, xlabel="round")
        for title, key in wanted.items()
    ]
    return draw_panels(drawn, shared_legend=True)


def as_svg(figure: Any) -> str:
    """The figure as an element of a page, its text as text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bstar", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"font-family: [^;]*; ", "", buffer.getvalue())  # the page's
    width = f'width="{min(100.0, 100 * figure.get_figwidth() / PAGE_INCHES):.0f}%"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', width, text[text.index("<svg") :], count=1)
