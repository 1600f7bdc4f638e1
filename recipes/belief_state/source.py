"""What a Belief State Transformer is trained on: rows by step, and what is measured on held-out
ones. Star graphs are in star_graph.py.
"""

from pathlib import Path
from typing import Protocol

import chz

from recipes.libraries.belief_state.trainer import BeliefStateTrainer, Metrics, TokenBatch


class TokenSource(Protocol):
    """`task` names the data; a checkpoint of other ones is refused. `context_length`: first
    position of a row that a prefix may end at.
    """

    vocab_size: int
    eos_id: int
    task: str
    context_length: int

    def get_batch(self, step: int) -> TokenBatch:
        """A pure function of the seed and the step: a resumed run needs no other cursor."""
        ...

    def evaluate(self, trainer: BeliefStateTrainer) -> Metrics:
        """Of held-out data; the names begin with test/."""
        ...

    def save(self, folder: Path) -> None:
        """Puts beside a run's checkpoints what their readers need (a tokenizer), if there is
        something.
        """
        ...


@chz.chz
class TokenSourceBuilder:
    def __call__(self, batch_size: int, seed: int) -> TokenSource:
        raise NotImplementedError
