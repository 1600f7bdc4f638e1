"""vLLM in this process: LLMEngine driven step by step, weights passed in memory. The engine starts
from the config with dummy weights, and a sync brings the real ones: the same path for presets, hub
models, checkpoints and merged adapters. Measurements: specs/vllm.md.
"""

import contextlib
import gc
import hashlib
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from posttrain.backend.base_models import SharedBase
from posttrain.backend.config import BackendConfig, compute_dtype
from posttrain.backend.device_lock import alone, computing
from posttrain.backend.engine import Sampled, SequenceRequest, Weights
from posttrain.backend.errors import ConfigError, CookbookError, ModelError
from posttrain.backend.memory import return_free_memory
from posttrain.backend.merged_lora import AdaptedWeights
from posttrain.backend.prompt_scores import score_prompt
from posttrain.backend.random_state import OwnTorchGenerators, global_generators_kept
from posttrain.backend.types import SampledSequence
from posttrain.backend.vllm_lora import serve_adapter
from posttrain.backend.vllm_refusals import UNMERGED, USE_TORCH, computed_otherwise, left_out, refusal
from posttrain.backend.vllm_settings import engine_args, without_chunks
from posttrain.backend.vllm_weights import (
    CheckpointForm,
    has_output_layer,
    load_all,
    parameters_left_out,
    parameters_rounded,
    places_of,
)

# vLLM keeps the current batch in a global variable: only one engine of the process may compute at a
# time.
_computing = threading.Lock()
_live_engines: set["VllmEngine"] = set()
_allocators: list[Any] = []  # of vLLM's memory that sleeps
MOST_LISTED = 2**22  # logprobs of one prompt that vLLM lists as Python numbers, some 100 bytes each
# As vLLM sets it from Hopper on: cuBLAS then does not divide the sums of a product.
NO_SPLIT_SUMS = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}


class VllmEngine:
    def __init__(
        self,
        hf_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        config: BackendConfig,
        device: torch.device,
        reproducible: bool,
        lora_room: int = 0,
    ):
        """`lora_room`: adapters of up to this rank are served unmerged; 0 = merged."""
        _set_environment(device, reproducible)
        from vllm.distributed.parallel_state import destroy_model_parallel
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if reason := left_out(hf_config):
            raise ModelError(f"vLLM cannot serve this model: {reason}. {USE_TORCH}")
        if device.type == "cpu" and (reason := computed_otherwise(hf_config, max_length, lora_room > 0)):
            raise ModelError(f"vLLM cannot serve this model on a CPU: {reason}. {USE_TORCH}")
        self._device, self._dtype = device, compute_dtype(device, config)
        self._vocabulary = hf_config.get_text_config().vocab_size
        self._checkpoint_form = CheckpointForm(hf_config)
        self._sleeps, self._asleep, self._serves_adapters = config.sleep_while_training, False, lora_room > 0
        self._base: weakref.ref[Any] | None = None  # whose weights the engine has, under adapters
        self._borrower: weakref.ref[SharedBase] | None = None  # reads this engine's weights in its passes
        self._adapter: Any = None  # vLLM's LoRARequest, while there is one
        self._unfinished: dict[str, SequenceRequest] = {}
        self._ids: dict[SequenceRequest, str] = {}  # of thousands each may be dropped alone
        self._next_id = 0
        self._drained: list[tuple[SequenceRequest, Sampled]] = []  # for the next step's answer
        if device.type == "cpu":
            return_free_memory()
        args = engine_args(hf_config, max_length, config, device, lora_room)
        with (
            _model_folder(hf_config, tokenizer, keep=not args["enforce_eager"]) as folder,
            alone(),
            global_generators_kept(),
        ):
            # noise of requests without a seed
            args |= {
                "model": folder,
                "tokenizer": f"{folder}/tokenizer",
                "seed": 0 if reproducible else secrets.randbits(31),
            }
            _own_graph_pool()
            _let_modules_be_searched()
            try:
                vllm_config = EngineArgs(**args).create_engine_config()
                if vllm_config.model_config.is_moe:
                    # vLLM makes it anew; what another kind of model left, open or refused, has no
                    # group for experts
                    destroy_model_parallel()
                with _transformers_classes_kept(self._checkpoint_form.model, vllm_config):
                    self._engine = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
                has_head = all(self._in_processes(has_output_layer))
                self._checkpoint_form.with_head = has_head or not hf_config.tie_word_embeddings
                self._check_every_parameter()
                self._check_it_decodes(max_length)
            except Exception as error:  # any error of vLLM with an unknown model
                self._shut_down()
                raise error if isinstance(error, CookbookError) else refusal(error, hf_config) from error
            self._generators = OwnTorchGenerators(device.type == "cuda", args["seed"])
            _live_engines.add(self)
        # Where noise is a function of seed and position, a seed costs nothing; elsewhere a launch
        # per row.
        self._seeded = reproducible or device.type == "cuda" and self._engine.vllm_config.use_v2_model_runner

    def add(self, request: SequenceRequest) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params, stop = request.params, request.params.stop
        if request.scores and len(request.prompt) * self._vocabulary > MOST_LISTED:
            raise ConfigError(
                f"vLLM lists {self._vocabulary} logprobs at each of {len(request.prompt)} tokens of the prompt for "
                f"target_prompt_logprobs or prompt_alt_tokens_k, more than {MOST_LISTED} in all: {USE_TORCH}"
            )
        stop_list = [stop] if isinstance(stop, str) else list(stop or [])
        vllm_params = SamplingParams(
            max_tokens=request.max_tokens,
            seed=request.seed if self._seeded else None,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            stop=[s for s in stop_list if isinstance(s, str)],
            stop_token_ids=[s for s in stop_list if isinstance(s, int)],
            ignore_eos=stop is not None and not stop_list,
            logprobs=request.topk_sample,
            flat_logprobs=True,  # lists of numbers instead of an object per token
            prompt_logprobs=-1 if request.scores else request.topk_prompt,
            skip_special_tokens=False,
            detokenize=any(isinstance(s, str) for s in stop_list),
            skip_clone=True,  # made for this request alone
            output_kind=RequestOutputKind.CUMULATIVE if request.on_tokens else RequestOutputKind.FINAL_ONLY,
        )
        self._wake()
        request_id = str(self._next_id)
        self._next_id += 1
        prompt: Any = {"type": "token", "prompt_token_ids": request.prompt}
        own_id = self._engine.add_request(request_id, prompt, vllm_params, lora_request=self._adapter)
        if vllm_params.detokenize:
            # Beside stop strings vLLM spells out each token that it lists: slow for many, and 0.32 ends at an id
            # that the tokenizer has not.
            listed: Any = self._engine.output_processor.request_states[own_id].logprobs_processor
            listed.tokenizer = None
        self._unfinished[request_id], self._ids[request] = request, request_id

    def step(self) -> list[tuple[SequenceRequest, Sampled]]:
        with _computing, computing(), self._generators:
            outputs: list[Any] = self._engine.step()
        drained, self._drained = self._drained, []
        return drained + self._finished(outputs)

    def _finished(self, outputs: list[Any]) -> list[tuple[SequenceRequest, Sampled]]:
        for output in outputs:
            if (on_tokens := self._unfinished[output.request_id].on_tokens) and output.outputs[0].token_ids:
                on_tokens(list(output.outputs[0].token_ids))
        finished = [(self._unfinished.pop(output.request_id), output) for output in outputs if output.finished]
        for request, _ in finished:
            del self._ids[request]
        return [(request, self._answer(request, output)) for request, output in finished]

    def _answer(self, request: SequenceRequest, output: Any) -> Sampled:
        sampled = _with_topk(_sampled(output, request.topk_prompt), output, request.topk_sample)
        if not request.scores or sampled.failure:
            return sampled
        logprobs_TV = torch.full((len(request.prompt) - 1, self._vocabulary), -torch.inf)
        for row_V, entries in zip(logprobs_TV, [*_positions(output.prompt_logprobs)][1:], strict=True):
            row_V[torch.tensor([*entries])] = torch.tensor([*entries.values()])
        scored = score_prompt(request.scores, len(logprobs_TV), self._vocabulary, logprobs_TV.__getitem__)
        return replace(sampled, scored=scored)

    def _drain(self) -> None:
        """Waits for the batch that is computed while the next is planned, as on a GPU, and plans none. A reset would
        drop its tokens, and vLLM ends where these come with the logprobs of a prompt; sleep would take its memory."""
        client: Any = self._engine.engine_core
        core = client.engine_core
        if not core.batch_queue:
            return
        core.pause_scheduler(mode="keep", clear_cache=False)
        with _computing, computing(), self._generators:
            while core.batch_queue:
                self._drained += self._finished(self._engine.step())
        core.resume_scheduler()

    def drop(self, requests: Sequence[SequenceRequest]) -> None:
        ids = [self._ids.pop(request) for request in requests if request in self._ids]
        self._engine.abort_request(ids)
        for request_id in ids:
            del self._unfinished[request_id]
        dropped = {*requests}
        self._drained = [answer for answer in self._drained if answer[0] not in dropped]

    def _check_every_parameter(self) -> None:
        """vLLM's loaders silently skip unknown names: loads something, and counts."""
        names_R = self._in_processes(parameters_left_out, self._checkpoint_form, self._dtype)
        if names := sorted({name for names in names_R for name in names}):
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ModelError(
                f"vLLM cannot serve this model: it does not take {len(names)} of its own weights ({some}). {USE_TORCH}"
            )
        if names := sorted({name for names in self._in_processes(parameters_rounded, self._dtype) for name in names}):
            raise ModelError(
                f"vLLM cannot serve this model: it rounds {len(names)} of its weights, such as {names[0]}. {USE_TORCH}"
            )

    def _check_it_decodes(self, max_length: int) -> None:
        """A kernel that lacks a size of this model, such as that of its heads, fails in its first step."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=min(2, max_length - 1), temperature=0.0, detokenize=False)
        self._engine.add_request("first", {"prompt_token_ids": [0]}, params)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def sleep(self) -> None:
        """Without requests: its memory is free until the next request or weights."""
        if not self._asleep:
            self._drain()
            with _computing, computing(), _in_stream_order(self._device):
                self._engine.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            with _computing, computing():
                # vLLM takes its memory from the card, past torch, which keeps what passes have freed
                torch.cuda.empty_cache()
                self._engine.wake_up()
            self._asleep = False

    def load_weights(self, weights: Weights) -> None:
        """With tensor parallelism FileWeights, which each process reads."""
        self._wake()
        if self._borrower and (base := self._borrower()) and getattr(weights, "base", None) is not base:
            raise RuntimeError("the engine was to replace weights that passes read")
        self._drain()
        with _computing, computing(), global_generators_kept(), _in_stream_order(self._device):
            if self._serves_adapters and isinstance(weights, AdaptedWeights):
                self._load_adapted(weights)
            else:
                self._base, self._adapter = None, None
                self._in_processes(load_all, self._checkpoint_form, weights)
        # Cached prefixes have the old weights; running sequences recompute theirs.
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache after a weight sync")

    def _load_adapted(self, weights: AdaptedWeights) -> None:
        if self._base is None or self._base() is not weights.base:
            self._base = None
            self._in_processes(load_all, self._checkpoint_form, weights.base_weights())
            if isinstance(weights.base, SharedBase) and weights.base.is_aside:
                self._lend(weights.base)
            self._base = weakref.ref(weights.base)
        self._adapter = serve_adapter(self._engine, weights.updates, self._dtype)

    def _lend(self, base: SharedBase) -> None:
        """The base's own tensors end, and this engine's take their place."""
        shapes = {name: parameter.shape for name, parameter in base.model.named_parameters()}
        (places,) = self._in_processes(places_of, shapes)
        if not base.move_into(places):
            raise ModelError(f"vLLM holds no weight of this model as passes read it: {UNMERGED}")
        self._borrower = weakref.ref(base)

    def _in_processes(self, function: Any, *arguments: Any) -> list[Any]:
        """Results of `function(worker, *arguments)` in each process of tensor parallelism, or in this one."""
        return self._engine.collective_rpc(function, args=arguments)

    def close(self) -> None:
        with alone():
            self._shut_down()

    def _shut_down(self) -> None:
        """Also for an engine that failed to start."""
        from vllm.distributed import cleanup_dist_env_and_memory

        _live_engines.discard(self)
        pools = _memory_that_sleeps()
        if hasattr(self, "_engine"):
            if self._asleep:  # memory that is not there cannot be given back
                torch.cuda.empty_cache()
                with contextlib.suppress(RuntimeError):  # no room: it stays as it is
                    self._engine.wake_up()
                    self._asleep = False
            # vLLM's shutdown destroys the parallel state of all engines in the process: only the
            # last may call it.
            cleanup = _no_cleanup if _live_engines else cleanup_dist_env_and_memory
            # each of its five full collections would take as long as the one below
            with patch("vllm.v1.engine.core.cleanup_dist_env_and_memory", cleanup), patch("gc.collect"):
                self._engine.engine_core.shutdown()
            del self._engine
        gc.collect()
        if self._device.type == "cuda":
            if not self._asleep and not any(engine._sleeps for engine in _live_engines):
                pools.clear()  # vLLM 0.24 keeps them, and refuses the next engine that sleeps
            torch.cuda.empty_cache()


def _no_cleanup() -> None: ...


def _memory_that_sleeps() -> dict[str, Any]:
    """vLLM's pools of it. Their allocators stay until the process ends: torch asks them for memory when a pool's
    last tensor is gone, and would call one that is gone, too."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    if not module or not module.CuMemAllocator.instance:
        return {}
    pools: dict[str, Any] = module.CuMemAllocator.instance.allocator_and_pools
    for pairs in pools.values():  # of 0.24, one pair
        _allocators.extend(allocator for _, allocator in (pairs if isinstance(pairs, list) else [pairs]))
    return pools


@contextmanager
def _model_folder(hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, keep: bool) -> Iterator[str]:
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
                with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=cache) as staging:
                    os.rename(shutil.copytree(folder, Path(staging) / "model"), kept)
            folder = kept
        yield str(folder)


def _let_modules_be_searched() -> None:
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


def _own_graph_pool() -> None:
    """vLLM's engines share a memory pool for CUDA graphs, where an engine that is replayed while
    another captures, or is closed, would lose its graphs' memory."""
    from vllm.platforms import current_platform

    for platform in type(current_platform).__mro__:
        if "_global_graph_pool" in vars(platform):
            setattr(platform, "_global_graph_pool", None)  # noqa: B010


def _set_environment(device: torch.device, reproducible: bool) -> None:
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
def _transformers_classes_kept(model: Any, vllm_config: Any) -> Iterator[None]:
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
def _in_stream_order(device: torch.device) -> Iterator[None]:
    """Orders vLLM's CUDA stream after the trainer's writes, and the trainer's after vLLM's reads."""
    if device.type == "cuda":
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    yield
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()


def _sampled(output: Any, topk_prompt: int | None) -> Sampled:
    completion = output.outputs[0]
    reason = completion.finish_reason
    # aborted, an error inside vLLM, or a repetition it refuses
    if reason not in ("stop", "length"):
        return Sampled(SampledSequence([], [], "length"), failure=f"vLLM finished it with {reason!r}")
    tokens = list(completion.token_ids)
    flat = completion.logprobs
    # of a position, the sampled token is first
    logprobs = [flat.logprobs[start] for start in flat.start_indices]
    sequence = SampledSequence(tokens, logprobs, reason)
    if output.prompt_logprobs is None or topk_prompt is None:
        return Sampled(sequence)
    prompt: list[float | None] = []
    topk: list[list[tuple[int, float]] | None] = []
    for token, entries in zip(output.prompt_token_ids, _positions(output.prompt_logprobs), strict=True):
        prompt.append(entries[token] if entries else None)
        best = sorted(entries.items(), key=lambda entry: -entry[1])
        topk.append([entry for rank, entry in enumerate(best) if rank < topk_prompt or entry[0] == token] or None)
    return Sampled(sequence, prompt, topk)


def _positions(flat: Any) -> Iterator[dict[int, float]]:
    """Logprobs of the tokens at each position, without repetition; empty at the first of a prompt."""
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        yield dict(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True))


def _with_topk(sampled: Sampled, output: Any, k: int) -> Sampled:
    """With the k most likely tokens at each sampled one."""
    if not k or sampled.failure:
        return sampled
    rows = [
        sorted(((token, p) for token, p in entries.items() if p > -math.inf), key=lambda entry: -entry[1])[:k]
        for entries in _positions(output.outputs[0].logprobs)
    ]
    return replace(sampled, sequence=replace(sampled.sequence, topk_logprobs=rows))
