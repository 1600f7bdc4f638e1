"""The command of recipes/bstar, killed again and again: no finished work is done twice, and the end
is the same to the last bit.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.metrics_log import read_metrics
from recipes.bstar.records import read_candidates, read_choice, read_selection, read_summaries
from recipes.bstar.sampling import Pool, sample_pool
from recipes.bstar.sums import SumsBuilder
from recipes.bstar.train import Config, main
from tests.commands import CONTEXT

ARGUMENTS = {
    "methods": ["bstar", "rest_em"],
    "temperatures": ["0.5", "1.0"],
    "thresholds": ["-2.0", "-0.5", "0.5"],
    "warm_start_steps": 50,
    "warm_start_nll": None,
    "completer_steps": 18,
    "completer_nll": 0.1,
    "warm_start_batch_size": 16,
    "prm_solutions": 2,
    "prm_completions": 1,
    "prm_batch_size": 2,
    "prm_epochs": 1,
    "rounds": 2,
    "samples": 3,
    "per_query": 2.0,
    "steps": 20,
    "batch_size": 4,
    "save_every": 18,
    "eval_every": 1,
    "eval_samples": 3,
    "chunk_sequences": 8,
}
TASK = {
    "num_train": 5,
    "num_test": 2,
    "num_warm_start": 16,
    "num_prm": 4,
    "num_dev": 2,
    "operands": 2,
    "largest": 6,
    "max_tokens": 12,
}


def config(folder: Path) -> Config:
    return Config(log_path=str(folder), task=SumsBuilder(**TASK), **ARGUMENTS)  # type: ignore[arg-type]


def killed_at_rename(folder: Path, number: int) -> None:
    """Runs the command; SIGKILL comes just before the `number`-th file or folder would get its
    final name.
    """
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == "os.rename":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.addaudithook(hook)
    asyncio.run(main(config(folder)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bstar") / "reference"
    asyncio.run(main(config(folder)))
    return folder


def results(folder: Path) -> dict[str, bytes | str]:
    """What a run leaves, but for clocks and paths: by name."""
    names = (
        "*.safetensors",
        "*samples*.jsonl",
        "*sweep*.jsonl",
        "test*.jsonl",
        "greedy*.jsonl",
        "selection.jsonl",
        "choice.json",
        "labels.jsonl",
    )
    found: dict[str, bytes | str] = {
        str(f.relative_to(folder)): f.read_bytes() for name in names for f in folder.rglob(name)
    }
    for method in ARGUMENTS["methods"]:
        found |= {
            f"{method} {s.round}": repr((s.metrics, s.tokens, s.balance)) for s in read_summaries(folder / method)
        }
    for file in folder.rglob("metrics.jsonl"):
        untimed = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in read_metrics(file)]
        found[str(file.relative_to(folder))] = json.dumps(untimed)
    return found


def finished(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, inode and time of each result of a stage."""
    for file in folder.rglob("*"):
        if file.name.endswith((".jsonl", ".json")) and "round_" in file.parent.name and "unfinished" not in file.name:
            if file.name != "seconds.jsonl":
                yield str(file.relative_to(folder)), file.stat().st_ino, file.stat().st_mtime_ns
        elif file.name == "final":
            yield str(file.relative_to(folder)), file.stat().st_ino, file.stat().st_mtime_ns


# Trap: stages repeated or changed by a kill.
@pytest.mark.cpu_only
def test_killed_at_any_stage_repeats_no_finished_work_and_ends_in_the_same_state(reference: Path, tmp_path: Path):
    folder = tmp_path / "killed"
    kept: set[tuple[str, int, int]] = set()
    kills = 0
    for number in (7, 19, 17, 15, 19, 10**9):
        process = CONTEXT.Process(target=killed_at_rename, args=(folder, number))
        process.start()
        process.join()
        now = set(finished(folder))
        assert kept <= now, f"made again: {sorted(kept - now)}"
        kept = now
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    # in the warm start, in evaluations, in training with the optimizer kept and with a fresh one
    assert kills == 5
    assert results(folder) == results(reference)


def test_a_pool_torn_in_mid_chunk_goes_on_with_the_same_samples(reference: Path, tmp_path: Path):
    task = config(reference).task(get_renderer("plain", load_tokenizer("micro")))
    pool = Pool("pool", task.train, ["0.5", "1"], 3, task.max_tokens, [0, 1], chunk_sequences=6)
    with ServiceClient(BackendConfig(engine="torch")) as service:
        client = service.create_sampling_client(str(reference / "warm_start" / "checkpoints" / "final"))
        whole = asyncio.run(sample_pool(client, pool, tmp_path / "whole.jsonl"))
        lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "torn.unfinished.jsonl").write_text("".join(lines[:17]) + lines[17][:20])
        assert asyncio.run(sample_pool(client, pool, tmp_path / "torn.jsonl")) == whole
    assert len(whole) == 30 and (tmp_path / "torn.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    texts = {t: [one.text for one in whole if one.temperature == t] for t in ("0.5", "1")}
    assert texts["0.5"] != texts["1"]


def test_every_stage_leaves_a_file_that_says_what_it_did(reference: Path):
    first = reference / "bstar" / "round_01"
    sweep, choice = read_candidates(first / "sweep.jsonl"), read_choice(first / "choice.json")
    assert {(one.temperature, one.sample) for one in sweep} == {(t, n) for t in ("0.5", "1") for n in range(3)}
    assert len(sweep) == 2 * 2 * 3 and all(one.reward is not None and one.step_scores for one in sweep)
    assert [(cell.temperature, cell.threshold) for cell in choice.surface] == [
        (t, x) for t in ("0.5", "1") for x in ("-2", "-0.5", "0.5")
    ]
    assert choice.score == max(cell.score for cell in choice.surface)
    samples = {(one.query, one.sample): one for one in read_candidates(first / "samples.jsonl")}
    selection = read_selection(first / "selection.jsonl")
    assert selection and {one.temperature for one in samples.values()} == {choice.temperature}
    for one in selection:
        assert (one.text, one.reward) == (samples[one.query, one.sample].text, samples[one.query, one.sample].reward)  # type: ignore[index]
        assert one.reward > float(choice.threshold)
    summary = json.loads((first / "summary.json").read_text())
    assert summary["metrics"]["train/selected_shortfall"] >= 0


def test_one_schedule_by_the_absolute_step_or_one_each_round(reference: Path):
    kept = [record["learning_rate"] for record in read_metrics(reference / "bstar" / "train")]
    assert len(kept) == 40 and kept == sorted(kept, reverse=True) and kept[0] == 1e-3
    fresh = [
        [r["learning_rate"] for r in read_metrics(reference / "rest_em" / f"round_0{n}" / "train")] for n in (1, 2)
    ]
    assert len(fresh[0]) == 20 and fresh[0] == fresh[1] and fresh[0][0] == 1e-3
    assert not (reference / "rest_em" / "train").exists()
