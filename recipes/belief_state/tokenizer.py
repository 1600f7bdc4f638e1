"""A byte-level BPE for small text: 1,000 tokens (0 <|pad|>, 1 <|eos|>, the 256 bytes, merges),
every digit a token. The same text gives the same tokenizer.

Differs from the original's: it was trained on ASCII, so it has fewer bytes and more merges (822).
Special tokens inside a document are encoded as text.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from posttrain.backend.errors import DataError, ModelError

PAD, EOS = "<|pad|>", "<|eos|>"
TEXTS_AT_ONCE = 10_000


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """DataError if the texts give fewer than `vocab_size` tokens."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < smallest:
        raise DataError(f"vocab_size={vocab_size}: the bytes and the special tokens alone are {smallest}")
    tokenizer = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        raise DataError(
            f"the text gives a vocabulary of {size} tokens, not {vocab_size}: give more text or a smaller vocab_size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Of a folder written by `save_pretrained`, a tokenizer.json or a hub name. ModelError if there
    is no tokenizer, or it has no EOS.
    """
    path = Path(name).expanduser()
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
            known = tokenizer.get_vocab()
            tokenizer.pad_token, tokenizer.eos_token = (token if token in known else None for token in (PAD, EOS))
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else name)
    except Exception as error:  # tokenizers raises bare Exceptions for a malformed file
        raise ModelError(f"no tokenizer could be loaded from {name!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer {name!r} has no EOS token, which separates documents")
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of each text, without special tokens."""
    ids_D: list[np.ndarray] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = list(texts[start : start + TEXTS_AT_ONCE])
        encoded = tokenizer(part, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids_D += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    return ids_D
