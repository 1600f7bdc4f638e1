"""DPO and RPO on star graphs, as Q#'s train_dpo.py (Zhou et al. 2025): the right path against a
sampled wrong path. Losses: preference/losses.py.

    python recipes/star_graph/preferences.py model_name=GPT/checkpoints/final method=rpo pairs_path=PAIRS.jsonl

Differs: a linear schedule, no weight decay, no clipping.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import chz

from envs.star_graph import sample_graphs
from envs.star_graph_data import StarGraphTask
from envs.star_graph_tokens import layout_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, WHOLE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.seeds import GUIDED
from posttrain.tracking.stages import Stage, run_stages
from preference import train_dpo
from preference.train_cli import METHODS
from preference.types import ComparisonDatasetBuilder
from recipes.star_graph.evaluation import AccuracyEvaluator
from recipes.star_graph.model import check_model
from recipes.star_graph.rollouts import collect_pairs, read_pairs
from recipes.warm_start import torch_backend


@chz.chz
class Config(train_dpo.Config):
    """DPO or RPO on star graphs, from a trained policy."""

    task: StarGraphTask = chz.field(default_factory=StarGraphTask, doc="the graphs, and which are held out")
    pairs_path: str | None = chz.field(
        default=None,
        doc="JSONL of pairs (rollouts.py, or Q#'s collect_rollouts.py); None = sample them from the policy, into "
        "pairs.jsonl beside the run folder",
    )
    num_prompts: int = chz.field(default=4000, validator=COUNT, doc="prompts of the sampled pairs")
    dataset: ComparisonDatasetBuilder = chz.field(
        default_factory=ComparisonDatasetBuilder, doc="ignored: the pairs are tokens"
    )
    renderer_name: str | None = chz.field(default="plain", doc="ignored")
    learning_rate: float = chz.field(default=1e-4, validator=LEARNING_RATE, doc="at the first step")
    num_epochs: int = chz.field(default=4, validator=COUNT, doc="passes over the pairs")
    eval_every: int = chz.field(
        default=25, validator=WHOLE, doc="accuracy on held-out graphs before every this many steps, and at the end"
    )
    log_path: str = log_path_field("runs/star_graph_dpo")
    backend: BackendConfig = torch_backend()


async def main(config: Config) -> train_dpo.Metrics:
    config.task.check_measured()
    graph = config.task.graph()
    check_model(config.model_name, graph)
    layout = layout_of(load_tokenizer(config.model_name, config.backend.max_length), graph)
    if not config.pairs_path:
        await run_stages([pairs_stage(config)])
    pairs_path = config.pairs_path or pairs_stage(config).path
    _, test = config.task.split()
    evaluator = AccuracyEvaluator(test, layout)
    return await train_dpo.train_on_pairs(config, read_pairs(pairs_path, layout), [], evaluator)


def pairs_stage(config: Config, name: str = "pairs", needs: Sequence[Stage] = ()) -> Stage:
    """pairs.jsonl beside the run folder, shared by DPO and RPO."""
    path = Path(config.log_path).parent / "pairs.jsonl"
    settings = {option: getattr(config, option) for option in ("task", "model_name", "num_prompts", "seed", "backend")}
    return Stage(name, path, settings, partial(collect, config, path), needs)


async def collect(config: Config, path: Path) -> None:
    """Samples pairs from the run's first policy on training graphs."""
    rows_D_T, test = config.task.split()
    graph = test.graph
    seed = (config.seed, GUIDED)
    rows_D_T = (
        sample_graphs(graph, config.num_prompts, seed, test) if rows_D_T is None else rows_D_T[: config.num_prompts]
    )
    with ServiceClient(config.backend) as service:
        sampler = service.create_sampling_client(config.model_name)
        layout = layout_of(sampler.get_tokenizer(), graph)
        path.parent.mkdir(parents=True, exist_ok=True)
        await collect_pairs(sampler, layout.encode(rows_D_T), layout, path, seed=config.seed)


if __name__ == "__main__":
    run_command(main, Config, {"method": METHODS})
