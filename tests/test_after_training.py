"""After training: what posttrain-export writes loads elsewhere and computes the same; what
posttrain-runs lists, compares and deletes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError, ModelError
from posttrain.backend.models import read_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, LoraConfig
from posttrain.tracking import export, runs
from posttrain.tracking.run_folder import RunFolder
from tests import commands
from tests.architectures import save_random_model
from tests.conftest import policy_data, rounded
from tests.jsonl_files import write
from tests.test_scalar_model import scalar_data, scalars, train

TOKENS = torch.tensor([[5, 9, 77, 30, 8]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A run with two checkpoints, and a run of an adapter, trained a step each."""
    root = tmp_path_factory.mktemp("runs")
    with ServiceClient(BackendConfig(engine="torch"), root) as service:
        for name, lora in (("full", None), ("adapter", LoraConfig(rank=4, seed=1))):
            client = service.create_training_client("micro", lora, seed=2)
            for checkpoint in ("000001", "final"):
                client.forward_backward(policy_data(4), "importance_sampling").result()
                client.optim_step(AdamParams(1e-2)).result()
                client.save_state(f"{name}/checkpoints/{checkpoint}").result()
    for name in ("full", "adapter"):
        run(root / name, {"000001": 1, "final": 2}, model_name="micro", renderer_name="plain")
    yield {"root": root, "full": root / "full", "adapter": root / "adapter"}


def run(path: Path, checkpoints: dict[str, int], values: tuple[float, ...] = (0.1, 0.5, 0.3), **settings: Any) -> None:
    """The files of a run; an evaluation before each step."""
    for name in checkpoints:
        (path / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
    records = [{"step": step, "test/env/all/correct": value} for step, value in enumerate(values)]
    write(path / "metrics.jsonl", *records)
    write(
        path / "checkpoints.jsonl",
        *({"name": n, "step": s, "path": f"checkpoints/{n}"} for n, s in checkpoints.items()),
    )
    settings = {"env": {"class": "envs.arithmetic:ArithmeticBuilder"}, "log_path": str(path)} | settings
    (path / "config.json").write_text(json.dumps(settings))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def exported(folders: dict[str, Path], name: str, out: Path, **options: Any) -> Path:
    return export.main(export.Config(model=str(folders[name]), out=str(out), **options))


def test_a_full_model_keeps_its_function_and_loses_its_training_state(folders: dict[str, Path], tmp_path: Path) -> None:
    out = exported(folders, "full", tmp_path / "kept")
    assert torch.equal(logits(out), logits(folders["full"] / "checkpoints/final"))
    assert not (out / "training_state").exists() and len(AutoTokenizer.from_pretrained(out)) == 260
    half = exported(folders, "full", tmp_path / "half", dtype="bfloat16")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(out / "model.safetensors").items()}
    assert all(torch.equal(rounded[name], tensor) for name, tensor in load_file(half / "model.safetensors").items())


# Trap: weights beyond 65,504, infinite in a folder that loads everywhere.
@pytest.mark.parametrize("name", ["full", "adapter"])
def test_weights_beyond_float16_are_refused(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(folders[name] / "checkpoints/final", large)
    (file,) = (large / f for f in ("model.safetensors", "adapter_model.safetensors") if (large / f).exists())
    weights = load_file(file)
    first = next(tensor for key, tensor in weights.items() if "down_proj" in key and "lora_A" not in key)
    first.view(-1)[0] = 1e6
    if name == "adapter":
        next(tensor for key, tensor in weights.items() if "down_proj.lora_A" in key).fill_(1.0)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="down_proj.* not finite in float16, which ends at .*bfloat16"):
        export.main(export.Config(model=str(large), out=str(tmp_path / "half"), dtype="float16"))
    assert not (tmp_path / "half").exists()
    export.main(export.Config(model=str(large), out=str(tmp_path / "brain"), dtype="bfloat16"))


# Trap: a folder of TRL, exported with every checkpoint in it, and its pickled settings pushed to the hub.
def test_the_training_state_of_other_trainers_stays_behind(tmp_path: Path) -> None:
    folder = save_random_model("Qwen 3", tmp_path / "trained elsewhere")
    kept = {file.name for file in folder.iterdir()} | {"additional_chat_templates", "LICENSE"}
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
        "LICENSE",
    ):
        (folder / name).write_text("")
    for name in ("checkpoint-500", "global_step500", "additional_chat_templates", "runs"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("")
    out = export.main(export.Config(model=str(folder), out=str(tmp_path / "out")))
    assert {file.name for file in out.iterdir()} == kept | {"README.md"}
    assert torch.equal(logits(out), logits(folder))


def test_an_adapter_is_merged_or_stays_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client_from_state(str(folders["adapter"] / "checkpoints/final"))
        client.save_weights_and_get_sampling_client()
        live = {name: tensor.detach().clone().cpu() for name, tensor in client._trainer.sampled.sampler_weights()}  # type: ignore[attr-defined]
    out = exported(folders, "adapter", tmp_path / "merged")
    merged = load_file(out / "model.safetensors")
    assert all(torch.allclose(live[name], tensor, atol=1e-6) for name, tensor in merged.items())
    assert not (out / "adapter_config.json").exists() and len(AutoTokenizer.from_pretrained(out)) == 260
    alone = exported(folders, "adapter", tmp_path / "alone", merge=False, dtype="float16")
    assert {tensor.dtype for tensor in load_file(alone / "adapter_model.safetensors").values()} == {torch.float16}
    card = (alone / "README.md").read_text()
    assert "library_name: peft" in card and 'PeftModel.from_pretrained(base, "alone")' in card
    assert (
        'AutoModelForCausalLM.from_pretrained("micro")' in card and "# micro is a preset of posttrain-cookbook" in card
    )


# Trap: a chat model that writes on after the end of its turn in vLLM and transformers, since its base was made for
# texts, whose generation_config.json has the end of a text alone.
@pytest.mark.parametrize("name", ["full", "adapter"])
def test_other_tools_stop_an_exported_model_at_the_end_of_a_turn(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    out = exported(folders, name, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    end_of_turn, end_of_text = tokenizer.encode("<|im_end|><|endoftext|>")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [end_of_text, end_of_turn]
    for token in (end_of_text, end_of_turn):
        others = [i for i in range(260) if i != token]
        written = model.generate(TOKENS, max_new_tokens=9, do_sample=False, suppress_tokens=others)[0]
        assert written[TOKENS.shape[1] :].tolist() == [token]


# Trap: an adapter of a reward model that is merged without its head; a card that calls it a language model.
@pytest.mark.parametrize(("lora", "merge"), [(None, True), (LoraConfig(rank=4), True), (LoraConfig(rank=4), False)])
def test_a_reward_model_is_exported_with_its_head(
    lora: LoraConfig | None, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_random_model("Llama 3", tmp_path / "base")
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_scalar_client(str(base), lora)
        train(client, range(2))
        path, expected = client.save_state("reward").result().path, scalars(client)
        out = export.main(export.Config(model=path, out=str(tmp_path / "out"), merge=merge))
        opened = service.create_scalar_client_from_state(str(out))
        assert np.allclose(scalars(opened), expected, atol=rounded(1e-6)) and expected.any()
        again = service.create_scalar_client_from_state(opened.save_state("again").result().path)
        assert np.allclose(scalars(again), expected, atol=rounded(1e-6))
        for use in (service.create_sampling_client, service.create_training_client_from_state):
            with pytest.raises((CheckpointError, ModelError), match="create_scalar_client_from_state"):
                use(str(out))
    card = (out / "README.md").read_text()
    assert "A language model" not in card and "text-generation" not in card
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], names)
    tokens = torch.tensor([scalar_data(4, 99)[0].model_input.to_ints()])
    with torch.no_grad():
        shown = names["numbers"](tokens)[0].numpy()
    assert np.allclose(shown, expected[: tokens.shape[1]], atol=rounded(1e-5))


def test_the_card_has_figures_and_no_folder_of_this_machine(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    estimate = {"mean": 0.25, "stderr": 0.0125, "problems": 9}
    results = {
        "settings": {"env": {"class": "envs.arc_challenge:ArcBuilder"}},
        "models": [{"label": "full", "problems": 9, "metrics": {"correct": estimate}}],
    }
    (tmp_path / "eval/results.json").write_text(json.dumps(results))
    out = exported(folders, "full", tmp_path / "card", evaluation=str(tmp_path / "eval"))
    card = (out / "README.md").read_text()
    assert "| test/env/all/correct | 0.3000 |" in card and "After 2 steps" in card
    assert "`ArcBuilder`, 9 problems" in card and "| correct | 0.25 ± 0.013 |" in card
    assert str(folders["root"]) not in card and '"log_path": "full"' in card and "base_model:" not in card
    middle = export.main(export.Config(model=str(folders["full"] / "checkpoints/000001"), out=str(tmp_path / "middle")))
    assert "| test/env/all/correct | 0.5000 |" in (middle / "README.md").read_text()
    with pytest.raises(ConfigError, match="evaluates full, not adapter"):
        exported(folders, "adapter", tmp_path / "no", evaluation=str(tmp_path / "eval"))
    assert not (tmp_path / "no").exists()


# Trap: transformers' own choice of a kernel, which leaves out the softcap of the scores.
def test_the_card_of_a_gemma_2_names_its_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_random_model("Gemma 2", tmp_path / "gemma")
    out = export.main(export.Config(model=str(source), out=str(tmp_path / "out")))
    snippet = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(snippet, names)
    with torch.no_grad():
        shown, right = (model(TOKENS).logits for model in (names["model"], read_model(str(source), torch.float32)))
    assert torch.equal(shown, right)
    # newer versions of transformers take it by themselves
    by_default = AutoModelForCausalLM.from_pretrained(source).config._attn_implementation
    assert torch.equal(logits(source), right) == (by_default == "eager")
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client(str(source), LoraConfig(rank=2))
        adapter = client.save_weights_for_sampler("adapter").result().path
    alone = export.main(export.Config(model=adapter, out=str(tmp_path / "alone"), merge=False))
    assert '("gemma", attn_implementation="eager")' in (alone / "README.md").read_text()


def test_exports_overwrite_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there exists already: choose another folder for out"):
        exported(folders, "full", tmp_path / "there")
    with pytest.raises(ConfigError, match="model=tiny is not a folder"):
        export.main(export.Config(model="tiny", out=str(tmp_path / "new")))
    with pytest.raises(ConfigError, match="push_to=a//b is not a repository name"):
        exported(folders, "full", tmp_path / "new", push_to="a//b")
    assert not (tmp_path / "new").exists()


# --- posttrain-runs -----------------------------------------------------------------------------


def checkpoint_names(path: Path) -> list[str]:
    return [record.name for record in RunFolder(path).list_checkpoints()]


def test_clean_keeps_the_last_the_best_and_what_others_begin_with(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path / "a", {"000000": 0, "000001": 1, "000002": 2, "000003": 3, "final": 4}, (0.1, 0.9, 0.3, 0.2, 0.5))
    run(tmp_path / "b", {"000001": 1, "000002": 2}, load_checkpoint_path=str(tmp_path / "a/checkpoints/000002"))
    runs.main(["clean", str(tmp_path)])
    assert checkpoint_names(tmp_path / "a") == ["000000", "000001", "000002", "000003", "final"]
    output = capsys.readouterr().out
    assert f"would delete {tmp_path / 'a/checkpoints/000000'}" in output and "nothing was deleted" in output
    runs.main(["clean", str(tmp_path), "delete=true"])
    assert checkpoint_names(tmp_path / "a") == ["000001", "000002", "final"]
    output = capsys.readouterr().out
    assert (
        "000001 (best test/env/all/correct 0.9000)" in output and f"000002 ({tmp_path / 'b'} begins with it)" in output
    )
    assert checkpoint_names(tmp_path / "b") == ["000001", "000002"], "the best is 000001, the last 000002"
    with pytest.raises(ConfigError, match="no metric 'test/nll' was logged there; the runs have test/env/all/correct"):
        runs.main(["clean", str(tmp_path), "metric=test/nll", "delete=true"])


# Trap: the first of hundreds of runs that died before an evaluation ends a deletion that has begun.
def test_clean_leaves_runs_without_the_metric_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in "abcd":
        run(tmp_path / name, {"000000": 0, "000001": 1, "000002": 2})
    write(tmp_path / "b/metrics.jsonl", {"step": 0, "other": 1.0})
    (tmp_path / "c/metrics.jsonl").write_text("damaged\n")
    runs.main(["clean", str(tmp_path), "metric=test/env/all/correct", "delete=true"])
    kept = {name: checkpoint_names(tmp_path / name) for name in "abcd"}
    assert kept["b"] == kept["c"] == ["000000", "000001", "000002"] and kept["a"] == kept["d"] == ["000001", "000002"]
    output = capsys.readouterr().out
    assert f"{tmp_path / 'b'}: no metric 'test/env/all/correct' was logged; left alone" in output
    assert f"{tmp_path / 'c'} is left alone" in output


def test_runs_are_not_searched_for_in_what_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "a/rl", "deep/b"):
        run(tmp_path / name, {"000001": 1})
        (tmp_path / name / "transcripts/test").mkdir(parents=True)
    seen = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(Path(path)) or scandir(path))
    assert runs.find_runs([tmp_path, tmp_path / "a"]) == [tmp_path / name for name in ("a", "a/rl", "deep/b")]
    assert len(seen) == 7 and not any({"checkpoints", "transcripts"} & {*path.parts} for path in seen)


def test_lower_is_better_for_a_loss(tmp_path: Path) -> None:
    run(tmp_path / "a", {"000000": 0, "000001": 1, "000002": 2})
    write(tmp_path / "a/metrics.jsonl", *({"step": s, "test/nll": v} for s, v in enumerate((3.0, 1.0, 2.0))))
    runs.main(["clean", str(tmp_path), "delete=true"])
    assert checkpoint_names(tmp_path / "a") == ["000001", "000002"]


@pytest.mark.slow
def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "a", {"000000": 0, "000001": 1, "000002": 2})
    code = (
        "import sys, time; from pathlib import Path; from posttrain.tracking.run_lock import lock_folder\n"
        "lock = lock_folder(Path(sys.argv[1])); Path(sys.argv[1], 'locked').touch(); time.sleep(600)"
    )
    holder = commands.Command("-c", code, tmp_path / "a")
    while not (tmp_path / "a/locked").exists():
        assert holder.poll() is None, holder.output()
    result = commands.run("-m", "posttrain.tracking.runs", "clean", tmp_path, "delete=true")
    listed = commands.run("-m", "posttrain.tracking.runs", "list", tmp_path)
    holder.kill()
    assert "is in use" in result.stdout and "running" in listed.stdout
    assert checkpoint_names(tmp_path / "a") == ["000000", "000001", "000002"]


def test_list_show_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path / "a", {"000001": 1}, learning_rate=1e-3, model_name="micro")
    run(tmp_path / "deep/b", {"final": 2}, (0.2, 0.4), learning_rate=1e-4, model_name="micro")
    runs.main(["list", str(tmp_path)])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "model", "task", "steps"]
    assert first.split()[1:6] == ["micro", "Arithmetic", "3", "test/env/all/correct", "0.3000"] and "stopped" in first
    assert second.split()[3] == "2" and second.endswith("finished")
    runs.main(["compare", str(tmp_path / "a"), str(tmp_path / "deep/b")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["test/env/all/correct", "0.3000", "0.4000"] in lines and ["learning_rate", "0.001", "0.0001"] in lines
    (tmp_path / "a/config.json").write_text("{")  # of hundreds of runs one may be damaged
    runs.main(["list", str(tmp_path)])
    head, listed, fault = capsys.readouterr().out.splitlines()
    assert listed == second and fault.startswith("not listed: ") and "config.json" in fault
    (tmp_path / "a/config.json").write_text("{}")
    runs.main(["show", str(tmp_path / "a"), "metrics=test/*"])
    assert "000001  before step 1" in capsys.readouterr().out
    for arguments, message in (
        (["compare", str(tmp_path), "metrics=nothing/*"], "no metric nothing/"),
        (["list", str(tmp_path / "none")], "no run folder"),
        (["lost"], "unknown command 'lost'; known: list, show, compare, clean"),
        (["list", "metric=x"], "list has no option 'metric'; it has none"),
        (["clean", str(tmp_path), "delete=yes"], "delete=yes must be true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.main(arguments)
