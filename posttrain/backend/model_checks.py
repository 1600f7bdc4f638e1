"""Checks of a model when it is opened for training: its rows, packed or padded, give each sequence the
logprobs it has alone, and its head is one that the chunked logprobs know. When it is opened for
sampling alone: the sampler has transformers' logprobs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.backend.architectures import decoder_of, vocabulary_of
from posttrain.backend.attention import kernel_gap, packs, set_packing
from posttrain.backend.batching import WIDTH_BUCKET, micro_batches
from posttrain.backend.data_checks import check_loaded
from posttrain.backend.device_lock import computing
from posttrain.backend.errors import CookbookError, LogprobGapError, ModelError, one_line
from posttrain.backend.logprobs import LogitTransform, fp32_logits, target_logprobs
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.trained_model import TrainedModel
from posttrain.backend.types import Datum, ModelInput

# Mean |logprob difference| of random tokens: above rounding, below a wrong mask or position.
MOST_ROW_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.2}
# Relative difference of an attention kernel's output and gradients from a dense computation in fp32.
MOST_KERNEL_GAP = {torch.float32: 1e-2, torch.bfloat16: 3e-2}
LARGE_LOGITS = 20.0  # standard deviation at which caps of 30 and 50 bend
TEXT = (
    "The river rises in the hills to the north and runs for two hundred miles before it meets the sea. In spring the "
    "melting snow fills it to the top of its banks, and the villages along it keep their boats tied high. By late "
    "summer a child can walk across it at the old ford, where the stones are flat and the water is no deeper than 12 "
    "inches. Most of the mills that once stood here are gone; 3 of the 40 still turn, and one of them grinds flour for "
    "the bakery in the market square. "
)
# Of the text, as tokens of no sense differ more in bf16; below a block of a prefix cache, 16 tokens.
TEXT_TOKENS = 15


@computing()
@torch.no_grad()
def alone(trainer: TrainedModel, data_D: Sequence[Datum]) -> list[torch.Tensor]:
    """The logprobs of each sequence in a micro-batch of its own."""
    return [
        trainer._flat_logprobs([datum], micro_batches([datum], [0], 2**62, trainer.device, False)) for datum in data_D
    ]


@computing()
@torch.no_grad()
def row_gap(trainer: TrainedModel, data_D: Sequence[Datum], alone_D: Sequence[torch.Tensor], share: bool) -> float:
    """Mean |logprob in one micro-batch - logprob alone| over all positions. `share`: with
    prefix sharing. Packed rows have the width that passes give them: below 128 columns torch takes
    another kernel of FlexAttention."""
    chosen, packed = range(len(data_D)), trainer.packs
    bucket = WIDTH_BUCKET if packed else 1
    batches = micro_batches(data_D, chosen, 2**62, trainer.device, share, bucket, packed=packed)
    return float((trainer._flat_logprobs(data_D, batches) - torch.cat([*alone_D])).abs().mean())


def check_causal(model_name: str, pair_D: Sequence[Datum], alone_D: Sequence[torch.Tensor], limit: float) -> None:
    """`pair_D`: two sequences of one length with a common prompt, whose logprobs must not depend on
    what follows it."""
    tokens, other_tokens = (datum.model_input.to_ints() for datum in pair_D)
    # the last of these predicts the first token that differs
    common = next((t for t, (a, b) in enumerate(zip(tokens, other_tokens, strict=True)) if a != b), 1) - 1
    if (gap := float((alone_D[0] - alone_D[1])[:common].abs().sum() / max(1, common))) > limit:
        raise ModelError(
            f"{model_name!r} is not a causal language model as it is configured: a token's logprobs differ by "
            f"{gap:.2g} on average with the tokens after it, as in an encoder (is_decoder=false, bidirectional "
            "attention)"
        )


def check_rows(trainer: TrainedModel) -> None:
    """Each sequence must have its own logprobs in padded and shared rows. If only sharing
    fails, it is switched off."""
    data_D, limit = row_check_data(trainer.vocabulary, trainer.max_length), MOST_ROW_GAP[trainer.compute_dtype]
    alone_D = alone(trainer, data_D)
    if not torch.cat(alone_D).isfinite().all():
        check_loaded(trainer.model_name, dict(trainer.base.named_parameters()), ModelError)
    check_causal(trainer.model_name, data_D[:2], alone_D, limit)
    if (gap := row_gap(trainer, data_D, alone_D, share=False)) > limit:
        raise ModelError(
            f"{trainer.model_name!r} cannot be trained in batches: a sequence's logprobs differ by {gap:.2g} on "
            "average when a longer one is beside it"
        )
    trainer.shares_prefixes = trainer.shares_prefixes and row_gap(trainer, data_D, alone_D, share=True) <= limit


def pack_rows(trainer: TrainedModel) -> None:
    """Where backend.attention says so and it gives each sequence the logprobs it has alone; "auto" with
    one of the two kernels where the GPU cannot compute the model's heads with the other. Otherwise a
    line says why not; ModelError if packing is not left to us."""
    wanted, shares = trainer.config.attention, trainer.shares_prefixes
    if not packs(wanted, trainer.device):
        return
    both = wanted == "auto" and trainer.compute_dtype == torch.bfloat16 and trainer.windows is not None
    reason = ""
    for attention in ("auto", "flex", "varlen") if both else (wanted,):
        trainer.shares_prefixes = shares and attention != "varlen"
        trainer.whole_sequences = attention != "flex" and trainer.compute_dtype == torch.bfloat16
        if not (failure := _packing_fails(trainer, trees=attention != "varlen")):
            if reason:
                print(f"rows are packed with backend.attention={attention}: {reason}", flush=True)
            return
        trainer.packs = False
        set_packing(trainer.base, False)
        reason = reason or failure
    trainer.shares_prefixes = shares
    if wanted != "auto":
        raise ModelError(f"backend.attention={wanted}: the rows of {trainer.model_name!r} cannot be packed: {reason}")
    print(f"rows are padded, not packed (backend.attention=auto): {reason}", flush=True)


def _packing_fails(trainer: TrainedModel, trees: bool) -> str | None:
    """Packs, and returns the reason if that is wrong."""
    if trainer.windows is None:
        return "its config does not say that all layers are causal attention"
    try:
        gap = kernel_gap(
            trainer.hf_config, trainer.windows, trainer.device, trainer.compute_dtype, trainer.whole_sequences, trees
        )
        limit = MOST_KERNEL_GAP[trainer.compute_dtype]
        if not gap <= limit:
            return f"the kernel's results differ by {gap:.2g} from those with a mask"
        trainer.packs = True
        set_packing(trainer.base, True)
        data_D = row_check_data(trainer.vocabulary, trainer.max_length)
        alone_D = alone(trainer, data_D)
        gaps = [row_gap(trainer, data_D, alone_D, share) for share in {False, trainer.shares_prefixes}]
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error, 200)}"
    if not (gap := np.max(gaps)) <= MOST_ROW_GAP[trainer.compute_dtype] and torch.cat(alone_D).isfinite().all():
        return f"a sequence's logprobs differ by {gap:.2g} from those it has alone"
    return None


@computing()
@torch.no_grad()
def check_head(
    model_name: str,
    model: PreTrainedModel,
    head_VH: torch.Tensor,
    transform: LogitTransform,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Refuses a model whose logits have an operation that `transform` does not have.
    Checked with the model's hidden states, which are small in a random model, and with hidden
    states large enough for any softcap."""
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"{model_name!r} has a bias in its output layer, which the chunked logprobs do not add")
    tokens, hidden_states = vocabulary_of(model) - 1 - torch.arange(8, device=device)[None], []
    large_BTH = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 8, head_VH.shape[1]))).to(head_VH)
    large_BTH *= LARGE_LOGITS / fp32_logits(large_BTH[0], head_VH).std()
    for replaced_BTH in (None, large_BTH):

        def replace(module: Any, args: Any, output: Any, replaced_BTH: torch.Tensor | None = replaced_BTH) -> Any:
            if replaced_BTH is not None:
                output.last_hidden_state = replaced_BTH
            hidden_states.append(output.last_hidden_state)
            return output

        hook = decoder_of(model).register_forward_hook(replace)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits_TV = model(input_ids=tokens).logits[0].float()
            expected = logits_TV.log_softmax(-1).gather(-1, tokens.T)
        hook.remove()
        hidden_TH = hidden_states.pop()[0].to(dtype)
        gap = (target_logprobs(hidden_TH, head_VH, tokens.T, transform=transform) - expected).abs().max()
        # On CUDA the chunked logits are fp32, and the model's own rounded to bf16: by up to
        # 1/256 of the largest.
        if gap > (1e-3 if dtype == torch.float32 else 0.3 + float(logits_TV.abs().max()) / 64):
            unknown = "computes its logits in a way the chunked logprobs do not know (a scale or a softcap of its own)"
            raise ModelError(f"{model_name!r} {unknown}")


def row_check_data(vocabulary: int, max_length: int) -> list[Datum]:
    """Three random sequences with a common prefix, and a longer one without it."""
    rng, prompt, answer = np.random.default_rng(0), max(1, min(24, max_length // 2)), max(1, min(8, max_length // 4))
    shared = rng.integers(vocabulary, size=prompt)
    rows = [np.append(shared, rng.integers(vocabulary, size=answer)) for _ in range(3)]
    rows.append(rng.integers(vocabulary, size=min(40, max_length)))
    return [Datum(ModelInput.from_ints(row.tolist()), {"target_tokens": np.roll(row, -1)}) for row in rows]


def sampler_gap(model: PreTrainedModel, sampler: SamplingClient) -> float:
    """Mean |logprob of the sampler - logprob of `model`, its weights by transformers| of a short text."""
    tokens = sampler.get_tokenizer().encode(TEXT)[: min(TEXT_TOKENS, sampler.max_length - 1)]
    if len(tokens) < 2 or max(tokens) >= sampler.vocabulary:
        return 0.0
    sampled_T = torch.tensor(sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:])
    with computing(), torch.no_grad():
        ids_T = torch.tensor(tokens, device=model.device)
        logits_TV = model(input_ids=ids_T[None, :-1]).logits[0].float()
        expected_T = logits_TV.log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0].cpu()
    return float((sampled_T - expected_T).abs().mean())


def check_sampler(name: str, model: PreTrainedModel, sampler: SamplingClient, dtype: torch.dtype, stops: bool) -> None:
    """Of weights that nobody trains no later comparison would show what the sampler computes otherwise.
    LogprobGapError, or without `stops` a warning."""
    try:
        gap = sampler_gap(model, sampler)
    except CookbookError:
        raise
    except Exception as error:  # `model` is on the CPU, where kernels of a GPU (fla's) do not run
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        print(f"{name}: the sampler was not compared with transformers, which fails on a CPU ({reason})", flush=True)
        return
    if gap <= MOST_ROW_GAP[dtype]:
        return
    message = (
        f"{name}: the sampler's logprobs differ by {gap:.2g} nats per token from those that transformers computes from "
        "its weights (rounding explains less): it computes this model differently, or lacks some of them. "
        "backend.engine=torch samples with transformers"
    )
    if stops:
        raise LogprobGapError(f"{message}; backend.alarm=warn continues with a warning")
    print(f"WARNING {message}", flush=True)
