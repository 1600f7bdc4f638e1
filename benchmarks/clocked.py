"""Our loops under a clock, each as its train_cli runs it, and the inputs that the peer gets too.

A step's time is the wall clock from one step's start to the next one's, logging, progress bar and run folder included:
datasets are asked for exactly one batch a step, so the time of asking is taken there.
"""

import asyncio
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chz

from backend.config import BackendConfig
from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from renderers.types import Renderer
from rl import train as rl_train
from rl.types import EnvGroupBuilder, RLDataset
from supervised import train as sft_train
from supervised.types import SupervisedDataset
from tracking.metrics_log import read_metrics

GROUPS, GROUP_SIZE, MAX_TOKENS, SFT_BATCH, LEARNING_RATE = 64, 8, 6, 128, 1e-4
ASKED_AT: list[tuple[float, float]] = []  # wall clock and the process's CPU time


class ClockedDataset(RLDataset):
    def __init__(self, dataset: RLDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        ASKED_AT.append((time.perf_counter(), time.process_time()))
        return self.dataset.get_batch(index)


@chz.chz
class ClockedArithmetic(ArithmeticBuilder):
    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        dataset, test_dataset = await ArithmeticBuilder.__call__(self, renderer)
        return ClockedDataset(dataset), test_dataset


class ClockedExamples(SupervisedDataset):
    def __init__(self, dataset: SupervisedDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def get_batch(self, index: int) -> list[Any]:
        ASKED_AT.append((time.perf_counter(), time.process_time()))
        return self.dataset.get_batch(index)


@chz.chz
class ClockedArithmeticExamples(ArithmeticExamplesBuilder):
    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        dataset, test_dataset = ArithmeticExamplesBuilder.__call__(self, renderer)
        return ClockedExamples(dataset), test_dataset


def step_times(marks: Sequence[tuple[float, float]], warmup: int) -> dict[str, list[float]]:
    """Wall and CPU seconds (all threads) of the steps between marks, without the first `warmup`."""
    steps = list(zip(marks[warmup:-1], marks[warmup + 1 :], strict=True))
    return {f"{name}_seconds": [later[i] - earlier[i] for earlier, later in steps] for i, name in enumerate(("step", "cpu"))}


def mean_timings(folder: Path, warmup: int) -> dict[str, float]:
    """Seconds a step in each timed part of the loop."""
    records = read_metrics(folder)[warmup:]
    names = [name for name in records[-1] if name.startswith("time/")]
    return {name: sum(record[name] for record in records) / len(records) for name in names}


def run_rl(model: str, engine: str, steps: int, warmup: int, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The default RL loop without evaluations and mid-run checkpoints, which are no part of a step."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = rl_train.Config(
            env=ClockedArithmetic(batch_size=GROUPS, group_size=GROUP_SIZE, n_batches=steps + warmup + 1),
            model_name=model,
            renderer_name="plain",
            max_tokens=MAX_TOKENS,
            learning_rate=LEARNING_RATE,
            eval_every=0,
            save_every=0,
            log_path=f"{folder}/run",
            backend=BackendConfig(engine=engine, **(overrides or {})),  # type: ignore[arg-type]
        )
        metrics = asyncio.run(rl_train.main(config))
        reward, answer_tokens = metrics["env/all/reward/total"], metrics["env/all/ac_tokens_per_turn"]
        return {
            **step_times(ASKED_AT, warmup),
            "parts": mean_timings(Path(folder, "run"), warmup),
            "reward": reward,
            "answer_tokens": answer_tokens,
        }


def run_sft(
    model: str, steps: int, warmup: int, save_to: str | None = None, learning_rate: float = LEARNING_RATE
) -> dict[str, Any]:
    """The default supervised loop without held-out losses. `save_to`: keep the run folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = save_to or f"{folder}/run"
        config = sft_train.Config(
            dataset=ClockedArithmeticExamples(batch_size=SFT_BATCH, n_batches=steps + warmup + 1, reduction="sum"),
            model_name=model,
            renderer_name="plain",
            learning_rate=learning_rate,
            lr_schedule="constant",
            eval_every=0,
            save_every=0,
            log_path=path,
        )
        metrics = asyncio.run(sft_train.main(config))
        return {**step_times(ASKED_AT, warmup), "parts": mean_timings(Path(path), warmup), "nll": metrics["train_mean_nll"]}
