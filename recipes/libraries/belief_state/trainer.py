"""Training of the Belief State Transformer and its next-token baseline, with futures and
checkpoints as in posttrain/backend/training_client.py.

Weights and optimizer state are fp32; passes on CUDA run under bf16 autocast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz
import numpy as np
import torch
from torch import nn

from posttrain.backend.config import training_device
from posttrain.backend.device_lock import computing
from posttrain.backend.errors import DataError, NonFiniteError, PassCancelledError
from posttrain.backend.futures import APIFuture, InOrder
from posttrain.backend.ranges import COUNT
from posttrain.backend.types import AdamParams, OptimStepResponse, SaveWeightsResponse
from posttrain.tracking.metrics_log import Metrics
from posttrain.tracking.seeds import sampling_seed
from recipes.libraries.belief_state.files import Model, load_state, save_state
from recipes.libraries.belief_state.losses import Sums, empty_side_losses, next_token_pass, pair_pass
from recipes.libraries.belief_state.model import BeliefState, NextToken
from recipes.libraries.belief_state.pairs import PairObjective


@dataclass(frozen=True)
class TokenBatch:
    """Rows of equal length. `packed`: several documents in a row, EOS in between. `loss_mask_B_T`
    (baseline only): which tokens are targets.
    """

    tokens_B_T: np.ndarray
    packed: bool = True
    loss_mask_B_T: np.ndarray | None = None


@chz.chz
class PassConfig:
    """Micro-batches and compilation: memory and speed, never the gradient."""

    rows_per_pass: int = chz.field(default=256, validator=COUNT, doc="rows in one pass of the encoders")
    pairs_per_chunk: int = chz.field(default=32768, validator=COUNT, doc="pairs in one pass of the text head")
    compile: bool = chz.field(
        default=False,
        doc="torch.compile the encoders and the head (needs a C++ compiler; the first step takes minutes)",
    )


class BeliefStateTrainer:
    def __init__(self, model: Model, objective: PairObjective, passes: PassConfig | None = None):
        self.device, self.objective, self.passes = training_device(), objective, passes or PassConfig()
        self.model = model.to(self.device)
        if self.passes.compile:
            for module in self.model.children():
                if not isinstance(module, nn.Embedding):
                    module.compile()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if (p.ndim > 1) is decays], "decays": decays} for decays in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)

    def forward_backward(self, batch: TokenBatch, seed: tuple[int, ...] = (0,)) -> Metrics:
        """Accumulates the gradient of the batch's mean loss. `seed` draws the subsampled pairs."""
        return self._run(batch, seed, backward=True)

    def evaluate(self, batch: TokenBatch, seed: tuple[int, ...] = (0,)) -> Metrics:
        """Losses without gradient; "loss_next_token" is comparable between the two models."""
        metrics = self._run(batch, seed, backward=False)
        if isinstance(self.model, NextToken):
            return metrics | {"loss_next_token": metrics["loss"]}
        tokens_B_T = self._tensor(batch.tokens_B_T)
        sides = empty_side_losses(self.model, tokens_B_T, self.objective, batch.packed, self.passes.pairs_per_chunk)
        return metrics | _floats(sides)

    @computing()
    def _run(self, batch: TokenBatch, seed: tuple[int, ...], backward: bool) -> Metrics:
        check_tokens(batch, self.model.config.vocab_size)
        run_pass = self._next_token if isinstance(self.model, NextToken) else self._pairs
        totals: Sums = {}
        local, rows_per_pass = self._local_rows(len(batch.tokens_B_T), backward), self.passes.rows_per_pass
        for start in local[::rows_per_pass]:
            sums = run_pass(batch, slice(start, min(start + rows_per_pass, local.stop)), seed, backward)
            totals = {name: totals[name] + value if name in totals else value for name, value in sums.items()}
        metrics = _floats(self._summed(totals, len(batch.tokens_B_T)))
        if metrics.get("num_valid_pairs") == 0:
            raise DataError(
                f"none of the {len(batch.tokens_B_T)} rows has a pair: their documents are shorter than min_gap"
            )
        if not np.isfinite(metrics["loss"]):
            self.zero_grad()
            raise NonFiniteError(
                "the loss is not finite; no gradient was kept. Lower the learning rate, or clip the gradient"
            )
        return metrics

    def _local_rows(self, rows: int, backward: bool) -> range:
        """The rows of a batch that this process computes (distributed.py)."""
        return range(rows)

    def _summed(self, totals: Sums, rows: int) -> Sums:
        """The sums over all rows of the batch."""
        return totals

    def _pairs(self, batch: TokenBatch, rows: slice, seed: tuple[int, ...], backward: bool) -> Sums:
        assert isinstance(self.model, BeliefState)
        tokens_B_T = batch.tokens_B_T[rows]
        seeds_B = row_seeds(seed, rows.start, len(tokens_B_T)) if self.objective.subsample < 1 else None
        num_rows, chunk = len(batch.tokens_B_T), self.passes.pairs_per_chunk
        return pair_pass(
            self.model,
            self._tensor(tokens_B_T),
            self.objective,
            num_rows,
            batch.packed,
            chunk,
            seeds_B,
            backward=backward,
        )

    def _next_token(self, batch: TokenBatch, rows: slice, seed: tuple[int, ...], backward: bool) -> Sums:
        assert isinstance(self.model, NextToken)
        mask_B_T = (
            np.ones(batch.tokens_B_T.shape, dtype=bool)
            if batch.loss_mask_B_T is None
            else batch.loss_mask_B_T.astype(bool)
        )
        if not (num_targets := int(mask_B_T[:, 1:].sum())):
            raise DataError("no token of the batch is a target: its loss mask is 0 after the first token of every row")
        mask = None if batch.loss_mask_B_T is None else self._tensor(mask_B_T[rows])
        return next_token_pass(
            self.model, self._tensor(batch.tokens_B_T[rows]), mask, num_targets, batch.packed, backward
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array if array.dtype == bool else array.astype(np.int64)))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    @computing()
    def optim_step(self, adam: AdamParams) -> OptimStepResponse:
        """One AdamW step on the accumulated gradients, which are then dropped. One norm over all
        weights is clipped; weight decay applies to matrices only. NonFiniteError leaves the weights
        unchanged.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(grad_norm):
            self.zero_grad()
            raise NonFiniteError("the gradient is not finite; the step was not applied")
        if adam.grad_clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, adam.grad_clip_norm, grad_norm)
        for group in self.optimizer.param_groups:
            decay = adam.weight_decay if group["decays"] else 0.0
            group.update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=decay)
        self.optimizer.step()
        self.zero_grad()
        return OptimStepResponse({"grad_norm": float(grad_norm)})

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def save_state(self, path: Path, extra: dict[str, Any]) -> None:
        save_state(self.model, self.optimizer, path, extra)

    def load_state(self, path: Path, with_optimizer: bool) -> None:
        """See files.load_state."""
        load_state(self.model, self.optimizer, path, with_optimizer)


class BeliefStateClient:
    """Runs a trainer's calls on one thread in submission order and returns futures. After a pass
    that failed, or was cancelled before its turn, optim_step raises that failure.
    """

    def __init__(self, trainer: BeliefStateTrainer):
        self.trainer = trainer
        self._thread = InOrder("belief-state")
        self._failed: BaseException | None = None

    def forward_backward(self, batch: TokenBatch, seed: tuple[int, ...] = (0,)) -> APIFuture[Metrics]:
        return self._thread.submit(self._forward_backward, batch, seed, if_cancelled=self._pass_cancelled)

    def _forward_backward(self, batch: TokenBatch, seed: tuple[int, ...]) -> Metrics:
        try:
            return self.trainer.forward_backward(batch, seed)
        except BaseException as error:
            self._failed = self._failed or error
            raise

    def _pass_cancelled(self) -> None:
        cancelled = PassCancelledError(
            "a forward_backward of this step was cancelled before its turn: no step was taken"
        )
        self._failed = self._failed or cancelled

    def optim_step(self, adam: AdamParams) -> APIFuture[OptimStepResponse]:
        return self._thread.submit(self._optim_step, adam, if_cancelled=self._drop_gradient)

    def _optim_step(self, adam: AdamParams) -> OptimStepResponse:
        try:
            if self._failed is not None:
                raise self._failed
            return self.trainer.optim_step(adam)
        finally:
            self._drop_gradient()

    def _drop_gradient(self) -> None:
        self._failed = None
        self.trainer.zero_grad()

    def with_model(self, fn: Callable[[BeliefStateTrainer], Metrics]) -> APIFuture[Metrics]:
        """Calls `fn` with the trainer, in submission order: for evaluations between two steps."""
        return self._thread.submit(fn, self.trainer)

    def save_state(self, name: str, extra: dict[str, Any] | None = None) -> APIFuture[SaveWeightsResponse]:
        """`name` is a path; the folder is written whole or not at all."""
        return self._thread.submit(self._save_state, Path(name), extra or {})

    def _save_state(self, path: Path, extra: dict[str, Any]) -> SaveWeightsResponse:
        self.trainer.save_state(path, extra)
        return SaveWeightsResponse(str(path))

    def load_state(self, path: str) -> APIFuture[None]:
        return self._thread.submit(self.trainer.load_state, Path(path), with_optimizer=False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[None]:
        return self._thread.submit(self.trainer.load_state, Path(path), with_optimizer=True)

    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint: fp32 weights and two moments of each."""
        return 12 * sum(parameter.numel() for parameter in self.trainer.model.parameters())

    def close(self) -> None:
        self._thread.close()


def row_seeds(seed: Sequence[int], first: int, count: int) -> list[int]:
    """A seed for each row of a batch, independent of the micro-batches."""
    return [sampling_seed((*seed, row)) for row in range(first, first + count)]


def check_tokens(batch: TokenBatch, vocab_size: int) -> None:
    tokens_B_T = batch.tokens_B_T
    if tokens_B_T.ndim != 2 or tokens_B_T.shape[1] < 2 or not len(tokens_B_T):
        raise DataError(
            f"a batch has the shape (rows, tokens), with two tokens or more; this one has {tokens_B_T.shape}"
        )
    if batch.loss_mask_B_T is not None and batch.loss_mask_B_T.shape != tokens_B_T.shape:
        raise DataError(f"the loss mask has shape {batch.loss_mask_B_T.shape}, its tokens {tokens_B_T.shape}")
    if (outside := (tokens_B_T < 0) | (tokens_B_T >= vocab_size)).any():
        row, position = np.argwhere(outside)[0]
        token = tokens_B_T[row, position]
        raise DataError(
            f"row {row}, position {position}: token {token} is not one of the model's {vocab_size} (data of another "
            "vocabulary?)"
        )


def _floats(sums: Sums) -> Metrics:
    """All sums in one transfer from the device."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
