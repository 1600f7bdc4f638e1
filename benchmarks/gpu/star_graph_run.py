"""Block `star_graph_run`: the Belief State Transformer learns G(5,5) at the paper's size and batch: paths and
first hops right on 1,000 held-out graphs, as far as its time goes.

On a CPU: a few steps of a toy.
"""

from pathlib import Path

import torch

from benchmarks.gpu.belief_state import PAPER, TOY
from benchmarks.gpu.checks import Record
from benchmarks.gpu.user_runs import run, run_folders, values

CUDA = torch.cuda.is_available()
SIZE = ["num_steps=5000", "eval_every=500", "save_every=1000"] if CUDA else [*TOY, "num_steps=4", "eval_every=2"]
COMMAND = " ".join(["recipes/belief_state/train.py", *PAPER, *SIZE])
SHOWN = {"loss": "optim/loss", "first hops right, each 500 steps": "test/first_hop", "paths, each 500": "test/exact"}


def main() -> None:
    record = Record()

    def show(folder: Path) -> None:
        for name, metric in SHOWN.items():
            found = values(folder, metric)
            record.figure(name, found[-1] if name == "loss" and found else found)
        paths = values(folder, "test/exact")
        record.figure("steps", len(values(folder, "optim/loss")))
        record.figure("paths right", paths[-1] if paths else None)

    with run_folders("star_graph_run", record) as folder:
        run(record, "training", COMMAND, folder, show)
    record.print()


if __name__ == "__main__":
    main()
