"""Trains the Belief State Transformer (Hu et al. 2025, arXiv 2410.23506) or its GPT baseline.

    python recipes/belief_state/train.py  # G(2,3) over 12 labels: 45 seconds of one core; runs/belief_state
    python recipes/belief_state/train.py model=gpt log_path=runs/gpt  # same data and blocks
    python recipes/belief_state/train.py preset=star_graph data.num_paths=5  # the paper's model on G(5,5): a GPU
    python recipes/belief_state/train.py preset=tinystories  # stories of the hub; data=text alone generates stories
    torchrun --nproc-per-node 8 recipes/belief_state/train.py preset=large data.folder=SHARDS parallel=shard

PRESETS are the original's configurations.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Mapping
from contextlib import closing
from typing import Literal

import chz

from posttrain.backend.errors import NonFiniteError
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import COUNT, DECAY, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED, WHOLE
from posttrain.backend.ranks import ALONE, Processes, joined_processes
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import timed
from posttrain.tracking.run import Run, finish
from posttrain.tracking.run_config import TrainingConfig, log_path_field
from posttrain.tracking.run_folder import RunFolder
from recipes.belief_state.processes import open_shared_folder
from recipes.belief_state.source import TokenSource, TokenSourceBuilder
from recipes.belief_state.star_graph import StarGraphBuilder
from recipes.libraries.belief_state.distributed import ParallelTrainer
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig, NextToken
from recipes.libraries.belief_state.pairs import PairObjective
from recipes.libraries.belief_state.trainer import BeliefStateClient, BeliefStateTrainer, Metrics, PassConfig

PAPER_SIZE = {"num_heads": "8", "hidden": "768", "init_std": "0.02", "batch_size": "256", "beta2": "0.95"}
PAPER_OPTIMIZER = {"weight_decay": "0.1", "grad_clip_norm": "1.0", "lr_schedule": "cosine", "beta2": "0.95"}
PRESETS: dict[str, Mapping[str, str]] = {
    "star_graph": PAPER_SIZE
    | {"num_layers": "6", "num_steps": "5000", "learning_rate": "1e-4", "warmup_steps": "0", "grad_clip_norm": "0"}
    | {"lr_schedule": "constant"}
    | {
        "data.path_length": "5",
        "data.num_nodes": "50",
        "data.num_test": "1000",
        "eval_every": "500",
        "save_every": "500",
    },
    "tinystories": PAPER_SIZE
    | PAPER_OPTIMIZER
    | {
        "data": "text",
        "data.source": "cyrilzhang/TinyStories2-ascii",
        "data.test_split": "validation",
        "data.eval_rows": "512",
    }
    | {"num_layers": "8", "objective.min_gap": "1", "num_steps": "100000", "eval_every": "1000", "save_every": "1000"}
    | {"learning_rate": "3e-4", "min_learning_rate": "2e-4", "decay_steps": "600000", "warmup_steps": "1"},
    # code, vocabulary of 50,304; the user gives data.folder, its shards and their weights
    "large": PAPER_OPTIMIZER
    | {"data": "pretokenized", "data.block_size": "2048", "num_layers": "24", "num_heads": "32", "hidden": "2048"}
    | {"init_std": "0.02", "batch_size": "1024", "passes.rows_per_pass": "32", "passes.pairs_per_chunk": "8192"}
    | {"objective.min_gap": "1", "objective.subsample": "0.025", "num_steps": "36000", "learning_rate": "1e-3"}
    | {"min_learning_rate": "1e-4", "warmup_steps": "750", "eval_every": "1000", "save_every": "1000"},
}
SOURCES = {
    "star_graph": "recipes.belief_state.star_graph:StarGraphBuilder",
    "text": "recipes.belief_state.text:TextBuilder",
    "pretokenized": "recipes.belief_state.text:PretokenizedBuilder",
}
HEADLINE = {
    "optim/loss": "loss",
    "test/loss_next_token": "test nll",
    "test/first_hop": "first hop",
    "test/exact": "path",
}


@chz.chz
class Config(TrainingConfig):
    """A Belief State Transformer, or a GPT of the same blocks."""

    preset: str | None = chz.field(default=None, doc="sets several options at once; listed below")
    data: TokenSourceBuilder = chz.field(default_factory=StarGraphBuilder, doc="training and held-out data")
    model: Literal["bst", "gpt"] = chz.field(
        default="bst", doc="gpt: the baseline, next-token or (by the data) fill-in-the-middle"
    )
    num_layers: int = chz.field(default=2, validator=COUNT, doc="blocks of each encoder")
    num_heads: int = chz.field(default=4, validator=COUNT, doc="attention heads")
    hidden: int = chz.field(default=96, validator=COUNT, doc="width")
    init_std: float = chz.field(
        default=0.08,
        validator=POSITIVE,
        doc="standard deviation of the initial weights; 0.02 in the paper, for a width of 768",
    )
    objective: PairObjective = chz.field(default_factory=lambda: PairObjective(min_gap=2), doc="the pairs of a BST")
    passes: PassConfig = chz.field(default_factory=PassConfig, doc="micro-batches and compilation")
    parallel: Literal["replicate", "shard"] = chz.field(
        default="replicate", doc="with torchrun: each process has all weights (replicate) or a shard of them (FSDP2)"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="of the weights and the order of the data")
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="start from these weights of the same sizes, any task (fresh optimizer)"
    )

    batch_size: int = chz.field(default=64, validator=COUNT, doc="rows of a step")
    num_steps: int = chz.field(default=600, validator=COUNT, doc="optimizer steps")
    learning_rate: float = chz.field(default=3e-3, validator=LEARNING_RATE, doc="the peak, after the warm-up")
    warmup_steps: int = chz.field(
        default=50, validator=WHOLE, doc="steps of linear warm-up; the first step's rate is above 0"
    )
    lr_schedule: LRSchedule = chz.field(default="cosine", doc="after the warm-up")
    decay_steps: int | None = chz.field(
        default=None, validator=COUNT, doc="step at which the schedule ends; None = num_steps"
    )
    weight_decay: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="AdamW's, on matrices")
    beta2: float = chz.field(default=0.98, validator=DECAY, doc="AdamW's decay of the squared gradient")
    grad_clip_norm: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="of all weights together; 0 = no clipping"
    )

    eval_every: int = chz.field(
        default=50, validator=WHOLE, doc="measure before every this many steps, and at the end; 0 = only at the end"
    )
    save_every: int = chz.field(
        default=250, validator=WHOLE, doc="checkpoint after every this many steps, and at the end; 0 = only at the end"
    )
    keep_checkpoints: int | None = chz.field(
        default=1, validator=COUNT, doc="number of checkpoints to keep; None = all"
    )
    log_path: str = log_path_field("runs/belief_state")


async def main(config: Config) -> Metrics:
    """Trains or resumes; returns the last metrics."""
    with joined_processes() as processes:
        source = config.data(config.batch_size, config.seed)
        trainer = make_trainer(config, source, processes)
        folder = open_shared_folder(config.log_path, config.behavior_if_log_dir_exists, config, processes)
        if processes.is_first:
            source.save(folder.path)
        with closing(BeliefStateClient(trainer)) as client:
            metrics = await training_loop(config, folder, client, source, processes)
        if processes.is_first:
            finish(folder, metrics)
    return metrics


def make_trainer(config: Config, source: TokenSource, processes: Processes = ALONE) -> BeliefStateTrainer:
    sizes = (config.num_layers, config.num_heads, config.hidden, config.init_std)
    model_config = BeliefStateConfig(source.vocab_size, source.eos_id, *sizes, task=source.task)
    kind = BeliefState if config.model == "bst" else NextToken
    context_length = max(config.objective.context_length, source.context_length)
    objective = chz.replace(config.objective, context_length=context_length)
    model = kind(model_config, config.seed)
    if processes.count == 1:
        return BeliefStateTrainer(model, objective, config.passes)
    return ParallelTrainer(model, objective, config.passes, processes, shard=config.parallel == "shard")


async def training_loop(
    config: Config, folder: RunFolder, client: BeliefStateClient, source: TokenSource, processes: Processes = ALONE
) -> Metrics:
    async def evaluate(step: int) -> Metrics:
        return await client.with_model(source.evaluate)

    run = Run(
        config=config, folder=folder, client=client, name=config.model, num_steps=config.num_steps, headline=HEADLINE
    )
    run.evaluate, run.must_stop = evaluate, processes.any
    if not run.start(config.load_checkpoint_path):
        return run.last_metrics()
    batch = source.get_batch(run.first_step) if run.first_step < config.num_steps else None

    async def step(number: int, metrics: Metrics) -> None:
        nonlocal batch
        assert batch is not None
        adam = config.adam(number, config.decay_steps or config.num_steps)
        metrics |= {"learning_rate": adam.learning_rate, "progress": (number + 1) / config.num_steps}
        with timed(metrics, "train"):
            forward_backward = client.forward_backward(batch, (config.seed, number))
            optim_step = client.optim_step(adam)
            # prepared while the step runs
            batch = source.get_batch(number + 1) if number + 1 < config.num_steps else None
            try:
                results = await forward_backward | (await optim_step).metrics
            except NonFiniteError as error:
                raise NonFiniteError(f"step {number}: {error}. Nothing was saved over the last checkpoint") from error
        metrics |= {f"optim/{name}": value for name, value in results.items()}

    return await run.steps(step)


if __name__ == "__main__":
    run_command(main, Config, {"data": SOURCES}, {"preset": PRESETS})
