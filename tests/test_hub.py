"""Models and data sets of the Hugging Face hub, read from and pushed to a stand-in on the loopback
address: the commands of the pages, the cache, the revision, and one line for each fault.
"""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants

from posttrain.backend import hub as backend_hub
from posttrain.backend.adapters import read_base
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError, ModelError
from posttrain.backend.hub import hub_folder
from posttrain.backend.models import load_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import LoraConfig
from posttrain.tracking import export
from tests import commands
from tests.conftest import ROOT
from tests.stand_in_hub import TOKEN, StandInHub

CPU = torch.device("cpu")
SUMS = [
    {"question": f"What is {i} and 4?", "answer": f"{i}+4=<<{i}+4={i + 4}>>{i + 4}\n#### {i + 4}"} for i in range(40)
]
PAIRS = [
    {"prompt": f"{i}", "chosen": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}],
     "rejected": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "no"}]}
    for i in range(20)
]  # fmt: skip
# As small as a command goes; without them it is the page's.
SMALL = ["max_steps=1", "backend.engine=torch", "backend.max_length=256"]
SMALL_RL = [*SMALL, "max_tokens=8", "env.batch_size=2", "env.group_size=2", "env.num_test=2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and an adapter, as folders."""
    root = tmp_path_factory.mktemp("models")
    with ServiceClient(BackendConfig(engine="torch"), root) as service:
        full = service.create_training_client("micro", seed=1).save_weights_for_sampler("model").result().path
        adapter = service.create_training_client(full, LoraConfig(rank=4, alpha=8.0)).save_state("adapter").result()
    return {"model": Path(full), "adapter": Path(adapter.path)}


@pytest.fixture
def hub(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    """With me/model, and me/adapter on it; this process uses it, with an empty cache."""
    with StandInHub() as hub:
        hub.put("me/model", models["model"])
        adapter = {path.name: path.read_bytes() for path in models["adapter"].iterdir() if path.is_file()}
        config = json.loads(adapter["adapter_config.json"]) | {"base_model_name_or_path": "me/model"}
        adapter["adapter_config.json"] = json.dumps(config).encode()
        base = json.loads(adapter["base_model.json"]) | {"name": "me/model"}
        hub.put("me/adapter", adapter | {"base_model.json": json.dumps(base).encode()})
        use(hub, monkeypatch, tmp_path / "cache")
        yield hub
    monkeypatch.undo()
    importlib.reload(constants)


def use(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, cache: Path, offline: bool = False) -> None:
    for name, value in hub.environment(cache, offline=offline).items():
        monkeypatch.setenv(name, value)
    importlib.reload(constants)
    monkeypatch.setattr(backend_hub, "WAITS", (0, 0))
    forget()


def forget() -> None:
    """As a new process."""
    hub_folder.cache_clear()
    backend_hub._settings_folder.cache_clear()


def test_weights_are_downloaded_last_and_once(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(load_tokenizer("me/model")) == 260
    assert not any("safetensors" in request for request in hub.requests)
    expected = {
        name: tensor.clone() for name, tensor in load_model("me/model", 0, CPU, torch.float32).state_dict().items()
    }
    assert sum(request.startswith("GET") and "safetensors" in request for request in hub.requests) == 1
    hub.put("me/model", {"config.json": b"{}"})
    hub.requests.clear()
    load_model("me/model", 0, CPU, torch.float32)
    assert hub.requests == [], "all files of a process are of one commit"
    use(hub, monkeypatch, tmp_path / "cache", offline=True)
    found = load_model("me/model", 0, CPU, torch.float32).state_dict()
    assert hub.requests == [] and all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def test_a_revision_is_a_branch_or_a_commit(hub: StandInHub, models: dict[str, Path]) -> None:
    first = hub.repositories["models/me/model"].refs["main"]
    hub.put("me/model", models["model"], branch="v2")
    hub.put("me/model", {"config.json": b"{}"})
    assert hub_folder(f"me/model@{first}").name == first and hub_folder("me/model@v2").name != first
    with ServiceClient(BackendConfig(engine="torch"), models["model"].parent) as service:
        client = service.create_training_client("me/model@v2", LoraConfig(rank=2))
        path = Path(client.save_state("adapter of v2").result().path)
        config = json.loads((path / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("me/model", "v2"), "as peft reads it"
        assert read_base(path).name == "me/model@v2"
        service.create_sampling_client(str(path))
    with pytest.raises(ModelError, match="'me/model@v3' cannot be opened: its repository has no branch"):
        load_tokenizer("me/model@v3")


def test_an_adapter_of_the_hub_is_sampled_from_and_trained_on(hub: StandInHub, tmp_path: Path) -> None:
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        assert service.create_sampling_client(base_model="me/adapter").get_tokenizer().encode("1+1")
        client = service.create_training_client("me/model", LoraConfig(rank=4, alpha=8.0), seed=9)
        client.load_state("me/adapter").result()
        with pytest.raises(CheckpointError, match="no checkpoint folder me/none, and as a name of the hub 'me/none'"):
            client.load_state("me/none").result()
    with pytest.raises(ModelError, match=r"me/adapter is a LoRA adapter.*model_name=me/model lora_rank=4 lora_alpha=8"):
        load_model("me/adapter", 0, CPU, torch.float32)


def test_each_fault_has_its_own_line(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(name: str, says: str) -> None:
        forget()
        with pytest.raises(ModelError, match=says) as caught:
            load_model(name, 0, CPU, torch.float32)
        assert "\n" not in str(caught.value)

    fails("me/nothing", "no public repository of this name")
    fails("me/no thing", "no public repository of this name")
    hub.put("me/empty", {"README.md": b""})
    fails("me/empty", "lacks a file that is needed")
    hub.put("me/gated", {"config.json": b"{}"})
    hub.repositories["models/me/gated"].gated = True
    fails("me/gated", "its repository is gated: accept its terms")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fails("me/gated", "its repository is gated: accept its terms")
    hub.statuses["/api/models/me/model/revision/main"] = [503] * 9
    fails("me/model", "answered with the error 503; try again later")
    assert len(hub.statuses["/api/models/me/model/revision/main"]) == 6, "three tries"
    hub.statuses.clear()
    use(hub, monkeypatch, tmp_path / "other", offline=True)
    fails("me/model", "not whole, in the local cache, and the Hugging Face hub was not reached")
    hub.url = "http://127.0.0.1:9"
    use(hub, monkeypatch, tmp_path / "other")
    fails("me/model", "not whole, in the local cache, and the Hugging Face hub was not reached")


def test_a_bad_line_is_tried_again(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.statuses["/api/models/me/model/revision/main"] = [503]
    hub.cuts["model.safetensors"] = 3
    load_model("me/model", 0, CPU, torch.float32)
    assert hub.cuts["model.safetensors"] == 0
    use(hub, monkeypatch, tmp_path / "other")
    hub.cuts["model.safetensors"] = 10**6
    with pytest.raises(ModelError, match="was interrupted: the same command goes on from there"):
        load_model("me/model", 0, CPU, torch.float32)
    use(hub, monkeypatch, tmp_path / "other", offline=True)
    with pytest.raises(ModelError, match="not, or not whole, in the local cache, and the Hugging Face hub was"):
        load_model("me/model", 0, CPU, torch.float32)


def test_a_model_is_pushed_and_read_back(
    hub: StandInHub, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def push(name: str, out: str) -> None:
        export.main(export.Config(model=str(models["model"]), push_to=name, out=str(tmp_path / out)))

    for token in ("", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            ConfigError, match="push_to=me/new: the Hugging Face hub needs a login.*; nothing was written"
        ):
            push("me/new", "pushed")
    assert not (tmp_path / "pushed").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push("me/new", "pushed")
    weights = (models["model"] / "model.safetensors").read_bytes()
    assert hub.files("me/new")["model.safetensors"] == weights and b"# me/new" in hub.files("me/new")["README.md"]
    assert hub.repositories["models/me/new"].private
    with pytest.raises(ConfigError, match="the repository exists already, and nothing is overwritten"):
        push("me/new", "again")
    assert not (tmp_path / "again").exists()
    hub.statuses["/commit/main"] = [403]
    with pytest.raises(
        ConfigError, match="is written, but could not be pushed to me/other: .* error 403. Later: hf upload"
    ):
        push("me/other", "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights
    assert len(load_tokenizer("me/new")) == 260
    use(hub, monkeypatch, tmp_path / "other")
    with pytest.raises(ModelError, match="no public repository"):
        load_tokenizer("me/new")
    hub.url = "http://127.0.0.1:9"
    use(hub, monkeypatch, tmp_path / "other")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="push_to=me/third: the Hugging Face hub was not reached"):
        push("me/third", "third")


# --- commands -----------------------------------------------------------------------------------


def of_page(page: str, *words: str) -> list[str]:
    """The arguments of the command of a page that has all these words."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    lines = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    (command,) = {line for line in lines if all(word in line.split() for word in words)}
    return command.removeprefix("python ").split()


def succeeds(
    hub: StandInHub, cwd: Path, command: list[str], typed: str = "", offline: bool = False, token: str = ""
) -> str:
    environment = hub.environment(cwd / "cache", token, offline)
    result = commands.run(*command, cwd=cwd, env={"PYTHONPATH": str(ROOT), **environment}, typed=typed)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fails(hub: StandInHub, cwd: Path, command: list[str], **environment: str) -> str:
    environment = {"PYTHONPATH": str(ROOT), **hub.environment(cwd / "cache"), **environment}
    result = commands.run(*command, cwd=cwd, env=environment)
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and line.startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    return line


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict], file: Path) -> bytes:
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file.read_bytes()


@pytest.mark.slow
def test_the_commands_of_the_pages(hub: StandInHub, models: dict[str, Path], tmp_path: Path) -> None:
    card = "configs: [{config_name: main, data_files: [{split: train, path: main/train*}, {split: test, path: main/test*}]}]"
    files = {"main/train.parquet": SUMS[:30], "main/test.parquet": SUMS[30:]}
    hub.put("openai/gsm8k", {path: parquet(rows, tmp_path / "rows") for path, rows in files.items()}
            | {"README.md": f"---\n{card}\n---\n".encode()}, "datasets")  # fmt: skip
    pairs = {f"data/{split}-00000-of-00001.jsonl": jsonl(PAIRS) for split in ("train_prefs", "test_prefs")}
    pairs["data/test_prefs-00000-of-00001.jsonl"] = jsonl(PAIRS[:2])
    hub.put("HuggingFaceH4/ultrafeedback_binarized", pairs, "datasets")
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"):
        hub.put(name, models["model"])
    rl = [str(ROOT / "rl/train_cli.py"), *of_page("README.md", "env=gsm8k", "max_tokens=400")[1:], *SMALL_RL]
    succeeds(hub, tmp_path, [*rl, "log_path=rl"])
    hub.requests.clear()
    succeeds(hub, tmp_path, [*rl, "log_path=again"], offline=True)
    lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("rl", "again")]
    assert lines[0][0]["env/all/reward/total"] == lines[1][0]["env/all/reward/total"] and hub.requests == []

    lora = of_page("docs/command_line.md", "env=gsm8k", "lora_rank=32")
    succeeds(hub, tmp_path, ["-m", "rl.train_cli", *lora[1:], *SMALL_RL, "log_path=lora"])
    preference = of_page("recipes/dpo/README.md", "dataset=ultrafeedback", "lora_rank=32")
    succeeds(hub, tmp_path, ["-m", "preference.train_cli", *preference[1:], *SMALL, "log_path=dpo"])
    hub.put("me/lora", tmp_path / "lora/checkpoints/final")
    # a warm start from an adapter of the hub, an evaluation of it, and a talk to it
    succeeds(
        hub, tmp_path, ["-m", "rl.train_cli", *lora[1:], *SMALL_RL, "load_checkpoint_path=me/lora", "log_path=warm"]
    )
    evaluation = ["-m", "rl.evaluate", "models=Qwen/Qwen2.5-1.5B-Instruct,me/lora", "env=gsm8k", "log_path=eval"]
    table = succeeds(hub, tmp_path, [*evaluation, *SMALL_RL[1:4], "env.num_test=3"])
    assert "Qwen--Qwen2.5-1.5B-Instruct" in table and "me--lora" in table
    chat = ["-m", "posttrain.serve.chat", "me/lora", "max_tokens=4", "seed=0", "backend.engine=torch"]
    assert "[cut off after 4 tokens]" in succeeds(hub, tmp_path, chat, typed="Hello\n")


@pytest.mark.slow
def test_each_fault_of_a_data_set_has_its_own_line(hub: StandInHub, tmp_path: Path) -> None:
    read = ["-m", "supervised.train_cli", "dataset=no_robots", "model_name=micro", "log_path=sft"]
    assert "'HuggingFaceH4/no_robots', split 'train', could not be loaded: the Hugging Face hub has no public" in (
        fails(hub, tmp_path, read)
    )
    assert "not whole, in the local cache, and the Hugging Face hub was not reached" in (
        fails(hub, tmp_path, read, HF_ENDPOINT="http://127.0.0.1:9")
    )
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    hub.put("HuggingFaceH4/no_robots", {"data/train-00000-of-00001.jsonl": jsonl([chat] * 4)}, "datasets")
    assert "split 'test', could not be loaded: " in fails(hub, tmp_path, read)
    hub.repositories["datasets/HuggingFaceH4/no_robots"].gated = True
    empty = dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"), str(tmp_path / "other"))
    assert "its repository is gated" in fails(hub, tmp_path, read, **empty)
