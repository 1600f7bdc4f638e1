"""Training a reward model: comparisons in, a saved model out that environments open by its path.

    python -m preference.train_reward_model dataset=scalar dataset.comparisons=pairs.jsonl dataset.comparisons.test_size=200
    python -m preference.train_reward_model dataset=label dataset.comparisons=gsm8k_solutions dataset.comparisons.path=solutions.jsonl

`dataset` says which kind: `scalar` is a number at the last token by Bradley and Terry (bradley_terry.py), `label` a language model that says
A, B or Tie (label_model.py). The loop is the supervised one. Held-out comparisons give test/accuracy, test/ece (calibration),
test/swap_agreement, test/length_baseline, and plots/reliability.png.
"""

if not __package__:  # run as a file: this folder, first on the path, has a types.py that would shadow the standard library's
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import asyncio

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import LoraConfig
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_folder import open_run_folder
from preference.names import DATASETS
from preference.reward_data import RewardExamplesBuilder
from preference.reward_evaluation import RewardModelEvaluator, plot_reliability
from supervised import train

KINDS = {"scalar": "preference.bradley_terry:PreferencePairsBuilder", "label": "preference.label_model:LabelExamplesBuilder"}


@chz.chz
class Config(train.Config):
    """Training of a reward model on comparisons."""

    dataset: RewardExamplesBuilder = chz.field(doc="the kind of reward model, and its comparisons")
    log_path: str = chz.field(default="runs/reward_model", doc="the run folder")


async def main(config: Config) -> train.Metrics:
    """Trains; returns the last metrics. The model is LOG_PATH/checkpoints/final."""
    if config.stop_at_nll is not None:
        raise ConfigError("stop_at_nll is for language models: give max_steps")
    tokenizer = load_tokenizer(config.model_name, config.backend.max_length)
    renderer = get_renderer(config.renderer_name, tokenizer)
    train_D, test_D = config.dataset.load(renderer)
    dataset = config.dataset.examples(renderer, train_D)
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    lora = LoraConfig(config.lora_rank, config.seed, config.lora_alpha) if config.lora_rank else None
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = config.dataset.create_client(service, config.model_name, lora, config.seed)
        evaluator = None
        if test_D and config.eval_every:
            evaluator = RewardModelEvaluator(config.dataset.model(client, renderer), train_D, test_D)
        objective = config.dataset.objective()
        metrics = await train.training_loop(config, folder, client, dataset, objective, evaluator)
    if evaluator and evaluator.last:
        print(f"reliability: {plot_reliability({folder.path.name: evaluator.last}, folder.plots / 'reliability.png')}")
    train.finish(folder, metrics)
    return metrics


if __name__ == "__main__":
    run_command(lambda config: asyncio.run(main(config)), Config, {"dataset": KINDS, "dataset.comparisons": DATASETS})
