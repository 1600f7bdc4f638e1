"""The pages' pictures of several seeds, which `make evidence` draws from the runs of its rows."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.evidence_recipes import NEARLY_TAUGHT, PRM_REWARDS
from benchmarks.evidence_row import Row
from posttrain.tracking.figures import Records
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.plots import compare_seeds
from recipes.algorithms import beside_grpo
from recipes.algorithms.variants import VARIANTS
from recipes.bstar.compare import compare
from recipes.distillation import on_policy
from recipes.labels import folder_name

Folders = Mapping[str, Sequence[Path]]  # label -> the run of each seed


@dataclass(frozen=True)
class Picture:
    """A picture of the repository, and the runs it shows: label -> folder below the evidence's runs, whose
    first part is a row, and where {seed} is filled in."""

    target: str
    runs: Mapping[str, str]
    draw: Callable[[Folders, Path], object]

    @property
    def rows(self) -> list[str]:
        return [folder.split("/")[0] for folder in self.runs.values()]

    def folders(self, rows: Sequence[Row], runs: Path) -> Folders:
        seeds = {row.name: row.seeds for row in rows}
        return {
            label: [runs / folder.format(seed=seed) for seed in seeds[name]]
            for name, (label, folder) in zip(self.rows, self.runs.items(), strict=True)
        }


def of_records(draw: Callable[[Mapping[str, Sequence[Records]], Path], object]) -> Callable[[Folders, Path], object]:
    return lambda folders, out: draw(
        {label: [read_metrics(run) for run in seeds] for label, seeds in folders.items()}, out
    )


def of_metrics(*keys: str) -> Callable[[Folders, Path], object]:
    return lambda folders, out: compare_seeds(folders, out, keys)


def agent(folders: Folders, out: Path) -> None:
    from recipes.agent.train import draw  # imports openai

    of_records(draw)(folders, out)


def beside_grpo_picture(variants: str, target: str) -> Picture:
    folder = f"beside_grpo_{variants}/{{seed}}/run/{{seed}}"
    runs = {name: f"{folder}/{folder_name(name)}" for name in VARIANTS[variants]}
    return Picture(target, runs, of_records(partial(beside_grpo.draw, variants)))


def bstar(folders: Folders, out: Path) -> None:
    """Without the page that belongs to it."""
    with tempfile.TemporaryDirectory() as folder:
        compare(folders["B-STaR"], Path(folder, "bstar"))
        shutil.copy(Path(folder, "bstar.png"), out)


PICTURES = [
    Picture("recipes/agent/agent.png", {"rl": "agent/{seed}/run/seed_{seed}/rl"}, agent),
    beside_grpo_picture("algorithms", "recipes/algorithms/beside_grpo.png"),
    beside_grpo_picture("precision", "recipes/algorithms/precision.png"),
    beside_grpo_picture("off_policy", "recipes/algorithms/off_policy.png"),
    beside_grpo_picture("faults", "docs/faults.png"),
    Picture("recipes/bstar/bstar.png", {"B-STaR": "bstar/{seed}/run"}, bstar),
    Picture(
        "recipes/distillation/on_policy.png",
        {name: f"distillation/{{seed}}/run/on_policy_{{seed}}/{name}" for name in ("distill", "grpo")},
        of_records(partial(on_policy.draw, levels={"0.95 of the teacher": NEARLY_TAUGHT})),
    ),
    Picture(
        "recipes/guess_number/curve.png",
        {"guess_number": "guess_number/{seed}/run"},
        of_metrics(*(f"test/env/all/{key}" for key in ("solved", "turns", "consistent"))),
    ),
    Picture(
        "recipes/multiplayer/curve.png",
        {"with the KL penalty": "multiplayer/{seed}/run", "without": "multiplayer_no_kl/{seed}/run"},
        of_metrics("test/env/all/loss", "test/env/seat1/loss", "env/all/illegal", "optim/entropy"),
    ),
    Picture(
        "recipes/pretrained/curve.png",
        {"SmolLM2-135M-Instruct": "pretrained/{seed}/run"},
        of_metrics("test/env/all/correct", "env/all/correct", "env/all/ac_tokens_per_turn", "optim/entropy"),
    ),
    Picture(
        "recipes/prm/rl.png",
        {label: f"prm/{{seed}}/run/{run}" for label, run in PRM_REWARDS.items()},
        of_metrics("env/all/correct", "test/env/all/correct"),
    ),
    Picture(
        "recipes/shorter/curve.png",
        {"shorter": "shorter/{seed}/run"},
        of_metrics("env/all/ac_tokens_per_turn", "optim/entropy"),
    ),
]
