"""A toy preference: of answers to letters in some order, "dbeac>", the alphabetical one is
preferred.

The warm start imitates answers with the same letters in random order. Both builders hold out the
same sets of letters.
"""

from functools import partial
from itertools import combinations
from string import ascii_lowercase

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.backend.types import Datum
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import DrawnDataset
from preference.types import Comparison, ComparisonDatasetBuilder, LabeledComparison
from supervised.data import render
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

TEST_SETS = 200


def letter_sets(num_letters: int, alphabet: int, test_size: int, split_seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out sets of `num_letters` of the first `alphabet` letters, each sorted."""
    if not 2 <= num_letters <= alphabet <= len(ascii_lowercase):
        raise ConfigError(
            f"num_letters={num_letters}, alphabet={alphabet}: 2 <= num_letters <= alphabet <= 26 is needed"
        )
    sets = ["".join(letters) for letters in combinations(ascii_lowercase[:alphabet], num_letters)]
    if not 0 < test_size < len(sets):
        raise ConfigError(f"test_size={test_size} must be above 0 and below the {len(sets)} sets of letters")
    order = np.random.default_rng(split_seed).permutation(len(sets))
    return [sets[i] for i in order[test_size:]], [sets[i] for i in order[:test_size]]


def shuffled(letters: str, rng: np.random.Generator) -> str:
    return "".join(rng.permutation(list(letters)))


def question(letters: str) -> list[Message]:
    return [Message(role="user", content=f"{letters}>")]


def answer(letters: str) -> list[Message]:
    return [Message(role="assistant", content=letters)]


@chz.chz
class RandomOrderBuilder(SupervisedDatasetBuilder):
    """Letters, answered by the same letters in random order. The optimal loss is ln(n!) / (n + 1)
    nats per token.
    """

    num_letters: int = chz.field(default=4, validator=COUNT, doc="letters in a question")
    alphabet: int = chz.field(default=16, validator=COUNT, doc="size of the alphabet")
    n_batches: int = chz.field(default=600, validator=COUNT, doc="training batches per epoch")
    test_size: int = chz.field(default=TEST_SETS, validator=WHOLE, doc="held-out sets of letters")
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the choice of held-out sets")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train, test = letter_sets(self.num_letters, self.alphabet, self.test_size, self.split_seed)

        def draw(sets: list[str], epoch: int, index: int) -> list[Datum]:
            rng = np.random.default_rng([self.seed, epoch, index])
            chosen = [sets[i] for i in rng.integers(len(sets), size=self.batch_size)]
            conversations = [question(shuffled(letters, rng)) + answer(shuffled(letters, rng)) for letters in chosen]
            return render(conversations, renderer, self)

        return DrawnDataset(partial(draw, train), self.n_batches), DrawnDataset(partial(draw, test), 2)


@chz.chz
class SortedPreferredBuilder(ComparisonDatasetBuilder):
    """A comparison per set of letters: alphabetical order (A, preferred) and another order (B)."""

    num_letters: int = chz.field(default=4, validator=COUNT, doc="letters in a question")
    alphabet: int = chz.field(default=16, validator=COUNT, doc="size of the alphabet")
    test_size: int = chz.field(default=TEST_SETS, validator=WHOLE, doc="held-out sets of letters")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the questions and of the rejected answers")

    def __call__(self) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        train, test = letter_sets(self.num_letters, self.alphabet, self.test_size, self.split_seed)
        return [self.comparison(letters) for letters in train], [self.comparison(letters) for letters in test]

    def comparison(self, letters: str) -> LabeledComparison:
        rng = np.random.default_rng([self.seed, *letters.encode()])
        order, rejected = shuffled(letters, rng), letters
        while rejected == letters:
            rejected = shuffled(letters, rng)
        return LabeledComparison(Comparison(question(order), answer(letters), answer(rejected)), "A", where=order)
