"""The data of a Belief State Transformer: training rows by step, and held-out measurements."""

from pathlib import Path
from typing import Protocol

import chz

from recipes.libraries.belief_state.trainer import BeliefStateTrainer, Metrics, TokenBatch


class TokenSource(Protocol):
    """`task` names the data: checkpoints of another task are refused. `context_length`: the first
    position a prefix may end at.
    """

    vocab_size: int
    eos_id: int
    task: str
    context_length: int

    def get_batch(self, step: int) -> TokenBatch:
        """A pure function of the seed and the step, so that a resumed run needs only its step."""
        ...

    def evaluate(self, trainer: BeliefStateTrainer) -> Metrics:
        """Metrics of held-out data, named test/..."""
        ...

    def save(self, folder: Path) -> None:
        """Writes files that readers of the run's checkpoints need, such as a tokenizer."""
        ...


@chz.chz
class TokenSourceBuilder:
    def __call__(self, batch_size: int, seed: int) -> TokenSource:
        raise NotImplementedError
