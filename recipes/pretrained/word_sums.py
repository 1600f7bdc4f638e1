"""Sums in words, small enough for a language model of 135M parameters: "Anna has 12 shells and gets 7
more. How many shells does Anna have now?"

The held-out problems have numbers that no training problem has in that order.
"""

import random
import re
from itertools import product

import chz

from envs.problem import Grader, Problem
from envs.problem_env import problem_groups
from posttrain.backend.ranges import COUNT
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset
from rl.types import RLDataset, RLDatasetBuilder

NAMES = ("Anna", "Ben", "Carla", "Dan", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells")
LAST = "How many {things} does {name} have now? Answer with a number."
STORIES = {
    "more": "{name} has {a} {things} and gets {b} more. " + LAST,
    "fewer": "{name} has {a} {things} and gives {b} away. " + LAST,
}


class LastNumber(Grader):
    """The answer is the last number of the response."""

    def extract(self, text: str) -> str | None:
        numbers = re.findall(r"\d+", text)
        return numbers[-1] if numbers else None


@chz.chz
class WordSumsBuilder(RLDatasetBuilder):
    batch_size: int = chz.field(default=8, validator=COUNT, doc="problems per batch")
    largest: int = chz.field(default=20, validator=COUNT, doc="largest number of a problem; 2 is the smallest")
    num_test: int = chz.field(default=200, validator=COUNT, doc="problems held out")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        rng = random.Random(self.seed)
        numbers = range(2, self.largest + 1)
        sums = [(kind, a, b) for kind in STORIES for a, b in product(numbers, numbers) if kind == "more" or a > b]
        rng.shuffle(sums)
        problems = [problem(rng, *numbers) for numbers in sums]
        train = problem_groups(problems[self.num_test :], renderer, self.group_size)
        test = problem_groups(problems[: self.num_test], renderer, 1)
        return ListDataset(train, self.batch_size, self.seed), ListDataset(test, self.batch_size, shuffle=False)


def problem(rng: random.Random, kind: str, a: int, b: int) -> Problem:
    question = STORIES[kind].format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
    return Problem(question, str(a + b if kind == "more" else a - b), LastNumber())
