"""The over-optimisation curve of Gao et al. 2022: true (gold) and proxy reward of a policy against its KL to where it began.

python -m recipes.rlhf.curve RUN [RUN ...] out=curve.png
"""

from pathlib import Path
from typing import Any

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.tracking.metrics_log import read_metrics

PANELS = {"env/all/gold": "true reward (the rule)", "env/all/proxy": "proxy reward (the reward model)"}
COLORS = ("#2f6db5", "#d9772b", "#3a9a5b", "#7a5cc2")
Curve = tuple[np.ndarray, dict[str, np.ndarray]]  # (steps,) nats, and (steps,) of each metric in PANELS


def read_curve(run: Path) -> Curve:
    """KL(policy || start) in nats per answer, estimated on each step's own samples: mean per token times tokens per answer."""
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: list[Any] = [figure.add_subplot(1, len(PANELS), k + 1) for k in range(len(PANELS))]
    for (label, run), color in zip(runs.items(), COLORS, strict=False):
        kl, rewards = read_curve(run)
        for axis, key in zip(axes, PANELS, strict=True):
            axis.scatter(kl, rewards[key], s=9, color=color, alpha=0.35, linewidth=0)
            axis.plot(smooth(kl), smooth(rewards[key]), color=color, linewidth=1.8, label=label)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("KL to the SFT policy (nats per answer)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e8ec", linewidth=0.8)
        axis.legend(frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out
