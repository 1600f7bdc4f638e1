"""The model, its optimizer and the passes over it. Synchronous; training_client.py puts it behind futures.

Weights and optimizer state are fp32; on CUDA the passes run under bf16 autocast. Dropout is off everywhere: the logprobs that RL compares
must be those of one distribution.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from backend.batching import MicroBatch, micro_batches
from backend.config import BackendConfig, compute_dtype, training_device
from backend.data_checks import check_data, resolve_loss
from backend.device_lock import computing
from backend.errors import DataError, ModelError, NonFiniteError
from backend.logprobs import target_logprobs
from backend.loss_terms import KeptForward, LossTerm, RunningTerm
from backend.losses import LossFn
from backend.models import context_length, embedding_rows, load_model
from backend.random_state import drawn_from
from backend.types import AdamParams, Datum, ForwardBackwardOutput, GetInfoResponse, LoraConfig, OptimStepResponse, TensorData

CustomLoss = Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]

# The linear layers that vLLM, too, can put an adapter on (names of Llama, Qwen, Mistral and of GPT-2).
ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "attn.c_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "mlp.c_proj")
DEFAULT_LORA_ALPHA = 32.0


class Trainer:
    output_name = "logprobs"  # what `run` returns for every token
    scalar_head: nn.Parameter | None = None  # (1, H) where a ScalarTrainer has one in the place of the vocabulary's head

    def __init__(self, model_name: str, config: BackendConfig, seed: int = 0, lora: LoraConfig | None = None):
        self.model_name, self.config, self.seed, self.lora = model_name, config, seed, lora
        self.device = training_device()
        self.compute_dtype = compute_dtype(self.device)
        self.max_length = context_length(model_name, config.max_length)
        hf_model = load_model(model_name, seed, self.device, torch.float32)
        self.hf_config = hf_model.config
        self.vocabulary = embedding_rows(hf_model)
        self.model: PreTrainedModel | PeftModel = _add_lora(hf_model, model_name, lora, seed) if lora else hf_model
        self.base: PreTrainedModel = hf_model
        _switch_off_dropout(self.model)
        if config.gradient_checkpointing:
            hf_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            hf_model.enable_input_require_grads()  # the frozen embedding of a LoRA run would cut the recomputed graph
            self.model.train()
        self.named_trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.named_trainable.values(), lr=0.0, fused=True)
        self.kept: KeptForward | None = None  # a forward that waits for its backward; whoever changes the weights drops it
        self._check_head()

    # --- passes -----------------------------------------------------------------------------------------------------------------

    def run(
        self, data_D: Sequence[Datum], loss_fn: str | LossFn, loss_fn_config: dict[str, Any] | None = None, backward: bool = True
    ) -> ForwardBackwardOutput:
        """Logprobs and loss of every Datum; with `backward`, gradients are added to those already there.

        A loss that is not finite raises NonFiniteError and leaves no gradient behind.
        """
        return self.run_terms([LossTerm(data_D, loss_fn, loss_fn_config)], backward)[0]

    @computing()
    def run_terms(self, terms: Sequence[LossTerm], backward: bool = True, keep: bool = False) -> list[ForwardBackwardOutput]:
        """Several losses in the same passes, an output for each. NonFiniteError counts the data of all terms through.

        With `keep` and without `backward`, a forward that fits one micro-batch is kept, and the next backward of (some of) the same data
        under the same weights begins there. This saves a forward pass and changes nothing else.
        """
        running: list[RunningTerm] = []
        data_D: list[Datum] = []
        for term in terms:
            loss = resolve_loss(term.loss_fn, term.loss_fn_config)
            check_data(term.data_D, loss.required, self.vocabulary, self.max_length, first=len(data_D))
            running.append(RunningTerm(term, loss, first=len(data_D)))
            data_D += term.data_D
        if len({datum.loss_fn_inputs["target_tokens"].array.shape[1:] for datum in data_D}) > 1:
            raise DataError("data with different numbers of targets per token: run them in passes of their own")
        needed_D = [backward and need for term in running for need in term.needs_backward()]
        for batch, p_NK, differentiate in self._forward(data_D, needed_D, backward, keep):
            with torch.set_grad_enabled(differentiate):
                loss = torch.stack([term(batch, p_NK) for term in running]).sum()
                if differentiate and len(p_NK):
                    loss.backward()
        if bad := [d for term in running for d in term.not_finite()]:
            self.zero_grad()
            raise NonFiniteError(f"the loss of data {bad[:10]} is not finite; no gradient was kept", bad)
        return [term.output(self.output_name) for term in running]

    def _forward(
        self, data_D: Sequence[Datum], needed_D: Sequence[bool], backward: bool, keep: bool
    ) -> Iterator[tuple[MicroBatch, torch.Tensor, bool]]:
        """Micro-batches, their logprobs, and whether these are to be differentiated."""
        if backward:
            kept, self.kept = self.kept, None
            if kept and (part := kept.of(data_D)):
                yield *part, True
                return
            del kept
        for wanted in (True, False):
            chosen = [d for d, need in enumerate(needed_D) if need is wanted]
            batches = micro_batches(data_D, chosen, self.config.micro_batch_tokens, self.device)
            keep_this = (
                keep and not backward and len(batches) == 1
            )  # of more, more activations would be alive than were asked for
            for batch in batches:
                with torch.set_grad_enabled(wanted or keep_this):
                    p_NK = self._logprobs(batch)
                if keep_this:
                    self.kept = KeptForward(data_D, batch, p_NK)
                yield batch, p_NK, wanted

    @computing()
    def run_custom(self, data_D: Sequence[Datum], fn: CustomLoss) -> ForwardBackwardOutput:
        """`fn(data, logprobs_D)` gets the differentiable logprobs of all data at once: one forward, one backward.

        Data that need several micro-batches are passed through a second time, with the gradient that `fn` gave their logprobs, so that
        only one micro-batch's activations are alive at a time. The gradients are the same.
        """
        check_data(data_D, (), self.vocabulary, self.max_length)
        batches = micro_batches(data_D, range(len(data_D)), self.config.micro_batch_tokens, self.device)
        with torch.set_grad_enabled(len(batches) == 1):
            p_NK = torch.cat([self._logprobs(batch) for batch in batches])
        if len(batches) > 1:
            p_NK.requires_grad_()
        logprobs_D = _split_by_datum(data_D, batches, p_NK)
        loss, metrics = fn(list(data_D), logprobs_D)
        if not torch.isfinite(loss):
            self.zero_grad()
            raise NonFiniteError("the custom loss is not finite; no gradient was kept")
        loss.backward()
        if len(batches) > 1 and p_NK.grad is not None:
            for batch, gradient_NK in zip(batches, p_NK.grad.split([len(batch.rows_N) for batch in batches]), strict=True):
                self._logprobs(batch).backward(gradient_NK)
        outputs = [{self.output_name: TensorData.from_torch(logprobs)} for logprobs in logprobs_D]
        return ForwardBackwardOutput(outputs, {**metrics, "loss:sum": loss.item()})

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        """(N, H) last hidden states of the rows that carry loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            hidden_BTH = self.base.get_decoder()(
                input_ids=batch.tokens_BT, attention_mask=batch.mask_B1TT, position_ids=batch.positions_BT, use_cache=False
            ).last_hidden_state
        return hidden_BTH.flatten(0, 1).index_select(0, batch.rows_N).to(self.compute_dtype)

    def _logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """(N, K) logprobs of the rows that carry loss, under the temperature each token was sampled at."""
        return target_logprobs(self._hidden(batch), self._head(), batch.targets_NK, batch.temperature_N)

    def _head(self) -> torch.Tensor:
        """The (V, H) output matrix, with its adapter applied where it has one."""
        head: Any = self.base.get_output_embeddings()
        return head.base_layer.weight + head.get_delta_weight("default") if hasattr(head, "lora_A") else head.weight

    @torch.no_grad()
    def _check_head(self) -> None:
        """Softcaps, scales and biases between the last hidden state and the logits would make every logprob silently wrong."""
        tokens = self.vocabulary - 1 - torch.arange(8, device=self.device)[None]
        batch = MicroBatch(tokens, torch.arange(8, device=self.device), np.zeros(8), np.arange(8), tokens.T)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            expected = self.base(input_ids=tokens).logits[0].float().log_softmax(-1).gather(-1, tokens.T)
        if (self._logprobs(batch) - expected).abs().max() > (1e-3 if self.compute_dtype == torch.float32 else 0.2):
            unknown = "computes its logits in a way the chunked logprobs do not know (a softcap, a scale or a bias)"
            raise ModelError(f"{self.model_name!r} {unknown}")

    # --- optimizer --------------------------------------------------------------------------------------------------------------

    @computing()
    def optim_step(self, adam: AdamParams) -> OptimStepResponse:
        """One AdamW step on the accumulated gradients, which are then dropped. A gradient that is not finite raises; nothing moves."""
        for p in self.named_trainable.values():
            if p.grad is None:  # AdamW would skip it, and then its moments would depend on which data came first
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self.named_trainable.values() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        if not torch.isfinite(grad_norm):
            self.zero_grad()
            raise NonFiniteError("the gradient is not finite; the step was not applied")
        if adam.grad_clip_norm > 0:
            nn.utils.clip_grads_with_norm_(self.named_trainable.values(), adam.grad_clip_norm, grad_norm)
        for group in self.optimizer.param_groups:
            group.update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay)
        self.kept = None  # autograd would not notice that fused AdamW changes the weights it goes back through
        self.optimizer.step()
        self.zero_grad()
        return OptimStepResponse({"grad_norm": float(grad_norm)})

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    # --- weights out ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sampler_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as in a checkpoint, adapters merged, in the sampler's dtype, made one at a time.

        From state_dict, not named_parameters: a tied lm_head must be there too, since vLLM on a CPU packs its own copy of it.
        """
        adapted: dict[str, Any] = {name: module for name, module in self.base.named_modules() if hasattr(module, "lora_A")}
        for name, tensor in self.base.state_dict().items():
            if ".lora_" in name:
                continue
            module = adapted.get(name.rsplit(".base_layer.", 1)[0]) if name.endswith(".base_layer.weight") else None
            if module is not None:
                tensor = tensor + module.get_delta_weight("default")
            yield name.replace(".base_layer.", "."), tensor.to(self.compute_dtype)

    def info(self) -> GetInfoResponse:
        parameters, trainable = (
            sum(p.numel() for p in self.model.parameters()),
            sum(p.numel() for p in self.named_trainable.values()),
        )
        dtype = str(self.compute_dtype).removeprefix("torch.")
        rank = self.lora.rank if self.lora else 0
        return GetInfoResponse(self.model_name, rank, parameters, trainable, self.max_length, str(self.device), dtype)


def _add_lora(hf_model: PreTrainedModel, model_name: str, lora: LoraConfig, seed: int) -> PeftModel:
    suffixes = (ATTENTION_LAYERS if lora.train_attn else ()) + (MLP_LAYERS if lora.train_mlp else ())
    targets = [name for name, _ in hf_model.named_modules() if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)]
    if lora.train_unembed:
        if hf_model.config.tie_word_embeddings:
            raise ModelError("train_unembed: this model's lm_head is its embedding, and vLLM would ignore an adapter on it")
        targets.append("lm_head")
    if not targets:
        raise ModelError(f"{hf_model.config.model_type} has none of the layers that LoRA is put on: train all weights instead")
    alpha = DEFAULT_LORA_ALPHA if lora.alpha is None else lora.alpha
    conv1d = hf_model.config.model_type == "gpt2"
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
        fan_in_fan_out=conv1d,
        task_type="CAUSAL_LM",
    )
    with drawn_from(seed if lora.seed is None else lora.seed):
        model = get_peft_model(hf_model, config)
    model.peft_config["default"].base_model_name_or_path = model_name
    return model  # type: ignore[return-value]


def _switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _split_by_datum(data_D: Sequence[Datum], batches: Sequence[MicroBatch], p_NK: torch.Tensor) -> list[torch.Tensor]:
    """Differentiable: the rows of all batches back to one tensor per Datum, (T,) or (T, K) as its targets are."""
    lengths = [datum.model_input.length for datum in data_D]
    offsets_D = np.cumsum([0, *lengths])
    index_N = np.concatenate([offsets_D[batch.datum_N] + batch.position_N for batch in batches])
    flat = p_NK.new_zeros(sum(lengths), p_NK.shape[1]).index_copy(0, torch.from_numpy(index_N).to(p_NK.device), p_NK)
    one_target = data_D[0].loss_fn_inputs["target_tokens"].array.ndim == 1
    return list((flat[:, 0] if one_target else flat).split(lengths))
