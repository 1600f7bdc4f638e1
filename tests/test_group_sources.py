"""Synchronous, streaming and asynchronous training: what is sampled when, trained on when, and
restored after a kill.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import chz
import numpy as np
import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, ModelInput
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import read_metrics as metrics
from posttrain.tracking.run_folder import RunFolder
from posttrain.tracking.seeds import TRAINING
from rl import train
from rl.advantages import BatchMean, GroupMean
from rl.data_processing import compute_advantages
from rl.group_sources import GroupSource
from rl.rollouts import Policy, do_rollouts
from rl.train_step import Learner, train_step
from rl.types import Env, EnvGroupBuilder, Observation, RLDataset, RLDatasetBuilder, StepResult, StopCondition
from tests.conftest import ROUNDING, gradients, training_data
from tests.finished_runs import steps_logged, weights
from tests.test_resume import finish, kill_at


class LowTokenEnv(Env):
    """Wants tokens below 130; takes `seconds` of waiting."""

    def __init__(self, number: int, seconds: float):
        self.number, self.seconds = number, seconds

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return ModelInput.from_ints([5, 4 + self.number % 250]), []

    async def step(self, action: list[int]) -> StepResult:
        await asyncio.sleep(self.seconds)
        reward = float(np.mean(np.array(action) < 130))
        return StepResult(reward, True, ModelInput.empty(), logs={"problem": str(self.number)})


class LowTokenGroup(EnvGroupBuilder):
    # how often the environments of a problem were made, in this process
    made: Counter[int] = Counter()

    def __init__(self, number: int, size: int, seconds: float):
        self.number, self.size, self.seconds = number, size, seconds

    async def make_envs(self) -> Sequence[Env]:
        if self.number < 0:
            raise ZeroDivisionError("the builder's own")
        LowTokenGroup.made[self.number] += 1
        return [LowTokenEnv(self.number, self.seconds * (self.number * 7 % 5 + g) / 8) for g in range(self.size)]


class LowTokenDataset(RLDataset):
    """Problem number = its place in the sequence of all groups."""

    def __init__(self, builder: "LowTokenBuilder"):
        self.builder = builder

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        first, b = index * self.builder.batch_size, self.builder
        numbers = [-1 if n == b.crash_at else n for n in range(first, first + b.batch_size)]
        return [LowTokenGroup(n, b.group_size, b.seconds) for n in numbers]

    def __len__(self) -> int:
        return self.builder.n_batches


class CountingDataset(LowTokenDataset):
    """Knows which batches were read: making their problems may take long."""

    def __init__(self, builder: "LowTokenBuilder"):
        super().__init__(builder)
        self.read: list[int] = []

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        self.read.append(index)
        return super().get_batch(index)


@chz.chz
class LowTokenBuilder(RLDatasetBuilder):
    n_batches: int = chz.field(default=6, doc="batches")
    batch_size: int = chz.field(default=4, doc="groups per batch")
    group_size: int = chz.field(default=3, doc="rollouts per group")
    seconds: float = chz.field(default=0.0, doc="longest wait of an environment")
    crash_at: int = chz.field(default=-2, doc="problem whose builder raises")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
        return LowTokenDataset(self), None


def config(folder: Path, **kwargs) -> train.Config:  # noqa: ANN003
    settings = {"env": LowTokenBuilder(), "max_tokens": 4, "learning_rate": 1e-3, "transcript_every": 0}
    settings |= {"backend": BackendConfig(engine="torch")} | kwargs
    return train.Config(log_path=str(folder), behavior_if_log_dir_exists="delete", **settings)


# Trap: asynchronous at 0 being another algorithm.
@pytest.mark.cpu_only
def test_nothing_off_policy_is_the_synchronous_run_bit_for_bit(tmp_path: Path) -> None:
    """Against a loop written out here: sample a batch with the present weights, train on it,
    again.
    """
    asyncio.run(train.main(config(tmp_path / "run", max_steps_off_policy=0)))
    dataset = LowTokenDataset(LowTokenBuilder())

    async def synchronous(client) -> None:  # noqa: ANN001
        for step in range(len(dataset)):
            policy = Policy(await client.save_weights_and_get_sampling_client_async(), max_tokens=4)
            groups = await do_rollouts(dataset.get_batch(step), policy, (0, TRAINING, step))
            data = training_data(groups, compute_advantages(groups, GroupMean()))
            await client.forward_backward(data, "importance_sampling")
            await client.optim_step(AdamParams(1e-3, eps=1e-8))

    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        asyncio.run(synchronous(client := service.create_training_client("tiny")))
        client.save_state(str(tmp_path / "by_hand")).result()
    assert weights(tmp_path / "run") == (tmp_path / "by_hand" / "model.safetensors").read_bytes()


# Trap: streaming changing the gradient.
@pytest.mark.parametrize(("minibatches", "substeps"), [(2, 1), (4, 1), (8, 1)])
def test_streaming_gives_the_gradient_of_the_whole_batch(
    minibatches: int, substeps: int, torch_service, tmp_path: Path
) -> None:  # noqa: ANN001
    client = torch_service.create_training_client("tiny")
    taken: list[dict[str, torch.Tensor]] = []
    step_of_adam, trainer = client._trainer.optim_step, client._trainer
    trainer.optim_step = lambda adam: taken.append(gradients(trainer)) or step_of_adam(AdamParams(0.0))

    async def gradient(num_minibatches: int) -> int:
        settings = config(tmp_path, num_minibatches=num_minibatches, num_substeps=substeps)
        dataset = LowTokenDataset(LowTokenBuilder(batch_size=8, seconds=0.1))
        async with GroupSource(dataset, 1, 4, num_minibatches=num_minibatches) as source:
            source.set_policy(0, client.save_weights_and_get_sampling_client())
            outcome = await train_step(Learner(settings, client, RunFolder(tmp_path)), source, 0, AdamParams(0.0), {})
        return len(outcome.groups_P)

    assert asyncio.run(gradient(1)) == asyncio.run(gradient(minibatches)) == 8
    whole, streamed = taken
    for name, expected in whole.items():
        assert (streamed[name] - expected).norm() <= ROUNDING * expected.norm() + 1e-12, name


# Trap: data older than allowed, prompts skipped or doubled, also after kills.
def test_asynchronous_training_is_never_older_than_allowed_and_takes_every_prompt_once(tmp_path: Path) -> None:
    LowTokenGroup.made.clear()
    settings = config(
        tmp_path,
        env=LowTokenBuilder(n_batches=12, seconds=0.2),
        max_steps_off_policy=2,
        transcript_every=1,
        num_groups_to_log=4,
    )
    asyncio.run(train.main(settings))
    records = metrics(tmp_path)
    ages = [record["progress/batch"] - record["sampling_client/step_min"] for record in records]
    assert max(ages) == 2 and len(records) == 12
    assert LowTokenGroup.made == Counter(range(48))
    assert trained_problems(tmp_path) == {step: list(range(4 * step, 4 * step + 4)) for step in range(12)}
    assert (tmp_path / "plots" / "timeline.png").exists()


def trained_problems(folder: Path) -> dict[int, list[int]]:
    """step -> the problems whose groups it trained on, from the transcripts."""
    problems = {}
    for file in sorted((folder / "transcripts").glob("0*.jsonl")):
        members = [json.loads(line) for line in file.read_text().splitlines()]
        problems[int(file.stem)] = sorted({int(member["turns"][0]["logs"]["problem"]) for member in members})
    return problems


def test_queued_groups_are_restored_and_unfinished_ones_begin_again(torch_service) -> None:  # noqa: ANN001
    client = torch_service.create_training_client("tiny")
    # the members of every fifth problem answer within a second
    dataset = LowTokenDataset(LowTokenBuilder(seconds=3.0))

    async def interrupted() -> list:
        source = GroupSource(dataset, 6, 4, max_steps_off_policy=1)
        with pytest.raises(KeyboardInterrupt):
            async with source:
                source.set_policy(0, client.save_weights_and_get_sampling_client())
                while not source.state():  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
                state = source.state()
                raise KeyboardInterrupt
        return json.loads(json.dumps(state))

    async def resumed(state: list) -> list:
        LowTokenGroup.made.clear()
        quick = CountingDataset(LowTokenBuilder())
        async with GroupSource(quick, 6, 4, max_steps_off_policy=1) as source:
            source.restore(state)
            source.set_policy(0, client.save_weights_and_get_sampling_client())
            batches = [group async for groups in source.minibatches(0) for group in groups]
            source.set_policy(1, client.save_weights_and_get_sampling_client())
            assert sorted(quick.read) == [0, 1, 2]  # each once, by `restore` or later
            return batches

    state = asyncio.run(interrupted())
    groups = asyncio.run(resumed(state))
    restored = {saved["batch"] * 4 + saved["place"] for saved in state}
    assert restored and set(LowTokenGroup.made) == set(range(12)) - restored
    assert [group.trajectories_G[0].transitions[0].ob.to_ints()[1] - 4 for group in groups] == [0, 1, 2, 3]
    assert all(len(group.get_total_rewards()) == 3 for group in groups)


def test_an_asynchronous_run_that_is_killed_trains_on_every_prompt_once(tmp_path: Path) -> None:
    arguments = [
        "rl/train_cli.py",
        "env=tests.test_group_sources:LowTokenBuilder",
        *("env.n_batches=30", "env.seconds=0.1", "max_tokens=4", "max_steps_off_policy=2", "save_every=2"),
        *("transcript_every=1", "num_groups_to_log=4", "backend.engine=torch"),
    ]
    for file, count in (("metrics.jsonl", 11), ("training_state.json", 7)):
        kill_at(arguments, tmp_path, file, count)
    assert "resuming" in finish(arguments, tmp_path)
    assert steps_logged(tmp_path) == 30
    assert trained_problems(tmp_path) == {step: list(range(4 * step, 4 * step + 4)) for step in range(30)}
    assert max(record["progress/batch"] - record["sampling_client/step_min"] for record in metrics(tmp_path)) <= 2


# Trap: a crash in a task that nobody awaits.
@pytest.mark.parametrize("steps_off_policy", [0, 3])
def test_a_crashing_builder_stops_the_run_with_its_own_traceback(steps_off_policy: int, tmp_path: Path) -> None:
    settings = config(
        tmp_path, env=LowTokenBuilder(n_batches=50, crash_at=17, seconds=0.2), max_steps_off_policy=steps_off_policy
    )
    with pytest.raises(ZeroDivisionError, match="the builder's own") as raised:
        asyncio.run(train.main(settings))
    assert "make_envs" in {entry.name for entry in raised.traceback}
    assert len(metrics(tmp_path)) == (4 if steps_off_policy == 0 else 1), (
        "batch 4 has the crash; 3 steps ahead it is met in step 1"
    )


def test_settings_that_cannot_go_together_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"num_minibatches": 3}, "num_minibatches=2 does|num_minibatches=4 does"),
        ({"num_minibatches": 2, "advantage": BatchMean()}, "needs the whole batch"),
        ({"num_minibatches": 4, "num_substeps": 3}, "multiple of the other"),
        ({"max_steps_off_policy": -1}, "at least 0"),
        ({"loss_fn": "dro", "loss_fn_config": {"beta": 0.1}, "loss_reduction": "token_mean"}, "not proportional"),
    ):
        with pytest.raises(ConfigError, match=message):
            asyncio.run(train.main(config(tmp_path, **settings)))
