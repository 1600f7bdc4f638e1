"""What games written in messages share: a finite list of tasks, split once, to play by RL or to imitate from demonstrations.

A game is a TextGame (which tasks there are, how one is demonstrated) mixed into two builders, one for each loop. Held-out tasks, chosen by
`split_seed`, are never met in training by either, whatever their `seed`. Training tasks are drawn with replacement, as a pure
function of (seed, batch index). Left out: tasks without end (see arithmetic.py for a space that is numbered, not listed).
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
from rl.message_env import MessageEnv, MessageEnvGroupBuilder, ParsePolicy
from rl.types import RLDataset, RLDatasetBuilder
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

Task = Any  # whatever a game is made from: a number, a word, an expression; it pickles


@chz.chz
class TextGame:
    """Give the same values to both builders of a game."""

    num_test: int = chz.field(default=100, validator=WHOLE, doc="held-out tasks")
    split_seed: int = chz.field(
        default=0, validator=SEED, doc="seed of the choice of held-out tasks; the same for warm start and RL"
    )

    def tasks(self) -> Sequence[Task]:
        """All of them, always in the same order."""
        raise NotImplementedError

    def demonstration(self, task: Task, rng: np.random.Generator) -> list[Message]:
        """One episode, played well enough to be imitated."""
        raise NotImplementedError

    def split(self) -> tuple[list[Task], list[Task]]:
        """Training and held-out tasks."""
        tasks = self.tasks()
        if not 1 <= self.num_test < len(tasks):
            raise ConfigError(f"num_test={self.num_test} must be between 1 and {len(tasks) - 1}: there are {len(tasks)} tasks")
        order = np.random.default_rng(self.split_seed).permutation(len(tasks))
        return [tasks[i] for i in order[self.num_test :]], [tasks[i] for i in order[: self.num_test]]


class TextGameDataset(RLDataset):
    """`n_batches` of tasks drawn anew, or, where that is None, each task once and in order. `env_of` makes a task's environment."""

    def __init__(
        self,
        tasks: Sequence[Task],
        env_of: Callable[[Task], MessageEnv],
        renderer: Renderer,
        config: "TextGameBuilder",
        n_batches: int | None = None,
    ):
        self.tasks, self.env_of, self.renderer, self.config, self.n_batches = tasks, env_of, renderer, config, n_batches

    def __len__(self) -> int:
        return -(-len(self.tasks) // self.config.batch_size) if self.n_batches is None else self.n_batches

    def get_batch(self, index: int) -> list[MessageEnvGroupBuilder]:
        size = self.config.batch_size
        if self.n_batches is None:
            chosen_P = self.tasks[index * size : (index + 1) * size]
            return [self._builder(task, 1) for task in chosen_P]
        drawn_P = np.random.default_rng([self.config.seed, 1, index]).integers(len(self.tasks), size=size)
        return [self._builder(self.tasks[i], self.config.group_size) for i in drawn_P]

    def _builder(self, task: Task, num_envs: int) -> MessageEnvGroupBuilder:
        return MessageEnvGroupBuilder(
            partial(self.env_of, task), num_envs, self.renderer, self.config.parse, [self.config.tag] if self.config.tag else []
        )


@chz.chz
class TextGameBuilder(TextGame, RLDatasetBuilder):
    """A game to play by reinforcement learning. The held-out set are the held-out tasks, each once."""

    n_batches: int = chz.field(default=100, validator=COUNT, doc="training batches")
    parse: ParsePolicy = chz.field(default_factory=ParsePolicy, doc="what becomes of responses that cannot be read")
    tag: str = chz.field(default="", doc="name under which metrics are logged too")

    def open_env(self) -> Callable[[Task], MessageEnv]:
        """Opens what all episodes share (a second policy, say), and returns what makes a task's environment."""
        raise NotImplementedError

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        train, test = self.split()
        env_of = self.open_env()
        return TextGameDataset(train, env_of, renderer, self, self.n_batches), TextGameDataset(test, env_of, renderer, self)


class TextGameExamples(SupervisedDataset):
    """Demonstrations of `n_batches` of tasks drawn anew in each epoch, or, where that is None, of each task once."""

    def __init__(
        self, tasks: Sequence[Task], renderer: Renderer, config: "TextGameExamplesBuilder", n_batches: int | None = None
    ):
        self.tasks, self.renderer, self.config, self.n_batches, self.epoch = tasks, renderer, config, n_batches, 0

    def __len__(self) -> int:
        return -(-len(self.tasks) // self.config.batch_size) if self.n_batches is None else self.n_batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def get_batch(self, index: int) -> list[Datum]:
        size = self.config.batch_size
        if self.n_batches is None:
            rng = np.random.default_rng([self.config.split_seed, 3, index])
            chosen_D = self.tasks[index * size : (index + 1) * size]
        else:
            rng = np.random.default_rng([self.config.seed, 2, self.epoch, index])
            chosen_D = [self.tasks[i] for i in rng.integers(len(self.tasks), size=size)]
        return [self._datum(self.config.demonstration(task, rng)) for task in chosen_D]

    def _datum(self, messages: list[Message]) -> Datum:
        from supervised.data import conversation_to_datum

        max_length = self.config.max_length or self.renderer.tokenizer.model_max_length
        return conversation_to_datum(messages, self.renderer, max_length, self.config.train_on_what, self.config.reduction)


@chz.chz
class TextGameExamplesBuilder(TextGame, SupervisedDatasetBuilder):
    """The same game to imitate. The held-out set are demonstrations of the tasks that TextGameBuilder holds out."""

    n_batches: int = chz.field(default=30, validator=COUNT, doc="training batches per epoch")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train, test = self.split()
        return TextGameExamples(train, renderer, self, self.n_batches), TextGameExamples(test, renderer, self)
