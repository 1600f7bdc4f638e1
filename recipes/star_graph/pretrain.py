"""Next-token training on star graphs, and its two repairs, reversed and teacherless targets
(Bachmann and Nagarajan 2024, section 5).

    python recipes/star_graph/pretrain.py dataset.targets=reversed max_steps=800  # runs/star_graph_gpt

Differs from Q#'s train.py: fresh graphs in every batch, a constant learning rate, no weight decay.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Callable
from pathlib import Path

import chz

from envs.star_graph_data import StarGraphExamplesBuilder
from envs.star_graph_tokens import Layout, layout_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import LEARNING_RATE, WHOLE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run import Metrics, finish
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import open_run_folder
from recipes.star_graph.evaluation import AccuracyEvaluator
from recipes.star_graph.model import check_model, make_model
from recipes.warm_start import torch_backend
from supervised import train
from supervised.nll import NLLEvaluator
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class Config(train.Config):
    """Supervised training on star graphs."""

    dataset: SupervisedDatasetBuilder = chz.field(
        default_factory=StarGraphExamplesBuilder, doc="the graphs and their targets"
    )
    model_name: str = chz.field(default="", doc="model folder; empty = a new small GPT-2 beside the run folder")
    renderer_name: str | None = chz.field(default="plain", doc="only its tokenizer is used")
    learning_rate: float = chz.field(default=1e-3, validator=LEARNING_RATE, doc="at the first step")
    lr_schedule: LRSchedule = chz.field(default="constant", doc="decay of the learning rate")
    eval_every: int = chz.field(
        default=50,
        validator=WHOLE,
        doc="accuracy and loss on held-out graphs before every this many steps, and at the end",
    )
    save_every: int = chz.field(
        default=250, validator=WHOLE, doc="checkpoint after every this many steps, and at the end; 0 = only at the end"
    )
    log_path: str = log_path_field("runs/star_graph_gpt")
    backend: BackendConfig = torch_backend()


async def main(config: Config) -> Metrics:
    return await train_with(config, lambda layout: train.CrossEntropy())


async def train_with(config: Config, objective: Callable[[Layout], train.Objective[list[Datum]]]) -> Metrics:
    """The supervised loop with any objective, and accuracy and loss on the held-out graphs."""
    builder = config.dataset
    assert isinstance(builder, StarGraphExamplesBuilder)
    builder.check_measured()
    graph = builder.graph()
    if config.model_name:
        check_model(config.model_name, graph)
    else:
        model_folder = await make_model(graph, Path(config.log_path).parent / f"model_seed_{config.seed}", config.seed)
        config = chz.replace(config, model_name=str(model_folder))
    tokenizer = load_tokenizer(config.model_name, config.backend.max_length)
    layout = layout_of(tokenizer, graph)
    renderer = get_renderer(config.renderer_name, tokenizer)
    dataset, test_dataset, test = builder.datasets(renderer)
    custom = await config.build_evaluators(renderer)
    accuracy, loss = AccuracyEvaluator(test, layout, builder.targets), NLLEvaluator(test_dataset)

    async def evaluate(client: TrainingClient) -> Metrics:
        return await loss(client) | await accuracy(client)

    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = service.create_training_client(config.model_name, seed=config.seed)
        evaluator = evaluate if config.eval_every else None
        loss_fn = objective(layout)
        metrics = await train.training_loop(config, folder, client, dataset, loss_fn, evaluator, custom=custom)
    finish(folder, metrics)
    return metrics


if __name__ == "__main__":
    run_command(main, Config)
