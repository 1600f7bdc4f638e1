"""One full round of B-STaR through the recipe's own command: tokens per second of each stage, and
the share of the time it takes.

    python benchmarks/bstar_round.py [--method bstar]

On a GPU the model has the shape of Qwen2.5-0.5B with random weights: 64 samples of each of 256
questions, a process reward model of the same shape, 50 steps of 128. On a CPU everything is small.
There is nothing to learn in the task: a solution is some lines of random digits and a last one, "#"
and a digit, which is right one time in ten. After a short warm start, samples have the lengths
asked for, differ from one another and are selected, and nothing need be downloaded. Left out: the
stages before the rounds, and a peer.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import chz
import numpy as np
import torch

from benchmarks.report import wait_until_quiet, write_report
from envs.graders import LastLine
from envs.problem import Problem
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT
from posttrain.renderers.types import Renderer
from preference.steps import StepFormat
from recipes.bstar.pictures import STAGES
from recipes.bstar.records import Summary, read_summaries
from recipes.bstar.tasks import Sets, TaskBuilder
from recipes.bstar.train import Config
from recipes.bstar.train import main as run


@chz.chz
class LinesBuilder(TaskBuilder):
    """Random lines of random digits."""

    form: StepFormat = chz.field(
        default_factory=lambda: StepFormat(separator="\n", answer_marker="#"), doc="of solutions"
    )
    prompt_tokens: int = chz.field(validator=COUNT, doc="digits of a question")
    line_tokens: int = chz.field(validator=COUNT, doc="digits of a line")
    mean_lines: int = chz.field(validator=COUNT, doc="lines of a solution, on average")

    def _problems(self, split: str, count: int) -> list[Problem]:
        rng = np.random.default_rng([self.split_seed, count, len(split)])
        return [self._problem(rng, f"{split}-{n}") for n in range(count)]

    def _problem(self, rng: np.random.Generator, id: str) -> Problem:
        """Random digits, of which one is taken for right."""
        question, gold, solution = _digits(rng, self.prompt_tokens) + "=", _digits(rng, 1), self._solution(rng)
        return Problem(question, gold, LastLine("#(.*)"), solution, id=id)

    def _solution(self, rng: np.random.Generator) -> str:
        most = self.max_tokens // (self.line_tokens + 1) - 1
        lines = min(most, int(rng.geometric(1 / self.mean_lines)))
        return "\n".join([*(_digits(rng, self.line_tokens) for _ in range(lines)), f"#{_digits(rng, 1)}"])

    def sets(self, renderer: Renderer) -> Sets:
        train = self._problems("train", self.num_train or 0)
        return Sets(
            self._problems("warm", self.num_warm_start or 0), train, train, self._problems("test", self.num_test or 0)
        )


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(map(str, rng.integers(0, 10, count)))


@dataclass(frozen=True)
class Size:
    """Solutions of about `mean_lines` lines of `line_tokens` digits, at most `max_tokens` in
    all.
    """

    model_name: str
    questions: int
    dev: int
    samples: int
    prompt_tokens: int
    line_tokens: int
    mean_lines: int
    max_tokens: int
    steps: int
    batch_size: int
    warm_start_steps: int
    max_num_seqs: int


CPU = Size("micro", 48, 12, 16, 8, 7, 3, 64, 10, 32, 80, 512)
GPU = Size("qwen2.5-0.5b-shape", 256, 32, 64, 128, 31, 8, 768, 50, 128, 200, 1024)
TINY = Size("micro", 6, 2, 4, 4, 3, 2, 24, 2, 4, 40, 64)  # for the test


def config(size: Size, method: str, folder: str) -> Config:
    cuda = torch.cuda.is_available()
    task = LinesBuilder(
        num_train=size.questions,
        num_test=max(4, size.questions // 16),
        num_dev=size.dev,
        num_warm_start=max(64, size.batch_size * size.warm_start_steps // 10),
        num_prm=max(8, size.questions // 8),
        max_tokens=size.max_tokens,
        prompt_tokens=size.prompt_tokens,
        line_tokens=size.line_tokens,
        mean_lines=size.mean_lines,
    )
    return Config(
        methods=[method],
        task=task,
        model_name=size.model_name,
        warm_start_steps=size.warm_start_steps,
        warm_start_nll=None,
        completer_steps=0,
        warm_start_batch_size=min(size.batch_size, 64),
        warm_start_learning_rate=3e-4 if cuda else 3e-3,
        prm_solutions=1,
        prm_completions=2,
        prm_batch_size=4,
        prm_epochs=1,
        prm_learning_rate=1e-4,
        rounds=1,
        samples=size.samples,
        temperatures=["0.8", "1"],
        thresholds=["-1", "0"],
        human_solutions=True,  # so that there is something to train on, whatever was sampled
        steps=size.steps,
        batch_size=size.batch_size,
        learning_rate=1e-5,
        eval_samples=4,
        chunk_sequences=16384 if cuda else 1024,
        log_path=folder,
        backend=BackendConfig(
            engine="vllm" if cuda else "torch",
            max_length=size.prompt_tokens + 2 + size.max_tokens,
            max_num_seqs=size.max_num_seqs,
        ),
    )


def figures_of(summary: Summary) -> dict[str, float]:
    """Seconds, share and tokens per second of each stage; scored tokens are those of the
    samples.
    """
    tokens = summary.tokens | {"score": summary.tokens.get("sample", 0)}
    total = sum(summary.seconds.values())
    figures: dict[str, float] = {"round: s": total}
    for stage in (stage for stage in STAGES if stage in summary.seconds):
        seconds = summary.seconds[stage]
        figures |= {f"{stage}: s": seconds, f"{stage}: share of the round": seconds / total}
        if tokens.get(stage):
            figures |= {f"{stage}: tokens": tokens[stage], f"{stage}: tokens/s": tokens[stage] / seconds}
    names = ("truncated", "tokens", "selected", "selected_accuracy")
    return figures | {f"samples: {name}": summary.metrics[f"train/{name}"] for name in names}


def measure(size: Size, method: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bstar-round-") as folder:
        asyncio.run(run(config(size, method, folder)))
        figures = figures_of(read_summaries(Path(folder) / method)[-1])
    if torch.cuda.is_available():
        figures["peak memory of the trainer: GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method", default="bstar", help="a method of recipes/bstar/methods.py; bstar sweeps two temperatures"
    )
    arguments = parser.parse_args()
    size = GPU if torch.cuda.is_available() else CPU
    load = wait_until_quiet()
    figures: dict[str, Any] = measure(size, arguments.method)
    write_report("bstar_round", figures, asdict(size) | {"method": arguments.method}, load, {})


if __name__ == "__main__":
    main()
