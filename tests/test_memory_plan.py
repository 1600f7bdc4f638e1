"""What a run will need is known before anything is opened."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import chz
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPTBigCodeConfig,
    NemotronHConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    T5Config,
)

import posttrain.preflight
from posttrain.backend.checkpoint_files import SCALAR_HEAD_FILE
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CookbookError, ModelError
from posttrain.backend.fake_models import cached_bytes, saved_bytes
from posttrain.backend.memory import GIB, kv_cache_bytes, sequence_bytes
from posttrain.backend.memory_plan import PROCESS_BYTES, VLLM_BYTES, PlannedRun, check_fits, free_bytes, planned
from posttrain.backend.models import PRESETS, new_model
from posttrain.backend.types import LoraConfig
from posttrain.tracking.command_line import parse
from tests.architectures import FAMILIES

HALF_B = "qwen2.5-0.5b-shape"
CPU = torch.device("cpu")


def half_b(lora: LoraConfig | None = None, **settings: object) -> PlannedRun:
    config = BackendConfig(engine="torch", max_length=512, **settings)  # type: ignore[arg-type]
    return PlannedRun(PRESETS[HALF_B], config, lora, CPU, 512, samples=True)


def test_the_parts_by_hand() -> None:
    run, weights = half_b(max_num_seqs=8), 494_032_768
    assert run.size.parameters == run.size.trainable == weights
    always = {name: size for name, size in run.plan.always.items() if name != "process"}
    assert list(always.values()) == [4 * weights, 4 * weights, 8 * weights, 4 * weights]
    # 24 layers, keys and values of 2 heads of 64, in fp32
    assert run.plan.sampling["KV cache"] == 8 * 512 * 24 * 2 * 2 * 64 * 4
    # fp32 logits of a chunk, thrice; the output matrix's gradient and the product added to it
    assert run.plan.training["head"] == 3 * 4 * 2**26 + 2 * 4 * 151_936 * 896
    adapted = half_b(LoraConfig(rank=8))
    # r (in + out) of q, k, v, o, gate, up and down
    sums = (896 + 896) + 2 * (896 + 128) + (896 + 896) + 3 * (896 + 4864)
    assert adapted.size.trainable == 24 * 8 * sums
    shared = adapted.changed(lora="shared").plan  # the sampler's weights are there while it opens
    assert sum(adapted.plan.always.values()) - sum(shared.always.values()) == 4 * weights
    assert shared.sampling["sampler weights, fp32, as it opens"] == 4 * weights


def test_what_each_setting_keeps_by_hand() -> None:
    """In bytes per weight of the model, and per weight of an adapter."""
    weights, head, small = 494_032_768, 151_936 * 896, 24 * 12 * (4 * 896 + 2 * (896 + 128) + 3 * (896 + 4864))

    def held(lora: LoraConfig | None = None, device: str = "cuda", **settings: Any) -> list[float]:
        shards = settings.pop("shards", 1)
        chosen: dict[str, Any] = {"dtype": "bfloat16", **settings}
        config = BackendConfig(engine="torch", max_length=512, **chosen)
        run = PlannedRun(PRESETS[HALF_B], config, lora, torch.device(device), 512, reference=True, shards=shards)
        return [size / (small if lora else weights) for name, size in run._always().items() if name != "process"]

    assert held() == [2, 4, 4, 8, 2]  # weights, gradients, fp32 copies, moments, reference
    assert held(shards=4) == [0.5, 1, 1, 2, 0.5]
    assert held(master_weights=False) == [2, 2, 8, 2]
    assert held(moments="8bit") == [2, 4, 4, 2, 2]
    assert held(offload_optimizer=True) == [2, 4, 2] and held(device="cpu", offload_optimizer=True) == held()
    adapter = LoraConfig(rank=12)
    base = 2 * weights / small  # then the adapter, its gradients and moments; the reference may have one of its own
    assert held(adapter) == pytest.approx([base, 4, 4, 8, base + 2])
    config = BackendConfig(engine="vllm", max_length=512, lora="unmerged", dtype="float32")
    run = PlannedRun(PRESETS[HALF_B], config, adapter, CPU, 512, samples=True)
    parts = {name: size for name, size in run._one_engine().items() if name != "KV cache"}
    # an adapter of rank 12 as it was read, and in a place for one of rank 16
    by_hand = [4 * weights, 4 * small * (1 + 16 / 12), 4 * (0.65 * (weights - head) + 4.8 * head)]
    assert [*parts.values()] == pytest.approx(by_hand)
    assert run._sampling()["adapters of 1024 tokens"] == 4 * 1024 * 16 * 4864
    assert run._always()["process"] == PROCESS_BYTES["cpu"] + VLLM_BYTES["cpu"]
    assert run.changed(sampler_replicas=3)._always()["process"] == 4 * PROCESS_BYTES["cpu"] + 3 * VLLM_BYTES["cpu"]
    two = half_b(sampler_replicas=2, max_num_seqs=3)
    assert two._sampling()["logits of 6 sequences"] == 6 * 151_936 * 28
    assert two._sampling()["KV cache"] == 2 * 3 * 512 * 24 * 2 * 2 * 64 * 4


def test_a_step_that_rounds_counts_for_the_largest_weight() -> None:
    assert not half_b().plan.stepping and not half_b(LoraConfig(rank=8)).plan.stepping
    (needed,) = half_b(moments="8bit").plan.stepping.values()
    assert needed == 24 * 151_936 * 896 + 64 * 2**24
    bf16 = {"dtype": "bfloat16", "master_weights": False}
    assert list(half_b(**bf16).plan.stepping.values()) == [needed]
    config = BackendConfig(moments="8bit", offload_optimizer=True)  # where it steps is not the GPU's memory
    assert not PlannedRun(PRESETS[HALF_B], config, None, torch.device("cuda"), 512).plan.stepping
    run = half_b(moments="8bit", micro_batch_tokens=512, gradient_checkpointing=True)
    assert run.plan.peak == sum(run.plan.always.values()) + needed


def test_a_sampler_counts_where_it_is() -> None:
    def on_a_gpu(**settings: Any) -> int:
        config = BackendConfig(engine="torch", max_length=512, dtype="bfloat16", sampler_memory_gb=1.0, **settings)
        return PlannedRun(PRESETS[HALF_B], config, None, torch.device("cuda"), 512, samples=True).plan.peak

    apart, weights = on_a_gpu(sampler_replicas=2), 2 * 494_032_768
    one, two = (on_a_gpu(sampler_replicas=n, replicas_share_gpu=True) for n in (1, 2))
    assert on_a_gpu() == apart + weights
    assert two - one == one - apart == weights + PROCESS_BYTES["cuda"]


def test_replicas_on_one_gpu_divide_the_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    for engines, shares in ((4, True), (1, False)):
        config = BackendConfig(gpu_memory_utilization=0.5, sampler_replicas=4, replicas_share_gpu=shares)
        assert kv_cache_bytes(PRESETS[HALF_B], 512, config, torch.device("cuda")) == 500 // engines


def test_layers_may_have_heads_of_their_own() -> None:
    """transformers refuses to read `head_dim` of Gemma 4's config: each engine and plan ended there."""
    config = Gemma4TextConfig(num_hidden_layers=6, hidden_size=256, intermediate_size=512, vocab_size=300)
    assert sequence_bytes(config, 10, 2) == 10 * 2 * 2 * 4 * (5 * 256 + 512)
    assert PlannedRun(config, BackendConfig(engine="torch"), None, CPU, 64, samples=True).plan.peak > 0


NEMOTRON = NemotronHConfig(
    layers_block_type=["linear_attention", "full_attention", "mlp", "linear_attention"],
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=64,
    n_groups=8,
    ssm_state_size=128,
    conv_kernel=4,
)


@pytest.mark.parametrize(
    ("config", "states", "per_token"),
    [
        # a latent of 512 and a rotated part of 64 in each layer, and no keys of 128 heads
        (DeepseekV3Config(num_hidden_layers=2, n_routed_experts=8, n_group=2), 0, 2 * (512 + 64)),
        # of two layers: 4 columns of inputs and two B and C of 8 groups; an fp32 state of each head, which is 2 values
        (NEMOTRON, 2 * (4 * (128 * 64 + 2 * 8 * 128) + 2 * 128 * 64 * 128), 2 * 8 * 128),
        # of three layers of four: queries and keys of 16 heads, values of 32
        (
            Qwen3NextConfig(num_hidden_layers=4, num_experts=4, num_experts_per_tok=2),
            3 * (4 * (2 * 16 * 128 + 32 * 128) + 2 * 32 * 128 * 128),
            2 * 2 * 256,
        ),
        # attention and a state in each of two layers, all of it fp32
        (
            FalconH1Config(num_hidden_layers=2, mamba_d_ssm=1024, mamba_n_heads=128, mamba_d_state=256),
            2 * 2 * (4 * (1024 + 2 * 256) + 1024 * 256),
            2 * 2 * 8 * 128,
        ),
        # two of five layers read the keys and values of others
        (
            Gemma3nTextConfig(
                layer_types=["sliding_attention"] * 4 + ["full_attention"],
                num_hidden_layers=5,
                num_kv_shared_layers=2,
                intermediate_size=[512] * 5,
                activation_sparsity_pattern=[0.0] * 5,
            ),
            0,
            3 * 2 * 2 * 256,
        ),
        # one head of keys and values for all queries
        (GPTBigCodeConfig(n_layer=3, n_embd=256, n_head=8, n_inner=256, vocab_size=300), 0, 3 * 2 * 32),
    ],
    ids=["latents", "states", "linear attention", "both in a layer", "shared layers", "one head"],
)
def test_what_a_sequence_has_in_a_cache(config: PretrainedConfig, states: int, per_token: int) -> None:
    # Trap: states that are left out are as large as hundreds of tokens, and the batch of a sampler is cut by them
    assert cached_bytes(config, 2) == (2 * states, 2 * per_token)
    assert sequence_bytes(config, 100, 2) == 2 * states + 200 * per_token


@pytest.mark.needs_vllm
def test_a_cache_of_vllm_has_room_for_its_own_blocks() -> None:
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    latents = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=512 + 64, dtype=torch.bfloat16)
    deepseek = DeepseekV3Config(num_hidden_layers=2, n_routed_experts=8, n_group=2)
    assert sequence_bytes(deepseek, 16, 2, vllm=True) == 2 * latents.page_size_bytes
    inputs, state = MambaStateShapeCalculator.mamba2_state_shape(
        tp_world_size=1,
        intermediate_size=128 * 64,
        n_groups=8,
        num_heads=128,
        head_dim=64,
        state_size=128,
        conv_kernel=4,
    )
    page = 2 * math.prod(inputs) + 4 * math.prod(state)
    # a state and that of a prefix in two layers; the attention's blocks have its size
    attention = -(-1000 * 2 * 2 * 8 * 128 // page) * page
    needed, planned = 2 * 2 * page + attention, sequence_bytes(NEMOTRON, 1000, 2, vllm=True)
    assert needed <= planned < 1.5 * needed


MIXTURE = Qwen3MoeConfig(
    num_hidden_layers=2,
    hidden_size=256,
    intermediate_size=768,
    moe_intermediate_size=96,
    num_experts=16,
    num_experts_per_tok=8,
    num_attention_heads=8,
    num_key_value_heads=1,
    vocab_size=300,
)


@pytest.mark.parametrize(("config", "most"), [(PRESETS["tiny"], 1.1), (MIXTURE, 1.2)], ids=["dense", "experts"])
def test_activations_are_those_of_a_real_pass(config: PretrainedConfig, most: float) -> None:
    model = AutoModelForCausalLM.from_config(config)
    weights, saved = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=torch.zeros(1, 48, dtype=torch.long), use_cache=False)
    fixed, per_token = saved_bytes(config, None, torch.float32)
    # a fake pass builds the mask that a real one leaves out, and repeats the keys for it; and it takes what is fp32
    # beside experts of bf16 for twice its size
    assert 1 <= (fixed + 48 * per_token) / sum(saved.values()) < most
    del output


def kept_by_a_pass(config: PretrainedConfig, tokens: int) -> int:
    """Bytes."""
    model, saved = new_model(config), dict[int, int]()
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    del output  # kept until here
    return sum(saved.values())


# Trap: scores of all pairs, which few tokens do not show: a row of 4,096 takes eight times what it seems to.
@pytest.mark.parametrize("family", ["Gemma 2", "gpt-oss", "Llama 3"])
def test_scores_of_all_pairs_are_planned_where_a_kernel_keeps_them(family: str) -> None:
    config, tokens = FAMILIES[family](), 1024
    config.max_position_embeddings = tokens
    run = PlannedRun(config, BackendConfig(micro_batch_tokens=tokens), None, CPU, tokens)
    parts = run.plan.training
    assert any(name.startswith("scores of all pairs of 1024 tokens") for name in parts) == (family != "Llama 3")
    planned_bytes = sum(size for name, size in parts.items() if name.startswith(("activations", "scores")))
    assert 0.8 < planned_bytes / kept_by_a_pass(config, tokens) < 1.7
    lean = replace(run, backend=BackendConfig(micro_batch_tokens=tokens, gradient_checkpointing=True))
    assert run._scores(tokens) == config.num_hidden_layers * lean._scores(tokens)


def test_a_run_that_does_not_fit_says_by_how_much_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    run = half_b()
    check_fits(run, "m", 80 * GIB)
    assert not capsys.readouterr().out
    check_fits(run, "m", 20 * GIB)
    says = capsys.readouterr().out
    assert "'m' needs" in says and "20.0 GiB of memory are free" in says and "too few" in says
    option = next(word for word in says.split() if word.startswith("backend.")).removeprefix("backend.").split("=")
    value = int(option[1]) if option[1].isdigit() else option[1]
    assert half_b(None, **{option[0]: value}).plan.peak <= 20 * GIB
    with pytest.raises(
        ModelError, match=r"'m' needs .* 12\.0 GiB of memory are free: .* too few\. It fits with backend"
    ):
        check_fits(run, "m", 12 * GIB)
    with pytest.raises(ModelError, match=r"An adapter fits: lora_rank=32"):
        check_fits(run, "m", 6 * GIB)
    with pytest.raises(ModelError, match=r"Take a smaller model.*, or free memory: ") as refused:
        check_fits(run, "m", GIB)
    # Trap: what it needs as it stands is several times what it could do with
    least = float(str(refused.value).partition("free memory: ")[2].split()[0])
    assert run.that_fits(int((least - 0.1) * GIB)) is None and run.that_fits(int((least + 0.1) * GIB))
    assert least < run.plan.peak / GIB / 2


def test_the_run_and_the_trainer_check_before_they_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import posttrain.backend.memory_plan as memory_plan
    from posttrain.backend.trainer import Trainer

    monkeypatch.setattr(memory_plan, "free_bytes", lambda device: GIB)
    monkeypatch.setattr("posttrain.backend.trainer.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ModelError, match="too few"):
        Trainer(HALF_B, BackendConfig())
    config = posttrain.preflight.Config(model_name=HALF_B, free_gb=16.0, backend=BackendConfig(max_length=512))
    posttrain.preflight.main(config)
    says = capsys.readouterr().out
    assert "moments, fp32" in says and "It fits with backend." in says and "tokens/s" in says
    posttrain.preflight.main(chz.replace(config, free_gb=100.0))
    assert "to spare" in capsys.readouterr().out


def test_free_memory_of_this_machine_is_a_number() -> None:
    assert 0 < free_bytes(CPU) < 2**50


def test_a_model_whose_code_reads_numbers_is_estimated() -> None:
    for family in ("Phi 4-mini", "Qwen 3-MoE", "GPT-2"):
        fixed, per_token = saved_bytes(FAMILIES[family](), None, torch.float32)
        assert fixed >= 0 and per_token > 0, family


def test_planned_reads_the_config_only() -> None:
    assert planned("tiny", BackendConfig(), None).size.layers == 4


def says(options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `python -m posttrain.preflight OPTIONS` prints."""
    monkeypatch.setattr(posttrain.preflight, "tokens_per_second", lambda run: 1.0)
    posttrain.preflight.main(parse(posttrain.preflight.Config, options))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model_name="], "model_name is empty: give a preset"),
        (["model_name=tiny", "lora_rank=999"], "more than the hidden size of 'tiny', 128"),
        (["model_name=tiny", "backend.sleep_while_training=true"], "needs backend.engine=vllm on a GPU"),
    ],
)
def test_preflight_refuses_what_a_run_would(options: list[str], message: str) -> None:
    with pytest.raises(CookbookError, match=message):
        posttrain.preflight.planned_run(parse(posttrain.preflight.Config, options))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "t5 is not a causal language model"),
        (PaliGemmaConfig(), "reads pictures besides text"),
        (PRESETS["tiny"], "is a scalar model: plan its base model"),
    ],
)
def test_preflight_refuses_models_that_cannot_be_opened(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    if "scalar" in message:
        (tmp_path / SCALAR_HEAD_FILE).touch()
    with pytest.raises(ModelError, match=message):
        posttrain.preflight.planned_run(posttrain.preflight.Config(model_name=str(tmp_path)))


def test_preflight_says_what_the_table_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half_b = [f"model_name={HALF_B}", "free_gb=24", "backend.engine=torch"]
    long = says([*half_b, "backend.max_length=32768"], capsys, monkeypatch)
    assert "one of all 32768 tokens of the context is a micro-batch of its own" in long
    assert "micro-batch of its own" not in says([*half_b, "backend.max_length=512"], capsys, monkeypatch)
    cached = says([*half_b[:2], "backend.engine=vllm", "backend.sampler_memory_gb=90"], capsys, monkeypatch)
    assert "With backend.sampler_memory_gb=1: " in cached and cached.count("It fits with") == 1
    adapted = says([*half_b, "lora_rank=8", "reference=true"], capsys, monkeypatch)
    assert "leave out reference=true" in adapted
    full, part = (says([*half_b, *more], capsys, monkeypatch) for more in ([], ["backend.trainer_processes=4"]))
    assert "each of 4 training processes" in part and "moments, fp32" in full
    moments = [
        float(line.split()[-1]) for out in (full, part) for line in out.splitlines() if line.startswith("moments")
    ]
    assert moments[0] == pytest.approx(4 * moments[1], abs=0.02)
