"""Text for the Belief State Transformer and its baselines: documents, packed with EOS between them
into rows of block_size tokens.

The stream of an epoch is EOS d_0 EOS d_1 ... d_n EOS, cut into rows; what does not fill the last
row is left out. Fill-in-the-middle (for the GPT baseline) turns a document a b c d e f g into e f g
<|fim|> a b c d, with a new cut every epoch. A batch is a function of (seed, step) alone, so a
resumed run needs no more than its step. Left out: sets that do not fit into memory
(recipes/belief_state/pretokenized.py has them).
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
from supervised.data import HuggingFaceBuilder
from supervised.rows import Row, read_rows

SEPARATOR = "<|endoftext|>"  # between the stories of TinyStories' text files


class Rows(Protocol):
    """Token rows of one length, by index."""

    def __len__(self) -> int: ...

    def take(self, indices_B: np.ndarray, epochs_B: np.ndarray) -> np.ndarray:
        """tokens_B_T, int64."""
        ...


@dataclass(frozen=True)
class FillInTheMiddle:
    """The suffix of a document is `goal_range` (both ends included) tokens long, but leaves at
    least two for the rest.
    """

    token: int  # the id of <|fim|>, one above the tokenizer's vocabulary
    goal_range: tuple[int, int] = (25, 75)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.goal_range[0] <= self.goal_range[1]:
            raise ConfigError(f"goal_range={self.goal_range}: the first must be at least 1 and no more than the second")

    def __call__(self, tokens_T: np.ndarray, epoch: int, document: int) -> np.ndarray:
        """Suffix, <|fim|>, the rest: one token longer. A document of fewer than three tokens has no
        suffix, only the mark before it.
        """
        most = max(0, min(self.goal_range[1], len(tokens_T) - 2))
        length = int(
            np.random.default_rng([self.seed, epoch, document]).integers(min(self.goal_range[0], most), most + 1)
        )
        cut = len(tokens_T) - length
        return np.concatenate([tokens_T[cut:], [self.token], tokens_T[:cut]])


def fim_loss_mask(tokens_B_T: np.ndarray, fim: int, eos: int) -> np.ndarray:
    """Which tokens are predicted: those after a <|fim|> in this row, up to and including the EOS.
    bool (B, T).
    """
    places_T = np.arange(tokens_B_T.shape[1])

    def last_before(token: int) -> np.ndarray:
        """Where `token` last stood before each place; -1 if nowhere."""
        seen_B_T = np.maximum.accumulate(np.where(tokens_B_T == token, places_T, -1), axis=1)
        return np.concatenate([np.full((len(seen_B_T), 1), -1), seen_B_T[:, :-1]], axis=1)

    return last_before(fim) > last_before(eos)


class PackedDocuments:
    """Rows of one stream of documents. DataError if it does not fill one row."""

    def __init__(self, documents: Sequence[np.ndarray], block_size: int, eos: int, fim: FillInTheMiddle | None = None):
        self.block_size, self.eos, self.fim = block_size, eos, fim
        self.tokens = np.concatenate([np.empty(0, dtype=np.int32), *documents])
        self.bounds = np.concatenate([[0], np.cumsum([len(tokens_T) for tokens_T in documents], dtype=np.int64)])
        longer_by = 2 if fim else 1
        # of the EOS before each document, and of the last
        self.places = self.bounds + np.arange(len(self.bounds)) * longer_by
        self.num_rows = int(self.places[-1] + 1) // block_size
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
        first = int(np.searchsorted(self.places, start, side="right")) - 1
        last = int(np.searchsorted(self.places, stop, side="left"))
        pieces = [piece for document in range(first, last) for piece in ([self.eos], self._document(document, epoch))]
        offset = start - int(self.places[first])
        return np.concatenate(pieces)[offset : offset + self.block_size].astype(np.int64)

    def _document(self, document: int, epoch: int) -> np.ndarray:
        if document == len(self.bounds) - 1:  # nothing follows the last EOS
            return self.tokens[:0]
        tokens_T = self.tokens[self.bounds[document] : self.bounds[document + 1]]
        return self.fim(tokens_T, epoch, document) if self.fim else tokens_T


@dataclass(frozen=True)
class ShuffledBatches:
    """Endless batches of rows; epoch after epoch in an order of its own, with no row left out or
    doubled within one.

    With several processes each takes every `world_size`-th row of the batch, so that together they
    see what one would.
    """

    rows: Rows
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a positive multiple of the {self.world_size} processes"
            )

    def get_batch(self, step: int) -> np.ndarray:
        """tokens_B_T, int64; B = batch_size / world_size."""
        drawn_B = step * self.batch_size + np.arange(self.rank, self.batch_size, self.world_size)
        epochs_B = drawn_B // len(self.rows)
        orders = {epoch: _order(self.seed, epoch, len(self.rows)) for epoch in set(epochs_B.tolist())}
        drawn = zip(drawn_B % len(self.rows), epochs_B.tolist(), strict=True)
        return self.rows.take(np.array([orders[epoch][place] for place, epoch in drawn]), epochs_B)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


# --- where documents come from ------------------------------------------------------------------


@dataclass(frozen=True)
class TextSet:
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # of the model: one more than the tokenizer's with fill-in-the-middle
    eos: int
    fim: int | None
    train: PackedDocuments
    test: PackedDocuments
    test_documents: list[np.ndarray]  # int32 ids, as they are: neither packed nor turned around


@chz.chz
class TextData:
    """Documents, their tokenizer, and the rows that a model is trained on."""

    source: str = chz.field(
        default="stories", doc="stories (made here), a .txt or .jsonl file, a hub name or a local folder"
    )
    num_stories: int = chz.field(default=20_000, validator=COUNT, doc="of source=stories: how many to train on")
    text_field: str = chz.field(default="text", doc="field that holds the document (not of a .txt file)")
    split: str = chz.field(default="train", doc="split to train on (of a hub name or folder)")
    test_split: str | None = chz.field(default=None, doc="split held out, as validation")
    test_path: str | None = chz.field(default=None, doc="held-out file")
    test_size: int = chz.field(default=200, validator=WHOLE, doc="documents held out where neither of the two is given")
    tokenizer: str | None = chz.field(
        default=None, doc="folder, tokenizer.json or hub name; None = train one on the documents"
    )
    vocab_size: int = chz.field(default=1000, validator=COUNT, doc="of the tokenizer that is trained")
    block_size: int = chz.field(default=256, validator=COUNT, doc="tokens in a row")
    cut_long: bool = chz.field(
        default=False, doc="cut documents that fit no row into several; else drop them, as the paper does"
    )
    fill_in_the_middle: bool = chz.field(
        default=False, doc="turn documents around for a GPT that is shown how they end"
    )
    goal_range: tuple[int, int] = chz.field(
        default=(25, 75), validator=COUNT, doc="shortest and longest suffix that it is shown, in tokens"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="of the stories, the held-out documents and the cuts")

    def text_set(self) -> TextSet:
        tokenizer, texts = self.tokenizer_and_texts()
        eos: int = tokenizer.eos_token_id  # type: ignore[assignment]
        fim = FillInTheMiddle(len(tokenizer), self.goal_range, self.seed) if self.fill_in_the_middle else None
        train_D, test_D = (encode_documents(tokenizer, part) for part in texts)
        longest = self.block_size - (3 if fim else 2)  # with an EOS on both sides
        kept_D, kept_test_D = (
            [one for one in part if self.cut_long or len(one) <= longest] for part in (train_D, test_D)
        )
        dropped = len(train_D) + len(test_D) - len(kept_D) - len(kept_test_D)
        line = (
            f"{self.source}: {len(kept_D):,} documents, {sum(map(len, kept_D)):,} tokens; {len(kept_test_D):,} held out"
        )
        print(line + (f"; {dropped:,} longer than {longest} tokens dropped" if dropped else ""), flush=True)
        train, test = (PackedDocuments(documents, self.block_size, eos, fim) for documents in (kept_D, kept_test_D))
        return TextSet(tokenizer, len(tokenizer) + bool(fim), eos, fim and fim.token, train, test, kept_test_D)

    def tokenizer_and_texts(self) -> tuple[PreTrainedTokenizerBase, tuple[list[str], list[str]]]:
        """Training and held-out documents; a tokenizer that is trained has not seen the latter."""
        train, test = self.texts()
        return open_tokenizer(self.tokenizer) if self.tokenizer else train_tokenizer(train, self.vocab_size), (
            train,
            test,
        )

    def texts(self) -> tuple[list[str], list[str]]:
        """Training and held-out documents; no text is in both."""
        if self.source == "stories":
            train, test = (
                stories.generate(self.num_stories, self.seed),
                stories.generate(self.test_size, self.seed + 1_000_003),
            )
        else:
            train, test = self._read(self.source, self.split), self._held_out_texts()
            if not test:
                train, test = self._split(train)
        held_out = set(test)
        return [text for text in train if text not in held_out], test

    def _held_out_texts(self) -> list[str]:
        if self.test_path and self.test_split:
            raise ConfigError(f"test_path={self.test_path} and test_split={self.test_split}: give one of them")
        return (
            self._read(self.test_path or self.source, self.test_split or "")
            if self.test_path or self.test_split
            else []
        )

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
        rows = (
            read_rows(source) if source.endswith(".jsonl") else HuggingFaceBuilder(name=source, split=split).rows()[0]
        )
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
    """Documents stand between lines <|endoftext|>; in a file without them, between blank lines."""
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
