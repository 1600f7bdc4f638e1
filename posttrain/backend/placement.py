"""Which processes a BackendConfig needs, checked before one starts. Nothing here imports Ray."""

from typing import Any

from transformers import PretrainedConfig

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.extras import need


def uses_cluster(config: BackendConfig) -> bool:
    return config.trainer_processes > 1 or config.sampler_replicas > 0


def gpus_needed(config: BackendConfig) -> int:
    if config.replicas_share_gpu:
        return 1
    return config.trainer_processes + config.sampler_replicas * config.tensor_parallel


def _may_share(config: BackendConfig) -> bool:
    """Whether replicas may be on the trainer's GPU."""
    return config.trainer_processes == config.tensor_parallel == 1 and config.cluster is None


def check_placement(config: BackendConfig) -> None:
    """ConfigError for options that contradict each other, or where Ray is missing."""
    if not uses_cluster(config):
        for name in ("cluster", "sync_dir"):
            if (value := getattr(config, name)) is not None:
                raise ConfigError(
                    f"backend.{name}={value} is for several processes, and this run has one: set "
                    "backend.trainer_processes or backend.sampler_replicas"
                )
    if uses_cluster(config) and config.device != "auto":
        raise ConfigError(
            f"backend.device={config.device} is for one process: several take the GPUs that Ray gives them"
        )
    if config.tensor_parallel > 1 and not config.sampler_replicas:
        raise ConfigError(
            f"backend.tensor_parallel={config.tensor_parallel} is for replicas with GPUs of their own: set "
            "backend.sampler_replicas"
        )
    if config.tensor_parallel > 1 and config.engine == "torch":
        raise ConfigError(
            f"backend.tensor_parallel={config.tensor_parallel} is for vLLM: leave backend.engine=torch out, or take "
            "replicas of one GPU"
        )
    if config.replicas_share_gpu and not (config.sampler_replicas and _may_share(config)):
        raise ConfigError(
            "backend.replicas_share_gpu=true is for replicas beside a trainer in this process: set "
            "backend.sampler_replicas, and leave backend.trainer_processes, tensor_parallel and cluster out"
        )
    if config.sampler_replicas and config.share_engines:
        raise ConfigError("backend.share_engines=true is for engines in this process: set backend.sampler_replicas=0")
    if config.lora != "merged" and uses_cluster(config):
        raise ConfigError(
            f"backend.lora={config.lora} is for one process that trains and samples: set backend.trainer_processes=1 and "
            "backend.sampler_replicas=0, or take backend.lora=merged"
        )
    if config.trainer_processes > 1:
        _check_trainers(config)
    if uses_cluster(config):
        need("ray", "a run in several processes")


def _check_trainers(config: BackendConfig) -> None:
    of_one_process = {
        "moments=8bit": config.moments == "8bit",
        "offload_optimizer=true": config.offload_optimizer,
        "master_weights=false": not config.master_weights,
        "compile=true": config.compile,
    }
    if config.trainer_sharding == "shard" and (given := [name for name, is_set in of_one_process.items() if is_set]):
        raise ConfigError(
            f"backend.{given[0]} is not offered where weights are sharded: set backend.trainer_sharding=replicate, or "
            "leave it out"
        )


def check_gpus(config: BackendConfig, gpus_of_nodes: list[int]) -> None:
    """ConfigError if the nodes' GPUs are too few. Without any GPU all processes share the CPUs."""
    if not sum(gpus_of_nodes):
        return
    if (needed := gpus_needed(config)) > (total := sum(gpus_of_nodes)):
        advice = ". backend.replicas_share_gpu=true puts the replicas beside the trainer" if _may_share(config) else ""
        raise ConfigError(f"{_processes(config)} need {needed} GPUs; this cluster has {total}{advice}")
    if config.sampler_replicas and config.tensor_parallel > (largest := max(gpus_of_nodes)):
        raise ConfigError(
            f"a replica of {config.tensor_parallel} GPUs (backend.tensor_parallel) does not fit a node: the largest "
            f"has {largest}"
        )


def check_heads(config: BackendConfig, hf_config: PretrainedConfig) -> None:
    """ConfigError if the attention heads cannot be divided among a replica's GPUs."""
    text: Any = hf_config.get_text_config()
    if (heads := getattr(text, "num_attention_heads", 0)) % config.tensor_parallel:
        raise ConfigError(
            f"backend.tensor_parallel={config.tensor_parallel} does not divide the model's {heads} attention heads"
        )


def _processes(config: BackendConfig) -> str:
    trainers, replicas = config.trainer_processes, config.sampler_replicas
    text = f"{trainers} trainer process{'es' if trainers > 1 else ''}"
    if not replicas:
        return text
    size = f" of {config.tensor_parallel} GPUs" if config.tensor_parallel > 1 else ""
    return f"{text} and {replicas} replica{'s' if replicas > 1 else ''}{size}"
