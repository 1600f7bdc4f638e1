"""The sampling engines of a ServiceClient and its TrainingClients, closed together."""

import hashlib
import json
import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.backend.adapters import adapts_inner_layers, is_plain, open_merged, open_on_shared
from posttrain.backend.architectures import vocabulary_of
from posttrain.backend.base_models import BaseModels, SharedBase
from posttrain.backend.checkpoint_files import check_readable, is_adapter
from posttrain.backend.cluster import Cluster
from posttrain.backend.config import BackendConfig, compute_dtype, training_device
from posttrain.backend.data_checks import check_loaded
from posttrain.backend.engine import EngineThread
from posttrain.backend.errors import ConfigError, EngineError, ModelError
from posttrain.backend.merged_lora import layer_updates
from posttrain.backend.model_checks import check_sampler
from posttrain.backend.models import check_has_vocabulary, checkpoint_folder, context_length, load_model
from posttrain.backend.new_engine import is_reproducible, new_engine
from posttrain.backend.openmp import release_workers
from posttrain.backend.placement import check_heads
from posttrain.backend.sampler_actor import RayReplica
from posttrain.backend.sampler_pool import SamplerPool
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.spans import Spans
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.vllm_process import set_batch_invariance
from posttrain.backend.vllm_settings import check_sleep, lora_room, samples_with_vllm, vllm_is_installed
from posttrain.backend.weight_copies import SampledModel
from posttrain.backend.weight_versions import Policy, SnapshotMemory, WeightVersion


class Engines:
    """Holds weak references: an engine ends with its last client. With backend.share_engines, an
    engine for each architecture stays until `close`."""

    def __init__(self, config: BackendConfig, open_cluster: Callable[[], Cluster], spans: Spans):
        if config.engine == "vllm" and not vllm_is_installed():
            raise EngineError(
                "backend.engine=vllm, but vllm is not installed: see docs/install.md, or take backend.engine=torch"
            )
        if config.engine == "vllm" and training_device(config) != training_device():
            raise ConfigError(
                f"backend.engine=vllm samples on {training_device().type}, not on backend.device={config.device}: take "
                "backend.engine=torch"
            )
        if config.sleep_while_training:
            check_sleep(config)
        if config.reproducible and samples_with_vllm(config) and (device := training_device(config)).type == "cuda":
            set_batch_invariance(device)
        self.config, self.shares, self._open_cluster = config, config.share_engines, open_cluster
        self._spans, self._num_replicas = spans, 0
        self.bases = BaseModels()
        self.memory = SnapshotMemory(config.snapshot_memory_gb)
        self._running: weakref.WeakSet[EngineThread | SamplerPool] = weakref.WeakSet()
        self._shared: dict[tuple[str, int], EngineThread | SamplerPool] = {}
        self._lock = threading.Lock()
        self._tokenizers: weakref.WeakValueDictionary[str, PreTrainedTokenizerBase] = weakref.WeakValueDictionary()

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """A model's, which clients of one name share: a large vocabulary takes seconds to read."""
        tokenizer = self._tokenizers.get(name)
        if tokenizer is None:
            tokenizer = self._tokenizers[name] = load_tokenizer(name, self.config.max_length)
        return tokenizer

    def new_policy(self) -> Policy:
        return Policy(self.memory, self.shares)

    def open(
        self,
        hf_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        lora_rank: int = 0,
        frozen: bool = False,
    ) -> EngineThread | SamplerPool:
        """An engine without weights, which the first sync brings; or the one that is shared.
        `lora_rank`: of the adapter it is for."""
        room = lora_room(self.config, lora_rank)
        if not self.shares:
            return self._start(hf_config, tokenizer, max_length, room, frozen)
        with self._lock:
            key = _computes(hf_config, tokenizer, max_length), room
            engine = self._shared.get(key)
            if engine is None or engine.has_stopped:
                engine = self._shared[key] = self._start(hf_config, tokenizer, max_length, room)
                engine.hold(self)
            return engine

    def _start(
        self,
        hf_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        lora_room: int,
        frozen: bool = False,
    ) -> EngineThread | SamplerPool:
        """In this process, or in replicas: of a policy in training all, of a frozen one its own."""
        config = self.config
        if config.sampler_replicas:
            engine: EngineThread | SamplerPool = self._start_replicas(hf_config, tokenizer, max_length, frozen)
        elif config.trainer_processes > 1 and training_device(config).type == "cuda":
            raise ConfigError(
                f"backend.trainer_processes={config.trainer_processes} with a sampler needs replicas with GPUs of "
                "their own (colocated ones are not offered): set backend.sampler_replicas"
            )
        else:
            make = partial(new_engine, config, hf_config, tokenizer, max_length, lora_room)
            engine = EngineThread(make, deterministic=is_reproducible(config))
        self._running.add(engine)
        return engine

    def _start_replicas(
        self, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, frozen: bool
    ) -> SamplerPool:
        config = self.config
        check_heads(config, hf_config)
        cluster = self._open_cluster()
        ranks = config.trainer_processes if config.trainer_processes > 1 else 0
        # GPUs are reserved for the replicas of one policy in training
        reserved = not frozen and not any(isinstance(engine, SamplerPool) for engine in self._running)

        def start(index: int) -> RayReplica:
            return RayReplica(cluster, ranks + index if reserved else None, hf_config, tokenizer, max_length)

        count, restarts, seconds = config.sampler_replicas, config.sampler_restarts, config.call_seconds
        count = 1 if frozen else count
        first, self._num_replicas = self._num_replicas, self._num_replicas + count
        return SamplerPool(start, count, cluster.folder, restarts, seconds, is_reproducible(config), self._spans, first)

    def open_saved(self, path: str, seed: int = 0) -> SamplingClient:
        """The frozen policy of a folder. An adapter is merged into its base, or with
        backend.lora=unmerged, if it is a plain one, served beside it; `seed` is used if it has none.
        SnapshotMemoryError if a shared engine's weights would exceed the memory."""
        folder = checkpoint_folder(path)
        check_readable(folder)
        check_has_vocabulary(str(folder))
        if not is_adapter(folder):
            return self._freeze(path, load_model(str(folder), seed, torch.device("cpu"), torch.float32))
        apart = adapts_inner_layers(folder) if self.config.lora != "merged" else self.shares
        if apart and is_plain(folder):
            return self._freeze(path, *open_on_shared(folder, seed, self.bases))
        return self._freeze(path, open_merged(folder, seed))

    def open_named(self, base_model: str, seed: int = 0) -> SamplingClient:
        """The frozen policy of a model by name, opened as by `create_training_client`."""
        return self._freeze(base_model, load_model(base_model, seed, torch.device("cpu"), torch.float32))

    def _freeze(self, name: str, model: PreTrainedModel, owner: SharedBase | None = None) -> SamplingClient:
        check_loaded(name, dict(model.named_parameters()), ModelError)
        tokenizer, length = self.tokenizer(name), context_length(name, self.config.max_length)
        source = SampledModel(model, compute_dtype(training_device(self.config), self.config), owner)
        rank = max((update.a_RI.shape[0] for update in layer_updates(model).values()), default=0)
        policy, version = self.new_policy(), WeightVersion(0, source.sampler_weights)
        if self.shares:
            version.keep(source, self.memory)
            policy.publish(version)
        engine = self.open(model.config, tokenizer, length, rank, frozen=True)
        release_workers()  # of the calling thread, which made the weights
        try:
            if not self.shares:
                engine.sync(policy, version)
                version.drop()
            client = SamplingClient(engine, policy, tokenizer, length, vocabulary_of(model), base_model=name)
            if not self.shares:  # else the trainer of its base was compared
                check_sampler(name, model, client, source.dtype, self.config.alarm == "stop")
            return client
        except BaseException:
            if not self.shares:
                engine.close()
            raise

    def close(self) -> None:
        for engine in list(self._running):
            engine.close()


def _computes(hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """What an engine depends on besides the weights."""
    config = hf_config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(name, None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps([config, vocabulary, tokenizer.eos_token_id, max_length], default=str).encode())
    return digest.hexdigest()
