"""One TextArena game (github.com/LeonGuertler/TextArena), a pure function of its seed and moves.

TextArena draws from the global generators of Python and numpy. Each game here owns a state of both,
in place only during a call: many games run in one event loop, and the program's own generators stay
unchanged. Left out: other threads that draw from the global generators.
"""

import difflib
import inspect
import io
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any

import numpy as np

from posttrain.backend.errors import ConfigError, CookbookError, one_line
from posttrain.backend.extras import how_to_install
from rl.types import EnvError, Metrics, RolloutError

SOLVED = 1.0  # the reward from which a game for one player counts as won


class GameUnavailable(CookbookError):
    """This TextArena game does not exist, or lacks something on this machine, named in the message."""


class Game:
    """A game under way: `player` is to move and reads `text`, until `over`.

    `error_allowance`: illegal moves in a row before a player loses; None leaves it to the game.
    `board_only`: the observation is the rules and the last board. `rules`: arguments of the game's
    class, {"board_size": 6}. Raises GameUnavailable, and ConfigError for a rule the game lacks.
    """

    def __init__(
        self,
        name: str,
        num_players: int,
        seed: int,
        error_allowance: int | None = None,
        board_only: bool = False,
        rules: Mapping[str, Any] | None = None,
    ):
        self.name, self.num_players = full_name(name), num_players
        self.over, self.player, self.text = False, 0, ""
        self.moves, self.ended_illegally = 0, False
        self.rewards: dict[int, float] | None = None  # by player, after an end by the game's rules
        self._random = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()
        with self._own_randomness():
            self.env = _open(self.name, num_players, seed, board_only, rules or {})
            self.state = self.env.state
            if error_allowance is not None:
                self.state.error_allowance = error_allowance
            self._illegal = False
            _call_before(self.state, "set_invalid_move", self._note_illegal)
            self.player, self.text = self.env.get_observation()

    def move(self, text: str) -> bool:
        """The current player's move. Returns whether it was legal. EnvError if the game's code raises."""
        assert not self.over, "the game is over"
        self._illegal = False
        try:
            with self._own_randomness():
                self.over, _ = self.env.step(action=text)
                if self.over:
                    self.rewards, _ = self.env.close()
                else:
                    self.player, self.text = self.env.get_observation()
        except Exception as error:  # another project's code may raise anything
            raise EnvError(f"{self.name}, move {text[:60]!r}: {type(error).__name__}: {error}") from error
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


def full_name(name: str) -> str:
    """TextArena's name of a game: itself, or without "-v0", capitals and separators ("connect_four").
    GameUnavailable names the nearest."""
    names = _registry()
    if name in names:
        return name
    plain = {_plain(full): full for full in reversed(list(names))}
    if full := plain.get(_plain(name)) or plain.get(_plain(name) + "v0"):
        return full
    near = plain[difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0)[0]]
    raise GameUnavailable(f"TextArena has no game {name!r}; did you mean {near!r}? It has {len(names)}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _registry() -> Mapping[str, Any]:
    try:
        with redirect_stderr(io.StringIO()):  # NLTK's downloader writes to the one it is imported with
            import textarena  # noqa: F401 (fills the registry)
        from textarena.envs.registration import ENV_REGISTRY
    except ImportError as error:
        raise GameUnavailable(f"textarena cannot be imported ({error}): {how_to_install('textarena')}") from error
    return ENV_REGISTRY


def rules_of(name: str) -> dict[str, Any]:
    """The arguments that `rules` may set, with the values they have in game `name`."""
    spec = _registry()[full_name(name)]
    module, _, class_name = str(spec.entry_point).partition(":")
    parameters = inspect.signature(getattr(import_module(module), class_name)).parameters.values()
    named = [parameter for parameter in parameters if parameter.kind != inspect.Parameter.VAR_KEYWORD]
    return {parameter.name: spec.kwargs.get(parameter.name, parameter.default) for parameter in named}


def _open(name: str, num_players: int, seed: int, board_only: bool, rules: Mapping[str, Any]) -> Any:
    """The TextArena environment, reset. Any exception of its code becomes a GameUnavailable."""
    import textarena
    from textarena.wrappers import ActionFormattingWrapper, GameBoardObservationWrapper

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # some print what they do
            _check_rules(name, rules)
            env = textarena.make(name, **rules)
            if board_only:
                env = ActionFormattingWrapper(GameBoardObservationWrapper(_bare(env)))
            env.reset(num_players=num_players, seed=seed)
    except ConfigError:
        raise
    except Exception as error:  # another project's code may raise anything
        given = "".join(f", rules.{key}={value}" for key, value in rules.items())
        raise GameUnavailable(
            f"TextArena's {name} does not open for {num_players} players{given}: {_remedy(error)}"
        ) from error
    return env


def _check_rules(name: str, rules: Mapping[str, Any]) -> None:
    if not rules:
        return
    known = rules_of(name)
    for key in rules.keys() - known.keys():
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        listed = ", ".join(f"{rule}={value}" for rule, value in known.items()) or "none"
        raise ConfigError(f"rules.{key}: {name} has no such rule; {hint}it has {listed}")


def _bare(env: Any) -> Any:
    """The game without the wrappers that select the observation."""
    while "env" in vars(env):
        env = env.env
    return env


def _remedy(error: Exception) -> str:
    text = one_line(error)
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
