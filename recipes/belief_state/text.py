"""Text sources of train.py: documents tokenized and packed at the start (data=text), or tokenized
shards (data=pretokenized).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import chz
import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.backend.ranges import COUNT
from recipes.belief_state.pretokenized import open_shards
from recipes.belief_state.source import TokenSourceBuilder
from recipes.belief_state.star_graph import held_out_losses
from recipes.belief_state.text_data import Rows, ShuffledBatches, TextData, fim_loss_mask
from recipes.belief_state.tokenizer import open_tokenizer
from recipes.libraries.belief_state.trainer import BeliefStateTrainer, Metrics, TokenBatch

EVAL_ROWS_AT_ONCE = 32


@chz.chz
class TextBuilder(TextData, TokenSourceBuilder):
    """Any text, or generated stories; for a GPT also rearranged for fill-in-the-middle."""

    eval_rows: int = chz.field(default=64, validator=COUNT, doc="held-out rows whose loss is measured")

    def __call__(self, batch_size: int, seed: int) -> "TextSource":
        text = self.text_set()
        batches = ShuffledBatches(text.train, batch_size, seed)
        return TextSource(text.tokenizer, text.vocab_size, text.eos, batches, text.test, self.eval_rows, text.fim)


@chz.chz
class PretokenizedBuilder(TokenSourceBuilder):
    """Shards of pretokenized.py."""

    folder: str = chz.field(doc="folder of the shards")
    train_files: list[str] = chz.field(
        default_factory=lambda: ["train_*.npy"], doc='names or patterns, with an optional weight: "code.npy:2.5"'
    )
    test_files: list[str] = chz.field(default_factory=lambda: ["test_*.npy"], doc="the same, held out")
    tokenizer: str | None = chz.field(default=None, doc="folder, tokenizer.json or hub name; None = FOLDER/tokenizer")
    block_size: int = chz.field(default=256, validator=COUNT, doc="tokens in a row")
    eval_rows: int = chz.field(default=64, validator=COUNT, doc="held-out rows whose loss is measured")

    def __call__(self, batch_size: int, seed: int) -> "TextSource":
        tokenizer = open_tokenizer(self.tokenizer or str(Path(self.folder).expanduser() / "tokenizer"))
        train, test = (
            open_shards(self.folder, files, self.block_size, len(tokenizer))
            for files in (self.train_files, self.test_files)
        )
        eos: int = tokenizer.eos_token_id  # type: ignore[assignment]
        return TextSource(
            tokenizer, len(tokenizer), eos, ShuffledBatches(train, batch_size, seed), test, self.eval_rows
        )


@dataclass(frozen=True)
class TextSource:
    """With `fim`, rows are rearranged and only the tokens after the goal are predicted."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    eos_id: int
    batches: ShuffledBatches
    test: Rows
    eval_rows: int
    fim: int | None = None
    context_length: int = 0

    @property
    def task(self) -> str:
        return task_name(self.tokenizer)

    def get_batch(self, step: int) -> TokenBatch:
        return self._batch(self.batches.get_batch(step))

    def evaluate(self, trainer: BeliefStateTrainer) -> Metrics:
        rows_B = np.arange(min(self.eval_rows, len(self.test)))
        return held_out_losses(trainer, self._batch(self.test.take(rows_B, np.zeros_like(rows_B))), EVAL_ROWS_AT_ONCE)

    def _batch(self, tokens_B_T: np.ndarray) -> TokenBatch:
        return TokenBatch(
            tokens_B_T, True, None if self.fim is None else fim_loss_mask(tokens_B_T, self.fim, self.eos_id)
        )

    def save(self, folder: Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save_pretrained(folder / "tokenizer")


def task_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The task of a checkpoint: text in this vocabulary."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:8]
    return f"text of {len(tokenizer)} tokens, vocabulary {digest}"
