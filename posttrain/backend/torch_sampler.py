"""Sampling with torch and transformers: the reference for vLLM, and the engine without it. A batch
of prompts is padded on the left, prefilled once, and decoded with a KV cache; finished rows leave
it. Each row has its own generator: its tokens do not depend on other rows. Left out: joining a
batch that is decoding, which is why a batch has room for all that its rows may become.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.backend.architectures import decoder_of, logit_transform, vocabulary_of, with_cache
from posttrain.backend.config import BackendConfig, compute_dtype
from posttrain.backend.device_lock import computing
from posttrain.backend.engine import Sampled, SequenceRequest, Weights
from posttrain.backend.errors import ModelError
from posttrain.backend.fake_models import cached_bytes, model_size
from posttrain.backend.logprobs import fp32_logits, target_logprobs
from posttrain.backend.memory import kv_cache_bytes
from posttrain.backend.memory_plan import PROMPT_BYTES, prompt_bytes
from posttrain.backend.merged_lora import AdaptedWeights
from posttrain.backend.model_checks import check_head
from posttrain.backend.models import cast_weights, end_token_ids, fails_as
from posttrain.backend.prompt_scores import ScoredPrompt, blocks, score_prompt
from posttrain.backend.types import SampledSequence, SamplingParams, StopReason

# Of prompts that are decoded when a sampler opens, and the relative gap of hidden states that rounding explains.
CHECKED_LENGTHS = (2, 5)
MOST_DECODING_GAP = {torch.float32: 1e-2, torch.bfloat16: 0.5}  # bf16 may send a token to another expert
UNIFORMS = 16  # random numbers drawn per row at a time
MOST_WAITED = 16  # steps that others may be preferred to a request
MOST_STOPS = 64  # that are remembered, each with a mark for every token it has met


class TorchSampler:
    @computing()
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        config: BackendConfig,
        device: torch.device,
    ):
        self._dtype = compute_dtype(device, config)
        self._model: Any = cast_weights(model.to(device), self._dtype).eval()  # type: ignore[arg-type]
        self._tokenizer, self._device = tokenizer, device
        self._max_length, self._max_num_seqs = max_length, config.max_num_seqs
        self._cache_bytes = kv_cache_bytes(model.config, max_length, config, device, vllm=False)
        self._states, self._per_token = cached_bytes(model.config, self._dtype.itemsize)
        self._size = model_size(model.config)
        self._transform, self._end_ids = logit_transform(model.config), end_token_ids(model.config, tokenizer)
        self._unmerged, self._shares = config.lora != "merged", config.lora == "shared"
        self._borrows = False  # the weights of passes
        self._adapters: list[RemovableHandle] = []
        self._steps = 0
        # in the order of arrival, with the step before it; of thousands each may be dropped alone
        self._waiting: dict[SequenceRequest, int] = {}
        self._known_stop = lru_cache(MOST_STOPS)(partial(_Stop, tokenizer=tokenizer))
        self._check_head()
        self._pads = self._check_decoding()  # prompts of different lengths share a batch

    def add(self, request: SequenceRequest) -> None:
        self._waiting[request] = self._steps

    @computing()
    @torch.inference_mode()
    def step(self) -> list[tuple[SequenceRequest, Sampled]]:
        """Decodes a batch of waiting requests to the end."""
        requests = self._batch(self._in_order())
        self._steps += 1
        self.drop(requests)
        return self._decode(requests) if requests else []

    def _in_order(self) -> list[SequenceRequest]:
        """Prompts of similar length waste less padding: the shortest first. Where short ones keep coming, as in a
        server, the oldest has waited for long enough at some time, and goes first, with those of its length."""
        oldest, since = next(iter(self._waiting.items()), (None, self._steps))
        if oldest is None or self._steps - since < MOST_WAITED:
            return sorted(self._waiting, key=lambda request: len(request.prompt))
        length = len(oldest.prompt)
        return sorted(self._waiting, key=lambda request: (request is not oldest, abs(len(request.prompt) - length)))

    def _batch(self, waiting: list[SequenceRequest]) -> list[SequenceRequest]:
        """The first, within max_num_seqs and the bytes of a pass and of the cache; one at least."""
        batch: list[SequenceRequest] = []
        prompts, width, answer = set[tuple[int, ...]](), 0, 0
        for request in waiting[: self._max_num_seqs]:
            width, answer = max(width, len(request.prompt)), max(answer, request.max_tokens)
            prompts.add(tuple(request.prompt))
            one = self._states + (width + answer) * self._per_token
            full = (
                prompt_bytes(self._size, len(prompts), width, self._dtype.itemsize) > PROMPT_BYTES
                or (len(batch) + 1) * one > self._cache_bytes
            )
            if batch and (full or not self._pads and len(request.prompt) != len(batch[0].prompt)):
                break
            batch.append(request)
        return batch

    def drop(self, requests: Sequence[SequenceRequest]) -> None:
        for request in requests:
            self._waiting.pop(request, None)

    @computing()
    @torch.no_grad()
    def load_weights(self, weights: Weights) -> None:
        for adapter in self._adapters:
            adapter.remove()
        self._adapters = []
        if self._unmerged and isinstance(weights, AdaptedWeights):
            for name, update in weights.updates.items():
                a_RI, b_OR = (t.to(self._device, self._dtype, copy=True) for t in (update.a_RI, update.b_OR))
                hook = partial(_add_update, a_RI, b_OR, update.scaling)
                self._adapters.append(self._model.get_submodule(name).register_forward_hook(hook))
            self._read(weights.base_weights(), shares=self._shares)
        else:
            self._read(weights)

    def _read(self, weights: Weights, shares: bool = False) -> None:
        """Copies; or `shares` the tensors themselves, which nobody changes."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        if self._borrows and not shares:
            for parameter in self._model.parameters():
                parameter.data = torch.empty_like(parameter)
        self._borrows, live = shares, self._model.state_dict()
        for name, tensor in weights:
            if shares and name in parameters and tensor.device == parameters[name].device:
                parameters[name].data = tensor
            else:
                live[name].copy_(tensor)

    def sleep(self) -> None: ...

    def close(self) -> None:
        del self._model

    # --- decoding --------------------------------------------------------------------------------

    def _decode(self, requests: list[SequenceRequest]) -> list[tuple[SequenceRequest, Sampled]]:
        """The finished sequences; rows of abandoned requests leave the batch, too."""
        rows = [_Row(request, self._stop(request.params)) for request in requests]
        # members of a group share a prompt, which is read once
        prompts: dict[tuple[int, ...], int] = {}
        prompt_B = [prompts.setdefault(tuple(row.request.prompt), len(prompts)) for row in rows]
        hidden_BTH, mask_BT, cache = self._prefill(list(prompts))
        self._score_prompts(rows, prompt_B, hidden_BTH)
        index = torch.tensor(prompt_B, device=self._device)
        # selects in every kind of layer, convolutions' and recurrent states too
        cache.reorder_cache(index)
        alive, hidden_BH, mask_BT = rows, hidden_BTH[index, -1], mask_BT[index]
        while True:
            next_B = _draw(alive, self._logits(hidden_BH))
            keep = [b for b, row in enumerate(alive) if row.finish is None and not row.request.abandoned]
            if not keep:
                return [(row.request, row.sampled()) for row in rows if row.finish is not None]
            if len(keep) < len(alive):
                index = torch.tensor(keep, device=self._device)
                cache.reorder_cache(index)
                alive, next_B, mask_BT = [alive[b] for b in keep], next_B[index], mask_BT[index]
            hidden_BH, mask_BT = self._extend(next_B, mask_BT, cache)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Hidden states and mask of prompts padded on the left, and the cache that holds them."""
        width = max(map(len, prompts))
        tokens_BT = torch.zeros((len(prompts), width), dtype=torch.long)
        mask_BT = torch.zeros((len(prompts), width), dtype=torch.long)
        for b, prompt in enumerate(prompts):
            tokens_BT[b, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[b, width - len(prompt) :] = 1
        tokens_BT, mask_BT = tokens_BT.to(self._device), mask_BT.to(self._device)
        cache: Any = DynamicCache(config=self._model.config)
        return self._forward(tokens_BT, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0), cache), mask_BT, cache

    def _extend(
        self, next_B: torch.Tensor, mask_BT: torch.Tensor, cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H) hidden states after one more token, and the mask with it."""
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
        return self._forward(next_B[:, None], mask_BT, mask_BT.sum(-1, keepdim=True) - 1, cache)[:, -1], mask_BT

    def _forward(
        self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        decoder = decoder_of(self._model)
        return decoder(
            input_ids=tokens_BT, attention_mask=mask_BT, position_ids=positions_BT, **with_cache(decoder, cache)
        ).last_hidden_state

    def _check_head(self) -> None:
        name, head = str(self._model.config.model_type), self._model.get_output_embeddings()
        with fails_as(name, "fails on a row of tokens"):
            check_head(name, self._model, head.weight, self._transform, self._device, self._dtype)

    @computing()
    @torch.inference_mode()
    def _check_decoding(self) -> bool:
        """Whether prompts padded on the left are right; ModelError if decoding is wrong without padding,
        too."""
        config: Any = self._model.config.get_text_config()
        # Llama 4 counts columns, padding included, where its attention is chunked and where its scale grows
        columns = min(
            getattr(config, name, None) or self._max_length for name in ("attention_chunk_size", "floor_scale")
        )
        if self._max_length < CHECKED_LENGTHS[-1] + 2:
            return True
        limit = MOST_DECODING_GAP[self._dtype]
        with fails_as(str(self._model.config.model_type), "fails to decode"):
            if columns >= self._max_length and self._decoding_gap(CHECKED_LENGTHS) <= limit:
                return True
            gap = self._decoding_gap(CHECKED_LENGTHS[-1:] * 2)
        if gap > limit:
            raise ModelError(
                f"{self._model.config.model_type} cannot be sampled from with torch: with a cache, hidden states differ "
                f"by {gap:.2g} (relative) from those of a pass without"
            )
        return False

    def _decoding_gap(self, lengths: Sequence[int]) -> float:
        """Largest relative difference of hidden states from those of whole sequences: after the prompts,
        for a group of the first, and after rows have left."""
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(vocabulary_of(self._model), (n,), generator=generator).tolist() for n in lengths]
        hidden_BTH, mask_BT, cache = self._prefill(prompts)
        hidden_BH, sequences, gaps = hidden_BTH[:, -1], [*prompts], []
        for rows in ([0, 0, 1], [1, 2]):
            gaps += [self._gap(h, tokens) for h, tokens in zip(hidden_BH, sequences, strict=True)]
            index = torch.tensor(rows, device=self._device)
            cache.reorder_cache(index)
            sequences = [[*sequences[b], 1 + n] for n, b in enumerate(rows)]
            next_B = torch.tensor([tokens[-1] for tokens in sequences], device=self._device)
            hidden_BH, mask_BT = self._extend(next_B, mask_BT[index], cache)
        return max(gaps + [self._gap(h, tokens) for h, tokens in zip(hidden_BH, sequences, strict=True)])

    def _gap(self, hidden_H: torch.Tensor, tokens: Sequence[int]) -> float:
        whole = decoder_of(self._model)(input_ids=torch.tensor([tokens], device=self._device), use_cache=False)
        whole_H = whole.last_hidden_state[0, -1].float()
        return float((hidden_H.float() - whole_H).norm() / whole_H.norm())

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return fp32_logits(hidden, self._model.get_output_embeddings().weight, self._transform)

    def _score_prompts(self, rows: list["_Row"], prompt_B: list[int], hidden_BTH: torch.Tensor) -> None:
        head, width = self._model.get_output_embeddings().weight, hidden_BTH.shape[1]
        for b, row in zip(prompt_B, rows, strict=True):
            prompt, k, scores = row.request.prompt, row.request.topk_prompt, row.request.scores
            if k is None and scores is None:
                continue
            hidden_TH = hidden_BTH[b, width - len(prompt) : -1]
            if scores:
                row.scored = score_prompt(scores, len(hidden_TH), len(head), partial(self._distributions, hidden_TH))
            if k is None:
                continue
            targets = torch.tensor(prompt[1:], device=self._device)
            if k > 0:  # one number for a token, to the bit: harnesses compare it with the largest
                topk = self._topk(hidden_TH, targets, k)
                row.topk_prompt_logprobs = [None, *topk]
                row.prompt_logprobs = [None, *(dict(best)[t] for best, t in zip(topk, prompt[1:], strict=True))]
                continue
            logprobs_T = target_logprobs(hidden_TH, head, targets[:, None], transform=self._transform)[:, 0]
            row.prompt_logprobs = [None, *logprobs_T.tolist()]

    def _distributions(self, hidden_TH: torch.Tensor, rows: slice) -> torch.Tensor:
        return self._logits(hidden_TH[rows]).log_softmax(-1)

    def _topk(self, hidden_TH: torch.Tensor, targets_T: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
        """Per position the k most likely tokens and the prompt's token, most likely first."""
        entries = []
        for rows in blocks(len(hidden_TH), self._model.get_output_embeddings().weight.shape[0]):
            for logprobs_V, target in zip(self._distributions(hidden_TH, rows), targets_T[rows].tolist(), strict=True):
                tokens = {*logprobs_V.topk(k).indices.tolist(), target}
                entries.append(
                    sorted(((token, float(logprobs_V[token])) for token in tokens), key=lambda entry: -entry[1])
                )
        return entries

    def _stop(self, params: SamplingParams) -> "_Stop":
        """Token ids and strings that end a sequence: also every EOS of the model and its tokenizer,
        unless stop is []."""
        stop = [params.stop] if isinstance(params.stop, str) else params.stop
        ids = {item for item in stop or () if isinstance(item, int)}
        strings = tuple(item for item in stop or () if isinstance(item, str))
        if stop is None or len(stop):
            ids |= self._end_ids
        return self._known_stop(frozenset(ids), strings)


@dataclass(frozen=True)
class _Stop:
    ids: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    # whether a token can hold the end of a string
    _may_end: dict[int, bool] = field(default_factory=dict)

    def ends(self, tokens: list[int]) -> bool:
        """Whether the last token ends the sequence."""
        return tokens[-1] in self.ids or (bool(self.strings) and self._completes_string(tokens))

    def _completes_string(self, tokens: list[int]) -> bool:
        """Decodes only if the last token can complete a string, and only as many tokens as the
        longest string."""
        last = tokens[-1]
        if last not in self._may_end:
            text = self._text([last])
            self._may_end[last] = "\ufffd" in text or any(string[-1] in text for string in self.strings)
        if not self._may_end[last]:
            return False
        # a character is at most four tokens (bytes)
        start = max(0, len(tokens) - (max(map(len, self.strings)) * 4 + 4))
        while start and self._is_byte(tokens[start]):  # tokens of bytes in a row are read together, or not at all
            start -= 1
        text = self._text(tokens[start:])
        return any(string in text for string in self.strings)

    def _text(self, tokens: list[int]) -> str:
        """Of tokens after others: some tokenizers drop a space at the beginning of a text."""
        before, length = self._before
        return self._decoded([*before, *tokens])[length:]

    @cached_property
    def _before(self) -> tuple[list[int], int]:
        """Tokens to decode before others, and the length of their text."""
        tokens = self.tokenizer.encode(".", add_special_tokens=False)
        return tokens, len(self._decoded(tokens))

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def _is_byte(self, token: int) -> bool:
        """Whether SentencePiece has a token for a byte, and not for text."""
        return str(self.tokenizer.convert_ids_to_tokens(token)).startswith("<0x")


@dataclass(eq=False)
class _Row:
    """One sequence during decoding."""

    request: SequenceRequest
    stop: _Stop
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: StopReason | None = None
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    scored: ScoredPrompt = field(default_factory=ScoredPrompt)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.request.seed)
        self._uniforms: list[float] = []

    def uniform(self) -> float:
        if not self._uniforms:
            self._uniforms = torch.rand(UNIFORMS, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._uniforms.pop()

    def append(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.stop.ends(self.tokens):
            self.finish = "stop"
        elif len(self.tokens) >= self.request.max_tokens:
            self.finish = "length"
        if self.request.on_tokens:
            self.request.on_tokens([*self.tokens])

    def sampled(self) -> Sampled:
        assert self.finish is not None
        topk = self.topk if self.request.topk_sample else None
        sequence = SampledSequence(self.tokens, self.logprobs, self.finish, topk)
        return Sampled(sequence, self.prompt_logprobs, self.topk_prompt_logprobs, self.scored)


def _add_update(
    a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float, layer: nn.Module, args: Any, y: torch.Tensor
) -> torch.Tensor:
    """A layer's output and its adapter's, as in peft."""
    return y + F.linear(F.linear(args[0], a_RI), b_OR) * scaling


def _draw(rows: list[_Row], logits_BV: torch.Tensor) -> torch.Tensor:
    """Draws and appends a token per row by inverse CDF, with a number of the row's generator."""
    device = logits_BV.device
    if device.type == "mps":  # it has no float64
        logits_BV = logits_BV.cpu()
    temperature_B = torch.tensor([row.request.params.temperature for row in rows], device=logits_BV.device)
    greedy_B = temperature_B == 0
    logits_BV = logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    logits_BV = _truncate(logits_BV, [row.request.params for row in rows])
    logprobs_BV = logits_BV.log_softmax(-1)
    uniform_B = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=logits_BV.device)
    cdf_BV = logprobs_BV.double().exp().cumsum(-1)
    drawn_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0]
    drawn_B = drawn_B.clamp(max=logits_BV.shape[-1] - 1)
    next_B = torch.where(greedy_B, logits_BV.argmax(-1), drawn_B)
    chosen_B = logprobs_BV.gather(-1, next_B[:, None])[:, 0]
    for b, row in enumerate(rows):
        if k := row.request.topk_sample:
            best = zip(*(values.tolist() for values in logprobs_BV[b].topk(k)), strict=True)
            row.topk.append([(token, logprob) for logprob, token in best if logprob > -torch.inf])
    for row, token, logprob in zip(rows, next_B.tolist(), chosen_B.tolist(), strict=True):
        row.append(token, logprob)
    return next_B.to(device)


def _truncate(logits_BV: torch.Tensor, params_B: list[SamplingParams]) -> torch.Tensor:
    """Top-k, then top-p on the rest: other tokens get probability 0. Not of greedy rows, whose logprobs
    are those of temperature 1, as in vLLM."""
    vocabulary = logits_BV.shape[-1]
    drawn_B = [params.temperature > 0 for params in params_B]
    counts = [p.top_k if drawn and p.top_k > 0 else vocabulary for p, drawn in zip(params_B, drawn_B, strict=True)]
    shares = [p.top_p if drawn else 1.0 for p, drawn in zip(params_B, drawn_B, strict=True)]
    if min(counts) >= vocabulary and min(shares) >= 1:
        return logits_BV
    top_k_B = torch.tensor(counts, device=logits_BV.device)
    top_p_B = torch.tensor(shares, device=logits_BV.device)
    sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
    sorted_BV = sorted_BV.masked_fill(torch.arange(vocabulary, device=logits_BV.device) >= top_k_B[:, None], -torch.inf)
    probs_BV = sorted_BV.softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV  # probability of more likely tokens
    sorted_BV = sorted_BV.masked_fill((before_BV >= top_p_B[:, None]) & (top_p_B < 1)[:, None], -torch.inf)
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, sorted_BV)
