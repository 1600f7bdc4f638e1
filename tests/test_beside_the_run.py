"""Code of a user's own beside the run folder: a data set that reads the run's metrics, as
docs/first_env.md describes, and a reward that changes the working directory.
"""

import asyncio
import json
import os
from pathlib import Path

import chz
import pytest

from envs.problem import Problem
from envs.problem_env import problem_groups
from envs.single_turn import SingleTurn
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import read_metrics
from rl import train
from rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder


def tiny(env: RLDatasetBuilder, log_path: str, **options) -> train.Config:
    return train.Config(
        env=env,
        model_name="tiny",
        renderer_name="plain",
        max_tokens=2,
        log_path=log_path,
        backend=BackendConfig(engine="torch"),
        **options,
    )


asked: list[tuple[int, list[int]]] = []  # by call of get_batch: its index, and the steps that were logged


class Levels(RLDataset):
    def __init__(self, builder: "LevelsBuilder", renderer: Renderer):
        self.builder, self.renderer = builder, renderer

    def __len__(self) -> int:
        return 10

    def get_batch(self, index: int) -> list[EnvGroupBuilder]:
        lines = Path(self.builder.run, "metrics.jsonl").read_text().splitlines()
        steps = [row["step"] for row in map(json.loads, lines) if "env/all/reward/total" in row]
        asked.append((index, [step for step in steps if step < index]))
        problem = Problem(f"{index} ", "a")
        return list(problem_groups([problem] * self.builder.batch_size, self.renderer, self.builder.group_size))


@chz.chz
class LevelsBuilder(RLDatasetBuilder):
    run: str = chz.field(doc="the run folder")

    async def __call__(self, renderer: Renderer):
        return Levels(self, renderer), None


# Trap: a metric that is written after the next batch has been drawn, or lost by a resume: the
# difficulty would be another one than in an uninterrupted run.
@pytest.mark.parametrize("late", [0, 1])
def test_a_curriculum_sees_the_steps_before_its_batch_also_after_a_resume(tmp_path: Path, late: int):
    asked.clear()
    run = str(tmp_path / "run")
    config = tiny(LevelsBuilder(run=run, batch_size=1, group_size=2), run, max_steps=2, max_steps_off_policy=late)
    asyncio.run(train.main(config))
    asyncio.run(train.main(chz.replace(config, max_steps=4, behavior_if_log_dir_exists="resume")))
    assert [index for index, _ in asked] == [0, 1, 2, 3]
    for index, steps in asked:
        assert steps[: max(0, index - late)] == list(range(max(0, index - late)))


# Trap: a relative log_path that follows the working directory: the checkpoint would be written into
# a temporary folder of the reward's, and the run folder stay empty.
def test_a_reward_that_changes_the_working_directory_does_not_move_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)  # and back at the end

    def reward(answer) -> float:
        os.chdir(tmp_path / "elsewhere")
        return float(len(set(answer.text)))

    env = SingleTurn([Problem("a", "b")], [reward], batch_size=1, group_size=2)
    asyncio.run(train.main(tiny(env, "runs/x", max_steps=1)))
    assert (tmp_path / "runs/x/checkpoints/final").is_dir() and (tmp_path / "runs/x/metrics.jsonl").read_text()
    assert not list((tmp_path / "elsewhere").iterdir())


# Trap: the process already has the folder's lock, so that both would write into it.
def test_of_two_runs_at_once_one_has_the_folder(tmp_path: Path):
    def length(answer) -> float:
        return float(len(answer.text))

    env = SingleTurn([Problem("a", "b")], [length], batch_size=1, group_size=2)
    config = tiny(env, str(tmp_path / "run"), num_epochs=3, behavior_if_log_dir_exists="delete")

    async def both():
        return await asyncio.gather(train.main(config), train.main(config), return_exceptions=True)

    refused, finished = sorted(asyncio.run(both()), key=lambda result: isinstance(result, dict))
    assert isinstance(refused, ConfigError) and "run of this process" in str(refused) and isinstance(finished, dict)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "env/all/reward/total" in row] == [0, 1, 2]
    asyncio.run(train.main(config))  # one after the other
