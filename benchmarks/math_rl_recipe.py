"""The recipe math_rl of tinker-cookbook, unmodified, through posttrain-serve, and the same RL by this project's loop
in one process: do they learn alike?

    python -m benchmarks.math_rl_recipe seed=0 log_path=runs/math_rl_recipe

Both start from the same weights, taught to add and then, for less time, to be wrong by up to 9 in half of the
answers. They draw the same problems and have the same prompt, grader and settings. The recipe gives no seeds to
the sampler. The SDK and the cookbook have an environment of their own (tinker_sdk.py).
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import chz
import numpy as np

from benchmarks.serve import SDK, server
from benchmarks.tinker_sdk import sdk_python
from envs.problem import Grader, Problem
from envs.problem_env import DrawnExamplesBuilder, DrawnProblems, DrawnProblemsBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, POSITIVE, SEED, SHARE
from posttrain.renderers.types import Message
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import run_stages
from recipes.results import write_results
from recipes.warm_start import warm_start
from rl import train as rl_train

COOKBOOK = "0.6.1"
# Without its dependencies: one of them, tml-renderers, is not on PyPI in the version that it asks for.
PACKAGES = (f"--no-deps tinker_cookbook=={COOKBOOK}", "pylatexenc math-verify termcolor cloudpickle blobfile tiktoken")
MODEL = "meta-llama/Llama-3.2-1B"  # a name that the cookbook knows; here of the small model
SHARED = {"learning_rate": 1e-4, "max_tokens": 12, "loss_fn": "importance_sampling"}
GROUPS_OF_A_BATCH, GROUP_SIZE = 32, 8
EXAMPLE = [Message(role="user", content="What is 4 + 5?"), Message(role="assistant", content="9")]
STEPS, SPAN = 60, 10  # of a run, and of a column
RENDERER = "role_colon"
SIDES = ("the recipe through the server", "in process")
KL = "kl_sample_train_v1"  # of the recipe, and of its metrics the largest


@chz.chz
class Config:
    """A recipe of tinker-cookbook through the server, and the same in process."""

    seed: int = chz.field(default=0, validator=SEED, doc="of the first weights, and of the run in process")
    model_name: str = chz.field(default="tiny", doc="the model that both sides train")
    steps: int = chz.field(default=STEPS, validator=COUNT, doc="steps of each run, a multiple of 10")
    taught_nll: float = chz.field(default=0.03, validator=POSITIVE, doc="adding is taught until this loss of a batch")
    wrong_steps: int = chz.field(default=120, validator=COUNT, doc="then so many batches are half wrong")
    log_path: str = log_path_field("runs/math_rl_recipe")

    @chz.validate
    def _whole_columns(self) -> None:
        if self.steps % SPAN:
            raise ConfigError(f"steps={self.steps} must be a multiple of {SPAN}")


class LastInteger(Grader):
    """The cookbook's grader of sums."""

    def extract(self, text: str) -> str | None:
        found = re.findall(r"-?\d+", text.replace(",", ""))
        return str(int(found[-1])) if found else None


@chz.chz
class Sums(DrawnProblems):
    """Sums of two numbers up to 100, those of the cookbook's batch n by the seed n."""

    num_test: int = chz.field(default=50, doc="of a batch that no run reaches")

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        numbers = np.random.RandomState(seed[-1])
        return [self.problem(*numbers.randint(0, 101, 2).tolist()) for _ in range(count)]

    def held_out(self) -> list[Problem]:
        return self.draw(self.num_test, [10**6])

    def problem(self, a: int, b: int, error: int = 0) -> Problem:
        return Problem(f"What is {a} + {b}?", str(a + b), LastInteger(), str(a + b + error))


@chz.chz
class SumsBuilder(Sums, DrawnProblemsBuilder):
    """The cookbook's sums."""

    def prefix(self) -> Sequence[Message]:
        return EXAMPLE


@chz.chz
class SumExamples(Sums, DrawnExamplesBuilder):
    """Sums to imitate, of which a share is wrong by 1 to 9, to either side."""

    wrong: float = chz.field(default=0.0, validator=SHARE, doc="share of wrong answers")
    with_example: bool = chz.field(
        default=False, doc="after the worked example that the recipe puts before each question"
    )

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        rng = np.random.default_rng(seed)
        error_D = (rng.random(count) < self.wrong) * rng.integers(1, 10, count) * rng.choice([-1, 1], count)
        pairs = rng.integers(0, 101, (count, 2)).tolist()
        return [self.problem(a, b, int(error)) for (a, b), error in zip(pairs, error_D, strict=True)]

    def messages(self, problem: Problem) -> list[Message]:
        return problem.messages(EXAMPLE if self.with_example else ())


def columns(steps: int = STEPS) -> dict[str, slice]:
    """Columns of the table, and which steps are their means."""
    return {f"steps {start + 1} to {start + SPAN}": slice(start, start + SPAN) for start in range(0, steps, SPAN)}


async def first_weights(config: Config, folder: Path) -> Path:
    taught = SumExamples(n_batches=1000, batch_size=128, seed=config.seed)
    half_wrong = SumExamples(
        n_batches=config.wrong_steps, batch_size=64, seed=config.seed, wrong=0.5, with_example=True
    )
    settings: dict[str, Any] = {"renderer_name": RENDERER, "eval_every": 0}
    stage = warm_start(config, taught, folder / "taught", "taught", stop_at_nll=config.taught_nll, **settings)
    stage = warm_start(config, half_wrong, folder / "half_wrong", "half_wrong", [stage], **settings)
    await run_stages([stage])
    return stage.result


async def in_process(config: Config, weights: Path, folder: Path) -> list[dict[str, float]]:
    env = SumsBuilder(n_batches=config.steps, batch_size=GROUPS_OF_A_BATCH, group_size=GROUP_SIZE, seed=config.seed)
    run = rl_train.Config(
        env=env,
        model_name=config.model_name,
        load_checkpoint_path=str(weights),
        renderer_name=RENDERER,
        seed=config.seed,
        eval_every=0,
        save_every=0,
        log_path=str(folder),
        behavior_if_log_dir_exists="delete",
        backend=BackendConfig(engine="torch"),
        **SHARED,
    )
    await rl_train.main(run)
    return read_metrics(folder)


def through_the_server(config: Config, weights: Path, folder: Path) -> list[dict[str, float]]:
    shutil.rmtree(folder, ignore_errors=True)
    (tokenizers := folder / "client").mkdir(parents=True)
    options = SHARED | {
        "env": "arithmetic",
        "model_name": MODEL,
        "renderer_name": RENDERER,
        "lora_rank": 0,
        "groups_per_batch": GROUPS_OF_A_BATCH,
        "group_size": GROUP_SIZE,
        "eval_every": 0,
        "save_every": 0,
        "max_steps": config.steps,
        "log_path": folder / "run",
        "behavior_if_log_dir_exists": "delete",
    }
    python = sdk_python(SDK, f"{SDK}-cookbook-{COOKBOOK}", PACKAGES)
    with server(f"{MODEL}={weights}", f"client_folder={tokenizers}") as at:
        environment = os.environ | {"TINKER_BASE_URL": at.url, "TINKER_API_KEY": "tml-local", "HF_HUB_OFFLINE": "1"}
        arguments = [f"{name}={value}" for name, value in options.items()]
        subprocess.run(
            [python, "-m", "tinker_cookbook.recipes.math_rl.train", *arguments],
            cwd=tokenizers,
            env=environment,
            check=True,
        )
    return [record for record in read_metrics(folder / "run") if f"optim/{KL}" in record]  # the last line has sums


def main(config: Config) -> None:
    folder = Path(config.log_path).absolute()
    weights = asyncio.run(first_weights(config, folder))
    runs = {
        SIDES[0]: through_the_server(config, weights, folder / "recipe"),
        SIDES[1]: asyncio.run(in_process(config, weights, folder / "in_process")),
    }
    results = {
        f"{side} | {column}": mean(record["env/all/correct"] for record in records[part])
        for side, records in runs.items()
        for column, part in columns(config.steps).items()
    }
    results[KL] = max(abs(record[f"optim/{KL}"]) for record in runs[SIDES[0]])
    write_results(folder, results)


if __name__ == "__main__":
    run_command(main, Config)
