"""Options of the backend: how this machine trains and samples a model."""

import os
from typing import TYPE_CHECKING, Literal

import chz

from posttrain.backend.choices import check_choices
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
        default=16384,
        validator=COUNT,
        doc="padded tokens per forward pass; lower it if memory runs out: changes memory and speed, never a gradient",
    )
    attention: Literal["auto", "dense", "flex", "varlen"] = chz.field(
        default="auto",
        doc="how rows of several sequences are computed: dense = a mask of all pairs; flex = FlexAttention on packed "
        "rows; varlen = flash attention on packed whole sequences; auto = dense on a CPU, on a GPU flex where a prefix "
        "is shared, else varlen",
    )
    shared_row_tokens: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="most tokens of a row in which sequences share prefixes; None = 1024 with a dense mask, else 16384 or "
        "micro_batch_tokens",
    )
    gradient_checkpointing: bool = chz.field(
        default=False, doc="recompute activations in the backward pass: less memory, a third slower"
    )
    reproducible: bool | None = chz.field(
        default=None,
        doc="same seed, same tokens; None = true on a CPU (bit for bit), false on a GPU, where true sets "
        "VLLM_BATCH_INVARIANT=1, holds as far as that does, and samples slower",
    )
    max_num_seqs: int = chz.field(default=256, validator=COUNT, doc="sequences the sampler decodes at once")
    sampler_memory_gb: float | None = chz.field(
        default=None,
        validator=POSITIVE,
        doc="KV cache of each engine, in GiB; None = 1 on a CPU (2 if torch samples), and on a GPU what max_num_seqs "
        "full sequences need, at most gpu_memory_utilization",
    )
    gpu_memory_utilization: float = chz.field(
        default=0.4,
        validator=POSITIVE_SHARE,
        doc="share of the GPU's free memory that the KV cache of an engine may take; the trainer needs the rest",
    )
    sleep_while_training: bool = chz.field(
        default=False,
        doc="free the vLLM engine's GPU memory during training passes: its weights move to the CPU's memory, its KV "
        "cache is dropped",
    )
    snapshot_memory_gb: float | None = chz.field(
        default=None,
        validator=POSITIVE,
        doc="CPU memory in GiB for the weights of sampling clients that keep an older version; None = a quarter of "
        "the machine's memory",
    )
    share_engines: bool = chz.field(
        default=False,
        doc="one sampling engine for all policies of one architecture, which take turns in it: less memory, slower if "
        "several are sampled from at once",
    )
    lora: Literal["merged", "unmerged", "shared"] = chz.field(
        default="merged",
        doc="how LoRA adapters are computed, in sampler and trainer: merged = added to the base's weights and rounded "
        "with them to bfloat16; unmerged = beside the base: a sync moves the adapter alone, but vLLM samples slower; "
        "shared = unmerged, with one copy of the base in memory for both",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = chz.field(
        default="auto", doc="activations and sampler weights; auto = float32 on a CPU, bfloat16 on a GPU"
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = chz.field(
        default="auto",
        doc="the trainer's weights in a pass; auto = dtype. bfloat16 weights are copies of float32 weights that the "
        "optimizer steps (master_weights)",
    )
    master_weights: bool = chz.field(
        default=True,
        doc="keep a float32 copy of bfloat16 weights; false = none, and steps are rounded stochastically: 10 bytes "
        "less per trained weight",
    )
    moments: Literal["float32", "8bit"] = chz.field(
        default="float32", doc="precision of AdamW's moments: float32 takes 8 bytes per trained weight, 8bit 2"
    )
    compile: bool = chz.field(
        default=False,
        doc="compile decoder layers and the element-wise work of the logprobs, for a GPU: the first steps take a minute "
        "longer; rows are padded to multiples of 256 tokens",
    )
    offload_optimizer: bool = chz.field(
        default=False, doc="keep moments and float32 copies in the CPU's memory, and run AdamW there"
    )
    enforce_eager: bool | None = chz.field(
        default=None,
        doc="true = vLLM without compilation; None = true on a CPU (compiling needs g++), false on a GPU: CUDA graphs",
    )
    alarm: AlarmAction = chz.field(
        default="stop",
        doc="what to do when logprobs of sampler and trainer, or of a batch and its sequences alone, differ by more "
        "than rounding explains: stop the run, or warn",
    )
    trainer_processes: int = chz.field(
        default=1,
        validator=COUNT,
        doc="training processes (ranks), each with a GPU; 1 = this process, more are started by Ray",
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
        doc="put all replicas on the trainer's GPU: faster for small models, where Python limits one engine; each has "
        "its own weights and KV cache",
    )
    tensor_parallel: int = chz.field(
        default=1, validator=COUNT, doc="GPUs of each replica; must divide the attention heads and fit a node"
    )
    cluster: str | None = chz.field(
        default=None,
        doc="HOST:PORT of a running Ray cluster, or auto to find one; None = start Ray here if it is needed",
    )
    sync_dir: str | None = chz.field(
        default=None,
        doc="folder that all nodes see, through which new weights reach the replicas; None = this node's shared memory",
    )
    sampler_restarts: int = chz.field(
        default=3, validator=WHOLE, doc="how many dead replicas are replaced before the run ends with EngineError"
    )
    trainer_restarts: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="how often a run whose training processes died is continued from its last checkpoint before it ends with "
        "TrainerLostError",
    )
    call_seconds: float = chz.field(
        default=600.0,
        validator=POSITIVE,
        doc="seconds after which a replica that has requests but decodes nothing is killed, and a rank that does not "
        "answer, or stands at a line of its loss, with all others; and that a process may take to start",
    )

    @chz.validate
    def _check_choices(self) -> None:
        check_choices(self)


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
