"""Infilling with the Belief State Transformer (section 4 of the paper): greedy, best-first beam and
goal-conditioned planning, forward or in reverse, with a KV cache.

    EOS prompt ... gap ... goal EOS        prompt and goal may be empty

Left out: sampling; branches of several rollouts in one batch.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import torch

from posttrain.backend.errors import ConfigError, DataError
from recipes.libraries.belief_state.blocks import KVCache
from recipes.libraries.belief_state.losses import autocast
from recipes.libraries.belief_state.model import BeliefState, NextToken

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Infill:
    """`tokens` in document order, without EOS. `score`: mean logprob per token, the final EOS
    included; of infill_plan, its ranking score. `complete`: ended by EOS.
    """

    tokens: list[int]
    score: float
    complete: bool


@torch.no_grad()
def greedy_tokens(model: BeliefState | NextToken, prompts_B_T: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(B, num_tokens): greedy continuation of prompts of equal length; a BST uses the empty
    suffix.
    """
    with autocast(prompts_B_T.device):
        cache: KVCache = []
        starts_with_eos = bool((prompts_B_T[:, 0] == model.config.eos_id).all())
        position = 0 if starts_with_eos else 1  # as model.documents() numbers positions
        tokens_B_T, chosen = prompts_B_T, []
        empty_H = model.empty_suffix() if isinstance(model, BeliefState) else None
        for _ in range(num_tokens):
            state_B_H = model.extend(model.forward_encoder, tokens_B_T, position, cache)[:, -1]
            position += tokens_B_T.shape[1]
            if isinstance(model, BeliefState):
                logits_B_V = model.text_head(state_B_H, empty_H.expand_as(state_B_H))[0]  # type: ignore[union-attr]
            else:
                logits_B_V = model.unembedding(state_B_H)
            tokens_B_T = logits_B_V.argmax(-1, keepdim=True)
            chosen.append(tokens_B_T)
    return torch.cat(chosen, dim=1)


@torch.no_grad()
def next_token_greedy(model: NextToken, prompt: Sequence[int], max_tokens: int) -> Infill:
    """The baseline's greedy continuation up to EOS. `prompt` begins with EOS; for
    fill-in-the-middle it is EOS, goal, <|fim|>, prompt.
    """
    cache: KVCache = []
    feed, position, chosen, total = list(prompt), 0, [], 0.0
    while True:
        tokens_1_T = torch.tensor([feed], device=model.embedding.weight.device)
        with autocast(tokens_1_T.device):
            logits_V = model.unembedding(model.extend(model.forward_encoder, tokens_1_T, position, cache)[0, -1])
        logprobs_V = logits_V.double().log_softmax(-1)
        position += len(feed)
        best = int(logprobs_V.argmax())
        if best != model.config.eos_id and len(chosen) == max_tokens:
            return Infill(chosen, total / max(len(chosen), 1), complete=False)
        total += float(logprobs_V[best])
        if best == model.config.eos_id:
            return Infill(chosen, total / (len(chosen) + 1), complete=True)
        chosen.append(best)
        feed = [best]


def infill_greedy(
    model: BeliefState, prompt: Sequence[int], goal: Sequence[int], max_tokens: int, direction: Direction = "forward"
) -> Infill:
    """The likeliest token at each step, until EOS or `max_tokens`. A model trained with min_gap=2
    never predicts EOS.
    """
    gap = _Gap(model, prompt, goal, max_tokens, direction)
    return gap.infill(gap.roll_out(_Partial(), []))


def infill_beam(
    model: BeliefState,
    prompt: Sequence[int],
    goal: Sequence[int],
    max_tokens: int,
    direction: Direction = "forward",
    rollouts: int = 10,
    top_k: int = 5,
) -> list[Infill]:
    """Best-first search: the partial gap with the best mean logprob is completed greedily, and the
    `top_k` alternatives at each position join the queue; `rollouts` times. Sorted by score; the
    greedy infill is among them.
    """
    gap = _Gap(model, prompt, goal, max_tokens, direction)
    infills = [gap.infill(partial) for partial in gap.proposals(rollouts, top_k, relative=False)]
    return sorted(infills, key=lambda infill: -infill.score)


def infill_plan(
    model: BeliefState,
    prompt: Sequence[int],
    goal: Sequence[int],
    max_tokens: int,
    direction: Direction = "forward",
    rollouts: int = 10,
    top_k: int = 5,
    relative: bool = False,
    tail: int = 16,
) -> list[Infill]:
    """Proposals of the beam, ranked by how well the gap predicts the far side: the mean over its
    tokens x_t of log p(x_t | near state before x_t, far state after it). Without a far side, the
    last `tail` tokens of the gap are scored by the other half of the head. `relative`: partial gaps
    queue by the sum of log p(token) - log p(best) in place of the mean logprob.
    """
    gap = _Gap(model, prompt, goal, max_tokens, direction)
    partials = gap.proposals(rollouts, top_k, relative)
    infills = [replace(gap.infill(partial), score=gap.far_score(partial, tail)) for partial in partials]
    return sorted(infills, key=lambda infill: -infill.score)


@dataclass(frozen=True)
class _Partial:
    """A partial gap, from near to far, and the cache of a rollout that has read at least all its
    tokens but the last.
    """

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0  # summed
    relative_logprob: float = 0.0  # sum of log p(token) - log p(best)
    complete: bool = False
    cache: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def mean(self) -> float:
        return self.logprob / max(len(self.tokens) + self.complete, 1)


class _Gap:
    """Decodes in one direction, from the near side, whose state grows with every token, to the far
    side, whose state is fixed. Forward: near is the prompt. Reverse: near is the goal, flipped.
    """

    def __init__(
        self, model: BeliefState, prompt: Sequence[int], goal: Sequence[int], max_tokens: int, direction: Direction
    ):
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: a gap has room for at least one token")
        eos = model.config.eos_id
        for name, tokens in (("prompt", prompt), ("goal", goal)):
            if bad := [token for token in tokens if not 0 <= token < model.config.vocab_size or token == eos]:
                raise DataError(
                    f"the {name} has the token {bad[0]}, which is EOS or not one of the model's {model.config.vocab_size}"
                )
        self.model, self.max_tokens, self.is_forward, self.eos = model, max_tokens, direction == "forward", eos
        self.device = model.embedding.weight.device
        self.near = [eos, *(prompt if self.is_forward else reversed(goal))]
        self.far = [*(goal if self.is_forward else reversed(prompt)), eos]  # from the gap outwards
        encoders = model.forward_encoder, model.backward_encoder
        self.near_encoder, self.far_encoder = encoders if self.is_forward else encoders[::-1]
        self.far_state_H = self._far_states(self.far)[0]

    def infill(self, partial: _Partial) -> Infill:
        tokens = list(partial.tokens)
        return Infill(tokens if self.is_forward else tokens[::-1], partial.mean, partial.complete)

    def proposals(self, rollouts: int, top_k: int, relative: bool) -> list[_Partial]:
        """Completed gaps in search order: the greedy gap first."""
        order = count()  # breaks ties in search order
        queue: list[tuple[float, int, _Partial]] = [(0.0, next(order), _Partial())]
        completed = []
        while queue and len(completed) < rollouts:
            alternatives: list[_Partial] = []
            completed.append(self.roll_out(heapq.heappop(queue)[2], alternatives, top_k))
            for partial in alternatives:
                heapq.heappush(queue, (-(partial.relative_logprob if relative else partial.mean), next(order), partial))
        return completed

    @torch.no_grad()
    def roll_out(self, partial: _Partial, alternatives: list[_Partial], top_k: int = 0) -> _Partial:
        """`partial` completed greedily. At each new position the `top_k` likeliest other tokens,
        never EOS, are added to `alternatives`.
        """
        known = [*self.near, *partial.tokens]
        cache: KVCache = list(partial.cache)
        read = cache[0][0].shape[2] if cache else 0
        cached_at: list[tuple[_Partial, int]] = []
        while True:
            with autocast(self.device):
                tokens_1_T = torch.tensor([known[read:]], device=self.device)
                state_H = self.model.extend(self.near_encoder, tokens_1_T, read, cache)[0, -1]
                logprobs_V = self._logprobs(state_H, self.far_state_H, near_half=True)
            read = len(known)
            best = int(logprobs_V.argmax())
            best_logprob = float(logprobs_V[best])
            if len(partial.tokens) == self.max_tokens and best != self.eos:
                break
            if top_k and len(partial.tokens) < self.max_tokens:
                for token in self._alternatives(logprobs_V, best, top_k):
                    logprob = float(logprobs_V[token])
                    relative = partial.relative_logprob + logprob - best_logprob
                    branch = _Partial((*partial.tokens, token), partial.logprob + logprob, relative)
                    cached_at.append((branch, read))
            partial = replace(partial, logprob=partial.logprob + best_logprob, complete=best == self.eos)
            if partial.complete:
                break
            partial = replace(partial, tokens=(*partial.tokens, best))
            known.append(best)
        alternatives += [replace(branch, cache=_cut(cache, length)) for branch, length in cached_at]
        return replace(partial, cache=tuple(cache))

    def _alternatives(self, logprobs_V: torch.Tensor, best: int, top_k: int) -> list[int]:
        likeliest = logprobs_V.topk(min(top_k + 2, len(logprobs_V))).indices.tolist()
        return [token for token in likeliest if token not in (best, self.eos)][:top_k]

    @torch.no_grad()
    def far_score(self, partial: _Partial, tail: int) -> float:
        """The score of infill_plan."""
        has_far = len(self.far) > 1
        scored = self.far[:-1] if has_far else list(partial.tokens[-tail:])
        if not scored:
            return -float("inf")  # no token to score
        following = self.far if has_far else [*scored, self.eos]
        known = [*self.near, *partial.tokens, *(scored if has_far else [])]
        start = len(known) - len(scored) - 1  # the last token before the scored tokens
        tokens_1_S = torch.tensor([known[start:-1]], device=self.device)
        with autocast(self.device):
            near_S_H = self.model.extend(self.near_encoder, tokens_1_S, start, list(_cut(partial.cache, start)))[0]
            logprobs_S_V = self._logprobs(near_S_H, self._far_states(following)[1:], near_half=has_far)
        return float(logprobs_S_V.gather(-1, torch.tensor(scored, device=self.device)[:, None]).mean())

    @torch.no_grad()
    def _far_states(self, tokens: list[int]) -> torch.Tensor:
        """(S, H): states of the far side's tokens, read from the far end; `tokens` end with EOS."""
        with autocast(self.device):
            return self.model.extend(self.far_encoder, torch.tensor([tokens[::-1]], device=self.device), 0, [])[0].flip(
                0
            )

    def _logprobs(self, near: torch.Tensor, far: torch.Tensor, near_half: bool) -> torch.Tensor:
        """(..., V) of the token after the near state (`near_half`), or before the far state."""
        next_logits, prev_logits = (
            self.model.text_head(near, far) if self.is_forward else self.model.text_head(far, near)
        )
        return (next_logits if near_half == self.is_forward else prev_logits).double().log_softmax(-1)


def _cut(
    cache: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """The first `length` tokens of a cache, as views."""
    return tuple((k[:, :, :length], v[:, :, :length]) for k, v in cache)
