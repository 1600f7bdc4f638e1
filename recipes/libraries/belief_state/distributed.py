"""Data-parallel training of the Belief State Transformer or its baseline: torchrun starts the
processes, and each takes its share of a batch's rows.

    torchrun --nproc-per-node 4 recipes/belief_state/train.py parallel=replicate

Left out: sharded checkpoints (the first process writes one file).
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from posttrain.backend import ranks
from posttrain.backend.config import training_device
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranks import Processes
from posttrain.backend.types import AdamParams, OptimStepResponse
from recipes.libraries.belief_state.files import Model, load_state, save_state
from recipes.libraries.belief_state.losses import Sums
from recipes.libraries.belief_state.model import BeliefState
from recipes.libraries.belief_state.pairs import PairObjective
from recipes.libraries.belief_state.trainer import BeliefStateTrainer, PassConfig, TokenBatch


class ParallelTrainer(BeliefStateTrainer):
    """Every process makes the same calls with the same batches, whose rows divide by the number of
    processes. Losses are sums over rows divided by the rows of the whole batch, so the number of
    processes changes gradients by rounding only, and all processes raise the same errors.

    Replicated: gradients are summed once per optimizer step. DDP has nothing to overlap here: the
    backward pass is many small backward calls.
    Sharded (FSDP2): weights, gradients and optimizer states are sharded; a block is gathered while
    it computes. The text head is gathered once per step and its gradient reduced once, since the
    number of chunks of pairs differs between processes.
    """

    def __init__(
        self,
        model: Model,
        objective: PairObjective,
        passes: PassConfig | None,
        processes: Processes,
        shard: bool = False,
    ):
        self.processes, self.is_sharded = processes, shard
        self._gradients_pending = False
        if shard:
            _shard(model.to(training_device()))
        super().__init__(model, objective, passes)

    # --- passes ----------------------------------------------------------------------------------

    def _local_rows(self, rows: int, backward: bool) -> range:
        """This process's rows. A batch that does not divide is an error in training; every process
        evaluates the whole of it.
        """
        if rows % self.processes.count == 0:
            return self.processes.share(rows)
        if backward:
            raise ConfigError(
                f"a batch of {rows} rows does not divide by {self.processes.count} processes: change batch_size"
            )
        return range(rows)

    def _summed(self, totals: Sums, rows: int) -> Sums:
        if rows % self.processes.count:
            return totals
        stacked = torch.stack([value.double() for value in totals.values()])
        dist.all_reduce(stacked)
        return dict(zip(totals, stacked, strict=True))

    def _pairs(self, batch: TokenBatch, rows: slice, seed: tuple[int, ...], backward: bool) -> Sums:
        self._before_pass(batch, rows, backward)
        return super()._pairs(batch, rows, seed, backward)

    def _next_token(self, batch: TokenBatch, rows: slice, seed: tuple[int, ...], backward: bool) -> Sums:
        self._before_pass(batch, rows, backward)
        return super()._next_token(batch, rows, seed, backward)

    def _before_pass(self, batch: TokenBatch, rows: slice, backward: bool) -> None:
        """Encoders reduce gradients in a batch's last pass, the head in `_sum_gradients`."""
        self._gradients_pending |= backward
        if self.is_sharded:
            is_last = rows.stop >= self._local_rows(len(batch.tokens_B_T), backward).stop
            for part in _parts(self.model):
                if part is not self._head:
                    part.set_requires_gradient_sync(is_last)
            if self._head is not None:
                self._head.set_requires_gradient_sync(False)
                self._head.set_reshard_after_backward(False)
                self._head.unshard()

    @property
    def _head(self) -> Any:
        return self.model.text_head if isinstance(self.model, BeliefState) else None

    # --- steps -----------------------------------------------------------------------------------

    def optim_step(self, adam: AdamParams) -> OptimStepResponse:
        self._sum_gradients()
        return super().optim_step(adam)

    def zero_grad(self) -> None:
        self._sum_gradients()  # unreduced gradients of the head would be added to the next step
        super().zero_grad()

    def _sum_gradients(self) -> None:
        if not self._gradients_pending:
            return
        self._gradients_pending = False
        if self.is_sharded:
            self._reduce_head()
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters]:
            work.wait()  # type: ignore[union-attr]

    def _reduce_head(self) -> None:
        """FSDP2 reduces only in a backward call: this one adds 0 to the accumulated gradient."""
        if self._head is None:
            return
        self._head.set_requires_gradient_sync(True)
        self._head.set_reshard_after_backward(True)
        zeros_1_H = torch.zeros(1, self.model.config.hidden, device=self.device)
        logits_next, logits_prev = self._head(zeros_1_H, zeros_1_H)
        (torch.zeros((), device=self.device) + logits_next.sum() * 0 + logits_prev.sum() * 0).backward()

    # --- checkpoints: unsharded, as one process writes them --------------------------------------

    def save_state(self, path: Path, extra: dict[str, Any]) -> None:
        if not self.is_sharded:
            if self.processes.is_first:
                super().save_state(path, extra)
        else:
            ranks.reshard(self.model)
            model, optimizer = self._whole()
            if self.processes.is_first:
                save_state(model, optimizer, path, extra)
        self.processes.wait()

    def load_state(self, path: Path, with_optimizer: bool) -> None:
        if not self.is_sharded:
            super().load_state(path, with_optimizer)
            return
        ranks.reshard(self.model)
        model = self._empty_model()
        optimizer = torch.optim.AdamW(model.parameters())
        load_state(model, optimizer, path, with_optimizer)
        self.optimizer.state.clear()
        for sharded, whole in zip(self.model.parameters(), model.parameters(), strict=True):
            sharded.data.copy_(ranks.shard_like(whole, sharded))
            state = {name: ranks.shard_like(value, sharded) for name, value in optimizer.state[whole].items()}
            self.optimizer.state[sharded].update(state)

    def _whole(self) -> tuple[Model, torch.optim.Optimizer]:
        """The unsharded model and optimizer on the CPU, filled in the first process only. A
        collective call.
        """
        model = self._empty_model()
        optimizer = torch.optim.AdamW(model.parameters())
        for sharded, whole in zip(self.model.parameters(), model.parameters(), strict=True):
            weights = ranks.whole(sharded).cpu()
            state = {name: ranks.whole(value).cpu() for name, value in self.optimizer.state[sharded].items()}
            if self.processes.is_first:
                whole.data.copy_(weights)
                optimizer.state[whole].update(state)
        return model, optimizer

    def _empty_model(self) -> Model:
        with torch.device("meta"):
            model = type(self.model)(self.model.config, seed=None)
        return model.to_empty(device="cpu")


def _parts(model: Model) -> list[Any]:
    """The FSDP units besides the encoders' blocks. Together they hold every weight."""
    return [part for part in model.children() if isinstance(part, FSDPModule)]


def _shard(model: Model) -> None:
    mesh = ranks.mesh()
    for part in model.children():
        for block in getattr(part, "blocks", ()):
            ranks.sharded(block, mesh)
        ranks.sharded(part, mesh)
