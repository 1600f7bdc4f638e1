"""Tokenized text on disk: shards of uint16 tokens with an EOS before each document, memory-mapped.

    # train_000000.npy ..., test_000000.npy, tokenizer/
    python recipes/belief_state/pretokenized.py out=tokens data.source=stories.txt

The original's format; its own last shards end in uninitialised memory. Left out: vocabularies above
65,536 tokens, fill-in-the-middle (it needs whole documents: text_data.py).
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from tokenize import TokenError  # of a damaged .npy header

import chz
import numpy as np

from posttrain.backend.errors import ConfigError, DataError, one_line
from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import run_command
from recipes.belief_state.text_data import TextData
from recipes.belief_state.tokenizer import encode_documents

DTYPE = np.dtype(np.uint16)
SHARD_SIZE = 100_000_000
TOKENS_AT_ONCE = 1 << 24  # checked at a time


def write_shards(
    documents: Iterable[np.ndarray],
    folder: str | Path,
    name: str,
    eos: int,
    vocab_size: int,
    shard_size: int = SHARD_SIZE,
) -> list[Path]:
    """Writes `{name}_000000.npy` ... of shard_size tokens; the last shard is shorter. A document
    may continue in the next shard. DataError for ids outside the vocabulary and if shards of that
    name exist.
    """
    folder = Path(folder).expanduser()
    if vocab_size > np.iinfo(DTYPE).max + 1:
        raise DataError(f"a vocabulary of {vocab_size:,} tokens does not fit the uint16 of the shards")
    if existing := sorted(folder.glob(f"{name}_*.npy")):
        raise DataError(f"{existing[0]} is there already: delete the old shards, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    shard, filled = np.empty(shard_size, dtype=DTYPE), 0
    for number, tokens_T in enumerate(documents):
        if bad := _first_bad(tokens_T, vocab_size):
            raise DataError(f"document {number}, token {bad[0]}: the id {bad[1]} is not one of the {vocab_size} tokens")
        piece = np.concatenate([[eos], tokens_T]).astype(DTYPE)
        while len(piece):
            taken = min(len(piece), shard_size - filled)
            shard[filled : filled + taken] = piece[:taken]
            piece, filled = piece[taken:], filled + taken
            if filled == shard_size:
                written.append(_save(folder / f"{name}_{len(written):06d}.npy", shard))
                filled = 0
    if filled:
        written.append(_save(folder / f"{name}_{len(written):06d}.npy", shard[:filled]))
    return written


def _save(path: Path, tokens: np.ndarray) -> Path:
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.save(file, tokens)
    return unfinished.rename(path)


class Shard:
    """Rows of block_size tokens of one file; the remainder is left out. DataError if
    the file is missing, no 1-D uint16 array, shorter than a row, or has ids beyond the vocabulary.
    """

    def __init__(self, path: str | Path, block_size: int, vocab_size: int):
        self.path, self.block_size = Path(path).expanduser(), block_size
        self.tokens = self._open()
        self.num_rows = len(self.tokens) // block_size
        if self.num_rows == 0:
            raise DataError(f"{path}: {len(self.tokens):,} tokens do not fill one row of {block_size}")
        for start in range(0, len(self.tokens), TOKENS_AT_ONCE):
            if bad := _first_bad(self.tokens[start : start + TOKENS_AT_ONCE], vocab_size):
                raise DataError(
                    f"{path}, token {start + bad[0]:,} of {len(self.tokens):,}: the id {bad[1]} is beyond the "
                    f"{vocab_size} tokens of the vocabulary: another tokenizer's, or (near the end of a last shard) "
                    "uninitialised memory"
                )

    def _open(self) -> np.ndarray:
        try:
            tokens = np.load(self.path, mmap_mode="r")
        except FileNotFoundError:
            near = ", ".join(sorted(path.name for path in self.path.parent.glob("*.npy"))[:5])
            raise DataError(f"{self.path}: no such shard" + (f"; there are {near}" if near else "")) from None
        except (OSError, ValueError, EOFError, TokenError) as error:
            raise DataError(f"{self.path}: no array of numpy can be read from it: {one_line(error, 120)}") from error
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype != DTYPE:
            shape = (
                f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
            )
            raise DataError(f"{self.path}: {shape}, where a shard is one row of uint16")
        return tokens

    def __len__(self) -> int:
        return self.num_rows

    def take(self, indices_B: np.ndarray, epochs_B: np.ndarray) -> np.ndarray:
        """tokens_B_T, int64; the same in every epoch."""
        starts_B = np.asarray(indices_B) * self.block_size
        return np.stack([self.tokens[start : start + self.block_size] for start in starts_B]).astype(np.int64)


class WeightedShards:
    """Concatenated shards: of each, ceil(num_rows * weight) rows, repeated or the first rows
    only.
    """

    def __init__(self, shards: Sequence[Shard], weights: Sequence[float]):
        if not shards or any(not (weight > 0 and math.isfinite(weight)) for weight in weights):
            raise ConfigError(
                f"{len(shards)} shards with weights {list(weights)}: at least one is needed, each with a weight above 0"
            )
        self.shards = list(shards)
        counts = [_scaled(len(shard), weight) for shard, weight in zip(shards, weights, strict=True)]
        self.bounds = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def take(self, indices_B: np.ndarray, epochs_B: np.ndarray) -> np.ndarray:
        """tokens_B_T, int64."""
        indices_B = np.asarray(indices_B)
        shard_B = np.searchsorted(self.bounds, indices_B, side="right") - 1
        rows = zip(shard_B, indices_B - self.bounds[shard_B], strict=True)
        picked = [(self.shards[number], row % len(self.shards[number])) for number, row in rows]
        return np.concatenate([shard.take(np.array([row]), epochs_B[:1]) for shard, row in picked])


def _scaled(rows: int, weight: float) -> int:
    """ceil(rows * weight), rounded so that 100 * 1.1 gives 110, not 111."""
    return math.ceil(round(rows * weight, 9))


def open_shards(folder: str | Path, files: Sequence[str], block_size: int, vocab_size: int) -> WeightedShards:
    """`files`: names in the folder or patterns (train_*.npy), with an optional weight:
    "code.npy:2.5".
    """
    folder, shards, weights = Path(folder).expanduser(), [], []
    for entry in files:
        name, weight = (
            (match[1], float(match[2])) if (match := re.fullmatch(r"(.*):(\d+(?:\.\d+)?)", entry)) else (entry, 1.0)
        )
        paths = sorted(folder.glob(name)) if "*" in name else [folder / name]
        if not paths:
            raise DataError(f"{folder / name}: no shard of that name")
        shards += [Shard(path, block_size, vocab_size) for path in paths]
        weights += [weight] * len(paths)
    return WeightedShards(shards, weights)


def _first_bad(tokens_T: np.ndarray, vocab_size: int) -> tuple[int, int] | None:
    """Position and value of the first id outside 0 .. vocab_size - 1."""
    bad = np.flatnonzero((tokens_T < 0) | (tokens_T >= vocab_size))
    return (int(bad[0]), int(tokens_T[bad[0]])) if len(bad) else None


# --- the command --------------------------------------------------------------------------------


@chz.chz
class Config:
    """Tokenizes documents into shards, with their tokenizer beside them."""

    out: str = chz.field(doc="folder for the shards and the tokenizer")
    data: TextData = chz.field(default_factory=TextData, doc="the documents")
    shard_size: int = chz.field(default=SHARD_SIZE, validator=COUNT, doc="tokens in a shard")


def main(config: Config) -> None:
    out, tokenizer, texts = Path(config.out).expanduser(), *config.data.tokenizer_and_texts()
    for name, part in zip(("train", "test"), texts, strict=True):
        documents = encode_documents(tokenizer, part)
        eos: int = tokenizer.eos_token_id  # type: ignore[assignment]
        written = write_shards(documents, out, name, eos, len(tokenizer), config.shard_size)
        print(
            f"{len(part):,} documents, {sum(map(len, documents)) + len(part):,} tokens: {written[0]} and "
            f"{len(written) - 1} more"
        )
    tokenizer.save_pretrained(out / "tokenizer")


if __name__ == "__main__":
    run_command(main, Config)
