"""Trains a process reward model on labelled steps with the supervised loop; the loss is in
step_data.py. Opened by its path (prm.py). Left out: B-STaR's warm-up.

  python preference/train_prm.py dataset=labels.jsonl dataset.test_size=100 \\
      load_checkpoint_path=runs/sft/checkpoints/final
  python -m preference.train_prm dataset=labels.jsonl dataset.labels=soft dataset.last_tokens=3
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from collections.abc import Sequence

import chz
import numpy as np

from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ForwardBackwardOutput
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run import Metrics, finish
from posttrain.tracking.run_config import LanguageModelRunConfig, log_path_field
from posttrain.tracking.run_folder import open_run_folder
from posttrain.tracking.trainer_restarts import with_restarts
from preference.step_data import StepExamplesBuilder, step_cross_entropy
from supervised import train
from supervised.types import SupervisedDataset

DATASETS = {"*.jsonl": "preference.step_data:StepExamplesBuilder path={}"}


@chz.chz
class Config(LanguageModelRunConfig):
    """Training of a process reward model on labelled steps."""

    dataset: StepExamplesBuilder = chz.field(doc="labelled steps to train on, and to hold out")
    log_path: str = log_path_field("runs/prm")


class StepObjective:
    async def passes(self, client: TrainingClient, batch: list[Datum]) -> list[train.Pass]:
        return [(batch, client.forward_backward(batch, step_cross_entropy))]

    def metrics(self, batch: list[Datum], outputs: Sequence[ForwardBackwardOutput]) -> Metrics:
        names = {"train_loss": "loss:sum", "train_accuracy": "accuracy:mean", "num_loss_tokens": "num_loss_tokens:sum"}
        return {name: outputs[0].metrics[source] for name, source in names.items()}


class StepEvaluator:
    """One forward pass over the held-out solutions. `accuracy` is of steps, at their last token;
    `majority` that of always guessing the commoner label; `first_error` the share of solutions
    whose first step below 1/2 is the first labelled 0. A soft label of at most 1/2 counts as 0."""

    def __init__(self, dataset: SupervisedDataset):
        self._batches = [dataset.get_batch(i) for i in range(len(dataset))]

    async def __call__(self, client: TrainingClient) -> Metrics:
        submitted = [(batch_D, client.forward(batch_D, step_cross_entropy)) for batch_D in self._batches]
        losses, weights, right, labels, first_found = [], [], [], [], []
        for batch_D, future in submitted:
            output = await future
            losses.append(output.metrics["loss:sum"])
            weights += [datum.loss_fn_inputs["weights"].array.sum(dtype=np.float64) for datum in batch_D]
            for datum, out in zip(batch_D, output.loss_fn_outputs, strict=True):
                ends_T = datum.loss_fn_inputs["step_ends"].array > 0
                bad_S, wrong_S = out["scalars"].array[ends_T] <= 0, datum.loss_fn_inputs["labels"].array[ends_T] <= 0.5
                right.append(bad_S == wrong_S)
                labels.append(~wrong_S)
                first_found.append(first(bad_S) == first(wrong_S))
        good = float(np.concatenate(labels).mean())
        return {
            "test/loss": sum(losses) / float(np.sum(weights)),
            "test/accuracy": float(np.concatenate(right).mean()),
            "test/majority": max(good, 1 - good),
            "test/first_error": float(np.mean(first_found)),
        }


def first(marked_S: np.ndarray) -> int | None:
    """Index of the first True, None where there is none."""
    return int(marked_S.argmax()) if marked_S.any() else None


@with_restarts
async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. The model is LOG_PATH/checkpoints/final."""
    dataset, test_dataset = config.dataset(config.renderer())
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = service.create_scalar_client(config.model_name, config.lora(), config.seed)
        evaluator = StepEvaluator(test_dataset) if test_dataset is not None and config.eval_every else None
        metrics = await train.training_loop(config, folder, client, dataset, StepObjective(), evaluator, name="prm")
    finish(folder, metrics)
    return metrics


if __name__ == "__main__":
    run_command(main, Config, {"dataset": DATASETS})
