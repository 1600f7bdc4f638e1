"""Decoding with a KV cache against recomputing everything, in both directions; best-first search
against enumeration.
"""

import itertools
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from posttrain.backend.errors import DataError
from recipes.libraries.belief_state.decoding import (
    Direction,
    greedy_tokens,
    infill_beam,
    infill_greedy,
    infill_plan,
    next_token_greedy,
)
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig, NextToken

EOS, VOCAB = 4, 5
CONFIG = BeliefStateConfig(VOCAB, EOS, num_layers=2, num_heads=2, hidden=16, init_std=0.15)
PROMPT, GOAL = [0, 1, 3], [2, 3, 1, 0]


@pytest.fixture(scope="module")
def model() -> BeliefState:
    return BeliefState(CONFIG, seed=14).double()


@torch.no_grad()
def logprobs(m: BeliefState, prefix: Sequence[int], suffix: Sequence[int], half: int) -> torch.Tensor:
    """Of the token behind EOS, prefix (half 0), or before suffix, EOS (half 1): nothing cached,
    everything from tokens.
    """
    f = m.forward_states(torch.tensor([[EOS, *prefix]]))[0, -1]
    b = m.backward_states(torch.tensor([[*suffix, EOS]]))[0, 0]
    return m.text_head(f, b)[half].log_softmax(-1)


@cache
def foretold(m: BeliefState, direction: Direction, written: tuple[int, ...]) -> torch.Tensor:
    """Of the next token of a gap whose tokens so far are `written`, in the order they were written
    in.
    """
    if direction == "forward":
        return logprobs(m, [*PROMPT, *written], GOAL, 0)
    return logprobs(m, PROMPT, [*reversed(written), *GOAL], 1)


def greedily(
    m: BeliefState, direction: Direction, written: Sequence[int], max_tokens: int
) -> tuple[list[int], float, bool]:
    """The completion of `written` in writing order, its mean logprob, and whether it ended by
    EOS.
    """
    tokens = list(written)
    while (best := int(foretold(m, direction, tuple(tokens)).argmax())) != EOS and len(tokens) < max_tokens:
        tokens.append(best)
    steps = [*tokens, EOS] if best == EOS else tokens
    total = sum(float(foretold(m, direction, tuple(steps[:k]))[token]) for k, token in enumerate(steps))
    return tokens, total / max(len(steps), 1), best == EOS


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_greedy_with_a_cache_is_greedy_without(model: BeliefState, direction: Direction) -> None:
    infill = infill_greedy(model, PROMPT, GOAL, 7, direction)
    tokens, score, complete = greedily(model, direction, [], 7)
    assert infill.tokens == (tokens if direction == "forward" else tokens[::-1]) and len(tokens) >= 3
    assert infill.score == pytest.approx(score, abs=1e-9) and infill.complete == complete


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_search_with_room_for_all_finds_every_gap(model: BeliefState, direction: Direction) -> None:
    found = infill_beam(model, PROMPT, GOAL, 2, direction, rollouts=1000, top_k=VOCAB)
    expected = {}
    for length in range(3):
        for written in itertools.product(range(VOCAB - 1), repeat=length):
            tokens, score, complete = greedily(model, direction, written, 2)
            expected[tuple(tokens if direction == "forward" else tokens[::-1]), complete] = score
    assert {(tuple(infill.tokens), infill.complete): infill.score for infill in found} == pytest.approx(
        expected, abs=1e-9
    )
    assert len(found) == len(expected) > 10
    assert [infill.score for infill in found] == sorted((infill.score for infill in found), reverse=True)


# Trap: reverse decoding with the wrong side fixed.
@pytest.mark.parametrize(("rollouts", "relative"), [(1, False), (4, True)])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_plans_are_ranked_by_the_far_sides_tokens(
    model: BeliefState, direction: Direction, rollouts: int, relative: bool
) -> None:
    plans = infill_plan(model, PROMPT, GOAL, 4, direction, rollouts, top_k=2, relative=relative)
    assert len(plans) == rollouts and len({tuple(plan.tokens) for plan in plans}) == rollouts
    for plan in plans:
        if direction == "forward":
            terms = [
                logprobs(model, [*PROMPT, *plan.tokens, *GOAL[:t]], GOAL[t + 1 :], 0)[GOAL[t]] for t in range(len(GOAL))
            ]
        else:
            terms = [
                logprobs(model, PROMPT[:t], [*PROMPT[t + 1 :], *plan.tokens, *GOAL], 1)[PROMPT[t]]
                for t in range(len(PROMPT))
            ]
        assert plan.score == pytest.approx(float(torch.stack(terms).mean()), abs=1e-9)
    assert [plan.score for plan in plans] == sorted((plan.score for plan in plans), reverse=True)
    greedy = infill_greedy(model, PROMPT, GOAL, 4, direction)
    assert greedy.tokens in [plan.tokens for plan in plans]


def test_without_a_goal_the_other_half_judges_the_tail(model: BeliefState) -> None:
    (plan,) = infill_plan(model, PROMPT, [], 6, rollouts=1, tail=2)
    written = plan.tokens
    assert len(written) >= 2
    before, last = [*PROMPT, *written[:-2]], written[-2:]
    terms = [logprobs(model, before, last[1:], 1)[last[0]], logprobs(model, [*before, last[0]], [], 1)[last[1]]]
    assert plan.score == pytest.approx(float(torch.stack(terms).mean()), abs=1e-9)


def test_batched_greedy_equals_one_by_one_without_a_cache(model: BeliefState) -> None:
    baseline = NextToken(CONFIG, seed=1).double()
    prompts_B_T = torch.tensor([[1, 2, 3], [3, 0, 0]])
    for m in (model, baseline):
        rows_B_T = prompts_B_T
        for _ in range(5):
            f = m.extend(m.forward_encoder, rows_B_T, 1, [])[:, -1]
            logits = m.unembedding(f) if isinstance(m, NextToken) else m.text_head(f, m.empty_suffix().expand_as(f))[0]
            rows_B_T = torch.cat([rows_B_T, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(greedy_tokens(m, prompts_B_T, 5), rows_B_T[:, 3:])


def test_the_baseline_writes_until_its_eos() -> None:
    baseline = NextToken(CONFIG, seed=0).double()
    prompt, tokens, total = [EOS, *PROMPT], [], 0.0
    with torch.no_grad():
        while True:
            p = baseline.logits(torch.tensor([[*prompt, *tokens]]))[0, -1].log_softmax(-1)
            if (best := int(p.argmax())) == EOS or len(tokens) == 8:
                break
            total, tokens = total + float(p[best]), [*tokens, best]
    infill = next_token_greedy(baseline, prompt, 8)
    count = len(tokens) + (best == EOS)
    assert infill.tokens == tokens and infill.complete == (best == EOS)
    assert infill.score == pytest.approx((total + (float(p[EOS]) if best == EOS else 0.0)) / count, abs=1e-9)


def test_an_eos_within_a_side_is_refused(model: BeliefState) -> None:
    with pytest.raises(DataError, match="the goal has the token 4"):
        infill_greedy(model, PROMPT, [1, EOS], 4)
