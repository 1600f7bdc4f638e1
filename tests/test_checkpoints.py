"""Checkpoints: complete or absent, exact, readable by transformers, peft and vLLM, and refused by
another model.
"""

import contextlib
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.backend import checkpoints
from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.checkpoint_files import FORMAT, read_state
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, CookbookError
from posttrain.backend.models import load_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, LoraConfig, ModelInput
from posttrain.tracking.checkpointing import Checkpointer
from posttrain.tracking.disk_space import check_disk_space
from posttrain.tracking.run_folder import open_run_folder
from tests.conftest import policy_data, rounded, trainer_of

CPU = torch.device("cpu")
TOKENS = ModelInput.from_ints([5, 6, 7, 8, 9, 30, 31])


def train(client: TrainingClient, seeds: range) -> None:
    for seed in seeds:
        client.forward_backward(policy_data(4, seed), "importance_sampling")
        client.optim_step(AdamParams(1e-3)).result()


def weights(client: TrainingClient) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer_of(client).sampled.sampler_weights()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def logprobs(client: TrainingClient) -> torch.Tensor:
    outputs = client.forward(policy_data(4), "importance_sampling").result().loss_fn_outputs
    return torch.cat([output["logprobs"].to_torch() for output in outputs])


def sampler_logprobs(service: ServiceClient, path: str) -> torch.Tensor:
    sampler = service.create_sampling_client(path)
    return torch.tensor(sampler.compute_logprobs(TOKENS).result()[1:])


@pytest.mark.parametrize("rank", [0, 4])
def test_resuming_is_bit_identical(torch_service: ServiceClient, rank: int) -> None:
    def fresh() -> TrainingClient:
        return (
            torch_service.create_lora_training_client("tiny", rank)
            if rank
            else torch_service.create_training_client("tiny")
        )

    uninterrupted, first = fresh(), fresh()
    train(uninterrupted, range(6))
    train(first, range(3))
    path = first.save_state("middle", extra={"cursor": 3}).result().path
    resumed = torch_service.create_training_client_from_state_with_optimizer(path)
    train(resumed, range(3, 6))
    assert_equal(weights(resumed), weights(uninterrupted))
    assert read_state(Path(path))["extra"] == {"cursor": 3}
    weights_only = torch_service.create_training_client_from_state(path)
    train(weights_only, range(3, 6))
    assert any(not torch.equal(t, weights(uninterrupted)[name]) for name, t in weights(weights_only).items())


def test_saved_policies_load_elsewhere(torch_service: ServiceClient) -> None:
    full, lora = torch_service.create_training_client("tiny"), torch_service.create_lora_training_client("tiny", 4)
    for client in (full, lora):
        train(client, range(2))
    tokens = torch.tensor([[5, 6, 7, 8]])
    full_path, lora_path = (
        client.save_weights_for_sampler("policy" + str(i)).result().path for i, client in enumerate((full, lora))
    )
    loaded = AutoModelForCausalLM.from_pretrained(full_path)
    ours, lora_s = (trainer_of(c).model(input_ids=tokens.to(trainer_of(c).device)).logits.cpu() for c in (full, lora))
    assert torch.allclose(loaded(tokens).logits, ours, atol=rounded(1e-5))
    assert AutoTokenizer.from_pretrained(full_path).encode("12+3") == full.get_tokenizer().encode("12+3")
    adapted = PeftModel.from_pretrained(load_model("tiny", 0, CPU, torch.float32), lora_path)
    assert torch.allclose(adapted(input_ids=tokens).logits, lora_s, atol=rounded(1e-5))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow past `limit` bytes: what a full disk looks like to each file in turn."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Trap: a checkpoint half written.
@pytest.mark.parametrize("limit", [0, 300, 5_000, 100_000])
@pytest.mark.parametrize("rank", [0, 16])
def test_a_full_disk_leaves_the_previous_checkpoint_valid(torch_service: ServiceClient, rank: int, limit: int) -> None:
    client = torch_service.create_training_client("micro", LoraConfig(rank) if rank else None)
    train(client, range(1))
    path = Path(client.save_state("last").result().path)
    before = weights(client)
    train(client, range(1))
    with full_disk(limit), pytest.raises(CheckpointError, match="untouched") as caught:
        client.save_state("last").result()
    assert "\n" not in str(caught.value)
    assert [p.name for p in path.parent.iterdir()] == ["last"], "no half-written folder may stay"
    assert_equal(weights(torch_service.create_training_client_from_state_with_optimizer(str(path))), before)


def test_a_full_disk_met_by_the_tokenizer(torch_service: ServiceClient, tmp_path: Path) -> None:
    client = torch_service.create_training_client("micro")
    with (
        full_disk(1000),
        pytest.raises(CheckpointError, match="the tokenizer: File too large"),
        atomic_folder(tmp_path / "x") as folder,
    ):
        checkpoints._save_tokenizer(trainer_of(client), client.get_tokenizer(), folder)


# Trap: one of another model.
def test_checkpoints_of_another_model_are_refused(torch_service: ServiceClient, tmp_path: Path) -> None:
    tiny = torch_service.create_training_client("tiny")
    full = tiny.save_state("tiny").result().path
    adapter = torch_service.create_lora_training_client("tiny", 4).save_state("adapter").result().path
    cases = [
        (torch_service.create_training_client("llama-tiny"), full, "another model: its model_type is qwen3"),
        (torch_service.create_training_client("small"), full, "hidden_size is 128"),
        (tiny, adapter, "LoRA adapter"),
        (torch_service.create_lora_training_client("tiny", 8), adapter, "rank"),
        (tiny, str(tmp_path / "nothing"), "no checkpoint folder"),
    ]
    for client, path, says in cases:
        with pytest.raises(CheckpointError, match=says):
            client.load_state(path).result()
    with pytest.raises(CheckpointError, match="weights only"):
        tiny.load_state_with_optimizer(tiny.save_weights_for_sampler("sampler").result().path).result()


# --- what does not fit is refused whole ---------------------------------------------------------

OPTIMIZER = "training_state/optimizer.safetensors"
NAME = "exp_avg:model.layers.0.mlp.down_proj.weight"


def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != NAME}


# Trap: an optimizer's state of another shape.
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: without(tensors), f"lacks {NAME}"),
        (lambda tensors: tensors | {"exp_avg:other": torch.zeros(2)}, "exp_avg:other"),
        (lambda tensors: tensors | {"garbage": torch.zeros(2)}, "garbage"),
        (
            lambda tensors: tensors | {NAME: tensors[NAME][:5].clone()},
            r"has shape \(5, 384\), this run needs \(128, 384\)",
        ),
        (lambda tensors: tensors | {NAME: tensors[NAME].T.contiguous()}, r"has shape \(384, 128\)"),
        (lambda tensors: tensors | {NAME.replace("exp_avg", "step"): torch.zeros(3)}, "step:.* has shape"),
    ],
)
def test_an_optimizer_that_does_not_fit_changes_nothing(
    torch_service: ServiceClient, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], says: str
) -> None:
    client = torch_service.create_training_client("micro")
    train(client, range(1))
    path = client.save_state("saved").result().path
    train(client, range(1, 2))
    before = weights(client)
    save_file(change(load_file(f"{path}/{OPTIMIZER}")), f"{path}/{OPTIMIZER}")
    with pytest.raises(CheckpointError, match=says):
        client.load_state_with_optimizer(path).result()
    assert_equal(weights(client), before)
    client.load_state(path).result()  # its weights are good


def test_moments_that_are_not_finite_are_named(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    train(client, range(1))
    path = client.save_state("saved").result().path
    saved = load_file(f"{path}/{OPTIMIZER}")
    saved[NAME][0, 0] = float("nan")
    save_file(saved, f"{path}/{OPTIMIZER}")
    with pytest.raises(CheckpointError, match=f"{OPTIMIZER} is damaged, {NAME} is NaN or infinite: copy it again"):
        client.load_state_with_optimizer(path).result()
    client.save_state("whole").result()  # and the NaN is not kept


def test_weights_that_are_not_those_of_the_config_are_refused(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    path = client.save_state("saved").result().path
    tensors = load_file(f"{path}/model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        save_file(
            {key: tensor for key, tensor in tensors.items() if key != name},
            f"{path}/model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(CheckpointError, match=f"weights lack tensors .*{name}"):
            client.load_state(path).result()
    save_file(
        tensors | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}, f"{path}/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="hold tensors that .*model.layers.7"):
        client.load_state(path).result()


# --- the folder ---------------------------------------------------------------------------------


def to_format_1(path: Path) -> None:
    """The layout of older checkpoints: all in one folder, an adapter with the config.json of its
    base and without base_model.json.
    """
    for file in (path / "training_state").iterdir():
        file.rename(path / file.name)
    (path / "training_state").rmdir()
    state = json.loads((path / "training_state.json").read_text())
    del state["format"]
    (path / "training_state.json").write_text(json.dumps(state))
    if (path / "adapter_config.json").exists():
        (path / "base_model.json").unlink()
        load_model("micro", 0, CPU, torch.float32).config.save_pretrained(path)


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpoints_of_format_1_still_load(torch_service: ServiceClient, rank: int) -> None:
    client = torch_service.create_training_client("micro", LoraConfig(rank) if rank else None, seed=2)
    train(client, range(2))
    path = Path(client.save_state("old", extra={"next_step": 2}).result().path)
    expected = sampler_logprobs(torch_service, str(path))
    to_format_1(path)
    assert read_state(path)["extra"] == {"next_step": 2}
    resumed = torch_service.create_training_client_from_state_with_optimizer(str(path))
    torch.testing.assert_close(sampler_logprobs(torch_service, str(path)), expected, rtol=0, atol=0)
    for each in (client, resumed):
        train(each, range(2, 4))
    assert_equal(weights(resumed), weights(client))
    if rank:
        with pytest.raises(CheckpointError, match="'micro' with seed 2, and this run's is 'micro' with seed 0"):
            torch_service.create_lora_training_client("micro", rank).load_state(str(path)).result()


def test_a_checkpoint_of_a_newer_version_is_refused(torch_service: ServiceClient) -> None:
    path = Path(torch_service.create_training_client("micro").save_state("new").result().path)
    file = path / "training_state" / "training_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(
        CheckpointError, match=f"newer version of this project .format {FORMAT + 1}, this one reads up to {FORMAT}"
    ):
        torch_service.create_training_client_from_state(str(path))


def test_what_is_no_checkpoint_is_told_from_where_one_is(torch_service: ServiceClient, tmp_path: Path) -> None:
    client = torch_service.create_training_client("micro")
    run = open_run_folder(tmp_path / "run", "raise", None)
    with pytest.raises(CheckpointError, match="a run's folder without a checkpoint"):
        client.load_state(str(run.path)).result()
    for name in ("000001", "final"):
        client.save_state(str(run.checkpoints / name)).result()
    final = run.checkpoints / "final"
    for path in (run.path, run.checkpoints, final / "training_state", final / "model.safetensors"):
        with pytest.raises(CheckpointError, match=f"{final}$"):
            client.load_state(str(path)).result()
        with pytest.raises(CheckpointError, match=f"{final}$"):
            torch_service.create_sampling_client(str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        client.load_state(str(tmp_path / "empty")).result()


def test_a_saved_tokenizer_has_the_models_length(tmp_path: Path) -> None:
    with ServiceClient(BackendConfig(engine="torch", max_length=64), tmp_path) as service:
        client = service.create_training_client("micro")
        path = client.save_weights_for_sampler("policy").result().path
        assert client.get_tokenizer().model_max_length == 64
    assert AutoTokenizer.from_pretrained(path).model_max_length == 512


def test_the_disk_is_checked_before_a_run(
    torch_service: ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for client in (
        torch_service.create_training_client("micro"),
        torch_service.create_lora_training_client("micro", 8),
    ):
        train(client, range(1))
        folder = Path(client.save_state("sized").result().path)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert size == pytest.approx(client.checkpoint_bytes(), rel=0.15)
    usage = SimpleNamespace(free=1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_disk_space(tmp_path, 200_000_000, {"steps": 5}, keep=3, existing=0)
    assert (
        "200 MB each, every 5 steps and at the end; the last 3 and `final` are kept; 1 GB free"
        in capsys.readouterr().out
    )
    for every, when in (
        ({"steps": 5}, "5 steps"),
        ({"steps": 0, "minutes": 0.5, "tokens": 10**7}, "0.5 minutes or 10,000,000 tokens"),
    ):
        check_disk_space(tmp_path, 400_000_000, every, keep=3, existing=0)
        printed = capsys.readouterr().out
        assert f"400 MB each, every {when}" in printed and "warning: up to 2 GB more will be needed" in printed
    check_disk_space(tmp_path, 400_000_000, {"steps": 5}, keep=3, existing=4)
    assert "warning" not in capsys.readouterr().out
    usage.free = 100_000
    run = open_run_folder(tmp_path / "run", "raise", None)
    with pytest.raises(CheckpointError, match="a checkpoint takes .* has 100 kB free: free some space"):
        Checkpointer(run, torch_service.create_training_client("micro"), 1, None).start(None)


def test_a_kill_between_a_replaced_checkpoint_and_its_record(torch_service: ServiceClient, tmp_path: Path) -> None:
    """The record says step 1, the folder holds step 2: the folder is believed."""
    client = torch_service.create_training_client("micro")
    run = open_run_folder(tmp_path / "run", "raise", None)
    Checkpointer(run, client, 0, None).save("final", 1)
    client.save_state(str(run.checkpoints / "final"), extra={"next_step": 2}).result()
    assert Checkpointer(run, client, 0, None).start(None) == 2


# Trap: a value of another kind in a file that is JSON nevertheless.
@pytest.mark.parametrize("value", [-5, "x", [1], {"a": 1}, True, 1.5])
def test_a_value_of_another_kind_is_one_line(value: object, torch_service: ServiceClient, tmp_path: Path) -> None:
    client = torch_service.create_training_client("micro", LoraConfig(2))
    run = open_run_folder(tmp_path / "run", "raise", None)
    Checkpointer(run, client, 0, None).save("final", 1)
    folder = run.checkpoints / "final"
    base = json.loads((folder / "base_model.json").read_text())
    client.save_state(str(folder), extra={"next_step": value}).result()
    with pytest.raises(CheckpointError, match="its next_step is .*, no number of steps: copy it again"):
        Checkpointer(run, client, 0, None).start(None)
    for key in ("name", "seed", "fingerprint"):
        (folder / "base_model.json").write_text(json.dumps({**base, key: value}))
        for opened in (torch_service.create_training_client_from_state, torch_service.create_sampling_client):
            with contextlib.suppress(CookbookError):  # another name or seed of the right kind may be right
                opened(str(folder))
