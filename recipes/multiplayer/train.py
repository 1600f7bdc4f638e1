"""Tic-tac-toe from random weights: imitation of random legal play, then self-play.

The warm start teaches legal moves only. In self-play the policy has both seats of every game, and
the result is the only reward. The games of a group share a random opening; a seat's baseline is its
mean result in the group. Perfect and random opponents appear in evaluations only.

    python recipes/multiplayer/train.py                                     # runs/multiplayer
    python recipes/multiplayer/train.py env.opponent=envs.opponents:RandomPlayer env.group_size=8 \\
        advantage=rl.advantages:GroupMean
    python recipes/multiplayer/evaluate.py model_path=runs/multiplayer/checkpoints/final

The main metric is test/env/all/loss, of greedy games against a random player.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from envs.opponents import RandomPlayer, listed_moves
from envs.textarena import TextArenaBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SHARE, WHOLE
from posttrain.backend.types import Datum
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.datasets import DrawnDataset
from posttrain.tracking.run_config import log_path_field
from recipes.multiplayer.model import random_game, save_model
from recipes.warm_start import torch_backend, warm_started
from rl import train
from rl.advantages import AdvantageEstimator, SeatMean
from rl.kl import KLPenalty
from rl.types import RLDatasetBuilder
from supervised.data import render
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder


@chz.chz
class RandomPlayBuilder(SupervisedDatasetBuilder):
    """Positions and moves of random games, to imitate."""

    task: TextArenaBuilder = chz.field(doc="the game")
    skill: float = chz.field(
        default=0.0, validator=SHARE, doc="share of perfect moves; the others are random legal moves"
    )
    n_batches: int = chz.field(default=400, validator=COUNT, doc="training batches per epoch")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        def draw(epoch: int, index: int) -> list[Datum]:  # the same games in every epoch
            game, conversations = 0, []
            while len(conversations) < self.batch_size:
                for text, move in random_game(self.task, [self.seed, index, game], self.skill):
                    conversations.append([Message(role="user", content=text), Message(role="assistant", content=move)])
                game += 1
            return render(conversations[: self.batch_size], renderer, self)

        return DrawnDataset(draw, self.n_batches), None


@chz.chz
class Config(train.Config):
    """Self-play after a warm start on random legal play."""

    env: RLDatasetBuilder = chz.field(
        default_factory=lambda: TextArenaBuilder(
            board_only=True,
            random_opening=6,
            batch_size=32,
            group_size=16,
            n_batches=100,
            error_allowance=0,
            test_opponent=RandomPlayer(),
            num_test=200,
            max_tokens=3,
        ),
        doc="builder of the games",
    )
    model_name: str = chz.field(default="new", doc="new = a tokenizer and a model made for the game, in LOG_PATH_model")
    warm_start_nll: float = chz.field(
        default=0.8, validator=NON_NEGATIVE, doc="nats per token at which the warm start ends"
    )
    renderer_name: str | None = chz.field(default="plain", doc="role_colon, chat_template or plain")
    advantage: AdvantageEstimator = chz.field(
        default_factory=SeatMean, doc="baseline: of each seat, over the games from one opening"
    )
    kl: KLPenalty = chz.field(
        default_factory=lambda: KLPenalty(coef=0.15),
        doc="KL to the warm start, which keeps exploration: it plays any legal move",
    )
    loss_fn: str = chz.field(default="ppo", doc="importance_sampling, reinforce, ppo, cispo or dro")
    num_substeps: int = chz.field(
        default=8, validator=COUNT, doc="optimizer steps per batch; more than 1 is slightly off-policy"
    )
    learning_rate: float = chz.field(default=7e-4, validator=LEARNING_RATE, doc="of self-play, at its first step")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="of self-play's learning rate")
    save_every: int = chz.field(
        default=100, validator=WHOLE, doc="checkpoint after every this many steps, and at the end"
    )
    backend: BackendConfig = torch_backend(
        "how this machine trains and samples; the README's results use the torch sampler"
    )
    log_path: str = log_path_field("runs/multiplayer", "the run folder; the warm start's and the model's are beside it")


async def main(config: Config) -> None:
    task = config.env
    assert isinstance(task, TextArenaBuilder)
    if not listed_moves(task.open_game(0).text):
        raise ConfigError(
            f"env.game={task.game} does not list its legal moves: the warm start cannot play it at random"
        )
    if config.model_name == "new":
        config = chz.replace(config, model_name=f"{config.log_path}_model")
        save_model(Path(config.model_name), task, config.seed)
    examples = RandomPlayBuilder(task=task, batch_size=128, seed=config.seed)
    config = await warm_started(config, examples, learning_rate=1e-3, stop_at_nll=config.warm_start_nll)
    await train.main(config)


if __name__ == "__main__":
    run_command(main, Config)
