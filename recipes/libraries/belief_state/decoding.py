"""Decoding with the Belief State Transformer: fill the gap between a prompt and a goal (section 4
of the paper).

    EOS prompt ... gap ... goal EOS        either side may be empty

`forward` writes the gap from left to right: the forward state grows with every token, the backward
state of the goal stays as it is, and the next-token half of the head chooses. `reverse` is its
mirror image: the backward state grows, the prompt's stays, the previous-token half chooses. The
code below knows one direction, "near" (the side that grows) to "far". The growing side has a KV
cache; what branches off shares it.

    greedy   the likeliest token, until the model says that nothing is missing (EOS)
    beam     best first: the best partial gap by mean logprob is completed greedily, and `top_k` other tokens at each of its places join
             the queue; `rollouts` times
    plan     the same proposals, ranked by how well the far side's own tokens are foretold through the gap: the mean over its tokens x_t of
             log p(x_t | near state before x_t, far state behind it). Without a far side the last
             `tail` tokens of the gap are foretold instead, by the other half of the head

A gap that ends by EOS counts that EOS in its mean logprob. A model trained with min_gap=2 never
says EOS: its gaps have `max_tokens`. Left out: sampling; branches of several rollouts in one batch.
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
    """`tokens` in the order of the document, without EOS; `score`: mean logprob, or what `plan`
    ranks by. `complete`: ended by EOS.
    """

    tokens: list[int]
    score: float
    complete: bool


@torch.no_grad()
def greedy_tokens(model: BeliefState | NextToken, prompts_B_T: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(B, num_tokens): the likeliest continuation of prompts of one length, token by token; for a
    BST towards the empty suffix.
    """
    with autocast(prompts_B_T.device):
        cache: KVCache = []
        # as documents() counts
        position = 0 if bool((prompts_B_T[:, 0] == model.config.eos_id).all()) else 1
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
    """The baseline's continuation up to its EOS. The prompt begins with EOS; for fill-in-the-middle
    it is EOS, goal, <|fim|>, prompt.
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
    """Best first; the greedy one is among them."""
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
    """Best first. `relative`: partial gaps queue by the sum of log p(token) - log p(best) in place
    of the mean logprob.
    """
    gap = _Gap(model, prompt, goal, max_tokens, direction)
    partials = gap.proposals(rollouts, top_k, relative)
    infills = [replace(gap.infill(partial), score=gap.far_score(partial, tail)) for partial in partials]
    return sorted(infills, key=lambda infill: -infill.score)


@dataclass(frozen=True)
class _Partial:
    """A gap as far as it is written, from near to far, and the cache of a rollout that has read at
    least all but its last token.
    """

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0  # summed
    behind_best: float = 0.0  # sum of log p(token) - log p(best)
    complete: bool = False
    cache: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def mean(self) -> float:
        return self.logprob / max(len(self.tokens) + self.complete, 1)


class _Gap:
    def __init__(
        self, model: BeliefState, prompt: Sequence[int], goal: Sequence[int], max_tokens: int, direction: Direction
    ):
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: a gap has room for at least one token")
        eos = model.config.eos_id
        for name, tokens in (("prompt", prompt), ("goal", goal)):
            if bad := [token for token in tokens if not 0 <= token < model.config.vocab_size or token == eos]:
                raise DataError(
                    f"the {name} has the token {bad[0]}, which is EOS or none of the model's {model.config.vocab_size}"
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
        """Completed gaps in the order they were found: the greedy one first."""
        order = count()  # between equals, the one that was found first
        queue: list[tuple[float, int, _Partial]] = [(0.0, next(order), _Partial())]
        completed = []
        while queue and len(completed) < rollouts:
            alternatives: list[_Partial] = []
            completed.append(self.roll_out(heapq.heappop(queue)[2], alternatives, top_k))
            for partial in alternatives:
                heapq.heappush(queue, (-(partial.behind_best if relative else partial.mean), next(order), partial))
        return completed

    @torch.no_grad()
    def roll_out(self, partial: _Partial, alternatives: list[_Partial], top_k: int = 0) -> _Partial:
        """`partial` completed greedily; at each new place the `top_k` likeliest others, EOS never,
        are added to `alternatives`.
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
                for token in self._others(logprobs_V, best, top_k):
                    logprob = float(logprobs_V[token])
                    behind = partial.behind_best + logprob - best_logprob
                    other = _Partial((*partial.tokens, token), partial.logprob + logprob, behind)
                    cached_at.append((other, read))
            partial = replace(partial, logprob=partial.logprob + best_logprob, complete=best == self.eos)
            if partial.complete:
                break
            partial = replace(partial, tokens=(*partial.tokens, best))
            known.append(best)
        alternatives += [replace(other, cache=_cut(cache, length)) for other, length in cached_at]
        return replace(partial, cache=tuple(cache))

    def _others(self, logprobs_V: torch.Tensor, best: int, top_k: int) -> list[int]:
        likeliest = logprobs_V.topk(min(top_k + 2, len(logprobs_V))).indices.tolist()
        return [token for token in likeliest if token not in (best, self.eos)][:top_k]

    @torch.no_grad()
    def far_score(self, partial: _Partial, tail: int) -> float:
        """Mean logprob of the far side's tokens, read through the gap; without a far side, of the
        gap's last tokens, by the other half.
        """
        has_far = len(self.far) > 1
        scored = self.far[:-1] if has_far else list(partial.tokens[-tail:])
        if not scored:
            return -float("inf")  # nothing was written that could be judged
        behind = self.far if has_far else [*scored, self.eos]
        known = [*self.near, *partial.tokens, *(scored if has_far else [])]
        start = len(known) - len(scored) - 1  # the last token before the scored ones
        tokens_1_S = torch.tensor([known[start:-1]], device=self.device)
        with autocast(self.device):
            near_S_H = self.model.extend(self.near_encoder, tokens_1_S, start, list(_cut(partial.cache, start)))[0]
            logprobs_S_V = self._logprobs(near_S_H, self._far_states(behind)[1:], near_half=has_far)
        return float(logprobs_S_V.gather(-1, torch.tensor(scored, device=self.device)[:, None]).mean())

    @torch.no_grad()
    def _far_states(self, tokens: list[int]) -> torch.Tensor:
        """(S, H): the state of each token of the far side, which has read from there outwards.
        `tokens` end with EOS.
        """
        with autocast(self.device):
            return self.model.extend(self.far_encoder, torch.tensor([tokens[::-1]], device=self.device), 0, [])[0].flip(
                0
            )

    def _logprobs(self, near: torch.Tensor, far: torch.Tensor, near_half: bool) -> torch.Tensor:
        """Of the token behind the near state (`near_half`), or before the far one; in document
        order they are f and b, or b and f.
        """
        next_logits, prev_logits = (
            self.model.text_head(near, far) if self.is_forward else self.model.text_head(far, near)
        )
        return (next_logits if near_half == self.is_forward else prev_logits).double().log_softmax(-1)


def _cut(
    cache: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """The first `length` tokens of a cache, as views."""
    return tuple((k[:, :, :length], v[:, :, :length]) for k, v in cache)
