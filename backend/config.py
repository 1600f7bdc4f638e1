"""How this machine trains and samples: everything about the backend that is not the model's name."""

from typing import Literal

import chz
import torch

from backend.ranges import COUNT, POSITIVE, POSITIVE_SHARE

AlarmAction = Literal["stop", "warn"]


@chz.chz
class BackendConfig:
    engine: Literal["auto", "vllm", "torch"] = chz.field(default="auto", doc="sampler; auto = vllm where it can be imported")
    max_length: int | None = chz.field(
        default=None, validator=COUNT, doc="context in tokens, prompt and answer; None = the model's own, at most 4096"
    )
    micro_batch_tokens: int = chz.field(
        default=16384, validator=COUNT, doc="padded tokens per forward pass; changes memory and speed, never a gradient"
    )
    gradient_checkpointing: bool = chz.field(
        default=False, doc="recompute activations in the backward pass: less memory, a third slower"
    )
    reproducible: bool | None = chz.field(
        default=None,
        doc="same seed, same tokens, bit for bit; None = on a CPU yes, on a GPU no, where vLLM draws seeded requests one by one",
    )
    max_num_seqs: int = chz.field(default=256, validator=COUNT, doc="sequences the sampler decodes at once")
    sampler_memory_gb: float = chz.field(default=1.0, validator=POSITIVE, doc="KV cache of a vLLM engine on a CPU, in GiB")
    gpu_memory_utilization: float = chz.field(
        default=0.4, validator=POSITIVE_SHARE, doc="share of the GPU that a vLLM engine may take; the trainer needs the rest"
    )
    enforce_eager: bool | None = chz.field(
        default=None,
        doc="no compilation in vLLM; None = eager on a CPU (compiling needs g++), compiled with CUDA graphs on a GPU",
    )
    alarm: AlarmAction = chz.field(
        default="stop",
        doc="what happens when sampler and trainer, or a batch and its sequences alone, differ by more than rounding explains",
    )


def training_device() -> torch.device:
    """The one place that decides: CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Activations and sampler weights. Trained weights are fp32 everywhere: bf16 would swallow RL's small updates."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
