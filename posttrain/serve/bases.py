"""The models a server offers: a public name, which clients use and make their tokenizer from, and the
preset or folder that it stands for. Folders are never named by a client.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.models import PRESETS, context_length, model_config
from posttrain.backend.tokenizers import load_tokenizer

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class BaseModel:
    name: str
    local: str
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    architecture: str


def open_bases(names: Sequence[str], max_length: int | None) -> dict[str, BaseModel]:
    """From NAME or NAME=PRESET_OR_FOLDER. Reads configurations and tokenizers, no weights."""
    bases = {}
    for text in names:
        name, _, local = text.partition("=")
        if not NAME.fullmatch(name):
            raise ConfigError(f"--model {text}: {name!r} is not a public name; write --model NAME={name}")
        if name in bases:
            raise ConfigError(f"--model {text}: {name} is given twice")
        bases[name] = _open(name, local or name, max_length)
    if not bases:
        raise ConfigError("no model to serve: give --model NAME or --model NAME=FOLDER")
    return bases


def _open(name: str, local: str, max_length: int | None) -> BaseModel:
    if local not in PRESETS and (folder := Path(local).expanduser()).is_dir():
        local = str(folder.resolve())
    config, tokenizer = model_config(local), load_tokenizer(local, max_length)
    vocabulary = config.get_text_config().vocab_size
    beyond = [token for i, token in tokenizer.added_tokens_decoder.items() if i >= vocabulary and token.special]
    if len(tokenizer) - len(beyond) > vocabulary:  # of Gemma 3 1B, the place of a picture has no row
        raise ModelError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model {vocabulary}")
    return BaseModel(name, local, context_length(local, max_length), tokenizer, config.model_type)


def write_tokenizers(bases: dict[str, BaseModel], folder: Path) -> None:
    """FOLDER/NAME for each model: what a script that runs in FOLDER loads by the model's name."""
    for base in bases.values():
        base.tokenizer.save_pretrained(folder.expanduser() / base.name)
