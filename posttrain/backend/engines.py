"""The sampling engines of a ServiceClient and its TrainingClients, closed together."""

import weakref
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.backend.adapters import open_merged
from posttrain.backend.checkpoint_files import check_readable, is_adapter
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.engine import Engine, EngineThread
from posttrain.backend.errors import EngineError, ModelError
from posttrain.backend.models import context_length, embedding_rows, load_model
from posttrain.backend.openmp import release_workers
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.torch_sampler import TorchSampler
from posttrain.backend.vllm_engine import VllmEngine, vllm_is_installed


class Engines:
    """Holds weak references: an engine ends with its last client."""

    def __init__(self, config: BackendConfig):
        if config.engine == "vllm" and not vllm_is_installed():
            raise EngineError(
                "backend.engine=vllm, but vllm is not installed: see docs/install.md, or take backend.engine=torch"
            )
        self.config = config
        self._running: weakref.WeakSet[EngineThread] = weakref.WeakSet()

    def open(self, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EngineThread:
        """An engine without weights, which the first sync brings."""
        device = training_device()
        reproducible = device.type == "cpu" if self.config.reproducible is None else self.config.reproducible
        use_vllm = self.config.engine == "vllm" or (self.config.engine == "auto" and vllm_is_installed())

        def make() -> Engine:
            if use_vllm:
                try:
                    return VllmEngine(hf_config, tokenizer, max_length, self.config, device, reproducible)
                except ModelError as error:
                    if self.config.engine == "vllm":
                        raise
                    print(f"sampling with torch, since {error}", flush=True)
            with torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
            return TorchSampler(model, tokenizer, max_length, self.config, device)

        engine = EngineThread(make, deterministic=reproducible)
        self._running.add(engine)
        return engine

    def open_saved(self, path: str, seed: int = 0) -> SamplingClient:
        """The frozen policy of a folder. An adapter is merged into its base; `seed` is used if it
        has none."""
        folder = Path(path).expanduser()
        check_readable(folder)
        if is_adapter(folder):
            return self._freeze(path, open_merged(folder, seed))
        return self._freeze(path, load_model(str(folder), seed, torch.device("cpu"), torch.float32))

    def open_named(self, base_model: str, seed: int = 0) -> SamplingClient:
        """The frozen policy of a model by name, opened as by `create_training_client`."""
        return self._freeze(base_model, load_model(base_model, seed, torch.device("cpu"), torch.float32))

    def _freeze(self, name: str, model: PreTrainedModel) -> SamplingClient:
        tokenizer, length = load_tokenizer(name, self.config.max_length), context_length(name, self.config.max_length)
        engine = self.open(model.config, tokenizer, length)
        release_workers()  # of the calling thread, which made the weights
        try:
            engine.sync(lambda: model.state_dict().items(), version=0)
            return SamplingClient(engine, tokenizer, length, embedding_rows(model), base_model=name)
        except BaseException:
            engine.close()
            raise

    def close(self) -> None:
        for engine in list(self._running):
            engine.close()
