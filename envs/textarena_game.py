"""One TextArena game (github.com/LeonGuertler/TextArena) as a pure function of its seed and of the
moves made.

TextArena draws from Python's and numpy's global generators while a game goes on. Each game here
owns a state of both, which is put in place for the length of a call: many games can run in one
event loop, and the program's own generators stay as they were. What needs word lists, a hosted
judge or a later Python is refused when it is opened. Left out: other threads that draw from the
global generators.
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
    """This TextArena game does not exist, or lacks something on this machine; the message says
    what.
    """


class Game:
    """A game under way. `player` is to move and reads `text`; `over` says that nobody is.

    `error_allowance` is how many illegal moves in a row a player may take back before it loses;
    None leaves it to the game. `board_only` shows the rules and the last board instead of what the
    game's name stands for. Raises GameUnavailable.
    """

    def __init__(
        self, name: str, num_players: int, seed: int, error_allowance: int | None = None, board_only: bool = False
    ):
        self.name, self.num_players = name, num_players
        self.over, self.player, self.text = False, 0, ""
        self.moves, self.ended_illegally = 0, False
        # by player, once the game has ended by its own rules
        self.rewards: dict[int, float] | None = None
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
        """The reward of a player after the game, and win, draw and loss as 0 or 1. An abandoned
        game has reward 0 and none of the three.

        Who has the highest reward has won, unless all have it; a game for one player is won or
        lost.
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
    """From now on `note()` runs before `target.method(...)`: the one place where every TextArena
    game reports an illegal move.
    """
    original = getattr(target, method, None)
    if original is None:
        return

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    setattr(target, method, noted)


def _open(name: str, num_players: int, seed: int, board_only: bool) -> Any:
    """The TextArena environment, reset. Whatever its own code raises here becomes a GameUnavailable
    that says what to do.
    """
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
    except Exception as error:  # another project's code, which raises what it likes
        raise GameUnavailable(
            f"TextArena's {name} does not open for {num_players} players: {_remedy(error)}"
        ) from error
    return env


def _bare(env: Any) -> Any:
    """The game without the wrappers that decide what players are shown."""
    while "env" in vars(env):
        env = env.env
    return env


def _remedy(error: Exception) -> str:
    said = " ".join(str(error).split())
    match error:
        case LookupError() if "NLTK" in said:
            return "it needs word lists: python -m nltk.downloader words averaged_perceptron_tagger_eng"
        case SyntaxError():
            return f"its source needs Python 3.12 or later ({said})"
        case ImportError():
            return f"it needs a package that is not installed ({said})"
        case AssertionError():
            return f"is this number of players right? set num_players ({said or 'assertion without a message'})"
        case ValueError() if "API" in said:
            return f"it asks a hosted model to judge, which needs a key and the network ({said})"
        case _:
            return f"{type(error).__name__}: {said:.200}"
