"""Pairwise rewards in the smallest form: of two answers to the same prompt, the shorter one wins.

Members of a group are compared with each other (envs/pairwise.py); the reward is wins minus losses.
The policy first imitates notes of 3 to 6 words. Another `env.judge`, such as
preference.label_model:LabelModelBuilder, makes this RL from a preference model.

    python recipes/shorter/train.py                                        # runs/shorter
    python recipes/shorter/train.py env.matchup_pattern=all_pairs_one_way env.group_size=8

At the end the judge compares the trained policy with the warm start, in both orders.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from envs.kind_words import KindWordsExamplesBuilder, KindWordsPrompts
from envs.pairwise import PairwiseBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import COUNT, LEARNING_RATE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import BehaviorIfExists
from preference.judges import ShorterJudgeBuilder
from preference.win_rate import WinRateEvaluator
from recipes.results import write_results
from recipes.warm_start import torch_backend, warm_started
from rl import train
from rl.types import Metrics, RLDatasetBuilder


@chz.chz
class Config(train.Config):
    """Reinforcement learning from comparisons by length, after a supervised warm start."""

    env: RLDatasetBuilder = chz.field(
        default_factory=lambda: PairwiseBuilder(
            prompts=KindWordsPrompts(repeat=4), judge=ShorterJudgeBuilder(), batch_size=16, group_size=4
        ),
        doc="builder of the prompts and the judge",
    )
    warm_start_steps: int = chz.field(
        default=200, validator=COUNT, doc="supervised steps before RL, unless load_checkpoint_path is given"
    )
    renderer_name: str | None = chz.field(default="plain", doc="role_colon, chat_template or plain")
    max_tokens: int | None = chz.field(default=64, validator=COUNT, doc="maximum tokens of an answer")
    learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="of RL, at its first step")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="how RL's learning rate falls")
    num_epochs: int = chz.field(default=10, validator=COUNT, doc="passes over the prompts")
    max_steps: int | None = chz.field(default=25, validator=COUNT, doc="RL steps")
    log_path: str = log_path_field("runs/shorter", "the run folder; the warm start's is beside it")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(
        default="delete", doc="what to do with the last run's folders"
    )
    backend: BackendConfig = torch_backend()


async def compare(config: Config, trained: str, reference: str) -> Metrics:
    """The win rate of one saved policy against another on held-out prompts."""
    assert isinstance(config.env, PairwiseBuilder) and config.max_tokens
    renderer = get_renderer(config.renderer_name, load_tokenizer(config.model_name))
    judge = config.env.judge(renderer.tokenizer)
    evaluator = WinRateEvaluator(config.env.prompts()[1], renderer, judge, config.max_tokens, seed=config.seed)
    with ServiceClient(config.backend) as service:
        return await evaluator(service.create_sampling_client(trained), service.create_sampling_client(reference))


async def main(config: Config) -> None:
    if not isinstance(config.env, PairwiseBuilder):
        raise ConfigError("this recipe compares answers in pairs: env is envs.pairwise:PairwiseBuilder, or a subclass")
    notes = KindWordsExamplesBuilder(n_batches=config.warm_start_steps, batch_size=64, seed=config.seed)
    config = await warm_started(config, notes, lr_schedule="linear")
    assert config.load_checkpoint_path
    await train.main(config)
    final = str(Path(config.log_path) / "checkpoints" / "final")
    metrics = await compare(config, final, config.load_checkpoint_path)
    write_results(config.log_path, metrics)
    print(
        f"win rate against the warm start: {metrics['win_rate']:.3f} +- {metrics['win_rate_stderr']:.3f} (standard "
        "error)"
    )


if __name__ == "__main__":
    run_command(main, Config)
