"""The memory a run will need, by part, against what is there, and the settings that make it fit.

python -m posttrain.preflight model_name=qwen2.5-0.5b-shape lora_rank=32 backend.micro_batch_tokens=4096
"""

import time

import chz
import torch

from posttrain.backend.checkpoint_files import SCALAR_HEAD_FILE
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.lora_layers import check_rank
from posttrain.backend.memory import GIB
from posttrain.backend.memory_plan import PlannedRun, advice, free_bytes, planned
from posttrain.backend.models import PRESETS, check_text_only, model_folder
from posttrain.backend.ranges import POSITIVE, WHOLE
from posttrain.backend.types import LoraConfig
from posttrain.backend.vllm_settings import check_sleep, check_unmerged
from posttrain.tracking.command_line import run_command

# Of the speed of a large matrix product, what a step reaches: benchmarks/README.md.
STEP_SHARE = {"cpu": 0.6, "cuda": 0.25, "mps": 0.25}  # mps: a guess
SMALL_CACHE_GB = 1  # of a KV cache that is suggested where another does not fit


@chz.chz
class Config:
    """The memory that training needs, before a model is loaded."""

    model_name: str = chz.field(doc="a preset, a local folder, or a Hugging Face hub name; only its config is read")
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of an adapter; 0 = all weights are trained")
    sampled: bool = chz.field(
        default=True, doc="plan for a sampler beside the trainer, as in RL; false = supervised training"
    )
    reference: bool = chz.field(default=False, doc="plan for a frozen reference, too, as kl.coef opens")
    free_gb: float | None = chz.field(
        default=None, validator=POSITIVE, doc="GiB to plan for; None = what this machine has free now"
    )
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how the run would train and sample")


def main(config: Config) -> PlannedRun:
    run = planned_run(config)
    free = free_bytes(run.device) if config.free_gb is None else int(config.free_gb * GIB)
    print(run.plan.table())
    print(f"{'free' if config.free_gb is None else 'given'} on {run.device.type:<40}{free / GIB:>8.2f}")
    left = (free - run.plan.peak) / GIB
    print(f"It fits, with {left:.1f} GiB to spare." if left >= 0 else f"{-left:.1f} GiB too few. {advice(run, free)}.")
    for note in notes(config, run, free):
        print(note)
    print(f"Training: about {tokens_per_second(run):,.0f} tokens/s, from the speed of a matrix product here and now.")
    return run


def planned_run(config: Config) -> PlannedRun:
    """Refuses what a run would refuse, as far as the config tells."""
    name, backend = config.model_name, config.backend
    if not name.strip():
        raise ConfigError(f"model_name is empty: give a preset ({', '.join(PRESETS)}), a local folder or a hub name")
    lora = LoraConfig(config.lora_rank) if config.lora_rank else None
    if lora:
        check_rank(name, lora)
        check_unmerged(backend, lora)
    if backend.sleep_while_training:
        check_sleep(backend)
    if (model_folder(name) / SCALAR_HEAD_FILE).exists():
        raise ModelError(f"{name} is a scalar model: plan its base model, which needs a little more (an output layer)")
    run = planned(name, backend, lora, config.sampled, config.reference)
    check_text_only(name, run.hf_config)
    shares = backend.trainer_processes > 1 and backend.trainer_sharding == "shard"
    return run.sharded(backend.trainer_processes) if shares else run


def notes(config: Config, run: PlannedRun, free: int) -> list[str]:
    """What the table does not show."""
    found = []
    fits = {} if run.plan.peak <= free else run.that_fits(free)
    tokens, longest = (fits or {}).get("micro_batch_tokens", run.backend.micro_batch_tokens), run.max_length
    if tokens < longest:
        peak = run.changed(micro_batch_tokens=longest).plan.peak / GIB
        found.append(
            f"A sequence is not divided: one of all {longest} tokens of the context is a micro-batch of its own, with "
            f"a peak of {peak:.1f} GiB. Lower backend.max_length if yours are shorter."
        )
    smaller = run.changed(sampler_memory_gb=SMALL_CACHE_GB)
    if fits is None and (run.backend.sampler_memory_gb or 0) > SMALL_CACHE_GB:
        found.append(
            f"With backend.sampler_memory_gb={SMALL_CACHE_GB}: {smaller.plan.peak / GIB:.1f} GiB. {advice(smaller, free)}."
        )
    if config.reference and config.lora_rank:
        found.append(
            "A LoRA run without load_checkpoint_path opens no reference: its base is one, with the adapter switched "
            "off. Then leave out reference=true."
        )
    if run.shards > 1:
        found.append(f"This is each of {run.shards} training processes, beside one sampler.")
    return found


def tokens_per_second(run: PlannedRun) -> float:
    """6 operations per weight and token (4 with an adapter), at the share of a matrix product's
    speed that steps reach."""
    width = 8192 if run.device.type == "cuda" else 1024
    a = torch.randn(width, width, device=run.device, dtype=run.compute)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    operations = 2 * width**3 / min(seconds)
    return operations * STEP_SHARE[run.device.type] / ((4 if run.lora else 6) * run.size.parameters)


if __name__ == "__main__":
    run_command(main, Config)
