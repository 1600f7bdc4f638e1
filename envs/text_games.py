"""Games written in messages: a finite list of tasks, split once, to play by RL or to imitate.

A game is a TextGame mixed into two builders, one for each loop. Neither trains on a held-out task,
chosen by `split_seed`. Training tasks are drawn with replacement, as a pure function of (seed,
batch index). Left out: tasks without end (arithmetic.py numbers such a space).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.backend.types import Datum
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import DrawnDataset, ListDataset
from posttrain.tracking.seeds import EXAMPLES, GROUPS, HELD_OUT_EXAMPLES
from rl.message_env import MessageEnv, MessageEnvGroupBuilder, ParsePolicy
from rl.types import RLDataset, RLDatasetBuilder
from supervised.data import render
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

Task = Any  # a number, a word, an expression; must pickle


@chz.chz
class TextGame:
    """The tasks, their split and demonstrations: give the same values to both builders of a game."""

    num_test: int = chz.field(default=100, validator=WHOLE, doc="held-out tasks")
    split_seed: int = chz.field(
        default=0, validator=SEED, doc="seed of the choice of held-out tasks; the same for warm start and RL"
    )

    def tasks(self) -> Sequence[Task]:
        """All tasks, always in the same order."""
        raise NotImplementedError

    def demonstration(self, task: Task, rng: np.random.Generator) -> list[Message]:
        """One episode, played well enough to be imitated."""
        raise NotImplementedError

    def split(self) -> tuple[list[Task], list[Task]]:
        """Training and held-out tasks."""
        tasks = self.tasks()
        if not isinstance(tasks, Sequence):  # a set's order is another one in each process
            raise ConfigError(f"{type(self).__name__}.tasks returned {tasks!r:.100}, not a list")
        if not 1 <= self.num_test < len(tasks):
            raise ConfigError(
                f"num_test={self.num_test} must be between 1 and {len(tasks) - 1}: there are {len(tasks)} tasks"
            )
        order = np.random.default_rng(self.split_seed).permutation(len(tasks))
        return [tasks[i] for i in order[self.num_test :]], [tasks[i] for i in order[: self.num_test]]


@chz.chz
class TextGameBuilder(TextGame, RLDatasetBuilder):
    """A game to play by RL. Held out is one episode of each held-out task."""

    n_batches: int = chz.field(default=100, validator=COUNT, doc="training batches")
    parse: ParsePolicy = chz.field(default_factory=ParsePolicy, doc="treatment of responses that cannot be parsed")
    tag: str = chz.field(default="", doc="name under which metrics are logged too")

    def open_env(self) -> Callable[[Task], MessageEnv]:
        """Opens what episodes share. Returns a function from task to environment."""
        raise NotImplementedError

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        train, test = self.split()
        env_of, tags = self.open_env(), [self.tag] if self.tag else []
        if not callable(env_of):
            raise ConfigError(
                f"{type(self).__name__}.open_env returned {env_of!r:.100}, not a function from a task to an environment"
            )

        def group(task: Task, num_envs: int) -> MessageEnvGroupBuilder:
            return MessageEnvGroupBuilder(partial(env_of, task), num_envs, renderer, self.parse, tags)

        def draw(epoch: int, index: int) -> list[MessageEnvGroupBuilder]:
            rng = np.random.default_rng([self.seed, GROUPS, epoch * self.n_batches + index])
            return [group(train[i], self.group_size) for i in rng.integers(len(train), size=self.batch_size)]

        held_out = ListDataset([group(task, 1) for task in test], self.batch_size, shuffle=False)
        return DrawnDataset(draw, self.n_batches), held_out


@chz.chz
class TextGameExamplesBuilder(TextGame, SupervisedDatasetBuilder):
    """The game to imitate. Held out are demonstrations of the held-out tasks."""

    n_batches: int = chz.field(default=30, validator=COUNT, doc="training batches per epoch")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train, test = self.split()
        size = self.batch_size

        def draw(epoch: int, index: int) -> list[Datum]:
            rng = np.random.default_rng([self.seed, EXAMPLES, epoch, index])
            chosen_D = [train[i] for i in rng.integers(len(train), size=size)]
            return render([self.demonstration(task, rng) for task in chosen_D], renderer, self)

        def held_out(epoch: int, index: int) -> list[Datum]:
            rng = np.random.default_rng([self.split_seed, HELD_OUT_EXAMPLES, index])
            return render(
                [self.demonstration(task, rng) for task in test[index * size : (index + 1) * size]], renderer, self
            )

        return DrawnDataset(draw, self.n_batches), DrawnDataset(held_out, -(-len(test) // size))
