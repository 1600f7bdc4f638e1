"""vLLM in this process: LLMEngine driven step by step, weights passed in memory. The engine starts
from the config with dummy weights, and a sync brings the real ones: the same path for presets, hub
models, checkpoints and merged adapters. Measurements: specs/vllm.md.
"""

import contextlib
import gc
import secrets
import threading
import weakref
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from posttrain.backend.base_models import SharedBase
from posttrain.backend.config import BackendConfig, compute_dtype
from posttrain.backend.device_lock import alone, computing
from posttrain.backend.engine import Sampled, SequenceRequest, Weights
from posttrain.backend.errors import CookbookError, ModelError
from posttrain.backend.memory import return_free_memory
from posttrain.backend.merged_lora import AdaptedWeights
from posttrain.backend.random_state import OwnTorchGenerators, global_generators_kept
from posttrain.backend.vllm_lora import serve_adapter
from posttrain.backend.vllm_process import (
    in_stream_order,
    let_modules_be_searched,
    memory_that_sleeps,
    model_folder,
    own_graph_pool,
    set_environment,
    transformers_classes_kept,
)
from posttrain.backend.vllm_refusals import UNMERGED, USE_TORCH, computed_otherwise, left_out, refusal
from posttrain.backend.vllm_requests import check_listed, read_answer, vllm_params
from posttrain.backend.vllm_settings import engine_args
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
        set_environment(device, reproducible)
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
            model_folder(hf_config, tokenizer, keep=not args["enforce_eager"]) as folder,
            alone(),
            global_generators_kept(),
        ):
            args |= {"model": folder, "tokenizer": f"{folder}/tokenizer"}
            args["seed"] = 0 if reproducible else secrets.randbits(31)  # noise of requests without a seed
            try:
                self._start(args, hf_config.tie_word_embeddings)
            except Exception as error:  # any error of vLLM with an unknown model
                self._shut_down()
                raise error if isinstance(error, CookbookError) else refusal(error, hf_config) from error
            self._generators = OwnTorchGenerators(device.type == "cuda", args["seed"])
            _live_engines.add(self)
        # Where noise is a function of seed and position, a seed costs nothing; elsewhere a launch
        # per row.
        self._seeded = reproducible or device.type == "cuda" and self._engine.vllm_config.use_v2_model_runner

    def _start(self, args: dict[str, Any], tied: bool) -> None:
        """Starts vLLM, and checks that it computes the model."""
        from vllm.distributed.parallel_state import destroy_model_parallel
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        own_graph_pool()
        let_modules_be_searched()
        vllm_config = EngineArgs(**args).create_engine_config()
        if vllm_config.model_config.is_moe:
            # vLLM makes it anew; what another kind of model left, open or refused, has no group for experts
            destroy_model_parallel()
        with transformers_classes_kept(self._checkpoint_form.model, vllm_config):
            self._engine = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        self._checkpoint_form.with_head = not tied or all(self._in_processes(has_output_layer))
        self._check_every_parameter()
        self._check_it_decodes(args["max_model_len"])

    def add(self, request: SequenceRequest) -> None:
        check_listed(request, self._vocabulary)
        params = vllm_params(request, self._seeded)
        self._wake()
        request_id = str(self._next_id)
        self._next_id += 1
        prompt: Any = {"type": "token", "prompt_token_ids": request.prompt}
        own_id = self._engine.add_request(request_id, prompt, params, lora_request=self._adapter)
        if params.detokenize:
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
        return [(request, read_answer(request, output, self._vocabulary)) for request, output in finished]

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
            with _computing, computing(), in_stream_order(self._device):
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
        with _computing, computing(), global_generators_kept(), in_stream_order(self._device):
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
        pools = memory_that_sleeps()
        if hasattr(self, "_engine"):
            if self._asleep:  # memory that is not there cannot be given back
                torch.cuda.empty_cache()
                with contextlib.suppress(RuntimeError):  # no room: it stays as it is
                    self._engine.wake_up()
                    self._asleep = False
            # vLLM's shutdown destroys the parallel state of all engines in the process: only the
            # last may call it.
            cleanup = (lambda: None) if _live_engines else cleanup_dist_env_and_memory
            # each of its five full collections would take as long as the one below
            with patch("vllm.v1.engine.core.cleanup_dist_env_and_memory", cleanup), patch("gc.collect"):
                self._engine.engine_core.shutdown()
            del self._engine
        gc.collect()
        if self._device.type == "cuda":
            if not self._asleep and not any(engine._sleeps for engine in _live_engines):
                pools.clear()  # vLLM 0.24 keeps them, and refuses the next engine that sleeps
            torch.cuda.empty_cache()
