"""Decoding from a language model guided by a classifier of candidate next tokens (guidance.py): Q#,
CD, FUDGE; without a classifier, plain sampling. All in torch: vLLM has no second model's cache.

Left out: prompts of different lengths in one batch, stop strings, one copy of a prompt's keys for
all its candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from posttrain.backend.architectures import attends_to_all, logit_transform, with_cache
from posttrain.backend.errors import ContextLengthError, ModelError
from posttrain.backend.models import DEFAULT_MAX_LENGTH
from recipes.libraries.value_guidance.guidance import Guidance, candidates, guided_logits


class Trunk(Protocol):
    """A causal encoder with a KV cache that is never changed in place."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_length(self) -> int | None: ...

    def read(self, tokens_B_T: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """states_B_T_H of tokens that continue `cache`, and the longer cache. Gradients flow
        through the cache.
        """
        ...

    def select(self, cache: Any, rows: torch.Tensor) -> Any:
        """The cache of these rows, which may repeat."""
        ...


@dataclass(frozen=True)
class Reader:
    """A language model: a trunk, and a head from its states (..., H) to logits (..., V)."""

    trunk: Trunk
    head: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ValueReader:
    """A classifier: a trunk, and a head from the states before and after a token, (..., H) each, to
    the token's outputs (..., K).
    """

    trunk: Trunk
    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LanguageModelTrunk(torch.nn.Module):
    """A transformers model."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.vocab_size, self.hidden_size = model.config.vocab_size, model.config.hidden_size
        self.max_length: int | None = getattr(model.config, "max_position_embeddings", None)

    def read(self, tokens_B_T: torch.Tensor, cache: DynamicCache | None = None) -> tuple[torch.Tensor, DynamicCache]:
        cache = DynamicCache(config=self.model.config) if cache is None else self._copy(cache)
        # padding ids are ordinary tokens here, and attended to
        seen_B_T = tokens_B_T.new_ones(len(tokens_B_T), cache.get_seq_length() + tokens_B_T.shape[1])
        decoder = self.model.base_model
        output = decoder(input_ids=tokens_B_T, attention_mask=seen_B_T, **with_cache(decoder, cache))
        return output.last_hidden_state, cache

    def select(self, cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
        return self._copy(cache, rows)

    def next_token_logits(self, states: torch.Tensor) -> torch.Tensor:
        head: Any = self.model.get_output_embeddings()
        return logit_transform(self.model.config)(head(states))

    def _copy(self, cache: DynamicCache, rows: torch.Tensor | None = None) -> DynamicCache:
        """Shares the tensors: transformers appends by concatenation, never in place."""
        copy = DynamicCache(config=self.model.config)
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            keys, values = layer.keys, layer.values
            copy.update(keys if rows is None else keys[rows], values if rows is None else values[rows], number)
        return copy


def language_model(model: PreTrainedModel) -> Reader:
    """ModelError for caches that cannot be copied: sliding-window, recurrent, convolution
    layers.
    """
    if not attends_to_all(model.config, getattr(model.config, "max_position_embeddings", DEFAULT_MAX_LENGTH)):
        raise ModelError(
            f"guided sampling needs attention over all tokens in every layer: {model.config.model_type} has other layers"
        )
    trunk = LanguageModelTrunk(model)
    return Reader(trunk, trunk.next_token_logits)


@dataclass(frozen=True)
class Sample:
    """`tokens_B_T` without the prompt; `logprobs_B_T` under the guided distribution; `kl_B_T` of
    the guided from the unguided distribution, in nats. After an EOS: EOS, 0 and 0.
    """

    tokens_B_T: torch.Tensor
    logprobs_B_T: torch.Tensor
    kl_B_T: torch.Tensor


@torch.no_grad()
def guided_sample(
    policy: Reader,
    prompts_B_P: torch.Tensor,
    num_tokens: int,
    guidance: Guidance,
    classifier: ValueReader | None = None,
    uniforms_B_T: torch.Tensor | None = None,
    eos_id: int | None = None,
) -> Sample:
    """`num_tokens` tokens for each prompt: greedy, or sampled with the uniform numbers in [0, 1) of
    `uniforms_B_T`. Without `classifier` only the temperature of `guidance` is used.

    At each step the classifier's cache is repeated for every candidate, all candidates are scored
    in one pass of one token, and the cache rows of the drawn tokens are kept. ModelError for
    different vocabularies.
    """
    check_fit(policy.trunk, classifier.trunk if classifier else None, prompts_B_P.shape[1] + num_tokens)
    states_B_T_H, policy_cache = policy.trunk.read(prompts_B_P)
    value_states, value_cache = classifier.trunk.read(prompts_B_P) if classifier else (states_B_T_H, None)
    before_B_H = value_states[:, -1]  # the classifier's state before the next token
    tokens: list[torch.Tensor] = []
    logprobs: list[torch.Tensor] = []
    kls: list[torch.Tensor] = []
    ended_B = torch.zeros(len(prompts_B_P), dtype=torch.bool, device=prompts_B_P.device)
    for t in range(num_tokens):
        logits_B_V = policy.head(states_B_T_H[:, -1]).float() / guidance.temperature
        guided_B_V, scored = logits_B_V, None
        if classifier:
            scored = _score(classifier, candidates(logits_B_V, guidance.top_k), before_B_H, value_cache)
            offsets_B_C = guidance.offsets(scored.values_B_C_K)
            guided_B_V = guided_logits(logits_B_V, scored.ids_B_C, offsets_B_C, guidance.others)
        logprobs_B_V = guided_B_V.log_softmax(-1)
        next_B = logprobs_B_V.argmax(-1) if uniforms_B_T is None else _draw(logprobs_B_V, uniforms_B_T[:, t])
        if eos_id is not None:
            next_B = torch.where(ended_B, eos_id, next_B)
        alive_B = (~ended_B).float()
        tokens.append(next_B)
        logprobs.append(logprobs_B_V.gather(-1, next_B[:, None])[:, 0].where(~ended_B, 0))
        kls.append(_kl(logprobs_B_V, logits_B_V.log_softmax(-1)) * alive_B)
        if eos_id is not None:
            ended_B = ended_B | (next_B == eos_id)
        if t + 1 == num_tokens or (eos_id is not None and bool(ended_B.all())):
            break
        if classifier and scored:
            before_B_H, value_cache = _advance(classifier.trunk, value_cache, scored, next_B, guidance)
        states_B_T_H, policy_cache = policy.trunk.read(next_B[:, None], policy_cache)
    return Sample(torch.stack(tokens, 1), torch.stack(logprobs, 1), torch.stack(kls, 1))


def check_fit(policy: Trunk, classifier: Trunk | None, length: int) -> None:
    """ModelError for different vocabularies, ContextLengthError if `length` exceeds a context."""
    if classifier and classifier.vocab_size != policy.vocab_size:
        raise ModelError(
            f"the classifier reads {classifier.vocab_size} token ids and the policy writes {policy.vocab_size}: "
            "it was trained for another vocabulary; train one for this policy"
        )
    for name, trunk in (("policy", policy), ("classifier", classifier)):
        if trunk and trunk.max_length is not None and length > trunk.max_length:
            raise ContextLengthError(
                f"{length} tokens, prompt and answer, are more than the {trunk.max_length} the {name} can read"
            )


@dataclass(frozen=True)
class _Scored:
    """The classifier's outputs for each candidate; row b C + c of `states_BC_H` and `cache` has
    read candidate c of row b.
    """

    ids_B_C: torch.Tensor
    values_B_C_K: torch.Tensor
    states_BC_H: torch.Tensor
    cache: Any


def _score(classifier: ValueReader, ids_B_C: torch.Tensor, before_B_H: torch.Tensor, cache: Any) -> _Scored:
    rows_BC = torch.arange(len(ids_B_C), device=ids_B_C.device).repeat_interleave(ids_B_C.shape[1])
    states_BC_1_H, expanded = classifier.trunk.read(ids_B_C.reshape(-1, 1), classifier.trunk.select(cache, rows_BC))
    values_BC_K = classifier.head(before_B_H[rows_BC], states_BC_1_H[:, 0])
    return _Scored(ids_B_C, values_BC_K.unflatten(0, ids_B_C.shape), states_BC_1_H[:, 0], expanded)


def _advance(
    trunk: Trunk, cache: Any, scored: _Scored, next_B: torch.Tensor, guidance: Guidance
) -> tuple[torch.Tensor, Any]:
    """The classifier's states and cache after the drawn tokens: with others="dropped" each token is
    a candidate, and its rows are reused.
    """
    if guidance.others == "kept":
        states_B_1_H, cache = trunk.read(next_B[:, None], cache)
        return states_B_1_H[:, 0], cache
    candidate_B = (scored.ids_B_C == next_B[:, None]).int().argmax(-1)  # arbitrary after an EOS
    rows_B = torch.arange(len(next_B), device=next_B.device) * scored.ids_B_C.shape[1] + candidate_B
    return scored.states_BC_H[rows_B], trunk.select(scored.cache, rows_B)


def _draw(logprobs_B_V: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling: a row's token depends on its own uniform number alone."""
    cdf_B_V = logprobs_B_V.double().exp().cumsum(-1)
    drawn_B = torch.searchsorted(cdf_B_V, uniform_B.to(cdf_B_V)[:, None] * cdf_B_V[:, -1:], right=True)[:, 0]
    return drawn_B.clamp(max=logprobs_B_V.shape[-1] - 1)


def _kl(guided_B_V: torch.Tensor, reference_B_V: torch.Tensor) -> torch.Tensor:
    """KL(guided || reference) of log-probabilities; the guided ones may be -inf."""
    difference_B_V = torch.where(guided_B_V == -torch.inf, 0, guided_B_V - reference_B_V)
    return (guided_B_V.exp() * difference_B_V).sum(-1)
