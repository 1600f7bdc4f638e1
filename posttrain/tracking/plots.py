"""The curves of a run as small multiples (plots/run.png), and of several runs in comparison. Curves
of a panel: figures.py.

  python -m posttrain.tracking.plots runs/a
  python -m posttrain.tracking.plots runs/a runs/b out=compare.png keys=env/all/correct,optim/entropy
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.backend.errors import ConfigError, DataError
from posttrain.tracking.command_line import run_on_folders
from posttrain.tracking.figures import (
    COLORS,
    Curve,
    Curves,
    Panel,
    Records,
    binned,
    curves_by_label,
    draw_panel,
    draw_panels,
    finish_axis,
    panel_axes,
    read_curve,
    save_figure,
    with_width,
)
from posttrain.tracking.metrics_log import each_record
from posttrain.tracking.run_folder import RunFolder

# panel title -> its metrics, training first; a panel is drawn if one of them was logged
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
    "|logprob gap| sampler to trainer (nats)": ("optim/logprob_gap_mean",),
    "entropy (nats)": ("optim/entropy",),
    "gradient norm": ("optim/grad_norm",),
    "response tokens per turn": ("env/all/ac_tokens_per_turn",),
    "learning rate": ("optim/lr", "learning_rate"),
    "tokens": ("num_tokens",),
}
TIMES = ("time/sampling", "time/train", "time/sync", "time/eval")
# Least span of a panel's axis: smaller differences are rounding. A whole run of such KLs has no panel.
FLOORS: dict[str, float] = dict.fromkeys(("optim/kl_sample_train_v1", "optim/kl_sample_train_v2", "optim/loss"), 1e-3)
DECADES = ("optim/logprob_gap_mean",)  # on a logarithmic axis


def plot_run(run_folder: RunFolder | str | os.PathLike[str]) -> Path:
    """Draws plots/run.png of a run folder; returns its path. DataError without metrics."""
    folder = run_folder.path if isinstance(run_folder, RunFolder) else Path(run_folder)
    records = _records(folder, {*chain(*PANELS.values()), *TIMES, "time/total"})
    panels = _panels(records)
    times = [key for key in (*TIMES, "time/total") if read_curve(records, key).steps_K]
    if not panels and not times:
        raise DataError(
            f"{folder / 'metrics.jsonl'}: none of the metrics that are plotted by default; name some with keys=a,b"
        )
    figure, axes = panel_axes(len(panels) + bool(times), folder.resolve().name)
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, panel)
    if times:
        _draw_times(axes[-1], records, times)
    return save_figure(figure, folder / "plots" / "run.png")


def _panels(records: Records) -> list[Panel]:
    """The PANELS with data; a metric with the same curve as another is named in the title instead.
    KLs that are rounding throughout are left out: the gap's panel says so."""
    panels: list[Panel] = []
    for title, keys in PANELS.items():
        logged = {label: [curve] for label, key in _labels(keys).items() if (curve := read_curve(records, key)).steps_K}
        twin = next((n for n, panel in enumerate(panels) if [*panel.curves.values()] == [*logged.values()]), None)
        if twin is not None:
            panels[twin] = replace(panels[twin], title=f"{panels[twin].title} = {title}")
        elif logged and not _is_rounding(keys, logged):
            panels.append(_panel(title, logged, *keys))
    return panels


def _panel(title: str, curves: Curves, *keys: str) -> Panel:
    least_span = max(FLOORS.get(key, 0.0) for key in keys)
    return Panel(title, curves, least_span=least_span, decades=keys[0] in DECADES)


def _is_rounding(keys: Sequence[str], curves: Curves) -> bool:
    values = [value for seeds in curves.values() for curve in seeds for value in curve.values_K if value == value]
    return keys[0].startswith("optim/kl_") and max(map(abs, values), default=0.0) < FLOORS[keys[0]] / 10


def compare_runs(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], keys: Sequence[str] = ()
) -> Path:
    """Draws a panel per metric with a curve per run. Default `keys`: every known metric of any run."""
    paths = [Path(folder) for folder in folders]
    return compare_seeds({_run_name(path, paths): [path] for path in paths}, out, keys)


def compare_seeds(folders: Mapping[str, Sequence[Path]], out: str | os.PathLike[str], keys: Sequence[str] = ()) -> Path:
    """As `compare_runs`, with the mean of several seeds' runs, and thin curves of each."""
    wanted = keys or dict.fromkeys([*chain(*PANELS.values()), "time/total"])
    runs = {label: [_records(path, wanted) for path in seeds] for label, seeds in folders.items()}
    panels = [_panel(key, curves_by_label(runs, key), key) for key in wanted]
    panels = [panel for panel in panels if not panel.empty]
    if missing := [key for key in keys if key not in {panel.title for panel in panels}]:
        logged = {name for path in chain(*folders.values()) for record in each_record(path) for name in record}
        known = ", ".join(sorted(logged - {"step", "non_finite"}))
        raise ConfigError(f"keys={','.join(missing)}: no such metric in these runs; they have {known}")
    if not panels:
        raise DataError("none of the metrics that are plotted by default; name some with keys=a,b")
    return save_figure(draw_panels(panels, shared_legend=True), Path(out))


def _records(folder: Path, names: Iterable[str]) -> Records:
    """With these metrics alone: all those of a million steps take gigabytes."""
    kept = ("step", *names)
    records = [{name: record[name] for name in kept if name in record} for record in each_record(folder)]
    if not records:
        raise DataError(f"{folder}: no metrics there; a run folder has a metrics.jsonl with at least one step")
    return records


def _run_name(path: Path, paths: list[Path]) -> str:
    twins = sum(other.resolve().name == path.resolve().name for other in paths) > 1
    return str(path) if twins else path.resolve().name


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """Label -> key: held out or training, if that is unique; otherwise the end of the name."""
    labels = {"held out" if key.startswith("test/") else "training": key for key in keys}
    if len(labels) == len(keys):
        return labels
    return {re.split("[/_]", key.removesuffix("_logprob"))[-1]: key for key in keys}


def _draw_times(axis: Any, records: Records, keys: list[str]) -> None:
    """Seconds of a step, stacked by activity; the rest of the total is "other"."""
    parts = [key for key in keys if key != "time/total"]
    if not parts:
        draw_panel(axis, Panel("seconds per step", {"total": [read_curve(records, "time/total")]}))
        return
    seconds = {key: dict(zip(*read_curve(records, key), strict=True)) for key in keys}
    steps = sorted(set().union(*seconds.values()))
    layers = {key.removeprefix("time/"): [seconds[key].get(step, 0.0) for step in steps] for key in parts}
    if total := seconds.get("time/total"):
        known = [sum(seconds[key].get(step, 0.0) for key in parts) for step in steps]
        layers["other"] = [max(total.get(step, 0.0) - part, 0.0) for step, part in zip(steps, known, strict=True)]
    means = [binned(Curve(steps, values)) for values in layers.values()]
    axis.stackplot(
        means[0][0].steps_K,
        *(curve.values_K for curve, _ in means),
        labels=list(layers),
        colors=[*COLORS[: len(parts)], "#c3c9d1"],
        alpha=0.85,
        linewidth=0,
    )
    finish_axis(axis, "seconds per step", xlabel=with_width("step", means[0][1]))
    above = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.98), "ncols": len(layers)}
    axis.legend(**above, fontsize=6.5, frameon=False, handlelength=0.8, handletextpad=0.4, columnspacing=0.7)


def draw(folders: Sequence[Path], out: str, keys: str) -> Path:
    """plots/run.png for one run without options."""
    if len(folders) == 1 and not out and not keys:
        return plot_run(folders[0])
    return compare_runs(folders, out or "compare.png", [key for key in keys.split(",") if key])


def main() -> None:
    run_on_folders(draw, out="", keys="")


if __name__ == "__main__":
    main()
