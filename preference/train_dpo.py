"""The preference loop: pairs of answers, one forward and one backward over both answers of each, one optim_step.

The loss is DPO (Rafailov et al. 2023) or one of its relatives in losses.py. The reference is the policy the run starts from, frozen: its
logprobs are computed once, before the first step (reference.py). Evaluations come before the step and see the weights it starts from; there
is one more at the end. Left out: new answers sampled while training, warm-up.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import chz
import torch

from posttrain.backend.alarms import Alarms, check_at_start
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, NonFiniteError
from posttrain.backend.learning_rate import LRSchedule, lr_multiplier
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, POSITIVE, SEED, WHOLE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig
from posttrain.renderers import get_renderer
from posttrain.tracking.checkpointing import Checkpointer, StopRequest
from posttrain.tracking.metrics_log import MetricsLog, print_last_metrics, read_last_metrics, timed
from posttrain.tracking.nonfinite import write_offending_data
from posttrain.tracking.progress import TrainingProgress
from posttrain.tracking.run_folder import BehaviorIfExists, RunFolder, open_run_folder
from preference.losses import DPO, PreferenceLoss, pair_metrics
from preference.pairs import (
    Pair,
    PairDataset,
    Ties,
    as_data,
    micro_batches_of_pairs,
    pair_logprobs,
    render_pairs,
    sequence_logprobs,
)
from preference.reference import with_reference
from preference.types import ComparisonDatasetBuilder

Metrics = dict[str, float]
Evaluator = Callable[[TrainingClient], Awaitable[Metrics]]
HEADLINE = {"dpo_loss": "loss", "accuracy": "accuracy", "test/accuracy": "test accuracy"}


@chz.chz
class Config:
    """Direct preference optimisation of a language model on pairs of answers."""

    dataset: ComparisonDatasetBuilder = chz.field(doc="builder of the training and held-out comparisons")
    method: PreferenceLoss = chz.field(default_factory=DPO, doc="the loss and its settings")
    batch_size: int = chz.field(default=64, validator=COUNT, doc="pairs per optimizer step")
    data_seed: int = chz.field(default=0, validator=SEED, doc="seed of the order of the pairs")
    max_length: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens of prompt and answer; None = the model's context"
    )
    overlong: Literal["drop", "raise"] = chz.field(
        default="drop", doc="pairs with an answer longer than that; the count is printed"
    )
    ties: Ties = chz.field(
        default="drop", doc="ties are left out, trained on both ways round (towards equal rewards), or an error"
    )
    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    load_checkpoint_path: str | None = chz.field(default=None, doc="start from the weights of this checkpoint (fresh optimizer)")
    renderer_name: str | None = chz.field(default=None, doc="role_colon, chat_template or plain; None = what suits the tokenizer")
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of a LoRA adapter; 0 trains all weights")
    lora_alpha: float | None = chz.field(
        default=None, validator=POSITIVE, doc="the adapter is scaled by lora_alpha / lora_rank; None = 32"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="seed of a preset's weights and of the adapter")

    learning_rate: float = chz.field(default=1e-5, validator=LEARNING_RATE, doc="at the first step")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="how the learning rate falls to the last step")
    weight_decay: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="AdamW's, decoupled")
    grad_clip_norm: float = chz.field(default=0.0, validator=NON_NEGATIVE, doc="0 = no clipping")
    num_epochs: int = chz.field(default=1, validator=COUNT, doc="passes over the dataset")
    max_steps: int | None = chz.field(default=None, validator=COUNT, doc="total number of steps, if less than the epochs give")

    eval_every: int = chz.field(
        default=20, validator=WHOLE, doc="held-out metrics before every this many steps, and at the end; 0 = never"
    )
    save_every: int = chz.field(
        default=100, validator=WHOLE, doc="checkpoint after every this many steps, and at the end; 0 = only at the end"
    )
    keep_checkpoints: int | None = chz.field(
        default=3, validator=COUNT, doc="delete older checkpoints than the last this many and `final`; None = keep all"
    )
    log_path: str = chz.field(default="runs/dpo", munger=lambda _, path: str(Path(path).expanduser()), doc="the run folder")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(default="ask", doc="what to do with an existing run folder")
    wandb_project: str | None = chz.field(default=None, doc="also log to this wandb project")
    wandb_name: str | None = chz.field(default=None, doc="name of the wandb run")
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine trains")


async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Everything that can be wrong with the input is raised before the model is loaded."""
    return await train_on_pairs(config, *_pairs(config))


async def train_on_pairs(config: Config, train: list[Pair], test: list[Pair], evaluator: Evaluator | None = None) -> Metrics:
    """The loop on pairs that are tokens already; `config.dataset` is not read. `evaluator` adds metrics where `test` is evaluated."""
    if config.num_epochs < 1:
        raise ConfigError(f"num_epochs={config.num_epochs} must be at least 1")
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    lora = LoraConfig(config.lora_rank, config.seed, config.lora_alpha) if config.lora_rank else None
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = service.create_training_client(config.model_name, lora, config.seed)
        if config.load_checkpoint_path:
            await client.load_state(config.load_checkpoint_path)
        await check_at_start(client, alarms := Alarms(client.get_info(), config.backend.alarm))
        if config.method.needs_reference:  # before a resumed run's own weights are loaded
            file, reference = folder.path / "reference_logprobs.jsonl", _reference(config)
            pairs = await with_reference([*train, *test], client, file, reference)
            train, test = pairs[: len(train)], pairs[len(train) :]
        dataset = PairDataset(train, config.batch_size, config.data_seed)
        metrics = await _loop(config, folder, client, dataset, test, evaluator if config.eval_every else None, alarms)
    _finish(folder, metrics)
    return metrics


def _pairs(config: Config) -> tuple[list[Pair], list[Pair]]:
    renderer = get_renderer(config.renderer_name, load_tokenizer(config.model_name, config.backend.max_length))
    train, test = config.dataset()
    options = (renderer, config.max_length, config.ties, config.overlong)
    return render_pairs(train, *options), render_pairs(test, *options, kind="held-out") if test and config.eval_every else []


def _reference(config: Config) -> dict[str, Any]:
    """What names the policy the run starts from."""
    return {name: getattr(config, name) for name in ("model_name", "load_checkpoint_path", "seed", "lora_rank")}


async def _loop(
    config: Config,
    folder: RunFolder,
    client: TrainingClient,
    dataset: PairDataset,
    test: list[Pair],
    evaluator: Evaluator | None,
    alarms: Alarms,
) -> Metrics:
    num_steps = min(len(dataset) * config.num_epochs, config.max_steps or 2**62)
    checkpointer = Checkpointer(folder, client, config.save_every, config.keep_checkpoints)
    start = checkpointer.start(None, num_steps)  # the start policy is loaded already
    if checkpointer.nothing_left:
        return read_last_metrics(folder.path)
    metrics: Metrics = {}
    headline: Metrics = {}
    with (
        closing(MetricsLog(folder, config.wandb_project, config.wandb_name, config)) as log,
        StopRequest() as stop,
        TrainingProgress(num_steps, start, "dpo") as progress,
    ):
        for step in range(start, num_steps):
            learning_rate = config.learning_rate * lr_multiplier(config.lr_schedule, step, num_steps)
            metrics = {
                "epoch": step // len(dataset),
                "progress": (step + 1) / num_steps,
                "learning_rate": learning_rate,
            }
            with timed(metrics, "total"):
                if (test or evaluator) and step % config.eval_every == 0:
                    with timed(metrics, "eval"):
                        metrics |= await _evaluations(config, client, test, evaluator)
                with timed(metrics, "train"):
                    metrics |= await _train_step(config, folder, client, step, dataset.get_batch(step), learning_rate)
            metrics |= alarms.metrics()
            log.log(metrics, step)
            checkpointer.after_step(step + 1)
            headline |= {short: metrics[name] for name, short in HEADLINE.items() if name in metrics}
            progress.update(step, headline)
            if stop and step + 1 < num_steps:
                checkpointer.interrupted(step + 1)
        if test or evaluator:
            final = await _evaluations(config, client, test, evaluator)
            log.log(final, max(start, num_steps))
            metrics |= final
    checkpointer.save("final", max(start, num_steps))
    return metrics


async def _train_step(
    config: Config, folder: RunFolder, client: TrainingClient, step: int, batch: list[Pair], learning_rate: float
) -> Metrics:
    """The micro-batches' gradients add up to that of the batch's mean loss; only one micro-batch's activations are alive at a time."""
    adam = AdamParams(learning_rate, eps=1e-8, weight_decay=config.weight_decay, grad_clip_norm=config.grad_clip_norm)
    parts = micro_batches_of_pairs(batch, config.backend.micro_batch_tokens)
    futures = [
        client.forward_backward_custom(as_data(part), partial(_share_of_mean, config.method, part, len(batch))) for part in parts
    ]
    optim_step = client.optim_step(adam)
    data_D = [datum for part in parts for datum in as_data(part)]
    try:
        outputs_D = [output for future in futures for output in (await future).loss_fn_outputs]
        optim_metrics = (await optim_step).metrics
    except NonFiniteError as error:
        raise write_offending_data(folder, step, data_D, error) from error
    return {
        **_metrics(config.method, [pair for part in parts for pair in part], outputs_D),
        "num_pairs": len(batch),
        "num_tokens": sum(datum.model_input.length for datum in data_D),
        **{f"optim/{name}": value for name, value in optim_metrics.items()},
    }


def _share_of_mean(
    loss: PreferenceLoss, pairs: Sequence[Pair], num_pairs: int, data_D: list[Datum], logprobs_D: list[torch.Tensor]
) -> tuple[torch.Tensor, Metrics]:
    """What these pairs contribute to the mean over `num_pairs`."""
    return loss(pair_logprobs(pairs, sequence_logprobs(data_D, logprobs_D))).sum() / num_pairs, {}


async def _evaluations(config: Config, client: TrainingClient, test: list[Pair], evaluator: Evaluator | None) -> Metrics:
    metrics = await evaluate(client, config.method, test) if test else {}
    return metrics | (await evaluator(client) if evaluator else {})


async def evaluate(client: TrainingClient, loss: PreferenceLoss, pairs: Sequence[Pair], name: str = "test") -> Metrics:
    """The metrics of a training step on pairs that are not trained on: one forward pass, no gradient."""
    outputs_D = (await client.forward(as_data(pairs), "cross_entropy")).loss_fn_outputs
    return {f"{name}/{key}": value for key, value in _metrics(loss, pairs, outputs_D).items()}


def _metrics(loss: PreferenceLoss, pairs: Sequence[Pair], outputs_D: Sequence[dict[str, Any]]) -> Metrics:
    logprobs_D = [output["logprobs"].to_torch() for output in outputs_D]
    return pair_metrics(loss, pair_logprobs(pairs, sequence_logprobs(as_data(pairs), logprobs_D)))


def _finish(folder: RunFolder, metrics: Metrics) -> None:
    from posttrain.tracking.plots import plot_run

    print_last_metrics(folder, metrics)
    print(f"plot: {plot_run(folder.path)}\ncheckpoint: {folder.checkpoints / 'final'}")
