"""Updates, epochs and tokens of a configuration, computed and checked before anything is loaded."""

import copy
import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from posttrain.backend.config import compute_dtype, training_device
from posttrain.backend.errors import ConfigError
from posttrain.backend.models import model_config

# Per parameter and token: 2 each to sample, for the reference and to score, and 6 to train.
FLOPS = 12


@dataclass(frozen=True)
class Sizes:
    prompts_per_update: int
    samples_per_update: int
    updates: int
    num_prompts: int
    response_length: int
    eval_every: int

    @property
    def epochs(self) -> float:
        """In prompts. The original counts samples: its "6 epochs" at K = 16 are 0.38 of these."""
        return self.updates * self.prompts_per_update / self.num_prompts

    def lines(self) -> str:
        samples = self.updates * self.samples_per_update
        return (
            f"{self.updates} updates of {self.prompts_per_update} questions with "
            f"{self.samples_per_update // self.prompts_per_update} rationales each\n"
            f"{self.epochs:.2f} epochs of {self.num_prompts:,} questions; {samples:,} rationales, "
            f"at most {samples * self.response_length:,} tokens to be sampled\n"
            f"an evaluation and a checkpoint every {self.eval_every} updates"
        )


def derive_sizes(
    num_prompts: int,
    rloo_k: int,
    least_k: int,
    train_batch_size: int,
    epochs: float,
    max_updates: int | None,
    evaluations: int,
    length: int,
) -> Sizes:
    """ConfigError, with the nearest valid value, for sizes that do not work together. `least_k`: what the
    baseline needs."""
    if rloo_k < least_k:
        raise ConfigError(
            f"rloo_k={rloo_k}: the leave-one-out baseline needs other rationales; the least that works is "
            f"rloo_k={least_k}, or baseline=none"
        )
    if train_batch_size < rloo_k or train_batch_size % rloo_k:
        near = max(1, round(train_batch_size / rloo_k)) * rloo_k
        raise ConfigError(
            f"train_batch_size={train_batch_size} is not a multiple of rloo_k={rloo_k}; the nearest is "
            f"train_batch_size={near}"
        )
    prompts = train_batch_size // rloo_k
    if prompts > num_prompts:
        raise ConfigError(
            f"train_batch_size={train_batch_size} wants {prompts} questions per update, and there are {num_prompts}; "
            f"the largest that works is train_batch_size={num_prompts * rloo_k}"
        )
    if length < 1 or epochs <= 0 or (max_updates is not None and max_updates < 1):
        raise ConfigError(
            f"response_length={length}, num_train_epochs={epochs:g} and max_updates={max_updates} must be above 0"
        )
    updates = max_updates or max(1, round(epochs * num_prompts / prompts))
    if not 1 <= evaluations <= updates:
        raise ConfigError(
            f"num_evaluations={evaluations} in {updates} updates; the nearest is "
            f"num_evaluations={min(max(evaluations, 1), updates)}"
        )
    return Sizes(prompts, train_batch_size, updates, num_prompts, length, updates // evaluations)


def estimated_minutes(sizes: Sizes, model_name: str, tokens_per_sequence: float) -> float:
    """An order of magnitude, from this machine's matmul rate; too low for very small models."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config(model_name)))
    parameters = sum(p.numel() for p in model.parameters())
    device = training_device()
    square = torch.ones(1024, 1024, device=device, dtype=compute_dtype(device))
    float((square @ square)[0, 0])  # warm-up: the first call is slow
    start = time.perf_counter()
    float((square @ square @ square @ square @ square)[0, 0])
    rate = 4 * 2 * 1024**3 / (time.perf_counter() - start)
    return FLOPS * parameters * sizes.updates * sizes.samples_per_update * tokens_per_sequence / rate / 60
