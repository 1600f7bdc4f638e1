"""The local engine: torch trains, vLLM samples. Knows tokens and tensors; nothing of chat, environments or rewards."""

from transformers.utils import logging as _transformers_logging

_transformers_logging.disable_progress_bar()  # "Writing model shards" at every checkpoint
