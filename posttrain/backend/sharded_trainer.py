"""A trainer in one of several ranks: FSDP2 (Zhao et al. 2023, per parameter) around the passes of
Trainer, or whole weights in every rank and one sum of the gradients per step (`replicate`). All
ranks make the same calls with the same data, each passes its part of the rows, and all get the
whole outputs and the same errors. Left out: forwards kept for a backward, 8-bit moments, offload.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import chz
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from posttrain.backend import ranks
from posttrain.backend.batching import MicroBatch
from posttrain.backend.config import BackendConfig
from posttrain.backend.custom_loss import CustomLoss, run_in_two_passes
from posttrain.backend.device_lock import computing
from posttrain.backend.loss_terms import LossTerm, RunningTerm, with_gradient
from posttrain.backend.memory_plan import check_fits, planned
from posttrain.backend.merged_lora import base_weights, in_dtype, layer_updates
from posttrain.backend.models import load_model, new_model
from posttrain.backend.ranks import Processes
from posttrain.backend.scalar_trainer import ScalarTrainer
from posttrain.backend.trained_weights import SCALAR_HEAD
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, OptimStepResponse
from posttrain.backend.weight_versions import Weights

T = TypeVar("T")


class ShardedTrainer(Trainer):
    _root: Any = None  # the FSDP unit around all passes; None where weights are replicated
    _whole_head: nn.Parameter | None = None  # a scalar model's, before it is sharded

    def __init__(
        self,
        model_name: str,
        config: BackendConfig,
        seed: int = 0,
        lora: LoraConfig | None = None,
        *,
        processes: Processes,
        shard: bool = True,
    ):
        self.processes = processes
        self.writes = processes.is_first
        self.shards = shard
        if shard and lora is None:  # passes read bf16 copies of fp32 shards
            config = chz.replace(config, param_dtype="float32")
        self._failed: Exception | None = None  # in the losses of this rank's rows
        super().__init__(model_name, config, seed, lora)

    @property
    def scalar_head(self) -> nn.Parameter | None:  # type: ignore[override]
        return self._whole_head if self._root is None else self._root.scalar_head

    @scalar_head.setter
    def scalar_head(self, head: nn.Parameter) -> None:
        self._whole_head = head

    # --- opening ---------------------------------------------------------------------------------

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The first rank's on the CPU. The others' have memory that nothing was written to, and get
        its weights once they are sharded."""
        if not self.shards:
            return super()._load(dtype)
        where = (torch.device("cpu"), dtype, self.opens_trunks)
        model = self.read_once(lambda: load_model(self.model_name, self.seed, *where))
        first: Any = model and (model.config, {name: p.requires_grad for name, p in model.named_parameters()})
        config, trained = self.processes.gathered(first)[0]  # reading trains what a new model does not (Ernie 4.5)
        if model is None:
            with no_init_weights():
                model = new_model(config).eval()
            model.tie_weights()
            for name, p in model.named_parameters():
                p.data = torch.empty_like(p, dtype=dtype)
                p.requires_grad_(trained[name])
        return model

    def read_once(self, read: Callable[[], T]) -> T | None:
        if not self.shards:
            return read()
        with self.processes.same_outcome():
            return read() if self.writes else None

    def _check_fits(self) -> None:
        run = planned(self.model_name, self.config, self.lora)
        check_fits(run.sharded(self.processes.count) if self.shards else run, self.model_name)

    def _trainable_weights(self) -> dict[str, nn.Parameter]:
        """Shards the model on the way: it is complete here, and the optimizer does not exist yet."""
        trainable = super()._trainable_weights()
        if not self.shards:
            return trainable
        of_first = super().base_fingerprint if self.lora and self.writes else ""
        self._fingerprint = self.processes.gathered(of_first)[0]
        whole = {name: p.detach() for name, p in self.base.named_parameters()} if self.writes else {}
        # An adapter stays fp32 beside a base that is in the passes' dtype: merged_lora.py adds them up unrounded.
        mesh, dtype = ranks.mesh(), None if self.lora else self.compute_dtype
        for layer in _of_their_own(self._layers()):
            ranks.sharded(layer, mesh, dtype)
        # the embedding, the last norm and the head, which a tied embedding is; layers that share weights
        root = _Passes(self.model, self._whole_head)
        self._root = ranks.sharded(root, mesh, dtype, keep_gathered=True)
        for name, p in self.base.named_parameters():
            ranks.assign(p, whole.get(name))
        self._send_buffers()
        live = dict(self.model.named_parameters()) | {SCALAR_HEAD: self._root.scalar_head}
        return {name: live[name] for name in trainable}

    def _send_buffers(self) -> None:
        """The first rank's, to all. They are not sharded."""
        for buffer in self.base.buffers():
            dist.broadcast(buffer, 0)

    @property
    def base_fingerprint(self) -> str:
        return self._fingerprint if self.shards else super().base_fingerprint

    def _flat_logprobs(self, data_D: Sequence[Datum], batches: Sequence[MicroBatch]) -> torch.Tensor:
        return self._passing(partial(super()._flat_logprobs, data_D, batches))

    @torch.no_grad()  # else what is gathered would stay so, and later changes of the weights would not be read
    def _check_head(self) -> None:
        self._passing(super()._check_head)

    def _passing(self, run: Any) -> Any:
        """`run()` with the weights outside the layers gathered."""
        if self._root is None:
            return run()
        outcome = self._root(run)
        if not torch.is_grad_enabled():
            self._root.reshard()
        return outcome

    # --- passes ----------------------------------------------------------------------------------

    def run_terms(
        self, terms: Sequence[LossTerm], backward: bool = True, keep: bool = False
    ) -> list[ForwardBackwardOutput]:
        """As Trainer.run_terms; `keep` saves time only, and is ignored."""
        self._failed = None
        return super().run_terms(terms, backward)

    def run_custom(self, data_D: Sequence[Datum], fn: CustomLoss) -> ForwardBackwardOutput:
        return run_in_two_passes(self.run_terms, data_D, fn, self.output_name)

    @property
    def _part(self) -> tuple[int, int]:
        return self.processes.rank, self.processes.count

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        return _AlwaysDifferentiated.apply(super()._hidden(batch))  # type: ignore[no-any-return]

    def _head(self) -> torch.Tensor:
        return _AlwaysDifferentiated.apply(super()._head())  # type: ignore[no-any-return]

    def _logprobs(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._passing(partial(super()._logprobs, batch))

    def _lose(self, running: Sequence[RunningTerm], batch: MicroBatch, p_NK: torch.Tensor, differentiate: bool) -> None:
        """As in one process, and a backward pass in any case: the other ranks make one, too."""
        losses: list[torch.Tensor] = []
        try:
            found = [loss for term in running if (loss := term(batch, p_NK)) is not None]
            losses = with_gradient(found) if differentiate else found
        except Exception as error:
            self._failed = self._failed or error
        if differentiate:
            (torch.stack(losses).sum() if losses else p_NK.sum()).backward()

    def _join(self, running: Sequence[RunningTerm]) -> None:
        self.processes.raise_first(self._failed)
        results_R = self.processes.gathered([term.results() for term in running])
        for term, parts in zip(running, zip(*results_R, strict=True), strict=True):
            term.replace_results(parts)

    # --- steps -----------------------------------------------------------------------------------

    @computing()
    def optim_step(self, adam: AdamParams) -> OptimStepResponse:
        with self.processes.same_outcome():
            return super().optim_step(adam)

    def _grad_norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        if not self.shards:
            for device in dict.fromkeys(grad.device for grad in grads):  # offloaded, but for a scalar head
                there = [grad for grad in grads if grad.device == device]
                flat = torch.cat([grad.flatten() for grad in there])
                dist.all_reduce(flat)
                for grad, summed in zip(there, flat.split([grad.numel() for grad in there]), strict=True):
                    grad.copy_(summed.view_as(grad))
            return super()._grad_norm(grads)
        squares = nn.utils.get_total_norm([ranks.local(grad) for grad in grads]).square()
        dist.all_reduce(squares)
        return squares.sqrt()

    # --- weights out -----------------------------------------------------------------------------

    @torch.no_grad()
    def weight_shard(self) -> Weights:
        """This rank's rows of `sampler_weights`, which nobody gathers; an adapter's are."""
        updates = layer_updates(self.base)
        for name, tensor in base_weights(self.base).items():
            if not tensor.ndim:
                if self.writes:
                    yield name, in_dtype(tensor, self.compute_dtype)
                continue
            rows = ranks.local_rows(tensor.shape[0], self.processes)
            part = ranks.local(tensor) if tensor is not ranks.local(tensor) else tensor[rows]
            if update := updates.get(name.removesuffix(".weight")):
                part = part + update.delta()[rows]
            yield name, in_dtype(nn.Buffer(part) if isinstance(tensor, nn.Buffer) else part, self.compute_dtype)

    # --- checkpoints -----------------------------------------------------------------------------

    def check_finite(self, moments: bool = True) -> None:
        with self.processes.same_outcome():
            super().check_finite(moments)

    def save_state(self, tokenizer: PreTrainedTokenizerBase, path: Path, extra: dict[str, Any]) -> None:
        with self.processes.same_outcome():
            super().save_state(tokenizer, path, extra)

    def save_policy(self, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        with self.processes.same_outcome():
            super().save_policy(tokenizer, path)

    def load_state(self, path: Path, with_optimizer: bool) -> None:
        with self.processes.same_outcome():
            super().load_state(path, with_optimizer)
            if self.shards:
                self._send_buffers()


class ShardedScalarTrainer(ShardedTrainer, ScalarTrainer):
    """A scalar model in one of several ranks."""


def _of_their_own(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers without a weight that another has too (as in Zamba): FSDP wants it in one unit."""
    listed = list(layers)
    found = Counter(id(p) for layer in listed for p in layer.parameters())
    return [layer for layer in listed if all(found[id(p)] == 1 for p in layer.parameters())]


class _Passes(nn.Module):
    """All modules of a pass: the trainer calls the trunk and reads the head's weight, so that no
    hook of FSDP would gather what is outside the layers."""

    def __init__(self, model: nn.Module, scalar_head: nn.Parameter | None):
        super().__init__()
        self.model, self.scalar_head = model, scalar_head

    def forward(self, run: Any) -> Any:
        return run()


class _AlwaysDifferentiated(torch.autograd.Function):
    """The identity, whose gradient is zeros where none arrives: FSDP reduces what has a gradient,
    and the ranks must agree on it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]
