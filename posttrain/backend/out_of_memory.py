"""Out of memory in a pass: one line with the data's sizes and the setting to lower."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import OutOfMemoryError
from posttrain.backend.types import Datum

# of a RuntimeError: a CPU's on Linux and macOS, a CPU's on Windows, that of Apple's GPU, of CUDA's driver and of
# Triton, and cuBLAS's
TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def explained(data_D: Sequence[Datum], config: BackendConfig) -> AbstractContextManager[None]:
    """OutOfMemoryError for torch's, of either device."""
    return _explained(partial(_in_pass, data_D, config))


def explained_in_step(config: BackendConfig) -> AbstractContextManager[None]:
    """The same for the optimizer's step, after which the weights are not to be used."""
    return _explained(partial(_in_step, config))


@contextmanager
def _explained(text: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # MemoryError: of numpy and of Python
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(text in str(error) for text in TEXTS):
            raise
        raise OutOfMemoryError(text()) from error


def _in_pass(data_D: Sequence[Datum], config: BackendConfig) -> str:
    lengths = [datum.model_input.length for datum in data_D]
    tokens, longest = config.micro_batch_tokens, max(lengths)
    if tokens > longest:
        remedy = f"lower backend.micro_batch_tokens to {max(longest, tokens // 2)}"
    elif not config.gradient_checkpointing:
        remedy = "set backend.gradient_checkpointing=true"
    else:
        remedy = "take shorter data (backend.max_length), or an adapter (lora_rank=32)"
    return (
        f"out of memory in a pass over {len(lengths)} data of {sum(lengths)} tokens, the longest {longest}, in "
        f"micro-batches of {tokens}: {remedy}. python -m posttrain.preflight shows where the memory goes. No step "
        "was taken, and the last checkpoint is unchanged"
    )


def _in_step(config: BackendConfig) -> str:
    settings = {
        "backend.moments=8bit": config.moments != "8bit",
        "backend.offload_optimizer=true": not config.offload_optimizer,
    }
    remedy = " or ".join(name for name, helps in settings.items() if helps) or "an adapter (lora_rank=32)"
    return f"out of memory in the optimizer's step: take {remedy}. The last checkpoint is unchanged"
