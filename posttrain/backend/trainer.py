"""The model, its optimizer and its passes, synchronous (training_client.py has futures). On a CPU
all is fp32; on CUDA passes read bf16 copies of fp32 weights (trained_weights.py). Dropout is off:
RL compares logprobs of one distribution.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.backend import checkpoints, out_of_memory
from posttrain.backend.adapters import fingerprint
from posttrain.backend.architectures import attention_windows, decoder_of, logit_transform, vocabulary_of
from posttrain.backend.attention import check_setting, dense_mask, masks_of_layers, tree_mask
from posttrain.backend.base_models import BaseModels, SharedBase
from posttrain.backend.batching import WIDTH_BUCKET, MicroBatch, Positions, micro_batches
from posttrain.backend.config import BackendConfig, compute_dtype, param_dtype, training_device
from posttrain.backend.custom_loss import CustomLoss, checked, sums, surrogate_loss
from posttrain.backend.data_checks import check_data, check_finite, check_kinds, check_term, resolve_loss
from posttrain.backend.device_lock import computing
from posttrain.backend.errors import ConfigError, DataError, NonFiniteError, one_line
from posttrain.backend.logprobs import target_logprobs
from posttrain.backend.lora_layers import add_lora, check_rank
from posttrain.backend.loss_terms import KeptForward, LossTerm, RunningTerm, by_width, in_order, with_gradient
from posttrain.backend.losses import LossFn
from posttrain.backend.memory_plan import check_fits, planned
from posttrain.backend.merged_lora import compute_merged
from posttrain.backend.model_checks import check_head, check_rows, pack_rows
from posttrain.backend.models import cast_weights, context_length, fails_as, load_model
from posttrain.backend.trained_weights import TrainedWeights
from posttrain.backend.training_mode import checkpoint_gradients, switch_off_dropout
from posttrain.backend.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoraConfig,
    OptimStepResponse,
    TensorData,
)
from posttrain.backend.vllm_settings import check_unmerged
from posttrain.backend.weight_copies import SampledModel

T = TypeVar("T")

# a micro-batch, the logprobs of its positions with and without loss, and whether the former need gradients
Pass = tuple[MicroBatch, torch.Tensor, torch.Tensor, bool]
MOST_GRAPHS = 64  # of one function that is compiled; torch's own 8 are fewer than a run's shapes and modes need


class Trainer:
    """Ranks (ShardedTrainer) override _load, _check_fits, _trainable_weights, _check_head, _part, _hidden, _head,
    _logprobs, _flat_logprobs, _lose, _join and _grad_norm; scalar models (ScalarTrainer) _check_adapter,
    _trainable_weights, _check_head and _logprobs. Both override attributes below, and public methods."""

    output_name = "logprobs"  # output of `run` per token
    # (1, H) in a ScalarTrainer, in place of the vocabulary's head
    scalar_head: nn.Parameter | None = None
    opens_trunks = False  # of saved scalar models
    _base_owner: SharedBase | None = None  # of the tensors shared with other adapters
    _part = (0, 1)  # rank, and number of ranks that pass over the data
    writes = True  # checkpoints; of several ranks, the first

    @computing()
    def __init__(
        self,
        model_name: str,
        config: BackendConfig,
        seed: int = 0,
        lora: LoraConfig | None = None,
        bases: BaseModels | None = None,
    ):
        """`bases`: adapters opened with the same one share their base's tensors."""
        self.model_name, self.config, self.seed, self.lora = model_name, config, seed, lora
        self.device = training_device(config)
        self.compute_dtype = compute_dtype(self.device, config)
        check_setting(config.attention, self.device, self.compute_dtype)
        self.max_length = context_length(model_name, config.max_length)
        if lora:
            self._check_adapter(lora)
        self._check_fits()
        self.param_dtype = param_dtype(self.device, config)
        masters = lora is None and config.master_weights  # copies of the weights as they are on the disk
        if lora and bases is not None:
            hf_model, self._base_owner = bases.view(model_name, seed, self.device, self.param_dtype)
        else:
            hf_model = self._load(torch.float32 if masters else self.param_dtype)
        self.hf_config = hf_model.config
        self.vocabulary = vocabulary_of(hf_model)
        self.model: PreTrainedModel | PeftModel = add_lora(hf_model, model_name, lora, seed) if lora else hf_model
        self.base: PreTrainedModel = hf_model
        if lora and config.lora == "merged" and self.compute_dtype != torch.float32:
            compute_merged(self.model, self.compute_dtype)
        switch_off_dropout(self.model)
        if config.gradient_checkpointing:
            checkpoint_gradients(hf_model, model_name)
        self.named_trainable = self._trainable_weights()
        self.trained = TrainedWeights(self.named_trainable, config, seed, self.param_dtype if masters else None)
        if masters:
            cast_weights(hf_model, self.param_dtype)  # those that are not trained
        self._kept_numbers = itertools.count()
        # a forward that waits for its backward; dropped when the weights change
        self.kept: KeptForward | None = None
        # Rows are padded on the right, where no token attends: GPT-2's warning does not apply.
        setattr(decoder_of(self.base), "warn_if_padding_and_no_attention_mask", lambda *_: None)  # noqa: B010
        self.transform = logit_transform(self.hf_config)
        self.windows = attention_windows(self.hf_config, self.max_length)
        self.shares_prefixes = self.windows is not None and config.attention != "varlen"
        # rows follow each other in one; those without a shared prefix need no mask
        self.packs, self.whole_sequences = False, False
        self.compiles = False
        with fails_as(model_name, "fails on a row of tokens"):
            check_rows(self)
            self._check_head()
        pack_rows(self)
        self.compiles = config.compile
        for layer in self._layers() if self.compiles else ():
            layer.compile()  # one graph for a kind: of each width and number of rows at first, then of all

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        return load_model(self.model_name, self.seed, self.device, dtype, self.opens_trunks)

    def _check_fits(self) -> None:
        check_fits(planned(self.model_name, self.config, self.lora), self.model_name)

    def _check_adapter(self, lora: LoraConfig) -> None:
        """Refuses, before any weight is made, an adapter that the model cannot have."""
        check_rank(self.model_name, lora)
        check_unmerged(self.config, lora)

    def _trainable_weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # --- passes ----------------------------------------------------------------------------------

    def run_without_adapter(
        self,
        data_D: Sequence[Datum],
        loss_fn: str | LossFn,
        loss_fn_config: dict[str, Any] | None = None,
        all_logprobs: bool = True,
    ) -> ForwardBackwardOutput:
        """The base's logprobs, as before training. ConfigError where all weights are trained."""
        if not isinstance(self.model, PeftModel):
            raise ConfigError("without_adapter: all weights of this model are trained, it has no adapter")
        with self.model.disable_adapter():
            return self.run(data_D, loss_fn, loss_fn_config, False, all_logprobs)

    def run(
        self,
        data_D: Sequence[Datum],
        loss_fn: str | LossFn,
        loss_fn_config: dict[str, Any] | None = None,
        backward: bool = True,
        all_logprobs: bool = True,
    ) -> ForwardBackwardOutput:
        """Logprobs and loss of every Datum; `backward` adds to the accumulated gradients. A loss
        that is not finite raises NonFiniteError and leaves no gradient. Data with different numbers
        of targets per token pass one width after the other. `all_logprobs`: as of a LossTerm."""
        check_kinds(data_D)
        term = LossTerm(data_D, loss_fn, loss_fn_config, all_logprobs=all_logprobs)
        if len(widths := by_width(data_D)) < 2:
            return self.run_terms([term], backward)[0]
        check_data(data_D, resolve_loss(loss_fn, loss_fn_config).required, self.vocabulary, self.max_length)
        outputs = []
        for index_D in widths:
            try:
                outputs += self.run_terms([replace(term, data_D=[data_D[d] for d in index_D])], backward)
            except NonFiniteError as error:
                error.datum_indices = [index_D[d] for d in error.datum_indices]
                raise
        return in_order(outputs, widths)

    @computing()
    def run_terms(
        self, terms: Sequence[LossTerm], backward: bool = True, keep: bool = False
    ) -> list[ForwardBackwardOutput]:
        """Several losses in the same passes, an output for each. NonFiniteError numbers the data of
        all terms consecutively.

        With `keep` and without `backward`, a forward that fits one micro-batch is kept, and the
        outputs name its rows. The next backward of terms with these rows saves its forward pass;
        the results are the same.
        """
        self.kept = None if keep else self.kept
        running: list[RunningTerm] = []
        data_D: list[Datum] = []
        for term in terms:
            loss = check_term(term, self.vocabulary, self.max_length, first=len(data_D))
            running.append(RunningTerm(term, loss, first=len(data_D)))
            data_D += term.data_D
        _check_one_width(data_D)
        needed_D = [backward and need for term in running for need in term.needs_backward()]
        others = any(term.all_logprobs for term in terms)
        with self._turn(terms), out_of_memory.explained(data_D, self.config):
            kept = self._take_kept(terms) if backward else None
            passes = [kept] if kept else self._forward(data_D, needed_D, keep and not backward, others)
            for batch, p_NK, others_NK, differentiate in passes:
                with torch.set_grad_enabled(differentiate):
                    self._lose(running, batch, p_NK, differentiate)
                for term in running:
                    term.keep_others(batch, others_NK)
            self._join(running)
        if bad := [d for term in running for d in term.not_finite()]:
            self.zero_grad()
            raise NonFiniteError(f"the loss of data {bad[:10]} is not finite; no gradient was kept", bad)
        outputs = [term.output(self.output_name) for term in running]
        if keep and self.kept:
            rows = [[(self.kept.number, term.first + d) for d in range(len(term.term.data_D))] for term in running]
            return [replace(output, kept_D=kept_D) for output, kept_D in zip(outputs, rows, strict=True)]
        return outputs

    def _lose(self, running: Sequence[RunningTerm], batch: MicroBatch, p_NK: torch.Tensor, differentiate: bool) -> None:
        """The losses of a micro-batch, and their gradients."""
        losses = [loss for term in running if (loss := term(batch, p_NK)) is not None]
        if differentiate and losses:
            torch.stack(with_gradient(losses)).sum().backward()

    def _join(self, running: Sequence[RunningTerm]) -> None:
        """Adds what other ranks computed."""

    def _turn(self, terms: Sequence[LossTerm]) -> AbstractContextManager[object]:
        """Of this adapter among those on its base. A loss of the user's may wait for another
        client: its passes wait for nobody."""
        named = all(isinstance(term.loss_fn, str) for term in terms)
        return self._base_owner.turn if self._base_owner and named else nullcontext()

    def _take_kept(self, terms: Sequence[LossTerm]) -> Pass | None:
        """The kept forward of these data, for their backward. That of other data is dropped."""
        kept, self.kept = self.kept, None
        kept_D = [row for term in terms for row in term.kept_D or [None] * len(term.data_D)]
        part = kept.of(kept_D) if kept else None
        return (*part, True) if part else None

    def _forward(self, data_D: Sequence[Datum], needed_D: Sequence[bool], keep: bool, others: bool) -> Iterator[Pass]:
        """Of every micro-batch; those of data that need no gradient last. `others`: also the logprobs
        of positions without loss. `keep` is of a single micro-batch: of several, the activations
        would exceed the token budget."""
        for differentiate in (True, False):
            chosen = [d for d, need in enumerate(needed_D) if need is differentiate]
            batches = self._micro_batches(data_D, chosen, others)
            keep_this = keep and len(batches) == 1
            for batch in batches:
                with torch.set_grad_enabled(differentiate or keep_this):
                    p_NK, others_NK = self._logprobs(batch)
                others_NK = others_NK.detach()
                if keep_this:
                    self.kept = KeptForward(next(self._kept_numbers), batch, p_NK, others_NK)
                yield batch, p_NK, others_NK, differentiate

    @computing()
    def run_custom(self, data_D: Sequence[Datum], fn: CustomLoss) -> ForwardBackwardOutput:
        """`fn(data, logprobs_D)` gets the differentiable logprobs of all positions, on the CPU, where
        the arrays of a Datum are: one forward, one backward.

        Data of several micro-batches are passed through again with the gradient of `fn` on their
        logprobs, to keep one micro-batch's activations at a time. The gradients are the same.
        """
        check_data(data_D, (), self.vocabulary, self.max_length)
        _check_one_width(data_D)
        batches = self._micro_batches(data_D, range(len(data_D)))
        with out_of_memory.explained(data_D, self.config):
            parts, positions = [], []
            with torch.set_grad_enabled(len(batches) == 1):
                for batch in batches:
                    parts += self._logprobs(batch)
                    positions += batch.loss, batch.others
            if len(batches) > 1:
                for p_NK in parts:
                    p_NK.requires_grad_()
            logprobs_D = _split_by_datum(data_D, positions, [p_NK.cpu() for p_NK in parts])
            for p_T in logprobs_D:
                p_T.retain_grad()
            loss, metrics = checked(fn(list(data_D), logprobs_D))
            loss.backward()
            if len(batches) > 1:
                for batch, *cut in zip(batches, parts[::2], parts[1::2], strict=True):
                    torch.autograd.backward(self._logprobs(batch), [p_NK.grad for p_NK in cut])
        outputs = [{self.output_name: TensorData.from_torch(logprobs)} for logprobs in logprobs_D]
        return ForwardBackwardOutput(outputs, metrics | sums(loss.item(), surrogate_loss(logprobs_D)))

    def _micro_batches(
        self, data_D: Sequence[Datum], chosen: Sequence[int], others: bool = True
    ) -> Sequence[MicroBatch]:
        rank, ranks = self._part
        return micro_batches(
            data_D,
            chosen,
            self.config.micro_batch_tokens,
            self.device,
            share=self.shares_prefixes,
            bucket=WIDTH_BUCKET if self.compiles or self.packs else 1,
            rank=rank,
            ranks=ranks,
            packed=self.packs,
            row_tokens=self.config.shared_row_tokens,
            others=others,
        )

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        """(BT, H) last hidden states."""
        if self.compiles or self.packs:  # torch's settings are of a thread
            # beyond the limit torch goes on uncompiled: FlexAttention with all scores in memory
            torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            return self._compiled(
                lambda: decoder_of(self.base)(
                    input_ids=batch.tokens_BT,
                    attention_mask=self._masks(batch),
                    position_ids=batch.positions_BT,
                    use_cache=False,
                ).last_hidden_state.flatten(0, 1)
            )

    def _masks(self, batch: MicroBatch) -> Any:
        """For the layers; None where every row is a sequence."""
        ends_BT, positions_BT = batch.ends_BT, batch.positions_BT
        if ends_BT is None or positions_BT is None or self.windows is None:
            return None

        def make(window: int | None) -> torch.Tensor | BlockMask:
            if not self.packs:
                return dense_mask(ends_BT, positions_BT, window, self.compute_dtype)
            mask = tree_mask(ends_BT, positions_BT, window)
            if self.whole_sequences:
                mask.starts_N, mask.longest = batch.starts_N, batch.longest
            return mask

        return masks_of_layers(make, self.windows)

    def _layers(self) -> Iterable[nn.Module]:
        return getattr(decoder_of(self.base), "layers", None) or getattr(decoder_of(self.base), "h", [])

    def _compiled(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`run`, and again without compilation, from then on, if that fails."""
        try:
            return run()
        except Exception as error:
            if not self.compiles or isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"backend.compile fails and is switched off: {one_line(error, 200)}", flush=True)
            self.compiles = False
            for module in self.base.modules():
                module._compiled_call_impl = None
            return run()

    def _logprobs(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, K) logprobs of positions with and without loss, at each token's temperature."""
        hidden_RH, head_VH = self._hidden(batch), self._head()
        loss_NK, others_NK = (
            self._compiled(
                lambda at=at: at.of_each(
                    target_logprobs(
                        hidden_RH.index_select(0, at.rows_M).to(self.compute_dtype),
                        head_VH,
                        at.targets_MK,
                        at.temperature_M,
                        self.transform,
                        self.compiles,
                    )
                )
            )
            for at in (batch.loss, batch.others)
        )
        return loss_NK, others_NK

    def _head(self) -> torch.Tensor:
        """The (V, H) output matrix, with its adapter if there is one."""
        head: Any = self.base.get_output_embeddings()
        if not hasattr(head, "lora_A"):
            return head.weight
        weight = head.base_layer.weight
        return weight if head.disable_adapters else weight + head.get_delta_weight("default")

    def _flat_logprobs(self, data_D: Sequence[Datum], batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Logprobs of all positions of all data, flat."""
        parts, positions = [], []
        for batch in batches:
            parts += Trainer._logprobs(self, batch)
            positions += batch.loss, batch.others
        return torch.cat([p.flatten() for p in _split_by_datum(data_D, positions, parts)])

    def _check_head(self) -> None:
        check_head(self.model_name, self.base, self._head(), self.transform, self.device, self.compute_dtype)

    # --- optimizer -------------------------------------------------------------------------------

    @computing()
    def optim_step(self, adam: AdamParams) -> OptimStepResponse:
        """One AdamW step on the accumulated gradients, which are then dropped. NonFiniteError,
        without a change, if the gradient is not finite."""
        self.trained.hand_over_gradients()
        stepped = self.trained.stepped.values()
        grad_norm = self._grad_norm([p.grad for p in stepped if p.grad is not None])
        norm = float(grad_norm)  # read here: at the end it would wait for the step, too
        if not math.isfinite(norm):
            self.zero_grad()
            raise NonFiniteError("the gradient is not finite; the step was not applied")
        if adam.grad_clip_norm > 0:
            nn.utils.clip_grads_with_norm_(stepped, adam.grad_clip_norm, grad_norm)
        for group in self.trained.optimizer.param_groups:
            group.update(
                lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
            )
        # fused AdamW changes weights without autograd's notice: a kept graph would be wrong
        self.kept = None
        with out_of_memory.explained_in_step(self.config):
            self.trained.optimizer.step()
            self.trained.masters_to_weights()
        self.zero_grad()
        return OptimStepResponse({"grad_norm": norm})

    def _grad_norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        return nn.utils.get_total_norm(grads)

    def zero_grad(self) -> None:
        self.trained.zero_grad()

    # --- checkpoints -----------------------------------------------------------------------------

    @computing()
    def check_finite(self, moments: bool = True) -> None:
        """NonFiniteError if a weight, or its optimizer state, is NaN or infinite. Without `moments`: a weight
        as passes read it."""
        if moments:
            check_finite(self.trained.stepped, self.trained.optimizer)
        else:
            check_finite(self.trained.named)

    @computing()
    def save_state(self, tokenizer: PreTrainedTokenizerBase, path: Path, extra: dict[str, Any]) -> None:
        checkpoints.save_state(self, tokenizer, path, extra)

    @computing()
    def save_policy(self, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        """In the sampler's dtype, without optimizer."""
        checkpoints.save_policy(self, tokenizer, path, self.compute_dtype)

    @computing()
    def load_state(self, path: Path, with_optimizer: bool) -> None:
        self.kept = None
        checkpoints.load_state(self, path, with_optimizer)

    def read_once(self, read: Callable[[], T]) -> T | None:
        """What `read` returns; None in a rank that gets it from the first."""
        return read()

    def checkpoint_bytes(self) -> int:
        return checkpoints.checkpoint_bytes(self)

    @property
    def base_fingerprint(self) -> str:
        return fingerprint(self.base.state_dict().items())

    # --- weights out -----------------------------------------------------------------------------

    @property
    def sampled(self) -> SampledModel:
        return SampledModel(self.base, self.compute_dtype, self._base_owner)

    def info(self) -> GetInfoResponse:
        parameters = sum(p.numel() for p in self.model.parameters())
        trainable = sum(p.numel() for p in self.named_trainable.values())
        dtype = str(self.compute_dtype).removeprefix("torch.")
        rank = self.lora.rank if self.lora else 0
        return GetInfoResponse(self.model_name, rank, parameters, trainable, self.max_length, str(self.device), dtype)


def _check_one_width(data_D: Sequence[Datum]) -> None:
    if len(by_width(data_D)) > 1:
        raise DataError("data with different numbers of targets per token: run them in passes of their own")


def _split_by_datum(
    data_D: Sequence[Datum], positions: Sequence[Positions], parts: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Splits (N, K) parts, differentiably, into a tensor per Datum, shaped like its targets."""
    lengths = [datum.model_input.length for datum in data_D]
    offsets_D = np.cumsum([0, *lengths])
    index_N = np.concatenate([offsets_D[at.datum_N] + at.position_N for at in positions])
    p_NK = torch.cat(list(parts))
    flat = p_NK.new_zeros(sum(lengths), p_NK.shape[1]).index_copy(0, torch.from_numpy(index_N).to(p_NK.device), p_NK)
    single_target = data_D[0].loss_fn_inputs["target_tokens"].array.ndim == 1
    return list((flat[:, 0] if single_target else flat).split(lengths))
