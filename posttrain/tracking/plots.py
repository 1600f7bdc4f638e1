"""The curves of a run as small multiples, and of several runs over one another.

    python -m posttrain.tracking.plots runs/a runs/b out=compare.png keys=env/all/correct,optim/entropy

Left out: smoothing; what is drawn is what was logged. matplotlib is imported when something is drawn.
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.backend.errors import ConfigError, DataError
from posttrain.tracking.command_line import one_line_errors
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_folder import RunFolder

# panel title -> the metrics it shows, training ones first; a panel is drawn when one of them was logged
PANELS: dict[str, tuple[str, ...]] = {
    "reward": ("env/all/reward/total", "test/env/all/reward/total"),
    "accuracy": ("env/all/correct", "test/env/all/correct"),
    "solved": ("env/all/solved", "test/env/all/solved"),
    "turns of an episode": ("env/all/turns", "test/env/all/turns"),
    "true reward": ("env/all/gold", "test/env/all/gold"),
    "proxy reward (reward model)": ("env/all/proxy", "test/env/all/proxy"),
    "reward model's accuracy": ("train_accuracy", "test/accuracy"),
    "Bradley-Terry loss": ("train_loss",),
    "calibration error": ("test/ece",),
    "negative log likelihood (nats per token)": ("train_mean_nll", "test/nll"),
    "log p(answer | rationale) (nats)": ("likelihood/answer_logprob",),
    "games (share)": ("test/env/all/win", "test/env/all/loss"),
    "illegal moves": ("env/all/illegal", "test/env/all/illegal"),
    "loss": ("optim/loss",),
    "loss as a next-token model (nats per token)": ("test/loss_next_token",),
    "first hop right": ("test/first_hop",),
    "whole path right": ("test/exact",),
    "preference loss": ("dpo_loss", "test/dpo_loss"),
    "preference accuracy": ("accuracy", "test/accuracy"),
    "reward margin, chosen over rejected": ("margin", "test/margin"),
    "answer logprob (nats, summed)": ("chosen_logprob", "rejected_logprob"),
    "KL sampler to trainer (nats)": ("optim/kl_sample_train_v1", "optim/kl_sample_train_v2"),
    "|logprob gap| sampler to trainer": ("optim/logprob_gap_mean",),
    "entropy (nats)": ("optim/entropy",),
    "gradient norm": ("optim/grad_norm",),
    "response tokens per turn": ("env/all/ac_tokens_per_turn",),
    "learning rate": ("optim/lr", "learning_rate"),
    "tokens": ("num_tokens",),
}
TIMES = ("time/sampling", "time/train", "time/sync", "time/eval")
COLUMNS = 3
# The least that a panel's axis spans: below it there is only rounding.
FLOORS: dict[str, float] = dict.fromkeys(
    ("optim/kl_sample_train_v1", "optim/kl_sample_train_v2", "optim/logprob_gap_mean", "optim/loss"), 1e-3
)
SMALLEST_SPAN = 0.05  # of the largest value
Curve = tuple[list[int], list[float]]


def plot_run(run_folder: RunFolder | str | os.PathLike[str]) -> Path:
    """Draws plots/run.png of a run folder and returns its path. DataError where the run has no metrics."""
    folder = run_folder.path if isinstance(run_folder, RunFolder) else Path(run_folder)
    records = _records(folder)
    panels = _panels(records)
    times = [key for key in (*TIMES, "time/total") if _curve(records, key)[0]]
    if not panels and not times:
        raise DataError(f"{folder / 'metrics.jsonl'}: none of the metrics that plots know; name some with keys=a,b")
    figure, axes = panel_axes(len(panels) + bool(times), folder.resolve().name)
    for axis, (title, keys) in zip(axes, panels.items(), strict=False):
        for number, key in enumerate(key for key in keys if _curve(records, key)[0]):
            _draw(axis, _curve(records, key), _short(key), number)
        _widen(axis, max(FLOORS.get(key, 0.0) for key in keys))
        finish_axis(axis, title, with_legend=sum(bool(_curve(records, key)[0]) for key in keys) > 1)
    if times:
        _draw_times(axes[len(panels)], records, times)
    return save_figure(figure, folder / "plots" / "run.png")


def _panels(records: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Those of PANELS that have something to show; one that would show the same curves as another is named in its title instead."""
    shown: dict[str, tuple[list[Curve], str, tuple[str, ...]]] = {}
    for title, keys in PANELS.items():
        curves = [curve for key in keys if (curve := _curve(records, key))[0]]
        same = next((name for name, (others, _, _) in shown.items() if others == curves), None)
        if curves and same:
            others, text, kept = shown[same]
            shown[same] = (others, f"{text} = {title}", kept)
        elif curves:
            shown[title] = (curves, title, keys)
    return {text: keys for _, text, keys in shown.values()}


def compare_runs(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], keys: Sequence[str] = ()) -> Path:
    """Draws one panel per metric with a curve per run. Without `keys`, every known metric that some run has."""
    paths = [Path(folder) for folder in folders]
    runs = {_label(path, paths): _records(path) for path in paths}
    wanted = keys or [key for known in (*PANELS.values(), ("time/total",)) for key in known]
    present = [key for key in wanted if any(_curve(records, key)[0] for records in runs.values())]
    if missing := [key for key in keys if key not in present]:
        known = sorted({name for records in runs.values() for record in records for name in record} - {"step", "non_finite"})
        raise ConfigError(f"keys={','.join(missing)}: no such metric in these runs; they have {', '.join(known)}")
    if not present:
        raise DataError("none of the metrics that plots know; name some with keys=a,b")
    figure, axes = panel_axes(len(present), "", legend_rows=math.ceil(len(runs) / COLUMNS))
    for axis, key in zip(axes, present, strict=False):
        for number, (label, records) in enumerate(runs.items()):
            _draw(axis, _curve(records, key), label, number)
        _widen(axis, FLOORS.get(key, 0.0))
        finish_axis(axis, key, with_legend=False)
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(list(handles.values()), list(handles), loc="upper left", ncols=COLUMNS, frameon=False)
    return save_figure(figure, Path(out))


def _records(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder)
    if not records:
        raise DataError(f"{folder}: no metrics there; a run folder has a metrics.jsonl with at least one step")
    return records


def _curve(records: list[dict[str, Any]], key: str) -> Curve:
    """Steps and values where the metric was logged; null, which stands for NaN, leaves a gap."""
    points = [(record["step"], record[key]) for record in records if key in record]
    if all(value is None for _, value in points):
        return [], []
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def _label(path: Path, paths: list[Path]) -> str:
    twins = sum(other.resolve().name == path.resolve().name for other in paths) > 1
    return str(path) if twins else path.resolve().name


def _short(key: str) -> str:
    if key.endswith("_logprob"):
        return key.removesuffix("_logprob")
    return "held out" if key.startswith("test/") else key.rsplit("_", 1)[-1] if "_train_v" in key else "training"


def panel_axes(panels: int, title: str, legend_rows: int = 0) -> tuple[Any, list[Any]]:
    """A figure with `panels` axes, as many rows as they need, and room above for a title or a legend."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install -e '.[train]' in the project's folder"
        ) from None
    columns = 2 if panels == 4 else min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    head = 0.4 if title else 0.3 * legend_rows + 0.1
    height = 2.6 * rows + head
    figure = Figure(figsize=(4.4 * columns, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # not pyplot: no window system, no global state
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / height), w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr]
    if title:
        figure.suptitle(title, x=0.012, y=1 - 0.1 / height, ha="left", va="top", fontsize=13, fontweight="bold")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    return figure, axes


def stacked_axes(rows: int, title: str) -> tuple[Any, list[Any]]:
    """A wide figure with low axes over one another, for things that happen at the same time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 * rows + 0.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, 1, number + 1) for number in range(rows)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, labelbottom=axis is axes[-1])
    figure.suptitle(title, x=0.012, ha="left", fontsize=11)
    return figure, axes


COLORS = ("#2f6db5", "#d9772b", "#3a9a5b", "#c0447a", "#7a5cc2", "#8a6d4b", "#4aa8b8", "#6b7280")


def _draw(axis: Any, curve: Curve, label: str, number: int) -> None:
    steps, values = curve
    sparse = len(steps) < 30 or label == "held out"
    marker = {"marker": "o", "markersize": 3.5} if sparse else {}
    axis.plot(steps, values, label=label, color=COLORS[number % len(COLORS)], linewidth=1.5, **marker)


def _widen(axis: Any, floor: float) -> None:
    """Noise fills no panel: the axis spans at least `floor`, and at least a part of the largest value."""
    values = [abs(y) for line in axis.get_lines() for y in line.get_ydata() if y == y]
    low, high = axis.get_ylim()
    span = max(floor, SMALLEST_SPAN * max(values, default=0.0))
    if high - low < span:
        positive = min((y for line in axis.get_lines() for y in line.get_ydata() if y == y), default=0.0) >= 0
        middle = (low + high) / 2
        bottom = max(middle - span / 2, -0.04 * span) if positive else middle - span / 2
        axis.set_ylim(bottom, bottom + span)


def _draw_times(axis: Any, records: list[dict[str, Any]], keys: list[str]) -> None:
    """Seconds of a step, stacked by what they went to; the rest of the total is "other"."""
    parts = [key for key in keys if key != "time/total"]
    if not parts:
        _draw(axis, _curve(records, "time/total"), "total", 0)
        finish_axis(axis, "seconds per step", with_legend=False)
        return
    steps = sorted({record["step"] for record in records if any(key in record for key in keys)})
    seconds = {key: dict.fromkeys(steps, 0.0) for key in keys}
    for key in keys:
        for step, value in zip(*_curve(records, key), strict=True):
            seconds[key][step] += 0.0 if math.isnan(value) else value
    layers = [[seconds[key][step] for step in steps] for key in parts]
    names = [key.removeprefix("time/") for key in parts]
    if "time/total" in keys:
        spent = [sum(layer[i] for layer in layers) for i in range(len(steps))]
        layers.append([max(seconds["time/total"][step] - used, 0.0) for step, used in zip(steps, spent, strict=True)])
        names.append("other")
    colors = [*COLORS[: len(parts)], "#c3c9d1"]
    axis.stackplot(steps, layers, labels=names, colors=colors[: len(layers)], alpha=0.85, linewidth=0)
    finish_axis(axis, "seconds per step", with_legend=False)
    above = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.98), "ncols": len(names)}
    axis.legend(**above, fontsize=7, frameon=False, handlelength=0.9, handletextpad=0.4, columnspacing=0.9)


def finish_axis(axis: Any, title: str, with_legend: bool, xlabel: str = "step") -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9aa3ad")
    axis.tick_params(labelsize=8, color="#9aa3ad", labelcolor="#4a525c")
    axis.yaxis.get_offset_text().set_fontsize(8)
    axis.grid(axis="y", color="#e5e8ec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(xlabel, fontsize=8, color="#4a525c")
    axis.margins(x=0.02)
    if with_legend:
        axis.legend(fontsize=8, frameon=False)


def save_figure(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    """`python -m posttrain.tracking.plots RUN [RUN ...] [out=compare.png] [keys=a,b]`; one run without options gets its plots/run.png."""
    arguments = sys.argv[1:]
    folders = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if not folders or folders[0] in ("-h", "--help", "help"):
        print(main.__doc__)
        return
    with one_line_errors():
        if unknown := sorted(options.keys() - {"out", "keys"}):
            raise ConfigError(f"unknown option {unknown[0]!r}; there are out=FILE.png and keys=METRIC,METRIC")
        if len(folders) == 1 and not options:
            print(plot_run(folders[0]))
        else:
            keys = [key for key in options.get("keys", "").split(",") if key]
            print(compare_runs(folders, options.get("out", "compare.png"), keys))


if __name__ == "__main__":
    main()
