"""ServiceClient: opens models on this machine and hands out the training and sampling clients."""

import asyncio
import threading
import weakref
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

from posttrain.backend.adapters import read_base, read_lora
from posttrain.backend.checkpoint_files import (
    IS_CLASSIFIER,
    REMEDY,
    SCALAR_HEAD_FILE,
    STATE_FILE,
    check_readable,
    is_adapter,
    read_json,
    read_state,
    state_file,
)
from posttrain.backend.cluster import Cluster
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.engines import Engines
from posttrain.backend.errors import CheckpointError, ConfigError, ModelError
from posttrain.backend.futures import in_thread
from posttrain.backend.models import PRESETS, checkpoint_folder, context_length, model_folder
from posttrain.backend.openmp import release_workers
from posttrain.backend.placement import check_placement
from posttrain.backend.ranges import SEED, RangeError
from posttrain.backend.rest_client import RestClient
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.scalar_trainer import ScalarTrainer
from posttrain.backend.sdk_keywords import ignore, say_once
from posttrain.backend.spans import Spans
from posttrain.backend.trainer import Trainer
from posttrain.backend.trainer_group import TrainerGroup, TrainerRanks
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import GetServerCapabilitiesResponse, LoraConfig, SupportedModel
from posttrain.backend.vllm_settings import vllm_is_installed


class ServiceClient:
    """Opens models. `close`, or the end of a `with` block, stops all its engines and threads. A
    client without references is closed, and an engine ends with its last client."""

    def __init__(
        self,
        config: BackendConfig | None = None,
        checkpoint_dir: str | Path = "checkpoints",
        base_url: str | None = None,
        *,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        display_name: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
    ):
        ignore(user_metadata=user_metadata, project_id=project_id, display_name=display_name, api_key=api_key)
        ignore(default_headers_overrides=default_headers_overrides)
        if base_url is not None:
            raise ConfigError(f"base_url={base_url!r}: this backend runs in the process and talks to no service")
        if config is not None and not isinstance(config, BackendConfig):
            raise ConfigError(
                f"config={config!r:.80} is no BackendConfig: write BackendConfig(max_length=512), for example"
            )
        self.config = config or BackendConfig()
        self._checkpoint_dir = Path(checkpoint_dir).expanduser()
        check_placement(self.config)
        self._cluster: Cluster | None = None
        self._opening = threading.RLock()  # of the cluster and the ranks
        self.spans = Spans()  # of ranks and replicas
        self._engines = Engines(self.config, self._open_cluster, self.spans)
        self._training_clients: weakref.WeakSet[TrainingClient] = weakref.WeakSet()
        self._ranks: TrainerRanks | None = None

    def _open_cluster(self) -> Cluster:
        with self._opening:
            if self._cluster is None:
                self._cluster = Cluster(self.config, self._checkpoint_dir)
            return self._cluster

    def on_full_snapshots(self, make_room: Callable[[], bool]) -> None:
        """Calls `make_room`, in any thread, where a snapshot finds no room within
        backend.snapshot_memory_gb; it closes a client and returns True, or returns False."""
        self._engines.memory.make_room = make_room

    # --- training clients ------------------------------------------------------------------------

    def create_training_client(self, base_model: str, lora: LoraConfig | None = None, seed: int = 0) -> TrainingClient:
        """Trains all weights, or a LoRA adapter. `seed` is a preset's weights' and the adapter's."""
        return self._open_training_client(self._open_trainer("language", base_model, lora, seed))

    def create_scalar_client(self, base_model: str, lora: LoraConfig | None = None, seed: int = 0) -> TrainingClient:
        """A model with a scalar per token instead of logprobs (scalar_trainer.py): reward models,
        process reward models, critics. Its head is zero, but for a saved scalar model's; `load_state` of a
        language model's checkpoint loads the trunk."""
        return self._open_training_client(self._open_trainer("scalar", base_model, lora, seed))

    def create_scalar_client_from_state(self, path: str) -> TrainingClient:
        """The scalar model saved at `path`, with a fresh optimizer. CheckpointError if it has no
        head."""
        folder = checkpoint_folder(path)
        check_readable(folder)
        if not (folder / SCALAR_HEAD_FILE).exists():
            config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
            of_other = any("Classification" in str(name) for name in config.get("architectures") or ())
            why = IS_CLASSIFIER if of_other else "it is not the checkpoint of a scalar model"
            raise CheckpointError(f"{path} has no {SCALAR_HEAD_FILE}: {why}")
        return self._from_state(folder, with_optimizer=False, create=self.create_scalar_client)

    def _open_trainer(
        self, kind: Literal["language", "scalar"], base_model: str, lora: LoraConfig | None, seed: int
    ) -> Trainer | TrainerGroup:
        """In this process, or in the training processes, which all training clients share."""
        _check_model(base_model, seed)
        seed = int(seed)  # numpy's is not written to a checkpoint
        if lora is not None and not isinstance(lora, LoraConfig):
            raise ConfigError(f"lora={lora!r:.80} is no LoraConfig: write LoraConfig(rank=8), or None for all weights")
        if self.config.trainer_processes == 1:
            trainer = ScalarTrainer if kind == "scalar" else Trainer
            return trainer(base_model, self.config, seed, lora, self._engines.bases)
        with self._opening:
            if self._ranks is None:
                self._ranks = TrainerRanks(self.config, self._open_cluster(), self.spans)
        return self._ranks.open(kind, base_model, seed, lora)

    def _open_training_client(self, trainer: Trainer | TrainerGroup) -> TrainingClient:
        tokenizer = self._engines.tokenizer(trainer.model_name)
        client = TrainingClient(trainer, tokenizer, self._engines, self._checkpoint_dir)
        self._training_clients.add(client)
        release_workers()  # the calling thread made the weights
        return client

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool | None = None,
        user_metadata: dict[str, str] | None = None,
        optimizer: object = None,
        *,
        alpha: float | None = None,
    ) -> TrainingClient:
        """As Tinker's, but `train_unembed` is off by default, which is printed: vLLM cannot load an
        adapter on lm_head."""
        ignore(user_metadata=user_metadata)
        _check_optimizer(optimizer)
        if train_unembed is None:
            say_once(
                "train_unembed is off by default here (in Tinker it is on): vLLM cannot load an adapter on lm_head"
            )
        lora = LoraConfig(rank, seed, alpha, train_mlp, train_attn, train_unembed or False)
        return self.create_training_client(base_model, lora, seed or 0)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: object = None,
    ) -> TrainingClient:
        """The model of a checkpoint (any model or adapter), with a fresh optimizer."""
        ignore(base_model=base_model, user_metadata=user_metadata, weights_access_token=weights_access_token)
        _check_optimizer(optimizer)
        return self._from_state(checkpoint_folder(path), with_optimizer=False, create=self.create_training_client)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        ignore(base_model=base_model, user_metadata=user_metadata, weights_access_token=weights_access_token)
        return self._from_state(checkpoint_folder(path), with_optimizer=True, create=self.create_training_client)

    def _from_state(self, path: Path, with_optimizer: bool, create: Callable[..., TrainingClient]) -> TrainingClient:
        check_readable(path)
        if with_optimizer or state_file(path, STATE_FILE).exists():
            name, lora, seed = _trained_from(path)
        elif is_adapter(path):
            base = read_base(path)
            name, lora, seed = base.name, read_lora(path), base.seed or 0
        else:
            return create(str(path), None, 0)
        try:
            client = create(name, lora, seed)
        except ModelError as error:
            raise CheckpointError(f"{path} was trained from {name!r}, which cannot be opened: {error}") from error
        (client.load_state_with_optimizer if with_optimizer else client.load_state)(str(path)).result()
        return client

    # --- sampling clients ------------------------------------------------------------------------

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
        *,
        seed: int = 0,
    ) -> SamplingClient:
        """A frozen policy with its own engine: a saved folder, or a model by name. `seed`
        determines a preset's weights; an adapter saved here knows its base's seed."""
        ignore(retry_config=retry_config, record_stability_info=record_stability_info)
        if (model_path is None) == (base_model is None):
            raise ConfigError("create_sampling_client needs either model_path or base_model")
        _check_model(model_path or base_model, seed)
        if model_path is None and base_model not in PRESETS and is_adapter(model_folder(str(base_model))):
            model_path = base_model
        if model_path:
            return self._engines.open_saved(model_path, seed)
        return self._engines.open_named(str(base_model), seed)

    # --- the rest --------------------------------------------------------------------------------

    def create_rest_client(self) -> RestClient:
        """Lists and deletes the checkpoints of this service's folder."""
        return RestClient(self._checkpoint_dir)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        models = [SupportedModel(name, context_length(name, self.config.max_length)) for name in PRESETS]
        return GetServerCapabilitiesResponse(models, str(training_device(self.config)), vllm_is_installed())

    def close(self, status: str = "success", detail: str | None = None) -> None:
        """Stops training threads, then engines, then other processes. Idempotent; `status` and `detail` are unused."""
        for client in list(self._training_clients):
            client.close()
        self._engines.close()
        if self._ranks is not None:
            self._ranks.kill()
        if self._cluster is not None:
            self._cluster.close()

    def __enter__(self) -> "ServiceClient":
        return self

    def __exit__(self, kind: object, error: object, *trace: object) -> None:
        if self._cluster is not None and isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            # Ctrl-C: a rank or replica that stands still would keep the calls in flight, for which `close` waits.
            if self._ranks is not None:
                self._ranks.kill()
            self._engines.close()
        self.close()

    # --- twins -----------------------------------------------------------------------------------

    create_lora_training_client_async = in_thread(create_lora_training_client)
    create_training_client_from_state_async = in_thread(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = in_thread(create_training_client_from_state_with_optimizer)
    create_sampling_client_async = in_thread(create_sampling_client)
    create_rest_client_async = in_thread(create_rest_client)
    get_server_capabilities_async = in_thread(get_server_capabilities)


def _check_optimizer(optimizer: object) -> None:
    """By name, or the SDK's object or dict with a type."""
    kind = optimizer.get("type") if isinstance(optimizer, Mapping) else getattr(optimizer, "type", optimizer)
    if kind not in (None, "adamw"):
        raise ConfigError(f"optimizer={optimizer!r}: models are trained with AdamW here")


def _check_model(name: object, seed: object) -> None:
    if not isinstance(name, str | PathLike) or not str(name):
        raise ModelError(f"{name!r:.80} is no model: give a preset, a folder or a name of the hub, as a text")
    if needs := SEED.needs(seed):
        raise RangeError("seed", seed, needs)


def _trained_from(path: Path) -> tuple[str, LoraConfig | None, int]:
    """Model name, LoRA settings and seed of a checkpoint of this project."""
    state = read_state(path)
    try:
        lora = LoraConfig(**state["lora"]) if state["lora"] else None
        return str(state["model_name"]), lora, int(state["seed"])
    except (KeyError, TypeError, ValueError, RangeError) as error:
        raise CheckpointError(
            f"the training state of {path} is damaged ({type(error).__name__}: {error}): {REMEDY}"
        ) from error
