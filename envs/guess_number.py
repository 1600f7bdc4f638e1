"""Guess a number in several turns: "Guess my number from 14 to 27." "20" "lower" "16" ...

reward = 1 - guess_cost * (guesses - 1) for the right number, 0 when the guesses are used up. Each
guess that earlier hints rule out costs impossible_cost at its turn. Left out: lies.
"""

import re
from collections.abc import Callable, Sequence

import chz
import numpy as np

from envs.text_games import TextGame, TextGameBuilder, TextGameExamplesBuilder
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, NON_NEGATIVE, WHOLE
from posttrain.renderers.types import Message
from rl.message_env import MessageEnd, MessageEnv, MessageStep, ParseError
from rl.types import Metrics

Range = tuple[int, int, int]  # low, high (included), the number


def hint(guess: int, number: int) -> Message:
    return Message(role="user", content="higher" if guess < number else "lower")


class GuessNumberEnv(MessageEnv):
    """Metrics: `consistent` of a guess (hints allow it); `solved` and `turns` of every episode."""

    def __init__(self, task: Range, opening: Message, max_guesses: int, guess_cost: float, impossible_cost: float):
        *self.possible, self.number = task
        self.opening, self.max_guesses = opening, max_guesses
        self.guess_cost, self.impossible_cost = guess_cost, impossible_cost
        self.guesses: list[int] = []

    async def initial_messages(self) -> list[Message]:
        return [self.opening]

    async def step(self, message: Message) -> MessageStep:
        text = message["content"].strip()
        if not re.fullmatch(r"-?\d{1,9}", text):
            raise ParseError("Answer with one whole number.")
        guess = int(text)
        self.guesses.append(guess)
        low, high = self.possible
        consistent, solved = low <= guess <= high, guess == self.number
        reward = (1 - self.guess_cost * (len(self.guesses) - 1)) * solved - self.impossible_cost * (not consistent)
        metrics: Metrics = {"consistent": float(consistent)}
        logs = {"number": str(self.number)}
        if solved or len(self.guesses) == self.max_guesses:
            return MessageStep(reward, True, (), metrics | self._episode(solved), logs)
        self.possible = [max(low, guess + 1), high] if guess < self.number else [low, min(high, guess - 1)]
        return MessageStep(reward, False, [hint(guess, self.number)], metrics, logs)

    def _episode(self, solved: bool) -> Metrics:
        return {"solved": float(solved), "turns": float(len(self.guesses))}

    async def cut_short(self, reason: MessageEnd) -> tuple[float, Metrics]:
        return 0.0, self._episode(solved=False)


@chz.chz
class GuessNumber(TextGame):
    """A task is a range and a number in it, (low, high, number). Held out are tasks, not numbers: a
    policy would learn that a held-out number is never right.
    """

    smallest: int = chz.field(default=10, validator=WHOLE, doc="smallest number of any range")
    largest: int = chz.field(default=29, validator=COUNT, doc="largest number of any range")
    min_span: int = chz.field(default=8, validator=COUNT, doc="fewest numbers in a range")
    max_span: int = chz.field(default=16, validator=COUNT, doc="most numbers in a range")
    num_test: int = chz.field(default=150, validator=WHOLE, doc="held-out tasks")
    prompt: str = chz.field(default="Guess my number from {low} to {high}.", doc="first message of an episode")

    def opening(self, task: Range) -> Message:
        return Message(role="user", content=self.prompt.format(low=task[0], high=task[1]))

    def tasks(self) -> Sequence[Range]:
        numbers = self.largest - self.smallest + 1
        if not 2 <= self.min_span <= self.max_span <= numbers:
            raise ConfigError(
                f"min_span={self.min_span}, max_span={self.max_span}: 2 <= min_span <= max_span <= {numbers} is needed"
            )
        spans = range(self.min_span, self.max_span + 1)
        ranges = [(low, low + span - 1) for span in spans for low in range(self.smallest, self.largest - span + 2)]
        return [(low, high, number) for low, high in ranges for number in range(low, high + 1)]

    def demonstration(self, task: Range, rng: np.random.Generator) -> list[Message]:
        """Random guesses among the possible numbers: legal, without strategy, which is left to RL."""
        low, high, number = task
        messages = [self.opening(task)]
        while True:
            guess = int(rng.integers(low, high + 1))
            messages.append(Message(role="assistant", content=str(guess)))
            if guess == number:
                return messages
            messages.append(hint(guess, number))
            low, high = (guess + 1, high) if guess < number else (low, guess - 1)


@chz.chz
class GuessNumberBuilder(GuessNumber, TextGameBuilder):
    """Numbers to guess by reinforcement learning."""

    max_guesses: int = chz.field(
        default=4, validator=COUNT, doc="guesses after which an episode is lost; ceil(log2(max_span + 1)) suffice"
    )
    guess_cost: float = chz.field(
        default=0.05, validator=NON_NEGATIVE, doc="subtracted from the reward for every guess after the first"
    )
    impossible_cost: float = chz.field(
        default=0.2, validator=NON_NEGATIVE, doc="subtracted for a guess that earlier hints rule out"
    )
    tag: str = chz.field(default="guess_number", doc="name under which metrics are logged too")

    def recommended_max_tokens(self) -> int:
        return len(str(self.largest)) + 3

    def open_env(self) -> Callable[[Range], GuessNumberEnv]:
        return self.make_env

    def make_env(self, task: Range) -> GuessNumberEnv:
        return GuessNumberEnv(task, self.opening(task), self.max_guesses, self.guess_cost, self.impossible_cost)


@chz.chz
class GuessNumberExamplesBuilder(GuessNumber, TextGameExamplesBuilder):
    """Guesses to imitate: possible ones, drawn at random."""
