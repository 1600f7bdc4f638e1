"""Supervised fine-tuning from a builder of data and the configuration of supervised/train.py.

The loop gives the learning-rate schedule, held-out loss, checkpoints, exact resume and plots. For
other data, replace ArithmeticExamplesBuilder: supervised/data.py has builders for JSONL files,
Hugging Face datasets and mixtures.

    python recipes/sl_basic.py                                             # a minute on 2 cores; runs/sl_basic
    python recipes/sl_basic.py dataset.num_digits=3 num_epochs=2 learning_rate=1e-3
    python recipes/sl_basic.py dataset=supervised.data:ConversationFileBuilder dataset.path=chats.jsonl renderer_name=None

Expect test/nll, in nats per token of held-out answers, to fall from 6 to below 0.2 with seed 0
(other seeds: recipes/README.md).
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


import chz

from envs.arithmetic import ArithmeticExamplesBuilder
from posttrain.backend.ranges import LEARNING_RATE, WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from supervised import train
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class Config(train.Config):
    """Supervised fine-tuning on two-digit addition."""

    dataset: SupervisedDatasetBuilder = chz.field(
        default_factory=lambda: ArithmeticExamplesBuilder(num_digits=2, n_batches=300, batch_size=128),
        doc="builder of the training and held-out data",
    )
    renderer_name: str | None = chz.field(
        default="plain", doc="role_colon, chat_template or plain; None = by the tokenizer"
    )
    learning_rate: float = chz.field(default=2e-3, validator=LEARNING_RATE, doc="at the first step")
    eval_every: int = chz.field(
        default=50, validator=WHOLE, doc="held-out loss before every this many steps, and at the end; 0 = never"
    )
    log_path: str = log_path_field("runs/sl_basic")


async def main(config: Config) -> None:
    await train.main(config)


if __name__ == "__main__":
    run_command(main, Config)
