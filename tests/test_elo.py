"""Elo ratings: by hand, against Hunter's MM algorithm, against simulated players; tournaments of
two and more seats; the command and the evaluator inside a run.
"""

import asyncio
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import chz
import numpy as np
import pytest

from envs import elo
from envs.elo import Config, EloEvaluator, Tournament, draw, main, play_game, play_pairs, points, rate, to_json
from envs.opponents import FrozenPlayer, MinimaxPlayer, RandomPlayer
from envs.textarena import TextArenaBuilder
from envs.textarena_game import Game
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import parse
from posttrain.tracking.metrics_log import Metrics, read_metrics
from rl import train
from rl.frozen_policy import FrozenPolicy
from rl.ratings import elo_ratings
from rl.train_cli import CLIConfig
from rl.types import EnvError, RolloutError
from supervised.evaluators import Evaluated
from supervised.names import EVALUATOR_OPTIONS
from tests.conftest import ROOT

GAME = TextArenaBuilder(error_allowance=0, board_only=True, batch_size=2, n_batches=1, num_test=0, max_tokens=4)
TORCH = BackendConfig(engine="torch")


def test_two_players_by_hand() -> None:
    """7 points of 10: odds of 7 to 3, 400 log10(7/3) Elo; the variance in nats is 1 / (10 x 0.7 x 0.3)."""
    ratings = elo_ratings(np.array([[0, 3.0], [7.0, 0]]), ["a", "b"], anchor_rating=1000, prior_draws=0)
    assert ratings.elo_N == pytest.approx([1000, 1000 + 400 * np.log10(7 / 3)])
    assert ratings.stderr_N == pytest.approx([0, 400 / np.log(10) / np.sqrt(2.1)])
    # six wins, two draws, two losses are the same seven points; and one drawn game more
    with_prior = elo_ratings(np.array([[0, 3.0], [7.0, 0]]), ["a", "b"], prior_draws=1)
    assert with_prior.elo_N[1] == pytest.approx(400 * np.log10(7.5 / 3.5))
    unbeaten = elo_ratings(np.array([[0, 0.0], [10.0, 0]]), ["a", "b"], prior_draws=1)
    assert unbeaten.elo_N[1] == pytest.approx(400 * np.log10(10.5 / 0.5))
    assert unbeaten.stderr_N[1] > 200  # little is known of one who always wins


def hunter_mm(points_NN: np.ndarray, anchor: int) -> np.ndarray:
    """Hunter 2004, eq. 3: gamma_i <- wins_i / sum_j games_ij / (gamma_i + gamma_j)."""
    games_NN, gamma_N = points_NN + points_NN.T, np.ones(len(points_NN))
    for _ in range(20_000):
        gamma_N = points_NN.sum(1) / (games_NN / (gamma_N[:, None] + gamma_N[None, :])).sum(1)
        gamma_N = gamma_N / gamma_N[anchor]
    return 400 * np.log10(gamma_N)


def test_ratings_equal_hunters_algorithm_and_the_errors_a_numerical_hessian() -> None:
    rng = np.random.default_rng(0)
    points_NN = rng.integers(0, 9, (5, 5)) + 0.5 * rng.integers(0, 2, (5, 5))
    np.fill_diagonal(points_NN, 0)
    points_NN[0, 3] = points_NN[3, 0] = 0  # never met
    ratings = elo_ratings(points_NN, list("abcde"), anchor=2, prior_draws=0)
    assert ratings.elo_N == pytest.approx(hunter_mm(points_NN, 2), abs=1e-6)
    free = [0, 1, 3, 4]

    def log_likelihood(elo_F: np.ndarray) -> float:
        elo_N = np.zeros(5)
        elo_N[free] = elo_F
        return float((points_NN * -np.log1p(10 ** ((elo_N[None, :] - elo_N[:, None]) / 400))).sum())

    at, h = ratings.elo_N[free], 0.5
    shift = np.eye(4) * h
    hessian = np.array(
        [
            [
                sum(a * b * log_likelihood(at + a * shift[i] + b * shift[j]) for a in (1, -1) for b in (1, -1))
                / (4 * h * h)
                for j in range(4)
            ]
            for i in range(4)
        ]
    )
    assert ratings.covariance_NN[np.ix_(free, free)] == pytest.approx(np.linalg.inv(-hessian), rel=1e-4)
    difference, stderr = ratings.difference(0, 4)
    assert difference == pytest.approx(ratings.elo_N[0] - ratings.elo_N[4])
    a, b, c = (ratings.covariance_NN[i, j] for i, j in ((0, 0), (4, 4), (0, 4)))
    assert stderr == pytest.approx(np.sqrt(a + b - 2 * c))


def test_simulated_games_give_back_the_ratings_within_their_errors() -> None:
    """Without draws, 400 tournaments: the errors are the spread of the estimates. With draws they
    are larger than it."""
    rng, true_N, games = np.random.default_rng(1), np.array([0.0, 150.0, -100.0, 300.0]), 60
    win_NN = 1 / (1 + 10 ** ((true_N[None, :] - true_N[:, None]) / 400))

    def estimates(draws: float) -> tuple[np.ndarray, np.ndarray]:
        """A share `draws` of the smaller of both winning chances becomes a draw of half a point for each."""
        found, errors = [], []
        for _ in range(400):
            points_NN = np.zeros((4, 4))
            for i, j in combinations(range(4), 2):
                tie = draws * 2 * min(win_NN[i, j], win_NN[j, i])
                counts = rng.multinomial(games, [win_NN[i, j] - tie / 2, tie, win_NN[j, i] - tie / 2])
                points_NN[i, j], points_NN[j, i] = counts[0] + counts[1] / 2, counts[2] + counts[1] / 2
            ratings = elo_ratings(points_NN, list("abcd"), prior_draws=0)
            found.append(ratings.elo_N)
            errors.append(ratings.stderr_N)
        return np.array(found), np.array(errors)

    found, errors = estimates(0.0)
    assert found.mean(0) == pytest.approx(true_N, abs=8)
    assert found.std(0)[1:] == pytest.approx(errors.mean(0)[1:], rel=0.12)
    with_draws, errors = estimates(0.9)
    assert with_draws.mean(0) == pytest.approx(true_N, abs=8)
    assert (with_draws.std(0)[1:] < 0.9 * errors.mean(0)[1:]).all()


def test_prior_draws_are_those_of_pairs_that_met() -> None:
    points_NN = np.array([[0, 0, 0], [1.0, 0, 3.0], [0, 2.0, 0]])  # a and b have one game, a and c none
    drawn_NN = points_NN + np.array([[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]])
    given, by_hand = elo_ratings(points_NN, list("abc")), elo_ratings(drawn_NN, list("abc"), prior_draws=0)
    assert given.elo_N.tolist() == by_hand.elo_N.tolist() and given.elo_N[0] == 0
    assert given.elo_N[1] == pytest.approx(400 * np.log10(1.5 / 0.5))


def test_ratings_that_do_not_exist_say_whose() -> None:
    for points_NN, says in [
        ([[0, 5, 0], [5, 0, 0], [0, 0, 0]], "no chain of games connects c"),
        ([[0, 5, 1], [5, 0, 1], [0, 0, 0]], "c lost every game.*prior_draws"),
        ([[0, 5, 0], [5, 0, 0], [1, 1, 0]], "c won every game.*prior_draws"),
        ([[0, -1, 0], [5, 0, 0], [1, 1, 0]], "not negative"),
        ([[0, np.nan, 0], [5, 0, 0], [1, 1, 0]], "must be finite"),
    ]:
        with pytest.raises(DataError, match=says):
            elo_ratings(np.array(points_NN, float), list("abc"), prior_draws=0)


@pytest.mark.parametrize("players", [2, 3, 4, 5, 8, 9, 17])
def test_a_chain_of_games_connects_its_ends(players: int) -> None:
    points_NN, names = np.zeros((players, players)), [f"player {i}" for i in range(players)]
    for i in range(players - 1):
        points_NN[i, i + 1], points_NN[i + 1, i] = 2, 1
    elo_N = elo_ratings(points_NN, names, prior_draws=0).elo_N
    assert np.diff(elo_N) == pytest.approx(-400 * np.log10(2))
    points_NN[players - 2, players - 1] = 0
    with pytest.raises(DataError, match="won every game"):
        elo_ratings(points_NN, names, prior_draws=0)


def test_games_of_a_pair_share_openings_and_change_sides() -> None:
    config = Tournament(env=chz.replace(GAME, random_opening=3), num_games=4, opponents=[])
    seen: dict[str, list[str]] = {}

    def player(name: str):  # noqa: ANN202
        async def move(game: Game, rng: np.random.Generator) -> str:
            seen.setdefault(f"{name}{game.player}", []).append(game.text)
            return "none"  # loses at once

        return move

    async def go() -> list:
        return [await play_game(config, player("a"), player("b"), k) for k in range(4)]

    games = asyncio.run(go())
    assert [game.seats for game in games] == [(0, 1), (1, 0), (1, 0), (0, 1)]
    movers = [[(side, legal) for side, _, legal in game.moves] for game in games]
    assert movers == [[(int(game.points), False)] for game in games]  # who moved lost, by one illegal move
    positions = [text for texts in seen.values() for text in texts]
    assert len(positions) == 4 and len(set(positions)) == 2


def test_more_than_two_seats_are_scored_by_the_share_that_was_beaten() -> None:
    game = Game("ThreePlayerTicTacToe-v0", 3, 0)
    game.rewards = {0: 1.0, 1: 0.0, 2: 0.0}
    assert [points(game, seat) for seat in range(3)] == [1.0, 0.25, 0.25]
    snake = chz.replace(GAME, game="Snake-v0", num_players=3, board_only=False, error_allowance=None)
    config = Tournament(env=snake, num_games=12, opponents=[RandomPlayer()])
    wall = RandomPlayer(moves="[up]").open(snake.open_game(0))  # into the wall
    players = {"wall": wall, "random": RandomPlayer().open(snake.open_game(0))}
    pairs = asyncio.run(play_pairs(config, players, [("wall", "random")]))
    (pair,) = pairs.values()
    seats = [asyncio.run(play_game(config, players["wall"], players["random"], k)).seats for k in range(6)]
    assert seats == [(0, 1, 1), (1, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 0), (0, 0, 1)]
    assert pair.games == 12 and pair.lost == 0 and pair.points < 6
    ratings = rate(config, list(players), pairs)
    assert ratings.elo_N[1] == 0 and ratings.elo_N[0] < -50


def test_points_moves_and_illegal_ones_are_counted_for_each_player() -> None:
    async def quits(game: Game, rng: np.random.Generator) -> str:
        return "none"  # illegal: the game is lost

    config, names = Config(env=GAME, num_games=6, anchor="quits"), ["quits", "random"]
    players = {"quits": quits, "random": RandomPlayer().open(GAME.open_game(0))}
    for pair_of, order in ((("quits", "random"), 1), (("random", "quits"), -1)):
        pairs = asyncio.run(play_pairs(config, players, [pair_of]))
        pair = pairs[pair_of]
        assert (pair.games, pair.lost, pair.points) == (6, 0, 0 if order == 1 else 6)
        assert pair.moves == (6, 3)[::order] and pair.illegal == (6, 0)[::order]
        ratings = rate(config, names, pairs)
        assert ratings.elo_N == pytest.approx([0, 400 * np.log10(6.5 / 0.5)])
        found = [(p["points"], p["games"], p["illegal"]) for p in to_json(config, names, pairs, ratings, 0)["players"]]
        assert found == [(0, 6, 1), (6, 6, 0)]


def test_a_player_that_fails_costs_its_games_and_no_points() -> None:
    config = Tournament(env=GAME, num_games=6, opponents=[])
    random_player = RandomPlayer().open(GAME.open_game(0))

    async def fails_first(game: Game, rng: np.random.Generator) -> str:
        if game.player == 0:
            raise RolloutError("the endpoint was down")
        return await random_player(game, rng)

    async def fails(game: Game, rng: np.random.Generator) -> str:
        raise RolloutError("the endpoint was down")

    (pair,) = asyncio.run(play_pairs(config, {"a": fails_first, "b": random_player}, [("a", "b")])).values()
    assert pair.games == 3 and pair.lost == 3 and sum(pair.illegal) == 0
    with pytest.raises(RolloutError, match="was down"):
        asyncio.run(play_pairs(config, {"a": fails, "b": random_player}, [("a", "b")]))


# Trap: a game whose own code raises ends the tournament, or the training run that rates its policy.
def test_a_move_on_which_the_games_code_raises_costs_that_game() -> None:
    config = Tournament(env=GAME, num_games=4, opponents=[])
    random_player = RandomPlayer().open(GAME.open_game(0))

    async def too_long(game: Game, rng: np.random.Generator) -> str:
        return f"[{'9' * 5000}]" if game.player == 0 else "[x]"  # beyond what int() reads

    (pair,) = asyncio.run(play_pairs(config, {"a": too_long, "b": random_player}, [("a", "b")])).values()
    assert pair.games == 2 and pair.lost == 2
    with pytest.raises(EnvError, match="TicTacToe.*ValueError"):
        GAME.open_game(0).move(f"[{'9' * 5000}]")


@pytest.mark.usefixtures("rendered")
def test_the_command_rates_models_and_fixed_players(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        models=["micro"],
        env=GAME,
        renderer_name="plain",
        opponents=[RandomPlayer(), MinimaxPlayer()],
        num_games=6,
        log_path=str(tmp_path / "elo"),
        backend=TORCH,
    )
    results = asyncio.run(main(config))
    assert [player["name"] for player in results["players"]] == ["micro", "random", "minimax"]
    micro, random_player, minimax = results["players"]
    assert micro["elo"] < random_player["elo"] == 0 < minimax["elo"] and micro["illegal"] > 0.5
    assert sum(player["points"] for player in results["players"]) == 18
    assert "micro" in capsys.readouterr().out and (tmp_path / "elo" / "elo.png").stat().st_size > 1000
    again = asyncio.run(main(config))  # the same command: the same numbers
    assert (
        json.loads(json.dumps(again))
        == json.loads(json.dumps(results))
        == json.loads((tmp_path / "elo" / "results.json").read_text())
    )
    older = json.loads((tmp_path / "elo" / "results.json").read_text())  # without an option of this version
    del older["settings"]["prior_draws"], older["settings"]["env"]["rules"]
    (tmp_path / "elo" / "results.json").write_text(json.dumps(older))
    assert asyncio.run(main(config)) == again
    monkeypatch.setattr(elo, "play_pairs", pytest.fail)  # errors come before the games
    with pytest.raises(ConfigError, match="made with .*seed=0"):
        asyncio.run(main(chz.replace(config, seed=1)))
    for wrong, says in [
        ({"models": ["micro", "micro"]}, "two players are called micro"),
        ({"models": [], "opponents": []}, "two players or more"),
        ({"models": [str(tmp_path / "none*")]}, "no folder matches"),
        ({"anchor": "nobody"}, "there are micro, random, minimax"),
        ({"env": chz.replace(GAME, num_players=1)}, "2 players or more"),
    ]:
        with pytest.raises(ConfigError, match=says):
            asyncio.run(main(chz.replace(config, log_path=str(tmp_path / "other"), **wrong)))
    assert draw(results).axes


def test_the_evaluator() -> None:
    """From the command line's names; a saved policy is an opponent by its folder."""
    arguments = [
        *("env=textarena", "evaluators.0=elo", "evaluators.0.opponents.0=random", "evaluators.0.num_games=4"),
        *("evaluators.0.opponents.1=runs/a", "evaluators.0.env=textarena", "evaluators.0.env.rules.x=1"),
        *("evaluators.0.opponents.2=random", "evaluators.0.opponents.2.moves=[0] [4]", "env.opponent=minimax"),
    ]
    names = {"env": {"textarena": "envs.textarena:TextArenaBuilder"}} | EVALUATOR_OPTIONS
    (evaluator,) = parse(CLIConfig, [*arguments, "log_path=x"], names).evaluators
    assert isinstance(evaluator, EloEvaluator) and evaluator.env.rules == {"x": 1} and evaluator.num_games == 4
    frozen = FrozenPlayer(policy=FrozenPolicy(model_path="runs/a"))
    assert evaluator.opponents == [RandomPlayer(), frozen, RandomPlayer(moves="[0] [4]")]
    named = chz.replace(evaluator, env=GAME, opponents=[RandomPlayer(), MinimaxPlayer()], num_games=4)
    client = ServiceClient(TORCH).create_sampling_client(base_model="micro")

    async def rated() -> list[Metrics]:
        evaluate = await named(get_renderer("plain", client.get_tokenizer()))
        return [await evaluate(Evaluated(None, client)) for _ in range(2)]  # type: ignore[arg-type]

    first, again = asyncio.run(rated())
    assert first == again and first["elo/rating"] < 0 < first["elo/rating_stderr"]
    assert first["elo/score_random"] <= 0.25 and first["elo/score_minimax"] == first["elo/games_lost"] == 0
    assert 0.5 < first["elo/illegal"] <= 1  # of the policy's moves
    with pytest.raises(ConfigError, match="there are policy, random, minimax"):
        asyncio.run(chz.replace(named, anchor="nobody")(get_renderer("plain", client.get_tokenizer())))
    with pytest.raises(ConfigError, match="no opponents"):
        asyncio.run(EloEvaluator(opponents=[])(None))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_person_plays_a_saved_policy_and_the_program_ends() -> None:
    """Untrained, it breaks the rules at its first move. Trap: an exit while the engine is closing."""
    command = [sys.executable, "-m", "rl.play", "env=textarena", "env.board_only=true", "env.error_allowance=0"]
    command += ["env.group_size=1", "env.opponent=frozen", "env.opponent.policy.base_model=small", "model_name=small"]
    played = subprocess.run([*command, "episodes=1"], input="[4]\n", capture_output=True, text=True, cwd=ROOT)
    assert played.returncode == 0, played.stderr[-500:]
    assert "win 1" in played.stdout and "1 episodes played, mean reward 1" in played.stdout


@pytest.mark.slow
def test_an_evaluator_in_a_run(tmp_path: Path) -> None:
    config = train.Config(
        env=GAME,
        model_name="micro",
        renderer_name="plain",
        log_path=str(tmp_path / "run"),
        backend=TORCH,
        evaluators=[EloEvaluator(env=GAME, opponents=[RandomPlayer(), MinimaxPlayer()], num_games=2)],
    )
    asyncio.run(train.main(config))
    rated = [record for record in read_metrics(tmp_path / "run") if "elo/rating" in record]
    assert len(rated) == 2  # before and after the step
    assert rated[0]["elo/rating"] < 0 < rated[0]["elo/rating_stderr"]
    assert rated[0].keys() >= {"elo/score_random", "elo/score_minimax", "elo/illegal", "elo/games_lost"}
