"""Plays a saved tic-tac-toe policy against a random and a perfect player, from both seats.

    python recipes/multiplayer/evaluate.py model_path=runs/multiplayer/checkpoints/final games=500 temperature=0

Prints the shares of wins, draws and losses. `illegal` is the share of the policy's moves that break
the rules; one illegal move loses the game.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import chz
from rich.console import Console
from rich.table import Table

from envs.opponents import MinimaxPlayer, RandomPlayer
from envs.textarena import TextArenaBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, SEED, TEMPERATURE
from posttrain.backend.service_client import ServiceClient
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from recipes.warm_start import torch_backend
from rl.evaluators import RLTestSetEvaluator
from rl.types import Metrics

OPPONENTS = (RandomPlayer(), MinimaxPlayer())
RESULTS = ("win", "draw", "loss", "illegal")


@chz.chz
class Config:
    """Games of a saved policy against fixed players."""

    model_path: str = chz.field(doc="a checkpoint of recipes/multiplayer/train.py")
    games: int = chz.field(default=500, validator=COUNT, doc="against each opponent, half of them from each seat")
    temperature: float = chz.field(default=0.0, validator=TEMPERATURE, doc="of the policy; 0 is greedy")
    seed: int = chz.field(default=1234, validator=SEED, doc="seed of the opponents' moves and of sampling")
    task: TextArenaBuilder = chz.field(
        default_factory=lambda: TextArenaBuilder(board_only=True, error_allowance=0, max_tokens=3),
        doc="the game, as in training",
    )
    renderer_name: str | None = chz.field(default="plain", doc="as in training")
    backend: BackendConfig = torch_backend("how this machine samples")


async def evaluate(config: Config) -> dict[str, Metrics]:
    """Opponent's name -> metrics OPPONENT/env/SEAT/...; SEAT is all, seat0 or seat1."""
    metrics = {}
    with ServiceClient(config.backend) as service:
        client = service.create_sampling_client(model_path=config.model_path)
        renderer = get_renderer(config.renderer_name, client.get_tokenizer())
        for opponent in OPPONENTS:
            task = chz.replace(config.task, test_opponent=opponent, num_test=config.games, seed=config.seed)
            _, games = await task(renderer)
            assert games is not None
            evaluator = RLTestSetEvaluator(games, task.max_tokens, config.temperature, config.seed, name=opponent.name)
            metrics[opponent.name] = await evaluator(client)
    return metrics


async def main(config: Config) -> None:
    metrics = await evaluate(config)
    how = "greedy" if config.temperature == 0 else f"temperature {config.temperature:g}"
    table = Table(
        "against",
        "seat",
        *RESULTS,
        title=f"{config.model_path}: {config.games} games each, {how}",
        title_justify="left",
    )
    for opponent, values in metrics.items():
        for seat in ("all", "seat0", "seat1"):
            table.add_row(opponent, seat, *(f"{values[f'{opponent}/env/{seat}/{result}']:.3f}" for result in RESULTS))
    Console().print(table)


if __name__ == "__main__":
    run_command(main, Config)
