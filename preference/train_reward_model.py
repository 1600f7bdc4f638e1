"""Trains a reward model on comparisons with the supervised loop; environments open it by its path.
`dataset=scalar` is Bradley and Terry's (bradley_terry.py), `label` says A, B or Tie
(label_model.py). Held-out: test/accuracy, ece, swap_agreement, length_baseline, reliability.png.

  python -m preference.train_reward_model dataset=scalar dataset.comparisons=pairs.jsonl \\
      dataset.comparisons.test_size=200
  python -m preference.train_reward_model dataset=label dataset.comparisons=gsm8k_solutions \\
      dataset.comparisons.path=solutions.jsonl
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import chz

from posttrain.backend.service_client import ServiceClient
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run import Metrics, finish
from posttrain.tracking.run_config import LanguageModelRunConfig, log_path_field
from posttrain.tracking.run_folder import open_run_folder
from posttrain.tracking.trainer_restarts import with_restarts
from preference.names import DATASETS
from preference.reward_data import RewardExamplesBuilder
from preference.reward_evaluation import RewardModelEvaluator, plot_reliability
from supervised.train import training_loop

KINDS = {
    "scalar": "preference.bradley_terry:PreferencePairsBuilder",
    "label": "preference.label_model:LabelExamplesBuilder",
}


@chz.chz
class Config(LanguageModelRunConfig):
    """Training of a reward model on comparisons."""

    dataset: RewardExamplesBuilder = chz.field(doc="the kind of reward model, and its comparisons")
    log_path: str = log_path_field("runs/reward_model")


@with_restarts
async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. The model is LOG_PATH/checkpoints/final."""
    renderer = config.renderer()
    train_D, test_D = config.dataset.load(renderer)
    dataset = config.dataset.examples(renderer, train_D)
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = config.dataset.create_client(service, config.model_name, config.lora(), config.seed)
        evaluator = None
        if test_D and config.eval_every:
            evaluator = RewardModelEvaluator(config.dataset.model(client, renderer), train_D, test_D)
        objective = config.dataset.objective()
        metrics = await training_loop(config, folder, client, dataset, objective, evaluator, name="reward model")
    if evaluator and evaluator.last:
        print(f"reliability: {plot_reliability({folder.path.name: evaluator.last}, folder.plots / 'reliability.png')}")
    finish(folder, metrics)
    return metrics


if __name__ == "__main__":
    run_command(main, Config, {"dataset": KINDS, "dataset.comparisons": DATASETS})
