"""Elo ratings of checkpoints against each other and against fixed opponents, in a TextArena game; a
command, and an evaluator inside RL runs (`evaluators.0=elo`). Every pair plays the same openings,
each from both sides; rl/ratings.py turns points into ratings. Left out: games against people.

  python -m envs.elo models=runs/multiplayer opponents.0=random opponents.1=minimax log_path=runs/elo
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from itertools import combinations
from pathlib import Path
from typing import Any

import chz
import numpy as np

from envs.opponents import OPPONENTS, Opponent, Player, RandomPlayer, policy_player
from envs.textarena import TextArenaBuilder
from envs.textarena_game import Game
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, NON_NEGATIVE, NUMBER, SEED, TEMPERATURE
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import COLORS, finish_axis, panel_axes, save_figure
from posttrain.tracking.jsonl import write_atomically
from posttrain.tracking.metrics_log import Metrics
from posttrain.tracking.model_source import find_model
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.seeds import RATED_GAMES
from posttrain.tracking.settings import changes, changes_text, config_to_json, read_settings, with_later_options
from rl.names import ENVS
from rl.ratings import Ratings, elo_ratings
from rl.rollouts import raise_first
from rl.types import RolloutError
from supervised.evaluators import CustomEvaluator, Evaluated, EvaluatorBuilder

POLICY = "policy"  # the trained policy's name in a run
MOST_MOVES = 2000  # of a game; a longer one has no result
SAME_GAMES = 0.5  # a pair with fewer distinct games than this share is worth a line


@chz.chz
class Tournament:
    """What is played, and how it is rated."""

    short_names = {"env": {"textarena": ENVS["textarena"]}, "opponents.*": OPPONENTS}
    env: TextArenaBuilder = chz.field(
        default_factory=TextArenaBuilder,
        doc="the game, as in training; env.random_opening is up to how many first moves are random",
    )
    opponents: list[Opponent] = chz.field(
        default_factory=lambda: [RandomPlayer()],
        doc="fixed players: opponents.0=random, minimax, or the folder of a saved policy",
    )
    num_games: int = chz.field(default=100, validator=COUNT, doc="games of each pair, half of them from each side")
    temperature: float = chz.field(
        default=1.0, validator=TEMPERATURE, doc="of the rated policies; with 0, games differ by their openings alone"
    )
    max_tokens: int | None = chz.field(default=None, validator=COUNT, doc="most tokens of a move; None = env's")
    anchor: str | None = chz.field(default=None, doc="player whose rating is given; None = the first opponent")
    anchor_rating: float = chz.field(default=0.0, validator=NUMBER, doc="the anchor's rating")
    prior_draws: float = chz.field(
        default=1.0,
        validator=NON_NEGATIVE,
        doc="draws added to the games of each pair: keep the rating of an unbeaten player finite; 0 = none",
    )
    concurrent_games: int = chz.field(default=256, validator=COUNT, doc="most games under way")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of openings, moves of opponents, and sampling")


@dataclass(frozen=True)
class Pair:
    """The games of two players: the points of the first, and how many games were distinct or lost
    because a player failed; moves, and illegal ones, of each."""

    games: int
    points: float
    distinct: int
    lost: int
    moves: tuple[int, int]
    illegal: tuple[int, int]


Pairs = dict[tuple[str, str], Pair]


async def play_pairs(config: Tournament, players: Mapping[str, Player], pairs: Iterable[tuple[str, str]]) -> Pairs:
    """`num_games` of each pair of names. The games are functions of `seed`, as far as the players are."""
    slots = asyncio.Semaphore(config.concurrent_games)
    try:
        async with asyncio.TaskGroup() as tasks:
            playing = {
                (first, second): tasks.create_task(_play_pair(config, slots, players[first], players[second]))
                for first, second in pairs
            }
    except BaseExceptionGroup as errors:
        raise_first(errors)
    return {names: task.result() for names, task in playing.items()}


async def _play_pair(config: Tournament, slots: asyncio.Semaphore, first: Player, second: Player) -> Pair:
    """Raises a game's RolloutError if no game could be finished."""

    async def game(k: int) -> Played | RolloutError:
        async with slots:
            try:
                return await play_game(config, first, second, k)
            except RolloutError as error:
                return error

    outcomes = await asyncio.gather(*(game(k) for k in range(config.num_games)))
    games = [outcome for outcome in outcomes if isinstance(outcome, Played)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, RolloutError)]
    if not games:
        raise failures[0]
    return Pair(
        games=len(games),
        points=sum(game.points for game in games),
        distinct=len({(game.seats, tuple(text for _, text, _ in game.moves)) for game in games}),
        lost=len(failures),
        moves=_by_side([side for game in games for side, _, _ in game.moves]),
        illegal=_by_side([side for game in games for side, _, legal in game.moves if not legal]),
    )


def _by_side(sides: Sequence[int]) -> tuple[int, int]:
    return sides.count(0), sides.count(1)


@dataclass(frozen=True)
class Played:
    """A finished game: who had each seat (0 the first player, 1 the second); who moved, the move, and
    whether it was legal; the points of the first player."""

    seats: tuple[int, ...]
    moves: list[tuple[int, str, bool]]
    points: float


async def play_game(config: Tournament, first: Player, second: Player, k: int) -> Played:
    """Game k of a pair. Games 2n and 2n + 1 have one opening; in the first the first player, in the
    second the second player, has seat n alone, and the other all other seats. RolloutError if it
    has no result."""
    opening, alone = divmod(k, 2)
    seed = int(np.random.SeedSequence([config.seed, RATED_GAMES, opening]).generate_state(1)[0])
    game = config.env.open_position(seed, config.env.random_opening)
    seat = opening % game.num_players
    seats = tuple(alone if number == seat else 1 - alone for number in range(game.num_players))
    rngs = [np.random.default_rng([seed, alone, number]) for number in range(game.num_players)]
    moves: list[tuple[int, str, bool]] = []
    while not game.over:
        if len(moves) == MOST_MOVES:
            raise RolloutError(f"{game.name} had not ended after {MOST_MOVES} moves")
        player = game.player
        text = await (first, second)[seats[player]](game, rngs[player])
        moves.append((seats[player], text, game.move(text)))
    won = points(game, seat)
    return Played(seats, moves, 1 - won if alone else won)


def points(game: Game, seat: int) -> float:
    """The share of the other seats whose reward is smaller, equal ones by half: 1, 1/2 or 0 of two."""
    rewards_S = [game.outcome(player)[0] for player in range(game.num_players)]
    others = [reward for player, reward in enumerate(rewards_S) if player != seat]
    return sum((rewards_S[seat] > reward) + 0.5 * (rewards_S[seat] == reward) for reward in others) / len(others)


def rate(config: Tournament, names: Sequence[str], pairs: Pairs) -> Ratings:
    """Elo ratings from the points of all pairs."""
    anchor = find_anchor(config, names)
    points_NN = np.zeros((len(names), len(names)))
    for (first, second), pair in pairs.items():
        i, j = names.index(first), names.index(second)
        points_NN[i, j] += pair.points
        points_NN[j, i] += pair.games - pair.points
    return elo_ratings(points_NN, names, anchor, config.anchor_rating, config.prior_draws)


def find_anchor(config: Tournament, names: Sequence[str]) -> int:
    """Its place among `names`. ConfigError if it has none."""
    anchor = config.anchor or (config.opponents[0].label() if config.opponents else names[0])
    if anchor not in names:
        raise ConfigError(f"anchor={anchor}: no player of that name; there are {', '.join(names)}")
    return names.index(anchor)


def open_opponents(config: Tournament) -> dict[str, Player]:
    """The fixed players by name; a saved policy has the name of its run or folder."""
    if config.env.num_players < 2:
        raise ConfigError(f"env.num_players={config.env.num_players}: a rating needs games of 2 players or more")
    game, players = config.env.open_game(config.seed), {}
    for opponent in config.opponents:
        if opponent.label() in players:
            raise ConfigError(f"opponents: two are called {opponent.label()}")
        players[opponent.label()] = opponent.open(game)
    return players


# --- in a run -------------------------------------------------------------------------------------


@chz.chz
class EloEvaluator(Tournament, EvaluatorBuilder):
    """The policy's Elo rating among fixed opponents: `NAME/rating`, `NAME/score_random`, ..."""

    name: str = chz.field(default="elo", doc="the metrics are NAME/rating, and so on")

    async def __call__(self, renderer: Renderer) -> CustomEvaluator:
        if not self.opponents:
            raise ConfigError(f"{self.name}: no opponents; give opponents.0=random, or the folder of a saved policy")
        fixed = open_opponents(self)
        if POLICY in fixed:
            raise ConfigError(f"{self.name}: an opponent is called {POLICY}, as the trained policy is")
        find_anchor(self, [POLICY, *fixed])  # an error before the games
        between_fixed: Pairs = {}

        async def evaluate(model: Evaluated) -> Metrics:
            if not between_fixed:  # once: they do not change
                between_fixed.update(await play_pairs(self, fixed, combinations(fixed, 2)))
            max_tokens = self.max_tokens or self.env.recommended_max_tokens()
            player = policy_player(await model.sampling_client(), renderer, max_tokens, self.temperature)
            played = await play_pairs(self, {POLICY: player, **fixed}, [(POLICY, name) for name in fixed])
            ratings = rate(self, [POLICY, *fixed], between_fixed | played)
            moves, illegal = sum(pair.moves[0] for pair in played.values()), sum(p.illegal[0] for p in played.values())
            return {
                f"{self.name}/rating": float(ratings.elo_N[0]),
                f"{self.name}/rating_stderr": float(ratings.stderr_N[0]),
                f"{self.name}/illegal": illegal / max(moves, 1),
                f"{self.name}/games_lost": float(sum(pair.lost for pair in played.values())),
            } | {f"{self.name}/score_{name}": pair.points / pair.games for (_, name), pair in played.items()}

        return evaluate


# --- the command ----------------------------------------------------------------------------------


@chz.chz
class Config(Tournament):
    """Elo ratings of models and fixed players."""

    models: list[str] = chz.field(
        default_factory=list,
        doc="run folders, checkpoints, model folders, presets or hub names, with commas; 'runs/x/checkpoints/0*' is "
        "all that match, in order",
    )
    renderer_name: str | None = chz.field(
        default=None, doc="role_colon, chat_template or plain; None = that of the model's run, else the model's own"
    )
    log_path: str = log_path_field("runs/elo", doc="the folder of the results")
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine samples")


async def main(config: Config) -> dict[str, Any]:
    """Plays every pair of players; writes results.json and elo.png to `log_path`, prints two tables."""
    _check_folder(config)
    models = [find_model(name) for name in _expanded(config.models)]
    players = open_opponents(config)
    labels = [source.label for source in models] + list(players)
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"two players are called {twice[0]}: give each once, or rename a folder")
    if len(labels) < 2:
        raise ConfigError("a rating needs two players or more: give models=, opponents.0=, ...")
    find_anchor(config, labels)  # an error before the games
    max_tokens = config.max_tokens or config.env.recommended_max_tokens()
    from posttrain.backend.service_client import ServiceClient  # with torch, for which --help does not wait

    with ServiceClient(config.backend) as service:
        for source in models:
            client = source.open(service, config.seed)
            renderer = get_renderer(config.renderer_name or source.renderer_name, client.get_tokenizer())
            players[source.label] = policy_player(client, renderer, max_tokens, config.temperature)
        pairs = await play_pairs(config, players, combinations(labels, 2))
    results = to_json(config, labels, pairs, rate(config, labels, pairs), len(models))
    write_results(Path(config.log_path), results)
    return results


def _check_folder(config: Config) -> None:
    """Raises ConfigError for a folder with a run, or with other results."""
    folder = Path(config.log_path)
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder} holds a training run: choose another log_path for the ratings")
    if (folder / "results.json").exists():
        before = read_settings(folder / "results.json").get("settings")
        if before is None or (different := changes(with_later_options(before, config), config_to_json(config))):
            why = changes_text(different) if before is not None else "another command"
            raise ConfigError(f"{folder}/results.json was made with {why}: choose another log_path, or delete it")


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    print_results(results)
    print(f"results: {folder / 'results.json'}, {save_figure(draw(results), folder / 'elo.png')}")


def _expanded(models: Sequence[str]) -> list[str]:
    """Patterns as the sorted folders that match. ConfigError if none does."""
    names: list[str] = []
    for model in models:
        matches = sorted(glob(model)) if "*" in model else [model]
        if not matches:
            raise ConfigError(f"models={model}: no folder matches")
        names += matches
    return names


def to_json(config: Config, names: Sequence[str], pairs: Pairs, ratings: Ratings, num_models: int) -> dict[str, Any]:
    """Models first, in the order given, then the fixed players."""
    players = []
    for i, name in enumerate(names):
        played = [(pair, names_of.index(name)) for names_of, pair in pairs.items() if name in names_of]
        scored = sum(pair.games - pair.points if side else pair.points for pair, side in played)
        players.append(
            {
                "name": name,
                "fixed": i >= num_models,
                "elo": float(ratings.elo_N[i]),
                "stderr": float(ratings.stderr_N[i]),
                "games": sum(pair.games for pair, _ in played),
                "points": float(scored),
                "illegal": sum(pair.illegal[side] for pair, side in played)
                / max(1, sum(pair.moves[side] for pair, side in played)),
            }
        )
    listed = [{"first": first, "second": second, **asdict(pair)} for (first, second), pair in pairs.items()]
    return {"settings": config_to_json(config), "players": players, "pairs": listed}


def print_results(results: Mapping[str, Any]) -> None:
    """Players from the best down, then the share of points of each row against each column."""
    from rich import get_console
    from rich.table import Table

    players = sorted(results["players"], key=lambda player: -player["elo"])
    settings = results["settings"]
    title = f"{settings['env']['game']}: {settings['num_games']} games of each pair"
    table = Table("", "Elo", "± standard error", "points", "games", "illegal moves", title=title, title_justify="left")
    for player in players:
        numbers = (f"{player['elo']:.0f}", f"{player['stderr']:.0f}", f"{player['points']:g}", str(player["games"]))
        table.add_row(player["name"], *numbers, f"{player['illegal']:.1%}")
    get_console().print(table)
    shares = {}
    for pair in results["pairs"]:
        shares[pair["first"], pair["second"]] = pair["points"] / pair["games"]
        shares[pair["second"], pair["first"]] = 1 - pair["points"] / pair["games"]
        names = f"{pair['first']} and {pair['second']}"
        if pair["distinct"] < SAME_GAMES * pair["games"]:
            print(
                f"{names} played only {pair['distinct']} different games of {pair['games']}: their standard error is too "
                "small; raise temperature or env.random_opening"
            )
        if pair["lost"]:
            print(f"{names}: {pair['lost']} games without a result, not counted")
    names = [player["name"] for player in players]
    cross = Table("share of points of the row", *(str(n + 1) for n in range(len(names))))
    for n, row in enumerate(names):
        cells = ("" if row == column else f"{shares[row, column]:.2f}" for column in names)
        cross.add_row(f"{n + 1} {row}", *cells)
    get_console().print(cross)


def draw(results: Mapping[str, Any]) -> Any:
    """The models' ratings in the order given, with 95 % intervals; fixed players as lines."""
    figure, (axis,) = panel_axes(1, size=(6.0, 3.2))
    models = [player for player in results["players"] if not player["fixed"]]
    places, elos = range(len(models)), [player["elo"] for player in models]
    if models:
        errors = [1.96 * player["stderr"] for player in models]
        axis.errorbar(places, elos, yerr=errors, color=COLORS[0], marker="o", markersize=4, capsize=3)
        axis.set_xticks(places, [player["name"] for player in models], rotation=20, ha="right")
    for player, color in zip([p for p in results["players"] if p["fixed"]], COLORS[1:], strict=False):
        axis.axhline(player["elo"], label=player["name"], color=color, linestyle="--", linewidth=1.2)
    finish_axis(axis, "Elo", bool(axis.get_legend_handles_labels()[1]), "", integer=False)
    return figure


def command() -> None:
    run_command(main, Config, Tournament.short_names)


if __name__ == "__main__":
    command()
