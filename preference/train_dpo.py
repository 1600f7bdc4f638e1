"""Direct preference optimisation: the supervised loop with a preference loss as its Objective: DPO
(Rafailov et al. 2023) or a relative (losses.py). The reference, the policy at the start, is frozen;
its logprobs are computed once, before the first step. Left out: sampling new answers in training.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from posttrain.advise import warn_of_learning_rate
from posttrain.backend.alarms import Alarms, check_at_start
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ForwardBackwardOutput
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.run import Metrics, finish
from posttrain.tracking.run_folder import open_run_folder
from posttrain.tracking.trainer_restarts import with_restarts
from preference.config import Config
from preference.losses import PreferenceLoss, pair_metrics
from preference.pairs import (
    Pair,
    as_data,
    micro_batches_of_pairs,
    pair_logprobs,
    render_pairs,
    sequence_logprobs,
    weighted_logprobs,
)
from preference.reference import with_reference
from supervised.examples import Joined, Ordered
from supervised.train import Evaluator, Pass, training_loop

HEADLINE = {"dpo_loss": "loss", "accuracy": "accuracy", "test/accuracy": "test accuracy"}


@with_restarts
async def main(config: Config) -> Metrics:
    """Trains; returns the last metrics. Input errors are raised before the model loads."""
    return await train_on_pairs(config, *_pairs(config))


async def train_on_pairs(
    config: Config, train: Sequence[Pair], test: Sequence[Pair], evaluator: Evaluator | None = None
) -> Metrics:
    """The loop on rendered pairs; `config.dataset` is unused. `evaluator` adds held-out metrics."""
    custom = await config.build_evaluators(config.renderer())
    warn_of_learning_rate("dpo", config.model_name, config.lora_rank, config.learning_rate)
    folder = open_run_folder(config.log_path, config.behavior_if_log_dir_exists, config)
    with ServiceClient(config.backend, folder.checkpoints) as service:
        client = service.create_training_client(config.model_name, config.lora(), config.seed)
        if config.load_checkpoint_path:
            await client.load_state(config.load_checkpoint_path)
        await check_at_start(client, alarms := Alarms(client.get_info(), config.backend.alarm))
        if config.method.needs_reference:  # before a resumed run's own weights are loaded
            file = folder.path / "reference_logprobs.jsonl"
            names = ("model_name", "load_checkpoint_path", "seed", "lora_rank")
            start = {name: getattr(config, name) for name in names}
            pairs, cut = await with_reference(Joined([train, test]), client, file, start), len(train)
            train, test = Ordered(pairs, np.arange(cut)), Ordered(pairs, np.arange(cut, len(pairs)))

        async def evaluate(client: TrainingClient) -> Metrics:
            metrics = await evaluate_pairs(client, config.method, test) if test else {}
            return metrics | (await evaluator(client) if evaluator else {})

        metrics = await training_loop(
            config,
            folder,
            client,
            ListDataset(train, config.batch_size, config.data_seed, noun="pairs"),
            PreferenceObjective(config.method, config.backend.micro_batch_tokens),
            evaluate if config.eval_every and (test or evaluator) else None,
            name="dpo",
            headline=HEADLINE,
            alarms=alarms,
            custom=custom,
        )
    finish(folder, metrics)
    return metrics


def _pairs(config: Config) -> tuple[Sequence[Pair], Sequence[Pair]]:
    train, test = config.dataset()
    options = (config.renderer(), config.max_length, config.ties, config.overlong)
    pairs = render_pairs(train, *options)
    return pairs, render_pairs(test, *options, kind="held-out") if test and config.eval_every else []


class PreferenceObjective:
    """The mean loss of a batch of pairs, in micro-batches to bound the memory of activations."""

    def __init__(self, loss: PreferenceLoss, micro_batch_tokens: int):
        self.loss, self.micro_batch_tokens = loss, micro_batch_tokens

    async def passes(self, client: TrainingClient, batch: list[Pair]) -> list[Pass]:
        return [
            (
                data_D := as_data(part),
                client.forward_backward_custom(data_D, partial(self._share_of_mean, part, len(batch))),
            )
            for part in micro_batches_of_pairs(batch, self.micro_batch_tokens)
        ]

    def metrics(self, batch: list[Pair], outputs: Sequence[ForwardBackwardOutput]) -> Metrics:
        pairs = [pair for part in micro_batches_of_pairs(batch, self.micro_batch_tokens) for pair in part]
        logprobs_D = [out["logprobs"].to_torch() for output in outputs for out in output.loss_fn_outputs]
        return _metrics(self.loss, pairs, logprobs_D) | {"num_pairs": len(batch)}

    def _share_of_mean(
        self, pairs: Sequence[Pair], num_pairs: int, data_D: list[Datum], logprobs_D: list[torch.Tensor]
    ) -> tuple[torch.Tensor, Metrics]:
        """The contribution of these pairs to the mean over `num_pairs`."""
        return self.loss(pair_logprobs(pairs, sequence_logprobs(data_D, logprobs_D))).sum() / num_pairs, {}


async def evaluate_pairs(client: TrainingClient, loss: PreferenceLoss, pairs: Sequence[Pair]) -> Metrics:
    """Metrics of held-out pairs: one forward pass, no gradient."""
    logprobs_D = await weighted_logprobs(client, as_data(pairs))
    return {f"test/{key}": value for key, value in _metrics(loss, pairs, logprobs_D).items()}


def _metrics(loss: PreferenceLoss, pairs: Sequence[Pair], logprobs_D: Sequence[torch.Tensor]) -> Metrics:
    return pair_metrics(loss, pair_logprobs(pairs, sequence_logprobs(as_data(pairs), logprobs_D)))
