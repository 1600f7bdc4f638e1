"""The commands as a user runs them: they learn, they leave a readable run folder, and bad input
ends in one line and exit code 2.
"""

import json
import subprocess
from pathlib import Path

import pytest

from posttrain.tracking.metrics_log import read_metrics
from tests import commands
from tests.conftest import GAP_OF_A_COMMAND, ROOT
from tests.jsonl_files import write

SFT, RL = "supervised/train_cli.py", "rl/train_cli.py"
GSM8K = [
    {"question": "Tom has 3 apples and buys 4. How many?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
    {"question": "A box holds 12 eggs. How many in 3?", "answer": "12*3=<<12*3=36>>36\n#### 36"},
    {"question": "Ann ran 5 km on 2 days. How far?", "answer": "5*2=<<5*2=10>>10\n#### 10"},
    {"question": "Half of 18?", "answer": "18/2=<<18/2=9>>9\n#### 9"},
    {"question": "Half of 20?", "answer": "20/2=<<20/2=10>>10\n#### 10"},
]


def run(*arguments: str, cwd: Path = ROOT, rendered: bool = False) -> "subprocess.CompletedProcess[str]":
    script, *options = arguments
    command = ["-m", script] if not script.endswith(".py") else [str(ROOT / script)]
    return commands.run(*command, *options, cwd=cwd, rendered=rendered)


def succeeds(*arguments: str, cwd: Path = ROOT, rendered: bool = False) -> str:
    result = run(*arguments, cwd=cwd, rendered=rendered)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.needs_vllm
def test_warm_start_then_rl_by_vllm_learns_one_digit_sums(tmp_path: Path) -> None:
    task = ["num_digits=1", "operators=+-", "num_test=20"]
    sft = [f"dataset.{option}" for option in task]
    succeeds(
        SFT, *sft, "renderer_name=plain", "learning_rate=2e-3", "dataset.n_batches=45", f"log_path={tmp_path / 'sft'}"
    )
    nll = [record["train_mean_nll"] for record in read_metrics(tmp_path / "sft") if "train_mean_nll" in record]
    assert nll[-1] < 0.5 * nll[0]
    rl = [f"env.{option}" for option in task]
    output = succeeds(
        RL, *rl, "renderer_name=plain", f"load_checkpoint_path={tmp_path / 'sft/checkpoints/final'}", "backend.engine=vllm",
        "max_tokens=4", "learning_rate=3e-4", "env.n_batches=60", "groups_per_batch=32", "advantage=rloo", f"log_path={tmp_path / 'rl'}",
        rendered=True,
    )  # fmt: skip
    metrics = read_metrics(tmp_path / "rl")
    reward = [record["env/all/reward/total"] for record in metrics if "env/all/reward/total" in record]
    assert sum(reward[:5]) / 5 < 0.75 and sum(reward[-5:]) / 5 > 0.9, reward
    assert all(
        record["optim/logprob_gap_mean"] < GAP_OF_A_COMMAND for record in metrics if "optim/logprob_gap_mean" in record
    )
    assert all(
        record["optim/probe_logprob_gap"] < GAP_OF_A_COMMAND
        for record in metrics
        if "optim/probe_logprob_gap" in record
    )
    assert "plot:" in output and (tmp_path / "rl/plots/run.png").stat().st_size > 10_000
    page = (tmp_path / "rl/transcripts/000000.html").read_text()
    assert "gold" in page and "<html" in page
    config = json.loads((tmp_path / "rl/config.json").read_text())
    assert config["env"]["class"] == "envs.arithmetic:ArithmeticBuilder" and config["advantage"]["class"].endswith(
        "LeaveOneOut"
    )


def test_gsm8k_files_train_supervised_and_by_rl(tmp_path: Path) -> None:
    for split, rows in (("train", GSM8K[:4]), ("test", GSM8K[4:])):
        write(tmp_path / f"{split}.jsonl", *rows)
    output = succeeds(
        SFT, "dataset=gsm8k", f"dataset.path={tmp_path / 'train.jsonl'}", f"dataset.test_path={tmp_path / 'test.jsonl'}", "batch_size=2",
        "num_epochs=3", "log_path=sft", cwd=tmp_path,
    )  # fmt: skip
    assert "4 examples" in output and len(read_metrics(tmp_path / "sft")) == 7
    succeeds(
        "rl.train_cli", "env=gsm8k", f"env.data_dir={tmp_path}", f"load_checkpoint_path={tmp_path / 'sft/checkpoints/final'}", "group_size=2",
        "groups_per_batch=2", "max_tokens=16", "backend.engine=torch", f"log_path={tmp_path / 'rl'}",
    )  # fmt: skip
    assert {"env/all/correct", "env/all/truncated"} <= read_metrics(tmp_path / "rl")[0].keys()


# One of each place where a command may find a mistake; the others of each place have tests beside its code.
BAD_INPUT = {
    "misspelt option": ([RL, "group_szie=4"], "did you mean group_size"),
    "unknown preset": ([RL, "model_name=tinny"], "did you mean 'tiny'"),
    "rloo alone": ([RL, "advantage=rloo", "group_size=1"], "group_size >= 2"),
    "context too long": ([RL, "backend.max_length=100000"], "512 tokens of context"),
    "malformed line": ([SFT, "dataset={tmp}/bad.jsonl"], "bad.jsonl:2"),
    "existing run": ([SFT, "log_path={tmp}/old"], "already holds a run"),
    "checkpoint of another model": (
        [SFT, "model_name=small", "load_checkpoint_path={tmp}/checkpoint"],
        "another model",
    ),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    conversation = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    write(folder / "bad.jsonl", conversation, '{"messages": [', conversation)
    (folder / "old").mkdir()
    (folder / "old" / "metrics.jsonl").write_text("")
    (folder / "old" / "config.json").write_text("{}")
    from posttrain.backend.models import PRESETS
    from posttrain.backend.tokenizers import character_tokenizer

    PRESETS["tiny"].save_pretrained(folder / "checkpoint")
    character_tokenizer(512).save_pretrained(folder / "checkpoint")
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line(case: str, bad_files: Path) -> None:
    arguments, says = BAD_INPUT[case]
    filled = [argument.replace("{tmp}", str(bad_files)) for argument in arguments]
    if not any(argument.startswith("log_path") for argument in filled):
        filled.append(f"log_path={bad_files / case.replace(' ', '_')}")
    result = run(*filled, cwd=bad_files)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert lines[-1].startswith("error: ") and says in lines[-1], result.stderr


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("supervised.train_cli", ["dataset.n_batches=9", "lr_schedule=constant"]),
        ("supervised.train_cli", ["dataset.n_batches=9", "lr_schedule=constant", "lora_rank=4"]),
        ("rl.train_cli", ["env=arithmetic", "env.n_batches=9", "groups_per_batch=4", "group_size=4", "max_tokens=4"]),
    ],
    ids=["sft", "sft-lora", "rl"],
)
def test_a_run_that_diverges_saves_nothing_and_leaves_the_data(script: str, options: list[str], tmp_path: Path) -> None:
    """Every option is within its range; weights grow by 1e9 at each step."""
    shared = ["model_name=micro", "renderer_name=plain", "backend.engine=torch", "eval_every=0", "save_every=9"]
    diverging = ["learning_rate=1", "weight_decay=1e9", f"log_path={tmp_path / 'run'}"]
    result = run(script, *options, *shared, *diverging)
    (file,) = (tmp_path / "run").glob("nonfinite_*.jsonl")
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: step ") and str(file) in last, result.stderr
    assert "Traceback" not in result.stderr and json.loads(file.read_text().splitlines()[0])["tokens"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and len(read_metrics(tmp_path / "run")) < 9


def test_help_is_readable() -> None:
    output = succeeds(RL, "--help")
    assert "env.num_digits" in output and "gsm8k" in output and "group_size" in output
    often, seldom = (
        ("\n  model_name ", "\n  learning_rate ", "\n  log_path "),
        ("\n  warmup_steps ", "\n  env.num_digits"),
    )
    assert max(map(output.index, often)) < min(map(output.index, seldom))
    assert output.index("\nenv=") < output.index("\nbackend=")
    assert max(map(len, output.splitlines())) < 260
