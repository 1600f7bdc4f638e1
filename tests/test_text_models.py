"""Models that also read pictures, as hubs have them: their text models are opened from files of both forms of names,
and their adapters fit the whole models of other tools. All types of text models: test_every_architecture.py.
"""

# Trap: an end token, a tied output layer or a scale that the config of the whole model has, and the text model's not.

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from posttrain.backend.adapters import open_merged
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ModelError
from posttrain.backend.models import end_token_ids, load_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import character_tokenizer, load_tokenizer
from posttrain.backend.types import AdamParams, ModelInput
from posttrain.serve.bases import open_bases
from posttrain.tracking.export import Config as Export
from posttrain.tracking.export import main as export
from tests.every_architecture import random_model, save
from tests.test_architectures import datum_of, full_logprobs, of_targets

CPU, ATOL = torch.device("cpu"), 1e-4
TOKENS = list(range(20, 60))


def rewrite(folder: Path, change: Any) -> None:
    """`change`: from the tensors of a folder to others."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the names that files on the hub have to those of transformers 5."""
    names = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
    }
    return {
        next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name): tensor
        for name, tensor in tensors.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model("mistral3"), tmp_path / "model")


def opened(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), 0, CPU, torch.float32)


def test_files_of_both_forms_of_names_and_an_output_layer_of_its_own(folder: Path, tmp_path: Path) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = torch.randn_like(tensors["language_model.model.embed_tokens.weight"])
        return tensors | {"language_model.lm_head.weight": head}

    rewrite(folder, untie)
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    expected = full_logprobs(whole, TOKENS)
    assert (full_logprobs(opened(folder), TOKENS) - expected).abs().max() < ATOL
    rewrite(folder, renamed)
    assert any(name.startswith("model.language_model") for name in load_file(folder / "model.safetensors"))
    text = opened(folder)
    assert (full_logprobs(text, TOKENS) - expected).abs().max() < ATOL
    assert text.config.tie_word_embeddings is False
    text.save_pretrained(saved := save(text, tmp_path / "saved"))
    config = json.loads((saved / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["MistralForCausalLM"], "mistral")
    assert (full_logprobs(opened(saved), TOKENS) - expected).abs().max() < ATOL


def test_tensors_that_do_not_fit_the_text_model_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"language_model.model.layers.7.input_layernorm.weight": torch.ones(64)})
    with pytest.raises(ModelError, match=r"tensors that its config.json does not ask for \(1, such as model.layers.7"):
        opened(folder)
    rewrite(
        folder,
        lambda tensors: {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name},
    )
    with pytest.raises(ModelError, match="its weights lack tensors"):
        opened(folder)


def test_end_tokens_are_those_of_the_whole_model(folder: Path) -> None:
    text_config = json.loads((folder / "config.json").read_text())["text_config"] | {"eos_token_id": 7}
    edit_json(folder / "config.json", text_config=text_config, eos_token_id=[5, 6])
    edit_json(folder / "generation_config.json", eos_token_id=[6, 8])
    tokenizer: Any = load_tokenizer(str(folder))
    assert end_token_ids(opened(folder).config, tokenizer) == {5, 6, 8, tokenizer.eos_token_id}
    assert {5, 6, 8} <= {*tokenizer.answer_ends}


def test_qwen_2_5_vl_as_the_hub_has_it(tmp_path: Path) -> None:
    """Its text model's settings beside those of the pictures, its layers in `model`, its rotations of type mrope."""
    folder = save(model := random_model("qwen2_5_vl"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rotations = text.pop("rope_parameters")
    flat = {
        "rope_scaling": {"type": "mrope", "mrope_section": rotations["mrope_section"]},
        "rope_theta": rotations["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps({**text, **config, **flat}))
    for old, new in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        rewrite(folder, lambda tensors, old=old, new=new: {k.replace(old, new): v for k, v in tensors.items()})
    assert (full_logprobs(opened(folder), TOKENS) - full_logprobs(model, TOKENS)).abs().max() < ATOL


# Trap: the experts of Qwen 3-VL as the hub has them, of which transformers would make random ones.
def test_experts_that_files_have_the_other_way_round_are_turned(tmp_path: Path) -> None:
    folder = save(model := random_model("qwen3_vl_moe"), tmp_path / "model")
    rewrite(
        folder,
        lambda tensors: {
            name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
            for name, tensor in tensors.items()
        },
    )
    assert (full_logprobs(opened(folder), TOKENS) - full_logprobs(model, TOKENS)).abs().max() < ATOL


@pytest.mark.parametrize("kind", ["gemma3", "smolvlm", "qwen2_5_vl", "qwen3_vl_moe", "glm4v"])
def test_adapters_fit_the_whole_model_of_other_tools(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    folder, datum = save(model, tmp_path / "model"), datum_of(TOKENS)
    with ServiceClient(BackendConfig(engine="torch")) as service:
        client = service.create_lora_training_client(str(folder), rank=4, seed=0)
        for _ in range(2):
            client.forward_backward([datum], "cross_entropy").result()
            client.optim_step(AdamParams(learning_rate=1e-2)).result()
        trained = client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].array
        sampler = client.save_weights_and_get_sampling_client()
        sampled = sampler.compute_logprobs(ModelInput.from_ints(TOKENS)).result()[1:]
        saved = Path(client.save_state(str(tmp_path / "adapter")).result().path)
        again = service.create_training_client_from_state(str(saved))
        continued = again.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].array
    assert np.abs(of_targets(full_logprobs(model, TOKENS), datum) - trained).max() > 0.05
    adapted: Any = PeftModel.from_pretrained(model, str(saved))
    merged = open_merged(saved, 0)
    for logprobs in (
        of_targets(full_logprobs(adapted, TOKENS), datum),
        of_targets(full_logprobs(merged, TOKENS), datum),
    ):
        assert np.abs(logprobs - trained).max() < ATOL
    assert np.abs(np.array(sampled) - trained).max() < ATOL
    assert np.array_equal(continued, trained)
    for merge, line in ((False, 'base = AutoModelForMultimodalLM.from_pretrained("model")'),
                        (True, 'model = AutoModelForCausalLM.from_pretrained("out-True")')):  # fmt: skip
        out = export(Export(model=str(saved), out=str(tmp_path / f"out-{merge}"), merge=merge))
        assert line in (out / "README.md").read_text()


def test_an_adapter_of_another_tool_is_read_and_one_on_the_pictures_refused(tmp_path: Path) -> None:
    folder = save(random_model("gemma3"), tmp_path / "model")
    for name, layers in (("text", r".*language_model.*\.(q_proj|v_proj)"), ("pictures", ["q_proj"])):
        whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
        adapted: Any = get_peft_model(whole, PeftConfig(r=2, target_modules=layers, init_lora_weights=False))
        adapted.save_pretrained(tmp_path / name)
        if name == "text":
            expected = full_logprobs(adapted, TOKENS)
            assert (full_logprobs(open_merged(tmp_path / name, 0), TOKENS) - expected).abs().max() < ATOL
    with pytest.raises(CheckpointError, match="vision_tower.*is in only one of the two"):
        open_merged(tmp_path / "pictures", 0)


def test_a_model_is_served_whose_tokenizer_has_a_place_for_pictures_and_its_embedding_no_row(tmp_path: Path) -> None:
    folder, tokenizer = save(load_model("micro", 0, CPU, torch.float32), tmp_path / "model"), character_tokenizer(512)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert [*open_bases([f"it={folder}"], None)] == ["it"]
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="its tokenizer has 262 tokens, the model 260"):
        open_bases([f"it={folder}"], None)
