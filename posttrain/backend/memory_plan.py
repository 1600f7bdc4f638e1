"""The memory a run will need, before anything is opened: weights and optimizer from the config,
activations from passes of fake tensors (shapes without numbers), engines in bytes. Left out:
processes that share a device, rows longer than a micro-batch.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import chz
import torch
from transformers import PretrainedConfig

from posttrain.backend.architectures import attention_windows, heads_that_keep_scores
from posttrain.backend.attention import packs
from posttrain.backend.batching import SHARED_ROW_TOKENS
from posttrain.backend.config import BackendConfig, compute_dtype, param_dtype, training_device
from posttrain.backend.errors import ModelError
from posttrain.backend.fake_models import ModelSize, model_size, saved_bytes
from posttrain.backend.lean_adamw import PIECE, PIECE_BYTES, STEP_BYTES
from posttrain.backend.logprobs import CHUNK_ELEMENTS
from posttrain.backend.memory import GIB, free_on_cpu, free_on_gpu, kv_cache_bytes, sequence_bytes
from posttrain.backend.models import context_length, model_config
from posttrain.backend.types import LoraConfig
from posttrain.backend.vllm_lora import tokens_of_a_step
from posttrain.backend.vllm_settings import lora_room, samples_with_vllm

# What a process holds beside models. On a CPU: Python and its imports, and vLLM's. On a GPU: CUDA's
# contexts and the allocator's fragments, and vLLM's graphs.
PROCESS_BYTES = {"cpu": int(0.45 * GIB), "cuda": 2 * GIB, "mps": GIB}  # mps: a guess
VLLM_BYTES = {"cpu": int(0.45 * GIB), "cuda": 2 * GIB}  # not on Apple's GPU
# vLLM packs matrices for a CPU's kernels. Measured for the 0.5B shape with 2, 8 and 24 layers: copies
# of the layers; of the vocabulary's matrices two, and 2.8 more while the engine starts, on top of
# what a pass has freed but glibc keeps.
PACKED_LAYERS, PACKED_HEADS = 0.65, 4.8
PROMPT_BYTES = GIB  # of prompts that the torch sampler reads in one pass
SAMPLER_BYTES = 28  # per sequence and token of the vocabulary: logits, logprobs, their running sums
# Per head and pair of tokens, where a kernel keeps its scores: capped and as probabilities, in fp32 or thrice in less.
KEPT_SCORE_BYTES = 8
FEWEST_TOKENS = 512  # of a micro-batch that is still suggested
# A run is not planned in detail where it surely fits.
SURELY = 0.25


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part: there always, only in a training pass, in the optimizer's step, while sampling."""

    always: Mapping[str, int]
    training: Mapping[str, int]
    stepping: Mapping[str, int]
    sampling: Mapping[str, int]

    @property
    def peak(self) -> int:
        now_and_then = (self.training, self.stepping, self.sampling)
        return sum(self.always.values()) + max(sum(parts.values()) for parts in now_and_then)

    def table(self) -> str:
        lines = [f"{'part':<48}{'GiB':>8}"]
        times = {
            "": self.always,
            ", in a pass": self.training,
            ", in a step": self.stepping,
            ", sampling": self.sampling,
        }
        for when, parts in times.items():
            lines += [f"{name + when:<48}{size / GIB:>8.2f}" for name, size in parts.items()]
        return "\n".join([*lines, f"{'peak':<48}{self.peak / GIB:>8.2f}"])


@dataclass(frozen=True)
class PlannedRun:
    """What a plan depends on. `samples`: an engine is opened, too. `reference`: so is a frozen copy."""

    hf_config: PretrainedConfig
    backend: BackendConfig
    lora: LoraConfig | None
    device: torch.device
    max_length: int
    samples: bool = False
    reference: bool = False
    shards: int = 1  # processes that divide the weights and the optimizer's state among them

    @cached_property
    def size(self) -> ModelSize:
        return model_size(self.hf_config, self.lora)

    @property
    def base(self) -> int:
        """Weights without the adapter's: a sampler has these merged into the others, or beside them."""
        return self.size.parameters - (self.size.trainable if self.lora else 0)

    @property
    def weights(self) -> torch.dtype:
        return param_dtype(self.device, self.backend)

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.device, self.backend)

    @cached_property
    def plan(self) -> MemoryPlan:
        return MemoryPlan(self._always(), self._training(), self._stepping(), self._sampling())

    def _always(self) -> dict[str, int]:
        device, size, weights = self.device.type, self.size, self.weights
        parts = {"process": PROCESS_BYTES[device] + self._engine_processes()}
        lean = self.backend.moments == "8bit"
        trained, copied = (weights, self.masters) if not self.lora else (torch.float32, False)
        parts[f"weights, {_name(weights)}"] = weights.itemsize * self.base
        if self.lora:
            parts["adapter, fp32"] = 4 * size.trainable
        parts["gradients"] = (4 if copied else trained.itemsize) * size.trainable
        # the CPU's memory is also Apple's GPU's
        if device != "cuda" or not self.backend.offload_optimizer:
            parts["fp32 copies of the weights"] = 4 * size.trainable if copied else 0
            parts["moments, 8 bits" if lean else "moments, fp32"] = (2 if lean else 8) * size.trainable
        if self.reference:
            parts[f"reference, {_name(weights)}"] = weights.itemsize * size.parameters
        parts = {name: count if name == "process" else count // self.shards for name, count in parts.items() if count}
        return parts | ({} if self.backend.sleep_while_training else self._engine())

    @property
    def engines(self) -> int:
        """Samplers on this device: one, the replicas, or none where these have GPUs of their own."""
        replicas = self.backend.sampler_replicas
        elsewhere = replicas and self.device.type == "cuda" and not self.backend.replicas_share_gpu
        return max(replicas, 1) if self.samples and not elsewhere else 0

    def _engine_processes(self) -> int:
        vllm = VLLM_BYTES[self.device.type] if samples_with_vllm(self.backend) else 0
        return self.engines * (vllm + (PROCESS_BYTES[self.device.type] if self.backend.sampler_replicas else 0))

    def _engine(self) -> dict[str, int]:
        """What the samplers hold while they are awake."""
        return {name: self.engines * size for name, size in self._one_engine().items()} if self.engines else {}

    def _one_engine(self) -> dict[str, int]:
        device, size, compute = self.device.type, self.size, self.compute
        parts = {} if self._borrows else {f"sampler weights, {_name(compute)}": compute.itemsize * self.base}
        if not samples_with_vllm(self.backend):
            return parts
        if self.lora and self.lora_room:
            # in a place for adapters of vLLM's next larger rank, and as it was read
            copies = self.lora_room / self.lora.rank + (device == "cpu")
            parts[f"sampler's adapter, {_name(compute)}"] = int(compute.itemsize * size.trainable * copies)
        if device == "cpu":
            head = size.vocabulary * size.hidden
            packed = PACKED_LAYERS * (self.base - head) + PACKED_HEADS * head
            parts["vLLM's packed copies"] = int(compute.itemsize * packed)
        return parts | {"KV cache": kv_cache_bytes(self.hf_config, self.max_length, self.backend, self.device)}

    @property
    def _borrows(self) -> bool:
        """Whether passes and sampler read one copy of the weights."""
        return self.lora is not None and self.backend.lora == "shared"

    @property
    def lora_room(self) -> int:
        """The rank that vLLM has room for, if it has the adapter beside the base's weights."""
        return lora_room(self.backend, self.lora.rank if self.lora else 0)

    @property
    def masters(self) -> bool:
        """Whether fp32 copies of the weights are kept."""
        return self.backend.offload_optimizer or (self.weights == torch.bfloat16 and self.backend.master_weights)

    def _training(self) -> dict[str, int]:
        tokens = self.backend.micro_batch_tokens
        parts = {f"activations of {tokens} tokens": self._activations(tokens), "head": self._head(tokens)}
        scores = self._scores(tokens)
        parts |= {f"scores of all pairs of {min(tokens, self.max_length)} tokens": scores} if scores else {}
        return parts | ({"masks of shared prefixes": masks} if (masks := self._masks(tokens)) else {})

    def _stepping(self) -> dict[str, int]:
        """Of the largest weight; torch's fused AdamW works where the numbers lie."""
        backend, largest = self.backend, self.size.largest
        rounds = self.lora is None and self.weights == torch.bfloat16 and not self.masters
        if not (rounds or backend.moments == "8bit") or (backend.offload_optimizer and self.device.type == "cuda"):
            return {}
        return {"the largest weight, fp32": STEP_BYTES * largest + PIECE_BYTES * min(PIECE, largest)}

    def _masks(self, tokens: int) -> int:
        """Of a micro-batch of the longest shared rows, for each kind of layer, and as booleans on the
        way; packed rows have none."""
        windows = attention_windows(self.hf_config, self.max_length)
        if windows is None or packs(self.backend.attention, self.device):
            return 0
        longest = min(self.backend.shared_row_tokens or SHARED_ROW_TOKENS, tokens)
        return tokens * longest * (1 + self.compute.itemsize * len(set(windows.values())))

    def _scores(self, tokens: int) -> int:
        """Of kernels that keep them, in a micro-batch of the longest rows; packed rows keep none."""
        if (
            packs(self.backend.attention, self.device)
            and attention_windows(self.hf_config, self.max_length) is not None
        ):
            return 0
        pairs = tokens * min(tokens, self.max_length)
        kept = KEPT_SCORE_BYTES * heads_that_keep_scores(self.hf_config) * pairs
        return kept // self.size.layers if self.backend.gradient_checkpointing else kept

    def _activations(self, tokens: int) -> int:
        """Kept from the forward for the backward pass, and the gradients of a layer's MLP."""
        compute, size = self.compute, self.size
        merged = self.backend.lora == "merged"
        fixed, per_token = saved_bytes(self.hf_config, self.lora, compute, self.weights, merged)
        if self.backend.gradient_checkpointing:
            inputs = size.layers * size.hidden * compute.itemsize
            fixed, per_token = fixed / size.layers, per_token / size.layers + inputs
        return int(fixed + tokens * (per_token + 4 * size.intermediate * compute.itemsize))

    def _head(self, tokens: int) -> int:
        """Logits of a chunk, tempered, and their gradients; the output matrix in the computing
        dtype, its gradient and the product that is added to it."""
        item, size = self.compute.itemsize, self.size
        elements = min(CHUNK_ELEMENTS[self.device.type], tokens * size.vocabulary)
        is_trained = self.lora is None or self.lora.train_unembed
        per_weight = (item if self.compute != self.weights else 0) + (4 + item if is_trained else 0)
        return 3 * 4 * elements + per_weight * size.vocabulary * size.hidden

    def _sampling(self) -> dict[str, int]:
        if not self.engines:
            return {}
        rows = self.backend.max_num_seqs * self.engines
        parts = {f"logits of {rows} sequences": rows * self.size.vocabulary * SAMPLER_BYTES}
        if not samples_with_vllm(self.backend):
            if self._borrows:
                name = f"sampler weights, {_name(self.compute)}, as it opens"
                parts[name] = self.compute.itemsize * self.base
            parts |= {name: self.engines * size for name, size in self._batch().items()}
        if self.lora_room and self.device.type == "cpu":
            tokens = tokens_of_a_step(self.max_length, self.backend)
            parts[f"adapters of {tokens} tokens"] = 4 * tokens * self.lora_room * self.size.intermediate
        return parts | (self._engine() if self.backend.sleep_while_training else {})

    def _batch(self) -> dict[str, int]:
        """Of one torch sampler, whose limits one sequence of the whole context may exceed."""
        rows, length, item = self.backend.max_num_seqs, self.max_length, self.compute.itemsize
        one = sequence_bytes(self.hf_config, length, item)
        most = kv_cache_bytes(self.hf_config, length, self.backend, self.device, vllm=False)
        read, alone = (prompt_bytes(self.size, n, length, item) for n in (rows, 1))
        return {"KV cache": max(one, min(rows * one, most)), "prompts": max(alone, min(read, PROMPT_BYTES))}

    def changed(self, **settings: Any) -> "PlannedRun":
        """With other settings of the backend."""
        return replace(self, backend=chz.replace(self.backend, **settings))

    def sharded(self, processes: int) -> "PlannedRun":
        return replace(self, shards=processes)

    def smallest(self) -> "PlannedRun":
        return self.changed(
            micro_batch_tokens=min(FEWEST_TOKENS, self.backend.micro_batch_tokens), gradient_checkpointing=True
        )

    def surely_fits(self, free: int) -> bool:
        """Without a fake pass, which takes a second for a large model."""
        size = self.size
        widths = size.layers * (40 * size.hidden + 10 * size.intermediate)
        tokens = self.backend.micro_batch_tokens
        rest = 4 * widths * tokens + self._scores(tokens) + self._head(tokens)
        for parts in (self._always(), self._stepping(), self._sampling()):
            rest += sum(parts.values())
        return rest < free * SURELY

    def that_fits(self, free: int) -> dict[str, Any] | None:
        """The fewest settings, at their mildest values, with which the peak is at most `free`
        bytes; None if all together are not enough."""
        remedies = self._remedies()
        for count in range(1, len(remedies) + 1):
            for options in itertools.combinations(remedies, count):
                for values in itertools.product(*(remedies[option] for option in options)):
                    settings = dict(zip(options, values, strict=True))
                    if self.changed(**settings).plan.peak <= free:
                        return settings
        return None

    def _remedies(self) -> dict[str, list[Any]]:
        """Settings that need less memory, the mildest value first; last the one that changes what is trained."""
        backend, tokens = self.backend, self.backend.micro_batch_tokens
        return {
            "micro_batch_tokens": [tokens >> k for k in range(1, 16) if tokens >> k >= FEWEST_TOKENS],
            "gradient_checkpointing": [] if backend.gradient_checkpointing else [True],
            "max_num_seqs": [n for n in (128, 64, 32, 16) if self.samples and n < backend.max_num_seqs],
            "moments": [] if backend.moments == "8bit" or self.lora else ["8bit"],
        }


def planned(
    model_name: str, backend: BackendConfig, lora: LoraConfig | None, samples: bool = False, reference: bool = False
) -> PlannedRun:
    """On this machine's training device."""
    length = context_length(model_name, backend.max_length)
    return PlannedRun(model_config(model_name), backend, lora, training_device(backend), length, samples, reference)


def check_fits(run: PlannedRun, model_name: str, free: int | None = None) -> None:
    """ModelError, before anything is loaded, if `free` bytes cannot hold the run with the smallest
    micro-batches. A line is printed, once for a model, if they cannot hold it with full ones."""
    free = free_bytes(run.device) if free is None else free
    if run.surely_fits(free) or run.plan.peak <= free:
        return
    purpose = "trained and sampled" if run.samples else "trained"
    too_few = (
        f"{model_name!r} needs {run.plan.peak / GIB:.1f} GiB to be {purpose} in full micro-batches of "
        f"{run.backend.micro_batch_tokens} tokens (less where a step has fewer), and {free / GIB:.1f} GiB of memory are free: "
        f"{(run.plan.peak - free) / GIB:.1f} too few. {advice(run, free)}"
    )
    if run.smallest().plan.peak > free:
        raise ModelError(too_few)
    if model_name not in _warned:
        _warned.add(model_name)
        print(f"memory: {too_few}", flush=True)


_warned: set[str] = set()


def advice(run: PlannedRun, free: int) -> str:
    """The settings that make it fit, in one sentence."""
    if settings := run.that_fits(free):
        return f"It fits with {_options(settings)} ({run.changed(**settings).plan.peak / GIB:.1f} GiB)"
    adapter = replace(run, lora=LoraConfig(), reference=False)
    if not run.lora and (settings := adapter.that_fits(free)) is not None:
        return f"An adapter fits: lora_rank=32 {_options(settings)}"
    smaller = "Take a smaller model" + ("" if run.lora else ", or an adapter (lora_rank=32)")
    if not (least := {option: values[-1] for option, values in run._remedies().items() if values}):
        return smaller
    return (
        f"{smaller}, or free memory: {run.changed(**least).plan.peak / GIB:.1f} GiB are enough with {_options(least)}"
    )


def _options(settings: Mapping[str, Any]) -> str:
    return " ".join(f"backend.{name}={str(value).lower()}" for name, value in settings.items())


def free_bytes(device: torch.device) -> int:
    """What this process may still take: of the GPU, or of the machine, within its control group."""
    if device.type == "cuda":
        return free_on_gpu(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return free_on_cpu()


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def prompt_bytes(size: ModelSize, rows: int, width: int, itemsize: int) -> int:
    """Of a pass of the torch sampler over padded prompts: activations of a layer, and the mask, as
    booleans and as numbers, which one prompt does not need."""
    mask = (1 + itemsize) * width if rows > 1 else 0
    return rows * width * (itemsize * (4 * size.intermediate + 8 * size.hidden) + mask)
