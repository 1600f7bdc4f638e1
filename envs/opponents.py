"""Opponents for games: a random player, a perfect one (tic-tac-toe), a frozen policy; and a policy's
client as a player.

A Player gets the game and its own generator, and answers with text, as a policy does. Its moves are
a pure function of the generator's seed and the game. Left out: search for games other than
tic-tac-toe; opponents that learn (self-play has no opponent).
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import chz
import numpy as np

from envs.textarena_game import Game
from posttrain.backend.errors import ConfigError, CookbookError
from posttrain.backend.types import SamplingParams
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.model_source import find_model
from rl.frozen_policy import FrozenPolicy, FrozenPolicyError
from rl.types import RolloutError

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.sampling_client import SamplingClient

Player = Callable[[Game, np.random.Generator], Awaitable[str]]

MOVES_LINE = re.compile(r"(?:available|valid|legal|possible)[ _](?:moves|actions)[^\[\n]*\[.*", re.IGNORECASE)
MOVE = re.compile(r"\[[^\[\]]+\]")


@chz.chz
class Opponent:
    """Configuration of a player."""

    name = "opponent"  # metrics against this opponent are also logged under this name

    def open(self, game: Game) -> Player:
        """Loads the player, once per run. Raises ConfigError if it cannot play `game`."""
        raise NotImplementedError

    def label(self) -> str:
        """What tells the player from others of its kind, in tables."""
        return self.name


def listed_moves(text: str) -> list[str]:
    """The moves in the last list of a game's text, "Available Moves: '[0]', '[4]'"; [] without one."""
    lines = MOVES_LINE.findall(text)
    return MOVE.findall(lines[-1]) if lines else []


@chz.chz
class RandomPlayer(Opponent):
    """Any of the moves that the game lists, uniformly; where it lists none, any of `moves`."""

    moves: str = chz.field(
        default="", doc="for a game without a list of legal moves: what to choose from, '[col 0] [col 1]'"
    )
    name = "random"

    def open(self, game: Game) -> Player:
        if moves := MOVE.findall(self.moves):
            return _one_of(moves)
        if self.moves:
            raise ConfigError(f"moves={self.moves}: give moves in brackets, such as '[0] [1]'")
        if not listed_moves(game.text):
            raise ConfigError(
                f"{game.name} does not list its legal moves, so a random player cannot play it: give it some, such as "
                "moves='[0] [1]', or take a model as the opponent"
            )
        return _random_move


def _one_of(moves: Sequence[str]) -> Player:
    async def move(game: Game, rng: np.random.Generator) -> str:
        return moves[int(rng.integers(len(moves)))]

    return move


async def _random_move(game: Game, rng: np.random.Generator) -> str:
    moves = listed_moves(game.text)
    if not moves:
        raise RolloutError(
            f"{game.name} lists no moves in this position, so the random player cannot go on: {game.text[-200:]!r}"
        )
    return moves[rng.integers(len(moves))]


@chz.chz
class MinimaxPlayer(Opponent):
    """Perfect tic-tac-toe: any of the best moves, uniformly; a slow win is as good as a fast one."""

    name = "minimax"

    def open(self, game: Game) -> Player:
        if not game.name.startswith("TicTacToe-v0"):
            raise ConfigError(f"minimax plays TicTacToe-v0 and its variants, not {game.name}")
        return _minimax_player


async def _minimax_player(game: Game, rng: np.random.Generator) -> str:
    return minimax_move(game, rng)


def minimax_move(game: Game, rng: np.random.Generator) -> str:
    """A best move of a game of tic-tac-toe."""
    board = "".join(cell or " " for row in game.state.game_state["board"] for cell in row)
    values = {cell: -_value(after, OTHER_MARK[mark]) for cell, after, mark in _moves(board, "OX"[game.player])}
    best = [cell for cell, value in values.items() if value == max(values.values())]
    return f"[{best[rng.integers(len(best))]}]"


OTHER_MARK = {"X": "O", "O": "X"}
LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]


def _moves(board: str, mark: str) -> list[tuple[int, str, str]]:
    """Each empty cell, the board with `mark` in it, and `mark`."""
    return [(i, board[:i] + mark + board[i + 1 :], mark) for i, cell in enumerate(board) if cell == " "]


@cache
def _value(board: str, mark: str) -> int:
    """1, 0 or -1: the result of `mark`, which is to move, under perfect play."""
    if any(board[a] == board[b] == board[c] == OTHER_MARK[mark] for a, b, c in LINES):
        return -1
    return max((-_value(after, OTHER_MARK[mark]) for _, after, _ in _moves(board, mark)), default=0)


@chz.chz
class FrozenPlayer(Opponent):
    """A saved policy that does not learn. A truncated response is its move, as with the learner."""

    policy: FrozenPolicy = chz.field(doc="weights and sampling options; with temperature 0 the player repeats itself")
    name = "frozen"

    def label(self) -> str:
        return find_model(self.policy.model_path or self.policy.base_model or "").label

    def open(self, game: Game) -> Player:
        client, policy = self.policy.open(), self.policy
        renderer = get_renderer(policy.find_renderer_name(), client.get_tokenizer())
        return policy_player(client, renderer, policy.max_tokens, policy.temperature)


def policy_player(client: "SamplingClient", renderer: Renderer, max_tokens: int, temperature: float) -> Player:
    """A policy as a player. Raises FrozenPolicyError where it cannot answer."""

    async def move(game: Game, rng: np.random.Generator) -> str:
        prompt = renderer.build_generation_prompt([Message(role="user", content=game.text)])
        seed = int(rng.integers(2**62))
        params = SamplingParams(max_tokens, seed, renderer.get_stop_sequences(), temperature)
        try:
            response = await client.sample_async(prompt, 1, params)
        except CookbookError as error:
            raise FrozenPolicyError(f"{game.name}: the opponent failed with {type(error).__name__}: {error}") from error
        return renderer.parse_response(response.sequences[0].tokens)[0]["content"]

    return move


# short names of the command line; a folder is the policy saved there
OPPONENTS = {
    "random": "envs.opponents:RandomPlayer",
    "minimax": "envs.opponents:MinimaxPlayer",
    "frozen": "envs.opponents:FrozenPlayer",
    "*/*": "envs.opponents:FrozenPlayer policy.model_path={}",
}
