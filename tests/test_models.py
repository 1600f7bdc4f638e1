"""Opening models: damaged, foreign and unreachable ones are refused in one line; what the config
says of context and end tokens counts.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    Glm4MoeConfig,
    PaliGemmaConfig,
    PhiConfig,
    Qwen2Config,
    T5Config,
)

from posttrain.backend.config import BackendConfig
from posttrain.backend.data_checks import not_finite
from posttrain.backend.errors import CheckpointError, ConfigError, LogprobGapError, ModelError
from posttrain.backend.logprobs import PLAIN, LogitTransform
from posttrain.backend.merged_lora import base_weights
from posttrain.backend.model_checks import alone, row_check_data, row_gap
from posttrain.backend.models import PRESETS, context_length, load_model, model_config, new_model
from posttrain.backend.random_state import drawn_from
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import character_tokenizer, load_tokenizer
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from posttrain.backend.weight_copies import SampledModel
from tests.architectures import CONTEXT, FAMILIES, save_random_model
from tests.conftest import random_tokens, rounded

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0.mlp.up_proj.weight"


def with_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def with_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a layer more in the config": (with_config(num_hidden_layers=3), "lack tensors"),
    "a layer less in the config": (with_config(num_hidden_layers=1), "does not ask for"),
    "another width": (with_config(intermediate_size=128), "differ in shapes"),
    "a missing tensor": (with_tensors(lambda tensors: tensors.pop(LAYER)), LAYER),
    "one too many": (with_tensors(lambda tensors: tensors.update(more=torch.zeros(2))), "such as more"),
    "another shape": (with_tensors(lambda tensors: tensors.update({LAYER: torch.zeros(3, 2)})), LAYER),
    "names of a wrapper": (
        with_tensors(lambda tensors: tensors.update({f"_orig_mod.{name}": tensors.pop(name) for name in [*tensors]})),
        "they hold others, such as _orig_mod.lm_head.weight): it was saved inside torch.compile: save model._orig_mod",
    ),
    "a value head": (with_tensors(lambda tensors: tensors.update({"v_head.summary.weight": torch.zeros(1)})), "TRL's"),
    "a reward model": (
        lambda folder: AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder),
        "such as score.weight): it is a reward model or a classifier of transformers",
    ),
    "a pointer of Git LFS": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "run `git lfs pull`"),
    "a pointer for a config": (lambda folder: (folder / "config.json").write_text(POINTER), "run `git lfs pull`"),
    "an empty older file": (lambda folder: as_older_file(folder).write_bytes(b""), "pytorch_model.bin is damaged"),
    "code in an older file": (lambda folder: torch.save(Harmful(), as_older_file(folder)), "is not loaded"),
    "an adapter beside the model": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "a whole model and an adapter",
    ),
    "quantised by MLX": (with_config(quantization={"group_size": 64, "bits": 4}), "has quantised weights"),
    "code of its own": (
        with_config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"}),
        "it needs code of its own",
    ),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), "SafetensorError"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "DeepSpeed's": (lambda folder: in_format(folder, "zero_to_fp32.py"), "run `python zero_to_fp32.py . ."),
    "FSDP's": (lambda folder: in_format(folder, "pytorch_model_fsdp_0/__0_0.distcp"), "`accelerate merge-weights`"),
    "GGUF": (lambda folder: in_format(folder, "model-Q4_K_M.gguf"), "quantised weights (GGUF"),
    "no index": (lambda folder: in_format(folder, "model-00001-of-00002.safetensors"), "shards without model.safe"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
    "truncated config": (lambda folder: truncate(folder / "config.json"), "config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "an unknown architecture": (with_config(model_type="zebra"), "architecture 'zebra' is unknown to transformers"),
    "an impossible config": (with_config(num_attention_heads="many"), "num_attention_heads"),
    "an encoder": (lambda folder: T5Config().save_pretrained(folder), "not a causal language model"),
    "quantised": (with_config(quantization_config={"quant_method": "awq"}), "has quantised weights (awq)"),
    "pictures too": (lambda folder: PaliGemmaConfig().save_pretrained(folder), "reads pictures besides text, and"),
}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("code of a stranger runs",)


def as_older_file(folder: Path) -> Path:
    return (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def in_format(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# Trap: random layers that train because a folder lacks tensors.
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    folder = save_random_model("Llama 3", tmp_path / "model")
    change, says = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), 0, CPU, torch.float32)
    assert says in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


# Trap: transformers asks in the terminal whether to run the code, and runs it after a "y".
def test_code_of_a_model_is_never_offered_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random_model("Llama 3", tmp_path / "model")
    (folder / "configuration_mine.py").write_text("raise SystemExit('code of a stranger runs')")
    with_config(model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"})(folder)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(ModelError, match="which this project does not run"):
        model_config(str(folder))


def test_what_may_have_been_meant_is_named(tmp_path: Path) -> None:
    folder = save_random_model("Llama 3", tmp_path / "models--me--mine" / "snapshots" / "4d7a")
    (gguf := tmp_path / "llama.cpp" / "model-Q4_K_M.gguf").parent.mkdir()
    gguf.write_bytes(b"GGUF")
    run = tmp_path / "runs" / "sft"  # its config.json has the settings of the run
    trained = save_random_model("Llama 3", run / "checkpoints" / "final")
    (run / "config.json").write_text('{"settings": {"model_name": "tiny"}}')
    for given, says in (
        (run, f"it is the folder of a run; did you mean {trained}?"),
        (folder / "config.json", "is a file: give a model's folder"),
        (folder.parent, f"did you mean {folder}?"),
        (folder.parent.parent, f"did you mean {folder}?"),
        (tmp_path, "not a Hugging Face model folder$"),
        (gguf.parent, "quantised weights .GGUF"),
    ):
        with pytest.raises(ModelError, match=says):
            model_config(str(given))


# Trap: transformers does not tie an output layer that the file has, whatever the config says; samplers did.
def test_an_output_layer_of_its_own_counts_whatever_the_config_says(tmp_path: Path) -> None:
    folder = save_random_model("Llama 3", tmp_path / "model")
    with_config(tie_word_embeddings=True)(folder)
    tokens = random_tokens(np.random.default_rng(0), 9)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([tokens])).logits[0]
    expected = logits.log_softmax(-1)[range(8), tokens[1:]].tolist()
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client(str(folder))
        saved = client.save_state("state").result().path
        for sampler in (
            service.create_sampling_client(base_model=str(folder)),
            client.save_weights_and_get_sampling_client(),
            service.create_sampling_client(model_path=saved),
        ):
            assert sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:] == pytest.approx(
                expected, abs=rounded(1e-5)
            )
        assert json.loads((Path(saved) / "config.json").read_text())["tie_word_embeddings"] is False
        tied = save_random_model("Llama 3", tmp_path / "tied")
        with_config(tie_word_embeddings=True)(tied)
        with_tensors(lambda tensors: tensors.pop("lm_head.weight"))(tied)
        with pytest.raises(CheckpointError, match="has an output layer of its own"):
            service.create_training_client(str(tied)).load_state(saved).result()


# Trap: a diverged model is evaluated, at 0, or the data or an optimizer step are blamed for it.
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "adapter"])
def test_weights_that_are_not_finite_are_named_when_they_are_opened(lora: LoraConfig | None, tmp_path: Path) -> None:
    # some models save integers, which have no norm
    assert not_finite({"ids": torch.arange(3), "weight": torch.tensor([torch.nan])}) == ["weight"]
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client("micro", lora)
        folder = Path(client.save_state("bad").result().path)
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        name = sorted(tensors)[1]
        tensors[name][0].fill_(torch.nan)
        save_file(tensors, file, {"format": "pt"})
        for opens in (
            lambda: client.load_state(str(folder)).result(),
            lambda: service.create_sampling_client(model_path=str(folder)),
            lambda: service.create_training_client_from_state(str(folder)),
            *([] if lora else [lambda: service.create_training_client(str(folder))]),
        ):
            with pytest.raises(
                (ModelError, CheckpointError), match="weights that are NaN or infinite .1 tensors, such as"
            ):
                opens()


# Trap: in an evaluation there is no trainer that would show what the sampler computes otherwise.
@pytest.mark.parametrize("alarm", ["stop", "warn"])
def test_a_sampler_that_computes_otherwise_is_found_without_a_trainer(
    alarm: Literal["stop", "warn"], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rounded_weights(source: SampledModel) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in base_weights(source.model).items():
            yield name, (1.2 * tensor if name.endswith("down_proj.weight") else tensor)

    monkeypatch.setattr(SampledModel, "sampler_weights", rounded_weights)
    with ServiceClient(BackendConfig(engine="torch", alarm=alarm)) as service:
        if alarm == "warn":
            service.create_sampling_client(base_model="tiny")
            assert "WARNING tiny: the sampler's logprobs differ" in capsys.readouterr().out
        else:
            with pytest.raises(LogprobGapError, match="tiny: the sampler's logprobs differ .*backend.engine=torch"):
                service.create_sampling_client(base_model="tiny")
            # kernels that a CPU has not are no fault of the sampler
            monkeypatch.setattr(
                "posttrain.backend.model_checks.sampler_gap", Mock(side_effect=RuntimeError("no driver"))
            )
            service.create_sampling_client(base_model="tiny")
            said = capsys.readouterr().out
            assert "not compared with transformers, which fails on a CPU (RuntimeError: no driver)" in said


# Trap: a run reads the config, for its length, before the model is opened.
def test_an_encoder_is_refused_by_its_config(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="t5 is not a causal language model"):
        model_config(str(tmp_path))


# Trap: one message for every reason.
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("...requires you to execute... set `trust_remote_code=True`..."), "code of its own"),
        (ValueError("has model type `zebra` but Transformers does not recognize"), "'zebra' is unknown"),
    ],
)
def test_each_reason_for_a_hub_model_has_its_own_line(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(path: Path, **_: Any) -> None:
        raise error

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("posttrain.backend.models.hub_folder", lambda name, weights: tmp_path)

    monkeypatch.setattr("posttrain.backend.models.AutoConfig.from_pretrained", fail)
    with pytest.raises(ModelError, match=says) as caught:
        model_config("someone/something")
    assert "\n" not in str(caught.value)


def test_names_that_are_no_hub_names_are_not_asked_for() -> None:
    for name in ("runs/x/checkpoints/final", "./x", "/no/such/folder", "~/nothing"):
        with pytest.raises(ModelError, match="there is no model folder"):
            model_config(name)


def test_the_context_ends_where_long_rope_changes_the_rotations(tmp_path: Path) -> None:
    """Beyond, the logprobs of a short row would depend on the longest one beside it."""
    folder = str(save_random_model("Phi 4-mini", tmp_path))
    assert context_length(folder) == CONTEXT // 2
    with pytest.raises(ModelError, match="LongRoPE"):
        context_length(folder, CONTEXT)


def test_every_end_token_of_both_configs_ends_an_answer(tmp_path: Path) -> None:
    folder = save_random_model("Qwen 2.5", tmp_path / "model")
    prompt = ModelInput.from_ints(random_tokens(np.random.default_rng(0), 9))
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        greedy = SamplingParams(max_tokens=8, temperature=0.0, stop=[])
        free = service.create_sampling_client(base_model=str(folder)).sample(prompt, 1, greedy).result().sequences[0]
        end = free.tokens[2]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
        client = service.create_sampling_client(base_model=str(folder))
        found = client.sample(prompt, 1, SamplingParams(max_tokens=8, temperature=0.0)).result().sequences[0]
        assert found.tokens == free.tokens[: free.tokens.index(end) + 1] and found.stop_reason == "stop"
        assert client.sample(prompt, 1, greedy).result().sequences[0].tokens == free.tokens
    # what vLLM is given
    assert load_model(str(folder), 0, CPU, torch.float32).config.eos_token_id == [1, end]


# Trap: transformers reads such a file and refuses to write it, at a run's first checkpoint.
@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"temperature": 0.9, "do_sample": False}, {"temperature": 0.9, "do_sample": True, "eos_token_id": [1, 3]}),
        ({"early_stopping": True}, {"eos_token_id": [1, 3]}),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True, "eos_token_id": [1, 3]}),
    ],
    ids=str,
)
def test_a_model_is_saved_whatever_its_generation_config(
    settings: dict[str, Any], saved: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_random_model("Qwen 3", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], **settings}))
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        path = Path(service.create_training_client(str(folder)).save_state("state").result().path)
    written = json.loads((path / "generation_config.json").read_text())
    assert {name: written[name] for name in written if name in {*settings, *saved}} == saved


# Trap: peft takes dense layers of these families for experts, and puts the adapters on those.
@pytest.mark.parametrize("kind", [Glm4MoeConfig, DeepseekV3Config])
def test_lora_beside_experts_leaves_them_alone_and_peft_reads_it(
    kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = kind(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, n_group=1,
                  num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, topk_group=1,
                  first_k_dense_replace=1, max_position_embeddings=256, vocab_size=260, kv_lora_rank=16, q_lora_rank=16,
                  qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, pad_token_id=0, eos_token_id=1)  # fmt: skip
    with drawn_from(0):
        new_model(config).save_pretrained(tmp_path / "base")
    character_tokenizer(256).save_pretrained(tmp_path / "base")
    data = [Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8], "weights": [1.0] * 3})]
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client(str(tmp_path / "base"), LoraConfig(rank=4))
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(AdamParams(learning_rate=1e-2)).result()
        trained = client.forward(data, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()
        path = client.save_state("state").result().path
        resumed = service.create_training_client_from_state_with_optimizer(path)
        assert resumed.forward(data, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist() == trained
    said = capsys.readouterr().out
    shared = any(".mlp." in name for name in load_file(f"{path}/adapter_model.safetensors"))  # before peft 0.21
    assert f"its attention, and {'layers all tokens share' if shared else 'no other layer'}" in said
    assert shared == ("no adapter on the linear layers down_proj" not in said)
    of_peft = PeftModel.from_pretrained(load_model(str(tmp_path / "base"), 0, CPU, torch.float32), path)
    logprobs = of_peft(input_ids=torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)[range(3), [6, 7, 8]]
    assert logprobs.tolist() == pytest.approx(trained, abs=rounded(1e-5))


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        PhiConfig(vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path)
    character_tokenizer(64).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bias"):
        Trainer(str(tmp_path), BackendConfig())


@pytest.mark.parametrize("family", ["Gemma 2", "Granite", "Command R"])
def test_logits_of_a_kind_that_is_not_known_are_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.backend.trainer.logit_transform", lambda config: PLAIN)
    with pytest.raises(ModelError, match="softcap"):
        Trainer(str(save_random_model(family, tmp_path)), BackendConfig())


@pytest.mark.parametrize("family", ["Qwen 3.5", "LFM 2", "Gemma 3", "Mistral, window"])
def test_a_config_that_hides_its_windows_is_found_when_the_model_is_opened(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an architecture would whose config says nothing: a shared row is compared with each
    sequence alone.
    """
    monkeypatch.setattr(
        "posttrain.backend.trainer.attention_windows", lambda config, max_length: {"full_attention": None}
    )
    trainer = Trainer(str(save_random_model(family, tmp_path)), BackendConfig())
    assert not trainer.shares_prefixes
    data_D = row_check_data(trainer.vocabulary, trainer.max_length)
    alone_D = alone(trainer, data_D)
    assert row_gap(trainer, data_D, alone_D, share=True) > 0.01
    assert row_gap(trainer, data_D, alone_D, share=False) < rounded(1e-5)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        FAMILIES, "ahead", lambda: Qwen2Config(**{**FAMILIES["Qwen 2.5"]().to_dict(), "is_causal": False})
    )
    folder = save_random_model("ahead", tmp_path)
    with pytest.raises(ModelError, match="not a causal language model as it is configured"):
        Trainer(str(folder), BackendConfig())


def test_the_check_of_the_head_allows_for_a_model_that_rounds_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the chunked logits of bf16 factors are fp32, the model's own bf16: far apart where
    logits are large.
    """

    def unrounded(hidden_NH: torch.Tensor, head_VH: torch.Tensor, transform: LogitTransform = PLAIN) -> torch.Tensor:
        return transform(hidden_NH.float() @ head_VH.float().T)

    monkeypatch.setattr("posttrain.backend.logprobs.fp32_logits", unrounded)
    monkeypatch.setattr("posttrain.backend.model_checks.LARGE_LOGITS", 80.0)
    Trainer("tiny", BackendConfig(dtype="bfloat16"))
    monkeypatch.setattr("posttrain.backend.trainer.logit_transform", lambda _: LogitTransform(softcap=50.0))
    with pytest.raises(ModelError, match="softcap"):
        Trainer("tiny", BackendConfig(dtype="bfloat16"))


def test_threads_that_open_models_at_once_get_the_weights_of_their_seeds() -> None:
    # Trap: torch's global generator belongs to the process, and its state to nobody
    def weights(seed: int) -> torch.Tensor:
        model = load_model("micro", seed, torch.device("cpu"), torch.float32)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    seeds = [0, 1, 2, 3] * 3
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(weights, seeds)]
    for seed, found in zip(seeds, together, strict=True):
        assert torch.equal(found, weights(seed))


@pytest.mark.parametrize("model_name", ["tiny", "gpt2-tiny"])
def test_a_lora_rank_above_the_hidden_size_is_refused_at_once(model_name: str, torch_service: ServiceClient) -> None:
    for create in (torch_service.create_training_client, torch_service.create_scalar_client):
        with pytest.raises(ConfigError, match="lora_rank=100000 is more than the hidden size of .*, 128"):
            create(model_name, LoraConfig(rank=100_000))


def test_a_model_folder_without_a_tokenizer_is_said_to_have_none(tmp_path: Path) -> None:
    PRESETS["micro"].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer.json, tokenizer_config.json\)"):
        load_tokenizer(str(tmp_path))
