"""Figures of panels in one style: curves by label, thin for each seed and thick for their mean.
A curve of many steps is thin, with the means of equal bins in front. matplotlib is imported on
the first drawing, without a window system.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain.backend.extras import missing
from posttrain.tracking.jsonl import write_atomically

COLORS = ("#2f6db5", "#d9772b", "#3a9a5b", "#c0447a", "#7a5cc2", "#8a6d4b", "#4aa8b8", "#6b7280")
COLUMNS = 3
SHARE = (-0.03, 1.03)  # axis limits for shares
SMALLEST_SPAN = 0.05  # of the largest value; smaller spans are noise
SPARSE = 30  # fewer steps get markers
DENSE, BINS = 150, 60  # more steps hide the trend: the means of about so many bins are drawn in front
Records = Sequence[Mapping[str, Any]]  # of a metrics.jsonl


class Curve(NamedTuple):
    """Steps and values of a logged metric; NaN leaves a gap."""

    steps_K: list[int]
    values_K: list[float]


Curves = Mapping[str, Sequence[Curve]]  # label -> a curve for each seed


@dataclass(frozen=True)
class Panel:
    """`levels` are dashed horizontal lines (chance, a target), `dashed` the labels of curves that
    overlap others. Without `limits` the axis fits the curves and spans at least `least_span`; of `decades`
    it spans whole powers of ten."""

    title: str
    curves: Curves
    levels: Mapping[str, float] = field(default_factory=dict)
    limits: tuple[float, float] | None = None
    least_span: float = 0.0
    decades: bool = False
    dashed: Sequence[str] = ()
    xlabel: str = "step"

    @property
    def empty(self) -> bool:
        return not any(curve.steps_K for seeds in self.curves.values() for curve in seeds)


def read_curve(records: Records, *keys: str) -> Curve:
    """The curve of the first of `keys` that was logged; empty without numbers (null is NaN)."""
    key = next((key for key in keys if any(record.get(key) is not None for record in records)), "")
    points = [(record["step"], record[key]) for record in records if key in record]
    return Curve([step for step, _ in points], [math.nan if value is None else value for _, value in points])


def over_total(records: Records, key: str, *counts: str) -> Curve:
    """The curve of `key` over the running total of the metrics `counts` before each of its steps, e.g. over
    sampled tokens."""
    curve = read_curve(records, key)
    added = [sum(record.get(count) or 0.0 for count in counts) for record in records]
    totals = [0.0, *accumulate(added)]
    first = records[0]["step"] if records else 0
    return Curve([round(totals[step - first]) for step in curve.steps_K], curve.values_K)


def at_multiples(curve: Curve, every: int) -> Curve:
    """Linear interpolation at multiples of `every`: curves of several seeds then share their steps."""
    if not curve.steps_K:
        return curve
    steps = list(range(0, curve.steps_K[-1] + 1, every))
    return Curve(steps, np.interp(steps, *curve).tolist())


def curves_by_label(runs: Mapping[str, Sequence[Records]], *keys: str) -> Curves:
    """`runs`: label -> the records of each seed."""
    return {label: [read_curve(records, *keys) for records in seeds] for label, seeds in runs.items()}


def mean_curve(curves_S: Sequence[Curve]) -> Curve:
    """The mean over seeds, at the steps of all seeds."""
    at = [dict(zip(*curve, strict=True)) for curve in curves_S]
    shared = sorted(set.intersection(*map(set, at))) if at else []
    return Curve(shared, [sum(values[step] for values in at) / len(at) for step in shared])


def binned(curve: Curve) -> tuple[Curve, int]:
    """Means over bins of steps, without NaN, and the number of steps in a bin: 1, and the curve itself, up to DENSE."""
    width = math.ceil(len(curve.steps_K) / BINS) if len(curve.steps_K) > DENSE else 1
    if width == 1:
        return curve, 1
    means = []
    for values in (curve.steps_K, curve.values_K):
        parts = (np.array(values[start : start + width], float) for start in range(0, len(values), width))
        means.append([float(part[~np.isnan(part)].mean()) if (part == part).any() else math.nan for part in parts])
    return Curve(*means), width


def draw_panels(panels: Sequence[Panel], title: str = "", shared_legend: bool = False) -> Any:
    """The figure. With `shared_legend` labels keep their colour, and the legend is above."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves)) if shared_legend else []
    levels = {level for panel in panels for level in panel.levels} if shared_legend else set()
    figure, axes = panel_axes(len(panels), title, legend_rows=math.ceil(len([*labels, *levels]) / COLUMNS))
    for axis, panel in zip(axes, panels, strict=True):
        draw_panel(axis, panel, labels)
    if shared_legend:
        handles = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label()[0] != "_"}
        figure.legend(list(handles.values()), list(handles), loc="upper left", ncols=COLUMNS, frameon=False)
    return figure


def draw_panel(axis: Any, panel: Panel, labels: Sequence[str] = ()) -> None:
    """`labels` set the order of colours; default: the panel's, with a legend for several."""
    order, widths = list(labels or panel.curves), {1}
    for label, seeds in panel.curves.items():
        color, curves_S = COLORS[order.index(label) % len(COLORS)], [curve for curve in seeds if curve.steps_K]
        for curve in curves_S if len(curves_S) > 1 else ():
            axis.plot(*curve, color=color, linewidth=0.7, alpha=0.4)
        whole = mean_curve(curves_S)
        mean, width = binned(whole)
        if width > 1 and len(curves_S) == 1:
            axis.plot(*whole, color=color, linewidth=0.4, alpha=0.35)
        widths.add(width)
        style = {"marker": "o", "markersize": 3.5} if len(mean.steps_K) < SPARSE else {}
        if mean.steps_K:
            style["linestyle"] = "--" if label in panel.dashed else "-"
            axis.plot(*mean, label=label, color=color, linewidth=1.5 if len(curves_S) == 1 else 2.0, **style)
    for (label, level), color in zip(panel.levels.items(), reversed(COLORS), strict=False):
        axis.axhline(level, label=label, color=color, linestyle="--", linewidth=1.2)
    if panel.limits:
        axis.set_ylim(panel.limits)
    elif panel.decades:
        _span_decades(axis)
    else:
        _widen(axis, panel.least_span)
    with_legend = not labels and len(axis.get_legend_handles_labels()[1]) > 1
    finish_axis(axis, panel.title, with_legend, with_width(panel.xlabel, max(widths)))


def with_width(xlabel: str, width: int) -> str:
    return xlabel if width == 1 else f"{xlabel} (means of {width})"


def _widen(axis: Any, least_span: float) -> None:
    """Widens the axis to `least_span`, and to a part of the largest value: noise stays small."""
    values = [y for line in axis.get_lines() for y in line.get_ydata() if y == y]
    low, high = axis.get_ylim()
    span = max(least_span, SMALLEST_SPAN * max(map(abs, values), default=0.0))
    if high - low < span:
        middle = (low + high) / 2
        bottom = middle - span / 2 if min(values, default=0.0) < 0 else max(middle - span / 2, -0.04 * span)
        axis.set_ylim(bottom, bottom + span)


def _span_decades(axis: Any) -> None:
    """A logarithmic axis, where a value is positive."""
    logs = [math.log10(y) for line in axis.get_lines() for y in line.get_ydata() if 0 < y < math.inf]
    if logs:
        axis.set_yscale("log")
        axis.set_ylim(10.0 ** math.floor(min(logs)), 10.0 ** (math.floor(max(logs)) + 1))


def panel_axes(
    panels: int,
    title: str = "",
    legend_rows: int = 0,
    columns: int = 0,
    size: tuple[float, float] = (4.4, 2.6),
    heights: Sequence[float] = (),
) -> tuple[Any, list[Any]]:
    """A figure of `panels` axes of `size` inches, in rows, with room above for a title or a legend.
    `heights`: of each row, in place of the size's."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib", "a plot") from None
    columns = columns or (2 if panels == 4 else min(COLUMNS, panels))
    rows = math.ceil(panels / columns)
    head = 0.4 if title else 0.3 * legend_rows + 0.1
    heights = heights or [size[1]] * rows
    height = sum(heights) + head
    figure = Figure(figsize=(size[0] * columns, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # not pyplot: no window system, no global state
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / height), w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr]
    if title:
        figure.suptitle(title, x=0.012, y=1 - 0.1 / height, ha="left", va="top", fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    return figure, [figure.add_subplot(grid[divmod(number, columns)]) for number in range(panels)]


def finish_axis(axis: Any, title: str, with_legend: bool = False, xlabel: str = "step", integer: bool = True) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9aa3ad")
    axis.tick_params(which="both", labelsize=8, color="#9aa3ad", labelcolor="#4a525c")
    axis.yaxis.get_offset_text().set_fontsize(8)
    axis.grid(axis="y", color="#e5e8ec", linewidth=0.8)
    axis.set_axisbelow(True)
    if integer:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}")
    axis.set_xlabel(xlabel, fontsize=8, color="#4a525c")
    axis.margins(x=0.02)
    if with_legend:
        axis.legend(fontsize=8, frameon=False)


def save_figure(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return path
