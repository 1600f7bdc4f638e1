"""Options of the backend: how this machine trains and samples a model."""

import os
from typing import TYPE_CHECKING, Literal

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, POSITIVE, POSITIVE_SHARE, WHOLE

if TYPE_CHECKING:  # commands answer before torch is imported
    import torch

AlarmAction = Literal["stop", "warn"]


@chz.chz
class BackendConfig:
    device: Literal["auto", "cpu", "cuda", "mps"] = chz.field(
        default="auto",
        doc="where models are trained and sampled; auto = cuda where there is one, else cpu. mps is Apple's GPU",
    )
    engine: Literal["auto", "vllm", "torch"] = chz.field(
        default="auto", doc="sampler; auto = vllm where it is installed and serves the model, else torch"
    )
    max_length: int | None = chz.field(
        default=None, validator=COUNT, doc="context in tokens, prompt and answer; None = the model's own, at most 4096"
    )
    micro_batch_tokens: int = chz.field(
        default=16384, validator=COUNT, doc="padded tokens per forward pass; changes memory and speed, never a gradient"
    )
    attention: Literal["auto", "dense", "flex", "varlen"] = chz.field(
        default="auto",
        doc="of rows that hold several sequences: dense = a mask of all pairs; flex = packed rows by FlexAttention; "
        "varlen = packed rows of whole sequences by flash attention; auto = dense on a CPU, and on a GPU flex where a "
        "prefix is shared, else varlen",
    )
    shared_row_tokens: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="longest row of sequences that share prefixes; None = 1024 with a dense mask, else 16384 or "
        "micro_batch_tokens",
    )
    gradient_checkpointing: bool = chz.field(
        default=False, doc="recompute activations in the backward pass: less memory, a third slower"
    )
    reproducible: bool | None = chz.field(
        default=None,
        doc="same seed, same tokens; None = on a CPU yes (bit for bit), on a GPU no: there vLLM draws seeded requests "
        "one by one, and "
        "kernels round alike only as far as VLLM_BATCH_INVARIANT=1, which is then set, reaches",
    )
    max_num_seqs: int = chz.field(default=256, validator=COUNT, doc="sequences the sampler decodes at once")
    sampler_memory_gb: float | None = chz.field(
        default=None,
        validator=POSITIVE,
        doc="KV cache of each vLLM engine, in GiB; None = 1 on a CPU, and on a GPU what max_num_seqs full sequences "
        "need, within the share",
    )
    gpu_memory_utilization: float = chz.field(
        default=0.4,
        validator=POSITIVE_SHARE,
        doc="share of the GPU's free memory that the KV cache of a vLLM engine may take; the trainer needs the rest",
    )
    sleep_while_training: bool = chz.field(
        default=False,
        doc="give the GPU memory of the vLLM engine to the passes: meanwhile its weights are in the CPU's memory, and "
        "its KV cache is dropped",
    )
    snapshot_memory_gb: float | None = chz.field(
        default=None,
        validator=POSITIVE,
        doc="CPU memory for the weights of sampling clients that the live policy has left, in GiB; "
        "None = a quarter of the machine's",
    )
    share_engines: bool = chz.field(
        default=False,
        doc="one sampling engine for all weights of one model, which take turns in it: less memory, and slower where "
        "several are sampled from at once",
    )
    lora: Literal["merged", "unmerged", "shared"] = chz.field(
        default="merged",
        doc="how LoRA adapters are computed, in sampler and passes: merged = added to the base's weights, and rounded "
        "with them to bfloat16; unmerged = beside the base, which stays as it is: a sync moves the adapter alone, and "
        "vLLM samples slower; shared = unmerged, and passes read the sampler's base: it is in memory once",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = chz.field(
        default="auto",
        doc="activations and sampler weights; auto = float32 on a CPU, bfloat16 on a GPU",
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = chz.field(
        default="auto",
        doc="weights that passes read; auto = dtype. bfloat16 weights are copies of float32 ones, which the optimizer "
        "steps (master_weights)",
    )
    master_weights: bool = chz.field(
        default=True,
        doc="keep a float32 copy of bfloat16 weights; false = none, and steps are rounded stochastically: 10 bytes "
        "less per trained weight",
    )
    moments: Literal["float32", "8bit"] = chz.field(
        default="float32", doc="AdamW's moments: 8 bytes per trained weight, or 2 with 8bit"
    )
    compile: bool = chz.field(
        default=False,
        doc="compile decoder layers and the element-wise work of the logprobs; rows are padded to multiples of 256",
    )
    offload_optimizer: bool = chz.field(
        default=False, doc="keep moments and float32 copies in the CPU's memory, and step there"
    )
    enforce_eager: bool | None = chz.field(
        default=None,
        doc="no compilation in vLLM; None = eager on a CPU (compiling needs g++), compiled with CUDA graphs on a GPU",
    )
    alarm: AlarmAction = chz.field(
        default="stop",
        doc="action when sampler and trainer, or a batch and its sequences alone, differ by more than rounding "
        "explains",
    )
    trainer_processes: int = chz.field(
        default=1, validator=COUNT, doc="processes that train, a GPU each; 1 = this process, more are started by Ray"
    )
    trainer_sharding: Literal["shard", "replicate"] = chz.field(
        default="shard",
        doc="what each of several training processes holds: a shard of weights and optimizer (FSDP2), or all of them, "
        "which is faster where it fits a GPU",
    )
    sampler_replicas: int = chz.field(
        default=0, validator=WHOLE, doc="sampling engines in processes and on GPUs of their own; 0 = in this process"
    )
    replicas_share_gpu: bool = chz.field(
        default=False,
        doc="the replicas are on the trainer's GPU: where Python bounds the decoding of one engine, several beside each "
        "other decode more; each has weights and a KV cache of its own",
    )
    tensor_parallel: int = chz.field(
        default=1, validator=COUNT, doc="GPUs of each replica; must divide the attention heads and fit a node"
    )
    cluster: str | None = chz.field(
        default=None, doc="address of a running Ray cluster, or auto; None = Ray is started here if it is needed"
    )
    weight_sync: Literal["auto", "files", "nccl", "ipc"] = chz.field(
        default="auto", doc="how new weights reach the replicas; auto = files, in shared memory or sync_dir"
    )
    sync_dir: str | None = chz.field(
        default=None, doc="folder for weight_sync=files that all nodes see; None = this node's shared memory"
    )
    sampler_restarts: int = chz.field(
        default=3, validator=WHOLE, doc="replicas that are replaced when they die, before the run ends with EngineError"
    )
    trainer_restarts: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="times that a run whose training processes died is opened again from its last checkpoint, before it ends "
        "with TrainerLostError",
    )
    call_seconds: float = chz.field(
        default=600.0,
        validator=POSITIVE,
        doc="a replica with requests that decodes no step for so long is killed; also the limit for starting a process",
    )


def training_device(config: BackendConfig | None = None) -> "torch.device":
    """backend.device; by default CUDA if there is a GPU, else the CPU. ConfigError where torch has none
    of its kind. A process of several takes its own GPU (torchrun's LOCAL_RANK) by number, because a
    current device holds for one thread only."""
    import torch

    kind = config.device if config else "auto"
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    is_there = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not is_there[kind]():
        raise ConfigError(f"backend.device={kind}, but this machine's torch ({torch.__version__}) has no such device")
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


# bfloat16 on Apple's GPU must be asked for: its autocast is young.
AUTO_DTYPES = {"cpu": "float32", "cuda": "bfloat16", "mps": "float32"}


def in_float64(tensor: "torch.Tensor") -> "torch.Tensor":
    """Apple's GPU has no float64: there, on the CPU."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def compute_dtype(device: "torch.device", config: BackendConfig | None = None) -> "torch.dtype":
    """For activations and sampler weights. ConfigError if the GPU has no bfloat16."""
    import torch

    name = config.dtype if config else "auto"
    name = AUTO_DTYPES[device.type] if name == "auto" else name
    if device.type == "cuda" and name == "bfloat16" and not _has_bfloat16():
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} does not compute in bfloat16 (GPUs before Ampere): set "
            "backend.dtype=float32"
        )
    return getattr(torch, name)


def _has_bfloat16() -> bool:
    """True where there is no GPU: what a GPU would do is planned and tested there, too."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def param_dtype(device: "torch.device", config: BackendConfig) -> "torch.dtype":
    """Of the weights that passes read. ConfigError for settings that contradict each other."""
    import torch

    compute = compute_dtype(device, config)
    dtype = compute if config.param_dtype == "auto" else getattr(torch, config.param_dtype)
    if dtype == torch.bfloat16 and compute != dtype:
        raise ConfigError("backend.param_dtype=bfloat16 needs backend.dtype=bfloat16: passes compute in bfloat16 then")
    if not config.master_weights and (dtype != torch.bfloat16 or config.offload_optimizer):
        which = "an offloaded optimizer has float32 copies" if config.offload_optimizer else f"the weights are {dtype}"
        raise ConfigError(
            f"backend.master_weights=false steps bfloat16 weights without a float32 copy, and {which}".replace(
                "torch.", ""
            )
        )
    return dtype
