"""What n samples of one problem say about k of them: pass@k, best-of-k and majority-of-k, each
without bias.

All three are expectations over the k-subsets of the n samples, drawn without replacement: the
unbiased estimate of what k fresh samples would give (Chen et al. 2021, "Evaluating Large Language
Models Trained on Code", section 2.1, for pass@k). Plugging the rate c/n into 1 - (1 - c/n)^k would
be biased. pass@k and best@k have closed forms. maj@k has none with its tie rule, so subsets are
counted one by one, or, where there are more than `MAX_SUBSETS`, a seeded sample of that many.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb

import numpy as np

from posttrain.backend.errors import ConfigError

MAX_SUBSETS = 2000


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """P(at least one of k is right) = 1 - C(n - c, k) / C(n, k): Chen et al. 2021, eq. 1."""
    _check_k(k, num_samples)
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def best_at_k(scores_N: Sequence[float], k: int) -> float:
    """Expected maximum of k scores. The i-th smallest (from 1) is the maximum of C(i - 1, k - 1) of
    the C(n, k) subsets.
    """
    n = len(scores_N)
    _check_k(k, n)
    ways_N = [comb(i, k - 1) / comb(n, k) for i in range(n)]
    return sum(ways * score for ways, score in zip(ways_N, sorted(scores_N), strict=True))


def majority(answers_K: Sequence[str | None]) -> int | None:
    """Index of the first sample with the commonest answer. None is no answer, and does not vote. Of
    answers equally common, the one given by the earliest sample wins: a fair draw, since samples
    are in no order. None if nobody answered.

    The one rule for votes in this project: maj@k, best-of-n and LaTRO's votes use it."""
    counts = Counter(answer for answer in answers_K if answer is not None)
    if not counts:
        return None
    # a Counter keeps the order of first appearance, and max takes the first
    winner = max(counts, key=counts.__getitem__)
    return answers_K.index(winner)


def maj_at_k(
    answers_N: Sequence[str | None], correct_N: Sequence[bool], k: int, max_subsets: int = MAX_SUBSETS
) -> float:
    """P(the majority of k samples, kept in their order, is right). Exact up to `max_subsets`
    subsets; beyond, a seeded estimate.

    Equal answers are equal strings, and as right as the first of them.
    """
    _check_k(k, len(answers_N))
    if len(correct_N) != len(answers_N):
        raise ValueError(f"{len(answers_N)} answers and {len(correct_N)} grades")
    hits = count = 0
    for chosen_K in _subsets(len(answers_N), k, max_subsets):
        first = majority([answers_N[i] for i in chosen_K])
        hits += first is not None and correct_N[chosen_K[first]]
        count += 1
    return hits / count


def mean_and_stderr(values_P: Sequence[float]) -> tuple[float, float]:
    """Mean over problems, and its standard error, from their spread (ddof 1). One problem has no
    spread: 0.
    """
    stderr = np.std(values_P, ddof=1) / np.sqrt(len(values_P)) if len(values_P) > 1 else 0.0
    return float(np.mean(values_P)), float(stderr)


def _subsets(n: int, k: int, max_subsets: int) -> Iterator[tuple[int, ...]]:
    if comb(n, k) <= max_subsets:
        yield from combinations(range(n), k)
        return
    rng = np.random.default_rng([n, k])
    for _ in range(max_subsets):
        yield tuple(sorted(rng.choice(n, k, replace=False).tolist()))


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ConfigError(f"k={k} of {num_samples} samples: 1 <= k <= the number of samples is needed")
