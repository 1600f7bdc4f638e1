"""Our requests as vLLM's SamplingParams, and vLLM's outputs as our answers. vLLM lists logprobs flat:
those of position t are the entries from start_indices[t] to end_indices[t].
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from posttrain.backend.engine import Sampled, SequenceRequest
from posttrain.backend.errors import ConfigError
from posttrain.backend.prompt_scores import ScoredPrompt, score_prompt
from posttrain.backend.types import SampledSequence
from posttrain.backend.vllm_refusals import USE_TORCH

MOST_LISTED = 2**22  # logprobs of one prompt that vLLM lists as Python numbers, some 100 bytes each


def check_listed(request: SequenceRequest, vocabulary: int) -> None:
    """ConfigError for more logprobs of a prompt than vLLM lists in the memory there is."""
    if request.scores and len(request.prompt) * vocabulary > MOST_LISTED:
        raise ConfigError(
            f"vLLM lists {vocabulary} logprobs at each of {len(request.prompt)} tokens of the prompt for "
            f"target_prompt_logprobs or prompt_alt_tokens_k, more than {MOST_LISTED} in all: {USE_TORCH}"
        )


def vllm_params(request: SequenceRequest, seeded: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params, stop = request.params, request.params.stop
    stop_list = [stop] if isinstance(stop, str) else list(stop or [])
    strings = [s for s in stop_list if isinstance(s, str)]
    return SamplingParams(
        max_tokens=request.max_tokens,
        seed=request.seed if seeded else None,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        stop=strings,
        stop_token_ids=[s for s in stop_list if isinstance(s, int)],
        ignore_eos=stop is not None and not stop_list,
        logprobs=request.topk_sample,
        flat_logprobs=True,  # lists of numbers instead of an object per token
        prompt_logprobs=-1 if request.scores else request.topk_prompt,
        skip_special_tokens=False,
        detokenize=bool(strings),
        skip_clone=True,  # made for this request alone
        output_kind=RequestOutputKind.CUMULATIVE if request.on_tokens else RequestOutputKind.FINAL_ONLY,
    )


def read_answer(request: SequenceRequest, output: Any, vocabulary: int) -> Sampled:
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):  # aborted, an error inside vLLM, or a repetition it refuses
        failure = f"vLLM finished it with {completion.finish_reason!r}"
        return Sampled(SampledSequence([], [], "length"), failure=failure)
    flat = completion.logprobs
    logprobs = [flat.logprobs[start] for start in flat.start_indices]  # of a position, the sampled token is first
    topk = (
        [_most_likely(entries)[: request.topk_sample] for entries in _positions(flat)] if request.topk_sample else None
    )
    sampled = Sampled(SampledSequence(list(completion.token_ids), logprobs, completion.finish_reason, topk))
    if request.topk_prompt is not None and output.prompt_logprobs is not None:
        _read_prompt(sampled, output, request.topk_prompt)
    if request.scores:
        sampled.scored = _scored(request, output, vocabulary)
    return sampled


def _read_prompt(sampled: Sampled, output: Any, k: int) -> None:
    """Adds the logprobs of the prompt's tokens, and of the k most likely at each and that token."""
    sampled.prompt_logprobs, sampled.topk_prompt_logprobs = [], []
    for token, entries in zip(output.prompt_token_ids, _positions(output.prompt_logprobs), strict=True):
        sampled.prompt_logprobs.append(entries[token] if entries else None)
        best = sorted(entries.items(), key=lambda entry: -entry[1])
        listed = [entry for rank, entry in enumerate(best) if rank < k or entry[0] == token]
        sampled.topk_prompt_logprobs.append(listed or None)


def _scored(request: SequenceRequest, output: Any, vocabulary: int) -> ScoredPrompt:
    assert request.scores
    logprobs_TV = torch.full((len(request.prompt) - 1, vocabulary), -torch.inf)
    for row_V, entries in zip(logprobs_TV, [*_positions(output.prompt_logprobs)][1:], strict=True):
        row_V[torch.tensor([*entries])] = torch.tensor([*entries.values()])
    return score_prompt(request.scores, len(logprobs_TV), vocabulary, logprobs_TV.__getitem__)


def _positions(flat: Any) -> Iterator[dict[int, float]]:
    """Logprobs of the tokens at each position, without repetition; empty at the first of a prompt."""
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        yield dict(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True))


def _most_likely(entries: dict[int, float]) -> list[tuple[int, float]]:
    possible = [entry for entry in entries.items() if entry[1] > -math.inf]
    return sorted(possible, key=lambda entry: -entry[1])
