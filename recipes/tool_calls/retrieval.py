"""The recipe of train.py with a search over an invented library: one search for a person's trade or
year of birth, two for the river of the town. No question that is held out has been trained on.

    python recipes/tool_calls/retrieval.py                  # runs/retrieval
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import chz

from envs.retrieval import RetrievalBuilder
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from recipes.tool_calls import train


def library() -> RetrievalBuilder:
    shape = {"num_people": 1000, "num_passages": 1, "prompt": "{question}", "list_tools": False}
    return RetrievalBuilder(**shape, batch_size=16, group_size=8)


@chz.chz
class Config(train.Config):
    """A search called by a small model, against the same model without it."""

    env: RetrievalBuilder = chz.field(default_factory=library, doc="the library, and what an episode may do")  # type: ignore[assignment]
    warm_start_nll: float = chz.field(
        default=0.0, validator=NON_NEGATIVE, doc="nats per token of a batch at which imitation ends"
    )
    warm_start_steps: int = chz.field(default=600, validator=COUNT, doc="most supervised steps")
    demonstrations: int = chz.field(default=8, validator=COUNT, doc="demonstrations of a supervised step")
    num_steps: int = chz.field(default=20, validator=COUNT, doc="steps of RL")
    learning_rate: float = chz.field(default=5e-5, validator=LEARNING_RATE, doc="of RL, at its first step")
    log_path: str = log_path_field("runs/retrieval", "folder of the four runs and the picture")


if __name__ == "__main__":
    run_command(train.main, Config)
