"""What is around a step: when it is measured, saved and logged, how a run ends, and the learning
rate of each step.
"""

import asyncio
import gc
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from posttrain.backend.errors import ConfigError, LogprobGapError
from posttrain.backend.learning_rate import learning_rate_at
from posttrain.tracking import checkpointing
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run import Metrics, Run
from posttrain.tracking.run_config import RunConfig, TrainingConfig
from posttrain.tracking.run_folder import open_run_folder
from tests.heap import FREEZE, UNFREEZE


def test_learning_rates_by_hand() -> None:
    def rates(schedule: Any) -> list[float]:
        return [learning_rate_at(step, 1.0, schedule, num_steps=8, warmup_steps=4, floor=0.2) for step in range(9)]

    assert rates("constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear") == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates("cosine")[4:] == pytest.approx([1.0, 0.2 + 0.8 * 0.8535533906, 0.6, 0.2 + 0.8 * 0.1464466094, 0.2])
    assert [learning_rate_at(step, 0.3, "linear", 3) for step in range(3)] == [
        0.3,
        0.3 * (1 - 1 / 3),
        0.3 * (1 - 2 / 3),
    ]
    # after the last step, and where the warm-up is the whole run
    assert [learning_rate_at(step, 1.0, "linear", 8, floor=0.2) for step in (8, 12)] == pytest.approx([0.2, 0.2])
    assert [learning_rate_at(step, 1.0, "cosine", 2, warmup_steps=2) for step in range(4)] == [0.5, 1.0, 1.0, 0.0]
    adam = TrainingConfig(
        learning_rate=0.5, warmup_steps=2, beta1=0.8, beta2=0.9, weight_decay=0.1, grad_clip_norm=2.0
    ).adam(0, 10)
    values = (adam.learning_rate, adam.beta1, adam.beta2, adam.eps, adam.weight_decay, adam.grad_clip_norm)
    assert values == (0.25, 0.8, 0.9, 1e-8, 0.1, 2.0)
    with pytest.raises(ConfigError, match="min_learning_rate=0.1 is above learning_rate=0.01"):
        TrainingConfig(learning_rate=0.01, min_learning_rate=0.1)


class Client:
    """Its weights are a number of steps."""

    def __init__(self, events: list[str]):
        self.events = events

    def save_state(self, name: str, *, extra: dict[str, Any]) -> "Future[None]":
        Path(name).mkdir(parents=True)
        self.events.append(f"save {Path(name).name} {extra}")
        return done()

    def load_state(self, path: str) -> "Future[None]":
        self.events.append(f"load {path}")
        return done()

    load_state_with_optimizer = load_state

    def checkpoint_bytes(self) -> int:
        return 0


def done() -> "Future[None]":
    future: Future[None] = Future()
    future.set_result(None)
    return future


@pytest.mark.parametrize(("ends_at", "last"), [(None, 5), (3, 4)])
def test_the_order_of_what_is_around_a_step(ends_at: int | None, last: int, tmp_path: Path) -> None:
    events: list[str] = []
    config = RunConfig(log_path=str(tmp_path / "run"), eval_every=2, save_every=2, keep_checkpoints=None)
    folder = open_run_folder(config.log_path, "raise", config)
    run = Run(config=config, folder=folder, client=Client(events), name="test", num_steps=5)  # type: ignore[arg-type]

    async def evaluate(step: int) -> Metrics:
        events.append(f"evaluate {step}")
        return {"test/nll": float(step)}

    async def step(number: int, metrics: Metrics) -> None:
        events.append(f"step {number}")
        metrics["loss"] = 1.0 - number

    run.evaluate, run.extra = evaluate, lambda: {"rollouts": len(events)}
    if ends_at is not None:
        run.ends_early = lambda metrics: metrics["loss"] == 1.0 - ends_at
    assert run.start("weights")
    metrics = asyncio.run(run.steps(step))
    expected = ["load weights", "evaluate 0", "step 0", "step 1"]
    expected += ["save 000002 {'next_step': 2, 'rollouts': 4}", "evaluate 2", "step 2", "step 3"]
    expected += ["save 000004 {'next_step': 4, 'rollouts': 8}", *(["evaluate 4", "step 4"] if ends_at is None else [])]
    assert events == [*expected, f"evaluate {last}", f"save final {{'next_step': {last}}}"]
    assert metrics["loss"] == 1.0 - (last - 1) and metrics["test/nll"] == last
    records = read_metrics(folder.path)
    assert [record["step"] for record in records] == [*range(last), last]
    assert [record["step"] for record in records if "test/nll" in record] == [*range(0, last, 2), last]
    assert all("time/total" in record for record in records[:-1])


# Trap: an evaluator that fails in the last minute costs all steps since the last checkpoint.
@pytest.mark.parametrize(
    ("error", "saved"), [(ValueError("endpoint"), ["save 000003 {'next_step': 3}"]), (LogprobGapError("gap"), [])]
)
def test_an_evaluation_that_fails_loses_no_step(error: Exception, saved: list[str], tmp_path: Path) -> None:
    events: list[str] = []
    config = RunConfig(log_path=str(tmp_path / "run"), eval_every=3, save_every=0)
    folder = open_run_folder(config.log_path, "raise", config)
    run = Run(config=config, folder=folder, client=Client(events), name="test", num_steps=5)  # type: ignore[arg-type]

    async def evaluate(step: int) -> Metrics:
        if step:
            raise error
        return {}

    async def step(number: int, metrics: Metrics) -> None: ...

    run.evaluate = evaluate
    assert run.start(None)
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(run.steps(step))
    assert events == saved and [record.step for record in folder.list_checkpoints()] == [3] * len(saved)


@pytest.mark.parametrize("names", [("num_tokens",), ("env/all/total_ac_tokens", "env/all/total_ob_tokens")])
def test_a_run_saves_by_tokens(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Steps of 40 tokens: with save_tokens=100 a checkpoint after every third."""
    events: list[str] = []
    config = RunConfig(log_path=str(tmp_path / "run"), save_every=0, save_tokens=100, keep_checkpoints=None)
    folder = open_run_folder(config.log_path, "raise", config)
    run = Run(config=config, folder=folder, client=Client(events), name="test", num_steps=7)  # type: ignore[arg-type]

    async def step(number: int, metrics: Metrics) -> None:
        metrics |= dict.fromkeys(names, 40 / len(names))

    assert run.start(None)
    asyncio.run(run.steps(step))
    assert [event.split()[1] for event in events] == ["000003", "000006", "final"]


def test_a_run_saves_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 20 minutes: with save_minutes=30 a checkpoint after every second."""
    events: list[str] = []
    now = [0.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now[0])
    config = RunConfig(log_path=str(tmp_path / "run"), save_every=0, save_minutes=30.0, keep_checkpoints=None)
    folder = open_run_folder(config.log_path, "raise", config)
    run = Run(config=config, folder=folder, client=Client(events), name="test", num_steps=5)  # type: ignore[arg-type]

    async def step(number: int, metrics: Metrics) -> None:
        now[0] += 20 * 60

    assert run.start(None)
    asyncio.run(run.steps(step))
    assert [event.split()[1] for event in events] == ["000002", "000004", "final"]
    run.must_stop = lambda request: False  # as of several processes, whose clocks differ
    with pytest.raises(ConfigError, match="save_minutes"):
        run.start(None)


@pytest.mark.parametrize("frozen", [False, True])
def test_full_collections_of_a_run_do_not_visit_what_was_there_before(
    frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is frozen stays so: vLLM freezes what it makes."""
    config = RunConfig(log_path=str(tmp_path / "run"), save_every=0)
    folder = open_run_folder(config.log_path, "raise", config)
    run = Run(config=config, folder=folder, client=Client([]), name="test", num_steps=2)  # type: ignore[arg-type]
    most_are_frozen: list[bool] = []

    async def step(number: int, metrics: Metrics) -> None:
        most_are_frozen.append(gc.get_freeze_count() > len(gc.get_objects()))

    monkeypatch.setattr(gc, "freeze", FREEZE)
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    try:
        if not frozen:
            UNFREEZE()
        assert run.start(None)
        asyncio.run(run.steps(step))
        most_are_frozen.append(gc.get_freeze_count() > len(gc.get_objects()))
    finally:
        FREEZE()  # as conftest.py has done
    assert most_are_frozen == [True, True, frozen]
