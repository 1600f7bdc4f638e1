"""The recipes as a user runs them: from another directory, as a file and as a module, with few
steps and the torch sampler.
"""

import asyncio
import json
import re
from pathlib import Path

import pytest

from envs.problem_env import ProblemEnv
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.metrics_log import read_metrics as metrics
from recipes.pretrained.word_sums import WordSumsBuilder
from tests import commands
from tests.conftest import GAP_OF_A_COMMAND, ROOT


def run_recipe(name: str, folder: Path, *arguments: str, as_module: bool = False) -> str:
    """What it prints. One thread, since the models are tiny and the tests' own engines have the
    others.
    """
    script = ["-m", f"recipes.{name}"] if as_module else [str(ROOT / "recipes" / f"{name}.py")]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT) if as_module else ""}
    done = commands.run(*script, *arguments, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, output: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, output)]


def test_sl_loop_learns(tmp_path):
    output = run_recipe("sl_loop", tmp_path, "steps=30", "batch_size=32", "eval_every=15", "engine=torch")
    losses = numbers(r"held-out loss ([\d.]+)", output)
    # ln 10 = 2.3 would be knowing no more than that digits follow
    assert len(losses) == 3 and losses[0] > 5 and losses[-1] < 2
    assert 0 <= numbers(r"held-out accuracy ([\d.]+)", output)[0] <= 1
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


def test_rl_loop_samples_and_trains_with_the_same_policy(tmp_path):
    small = ["warm_start_loss=10", "steps=3", "batch_size=4", "group_size=4", "eval_every=2", "engine=torch"]
    output = run_recipe("rl_loop", tmp_path, *small, as_module=True)
    assert len(numbers(r"reward ([\d.]+)", output)) == 3
    assert max(numbers(r"gap ([\d.e+-]+)", output)) < GAP_OF_A_COMMAND
    assert len(numbers(r"held-out accuracy ([\d.]+)", output)) == 3


def test_sl_basic_fills_a_run_folder(tmp_path):
    small = [
        "dataset.n_batches=6",
        "dataset.batch_size=16",
        "dataset.num_test=20",
        "eval_every=3",
        "backend.engine=torch",
    ]
    run_recipe("sl_basic", tmp_path, *small, as_module=True)
    run = tmp_path / "runs" / "sl_basic"
    assert [record["step"] for record in metrics(run)] == list(range(7))
    assert metrics(run)[-1]["test/nll"] < metrics(run)[0]["test/nll"]
    assert (run / "checkpoints" / "final" / "model.safetensors").exists() and (run / "plots" / "run.png").exists()


def test_rl_basic_warm_starts_and_then_trains(tmp_path):
    sizes = ["env.batch_size=4", "env.group_size=4", "env.n_batches=2", "env.num_test=20"]
    run_recipe("rl_basic", tmp_path, *sizes, "warm_start_steps=5", "backend.engine=torch", f"log_path={tmp_path}/rl")
    assert metrics(tmp_path / "rl_warm_start")[-1]["test/nll"] < 6
    config = json.loads((tmp_path / "rl" / "config.json").read_text())
    assert config["load_checkpoint_path"] == f"{tmp_path}/rl_warm_start/checkpoints/final"
    first, second, final = metrics(tmp_path / "rl")
    assert max(first["optim/logprob_gap_mean"], second["optim/logprob_gap_mean"]) < GAP_OF_A_COMMAND
    assert "test/env/all/correct" in first and "test/env/all/correct" in final
    assert list((tmp_path / "rl" / "transcripts").glob("*.html"))


# Trap: held-out problems that differ from a training problem in a name alone.
def test_pretrained_holds_numbers_out_and_trains_a_model_of_any_kind(tmp_path):
    renderer = get_renderer("chat_template", load_tokenizer("tiny"))
    train_set, test_set = asyncio.run(WordSumsBuilder(num_test=100, group_size=1)(renderer))
    assert test_set
    told = []
    for data in (train_set, test_set):
        groups = [group for batch in range(len(data)) for group in data.get_batch(batch)]
        envs = [env for group in groups for env in asyncio.run(group.make_envs()) if isinstance(env, ProblemEnv)]
        told.append({(e.problem.gold, *re.findall(r"gets|gives|[0-9]+", e.problem.question)) for e in envs})
    train, test = told
    assert len(test) == 100 and len(train) > 400 and not train & test
    for gold, a, kind, b in train | test:
        assert int(gold) == int(a) + (int(b) if kind == "gets" else -int(b)) > 0
    small = [
        "model_name=micro",
        "max_steps=2",
        "max_tokens=4",
        "env.batch_size=2",
        "env.group_size=2",
        "env.num_test=4",
    ]
    run_recipe("pretrained/train", tmp_path, *small, "backend.engine=torch", f"log_path={tmp_path}/run")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.slow
def test_every_algorithm_preset_takes_steps_from_one_warm_start(tmp_path):
    small = ["num_steps=2", "warm_start_nll=5", f"log_path={tmp_path}/runs"]
    output = run_recipe("algorithms/train", tmp_path, *small)
    names = re.findall(r"^(\w+) +held-out accuracy [\d.]+ -> [\d.]+$", output, flags=re.M)
    assert len(names) == 8 and {path.name for path in (tmp_path / "runs").iterdir()} == {
        *(*names, "warm_start", "compare.png", *(f"{name}.made_with.json" for name in (*names, "warm_start")))
    }
    moved = {(tmp_path / "runs" / name / "checkpoints" / "final" / "model.safetensors").read_bytes() for name in names}
    assert len(moved) >= 6, "presets that differ in nothing at the first steps may coincide"


@pytest.mark.slow
@pytest.mark.parametrize("recipe, label", [("train", "with_calculator"), ("retrieval", "with_search")])
def test_tool_calls_takes_steps_with_the_tool_and_from_memory(tmp_path, recipe, label):
    small = ["model_name=micro", "warm_start_steps=2", "num_steps=1", "env.batch_size=2", "env.num_test=4"]
    output = run_recipe(f"tool_calls/{recipe}", tmp_path, *small, f"log_path={tmp_path}/runs")
    rows = re.findall(r"^(with_\w+|from_memory), .* +[\d.]+% +[\d.]+ +(?:-|[\d.]+%) +[\d.]+%$", output, flags=re.M)
    assert rows == [label] * 2 + ["from_memory"] * 2
    assert (tmp_path / "runs" / "tool_calls.png").exists()
