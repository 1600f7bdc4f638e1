"""Configs as they are published, with small sizes: at positions before, around and far beyond the length where
rotations, scales or chunks change, trainer and samplers have the logprobs that transformers gives one sequence.
Where they would not, the context ends, or the engine is refused.
"""

# Trap: a row of short sequences, such as the ones compared when a model is opened, shows none of this.

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ModelError
from posttrain.backend.models import context_length
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ModelInput, SamplingParams
from tests.architectures import CONTEXT, SHAPE, VOCABULARY
from tests.conftest import SAMPLER_GAP
from tests.test_architectures import ATOL, full_logprobs
from tests.vllm_families import families_service

ORIGINAL = CONTEXT // 4  # tokens of context before its rotations were stretched
LLAMA = SHAPE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0}
QWEN2 = SHAPE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
CHUNKS = {"chunk_size": 160, "local_size": 32, "original_max_position_embeddings": 160}
LONG = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
# In the spelling of the published files.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama 3.1": LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": ORIGINAL}},
    "Qwen 2.5 with YaRN": QWEN2 | {"rope_scaling": YARN, "sliding_window": CONTEXT, "use_sliding_window": False},
    "Gemma 3": SHAPE
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "Ministral 3": SHAPE
    | {
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "head_dim": 32,
        "rope_parameters": YARN
        | {"rope_theta": 1e6, "rope_type": "yarn", "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "Llama 4": SHAPE
    | {
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "head_dim": 32,
        "intermediate_size_mlp": 256,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 128,
        "attn_temperature_tuning": True,
        "attn_scale": 0.5,
        "floor_scale": ORIGINAL,
        "no_rope_layers": [1, 0],
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": ORIGINAL},
    },
    "Qwen 2.5-1M": QWEN2 | {"dual_chunk_attention_config": CHUNKS},
    "Gemma 3n": SHAPE
    | {
        "model_type": "gemma3n_text",
        "architectures": ["Gemma3nForCausalLM"],
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "num_kv_shared_layers": 0,
        "intermediate_size": [256, 256],
        "activation_sparsity_pattern": [0.95, 0.0],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "Apertus": SHAPE | {"model_type": "apertus", "architectures": ["ApertusForCausalLM"], "hidden_act": "xielu"},
}
NOT_WITH_VLLM = {
    "Gemma 3n": "it leaves out the embeddings of each layer",
    "Apertus": "it rounds 4 of its weights, such as .*alpha_n",
}


def write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def save(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    """Wide random weights, beside the config as it is published. Returns transformers' own model."""
    write_config(folder, config)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn_like(tensor)
            tensor.copy_(1.2 * tensor.shape[-1] ** -0.5 * noise if tensor.ndim >= 2 else tensor + 0.3 * noise)
    model.save_pretrained(folder)
    write_config(folder, config)
    character_tokenizer(10**6).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def of_tokens(model: PreTrainedModel, tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    logprobs_TV = full_logprobs(model, tokens[:-1], temperature)
    return logprobs_TV.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def random_tokens(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, size=length).tolist() for length in lengths]


def gap_of_trainer(client: TrainingClient, model: PreTrainedModel, length: int) -> float:
    """Short rows beside long ones, and a group whose answers cross the end of the original context."""
    prompt, *answers = random_tokens(ORIGINAL - 5, 3, length - ORIGINAL, 9)
    sequences = [*random_tokens(12, ORIGINAL, ORIGINAL + 1, length), *(prompt + answer for answer in answers)]
    data_D = [
        Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)})
        for tokens in sequences
    ]
    outputs = client.forward(data_D, "cross_entropy").result().loss_fn_outputs
    gaps = [
        np.abs(output["logprobs"].array - of_tokens(model, tokens)).max()
        for output, tokens in zip(outputs, sequences, strict=True)
    ]
    return float(np.max(gaps))


def gap_of_sampler(client: TrainingClient, model: PreTrainedModel, length: int) -> float:
    """Of prompts on both sides and answers across, the second time from a cached prefix."""
    sampler, gaps = client.save_weights_and_get_sampling_client(), []
    prompts = random_tokens(12, ORIGINAL - 5, length - 20)
    params = [SamplingParams(max_tokens=19, seed=seed, temperature=0.8, stop=[]) for seed in range(len(prompts))]

    async def sample() -> Any:
        asked = zip(prompts, params, strict=True)
        return await asyncio.gather(*(sampler.sample_async(ModelInput.from_ints(p), 2, how, True) for p, how in asked))

    for prompt, response in [*zip(prompts, asyncio.run(sample()), strict=True)] * 2:
        gaps.append(np.abs(np.array(response.prompt_logprobs[1:]) - of_tokens(model, prompt)).max())
        for sequence in response.sequences:
            expected = of_tokens(model, prompt + sequence.tokens, 0.8)[len(prompt) - 1 :]
            gaps.append(np.abs(np.array(sequence.logprobs) - expected).max())
    return float(np.max(gaps))


@pytest.mark.parametrize("name", CONFIGS)
def test_passes_and_the_torch_sampler_are_right_at_every_position(name: str, tmp_path: Path) -> None:
    model, folder = save(tmp_path / "model", CONFIGS[name]), str(tmp_path / "model")
    length = context_length(folder)
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client(folder)
        assert gap_of_trainer(client, model, length) < ATOL
        assert gap_of_sampler(client, model, length) < ATOL
        path = client.save_weights_for_sampler("saved").result().path
    (tokens,) = random_tokens(length)
    saved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    assert np.abs(of_tokens(saved, tokens) - of_tokens(model, tokens)).max() < ATOL


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with families_service(tmp_path_factory.mktemp("checkpoints")) as service:
        yield service


# Trap: a scale that vLLM reads under another name, or switches by the length of its own context.
@pytest.mark.slow
@pytest.mark.needs_vllm
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_WITH_VLLM])
def test_vllm_is_right_at_every_position(vllm: ServiceClient, name: str, tmp_path: Path) -> None:
    model, folder = save(tmp_path / "model", CONFIGS[name]), str(tmp_path / "model")
    with vllm.create_training_client(folder) as client:
        assert gap_of_sampler(client, model, context_length(folder)) < SAMPLER_GAP


@pytest.mark.slow
@pytest.mark.needs_vllm
@pytest.mark.cpu_only
@pytest.mark.parametrize("name", NOT_WITH_VLLM)
def test_vllm_is_refused_where_it_leaves_something_out(vllm: ServiceClient, name: str, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[name])
    with pytest.raises(ModelError, match=f"{NOT_WITH_VLLM[name]}.*backend.engine=torch"):
        vllm.create_sampling_client(base_model=str(tmp_path))


MPT = {"model_type": "mpt", "architectures": ["MptForCausalLM"], "max_seq_len": 2048}
ENDS: dict[str, tuple[dict[str, Any], int, str]] = {
    # vLLM has no rotations beyond factor * original: it reads what lies in memory behind them
    "YaRN of a smaller factor": (QWEN2 | {"rope_scaling": YARN | {"factor": 2.0}}, CONTEXT // 2, "yarn, 2 times 64"),
    "LongRoPE": (LLAMA | {"rope_scaling": LONG | {"original_max_position_embeddings": 64}}, 64, "LongRoPE"),
    "LongRoPE of a kind of layer": (
        SHAPE
        | {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "head_dim": 32,
            "rope_parameters": {
                "full_attention": LONG | {"rope_type": "longrope", "original_max_position_embeddings": 64},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        64,
        "LongRoPE",
    ),
    "dual chunks": (CONFIGS["Qwen 2.5-1M"], 128, "dual chunk attention"),
    "dynamic NTK": (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, CONTEXT, ""),
    "MPT": (MPT, 2048, ""),
    "Whisper": ({"model_type": "whisper", "architectures": ["WhisperForCausalLM"]}, 448, ""),
    # what model cards say of YaRN leaves max_position_embeddings as it was
    "YaRN of a model card": (
        QWEN2 | {"rope_scaling": YARN, "max_position_embeddings": ORIGINAL},
        ORIGINAL,
        "yarn, 4 times 64: if that is its context, set max_position_embeddings=256 there",
    ),
    "linear": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        CONTEXT,
        "linear scaling, 4 times 256: if that is its context, set max_position_embeddings=1024 there",
    ),
    "Command R": (
        SHAPE | {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "model_max_length": 131072},
        CONTEXT,
        "model_max_length: if that is its context, set max_position_embeddings=131072 there",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_context_ends_where_a_sequence_would_have_other_logprobs(name: str, tmp_path: Path) -> None:
    config, length, says = ENDS[name]
    folder = write_config(tmp_path, config)
    assert context_length(folder) == context_length(folder, length) == length
    with pytest.raises(ModelError, match=f"{length} tokens of context.*{says}"):
        context_length(folder, length + 1)


def test_a_model_without_positions_has_a_context_of_any_length(tmp_path: Path) -> None:
    folder = write_config(tmp_path, {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]})
    assert context_length(folder) == 4096 and context_length(folder, 100_000) == 100_000
