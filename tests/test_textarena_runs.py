"""Runs on TextArena games: self-play, the model of the recipe, three seats."""

import asyncio
import json
from pathlib import Path
from typing import Any

import chz
import pytest

from envs.textarena import TextArenaBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from posttrain.tracking.metrics_log import read_metrics
from recipes.multiplayer.evaluate import Config as EvaluationConfig
from recipes.multiplayer.evaluate import evaluate
from recipes.multiplayer.model import random_game as random_play
from recipes.multiplayer.model import save_model
from rl import train
from rl.advantages import SeatMean
from supervised import train as supervised_train
from supervised.data import ConversationFileBuilder
from tests.test_textarena import TIC_TAC_TOE


def test_a_step_of_self_play_from_end_to_end(tmp_path: Path) -> None:
    """Random weights: nearly every first move is illegal, so most second seats have no turn;
    nothing is trained on for them.
    """
    config = train.Config(
        env=chz.replace(TIC_TAC_TOE, batch_size=4, num_test=2, max_tokens=4, n_batches=1),
        model_name="tiny",
        renderer_name="plain",
        log_path=str(tmp_path / "run"),
        backend=BackendConfig(engine="torch"),
    )
    asyncio.run(train.main(config))
    first, *_ = read_metrics(tmp_path / "run")
    assert first["env/all/reward/total"] == 0.0 and first["env/all/total_episodes"] == 8
    assert first["env/all/illegal"] > 0.9 and first["test/env/all/loss"] == 1.0
    assert first["optim/grad_norm"] > 0 and "rollout_errors/total" not in first


def test_the_recipes_model_reads_every_position_in_under_100_tokens(tmp_path: Path) -> None:
    save_model(tmp_path, TIC_TAC_TOE, seed=0)
    tokenizer = load_tokenizer(str(tmp_path))
    # with the history of moves
    texts = [text + move for game in range(50) for text, move in random_play(TIC_TAC_TOE, [game])]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert max(lengths) < 100
    assert all(decode(tokenizer, tokenizer.encode(text)) == text for text in texts)
    assert [decode(tokenizer, [token]) for token in tokenizer.encode("[4]")] == ["[4]"]
    metrics = asyncio.run(
        evaluate(EvaluationConfig(model_path=str(tmp_path), games=4, backend=BackendConfig(engine="torch")))
    )
    assert set(metrics) == {"random", "minimax"} and metrics["random"]["random/env/all/loss"] == 1.0


@pytest.mark.slow
def test_three_seats_learn_in_one_run(tmp_path: Path) -> None:
    """A small model that has seen the form of a move plays all seats of three-player GOPS: each seat's
    rewards are logged, they sum to -1 or 0, and the differences between games train."""
    game = TextArenaBuilder(game="three_player_gops", num_players=3, group_size=6, num_test=0, board_only=True)
    env = chz.replace(game, batch_size=2, n_batches=2)

    async def opening() -> str:
        renderer = get_renderer("plain", load_tokenizer("micro"))
        train_set, _ = await env(renderer)
        seat, *_ = await train_set.get_batch(0)[0].make_envs()
        observation, _ = await seat.initial_observation()
        return decode(renderer.tokenizer, observation.to_ints())

    question = {"role": "user", "content": asyncio.run(opening())}
    moves = [{"role": "assistant", "content": f"[{card}]"} for card in "A23456789JQK"]
    lines = [json.dumps({"messages": [question, move]}) for move in moves * 10]
    (tmp_path / "moves.jsonl").write_text("\n".join(lines))
    shared: dict[str, Any] = {
        "model_name": "micro",
        "renderer_name": "plain",
        "backend": BackendConfig(engine="torch"),
        "save_every": 0,
        "eval_every": 0,
    }
    data = ConversationFileBuilder(path=str(tmp_path / "moves.jsonl"), batch_size=4, test_size=0, seed=0)
    start = supervised_train.Config(dataset=data, learning_rate=1e-2, log_path=str(tmp_path / "start"), **shared)
    asyncio.run(supervised_train.main(chz.replace(start, num_epochs=3, max_steps=80)))
    run = train.Config(env=env, advantage=SeatMean(num_seats=3), max_tokens=6, log_path=str(tmp_path / "run"), **shared)
    asyncio.run(train.main(chz.replace(run, load_checkpoint_path=str(tmp_path / "start" / "checkpoints" / "final"))))
    records = [record for record in read_metrics(tmp_path / "run") if "env/all/reward_seat2" in record]
    assert len(records) == 2 and any(record["optim/grad_norm"] > 0 for record in records)
    for record in records:
        seats = [record[f"env/all/reward_seat{seat}"] for seat in range(3)]
        assert record["env/all/reward/total"] == pytest.approx(sum(seats) / 3) and record["env/all/illegal"] < 1
