"""The Belief State Transformer on the paper's star graphs, with the paper's model, in pieces of a
few minutes.

    python benchmarks/belief_state_star_graph.py --minutes 8  # again and again, until it says that all is done
    python benchmarks/belief_state_star_graph.py --graphs 2,5 --compile --folder runs/bst_gpu

G(2,5), G(2,10) and G(5,5) over 50 labels: 103.9M parameters, batches of 256 fresh graphs, AdamW at
1e-4, 5,000 steps (the preset star_graph of recipes/belief_state/train.py). Each graph is a run
folder, which the next piece goes on with. Measured: steps per second, against the 1.2 that the
original states for G(5,5) on one H100; the training loss at steps 100 and 4,000 (the original:
about 2.85 and nearly 0); accuracy on 1,000 held-out graphs. `--size toy` tries the script itself on
a CPU; its figures stay in the folder.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import torch

from benchmarks.report import write_report
from posttrain.backend.config import compute_dtype, training_device
from posttrain.tracking.command_line import parse
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_folder import RunFolder
from recipes.belief_state import train

ORIGINAL_STEPS_PER_SECOND = 1.2  # G(5,5) on one H100
LOSS_STEPS = (100, 4000)
TOY = ["hidden=32", "num_heads=2", "num_layers=1", "batch_size=8", "num_steps=40", "eval_every=20", "data.num_test=10"]


def config(graph: str, folder: Path, toy: bool, compile: bool) -> train.Config:
    num_paths, path_length = graph.split(",")
    options = [f"data.num_paths={num_paths}", f"data.path_length={path_length}", f"log_path={folder / f'G({graph})'}"]
    options += ["preset=star_graph", "behavior_if_log_dir_exists=resume", f"passes.compile={compile}"]
    return parse(train.Config, options + (TOY if toy else []), {"data": train.SOURCES}, {"preset": train.PRESETS})


def is_finished(run: RunFolder) -> bool:
    record = run.last_checkpoint()
    return record is not None and record.name == "final"


def figures(run: RunFolder) -> dict[str, Any]:
    """What metrics.jsonl says so far. The first steps, which compile and warm up, are left out of
    the speed.
    """
    records = read_metrics(run.path)
    seconds = [record["time/train"] for record in records[20:] if "time/train" in record]
    found: dict[str, Any] = {"steps done": sum("optim/loss" in record for record in records)}
    if seconds:
        found["steps per second"] = 1 / statistics.median(seconds)
    for step in LOSS_STEPS:
        found |= {
            f"loss at step {step}": record["optim/loss"]
            for record in records
            if record["step"] == step and "optim/loss" in record
        }
    evaluated = [record for record in records if "test/exact" in record]
    found["paths right"] = {record["step"]: record["test/exact"] for record in evaluated}
    found["first hops right"] = {record["step"]: record["test/first_hop"] for record in evaluated}
    return found


def main(argv: list[str] | None = None) -> bool:
    """One piece. Whether all graphs are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", default=["5,5", "2,5", "2,10"], help="d,l of each, in this order")
    parser.add_argument("--minutes", type=float, default=8, help="stop, and save, after so long")
    parser.add_argument("--folder", type=Path, default=Path("runs/belief_state_star_graph"), help="of the runs")
    parser.add_argument("--size", choices=("paper", "toy"), default="paper")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    arguments = parser.parse_args(argv)
    load, toy = os.getloadavg()[0], arguments.size == "toy"
    configs = {graph: config(graph, arguments.folder, toy, arguments.compile) for graph in arguments.graphs}
    runs = {graph: RunFolder(Path(settings.log_path)) for graph, settings in configs.items()}
    # as if Ctrl-C were pressed: the loop finishes its step, saves, and raises
    timer = threading.Timer(60 * arguments.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    # between two runs there is nothing to save
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        timer.start()
        for graph, settings in configs.items():
            if not is_finished(runs[graph]):
                asyncio.run(train.main(settings))
    except KeyboardInterrupt:
        print("the time of this piece is over; the same command goes on from here")
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, previous)
    report(runs, arguments.folder, load, toy)
    return all(is_finished(run) for run in runs.values())


def report(runs: dict[str, RunFolder], folder: Path, load: float, toy: bool) -> None:
    found = {f"G({graph})": figures(run) for graph, run in runs.items() if run.metrics_file.exists()}
    ratios = {
        f"{name}: steps per second over the original's": values["steps per second"] / ORIGINAL_STEPS_PER_SECOND
        for name, values in found.items()
        if name == "G(5,5)" and "steps per second" in values
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps({"figures": found, "ratios": ratios}, indent=2))
    if not toy:
        settings = {"dtype": str(compute_dtype(training_device())), "threads": torch.get_num_threads()}
        write_report("belief_state_star_graph", found, settings, load, ratios)


if __name__ == "__main__":
    print("all done" if main() else "not done yet")
