"""Several processes train one Belief State Transformer (or its baseline): torchrun starts them,
each takes its share of the rows of a batch.

    torchrun --nproc-per-node 4 recipes/belief_state/train.py parallel=replicate

replicate   every process has all weights; gradients are summed once per optimizer step (what DDP does; the two-stage backward pass with its many
            small backward calls leaves nothing for DDP's overlap to hide)
shard       FSDP2: weights, gradients and optimizer states are cut over the processes, and a block is whole only while it computes. The
            text head, which runs once per chunk of pairs, is gathered once per step and its
            gradient reduced once, since the number of chunks is not the same everywhere

All processes hold the same batch, and the losses are sums over rows divided by the number of rows
of the whole batch. So the number of processes changes a gradient by no more than the order of a
sum. They also meet the same errors, and nobody waits for one that has given up; where one dies of
something else, torchrun ends the others. Left out: several machines' checkpoints (one file, written
by the first).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from posttrain.backend.config import training_device
from posttrain.backend.errors import ConfigError
from posttrain.backend.types import AdamParams, OptimStepResponse
from recipes.libraries.belief_state.files import Model, load_state, save_state
from recipes.libraries.belief_state.losses import Sums
from recipes.libraries.belief_state.model import BeliefState
from recipes.libraries.belief_state.pairs import PairObjective
from recipes.libraries.belief_state.trainer import BeliefStateTrainer, PassConfig, TokenBatch

# a process may wait that long for the first one's evaluation or checkpoint
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Who writes the run folder."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """The rows of this process."""
        return range(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def any(self, flag: object) -> bool:
        """Whether it is true anywhere. Everyone asks at the same place: a signal that reaches them
        in different steps then stops them in one.
        """
        if self.count == 1:
            return bool(flag)
        asked = torch.tensor(float(bool(flag)), device=training_device())
        dist.all_reduce(asked)
        return bool(asked)

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The process group that torchrun's variables describe; without them, one process. Only the
    first prints.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    processes = Processes(dist.get_rank(), count)
    try:
        with open(os.devnull, "w") as nowhere, nullcontext() if processes.is_first else redirect_stdout(nowhere):
            yield processes
    finally:
        dist.destroy_process_group()


class ParallelTrainer(BeliefStateTrainer):
    """A trainer whose batches must divide by the number of processes. Every process makes the same
    calls in the same order.
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

    def _own_rows(self, rows: int, backward: bool) -> range:
        """Batches that do not divide are evaluated as a whole by everyone, and are an error in
        training.
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
        """Encoders reduce their gradients in the last pass over a batch; the head waits for
        `_sum_gradients`.
        """
        self._gradients_pending |= backward
        if self.is_sharded:
            is_last = rows.stop >= self._own_rows(len(batch.tokens_B_T), backward).stop
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
        self._sum_gradients()  # what the head still holds would be added to the next step
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
        """FSDP2 reduces in a backward call and at no other time: this one adds 0 to what the chunks
        have left.
        """
        if self._head is None:
            return
        self._head.set_requires_gradient_sync(True)
        self._head.set_reshard_after_backward(True)
        nothing = torch.zeros(1, self.model.config.hidden, device=self.device)
        sum(
            (logits.sum() * 0 for logits in self._head(nothing, nothing)), start=torch.zeros((), device=self.device)
        ).backward()

    # --- checkpoints: those of one process -------------------------------------------------------

    def save_state(self, path: Path, extra: dict[str, Any]) -> None:
        if not self.is_sharded:
            if self.processes.is_first:
                super().save_state(path, extra)
        else:
            _reshard(self.model)
            model, optimizer = self._whole()
            if self.processes.is_first:
                save_state(model, optimizer, path, extra)
        self.processes.wait()

    def load_state(self, path: Path, with_optimizer: bool) -> None:
        if not self.is_sharded:
            super().load_state(path, with_optimizer)
            return
        _reshard(self.model)
        model = self._empty_model()
        optimizer = torch.optim.AdamW(model.parameters())
        load_state(model, optimizer, path, with_optimizer)
        self.optimizer.state.clear()
        for ours, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            ours.data.copy_(_cut_like(theirs, ours))
            state = {name: _cut_like(value, ours) for name, value in optimizer.state[theirs].items()}
            self.optimizer.state[ours].update(state)

    def _whole(self) -> tuple[Model, torch.optim.Optimizer]:
        """The model and its optimizer in one piece, on the CPU. Everyone must take part, and only
        the first process keeps what comes.
        """
        model = self._empty_model()
        optimizer = torch.optim.AdamW(model.parameters())
        for ours, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            weights, state = _whole(ours), {name: _whole(value) for name, value in self.optimizer.state[ours].items()}
            if self.processes.is_first:
                theirs.data.copy_(weights)
                optimizer.state[theirs].update(state)
        return model, optimizer

    def _empty_model(self) -> Model:
        with torch.device("meta"):
            model = type(self.model)(self.model.config, seed=None)
        return model.to_empty(device="cpu")


def _parts(model: Model) -> list[Any]:
    """The modules that are sharded as units, besides the blocks of the encoders. Together they hold
    every weight.
    """
    return [part for part in model.children() if isinstance(part, FSDPModule)]


def _shard(model: Model) -> None:
    mesh = dist.device_mesh.init_device_mesh(training_device().type, (dist.get_world_size(),))
    for part in model.children():
        for block in getattr(part, "blocks", ()):
            _fully_shard(block, mesh)
        _fully_shard(part, mesh)


def _fully_shard(module: nn.Module, mesh: Any) -> None:
    sharded: Any = fully_shard(module, mesh=mesh)
    # sums: the losses are divided by the rows of the whole batch already
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _reshard(model: Model) -> None:
    """After a forward pass some modules hold whole weights in the place of the parameters that the
    optimizer knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _cut_like(whole: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """A parameter's tensor cut over the processes as the parameter is; a step count stays as it
    is.
    """
    assert isinstance(ours, DTensor)
    return distribute_tensor(whole.detach().to(ours.device), ours.device_mesh, ours.placements) if whole.ndim else whole
