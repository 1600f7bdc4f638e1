"""The example of docs/evaluation.md: `tiny`, trained on GSM8K and ARC-Challenge, and two of its checkpoints
evaluated on both, by the command lines.

    python -m benchmarks.evaluation_example data=../shared/data log_path=runs/evaluation_example

`data` has the folders gsm8k and arc_challenge, each with train.jsonl and test.jsonl. A killed command goes
on where it stopped.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import chz

from benchmarks.report import ROOT
from envs.arc_challenge import ANSWER_PHRASE, ArcChallenge
from envs.math_word import Gsm8k
from posttrain.backend.ranges import SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.jsonl import read_json, write_atomically
from posttrain.tracking.run_config import log_path_field
from recipes.results import write_results

EARLY, LATE = "checkpoints/000200", "checkpoints/final"
EVALUATIONS = {
    "gsm8k": "env.num_test=200 num_samples=8 max_tokens=200",
    "arc_challenge": "env.num_test=None",
}
FIGURES = {  # line of the table -> benchmark and metric
    "ARC-Challenge, greedy": ("arc_challenge", "correct"),
    "GSM8K, pass@1 of 8 samples": ("gsm8k", "correct"),
    "GSM8K, pass@8": ("gsm8k", "pass@8"),
    "GSM8K, answers in the format `####`": ("gsm8k", "format"),
}
SIDES = ("step 200", "step 600", "difference")
COLUMNS = tuple(column for side in SIDES for column in (side, f"{side}: standard error"))


@chz.chz
class Config:
    """Two checkpoints of a small model, evaluated on two benchmarks."""

    data: Path = chz.field(doc="folder of gsm8k/ and arc_challenge/")
    seed: int = chz.field(default=0, validator=SEED, doc="of weights, order and sampling")
    log_path: str = log_path_field("runs/evaluation_example")


def examples(data: Path, seed: int) -> str:
    """Worked solutions of GSM8K and letters of ARC-Challenge, in one random order, as JSONL."""
    rows = [(problem.question, problem.solution) for problem in Gsm8k(data_dir=str(data / "gsm8k")).read("train", None)]
    arc = ArcChallenge(data_dir=str(data / "arc_challenge")).read("train", None)
    rows += [(problem.question, f"{ANSWER_PHRASE} {problem.gold}.") for problem in arc]
    random.Random(seed).shuffle(rows)
    return "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows)


def main(config: Config) -> None:
    folder, data = Path(config.log_path).absolute(), config.data.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "train.jsonl", examples(data, config.seed))
    run(
        f"supervised/train_cli.py dataset=prompt_completion dataset.path={folder}/train.jsonl dataset.batch_size=16 "
        f"dataset.max_length=512 model_name=tiny learning_rate=1e-3 num_epochs=2 max_steps=600 save_every=200 "
        f"keep_checkpoints=None eval_every=0 behavior_if_log_dir_exists=resume seed={config.seed} log_path={folder}/sft"
    )
    found = {}
    for name, options in EVALUATIONS.items():
        run(
            f"-m rl.evaluate models={folder}/sft/{EARLY},{folder}/sft/{LATE} env={name.split('_')[0]} {options} "
            f"env.data_dir={data / name} seed={config.seed} log_path={folder}/{name}"
        )
        found[name] = read_json(folder / name / "results.json")
    results = {}
    for line, (name, metric) in FIGURES.items():
        sides = (*found[name]["models"], *found[name]["paired"])
        numbers = [side["metrics"][metric][number] for side in sides for number in ("mean", "stderr")]
        results |= {f"{line} | {column}": number for column, number in zip(COLUMNS, numbers, strict=True)}
    write_results(folder, results)


def run(command: str) -> None:
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)


if __name__ == "__main__":
    run_command(main, Config)
