"""Results of the methods from their metrics.jsonl: a table, and first-hop accuracy by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from posttrain.tracking.figures import SHARE, Panel, Records, curves_by_label, draw_panels, save_figure

# names of an evaluator, and of rl/
FIRST_HOP = ("test/first_hop", "test/env/all/first_hop")
EXACT = ("test/exact", "test/env/all/correct")
Runs = Mapping[str, Sequence[Records]]  # method -> the metrics of each seed


def table(runs: Runs) -> str:
    """Accuracy at the end of each method's training: the mean over seeds, and each seed."""
    lines = [f"{'method':12s} {'steps':>6s}  {'first hop':>9s}  {'whole path':>10s}   first hop of each seed"]
    hops, paths = curves_by_label(runs, *FIRST_HOP), curves_by_label(runs, *EXACT)
    for name in runs:
        hop_S, path_S = ([curve.values_K[-1] for curve in curves[name]] for curves in (hops, paths))
        each = " ".join(f"{hop:.3f}" for hop in hop_S)
        lines.append(
            f"{name:12s} {hops[name][0].steps_K[-1]:6d}  {np.mean(hop_S):9.3f}  {np.mean(path_S):10.3f}   {each}"
        )
    return "\n".join(lines)


def picture(panels: Mapping[str, Runs], chance: float, title: str, out: Path) -> Path:
    """A figure with a panel for each entry of `panels`."""
    drawn = [
        Panel(f"first-hop accuracy, {name}", curves_by_label(runs, *FIRST_HOP), levels={"chance": chance}, limits=SHARE)
        for name, runs in panels.items()
        if runs
    ]
    return save_figure(draw_panels(drawn, title), out)
