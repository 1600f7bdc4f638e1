"""One TextArena game (github.com/LeonGuertler/TextArena), a pure function of its seed and moves.

TextArena draws from the global generators of Python and numpy. Each game here owns a state of both,
in place only during a call: many games run in one event loop, and the program's own generators stay
unchanged. Left out: other threads that draw from the global generators.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from posttrain.backend.errors import CookbookError
from rl.types import Metrics, RolloutError

SOLVED = 1.0  # the reward from which a game for one player counts as won


class GameUnavailable(CookbookError):
    """This TextArena game does not exist, or lacks something on this machine, named in the message."""


class Game:
    """A game under way: `player` is to move and reads `text`, until `over`.

    `error_allowance`: illegal moves in a row before a player loses; None leaves it to the game.
    `board_only`: the observation is the rules and the last board. Raises GameUnavailable.
    """

    def __init__(
        self, name: str, num_players: int, seed: int, error_allowance: int | None = None, board_only: bool = False
    ):
        self.name, self.num_players = name, num_players
        self.over, self.player, self.text = False, 0, ""
        self.moves, self.ended_illegally = 0, False
        self.rewards: dict[int, float] | None = None  # by player, after an end by the game's rules
        self._random = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()
        with self._own_randomness():
            self.env = _open(name, num_players, seed, board_only)
            self.state = self.env.state
            if error_allowance is not None:
                self.state.error_allowance = error_allowance
            self._illegal = False
            _call_before(self.state, "set_invalid_move", self._note_illegal)
            self.player, self.text = self.env.get_observation()

    def move(self, text: str) -> bool:
        """The current player's move. Returns whether it was legal."""
        assert not self.over, "the game is over"
        self._illegal = False
        with self._own_randomness():
            self.over, _ = self.env.step(action=text)
            if self.over:
                self.rewards, _ = self.env.close()
            else:
                self.player, self.text = self.env.get_observation()
        self.moves += 1
        self.ended_illegally = self.over and self._illegal
        return not self._illegal

    def abandon(self) -> None:
        """Ends the game without a result."""
        self.over = True

    def outcome(self, player: int) -> tuple[float, Metrics]:
        """The reward of a player, and win, draw and loss as 0 or 1; 0.0 without them if abandoned.

        The highest reward wins, unless all are equal; a game for one player is won or lost.
        """
        metrics = {"turns": float(self.moves), "ended_illegally": float(self.ended_illegally)}
        if self.rewards is None:
            return 0.0, metrics | {"unfinished": 1.0}
        if player not in self.rewards:
            raise RolloutError(f"{self.name} ended without a reward for player {player}: {self.rewards}")
        if wrong := [reward for reward in self.rewards.values() if not isinstance(reward, int | float)]:
            raise RolloutError(
                f"{self.name} gave the reward {wrong[0]!r}: a fault of the game, which TextArena 0.7.4 has in several"
            )
        reward, best = float(self.rewards[player]), max(self.rewards.values())
        draw = self.num_players > 1 and len(set(self.rewards.values())) == 1
        win = not draw and reward == best and (self.num_players > 1 or reward >= SOLVED)
        results = {"win": win, "draw": draw, "loss": not win and not draw, "unfinished": False}
        return reward, metrics | {name: float(value) for name, value in results.items()}

    def _note_illegal(self) -> None:
        self._illegal = True

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        outside = random.getstate(), np.random.get_state()
        random.setstate(self._random)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._random, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(outside[0])
            np.random.set_state(outside[1])


def _call_before(target: Any, method: str, note: Any) -> None:
    """Makes `note()` run before `target.method(...)`, through which all games report illegal moves."""
    original = getattr(target, method, None)
    if original is None:
        return

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    setattr(target, method, noted)


def _open(name: str, num_players: int, seed: int, board_only: bool) -> Any:
    """The TextArena environment, reset. Any exception of its code becomes a GameUnavailable."""
    try:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
        from textarena.wrappers import ActionFormattingWrapper, GameBoardObservationWrapper
    except ImportError as error:
        raise GameUnavailable(f"textarena cannot be imported ({error}): pip install textarena") from error
    if name not in ENV_REGISTRY:
        import difflib

        near = difflib.get_close_matches(name, ENV_REGISTRY, n=1, cutoff=0)[0]
        raise GameUnavailable(f"TextArena has no game {name!r}; did you mean {near!r}? It has {len(ENV_REGISTRY)}")
    try:
        env = textarena.make(name)
        if board_only:
            env = ActionFormattingWrapper(GameBoardObservationWrapper(_bare(env)))
        env.reset(num_players=num_players, seed=seed)
    except Exception as error:  # another project's code may raise anything
        raise GameUnavailable(
            f"TextArena's {name} does not open for {num_players} players: {_remedy(error)}"
        ) from error
    return env


def _bare(env: Any) -> Any:
    """The game without the wrappers that select the observation."""
    while "env" in vars(env):
        env = env.env
    return env


def _remedy(error: Exception) -> str:
    text = " ".join(str(error).split())
    match error:
        case LookupError() if "NLTK" in text:
            return "it needs word lists: python -m nltk.downloader words averaged_perceptron_tagger_eng"
        case SyntaxError():
            return f"its source needs Python 3.12 or later ({text})"
        case ImportError():
            return f"it needs a package that is not installed ({text})"
        case AssertionError():
            return f"is this number of players right? set num_players ({text or 'assertion without a message'})"
        case ValueError() if "API" in text:
            return f"it asks a hosted model to judge, which needs a key and the network ({text})"
        case _:
            return f"{type(error).__name__}: {text:.200}"
