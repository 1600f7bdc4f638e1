"""pass@k, best-of-k and majority-of-k of n samples per problem, without bias: expectations over the
k-subsets of the samples (Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
section 2.1). pass@k and best@k have closed forms. maj@k, with its tie rule, has none: subsets are
enumerated, or sampled with a seed if there are more than `MAX_SUBSETS`.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from posttrain.backend.errors import ConfigError

MAX_SUBSETS = 2000
# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom, and of the normal distribution for more
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042, 1.96),
)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """P(at least one of k is right) = 1 - C(n - c, k) / C(n, k): Chen et al. 2021, eq. 1."""
    _check_k(k, num_samples)
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def best_at_k(scores_N: Sequence[float], k: int) -> float:
    """Expected maximum of k scores: the i-th smallest (from 1) is the maximum of C(i - 1, k - 1) of
    the C(n, k) subsets."""
    n = len(scores_N)
    _check_k(k, n)
    ways_N = [comb(i, k - 1) / comb(n, k) for i in range(n)]
    return sum(ways * score for ways, score in zip(ways_N, sorted(scores_N), strict=True))


def majority(answers_K: Sequence[str | None]) -> int | None:
    """Index of the first sample with the most common answer, None without answers. A None has no
    vote. A tie goes to the answer sampled first, a fair draw, since samples are in no order. Shared
    by maj@k, best-of-n and LaTRO."""
    counts = Counter(answer for answer in answers_K if answer is not None)
    if not counts:
        return None
    # a Counter keeps the order of first appearance, and max takes the first
    winner = max(counts, key=counts.__getitem__)
    return answers_K.index(winner)


def maj_at_k(
    answers_N: Sequence[str | None], correct_N: Sequence[bool], k: int, max_subsets: int = MAX_SUBSETS
) -> float:
    """P(the majority of k samples, in order, is right). Exact up to `max_subsets` subsets, then a
    seeded estimate. Equal strings are equal answers, as right as the first of them."""
    _check_k(k, len(answers_N))
    if len(correct_N) != len(answers_N):
        raise ValueError(f"{len(answers_N)} answers and {len(correct_N)} grades")
    subsets_SK = _subsets(len(answers_N), k, max_subsets)
    numbers = {answer: number for number, answer in enumerate(set(answers_N) - {None})}
    chosen_SK = np.array([numbers.get(answer, -1) for answer in answers_N])[subsets_SK]
    votes_SK = np.zeros_like(chosen_SK)  # for the answer of each sample; none for None
    for number in numbers.values():
        same_SK = chosen_SK == number
        votes_SK += same_SK * same_SK.sum(1, keepdims=True)
    # `majority` of each subset: argmax takes the first of the largest
    first_S = votes_SK.argmax(1)[:, None]
    right_S = np.take_along_axis(np.array(correct_N)[subsets_SK] & (votes_SK > 0), first_S, 1)
    return int(right_S.sum()) / len(subsets_SK)


def mean_and_stderr(values_P: Sequence[float]) -> tuple[float, float]:
    """Mean over problems and its standard error (ddof 1), 0 for a single problem."""
    stderr = np.std(values_P, ddof=1) / np.sqrt(len(values_P)) if len(values_P) > 1 else 0.0
    return float(np.mean(values_P)), float(stderr)


def t_975(count: int) -> float:
    """Standard errors on each side of a mean of `count` >= 2 values in its 95% interval."""
    return T_975[min(count - 1, len(T_975)) - 1]


def ratio_values(numerators_P: Sequence[float], denominators_P: Sequence[float]) -> list[float]:
    """For a ratio of sums R, such as IFEval's share of all instructions: values whose mean is R and
    whose `mean_and_stderr` is the ratio's, by its linearisation, R + (x_p - R y_p) / mean(y)
    (Cochran, Sampling Techniques, 6.4)."""
    ratio, mean = sum(numerators_P) / sum(denominators_P), float(np.mean(denominators_P))
    return [ratio + (x - ratio * y) / mean for x, y in zip(numerators_P, denominators_P, strict=True)]


def paired_difference(values_P: Sequence[float | None], baseline_P: Sequence[float | None]) -> tuple[float, float, int]:
    """Mean over problems of value - baseline, its standard error, and the number of problems that
    have both (Miller 2024, "Adding Error Bars to Evals", section 4.2). NaN without such problems."""
    both = zip(values_P, baseline_P, strict=True)
    differences = [value - base for value, base in both if value is not None and base is not None]
    if not differences:
        return float("nan"), float("nan"), 0
    return (*mean_and_stderr(differences), len(differences))


@lru_cache(maxsize=64)  # all problems of an evaluation have the same
def _subsets(n: int, k: int, max_subsets: int) -> np.ndarray:
    """(S, k) indices, ascending in each row."""
    if comb(n, k) <= max_subsets:
        return np.array([*combinations(range(n), k)])
    rng = np.random.default_rng([n, k])
    return np.sort([rng.choice(n, k, replace=False) for _ in range(max_subsets)], axis=1)


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ConfigError(f"k={k} of {num_samples} samples: 1 <= k <= the number of samples is needed")
