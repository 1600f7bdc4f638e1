"""The supervised loop: a batch, one forward_backward, one optim_step. The next batch is made while they are under way.

Evaluations come before the step and see the weights it starts from; there is one more at the end. What a batch is trained on is an
Objective: the cross-entropy here, the Bradley-Terry loss in preference/train_reward_model.py. Left out: warm-up, stopping on held-out loss.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import chz

from posttrain.backend.alarms import Alarms, check_at_start
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, NonFiniteError
from posttrain.backend.futures import APIFuture
from posttrain.backend.learning_rate import LRSchedule, lr_multiplier
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED, WHOLE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, OptimStepResponse
from posttrain.renderers import get_renderer
from posttrain.tracking.checkpointing import Checkpointer, StopRequest
from posttrain.tracking.metrics_log import MetricsLog, print_last_metrics, read_last_metrics, timed
from posttrain.tracking.nonfinite import write_offending_data
from posttrain.tracking.progress import TrainingProgress
from posttrain.tracking.run_folder import BehaviorIfExists, RunFolder, open_run_folder
from supervised.nll import NLLEvaluator, nll_means, nll_sums
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

Metrics = dict[str, float]
Evaluator = Callable[[TrainingClient], Awaitable[Metrics]]


class Objective(Protocol):
    """What the loop does with a batch."""

    def forward_backward(self, client: TrainingClient, batch_D: Sequence[Datum]) -> APIFuture[ForwardBackwardOutput]: ...

    def metrics(self, batch_D: Sequence[Datum], output: ForwardBackwardOutput) -> Metrics:
        """Of a training batch, from its own pass."""
        ...


class CrossEntropy:
    """`train_mean_nll` is a mean over tokens, `train_weighted_nll` the mean that is trained on (nll.py)."""

    def forward_backward(self, client: TrainingClient, batch_D: Sequence[Datum]) -> APIFuture[ForwardBackwardOutput]:
        return client.forward_backward(batch_D, "cross_entropy")

    def metrics(self, batch_D: Sequence[Datum], output: ForwardBackwardOutput) -> Metrics:
        sums = nll_sums(batch_D, [out["logprobs"] for out in output.loss_fn_outputs])
        mean, weighted = nll_means(sums)
        return {"train_mean_nll": mean, "train_weighted_nll": weighted, "num_loss_tokens": float(sums[1])}


@chz.chz
class Config:
    """Supervised fine-tuning of a language model on a dataset."""

    dataset: SupervisedDatasetBuilder = chz.field(doc="builder of the training and held-out data")
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    load_checkpoint_path: str | None = chz.field(default=None, doc="start from the weights of this checkpoint (fresh optimizer)")
    renderer_name: str | None = chz.field(default=None, doc="role_colon, chat_template or plain; None = what suits the tokenizer")
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of a LoRA adapter; 0 trains all weights")
    lora_alpha: float | None = chz.field(
        default=None, validator=POSITIVE, doc="the adapter is scaled by lora_alpha / lora_rank; None = 32"
    )
    seed: int = chz.field(
        default=0, validator=SEED, doc="seed of a preset's weights and of the adapter (the data's is dataset.seed)"
    )

    learning_rate: float = chz.field(default=1e-4, validator=LEARNING_RATE, doc="at the first step")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="how the learning rate falls to the last step")
    weight_decay: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="AdamW's, decoupled")
    grad_clip_norm: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="0 = no clipping")
    num_epochs: int = chz.field(default=1, validator=COUNT, doc="passes over the dataset")
    max_steps: int | None = chz.field(default=None, validator=COUNT, doc="total number of steps, if less than the epochs give")
    stop_at_nll: float | None = chz.field(
        default=None,
        validator=NON_NEGATIVE,
        doc="end once a batch's train_mean_nll, a mean over tokens, is below this (with a constant lr_schedule)",
    )

    eval_every: int = chz.field(
        default=20, validator=WHOLE, doc="held-out loss before every this many steps, and at the end; 0 = never"
    )
    save_every: int = chz.field(
        default=100, validator=WHOLE, doc="checkpoint after every this many steps, and at the end; 0 = only at the end"
    )
    keep_checkpoints: int | None = chz.field(
        default=3, validator=COUNT, doc="delete older checkpoints than the last this many and `final`; None = keep all"
    )
    log_path: str = chz.field(default="runs/sft", munger=lambda _, path: str(Path(path).expanduser()), doc="the run folder")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(default="ask", doc="what to do with an existing run folder")
    wandb_project: str | None = chz.field(default=None, doc="also log to this wandb project")
    wandb_name: str | None = chz.field(default=None, doc="name of the wandb run")
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine trains")


async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Everything that can be wrong with the input is raised before the model is loaded."""
    if config.num_epochs < 1:
        raise ConfigError(f"num_epochs={config.num_epochs} must be at least 1")
    tokenizer = load_tokenizer(config.model_name, config.backend.max_length)
    dataset, test_dataset = config.dataset(get_renderer(config.renderer_name, tokenizer))
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    lora = LoraConfig(config.lora_rank, config.seed, config.lora_alpha) if config.lora_rank else None
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = service.create_training_client(config.model_name, lora, config.seed)
        evaluator = NLLEvaluator(test_dataset) if test_dataset is not None and config.eval_every else None
        metrics = await training_loop(config, folder, client, dataset, CrossEntropy(), evaluator)
    finish(folder, metrics)
    return metrics


async def training_loop(
    config: Config,
    folder: RunFolder,
    client: TrainingClient,
    dataset: SupervisedDataset,
    objective: Objective,
    evaluator: Evaluator | None,
    until: int | None = None,
) -> Metrics:
    """From where the folder's last checkpoint ended to the last step; returns the last metrics. `config.dataset` is not read.

    `until` ends this call before that step; its checkpoint is named by the step. The schedule is that of all steps, and a later call
    goes on (recipes/bstar).
    """
    num_steps = min(len(dataset) * config.num_epochs, config.max_steps or 2**62)
    last = min(num_steps, until or num_steps)
    checkpointer = Checkpointer(folder, client, config.save_every, config.keep_checkpoints)
    start = checkpointer.start(config.load_checkpoint_path, last, may_end_early=config.stop_at_nll is not None)
    if checkpointer.nothing_left:
        return read_last_metrics(folder.path)
    alarms = Alarms(client.get_info(), config.backend.alarm)
    if start < last:
        await check_at_start(client, alarms)
    metrics: Metrics = {}
    headline: Metrics = {}
    with (
        closing(MetricsLog(folder, config.wandb_project, config.wandb_name, config)) as log,
        StopRequest() as stop,
        TrainingProgress(last, start, "sft") as progress,
    ):
        done = start
        batch_D = _batch(dataset, start) if start < last else []
        for step in range(start, last):
            learning_rate = config.learning_rate * lr_multiplier(config.lr_schedule, step, num_steps)
            epoch = step // len(dataset)
            metrics = {"epoch": epoch, "progress": (step + 1) / num_steps, "learning_rate": learning_rate}
            with timed(metrics, "total"):
                if evaluator and step % config.eval_every == 0:
                    with timed(metrics, "eval"):
                        metrics |= await evaluator(client)
                adam = AdamParams(learning_rate, eps=1e-8, weight_decay=config.weight_decay, grad_clip_norm=config.grad_clip_norm)
                with timed(metrics, "train"):
                    forward_backward, optim_step = objective.forward_backward(client, batch_D), client.optim_step(adam)
                    next_D = _batch(dataset, step + 1) if step + 1 < last else []  # made while the step is under way
                    metrics |= await _step_metrics(folder, step, batch_D, objective, forward_backward, optim_step)
            batch_D, done = next_D, step + 1
            metrics |= alarms.metrics()
            log.log(metrics, step)
            checkpointer.after_step(step + 1)
            headline |= {short: metrics[name] for name, short in HEADLINE.items() if name in metrics}
            progress.update(step, headline)
            if config.stop_at_nll is not None and metrics.get("train_mean_nll", float("inf")) < config.stop_at_nll:
                break
            if stop and done < last:
                checkpointer.interrupted(done)
        if evaluator:
            final = await evaluator(client)
            log.log(final, done)
            metrics |= final
    checkpointer.save("final" if last == num_steps else f"{done:06d}", done)
    return metrics


HEADLINE = {
    "train_mean_nll": "nll",
    "test/nll": "test nll",
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "test/accuracy": "test",
}


def _batch(dataset: SupervisedDataset, step: int) -> list[Datum]:
    """The batch of a global step. The cursor is the step itself: nothing is repeated or skipped by a resume."""
    epoch, index = divmod(step, len(dataset))
    dataset.set_epoch(epoch)
    return dataset.get_batch(index)


async def _step_metrics(
    folder: RunFolder,
    step: int,
    batch_D: list[Datum],
    objective: Objective,
    forward_backward: APIFuture[ForwardBackwardOutput],
    optim_step: APIFuture[OptimStepResponse],
) -> Metrics:
    try:
        output = await forward_backward
        optim_metrics = (await optim_step).metrics
    except NonFiniteError as error:
        raise write_offending_data(folder, step, batch_D, error) from error
    return {
        **objective.metrics(batch_D, output),
        "num_sequences": len(batch_D),
        "num_tokens": sum(datum.model_input.length for datum in batch_D),
        **{f"optim/{name}": value for name, value in optim_metrics.items()},
    }


def finish(folder: RunFolder, metrics: Metrics) -> None:
    from posttrain.tracking.plots import plot_run

    print_last_metrics(folder, metrics)
    print(f"plot: {plot_run(folder.path)}\ncheckpoint: {folder.checkpoints / 'final'}")
