"""The engine that a configuration asks for, on the device of this process."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.engine import Engine
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.fake_models import model_size
from posttrain.backend.models import new_model
from posttrain.backend.openmp import limit_threads
from posttrain.backend.random_state import drawn_from
from posttrain.backend.torch_sampler import TorchSampler
from posttrain.backend.vllm_engine import VllmEngine
from posttrain.backend.vllm_settings import samples_with_vllm


def is_reproducible(config: BackendConfig) -> bool:
    return training_device(config).type == "cpu" if config.reproducible is None else config.reproducible


def new_engine(
    config: BackendConfig,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    lora_room: int = 0,
) -> Engine:
    """An engine without weights, which the first sync brings. `lora_room`: of the largest adapter that
    it is given unmerged."""
    device = training_device(config)
    if device.type == "cpu":
        limit_threads(model_size(hf_config).parameters)
    if samples_with_vllm(config):
        try:
            return VllmEngine(hf_config, tokenizer, max_length, config, device, is_reproducible(config), lora_room)
        except ModelError as error:
            if config.engine == "vllm" or config.tensor_parallel > 1:
                raise
            print(f"sampling with torch, since {error}", flush=True)
    if config.tensor_parallel > 1:
        raise ConfigError(f"backend.tensor_parallel={config.tensor_parallel} is for vLLM, which is not installed")
    # Unlike a trainer's own beginning: a weight that no sync brings shows in the first comparison.
    with drawn_from(2**31 - 1):
        model = new_model(hf_config)
    return TorchSampler(model, tokenizer, max_length, config, device)
