"""What B-STaR needs of a data set: questions with a verifier each, in three sets that do not meet, and a little to imitate first.

A new task is one file: a subclass of TaskBuilder with `train_queries`, `test_queries` and, where there are human solutions, those. Prompt,
verifier and format check are the ones of any ProblemEnv of envs/; a solution is written as the model is to write it, answer included.
Whoever builds a Task gets the separation checked: ids are unique, and no question is in both the training and the test set. The dev
subset, on which temperature and threshold are chosen, is a fixed part of the training queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import chz
import numpy as np

from envs.problem_env import ProblemEnv
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.seeds import DEV
from preference.steps import StepFormat


@dataclass(frozen=True)
class Query:
    """A question: its environment asks it and grades answers. `solution` is a human's, None where there is none."""

    id: str
    problem: ProblemEnv
    solution: str | None = None

    def messages(self) -> list[Message]:
        """The question with the human solution, to imitate."""
        if self.solution is None:
            raise DataError(f"query {self.id} has no human solution")
        user = Message(role="user", content=self.problem.question())
        return [*self.problem.prefix, user, Message(role="assistant", content=self.solution)]


@dataclass(frozen=True)
class Task:
    """`dev` are indices into `train`. `warm_start` is imitated first; from `prm` the steps of the reward model's training set come."""

    warm_start: list[Query]
    prm: list[Query]
    train: list[Query]
    test: list[Query]
    dev: list[int]
    form: StepFormat
    max_tokens: int


@chz.chz
class TaskBuilder:
    """Configuration of a data set: what all of them share."""

    num_train: int | None = chz.field(
        default=None, validator=COUNT, doc="use only the first so many training queries; None = all"
    )
    num_test: int | None = chz.field(default=200, validator=WHOLE, doc="use only the first so many test queries; None = all")
    num_dev: int = chz.field(
        default=40, validator=COUNT, doc="training queries on which temperature and threshold are chosen, drawn by split_seed"
    )
    num_warm_start: int | None = chz.field(
        default=None, validator=COUNT, doc="imitate only the first so many human solutions; None = all"
    )
    num_prm: int | None = chz.field(
        default=None, validator=COUNT, doc="label steps of answers to only so many queries; None = all"
    )
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the choice of the dev subset, and of sets that are drawn")
    form: StepFormat = chz.field(default_factory=StepFormat, doc="what a step ends with, and what the answer step begins with")
    max_tokens: int = chz.field(default=256, validator=COUNT, doc="most tokens of a sampled solution")

    def train_queries(self, renderer: Renderer) -> Sequence[Query]:
        raise NotImplementedError

    def test_queries(self, renderer: Renderer) -> Sequence[Query]:
        raise NotImplementedError

    def warm_start_queries(self, renderer: Renderer, train: Sequence[Query]) -> Sequence[Query]:
        """Queries with solutions to imitate: those of the training set that have one."""
        return [query for query in train if query.solution is not None]

    def prm_queries(self, renderer: Renderer, train: Sequence[Query]) -> Sequence[Query]:
        """Queries whose answers are labelled step by step."""
        return train

    def __call__(self, renderer: Renderer) -> Task:
        """Raises DataError for sets that are empty, too small, or not apart."""
        train = list(self.train_queries(renderer))[: self.num_train]
        test = list(self.test_queries(renderer))[: self.num_test]
        warm_start = list(self.warm_start_queries(renderer, train))[: self.num_warm_start]
        prm = list(self.prm_queries(renderer, train))[: self.num_prm]
        for name, queries in (("training", train), ("test", test), ("warm-start", warm_start), ("prm", prm)):
            _check_ids(name, queries)
        questions = {query.problem.question() for query in test}
        for name, queries in (("training", train), ("warm-start", warm_start), ("prm", prm)):
            if both := [query.id for query in queries if query.problem.question() in questions]:
                raise DataError(f"{len(both)} {name} queries are in the test set too, first {both[0]}: keep the sets apart")
        if not train or not test:
            raise DataError(f"{len(train)} training and {len(test)} test queries: both sets need some")
        if not 1 <= self.num_dev <= len(train):
            raise ConfigError(f"num_dev={self.num_dev}: from 1 to the {len(train)} training queries")
        dev = sorted(np.random.default_rng([self.split_seed, DEV]).permutation(len(train))[: self.num_dev].tolist())
        return Task(warm_start, prm, train, test, dev, self.form, self.max_tokens)


def _check_ids(name: str, queries: Sequence[Query]) -> None:
    ids = [query.id for query in queries]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise DataError(f"two {name} queries have the id {twice!r}: ids tell the samples of queries apart")
