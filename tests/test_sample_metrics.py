"""pass@k, maj@k and best@k against the definition: every k-subset written out."""

import asyncio
import math
from itertools import combinations

import numpy as np
import pytest

from envs.arithmetic import ArithmeticBuilder
from envs.math_word import MathGrader
from envs.problem import Problem
from posttrain.backend.errors import ConfigError
from posttrain.renderers import get_renderer
from rl.evaluators import SamplesEvaluator, answer, sample_metrics, sample_values
from rl.sample_metrics import best_at_k, maj_at_k, majority, mean_and_stderr, pass_at_k, ratio_values, t_975
from rl.types import ModelInput, RolloutError, TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition


def over_subsets(n: int, k: int, score) -> float:  # noqa: ANN001
    return float(np.mean([score(chosen) for chosen in combinations(range(n), k)]))


def vote(answers: list[str | None]) -> str | None:
    """The rule, said another way: most votes, then earliest."""
    given = [answer for answer in answers if answer is not None]
    return min(set(given), key=lambda answer: (-given.count(answer), given.index(answer)), default=None)


# Trap: biased pass@k, ties of a majority.
@pytest.mark.parametrize("seed", range(20))
def test_estimators_equal_the_enumeration_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    answers = [["4", "5", "6", None][choice] for choice in rng.integers(0, 4, n)]
    right = [answer == "4" for answer in answers]
    rewards = rng.choice([-0.1, 0.0, 0.5, 1.0], n).tolist()
    for k in range(1, n + 1):
        assert pass_at_k(sum(right), n, k) == pytest.approx(
            over_subsets(n, k, lambda chosen: any(right[i] for i in chosen))
        )
        assert best_at_k(rewards, k) == pytest.approx(
            over_subsets(n, k, lambda chosen: max(rewards[i] for i in chosen))
        )
        wins = over_subsets(n, k, lambda chosen: vote([answers[i] for i in chosen]) == "4")
        assert maj_at_k(answers, right, k) == pytest.approx(wins)


def test_pass_at_k_is_unbiased():
    rate, n, k = 0.3, 6, 3
    counts = np.random.default_rng(0).binomial(n, rate, 20_000)
    assert np.mean([pass_at_k(int(c), n, k) for c in counts]) == pytest.approx(1 - (1 - rate) ** k, abs=0.01)


def test_ties_go_to_the_earliest_and_no_answer_does_not_vote():
    assert majority(["5", "4", "4", "5"]) == 0
    assert majority([None, None, "4", "5"]) == 2
    assert majority([None, None]) is None
    for right in (False, True):
        assert maj_at_k([None, None], [right, right], 2) == 0


def test_many_subsets_are_estimated_and_always_alike():
    answers = ["4"] * 12 + ["5"] * 12
    right = [answer == "4" for answer in answers]
    estimate = maj_at_k(answers, right, 11)
    assert estimate == maj_at_k(answers, right, 11) == pytest.approx(0.5, abs=0.04)
    # each subset has different samples, in order: half of these are ties
    few = answers[6:18], right[6:18], 10
    assert maj_at_k(*few, max_subsets=60) == pytest.approx(maj_at_k(*few), abs=0.1)


def test_k_out_of_range_is_refused():
    for k in (0, 5):
        for estimate in (lambda k: pass_at_k(2, 4, k), lambda k: best_at_k([1.0] * 4, k),
                         lambda k: maj_at_k(["5"] * 4, [True] * 4, k)):  # fmt: skip
            with pytest.raises(ConfigError, match="of 4 samples"):
                estimate(k)
    with pytest.raises(ValueError, match="2 answers and 1 grades"):
        maj_at_k(["5", "6"], [True], 1)
    assert mean_and_stderr([0.0, 1.0]) == pytest.approx((0.5, 0.5))
    assert mean_and_stderr([1.0]) == (1.0, 0.0)


def sampled(answers: list[str], right: str, lost: int = 0) -> TrajectoryGroup:
    turns = [
        Transition(
            ModelInput.from_ints([5]),
            TokensWithLogprobs([6], [-1.0]),
            float(answer == right),
            True,
            {"format": float(answer.isdigit()), "correct": float(answer == right)},
            {"extracted": answer},
        )
        for answer in answers
    ]
    n = len(turns)
    return TrajectoryGroup(
        [Trajectory([turn]) for turn in turns], [0.0] * n, [{}] * n, errors=[RolloutError("lost")] * lost
    )


def test_metrics_of_groups_by_hand():
    groups = [sampled(["4", "4", "5"], "4"), sampled(["x", "7", "8"], "7"), sampled(["9"], "9", lost=2)]
    metrics = sample_metrics(groups, (1, 3), "test/env/all")
    assert metrics["test/env/all/pass@1"] == pytest.approx(np.mean([2 / 3, 1 / 3, 1]))
    # the third problem has not three samples
    assert metrics["test/env/all/pass@3"] == metrics["test/env/all/best@3"] == 1.0
    assert metrics["test/env/all/maj@3"] == 1.0  # x is no answer; 7 came before 8
    assert metrics["test/env/all/pass@1_stderr"] == pytest.approx(np.std([2 / 3, 1 / 3, 1], ddof=1) / np.sqrt(3))


# Trap: three of five samples say a half, as texts each has one vote.
def test_samples_vote_by_equal_answers_and_not_by_texts():
    problem = Problem("Half of one?", "1/2", MathGrader())
    turns = []
    for text in (r"\boxed{3}", r"\boxed{\frac12}", r"\boxed{3}", r"\boxed{0.5}", r"\boxed{.50}"):
        value, metrics, logs = asyncio.run(problem.scored(text, truncated=False))
        turn = Transition(ModelInput.from_ints([5]), TokensWithLogprobs([6], [-1.0]), value, True, metrics, logs)
        turns.append(Trajectory([turn]))
    assert [answer(turn) for turn in turns] == ["3", "1/2", "3", "1/2", "1/2"]
    assert turns[3].transitions[0].logs["extracted"] == "0.5", "the transcript has it as it was written"
    assert sample_values([TrajectoryGroup(turns, [0.0] * 5, [{}] * 5)], [5])["maj@5"] == [1.0]


def test_intervals_have_95_percent_of_students_density():
    """Integrated by the midpoint rule."""
    for count in range(2, 32):
        n, x = count - 1, (np.arange(10_000) + 0.5) / 10_000 * t_975(count)
        peak = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        density = peak * (1 + x**2 / n) ** (-(n + 1) / 2)
        assert 2 * t_975(count) * density.mean() == pytest.approx(0.95, abs=1e-4)
    assert t_975(32) == t_975(10_000) == 1.96


def test_a_ratio_of_sums_is_linearised_by_hand():
    """R = 6 / 9; R + (x - R y) / 3."""
    values = ratio_values([1, 3, 2], [2, 3, 4])
    assert values == pytest.approx([5 / 9, 1, 4 / 9]) and mean_and_stderr(values)[0] == pytest.approx(6 / 9)


def test_evaluator_on_a_policy(torch_service):
    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()
    _, test = asyncio.run(ArithmeticBuilder(num_digits=1, num_test=6)(get_renderer("plain", client.get_tokenizer())))
    assert test is not None
    evaluator = SamplesEvaluator(test, max_tokens=3, num_samples=4)
    metrics = asyncio.run(evaluator(client))
    assert metrics == asyncio.run(evaluator(client))
    assert [len(group.trajectories_G) for group in evaluator.groups] == [4] * 6
    samples = [tuple(t.transitions[0].ac.tokens) for t in evaluator.groups[0].trajectories_G]
    assert len(set(samples)) > 1
    names = {
        f"test/env/all/{what}@{k}{end}"
        for what in ("pass", "maj", "best")
        for k in (1, 2, 4)
        for end in ("", "_stderr")
    }
    assert set(metrics) == names | {"test/env/all/samples_lost"}
    with pytest.raises(ConfigError, match="temperature"):
        SamplesEvaluator(test, max_tokens=3, temperature=0.0)
