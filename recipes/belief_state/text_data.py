"""Text for the Belief State Transformer and its baselines: documents packed into rows.

The stream of an epoch is EOS d_0 EOS d_1 ... d_n EOS, cut into rows of block_size tokens; the
remainder is left out. Left out: data sets larger than memory (pretokenized.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import chz
import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from recipes.belief_state import stories
from recipes.belief_state.tokenizer import encode_documents, open_tokenizer, train_tokenizer
from supervised.rows import Row, read_rows
from supervised.table_rows import table_rows

SEPARATOR = "<|endoftext|>"  # between the stories of TinyStories' text files


class Rows(Protocol):
    """Token rows of one length, by index."""

    def __len__(self) -> int: ...

    def take(self, indices_B: np.ndarray, epochs_B: np.ndarray) -> np.ndarray:
        """tokens_B_T, int64."""
        ...


@dataclass(frozen=True)
class FillInTheMiddle:
    """Fill-in-the-middle for the GPT baseline: a document a b c d e f g becomes
    e f g <|fim|> a b c d, cut anew every epoch. The suffix has `goal_range` tokens (inclusive), but
    at least two are left for the rest.
    """

    token: int  # the id of <|fim|>, one above the tokenizer's vocabulary
    goal_range: tuple[int, int] = (25, 75)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.goal_range[0] <= self.goal_range[1]:
            raise ConfigError(f"goal_range={self.goal_range}: the first must be at least 1 and no more than the second")

    def __call__(self, tokens_T: np.ndarray, epoch: int, document: int) -> np.ndarray:
        """One token longer. A document of fewer than three tokens has an empty suffix."""
        most = max(0, min(self.goal_range[1], len(tokens_T) - 2))
        length = int(
            np.random.default_rng([self.seed, epoch, document]).integers(min(self.goal_range[0], most), most + 1)
        )
        cut = len(tokens_T) - length
        return np.concatenate([tokens_T[cut:], [self.token], tokens_T[:cut]])


def fim_loss_mask(tokens_B_T: np.ndarray, fim: int, eos: int) -> np.ndarray:
    """bool (B, T): targets are the tokens after a <|fim|> of this row, up to and including EOS."""
    index_T = np.arange(tokens_B_T.shape[1])

    def last_before(token: int) -> np.ndarray:
        """Position of the last `token` before each position; -1 if there is none."""
        seen_B_T = np.maximum.accumulate(np.where(tokens_B_T == token, index_T, -1), axis=1)
        return np.concatenate([np.full((len(seen_B_T), 1), -1), seen_B_T[:, :-1]], axis=1)

    return last_before(fim) > last_before(eos)


class PackedDocuments:
    """Rows of a stream of documents. DataError if it does not fill a row."""

    def __init__(self, documents: Sequence[np.ndarray], block_size: int, eos: int, fim: FillInTheMiddle | None = None):
        self.block_size, self.eos, self.fim = block_size, eos, fim
        self.tokens = np.concatenate([np.empty(0, dtype=np.int32), *documents])
        self.bounds = np.concatenate([[0], np.cumsum([len(tokens_T) for tokens_T in documents], dtype=np.int64)])
        added_tokens = 2 if fim else 1  # EOS, <|fim|>
        self.eos_positions = self.bounds + np.arange(len(self.bounds)) * added_tokens
        self.num_rows = int(self.eos_positions[-1] + 1) // block_size
        if self.num_rows == 0:
            raise DataError(
                f"{len(documents):,} documents with {len(self.tokens):,} tokens do not fill one row of {block_size}"
            )

    def __len__(self) -> int:
        return self.num_rows

    def take(self, indices_B: np.ndarray, epochs_B: np.ndarray) -> np.ndarray:
        return np.stack([self._row(int(row), int(epoch)) for row, epoch in zip(indices_B, epochs_B, strict=True)])

    def _row(self, row: int, epoch: int) -> np.ndarray:
        start, stop = row * self.block_size, (row + 1) * self.block_size
        first = int(np.searchsorted(self.eos_positions, start, side="right")) - 1
        last = int(np.searchsorted(self.eos_positions, stop, side="left"))
        pieces = [piece for document in range(first, last) for piece in ([self.eos], self._document(document, epoch))]
        offset = start - int(self.eos_positions[first])
        return np.concatenate(pieces)[offset : offset + self.block_size].astype(np.int64)

    def _document(self, document: int, epoch: int) -> np.ndarray:
        if document == len(self.bounds) - 1:  # nothing follows the last EOS
            return self.tokens[:0]
        tokens_T = self.tokens[self.bounds[document] : self.bounds[document + 1]]
        return self.fim(tokens_T, epoch, document) if self.fim else tokens_T


@dataclass(frozen=True)
class ShuffledBatches:
    """Endless batches of rows, shuffled anew every epoch; each row once per epoch. A batch is a
    function of (seed, step).
    """

    rows: Rows
    batch_size: int
    seed: int = 0

    def get_batch(self, step: int) -> np.ndarray:
        """tokens_B_T, int64."""
        drawn_B = step * self.batch_size + np.arange(self.batch_size)
        epochs_B = drawn_B // len(self.rows)
        orders = {epoch: _order(self.seed, epoch, len(self.rows)) for epoch in set(epochs_B.tolist())}
        drawn = zip(drawn_B % len(self.rows), epochs_B.tolist(), strict=True)
        return self.rows.take(np.array([orders[epoch][index] for index, epoch in drawn]), epochs_B)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


# --- sources of documents -----------------------------------------------------------------------


@dataclass(frozen=True)
class TextSet:
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # of the model: one more than the tokenizer's with fill-in-the-middle
    eos: int
    fim: int | None
    train: PackedDocuments
    test: PackedDocuments


@chz.chz
class TextData:
    """Documents, their tokenizer, and the rows of training."""

    source: str = chz.field(
        default="stories", doc="stories (generated), a .txt or .jsonl file, a hub name or a local folder"
    )
    num_stories: int = chz.field(default=20_000, validator=COUNT, doc="stories to train on, with source=stories")
    text_field: str = chz.field(default="text", doc="field of the document (not of a .txt file)")
    split: str = chz.field(default="train", doc="split to train on (of a hub name or folder)")
    test_split: str | None = chz.field(default=None, doc="held-out split, such as validation")
    test_path: str | None = chz.field(default=None, doc="held-out file")
    test_size: int = chz.field(
        default=200, validator=WHOLE, doc="documents held out if neither test_split nor test_path is given"
    )
    tokenizer: str | None = chz.field(
        default=None, doc="folder, tokenizer.json or hub name; None = train one on the documents"
    )
    vocab_size: int = chz.field(default=1000, validator=COUNT, doc="of a trained tokenizer")
    block_size: int = chz.field(default=256, validator=COUNT, doc="tokens in a row")
    cut_long: bool = chz.field(default=False, doc="cut documents longer than a row; else drop them, as the paper does")
    fill_in_the_middle: bool = chz.field(default=False, doc="rearrange documents so that a GPT reads their end first")
    goal_range: tuple[int, int] = chz.field(
        default=(25, 75), validator=COUNT, doc="shortest and longest end that it reads first, in tokens"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="of the stories, the held-out documents and the cuts")

    def text_set(self) -> TextSet:
        tokenizer, texts = self.tokenizer_and_texts()
        eos: int = tokenizer.eos_token_id  # type: ignore[assignment]
        fim = FillInTheMiddle(len(tokenizer), self.goal_range, self.seed) if self.fill_in_the_middle else None
        train_D, test_D = (encode_documents(tokenizer, part) for part in texts)
        longest = self.block_size - (3 if fim else 2)  # with an EOS on both sides
        kept_D, kept_test_D = (
            [tokens_T for tokens_T in part if self.cut_long or len(tokens_T) <= longest] for part in (train_D, test_D)
        )
        dropped = len(train_D) + len(test_D) - len(kept_D) - len(kept_test_D)
        line = (
            f"{self.source}: {len(kept_D):,} documents, {sum(map(len, kept_D)):,} tokens; {len(kept_test_D):,} held out"
        )
        print(line + (f"; {dropped:,} longer than {longest} tokens dropped" if dropped else ""), flush=True)
        train, test = (PackedDocuments(documents, self.block_size, eos, fim) for documents in (kept_D, kept_test_D))
        return TextSet(tokenizer, len(tokenizer) + bool(fim), eos, fim and fim.token, train, test)

    def tokenizer_and_texts(self) -> tuple[PreTrainedTokenizerBase, tuple[list[str], list[str]]]:
        """The tokenizer, and training and held-out documents; it is trained on the former only."""
        train, test = self.texts()
        tokenizer = open_tokenizer(self.tokenizer) if self.tokenizer else train_tokenizer(train, self.vocab_size)
        return tokenizer, (train, test)

    def texts(self) -> tuple[list[str], list[str]]:
        """Training and held-out documents; no text is in both."""
        if self.source == "stories":
            train = stories.generate(self.num_stories, self.seed)
            test = self._held_out_texts() or stories.generate(self.test_size, self.seed + 1_000_003)
        else:
            train, test = self._read(self.source, self.split), self._held_out_texts()
            if not test:
                train, test = self._split(train)
        held_out = set(test)
        return [text for text in train if text not in held_out], test

    def _held_out_texts(self) -> list[str]:
        if self.test_path and self.test_split:
            raise ConfigError(f"test_path={self.test_path} and test_split={self.test_split}: give one of them")
        if self.test_path:
            return self._read(self.test_path, "train")
        return self._read(self.source, self.test_split) if self.test_split else []

    def _split(self, texts: list[str]) -> tuple[list[str], list[str]]:
        if not 0 < self.test_size < len(texts):
            raise DataError(
                f"test_size={self.test_size} of {len(texts):,} documents: hold out at least one, and not all"
            )
        order = np.random.default_rng(self.seed).permutation(len(texts))
        return [texts[i] for i in sorted(order[self.test_size :])], [texts[i] for i in sorted(order[: self.test_size])]

    def _read(self, source: str, split: str) -> list[str]:
        if source.endswith(".txt"):
            return _read_text_file(source)
        rows = read_rows(source) if source.endswith(".jsonl") else table_rows(source, None, split)
        return [self._text(row) for row in rows]

    def _text(self, row: Row) -> str:
        where, fields = row
        if not isinstance(text := fields.get(self.text_field), str) or not text.strip():
            names = ", ".join(map(repr, fields))
            raise DataError(
                f"{where}: no text in the field {self.text_field!r}; the fields are {names} (text_field=NAME)"
            )
        return text.strip()


def _read_text_file(path: str) -> list[str]:
    """Documents are separated by <|endoftext|>, or in a file without it by blank lines."""
    try:
        content = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
        raise DataError(f"{path} cannot be read ({error}); give a text file") from error
    if "\0" in content:
        raise DataError(f"{path}: byte {content.index(chr(0))} is 0: a binary file, where a text is needed")
    parts = content.split(SEPARATOR) if SEPARATOR in content else content.replace("\r\n", "\n").split("\n\n")
    if not (documents := [part.strip() for part in parts if part.strip()]):
        raise DataError(f"{path}: the file has no documents")
    return documents
