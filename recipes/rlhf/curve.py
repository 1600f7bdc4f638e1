"""The over-optimisation curve of Gao et al. 2022: true (gold) and proxy reward of a policy against
its KL to the initial policy.

    python -m recipes.rlhf.curve RUN [RUN ...] out=curve.png
"""

from pathlib import Path

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.tracking.command_line import run_on_folders
from posttrain.tracking.figures import COLORS, finish_axis, panel_axes, save_figure
from posttrain.tracking.metrics_log import read_metrics

PANELS = {"env/all/gold": "true reward (the rule)", "env/all/proxy": "proxy reward (the reward model)"}
# (steps,) nats, and (steps,) of each metric in PANELS
Curve = tuple[np.ndarray, dict[str, np.ndarray]]


def read_curve(run: Path) -> Curve:
    """KL(policy || start) in nats per answer, estimated on each step's samples (mean per token
    times tokens per answer), and the rewards. DataError if the KL was not logged.
    """
    records = [record for record in read_metrics(run) if "kl_policy_base" in record]
    if not records:
        raise DataError(f"{run}: no step logged kl_policy_base; run it with kl.coef above 0")
    kl = np.array([record["kl_policy_base"] * record["env/all/ac_tokens_per_turn"] for record in records])
    return kl, {key: np.array([record[key] for record in records]) for key in PANELS}


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Centred running mean, narrower at the ends."""
    return np.array([values[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(len(values))])


def plot_curve(runs: dict[str, Path], out: Path) -> Path:
    """Dots are steps, lines their running means."""
    figure, axes = panel_axes(len(PANELS), size=(4.8, 3.7))
    for (label, run), color in zip(runs.items(), COLORS, strict=False):
        kl, rewards = read_curve(run)
        for axis, key in zip(axes, PANELS, strict=True):
            axis.scatter(kl, rewards[key], s=9, color=color, alpha=0.35, linewidth=0)
            axis.plot(smooth(kl), smooth(rewards[key]), color=color, linewidth=1.8, label=label)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        finish_axis(axis, title, True, "KL to the SFT policy (nats per answer)", integer=False)
    return save_figure(figure, out)


if __name__ == "__main__":
    run_on_folders(lambda runs, out: plot_curve({run.name: run for run in runs}, Path(out)), out="curve.png")
