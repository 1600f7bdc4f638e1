"""Evaluation of a process reward model of chains by the exact rule."""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path

import numpy as np

from envs.arithmetic_chain import Chain
from posttrain.renderers.types import Renderer
from preference.best_of_n import compare_selections
from preference.prm import StepScores
from preference.prm_labels import read_records
from preference.solutions import Solution
from preference.steps import StepFormat, split_response
from preference.train_prm import first

# step relative to the first wrong step -> the model's probabilities
Aligned = dict[int, list[float]]


def evaluate(
    chains_P: Sequence[Chain],
    solutions_P_G: Sequence[Sequence[Solution]],
    scores_P_G: Sequence[Sequence[StepScores]],
    renderer: Renderer,
    form: StepFormat,
) -> tuple[dict[str, float], Aligned]:
    """The README's results, and the scores around the first wrong step. That step is "found" if it
    is the first one with a probability below 1/2. NaN where all chains are right, or all are wrong.
    """
    hit_P, clean_P, truths, aligned = [], [], [], {}
    for chain, group, scores in zip(chains_P, solutions_P_G, scores_P_G, strict=True):
        wrong, right = [], []
        for solution, score in zip(group, scores, strict=True):
            truth = chain.first_wrong_step(split_response(solution.tokens, renderer, form).strings)
            guess = first(score.probabilities_S < 0.5)
            if truth is None:
                right.append(guess is None)
                continue
            wrong.append(guess == truth)
            truths.append(truth)
            for step, probability in enumerate(score.probabilities_S):
                aligned.setdefault(step - truth, []).append(float(probability))
        hit_P += [np.mean(wrong)] if wrong else []
        clean_P += [np.mean(right)] if right else []
    counts = np.bincount(truths)
    results = {
        "first wrong step found": _mean(hit_P),
        "first wrong step found, standard error": (
            float(np.std(hit_P, ddof=1) / len(hit_P) ** 0.5) if len(hit_P) > 1 else nan
        ),
        "... by always guessing the commonest": float(counts.max() / counts.sum()) if truths else nan,
        "... by drawing a step": 1 / len(chains_P[0].steps),
        "right chains left unmarked": _mean(clean_P),
        "wrong chains": float(len(truths)),
    }
    worst_P_G = [[score.aggregate("min") for score in scores] for scores in scores_P_G]
    return results | compare_selections(solutions_P_G, worst_P_G), aligned


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else nan


def label_noise(chains: Mapping[str, Chain], labels: Path) -> dict[str, float]:
    """How often rollout labels are wrong: right steps labelled 0, and steps from the first error on
    labelled 1.
    """
    noisy: dict[bool, list[bool]] = {True: [], False: []}
    for record in read_records(labels):
        truth = chains[record.input].first_wrong_step(record.output)
        for step, label in enumerate(record.label):
            right = truth is None or step < truth
            noisy[right].append(bool(label) != right)
    return {
        "labels: right steps labelled 0": _mean(noisy[True]),
        "labels: wrong steps labelled 1": _mean(noisy[False]),
        "labels: steps": float(len(noisy[True]) + len(noisy[False])),
        "labels: share labelled 1 that should be": float(len(noisy[True]) / (len(noisy[True]) + len(noisy[False]))),
    }
