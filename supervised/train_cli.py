"""Supervised fine-tuning from the command line.

python supervised/train_cli.py dataset=conversations.jsonl model_name=small learning_rate=3e-4
python -m supervised.train_cli dataset=prompt_completion dataset.path=train.jsonl \\
    dataset.prompt_field=question
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import chz

from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import by_name, run_command
from posttrain.tracking.metrics_log import Metrics
from supervised.config import Config
from supervised.names import DATASETS, EVALUATOR_OPTIONS
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class CLIConfig(Config):
    """Supervised fine-tuning of a language model on a dataset."""

    dataset: SupervisedDatasetBuilder = chz.field(
        default_factory=by_name(DATASETS["arithmetic"]), doc="the training data and the held-out data"
    )
    batch_size: int | None = chz.field(
        default=None, validator=COUNT, doc="short for dataset.batch_size: examples per step"
    )

    def resolved(self) -> "CLIConfig":
        """With the short option written into `dataset`."""
        if self.batch_size is None:
            return self
        return chz.replace(self, dataset=chz.replace(self.dataset, batch_size=self.batch_size), batch_size=None)


async def trained(config: CLIConfig) -> Metrics:
    from supervised import train  # with torch, for which --help and errors do not wait

    return await train.main(config.resolved())


def main() -> None:
    run_command(trained, CLIConfig, {"dataset": DATASETS} | EVALUATOR_OPTIONS)


if __name__ == "__main__":
    main()
