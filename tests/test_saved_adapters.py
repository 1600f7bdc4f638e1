"""Saved LoRA adapters: put on the base they were trained on, wherever it is held, or refused."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ModelError
from posttrain.backend.models import PRESETS, load_model, new_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import LoraConfig, ModelInput
from tests.conftest import full_logits, rounded, trainer_of
from tests.test_checkpoints import CPU, TOKENS, logprobs, sampler_logprobs, train


def adapter(service: ServiceClient, name: str = "adapter", seed: int = 0, **options: Any) -> str:
    client = service.create_lora_training_client("micro", 4, seed, **options)
    train(client, range(2))
    return client.save_state(name).result().path


# Trap: an adapter on another base, or with another alpha.
def test_an_adapter_is_put_on_the_base_it_was_trained_on(torch_service: ServiceClient) -> None:
    client = torch_service.create_lora_training_client("micro", 4, seed=3)
    train(client, range(2))
    state = client.save_state("state").result().path
    for path in (state, client.save_weights_for_sampler("policy").result().path):
        live = torch.tensor(client.save_weights_and_get_sampling_client().compute_logprobs(TOKENS).result()[1:])
        torch.testing.assert_close(sampler_logprobs(torch_service, path), live, rtol=0, atol=rounded(1e-5))
        other = torch_service.create_lora_training_client("micro", 4, seed=0)
        with pytest.raises(
            CheckpointError, match="base model 'micro' with seed 3, and this run's is 'micro' with seed 0"
        ):
            other.load_state(path).result()
    reopened = torch_service.create_training_client_from_state(state)
    assert torch.equal(logprobs(reopened), logprobs(client))


# Trap: a base that is held in bf16 in one place and in fp32 in another.
def test_an_adapter_that_was_trained_on_a_base_in_bf16_is_opened_anywhere(
    torch_service: ServiceClient, tmp_path: Path
) -> None:
    with ServiceClient(BackendConfig(engine="torch", dtype="bfloat16"), tmp_path) as half:
        client = half.create_lora_training_client("micro", 4)
        train(client, range(2))
        path = client.save_state("adapter").result().path
        trained, sampled = logprobs(client), sampler_logprobs(half, path)
        for service in (half, torch_service):
            torch.testing.assert_close(sampler_logprobs(service, path), sampled, rtol=0, atol=0.1)
            opened = service.create_training_client_from_state(path)
            torch.testing.assert_close(logprobs(opened), trained, rtol=0, atol=0.1)
    other = torch_service.create_lora_training_client("micro", 4, seed=1)
    with pytest.raises(CheckpointError, match="base model 'micro' with seed 0"):
        other.load_state(path).result()
    file = Path(path) / "base_model.json"  # as earlier versions wrote it: the part in fp32 alone
    saved = json.loads(file.read_text())
    in_fp32 = trainer_of(torch_service.create_lora_training_client("micro", 4)).base_fingerprint.partition("-")[0]
    file.write_text(json.dumps(saved | {"fingerprint": in_fp32}))
    sampler_logprobs(torch_service, path)


def test_a_base_folder_that_moved_or_changed(torch_service: ServiceClient, tmp_path: Path) -> None:
    full = torch_service.create_training_client("micro", seed=5)
    base = full.save_weights_for_sampler("base").result().path
    client = torch_service.create_lora_training_client(base, 4)
    train(client, range(2))
    path = client.save_state("adapter").result().path
    expected = sampler_logprobs(torch_service, path)
    moved = shutil.copytree(base, tmp_path / "moved")
    # the same weights under another name
    torch_service.create_lora_training_client(str(moved), 4).load_state(path).result()
    train(full, range(1))
    full.save_weights_for_sampler("base").result()
    with pytest.raises(CheckpointError, match="weights have changed since"):
        sampler_logprobs(torch_service, path)
    with pytest.raises(CheckpointError, match=f"{base}.*{base}.*with other weights"):
        torch_service.create_lora_training_client(base, 4).load_state(path).result()
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=f"the base model of the adapter {path} cannot be opened"):
        sampler_logprobs(torch_service, path)
    shutil.copytree(moved, base)
    assert torch.equal(sampler_logprobs(torch_service, path), expected)


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        ({"alpha": 4.0}, "LoRA alpha 32.*this run has 4.*set lora_alpha=32"),
        ({"rank": 8}, "LoRA rank 4, this run has 8: set lora_rank=4"),
        ({"train_mlp": False}, "adapts layers that this run does not train: .*mlp"),
        ({"train_attn": False}, "adapts layers that this run does not train: .*attn"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(torch_service: ServiceClient, ours: dict[str, Any], says: str) -> None:
    path, settings = adapter(torch_service), dict[str, Any](rank=4) | ours
    with pytest.raises(CheckpointError, match=says):
        torch_service.create_lora_training_client("micro", **settings).load_state(path).result()


def test_layers_that_an_adapter_lacks_begin_at_zero(
    torch_service: ServiceClient, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter(torch_service, train_mlp=False)
    client = torch_service.create_lora_training_client("micro", 4)
    train(client, range(1))
    client.load_state(path).result()
    assert "no adapter for 6 of the layers" in capsys.readouterr().out
    assert torch.equal(logprobs(client), logprobs(torch_service.create_training_client_from_state(path)))
    with pytest.raises(CheckpointError, match="lacks .*mlp"):
        client.load_state_with_optimizer(path).result()


def test_an_adapter_made_by_peft_is_a_start(torch_service: ServiceClient, tmp_path: Path) -> None:
    base = load_model("micro", 0, CPU, torch.float32)
    config = PeftConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = "micro"
    model.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    assert not (tmp_path / "peft" / "config.json").exists()
    expected = of_peft(model)
    client = torch_service.create_lora_training_client("micro", 8, alpha=16)
    client.load_state(str(tmp_path / "peft")).result()
    live = torch.tensor(client.save_weights_and_get_sampling_client().compute_logprobs(TOKENS).result()[1:])
    torch.testing.assert_close(live, expected, rtol=0, atol=rounded(1e-5))
    torch.testing.assert_close(
        sampler_logprobs(torch_service, str(tmp_path / "peft")), expected, rtol=0, atol=rounded(1e-5)
    )
    opened = torch_service.create_training_client_from_state(str(tmp_path / "peft"))
    assert torch.equal(logprobs(opened), logprobs(client))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for setting, says in (
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
    ):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | setting))
        with pytest.raises(CheckpointError, match=says):
            client.load_state(str(tmp_path / "peft")).result()


def of_peft(model: Any) -> torch.Tensor:
    """Logprobs of TOKENS by peft's own forward pass."""
    logprobs = full_logits(model, TOKENS.to_ints()).log_softmax(-1)
    return logprobs[:-1].gather(-1, torch.tensor(TOKENS.to_ints()[1:])[:, None])[:, 0].detach()


# Trap: peft changes the base's tensors when it opens such an adapter, under whoever else reads them.
@pytest.mark.parametrize(
    "setting", [{"init_lora_weights": "pissa"}, {"bias": "lora_only"}, {"alora_invocation_tokens": [97]}], ids=str
)
def test_an_adapter_that_is_not_plain_is_sampled_on_a_base_of_its_own(setting: dict[str, Any], tmp_path: Path) -> None:
    config = copy.deepcopy(PRESETS["micro"])
    config.attention_bias = True
    base = tmp_path / "base"
    new_model(config).save_pretrained(base)
    load_tokenizer("micro").save_pretrained(base)
    adapted: Any = get_peft_model(
        load_model(str(base), 0, CPU, torch.float32),
        PeftConfig(r=4, lora_alpha=32, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **setting),
    )
    with torch.no_grad():
        for p in (p for p in adapted.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn_like(p))
    adapted.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    with ServiceClient(BackendConfig(engine="torch", share_engines=True), tmp_path) as service:
        client = service.create_training_client(str(base), LoraConfig(rank=4))
        before = logprobs(client)
        if "alora_invocation_tokens" in setting:
            with pytest.raises(CheckpointError, match="cannot be merged into its base model: aLoRA"):
                service.create_sampling_client(model_path=str(tmp_path / "peft"))
        else:
            found = sampler_logprobs(service, str(tmp_path / "peft"))
            torch.testing.assert_close(found, of_peft(adapted), rtol=rounded(1e-5), atol=rounded(1e-4))
        with pytest.raises(CheckpointError, match=f"with {next(iter(setting))}=.*cannot be trained here"):
            client.load_state(str(tmp_path / "peft")).result()
        assert torch.equal(logprobs(client), before)
        if "bias" in setting:  # peft before 0.21
            file = tmp_path / "peft" / "adapter_model.safetensors"
            save_file({name: tensor for name, tensor in load_file(file).items() if ".bias" not in name}, file)
            with pytest.raises(CheckpointError, match="holds no bias: peft before 0.21"):
                service.create_sampling_client(model_path=str(tmp_path / "peft"))


# Trap: merged into a tied embedding, an adapter of the embedding changes the output layer too, and the reverse.
@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("shared", "copies"), [(True, False), (False, True)])
def test_an_adapter_of_the_embedding_or_the_output_layer(
    layer: str, tied: bool, shared: bool, copies: bool, tmp_path: Path
) -> None:
    """`copies`: the base's layer, too, is in the adapter, as peft writes it unless told not to."""
    base = load_model("micro", 0, CPU, torch.float32)
    if not tied:
        base.config.tie_word_embeddings = False
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.save_pretrained(tmp_path / "base")
    load_tokenizer("micro").save_pretrained(tmp_path / "base")
    model: Any = get_peft_model(base, PeftConfig(r=4, target_modules=["q_proj", layer], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    path = str(tmp_path / "peft")
    model.save_pretrained(path, save_embedding_layers=copies)
    with ServiceClient(BackendConfig(engine="torch", share_engines=shared), tmp_path) as service:
        if tied:
            with pytest.raises(CheckpointError, match="adapts the embedding or the output layer"):
                service.create_sampling_client(model_path=path)
            return
        torch.testing.assert_close(
            sampler_logprobs(service, path), of_peft(model), rtol=rounded(1e-5), atol=rounded(1e-4)
        )
        opened = service.create_training_client(str(tmp_path / "base"), LoraConfig(4, alpha=8, train_unembed=True))
        if layer == "lm_head":
            opened.load_state(path).result()
            live = opened.save_weights_and_get_sampling_client().compute_logprobs(TOKENS).result()[1:]
            torch.testing.assert_close(torch.tensor(live), of_peft(model), rtol=rounded(1e-5), atol=rounded(1e-4))
        else:
            with pytest.raises(CheckpointError, match="layers that this run does not train: .*lora_embedding_A"):
                opened.load_state(path).result()
        if copies:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if f"{layer}.base_layer" in name).mul_(1.1)
            model.save_pretrained(path, save_embedding_layers=True)
            for use in (service.create_sampling_client, lambda model_path: opened.load_state(model_path).result()):
                with pytest.raises(CheckpointError, match=rf"{layer}\.base_layer.* with other values"):
                    use(model_path=path)


def test_an_adapter_in_torchs_format_is_named(torch_service: ServiceClient) -> None:
    path = Path(adapter(torch_service))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    for use in (torch_service.create_sampling_client, torch_service.create_training_client_from_state):
        with pytest.raises(CheckpointError, match="adapter_model.bin is in torch's own format.*save it again"):
            use(str(path))


def test_an_adapter_given_as_a_model_is_named(torch_service: ServiceClient) -> None:
    path = adapter(torch_service)
    says = (
        f"is a LoRA adapter .* model_name=micro lora_rank=4 lora_alpha=.* load_checkpoint_path={path}; .*posttrain-chat"
    )
    with pytest.raises(ModelError, match=says):
        torch_service.create_training_client(path)
    prompt = ModelInput.from_ints([70, 80, 90])
    by_path, by_name = (
        torch_service.create_sampling_client(**{option: path}).compute_logprobs(prompt).result()  # type: ignore[arg-type]
        for option in ("model_path", "base_model")
    )
    assert by_path == by_name
    with pytest.raises(CheckpointError, match="holds a LoRA adapter"):
        torch_service.create_training_client("micro").load_state(path).result()
    full = torch_service.create_training_client("micro").save_state("full").result().path
    with pytest.raises(CheckpointError, match=f"give it as model_name={full}"):
        torch_service.create_lora_training_client("micro", 4).load_state(full).result()
