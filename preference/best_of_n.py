"""Choosing one of n solutions: best of n by a score, majority vote, or any. Standard errors are
over problems. Votes follow rl/sample_metrics.py's `majority`. Left out: votes weighted by score.
"""

from collections.abc import Sequence

import numpy as np

from preference.solutions import Solution
from rl.sample_metrics import majority


def compare_selections(
    solutions_P_G: Sequence[Sequence[Solution]], scores_P_G: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Accuracy of each choice, and its standard error as NAME_se: `sampled` (mean over the
    samples), `majority`, `best_of_n` (first of the highest score), `any` (the perfect choice). Also
    `gain`: best_of_n - majority, paired."""
    correct_P_G = [np.array([solution.correct for solution in group], dtype=float) for group in solutions_P_G]
    accuracy_P = {
        "sampled": np.array([correct_G.mean() for correct_G in correct_P_G]),
        "majority": np.array([_majority_is_right(group) for group in solutions_P_G]),
        "best_of_n": np.array(
            [c_G[int(np.argmax(scores_G))] for c_G, scores_G in zip(correct_P_G, scores_P_G, strict=True)]
        ),
        "any": np.array([correct_G.max() for correct_G in correct_P_G]),
    }
    accuracy_P["gain"] = accuracy_P["best_of_n"] - accuracy_P["majority"]
    means = {name: float(values_P.mean()) for name, values_P in accuracy_P.items()}
    errors = {
        f"{name}_se": float(v_P.std(ddof=1) / len(v_P) ** 0.5) for name, v_P in accuracy_P.items() if len(v_P) > 1
    }
    return means | errors


def _majority_is_right(group: Sequence[Solution]) -> float:
    """1 or 0; 0 where no solution has an answer."""
    first = majority([solution.answer or None for solution in group])
    return float(first is not None and group[first].correct)
