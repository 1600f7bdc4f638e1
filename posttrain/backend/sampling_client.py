"""SamplingClient: tokens in, tokens and logprobs out, from one version of one policy's weights, or
from its newest.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Self, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.backend.engine import EngineThread, SequenceRequest
from posttrain.backend.errors import ClosedError, ConfigError, ContextLengthError, DataError
from posttrain.backend.futures import APIFuture, Ready, accepted, answered
from posttrain.backend.prompt_scores import PromptScores, check_scores
from posttrain.backend.random_state import seed_of
from posttrain.backend.ranges import COUNT, Range, RangeError
from posttrain.backend.sampler_pool import SamplerPool
from posttrain.backend.types import ModelInput, SampleResponse, SamplingParams, TensorData
from posttrain.backend.weight_versions import Policy

T = TypeVar("T")


class SamplingClient(Ready):
    """An immutable snapshot: it answers with its weights however far the policy moves on. With
    `follow`, the live policy. Without `keep`, the weights are never copied, and calls after the
    next sync raise StaleSamplerError. `vocabulary` is the model's number of token ids, which may
    exceed the tokenizer's."""

    def __init__(
        self,
        engine: EngineThread | SamplerPool,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        vocabulary: int,
        follow: bool = False,
        base_model: str = "",
        keep: bool = True,
    ):
        self._base_model, self._policy, self._keep = base_model, policy, keep
        self._engine, self._tokenizer, self.max_length, self.vocabulary = engine, tokenizer, max_length, vocabulary
        self._version = None if follow else policy.newest
        self._let_go = engine.hold(self)
        self._let_version_go = self._version.hold(self) if self._version and keep else None
        self._closed = False

    @property
    def num_replicas(self) -> int:
        """Engines in processes of their own that answer; 1 for the one in this process."""
        return self._engine.num_replicas if isinstance(self._engine, SamplerPool) else 1

    @property
    def has_stopped(self) -> bool:
        """Whether its engine has ended, so that all calls fail."""
        return self._engine.has_stopped

    @property
    def holds_old_weights(self) -> bool:
        """Whether it keeps a version that its policy has left."""
        version = self._version
        return self._keep and not self._closed and version is not None and version is not self._policy.newest

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
        *,
        on_tokens: Callable[[int, list[int]], object] | None = None,
    ) -> APIFuture[SampleResponse]:
        """Samples `num_samples` continuations. Sample i has seed + i; calls without a seed are
        numbered.

        `max_tokens` None, or more than fits, means the rest of the context. `on_tokens` is called
        in the engine's thread with i and the tokens of sample i so far, and must not wait. Prompt
        logprobs before the last `prompt_logprobs_last_n` are None. `target_prompt_logprobs` has token
        ids to score at each position of the prompt but the first, int64 (T, K), -1 for none;
        `prompt_alt_tokens_k` tokens are drawn at each of them.
        """
        tokens = _tokens(prompt)
        self._check_params(sampling_params)
        _check_topk(
            self.vocabulary, topk_prompt_logprobs=topk_prompt_logprobs, topk_sample_logprobs=topk_sample_logprobs
        )
        include_prompt_logprobs = include_prompt_logprobs or bool(topk_prompt_logprobs)
        if prompt_logprobs_last_n is not None and not include_prompt_logprobs:
            raise ConfigError("prompt_logprobs_last_n is of prompt logprobs: set include_prompt_logprobs")
        last = _check_last(tokens, prompt_logprobs_last_n)
        room = self._check(tokens, num_samples)
        check_scores(len(tokens), self.vocabulary, target_prompt_logprobs, prompt_alt_tokens_k)
        seed = sampling_params.seed
        if seed is None:
            seed = seed_of(next(self._policy.unseeded_calls))
        scores = None
        if target_prompt_logprobs is not None or prompt_alt_tokens_k:
            targets_TK = None if target_prompt_logprobs is None else target_prompt_logprobs.array
            scores = PromptScores(targets_TK, prompt_alt_tokens_k, sampling_params.temperature, seed % 2**63)
        requests = [
            SequenceRequest(
                tokens,
                sampling_params,
                max_tokens=min(room, sampling_params.max_tokens or room),
                seed=(seed + i) % 2**63,
                topk_prompt=topk_prompt_logprobs if include_prompt_logprobs and i == 0 else None,
                on_tokens=on_tokens and partial(on_tokens, i),
                topk_sample=topk_sample_logprobs,
                scores=scores if i == 0 else None,
            )
            for i in range(num_samples)
        ]
        return self._submit(requests, partial(_of_last, last))

    sample_async = answered(sample)

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """log p(token t | tokens before t) at temperature 1; element 0 is None. The prompt may fill
        all but one token of the context. Elements before the last `prompt_logprobs_last_n` are
        None."""
        tokens, params = _tokens(prompt), SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        self._check(tokens, 1)
        last = _check_last(tokens, prompt_logprobs_last_n)
        request = SequenceRequest(tokens, params, 1, seed=0, topk_prompt=0)
        return self._submit([request], lambda response: _prompt_logprobs(_of_last(last, response)))

    compute_logprobs_async = answered(compute_logprobs)

    def get_base_model(self) -> str:
        """The name or folder of the model."""
        return self._base_model

    get_base_model_async = accepted(get_base_model)

    def _submit(self, requests: list[SequenceRequest], answer: Callable[[SampleResponse], T]) -> APIFuture[T]:
        if self._closed:
            raise ClosedError("this sampling client was closed")
        return self._engine.submit(self, requests, self._policy, self._version, self._keep, answer)

    def close(self) -> None:
        """Releases the sampler. An engine without clients ends; its calls in flight fail with
        EngineError. A client without references closes after its last call."""
        self._closed = True
        self._let_go()
        if self._let_version_go:
            self._let_version_go()
        self._engine.close_if_unheld()

    def __reduce__(self) -> str:
        raise ConfigError(
            "a sampling client does not pickle: its engine is in this process. Other processes sample through "
            "posttrain-serve, whose clients of the tinker SDK pickle"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise DataError(f"the sampling_params are {params!r:.100}, not SamplingParams")
        stops = params.stop if isinstance(params.stop, Sequence) else ()
        if wrong := [stop for stop in stops if isinstance(stop, int) and not 0 <= stop < self.vocabulary]:
            raise RangeError("stop", wrong[0], f"a token of the vocabulary of {self.vocabulary}, or a text")

    def _check(self, tokens: Sequence[int], num_samples: int) -> int:
        """Number of tokens that fit after the prompt. Bad input raises here, not in the engine."""
        if not tokens:
            raise DataError("the prompt is empty: there is nothing to sample from")
        check_prompt_fits(len(tokens), self.max_length)
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise DataError(
                f"the prompt has a token outside the vocabulary of {self.vocabulary}: was it made with another "
                "tokenizer?"
            )
        if needs := COUNT.needs(num_samples):
            raise RangeError("num_samples", num_samples, needs)
        return self.max_length - len(tokens)


def check_prompt_fits(prompt_tokens: int, max_length: int) -> None:
    """ContextLengthError for a prompt after which not one token fits."""
    if prompt_tokens >= max_length:
        raise ContextLengthError(
            f"the prompt is too long: it has {prompt_tokens} tokens, and the context of {max_length} "
            "(backend.max_length) has no room for an answer"
        )


def _tokens(prompt: ModelInput) -> list[int]:
    if not isinstance(prompt, ModelInput):
        raise DataError(f"the prompt is {prompt!r:.100}, not a ModelInput: ModelInput.from_ints(tokens) makes one")
    tokens, whole = prompt.to_ints(), int | np.integer
    if not all(issubclass(kind, whole) for kind in {*map(type, tokens)}):  # of each token, it would take half of a call
        wrong = next(token for token in tokens if not isinstance(token, whole))
        raise DataError(f"the prompt has the token {wrong!r:.100}: tokens are whole numbers")
    return tokens


def _prompt_logprobs(response: SampleResponse) -> list[float | None]:
    assert response.prompt_logprobs is not None
    return response.prompt_logprobs


def _check_last(tokens: Sequence[int], last_n: int | None) -> int:
    """The number of prompt positions with logprobs."""
    if last_n is None:
        return len(tokens)
    if needs := Range(1, max(len(tokens) - 1, 1), whole=True).needs(last_n):
        raise RangeError("prompt_logprobs_last_n", last_n, f"{needs}, for a prompt of {len(tokens)} tokens")
    return last_n


def _of_last(last: int, response: SampleResponse) -> SampleResponse:
    """Without prompt logprobs before the last positions."""
    prompt, topk = response.prompt_logprobs, response.topk_prompt_logprobs
    if prompt is None or last >= len(prompt):
        return response
    none = [None] * (len(prompt) - last)
    prompt, topk = [*none, *prompt[-last:]], topk and [*none, *topk[-last:]]
    return replace(response, prompt_logprobs=prompt, topk_prompt_logprobs=topk)


def _check_topk(vocabulary: int, **given: int) -> None:
    for name, k in given.items():
        if needs := Range(0, vocabulary, whole=True).needs(k):
            raise RangeError(name, k, needs)
