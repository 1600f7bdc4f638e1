"""The supervised loop: a batch, its passes, one optim_step; the next batch is made meanwhile. The
loss is an Objective: cross-entropy here; DPO, Bradley-Terry and step labels in preference/.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from posttrain.advise import warn_of_learning_rate
from posttrain.backend.alarms import Alarms, check_at_start
from posttrain.backend.errors import NonFiniteError
from posttrain.backend.futures import APIFuture
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ForwardBackwardOutput, OptimStepResponse
from posttrain.tracking.metrics_log import timed
from posttrain.tracking.nonfinite import write_offending_data
from posttrain.tracking.run import Metrics, Run, finish
from posttrain.tracking.run_config import LanguageModelRunConfig
from posttrain.tracking.run_folder import RunFolder, open_run_folder
from posttrain.tracking.trainer_restarts import with_restarts
from supervised.config import Config
from supervised.evaluators import Evaluated, RunEvaluators
from supervised.nll import NLLEvaluator, nll_means, nll_sums
from supervised.types import Dataset, datasets_of

Evaluator = Callable[[TrainingClient], Awaitable[Metrics]]
Batch = TypeVar("Batch")
# Sequences, and the future of their pass.
Pass = tuple[Sequence[Datum], APIFuture[ForwardBackwardOutput]]
HEADLINE = {
    "train_mean_nll": "nll",
    "test/nll": "test nll",
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "test/accuracy": "test",
}


class Objective(Protocol[Batch]):
    """The loss of a batch and its metrics."""

    async def passes(self, client: TrainingClient, batch: Batch) -> list[Pass]:
        """Submits the batch's passes. Their gradients add up to the gradient of its loss."""
        ...

    def metrics(self, batch: Batch, outputs: Sequence[ForwardBackwardOutput]) -> Metrics:
        """Metrics of a training batch from its passes."""
        ...


class CrossEntropy:
    """`train_mean_nll` is a mean over tokens, `train_weighted_nll` the trained mean (nll.py)."""

    async def passes(self, client: TrainingClient, batch: list[Datum]) -> list[Pass]:
        return [(batch, client.forward_backward(batch, "cross_entropy", all_logprobs=False))]

    def metrics(self, batch: list[Datum], outputs: Sequence[ForwardBackwardOutput]) -> Metrics:
        sums = nll_sums(batch, [out["logprobs"] for out in outputs[0].loss_fn_outputs])
        mean, weighted = nll_means(sums)
        return {"train_mean_nll": mean, "train_weighted_nll": weighted, "num_loss_tokens": float(sums[1])}


@with_restarts
async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Input errors are raised before the model loads."""
    renderer = config.renderer()
    dataset, test_dataset = datasets_of(config.dataset, renderer)
    custom = await config.build_evaluators(renderer)
    warn_of_learning_rate("sft", config.model_name, config.lora_rank, config.learning_rate)
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = service.create_training_client(config.model_name, config.lora(), config.seed)
        evaluator = NLLEvaluator(test_dataset) if test_dataset is not None and config.eval_every else None
        metrics = await training_loop(
            config, folder, client, dataset, CrossEntropy(), evaluator, custom=custom, stop_at_nll=config.stop_at_nll
        )
    finish(folder, metrics)
    return metrics


async def training_loop(
    config: LanguageModelRunConfig,
    folder: RunFolder,
    client: TrainingClient,
    dataset: Dataset[Batch],
    objective: Objective[Batch],
    evaluator: Evaluator | None,
    *,
    name: str = "sft",
    headline: dict[str, str] = HEADLINE,
    alarms: Alarms | None = None,
    until: int | None = None,
    custom: RunEvaluators | None = None,
    stop_at_nll: float | None = None,
) -> Metrics:
    """Runs from the folder's last checkpoint to the last step; returns the last metrics.

    `alarms`: those of a caller that has loaded load_checkpoint_path and compared. `until` ends this
    call before that step, with a checkpoint; the schedule still covers all steps, and a later call
    goes on. `custom`: the user's evaluators, after the run's own.
    """
    num_steps = config.num_steps(len(dataset))
    last = min(num_steps, until or num_steps)
    run = Run(config=config, folder=folder, client=client, name=name, num_steps=last, headline=headline)
    run.alarms = alarms or Alarms(client.get_info(), config.backend.alarm)
    run.final_name = "final" if last == num_steps else None
    custom = custom or RunEvaluators()

    async def evaluate(_: int) -> Metrics:
        return await custom.frequent(Evaluated(client), await evaluator(client) if evaluator else {})

    if evaluator or custom.frequent:
        run.evaluate = evaluate
    if custom.infrequent:
        run.infrequent, run.infrequent_every = lambda _: custom.infrequent(Evaluated(client)), custom.infrequent_every
    if stop_at_nll is not None:
        run.ends_early = lambda metrics: metrics.get("train_mean_nll", float("inf")) < stop_at_nll
    if not run.start(None if alarms else config.load_checkpoint_path):
        return run.last_metrics()
    if run.first_step < last and not alarms:
        await check_at_start(client, run.alarms)
    batch = _batch(dataset, run.first_step) if run.first_step < last else None

    async def step(number: int, metrics: Metrics) -> None:
        nonlocal batch
        assert batch is not None
        adam = config.adam(number, num_steps)
        metrics |= {
            "epoch": number // len(dataset),
            "progress": (number + 1) / num_steps,
            "learning_rate": adam.learning_rate,
        }
        with timed(metrics, "train"):
            passes = await objective.passes(client, batch)
            optim_step = client.optim_step(adam)
            # made during the step
            next_batch = _batch(dataset, number + 1) if number + 1 < last else None
            outputs, optim_metrics = await _results(folder, number, passes, optim_step)
            metrics |= objective.metrics(batch, outputs)
        data_D = [datum for part_D, _ in passes for datum in part_D]
        metrics |= {"num_sequences": len(data_D), "num_tokens": sum(datum.model_input.length for datum in data_D)}
        metrics |= {f"optim/{name}": value for name, value in optim_metrics.items()}
        batch = next_batch

    return await run.steps(step)


def _batch(dataset: Dataset[Batch], step: int) -> Batch:
    """The batch of a global step. The step is the cursor: a resume repeats and skips nothing."""
    epoch, index = divmod(step, len(dataset))
    dataset.set_epoch(epoch)
    return dataset.get_batch(index)


async def _results(
    folder: RunFolder, step: int, passes: Sequence[Pass], optim_step: APIFuture[OptimStepResponse]
) -> tuple[list[ForwardBackwardOutput], Metrics]:
    """Outputs of passes and optimizer. A non-finite number ends the run, its data on disk."""
    outputs: list[ForwardBackwardOutput] = []
    try:
        for _, future in passes:
            outputs.append(await future)
        return outputs, (await optim_step).metrics
    except NonFiniteError as error:
        # the optimizer's gradients are those of all passes
        failed = passes[len(outputs) :][:1] or passes
        data_D = [datum for part_D, _ in failed for datum in part_D]
        raise write_offending_data(folder, step, data_D, error) from error
