"""TextArena games by hand: seats, illegal moves, failures, seeds, opponents."""

import asyncio
import random
import sys
from collections.abc import Sequence

import chz
import numpy as np
import pytest

from envs.opponents import FrozenPlayer, MinimaxPlayer, Player, RandomPlayer, listed_moves
from envs.textarena import GameGroupBuilder, Seat, TextArenaBuilder
from envs.textarena_game import Game, GameUnavailable, full_name, rules_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.types import ModelInput
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from rl import train
from rl.advantages import SeatMean
from rl.config import check_config
from rl.frozen_policy import FrozenPolicy, FrozenPolicyError
from rl.types import (
    Env,
    EnvGroupBuilder,
    Observation,
    RolloutError,
    SeatLost,
    TokensWithLogprobs,
    Trajectory,
    Transition,
)

RENDERER = get_renderer("plain", character_tokenizer(2048))
TIC_TAC_TOE = TextArenaBuilder(batch_size=4, n_batches=2, num_test=4, test_opponent=RandomPlayer(), error_allowance=0)
MINIMAX, RANDOM = (opponent.open(TIC_TAC_TOE.open_game(0)) for opponent in (MinimaxPlayer(), RandomPlayer()))


def action(text: str) -> list[int]:
    tokenizer = RENDERER.tokenizer
    assert isinstance(tokenizer.eos_token_id, int)
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def text(ob: Observation) -> str:
    return decode(RENDERER.tokenizer, ob.to_ints())


def group(config: TextArenaBuilder = TIC_TAC_TOE, index: int = 0) -> GameGroupBuilder:
    dataset, _ = asyncio.run(config(RENDERER))
    (builder, *_) = dataset.get_batch(index)
    assert isinstance(builder, GameGroupBuilder)
    return builder


async def play_seat(seat: Seat, moves: Sequence[str]) -> list[tuple[str, float, dict[str, float]]]:
    """Plays a script; returns what was seen, the reward and the metrics of each turn."""
    ob, _ = await seat.initial_observation()
    turns = []
    for number, move in enumerate(moves):
        result = await seat.step(action(move))
        turns.append((text(ob), result.reward, result.metrics))
        ob = result.next_observation
        assert result.episode_done == (number == len(moves) - 1)
    await seat.close()
    return turns


def play(builder: GameGroupBuilder, *scripts: Sequence[str]):  # noqa: ANN201
    """All seats at once. Returns the turns of each and the group's rewards and metrics."""

    async def go():  # noqa: ANN202
        seats = await builder.make_envs()
        turns = await asyncio.gather(*(play_seat(seat, moves) for seat, moves in zip(seats, scripts, strict=True)))
        trajectories = [Trajectory([]) for _ in seats]
        return turns, await builder.compute_group_rewards(trajectories, seats)

    return asyncio.run(go())


def test_two_seats_play_a_game_to_its_end() -> None:
    builder = group()
    assert not builder.members_are_independent and builder.logging_tags() == ["self_play"]
    turns, rewards = play(builder, ["[0]", "[1]", "[2]"], ["[3]", "[4]"])
    assert [len(seat) for seat in turns] == [3, 2]
    second = turns[1][0][0]
    assert "You are Player 1" in second and "O | 1 | 2" in second.replace("  ", " ")
    assert all(turn[1:] == (0.0, {"illegal": 0.0}) for seat in turns for turn in seat)
    assert [reward for reward, _ in rewards] == [1.0, -1.0]
    expected = {"turns": 5, "ended_illegally": 0, "win": 1, "draw": 0, "loss": 0, "unfinished": 0}
    assert rewards[0][1] == expected | {"reward_seat0": 1.0}
    assert rewards[1][1] == expected | {"win": 0, "loss": 1, "reward_seat1": -1.0}
    _, draw = play(builder, ["[0]", "[2]", "[3]", "[7]", "[8]"], ["[1]", "[4]", "[5]", "[6]"])
    assert [(reward, metrics["draw"]) for reward, metrics in draw] == [(0, 1), (0, 1)]


def test_illegal_moves_are_counted_and_cost_what_was_set() -> None:
    """With the game's own allowance of one the first may be taken back; the second in a row
    loses.
    """
    config = chz.replace(TIC_TAC_TOE, error_allowance=None, illegal_move_penalty=0.25)
    turns, rewards = play(group(config), ["[4]", "[4]", "none"], ["[0]"])
    assert [turn[1:] for turn in turns[0]] == [(0, {"illegal": 0}), (-0.25, {"illegal": 1}), (-0.25, {"illegal": 1})]
    assert [(reward, metrics["ended_illegally"]) for reward, metrics in rewards] == [(-1, 1), (1, 1)]


def test_a_seat_whose_game_ends_before_its_turn_trains_on_nothing() -> None:
    async def go() -> tuple[list[Trajectory], list[float]]:
        seats = await builder.make_envs()
        ended, other = await asyncio.gather(play_seat(seats[0], ["[9]"]), play_seat(seats[1], ["whatever"]))
        assert ended[0][2] == {"illegal": 1.0} and other[0][2] == {}
        sampled = Transition(ModelInput.from_ints([4]), TokensWithLogprobs([5], [-1.0]), 0.0, True)
        trajectories = [Trajectory([sampled]), Trajectory([sampled])]
        rewards = await builder.compute_group_rewards(trajectories, seats)
        return trajectories, [reward for reward, _ in rewards]

    builder = group()
    trajectories, rewards = asyncio.run(go())
    assert [len(trajectory.transitions) for trajectory in trajectories] == [1, 0] and rewards == [-1, 1]


# Trap: a seat that waits for ever.
def test_a_failing_seat_frees_the_others_at_once() -> None:
    async def go() -> tuple[object]:
        seats = await group_now.make_envs()
        waiting = asyncio.create_task(play_seat(seats[1], ["[0]"]))
        ob, _ = await seats[0].initial_observation()
        assert ob.length and not waiting.done()
        await seats[0].close()  # as the loop does when its rollout failed
        async with asyncio.timeout(60):
            return await asyncio.gather(waiting, return_exceptions=True)

    group_now = group()
    (error,) = asyncio.run(go())
    assert isinstance(error, SeatLost) and "seat 0 failed" in str(error)


def test_a_seat_that_fails_while_another_samples_takes_its_move_away() -> None:
    async def go() -> None:
        first, second = await group_now.make_envs()
        await first.initial_observation()
        await second.close()
        await first.step(action("[0]"))

    group_now = group()
    with pytest.raises(SeatLost):
        asyncio.run(go())


def test_a_limit_ends_the_game_for_all_without_a_result() -> None:
    async def go() -> tuple[bool, list[tuple[float, dict[str, float]]]]:
        seats = await group_now.make_envs()
        waiting = asyncio.create_task(play_seat(seats[1], ["ignored"]))
        await seats[0].initial_observation()
        await seats[0].cut_short("timeout")
        await seats[0].close()
        await waiting
        return waiting.done(), await group_now.compute_group_rewards([Trajectory([]), Trajectory([])], seats)

    group_now = group()
    done, rewards = asyncio.run(go())
    assert (
        done
        and [(reward, metrics["unfinished"], "win" in metrics) for reward, metrics in rewards] == [(0, 1, False)] * 2
    )


async def random_game(
    name: str, num_players: int, seed: int, players: Sequence[Player]
) -> tuple[list[str], dict[int, float] | None]:
    """All that was seen, and the rewards; other games of the event loop go on between the moves."""
    game, rngs, seen = Game(name, num_players, seed), [np.random.default_rng([seed, p]) for p in range(num_players)], []
    while not game.over:
        seen.append(game.text)
        game.move(await players[game.player](game, rngs[game.player]))
        await asyncio.sleep(0)
    return seen, game.rewards


# Trap: games that share a generator.
def test_games_are_functions_of_their_seed_when_many_run_at_once() -> None:
    """Kuhn poker deals cards from the global generator in every round; memory's cells come from it
    at the start.
    """

    async def all_at_once(seeds: Sequence[int]) -> list[tuple[list[str], dict[int, float] | None]]:
        return await asyncio.gather(*(random_game("KuhnPoker-v0-short", 2, seed, [RANDOM, RANDOM]) for seed in seeds))

    random.seed(3)
    outside = random.random()
    random.seed(3)
    together = asyncio.run(all_at_once(range(64)))
    assert random.random() == outside  # the program's own generator is where it was
    alone = [asyncio.run(random_game("KuhnPoker-v0-short", 2, seed, [RANDOM, RANDOM])) for seed in range(64)]
    assert together == alone
    assert len({str(game) for game in together}) == 64


def test_minimax_never_loses_and_beats_a_random_player() -> None:
    async def rewards(players: Sequence[Player], me: int) -> list[float]:
        games = await asyncio.gather(*(random_game("TicTacToe-v0-train", 2, seed, players) for seed in range(40)))
        return [game_rewards[me] for _, game_rewards in games if game_rewards]

    first = asyncio.run(rewards([MINIMAX, RANDOM], 0))
    second = asyncio.run(rewards([RANDOM, MINIMAX], 1))
    assert min(first + second) >= 0 and np.mean(first + second) > 0.6
    assert asyncio.run(rewards([MINIMAX, MINIMAX], 0)) == [0.0] * 40


def test_one_learner_against_an_opponent() -> None:
    config = chz.replace(TIC_TAC_TOE, opponent=RandomPlayer(), group_size=3, illegal_move_penalty=1.0)
    dataset, test = asyncio.run(config(RENDERER))
    builders = [b for i in (0, 1) for b in dataset.get_batch(i)]
    assert all(isinstance(b, GameGroupBuilder) and b.members_are_independent for b in builders)
    assert [b.logging_tags() for b in builders[:2]] == [["random", "seat0"], ["random", "seat1"]]
    assert test is not None and [len(test.get_batch(i)) for i in range(len(test))] == [4]

    async def first_prompts(builder) -> list[str]:  # noqa: ANN001
        return [text((await seat.initial_observation())[0]) for seat in await builder.make_envs()]

    prompts = asyncio.run(first_prompts(builders[1]))
    assert len(set(prompts)) == 1 and len(prompts) == 3  # one seed: the opponent opens alike
    assert "You are Player 1" in prompts[0] and len(listed_moves(prompts[0])) == 8
    others = [asyncio.run(first_prompts(builder))[0] for builder in builders[1::2]]
    assert len(set(others)) > 1


def test_random_openings_are_functions_of_the_game_and_for_training_alone() -> None:
    config = chz.replace(TIC_TAC_TOE, random_opening=4, test_opponent=None)
    train_set, test_set = asyncio.run(config(RENDERER))
    assert test_set is not None

    def free_squares(builders: Sequence[EnvGroupBuilder]) -> list[int]:
        async def first_seats() -> list[Env]:
            return [(await builder.make_envs())[0] for builder in builders]

        seats = asyncio.run(first_seats())
        return [len(listed_moves(seat.table.game.text)) for seat in seats if isinstance(seat, Seat)]

    training = [builder for i in range(10) for builder in train_set.get_batch(i)]
    assert set(free_squares(training)) == {5, 6, 7, 8, 9}
    assert free_squares(training) == free_squares(training)
    assert set(free_squares(test_set.get_batch(0))) == {9}


# Trap: a seat's reward measured against another seat's baseline; openings that are over already.
def test_several_games_from_one_opening_give_each_seat_its_own_baseline() -> None:
    config = chz.replace(TIC_TAC_TOE, group_size=6, random_opening=9)
    for index in range(2):
        dataset, _ = asyncio.run(config(RENDERER))
        for builder in dataset.get_batch(index):
            seats = [seat for seat in asyncio.run(builder.make_envs()) if isinstance(seat, Seat)]
            assert [seat.seat for seat in seats] == [0, 1] * 3 and len({seat.table.game.text for seat in seats}) == 1
            assert not seats[0].table.game.over  # an opening that ends the game is drawn again
    first = group(chz.replace(TIC_TAC_TOE, group_size=4))
    wins, losses = ["[0]", "[1]", "[2]"], ["[3]", "[4]"]
    _, rewards = play(first, wins, losses, ["[8]"], ["[8]"])
    advantages = SeatMean()(np.array([reward for reward, _ in rewards]))
    assert [reward for reward, _ in rewards] == [1, -1, 1, -1] and advantages.tolist() == [0, 0, 0, 0]
    assert SeatMean()(np.array([1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 1.0, -1.0])).tolist() == [
        0.75,
        -0.75,
        -1.25,
        1.25,
        -0.25,
        0.25,
        0.75,
        -0.75,
    ]
    assert SeatMean(num_seats=3)(np.array([1.0, 0.0, -1.0, 0.0, 2.0, -1.0])).tolist() == [
        0.5,
        -1.0,
        0.0,
        -0.5,
        1.0,
        0.0,
    ]
    for too_few in (2, 5):
        with pytest.raises(ConfigError, match="two or more games of 2 seats"):
            SeatMean().check_group_size(too_few)


def test_a_game_that_lost_one_seat_is_not_scored() -> None:
    async def go() -> None:
        seats = await group_now.make_envs()
        await group_now.compute_group_rewards([Trajectory([])] * 3, [seats[0], seats[2], seats[3]])

    group_now = group(chz.replace(TIC_TAC_TOE, group_size=4))
    with pytest.raises(RolloutError, match="only some seats"):
        asyncio.run(go())


def test_a_frozen_policy_as_the_opponent() -> None:
    """Untrained, it does not know the rules: its first move loses."""
    policy = FrozenPolicy(
        base_model="small", renderer_name="plain", max_tokens=3, backend=BackendConfig(engine="torch")
    )
    config = chz.replace(TIC_TAC_TOE, opponent=FrozenPlayer(policy=policy), group_size=1)
    turns, rewards = play(group(config), ["[4]"])
    assert turns[0][0][2] == {"illegal": 0.0} and rewards[0][0] == 1.0
    assert rewards[0][1] | {"win": 1.0, "ended_illegally": 1.0, "turns": 2.0} == rewards[0][1]
    too_small = FrozenPlayer(policy=chz.replace(policy, base_model="tiny"))
    with pytest.raises(FrozenPolicyError, match="the context of 512"):
        play(group(chz.replace(config, opponent=too_small)), ["[4]"])


def test_a_game_for_one_player() -> None:
    config = TextArenaBuilder(game="GuessTheNumber-v0-train", num_players=1, group_size=2)
    guesses = [f"[{n}]" for n in range(1, 12)]

    async def go() -> list[tuple[float, dict[str, float]]]:
        seats = await builder.make_envs()
        for seat in seats:
            ob, _ = await seat.initial_observation()
            assert "between 1 and 20" in text(ob)
            for guess in guesses:
                result = await seat.step(action(guess))
                if result.episode_done:
                    break
                assert "target number is" in text(result.next_observation)
        return await builder.compute_group_rewards([Trajectory([])] * 2, seats)

    builder = group(config)
    first, second = asyncio.run(go())
    assert builder.logging_tags() == ["alone"] and first == second  # members share the number
    assert first[1]["win"] == float(first[0] == 1.0) and first[1]["loss"] == 1 - first[1]["win"]


def test_three_seats_have_rewards_of_their_own() -> None:
    """A line of four wins on the 5x5 board; then a seat that breaks the rules is out, and the
    others play on."""
    config = chz.replace(TIC_TAC_TOE, game="three_player_tic_tac_toe", num_players=3, group_size=6, num_test=0)
    builder = group(config)
    assert builder.num_games == 2 and not builder.members_are_independent
    scripts = [["[0]", "[1]", "[2]", "[3]"], ["[5]", "[6]", "[7]"], ["[10]", "[11]", "[12]"]]
    turns, rewards = play(builder, *scripts, *scripts)
    assert [len(seat) for seat in turns] == [4, 3, 3] * 2
    assert [reward for reward, _ in rewards] == [1, 0, 0] * 2 or [reward for reward, _ in rewards] == [1, -1, -1] * 2
    assert [[name for name in metrics if "seat" in name] for _, metrics in rewards[:3]] == [
        ["reward_seat0"],
        ["reward_seat1"],
        ["reward_seat2"],
    ]
    assert [metrics["win"] for _, metrics in rewards[:3]] == [1, 0, 0]


def test_the_baseline_of_seats_has_to_know_how_many_there_are() -> None:
    three = chz.replace(TIC_TAC_TOE, game="ThreePlayerTicTacToe-v0", num_players=3, group_size=6)
    config = train.Config(env=three, advantage=SeatMean(), max_tokens=8)
    with pytest.raises(ConfigError, match="plays 3 of a game's seats.*set advantage.num_seats=3"):
        check_config(config)
    check_config(chz.replace(config, advantage=SeatMean(num_seats=3)))
    with pytest.raises(ConfigError, match="set advantage.num_seats=1"):
        check_config(
            chz.replace(config, advantage=SeatMean(num_seats=2), env=chz.replace(three, opponent=RandomPlayer()))
        )


def test_games_by_name_and_size() -> None:
    assert [full_name(name) for name in ("tic_tac_toe", "ConnectFour", "othello-v0-TINY", "Nim-v0-train")] == [
        "TicTacToe-v0",
        "ConnectFour-v0",
        "Othello-v0-tiny",
        "Nim-v0-train",
    ]
    assert len(listed_moves(Game("Othello-v0", 2, 0).text)) == 4
    nim = chz.replace(TIC_TAC_TOE, game="nim", rules={"piles": [2, 3]}).open_game(0)
    assert "pile 1: 3" in nim.text and "pile 2" not in nim.text
    assert rules_of("nim") == {"piles": [3, 4, 5]}
    for rules, says in [
        ({"pile": [1]}, "rules.pile: Nim-v0 has no such rule; did you mean piles.*piles=.3, 4, 5."),
        ({"piles": 7}, "does not open for 2 players, rules.piles=7"),
    ]:
        with pytest.raises((ConfigError, GameUnavailable), match=says):
            Game("nim", 2, 0, rules=rules)


def test_a_random_player_of_given_moves() -> None:
    four = chz.replace(TIC_TAC_TOE, game="ConnectFour-v0", error_allowance=None).open_game(0)
    with pytest.raises(ConfigError, match="does not list its legal moves.*give it some"):
        RandomPlayer().open(four)
    player, rng = RandomPlayer(moves="[col 0] [col 3]").open(four), np.random.default_rng(0)
    drawn = {asyncio.run(player(four, rng)) for _ in range(20)}  # type: ignore[arg-type]
    assert drawn == {"[col 0]", "[col 3]"}
    with pytest.raises(ConfigError, match="moves in brackets"):
        RandomPlayer(moves="left right").open(four)


@pytest.mark.parametrize(
    ("name", "players", "says"),
    [
        ("TicTakToe-v0", 2, "did you mean 'TicTacToe-v0'"),
        ("TicTacToe-v0", 3, "set num_players"),
        ("Debate-v0", 2, "needs a key and the network"),
    ],
)
def test_games_that_cannot_be_played_here_say_why(name: str, players: int, says: str) -> None:
    with pytest.raises(GameUnavailable, match=says):
        Game(name, players, 0)


def test_word_games_name_the_data_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not this machine has NLTK's word lists."""
    import nltk.data

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr("nltk.download", lambda *args, **kwargs: False)
    for module in [name for name in sys.modules if name.startswith("textarena.envs.Wordle")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(GameUnavailable, match="nltk.downloader words"):
        Game("Wordle-v0", 1, 0)


def test_a_reward_that_is_no_number_is_a_failure_of_the_rollout() -> None:
    game = Game("Countdown-v0", 1, 0)
    while not game.over:
        game.move("nonsense")
    with pytest.raises(RolloutError, match="a fault of the game"):
        game.outcome(0)


def test_configurations_that_make_no_sense_are_refused() -> None:
    for wrong, says in [
        ({"group_size": 3}, "2 or a multiple"),
        ({"num_players": 1, "group_size": 4}, "with an opponent at least 2"),
        ({"game": "Nim-v0", "test_opponent": MinimaxPlayer()}, "minimax plays"),
        ({"game": "Nim-v0"}, "does not list its legal moves"),
    ]:
        with pytest.raises(ConfigError, match=says):
            asyncio.run(chz.replace(TIC_TAC_TOE, **wrong)(RENDERER))
