"""Notes of words, some of them kind: a toy with a known true reward, for reward models and RLHF.

The prompt is a name ("Ada:"), the answer 3 to 6 different words, 8 of the 24 words being kind. A
reward model trained on such notes never sees a repetition: an answer that repeats one kind word
deceives it, not the rule. Left out: grammar.

    gold reward = number of different kind words - number of repeated words
"""

from collections.abc import Sequence
from functools import partial

import chz
import numpy as np

from envs.completion_env import GoldReward, Prompt, PromptsBuilder
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.backend.types import Datum
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import DrawnDataset
from preference.types import Comparison, ComparisonDatasetBuilder, Label, LabeledComparison
from supervised.data import render
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

KIND = ("thanks", "great", "lovely", "brave", "warm", "gentle", "superb", "dear")
OTHER = ("table", "seven", "cloud", "paper", "river", "green", "stone", "train", "bread", "under", "north")
OTHER += ("music", "chair", "glass", "salt", "wool")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim")
NAMES += ("Leo", "Mia", "Noor", "Olga", "Pia", "Quin", "Rosa", "Sam", "Tess", "Uma", "Vic")
NAMES += ("Wes", "Xena", "Yara", "Zoe", "Abel", "Bea", "Carl", "Dora", "Emil", "Fay")
HELD_OUT_NAMES = 8


def gold_reward(prompt: Prompt, answer: str) -> float:
    words = answer.split()
    return float(len(set(words) & set(KIND)) - (len(words) - len(set(words))))


def names(held_out: bool) -> Sequence[str]:
    return NAMES[-HELD_OUT_NAMES:] if held_out else NAMES[:-HELD_OUT_NAMES]


def prompt(name: str) -> list[Message]:
    return [Message(role="user", content=f"{name}:")]


def note(rng: np.random.Generator) -> list[Message]:
    words = rng.choice([*KIND, *OTHER], size=rng.integers(3, 7), replace=False)
    return [Message(role="assistant", content=" " + " ".join(words))]


@chz.chz
class KindWordsPrompts(PromptsBuilder):
    """Every name, `repeat` times, since a batch may hold more prompts than there are names."""

    repeat: int = chz.field(
        default=8, validator=COUNT, doc="times each prompt occurs, in an epoch and in the held-out set"
    )

    def __call__(self) -> tuple[list[Prompt], list[Prompt]]:
        train: list[Prompt] = [prompt(name) for name in names(False)]
        test: list[Prompt] = [prompt(name) for name in names(True)]
        return train * self.repeat, test * self.repeat

    def gold(self) -> GoldReward:
        return gold_reward


@chz.chz
class KindWordsComparisons(ComparisonDatasetBuilder):
    """Pairs of notes to one name, labelled by the gold reward; the margin is the difference."""

    num_train: int = chz.field(default=4000, validator=COUNT, doc="comparisons to train on")
    test_size: int = chz.field(default=500, validator=WHOLE, doc="held-out comparisons, on held-out names")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the notes")

    def __call__(self) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        return self._draw(self.num_train, False), self._draw(self.test_size, True)

    def _draw(self, count: int, held_out: bool) -> list[LabeledComparison]:
        rng = np.random.default_rng([self.seed, held_out])
        prompts = [prompt(str(name)) for name in rng.choice(names(held_out), size=count)]
        return [labeled_by_gold(Comparison(messages, note(rng), note(rng))) for messages in prompts]


def labeled_by_gold(comparison: Comparison) -> LabeledComparison:
    a, b = (
        gold_reward(comparison.prompt_conversation, side[0]["content"])
        for side in (comparison.completion_A, comparison.completion_B)
    )
    label: Label = "Tie" if a == b else ("A" if a > b else "B")
    return LabeledComparison(comparison, label, abs(a - b) or None)


@chz.chz
class KindWordsExamplesBuilder(SupervisedDatasetBuilder):
    """Notes to imitate, drawn anew for every batch; one held-out batch, to held-out names."""

    n_batches: int = chz.field(default=200, validator=COUNT, doc="training batches per epoch")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        def draw(epoch: int, index: int, held_out: bool = False) -> list[Datum]:
            rng = np.random.default_rng([self.seed, 2 + held_out, epoch, index])
            chosen_D = rng.choice(names(held_out), size=self.batch_size)
            return render([[*prompt(str(name)), *note(rng)] for name in chosen_D], renderer, self)

        return DrawnDataset(draw, self.n_batches), DrawnDataset(partial(draw, held_out=True), 1)
