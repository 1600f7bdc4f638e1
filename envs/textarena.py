"""TextArena games as environments: alone, against an opponent, or in self-play.

An observation is the game's text as one user message, so each turn is its own Datum. In self-play
the seats of a game, two or more, form a group and are each other's baseline; with several games of
one opening, rl.advantages:SeatMean gives each seat its own. envs/elo.py rates players. Left out:
seats that learn different policies; chat between the turns.

    python rl/train_cli.py env=textarena env.game=tic_tac_toe env.test_opponent=random
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import chz
import numpy as np

from envs.opponents import OPPONENTS, Opponent, Player, listed_moves
from envs.textarena_game import Game
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, NON_NEGATIVE, WHOLE
from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import DrawnDataset, ListDataset
from posttrain.tracking.seeds import TEST_GAMES, TRAINING_GAMES
from rl.types import (
    Action,
    Env,
    EnvGroupBuilder,
    EpisodeEnd,
    Metrics,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    RolloutError,
    SeatLost,
    StepResult,
    StopCondition,
    Trajectory,
)

OPENING = 1000  # seed of random openings, where a player's moves have the player's number


class Table:
    """A game and its players: wakes a seat for its move or at the end. `opponents` move at once."""

    def __init__(self, game: Game, opponents: dict[int, Player], seed: int):
        self.game, self.opponents = game, opponents
        self._rngs = {player: np.random.default_rng([seed, player]) for player in opponents}
        self._changed = asyncio.Condition()
        self._lost: int | None = None  # the seat that left before the end

    async def wait_for_turn(self, seat: int) -> None:
        """Returns at the turn of `seat` or the end. Raises SeatLost if another seat has left."""
        async with self._changed:
            await self._opponents_move()
            await self._changed.wait_for(lambda: self.game.over or self.game.player == seat)
            self._check_seats(seat)

    async def move(self, seat: int, text: str) -> bool:
        """The move of `seat`. Returns whether it was legal. Raises SeatLost."""
        async with self._changed:
            self._check_seats(seat)
            legal = self.game.move(text)
            await self._opponents_move()
            self._changed.notify_all()
            return legal

    def _check_seats(self, seat: int) -> None:
        if self._lost is not None:
            raise SeatLost(f"{self.game.name}: seat {self._lost} failed, so seat {seat} cannot finish its game")

    async def end(self, lost_seat: int | None = None) -> None:
        """Ends an unfinished game without a result; with `lost_seat`, waiting seats get SeatLost."""
        async with self._changed:
            if not self.game.over:
                self._lost = lost_seat
                self.game.abandon()
                self._changed.notify_all()

    async def _opponents_move(self) -> None:
        while not self.game.over and self.game.player in self.opponents:
            player = self.game.player
            self.game.move(await self.opponents[player](self.game, self._rngs[player]))


class Seat(Env):
    """One player of a game."""

    def __init__(self, table: Table, seat: int, renderer: Renderer, illegal_move_penalty: float = 0.0):
        self.table, self.seat, self.renderer, self.penalty = table, seat, renderer, illegal_move_penalty
        self.had_a_turn = False  # False if the game ended before this seat could move

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        await self.table.wait_for_turn(self.seat)
        self.had_a_turn = not self.table.game.over
        return self._observation(), self.renderer.get_stop_sequences()

    async def step(self, action: Action) -> StepResult:
        """The move, then the moves of the other players. A seat that had no turn does not move."""
        if not self.had_a_turn:
            return StepResult(0.0, True, ModelInput.empty())
        message, _ = self.renderer.parse_response(action)
        game, text = self.table.game, message["content"]
        legal = await self.table.move(self.seat, text)
        await self.table.wait_for_turn(self.seat)
        return StepResult(
            reward=0.0 - self.penalty * (not legal),
            episode_done=game.over,
            next_observation=ModelInput.empty() if game.over else self._observation(),
            next_stop_condition=self.renderer.get_stop_sequences(),
            metrics={"illegal": float(not legal)},
            logs={"move": text, "legal": str(legal)} | ({"rewards": str(game.rewards)} if game.over else {}),
        )

    async def cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        """A limit that one seat meets ends the game for all, without a result."""
        await self.table.end()
        return 0.0, {}

    async def close(self) -> None:
        await self.table.end(lost_seat=self.seat)

    def _observation(self) -> ModelInput:
        return self.renderer.build_generation_prompt([Message(role="user", content=self.table.game.text)])


@dataclass(frozen=True)
class GameGroupBuilder(EnvGroupBuilder):
    """`num_games` games of one seed and opening: all seats, game after game, that no opponent has."""

    config: "TextArenaBuilder"
    renderer: Renderer
    seed: int
    opponents: dict[int, Player] = field(default_factory=dict)
    num_games: int = 1
    random_opening: int = 0
    tags: list[str] = field(default_factory=list)
    members_are_independent: bool = True

    async def make_envs(self) -> Sequence[Seat]:
        config, seats = self.config, self._seats()
        games = [config.open_position(self.seed, self.random_opening) for _ in range(self.num_games)]
        tables = [Table(game, self.opponents, self.seed) for game in games]
        return [Seat(table, seat, self.renderer, config.illegal_move_penalty) for table in tables for seat in seats]

    def _seats(self) -> list[int]:
        return [seat for seat in range(self.config.num_players) if seat not in self.opponents]

    async def compute_group_rewards(
        self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        """Each seat's outcome. Samples of a seat that had no turn are removed: they were no move.

        Raises RolloutError where a game of several seats has lost some: their baseline would be
        wrong.
        """
        seats = self._seats()
        if len(seats) > 1 and [getattr(env, "seat", None) for env in envs_G] != seats * (len(envs_G) // len(seats)):
            raise RolloutError(f"{self.config.game}: only some seats of a game could finish it")
        outcomes = []
        for trajectory, env in zip(trajectories_G, envs_G, strict=True):
            assert isinstance(env, Seat)
            if not env.had_a_turn:
                trajectory.transitions.clear()
            reward, metrics = env.table.game.outcome(env.seat)
            outcomes.append((reward, metrics | {f"reward_seat{env.seat}": reward} if len(seats) > 1 else metrics))
        return outcomes

    def logging_tags(self) -> list[str]:
        return self.tags


@chz.chz
class TextArenaBuilder(RLDatasetBuilder):
    """Any TextArena game. Held out are `num_test` games of other seeds, against `test_opponent`."""

    short_names = {"opponent": OPPONENTS, "test_opponent": OPPONENTS}
    game: str = chz.field(
        default="TicTacToe-v0-train",
        doc="TextArena's name of the game; its ending selects the observation; connect_four is ConnectFour-v0",
    )
    rules: dict[str, Any] = chz.field(
        default_factory=dict,
        doc="sizes and other arguments of the game: rules.board_size=6; a wrong name lists those there are",
    )
    num_players: int = chz.field(default=2, validator=COUNT, doc="1 plays alone; some games take 3 and more")
    board_only: bool = chz.field(default=False, doc="observe the rules and the last board, whatever the name's ending")
    opponent: Opponent | None = chz.field(
        default=None, doc="player of all other seats; None with several players is self-play"
    )
    test_opponent: Opponent | None = chz.field(default=None, doc="the same for the held-out games")
    group_size: int = chz.field(
        default=2,
        validator=COUNT,
        doc="games of one seed per group; in self-play seats per group, a multiple of num_players",
    )
    random_opening: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="up to this many first moves of a training game are random, so that self-play sees more positions",
    )
    illegal_move_penalty: float = chz.field(
        default=0.0,
        validator=NON_NEGATIVE,
        doc="subtracted from the reward for each illegal move, in addition to the game's own",
    )
    error_allowance: int | None = chz.field(
        default=None,
        validator=WHOLE,
        doc="illegal moves in a row that a player may retry before it loses; None = the game's own",
    )
    n_batches: int = chz.field(default=100, validator=COUNT, doc="training batches")
    num_test: int = chz.field(default=100, validator=WHOLE, doc="held-out games; 0 = none")
    max_tokens: int = chz.field(default=8, validator=COUNT, doc="most tokens a move needs")

    def recommended_max_tokens(self) -> int:
        return self.max_tokens

    def open_game(self, seed: int) -> Game:
        return Game(self.game, self.num_players, seed, self.error_allowance, self.board_only, self.rules)

    def open_position(self, seed: int, random_opening: int) -> Game:
        """After up to `random_opening` random moves, which are drawn again if they end the game."""
        rng = np.random.default_rng([seed, OPENING])
        while True:
            game = self.open_game(seed)
            for _ in range(rng.integers(random_opening + 1)):
                if not game.over and (moves := listed_moves(game.text)):
                    game.move(moves[rng.integers(len(moves))])
            if not game.over:
                return game

    def seats(self) -> int:
        return self.num_players if self.opponent is None else 1

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        self._check()
        group, size = self._groups(renderer, self.opponent, TRAINING_GAMES), self.batch_size

        def draw(epoch: int, index: int) -> list[GameGroupBuilder]:
            first = (epoch * self.n_batches + index) * size
            return [group(number) for number in range(first, first + size)]

        train = DrawnDataset(draw, self.n_batches)
        if not self.num_test:
            return train, None
        held_out = map(self._groups(renderer, self.test_opponent, TEST_GAMES), range(self.num_test))
        return train, ListDataset(list(held_out), size, shuffle=False)

    def _groups(self, renderer: Renderer, opponent: Opponent | None, stream: int) -> Callable[[int], GameGroupBuilder]:
        """Makes game n: its seed and, with an opponent, the learner's seat are functions of n."""
        name = opponent.name if opponent else "alone" if self.num_players == 1 else "self_play"
        player = opponent.open(self.open_game(0)) if opponent else None
        training = stream == TRAINING_GAMES
        num_games = 1 if not training else self.group_size if opponent else self.group_size // self.num_players

        def group(number: int) -> GameGroupBuilder:
            seed = int(np.random.SeedSequence([self.seed, stream, number]).generate_state(1)[0])
            seat, tags, opponents = number % self.num_players, [name], {}
            if player is not None:
                opponents = {other: player for other in range(self.num_players) if other != seat}
                tags.append(f"seat{seat}")
            return GameGroupBuilder(
                self,
                renderer,
                seed,
                opponents,
                num_games,
                random_opening=self.random_opening if training else 0,
                tags=tags,
                members_are_independent=player is not None or self.num_players == 1,
            )

        return group

    def _check(self) -> None:
        if self.num_players < 1 or (self.num_players == 1 and (self.opponent or self.test_opponent)):
            raise ConfigError(f"num_players={self.num_players}: at least 1 is needed, with an opponent at least 2")
        if self.opponent is None and self.group_size % self.num_players:
            raise ConfigError(
                f"group_size={self.group_size}: in self-play a group is the {self.num_players} seats of one or more "
                f"games; set it to {self.num_players} or a multiple"
            )
        if not listed_moves(self.open_game(0).text) and self.random_opening:
            raise ConfigError(
                f"random_opening={self.random_opening}: {self.game} does not list its legal moves; set it to 0"
            )
