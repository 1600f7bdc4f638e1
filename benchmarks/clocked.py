"""Our loops under a clock, each as its train_cli runs it, and the inputs that the peer gets too.

A step's time is the wall clock from one step's start to the next one's, logging, progress bar and
run folder included: datasets are asked for exactly one batch a step, so the time of asking is taken
there.
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
import numpy as np

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.metrics_log import read_metrics
from preference import train_dpo
from preference.pairs import Pair
from preference.types import Comparison, ComparisonDatasetBuilder, LabeledComparison
from rl import train as rl_train
from rl.types import EnvGroupBuilder, RLDataset
from supervised import train as sft_train
from supervised.types import SupervisedDataset

GROUPS, GROUP_SIZE, MAX_TOKENS, SFT_BATCH, LEARNING_RATE = 64, 8, 6, 128, 1e-4
# pairs, and the characters (tokens) of a prompt and of each answer
DPO_BATCH, DPO_PROMPT, DPO_ANSWER = 32, 96, 48
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


class ClockedPairs(ListDataset[Pair]):
    def get_batch(self, index: int) -> list[Pair]:
        ASKED_AT.append((time.perf_counter(), time.process_time()))
        return super().get_batch(index)


@chz.chz
class RandomPairsBuilder(ComparisonDatasetBuilder):
    """Random letters: what a step costs does not depend on what they say."""

    num_pairs: int = chz.field(validator=COUNT, doc="how many")

    def __call__(self) -> tuple[list[LabeledComparison], list[LabeledComparison]]:
        rng = np.random.default_rng(0)

        def say(role: str, length: int) -> list[Message]:
            return [Message(role=role, content=bytes(rng.integers(97, 123, length).tolist()).decode())]

        sides = [("user", DPO_PROMPT), ("assistant", DPO_ANSWER), ("assistant", DPO_ANSWER)]
        return [LabeledComparison(Comparison(*(say(*side) for side in sides)), "A") for _ in range(self.num_pairs)], []


class PeakMemory:
    """The process's highest resident memory since this was made, above what it was then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
        self.start = _high_water_mib()

    def mib(self) -> float:
        return _high_water_mib() - self.start


def _high_water_mib() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def step_times(marks: Sequence[tuple[float, float]], warmup: int) -> dict[str, list[float]]:
    """Wall and CPU seconds (all threads) of the steps between marks, without the first `warmup`."""
    steps = list(zip(marks[warmup:-1], marks[warmup + 1 :], strict=True))
    return {
        f"{name}_seconds": [later[i] - earlier[i] for earlier, later in steps] for i, name in enumerate(("step", "cpu"))
    }


def mean_timings(folder: Path, warmup: int) -> dict[str, float]:
    """Seconds a step in each timed part of the loop."""
    records = read_metrics(folder)[warmup:]
    names = [name for name in records[-1] if name.startswith("time/")]
    return {name: sum(record[name] for record in records) / len(records) for name in names}


def run_rl(model: str, engine: str, steps: int, warmup: int, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The default RL loop without evaluations and mid-run checkpoints, which are no part of a
    step.
    """
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
        return {
            **step_times(ASKED_AT, warmup),
            "parts": mean_timings(Path(path), warmup),
            "nll": metrics["train_mean_nll"],
        }


def run_dpo(model: str, steps: int, warmup: int) -> dict[str, Any]:
    """The default preference loop without held-out metrics. The reference is computed before the
    first step.
    """
    memory = PeakMemory()
    train_dpo.ListDataset = ClockedPairs
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = train_dpo.Config(
            dataset=RandomPairsBuilder(num_pairs=DPO_BATCH * (steps + warmup + 1)),
            batch_size=DPO_BATCH,
            model_name=model,
            renderer_name="plain",
            learning_rate=LEARNING_RATE,
            lr_schedule="constant",
            eval_every=0,
            save_every=0,
            log_path=f"{folder}/run",
        )
        asyncio.run(train_dpo.main(config))
        records = read_metrics(Path(folder, "run"))
        loss = sum(record["dpo_loss"] for record in records[:-1]) / (steps + warmup)
        timings = mean_timings(Path(folder, "run"), warmup)
    return {**step_times(ASKED_AT, warmup), "parts": timings, "dpo_loss": loss, "peak_mib": memory.mib()}
