"""What vLLM does to the process that it runs in, such as global variables that its engines share, and
how this project's engines live with it: what is set before vLLM is imported, and undone after.
"""

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.vllm_refusals import USE_TORCH
from posttrain.backend.vllm_settings import without_chunks

_allocators: list[Any] = []  # of vLLM's memory that sleeps
# As vLLM sets it from Hopper on: cuBLAS then does not divide the sums of a product.
NO_SPLIT_SUMS = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}


def set_environment(device: torch.device, reproducible: bool) -> None:
    """Environment variables that vLLM reads on import. The user's settings have priority."""
    warnings.filterwarnings("ignore", module=r"vllm\.")
    # warns that Triton has no CPU backend, which is not used
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    # its tracebacks become a refusal in one line
    logging.getLogger("vllm.model_executor.models.registry").setLevel(logging.CRITICAL)
    # the engine must be in this process to take weights in memory
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device.type == "cpu":  # processes of tensor parallelism would each look for a memory node of their own
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # never used where logprobs are returned, and its import may fail
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if device.type == "cuda" and reproducible:
        set_batch_invariance(device)


def set_batch_invariance(device: torch.device) -> None:
    """Kernels whose rounding does not depend on what is decoded beside a sequence. vLLM reads the
    variable when it is imported, cuBLAS its own at the first product of the process, which is the
    trainer's. ConfigError where the mode cannot be had."""
    asked, variable = os.environ.get("VLLM_BATCH_INVARIANT"), "backend.reproducible=true needs VLLM_BATCH_INVARIANT=1"
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"backend.reproducible=true needs batch-invariant kernels, and vLLM has them for GPUs of compute "
            f"capability 8.0 or more, not for {torch.cuda.get_device_name(device)}: set backend.reproducible=false"
        )
    if asked not in (None, "1"):
        raise ConfigError(f"{variable}, and the environment sets it to {asked!r}: unset it, or set reproducible=false")
    if asked is None and "vllm.v1.engine.llm_engine" in sys.modules:
        raise ConfigError(
            f"{variable} from the first engine on, and this process has loaded vLLM without it: set the variable "
            "before the start"
        )
    os.environ |= {"VLLM_BATCH_INVARIANT": "1"} | NO_SPLIT_SUMS


@contextmanager
def model_folder(hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, keep: bool) -> Iterator[str]:
    """Config and tokenizer as vLLM reads them. `keep`: in a folder named after their content, since
    vLLM finds its compiled code again by the folder's name."""
    with tempfile.TemporaryDirectory(prefix="posttrain-engine-") as name:
        folder = Path(name) / "model"
        without_chunks(hf_config).save_pretrained(folder)
        # Beside the model's config, transformers takes that type's class for it. Without any, vLLM prints errors
        # and waits two seconds. To this type belongs no tokenizer's class.
        tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "tokenizer" / "config.json").write_text('{"model_type": "vit"}')
        if keep:
            digest = hashlib.sha256()
            for file in sorted(folder.rglob("*.*")):
                digest.update(file.name.encode() + file.read_bytes())
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain" / "engines"
            cache.mkdir(parents=True, exist_ok=True)
            kept = cache / digest.hexdigest()[:24]
            if not kept.exists():
                # another process may be first
                with suppress(OSError), tempfile.TemporaryDirectory(dir=cache) as staging:
                    os.rename(shutil.copytree(folder, Path(staging) / "model"), kept)
            folder = kept
        yield str(folder)


def let_modules_be_searched() -> None:
    """On a CPU vLLM reads `vars()` of every object of every imported module. llvmlite's library (a
    part of numba, which environments import) answers any attribute, `__dict__` too, with a C
    function, and no engine starts."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if not ffi or not hasattr(ffi.lib, "__dict__"):
        return
    library = type(ffi.lib)
    c_function = library.__getattr__

    def attribute(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return c_function(self, name)

    library.__getattr__ = attribute


def own_graph_pool() -> None:
    """vLLM's engines share a memory pool for CUDA graphs, where an engine that is replayed while
    another captures, or is closed, would lose its graphs' memory."""
    from vllm.platforms import current_platform

    for platform in type(current_platform).__mro__:
        if "_global_graph_pool" in vars(platform):
            setattr(platform, "_global_graph_pool", None)  # noqa: B010


@contextmanager
def transformers_classes_kept(model: Any, vllm_config: Any) -> Iterator[None]:
    """vLLM changes transformers' class of a model it has no class for, for all users of the class,
    such as the trainer. This undoes it, also for an engine that fails; only vLLM's compiled models need
    the change."""
    decoder = type(model.get_decoder())
    before, bases = dict(vars(decoder)), decoder.__bases__
    try:
        yield
    finally:
        changed = [name for name, value in vars(decoder).items() if name not in before or before[name] is not value]
        was_changed = bool(changed) or decoder.__bases__ != bases
        decoder.__bases__ = bases
        for name in changed:
            if name in before:
                setattr(decoder, name, before[name])
            else:
                delattr(decoder, name)
    if was_changed and not vllm_config.model_config.enforce_eager:
        raise ModelError(
            f"vLLM runs {decoder.__name__} through transformers: set backend.enforce_eager=true. Or {USE_TORCH}"
        )


@contextmanager
def in_stream_order(device: torch.device) -> Iterator[None]:
    """Orders vLLM's CUDA stream after the trainer's writes, and the trainer's after vLLM's reads."""
    if device.type == "cuda":
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    yield
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()


def memory_that_sleeps() -> dict[str, Any]:
    """vLLM's pools of it. Their allocators stay until the process ends: torch asks them for memory when a pool's
    last tensor is gone, and would call one that is gone, too."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    if not module or not module.CuMemAllocator.instance:
        return {}
    pools: dict[str, Any] = module.CuMemAllocator.instance.allocator_and_pools
    for pairs in pools.values():  # of 0.24, one pair
        _allocators.extend(allocator for _, allocator in (pairs if isinstance(pairs, list) else [pairs]))
    return pools
