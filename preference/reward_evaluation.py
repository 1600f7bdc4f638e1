"""Quality of a judge on labelled comparisons: accuracy, calibration, self-agreement, and the
accuracy of length alone. Each comparison is asked in both orders: score = (AB - BA) / 2, P(B is
better) = (1 + score) / 2. Ties have no right side; they are counted apart, with the size of the
score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.backend.training_client import TrainingClient
from posttrain.renderers.parts import get_text_content
from posttrain.tracking.figures import COLORS, finish_axis, panel_axes, save_figure
from posttrain.tracking.metrics_log import Metrics
from preference.reward_types import Judge, judge_all
from preference.types import LabeledComparison

NUM_BINS = 10
TRUTH = {"A": -1, "Tie": 0, "B": 1}


@dataclass(frozen=True)
class Evaluation:
    """Scores in the data's order and with the sides exchanged; `truth_D` is 1 where B is better, -1
    where A is, 0 for a tie."""

    forward_D: np.ndarray
    reverse_D: np.ndarray
    truth_D: np.ndarray

    @property
    def decided_D(self) -> np.ndarray:
        return self.truth_D != 0

    @property
    def score_D(self) -> np.ndarray:
        return (self.forward_D + self.reverse_D) / 2

    @property
    def correct_D(self) -> np.ndarray:
        """Of decided comparisons. A score of exactly 0 is not correct."""
        return (self.score_D * self.truth_D)[self.decided_D] > 0

    @property
    def confidence_D(self) -> np.ndarray:
        """Of decided comparisons: the probability, 0.5 to 1, of the side that the judge prefers."""
        return (1 + np.abs(self.score_D[self.decided_D])) / 2

    def reliability(self) -> list[tuple[float, float, int]]:
        """(mean confidence, accuracy, count) of the non-empty bins of NUM_BINS of [0.5, 1]."""
        bin_D = np.minimum(((self.confidence_D - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
        chosen = [bin_D == k for k in range(NUM_BINS)]
        return [
            (float(self.confidence_D[b].mean()), float(self.correct_D[b].mean()), int(b.sum()))
            for b in chosen
            if b.any()
        ]

    def metrics(self) -> Metrics:
        """`ece`: expected calibration error, Guo et al. 2017 eq. 5. `swap_agreement`: share of
        comparisons where both orders prefer the same side. `accuracy_stderr` takes comparisons as
        independent: too small where a prompt has several."""
        count = len(self.correct_D)
        accuracy = float(self.correct_D.mean())
        metrics = {
            "accuracy": accuracy,
            "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / count)),
            "ece": sum(n * abs(confidence - correct) for confidence, correct, n in self.reliability()) / count,
            "swap_agreement": float(np.mean((np.sign(self.forward_D) == np.sign(self.reverse_D))[self.decided_D])),
            "comparisons": float(count),
        }
        if not self.decided_D.all():
            metrics |= {
                "ties": float((~self.decided_D).sum()),
                "tie_leaning": float(np.abs(self.score_D[~self.decided_D]).mean()),
            }
        return metrics


async def evaluate_judge(judge: Judge, labeled_D: Sequence[LabeledComparison]) -> Evaluation:
    """Asks for every comparison in both orders."""
    comparisons_D = [labeled.comparison for labeled in labeled_D]
    scores_2D = np.array(await judge_all(judge, [*comparisons_D, *(c.swap() for c in comparisons_D)])).reshape(2, -1)
    return Evaluation(scores_2D[0], -scores_2D[1], np.array([TRUTH[labeled.label] for labeled in labeled_D]))


class RewardModelEvaluator:
    """`test/accuracy` and the rest, of a reward model in training on held-out comparisons."""

    def __init__(self, judge: Judge, train_D: Sequence[LabeledComparison], test_D: Sequence[LabeledComparison]):
        self.judge, self.test_D = judge, test_D
        self.baseline = length_baseline(train_D, test_D)
        self.last: Evaluation | None = None

    async def __call__(self, client: TrainingClient) -> Metrics:
        self.last = await evaluate_judge(self.judge, self.test_D)
        return {
            f"test/{name}": value for name, value in (self.last.metrics() | {"length_baseline": self.baseline}).items()
        }


def length_baseline(train_D: Sequence[LabeledComparison], test_D: Sequence[LabeledComparison]) -> float:
    """Accuracy on `test_D` of preferring the longer answer, or the shorter if that is better on
    `train_D`. Lengths are in characters; equal lengths count half. DataError if all of either set
    are ties."""
    longer_wins = np.mean(_longer_is_better(train_D)) >= 0.5
    held_out = float(np.mean(_longer_is_better(test_D)))
    return held_out if longer_wins else 1 - held_out


def _longer_is_better(labeled_D: Sequence[LabeledComparison]) -> list[float]:
    pairs = [labeled.chosen_and_rejected() for labeled in labeled_D if labeled.label != "Tie"]
    if not pairs:
        raise DataError(f"all {len(labeled_D)} comparisons are ties: nothing to measure a judge on")
    lengths = [
        [sum(len(message["content"] or get_text_content(message)) for message in side) for side in pair]
        for pair in pairs
    ]
    return [0.5 * float(np.sign(chosen - rejected) + 1) for chosen, rejected in lengths]


def plot_reliability(evaluations: dict[str, Evaluation], path: Path) -> Path:
    """Accuracy against confidence, a panel per judge, areas by count. Calibrated is the diagonal."""
    figure, axes = panel_axes(len(evaluations), size=(4.2, 3.7))
    for axis, (name, evaluation) in zip(axes, evaluations.items(), strict=True):
        confidence, accuracy, count = (np.array(column) for column in zip(*evaluation.reliability(), strict=True))
        axis.plot([0.5, 1], [0.5, 1], color=COLORS[-1], linewidth=1)
        sizes = 10 + 600 * count / count.sum()
        axis.scatter(confidence, accuracy, s=sizes, color=COLORS[0], alpha=0.75, linewidth=0, clip_on=False)
        metrics = evaluation.metrics()
        title = f"{name}: accuracy {metrics['accuracy']:.3f}, ECE {metrics['ece']:.3f}"
        finish_axis(axis, title, xlabel="confidence", integer=False)
        axis.set(ylabel="accuracy", xlim=(0.49, 1.02), ylim=(min(0.45, accuracy.min() - 0.05), 1.03))
    return save_figure(figure, path)
