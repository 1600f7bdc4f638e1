"""Environments that raise, return and do what they should not, in a real asynchronous run: each
costs its own rollout and nothing else.
"""

import asyncio
import json
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chz
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CookbookError, DataError
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import read_metrics
from rl import env_calls, train
from rl.rollout_state import group_from_json, group_to_json
from rl.rollouts import Policy, RolloutLimits, do_rollouts
from rl.types import (
    Env,
    EnvGroupBuilder,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    RolloutError,
    StepResult,
    StopCondition,
    TrajectoryGroup,
)
from tests.hostile_kinds import (
    GROUPS,
    KINDS,
    MEMBERS,
    PROMPT,
    TIMEOUT,
    TwoTurns,
    await_what_was_cancelled,
    hang,
    raises,
    returns,
)

SECONDS = 3.0  # that a call of an environment may take here
GROUP_SIZE, HOSTILE = 4, 1  # members of a group, and the one that misbehaves


class HostileGroup(EnvGroupBuilder):
    """One member, or the builder itself, misbehaves in the way `kind`; the other members' rewards
    are 0, 0.5 and 0.75.
    """

    def __init__(self, kind: str):
        self.kind, self.member = kind, MEMBERS[kind][0] if kind in MEMBERS else {}
        for name, method in GROUPS[kind][0].items() if kind in GROUPS else ():
            setattr(self, name, method)

    async def make_envs(self) -> Sequence[Env]:
        return [
            TwoTurns(g / 4 if g != HOSTILE else 0.5, self.member if g == HOSTILE else {}) for g in range(GROUP_SIZE)
        ]

    def logging_tags(self) -> list[str]:
        return [self.kind]


class HostileDataset(RLDataset):
    groups_per_batch = 16

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [HostileGroup(kind) for kind in self.kinds(index)]

    def kinds(self, index: int) -> list[str]:
        """First those that hang, together; the others dealt out, so that no batch has only groups
        that are lost as a whole.
        """
        hanging = [kind for kind, (_, error) in KINDS.items() if error == TIMEOUT]
        return hanging if index == 0 else [kind for kind in KINDS if kind not in hanging][index - 1 :: len(self) - 1]

    def __len__(self) -> int:
        return -(-len(KINDS) // self.groups_per_batch)


@chz.chz
class HostileBuilder(RLDatasetBuilder):
    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
        return HostileDataset(), None


@dataclass
class Finished:
    """What a run leaves: its groups by kind, its metrics, and the transcripts' lines by kind."""

    groups: dict[str, TrajectoryGroup] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, done = tmp_path_factory.mktemp("run"), Finished()
    write = train.write_rollouts

    def write_and_keep(path: Path, step: int, groups_P: Sequence[TrajectoryGroup], *others: Any) -> Path:
        done.groups |= {group.builder.kind: group for group in groups_P if isinstance(group.builder, HostileGroup)}
        return write(path, step, groups_P, *others)

    settings = train.Config(
        env=HostileBuilder(batch_size=HostileDataset.groups_per_batch, group_size=GROUP_SIZE),
        max_tokens=3,
        limits=RolloutLimits(max_turns=2, env_seconds=SECONDS, max_retries=1),
        max_steps_off_policy=1,
        save_every=1,
        keep_checkpoints=1,
        transcript_every=1,
        num_groups_to_log=100,
        log_path=str(folder / "hostile"),
        backend=BackendConfig(engine="torch"),
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(env_calls, "CLEANUP_SECONDS", 0.2)
        patch.setattr(train, "write_rollouts", write_and_keep)
        asyncio.run(train.main(settings))
    done.metrics = read_metrics(folder / "hostile")
    for file in sorted((folder / "hostile" / "transcripts").glob("0*.jsonl")):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            done.lines.setdefault("".join(line["tags"]), []).append(line)
        assert "<!doctype html>" in file.with_suffix(".html").read_text(encoding="utf-8")
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_each_costs_its_own_rollout_and_nothing_else(kind: str, finished: Finished) -> None:
    group, error = finished.groups[kind], KINDS[kind][1]
    lost = 0 if error is None else 1 if kind in MEMBERS else GROUP_SIZE
    assert [type(lost).__name__ for lost in group.errors] == [error] * lost
    assert len(group.trajectories_G) == len(group.final_rewards_G) == len(group.metrics_G) == GROUP_SIZE - lost
    assert group.num_retries == (1 if error and kind in MEMBERS else 0)
    if kind in MEMBERS:
        kept = [g for g in range(GROUP_SIZE) if error is None or g != HOSTILE]
        rewards = {g: g / 4 if g != HOSTILE else 0.5 for g in kept}
        if kind == "tokens without end":
            rewards[HOSTILE] = 1.0  # 0.5 in each of two turns
        assert group.get_total_rewards() == [rewards[g] for g in kept], "no other member's reward has changed"
    for trajectory in group.trajectories_G:
        for turn in trajectory.transitions:
            assert len(turn.ac.tokens) == len(turn.ac.logprobs) == 3
            assert {type(value) for value in (turn.reward, *turn.metrics.values())} == {float}
            assert {type(value) for value in (*turn.metrics, *turn.logs, *turn.logs.values())} <= {str}
    if kind == "changes what it returned":
        first, second = group.trajectories_G[HOSTILE].transitions
        assert (first.ob.to_ints(), first.metrics, first.logs) == (PROMPT, {"turn": 1.0}, {"turn": "1"})
        assert second.ob.to_ints() == [*PROMPT, *first.ac.tokens, 12]
    saved = json.loads(json.dumps(group_to_json(group)))
    again = group_from_json(saved, HostileGroup(kind))
    assert json.dumps(group_to_json(again)) == json.dumps(saved)
    assert str([vars(t) for t in again.trajectories_G]) == str([vars(t) for t in group.trajectories_G])
    if "tags" not in kind:
        errors = [line["error"] for line in finished.lines[kind] if line["error"]]
        assert len(finished.lines[kind]) == GROUP_SIZE and len(errors) == lost
        assert all(error in line for line in errors if error)


def test_the_run_counts_what_it_lost(finished: Finished) -> None:
    lost = sum((1 if kind in MEMBERS else GROUP_SIZE) for kind, (_, error) in KINDS.items() if error)
    episodes = sum(record["env/all/total_episodes"] for record in finished.metrics)
    assert sum(record["rollout_errors/total"] for record in finished.metrics) == lost
    assert episodes == GROUP_SIZE * len(KINDS) - lost
    assert all(0 <= record["env/all/reward/total"] <= 1 for record in finished.metrics)
    assert any("env/all/wild" in record["non_finite"] for record in finished.metrics if "non_finite" in record)
    assert len(KINDS) > 100


def rollouts(service: Any, *groups: EnvGroupBuilder, **limits: Any) -> list[TrajectoryGroup]:
    client = service.create_training_client("tiny").save_weights_and_get_sampling_client()
    return asyncio.run(
        do_rollouts(groups, Policy(client, 3), (0,), RolloutLimits(**{"max_retries": 0, "env_seconds": 60} | limits))
    )


@pytest.mark.parametrize(
    "error", [SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit(), StopIteration()]
)
def test_where_most_rollouts_fail_the_run_ends_with_an_error(error: BaseException, torch_service: Any) -> None:
    """And never as if all were well, with the exit status of the environment's SystemExit(0)."""

    class Group(EnvGroupBuilder):
        async def make_envs(self) -> Sequence[Env]:
            return [TwoTurns(1.0, {"step": raises(error)}) for _ in range(3)]

    with pytest.raises(Exception, match=type(error).__name__) as raised:
        rollouts(torch_service, Group())
    assert any("3 of 3 rollouts failed" in note for note in raised.value.__notes__)


ENV = TwoTurns(0.0, {})


@pytest.mark.parametrize("made", [None, [], [None], [ENV, ENV], "abc", 3, [TwoTurns]])
def test_a_builder_that_makes_no_environments_is_named(made: Any, torch_service: Any) -> None:
    class OddGroup(EnvGroupBuilder):
        make_envs = returns(made)

    with pytest.raises(CookbookError, match="OddGroup.make_envs returned"):
        rollouts(torch_service, OddGroup())


def test_a_step_that_needs_what_no_rollout_gives_is_refused_before_sampling(torch_service: Any) -> None:
    class Demanding(TwoTurns):
        async def step(self, action: list[int], *, extra: dict, clock: float) -> StepResult:  # type: ignore[override]
            raise AssertionError

    class Group(EnvGroupBuilder):
        async def make_envs(self) -> Sequence[Env]:
            return [Demanding(0.0, {})]

    with pytest.raises(CookbookError, match="Demanding.step cannot be called: missing a required .*'clock'"):
        rollouts(torch_service, Group())


@pytest.mark.parametrize("later", [None, [], [ENV]])
def test_a_retry_that_gets_fewer_environments_is_the_members_failure(later: Any, torch_service: Any) -> None:
    class Group(EnvGroupBuilder):
        calls = 0

        async def make_envs(self) -> Any:
            self.calls += 1
            return (
                [TwoTurns(g, {"step": raises(OSError())} if g == 3 else {}) for g in range(4)]
                if self.calls == 1
                else later
            )

    (group,) = rollouts(torch_service, Group(), max_retries=1)
    assert group.get_total_rewards() == [0.0, 1.0, 2.0] and "make_envs returned" in str(group.errors[0])


def test_a_builder_cannot_end_the_program_without_a_word(torch_service: Any) -> None:
    class Group(EnvGroupBuilder):
        make_envs = raises(SystemExit(0))

    with pytest.raises(RolloutError, match="make_envs raised SystemExit"):
        rollouts(torch_service, Group())


def test_cleanup_comes_at_the_end_of_every_group(torch_service: Any) -> None:
    calls: list[str] = []

    class Group(HostileGroup):
        async def cleanup(self) -> None:
            calls.append(self.kind)

    class Broken(Group):
        make_envs = raises(ZeroDivisionError("mine"))

    rollouts(
        torch_service, Group("None"), Group("prints and warns"), Group("group rewards raise"), max_failed_fraction=1.0
    )
    assert sorted(calls) == ["None", "group rewards raise", "prints and warns"]
    with pytest.raises(ZeroDivisionError, match="mine"):
        rollouts(torch_service, Broken("None"))
    assert len(calls) == 4


def test_a_method_that_blocks_all_others_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env_calls, "_blocked", {})
    monkeypatch.setattr(env_calls, "BLOCKED_SECONDS", 0.0)
    monkeypatch.setattr(env_calls, "BLOCKED_TOTAL", 0.02)

    class Slow:
        async def step(self) -> None:
            time.sleep(0.015)  # noqa: ASYNC251
            await asyncio.sleep(0)

    async def calls() -> None:
        for _ in range(4):
            await env_calls.call(lambda result: result, 5.0, env_calls.SamplingClock(), Slow(), "step")

    asyncio.run(calls())
    out = capsys.readouterr().out
    assert out.count("WARNING Slow.step has blocked the event loop") == 1 and "asyncio.to_thread" in out


def test_a_seat_is_not_billed_for_what_the_others_sample(torch_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seat 1 waits for seat 0's turns for longer than a call may take; a seat that waits for nobody
    is timed out. The clock moves while a turn is sampled, and while a seat hangs.
    """
    now = 0.0
    monkeypatch.setattr(env_calls, "time", SimpleNamespace(monotonic=lambda: now))

    class SlowPolicy(Policy):
        async def __call__(self, *arguments: Any) -> Any:
            nonlocal now
            now += 1.5
            return await super().__call__(*arguments)

    class Game(EnvGroupBuilder):
        members_are_independent = False

        def __init__(self, hangs: bool):
            self.hangs = hangs

        async def make_envs(self) -> Sequence[Env]:
            over = asyncio.Event()

            async def last_step(env: TwoTurns, action: list[int]) -> StepResult:
                result = await TwoTurns._step(env, action)
                if result.episode_done:
                    over.set()
                return result

            async def wait(env: TwoTurns) -> tuple[Observation, StopCondition]:
                nonlocal now
                await over.wait()
                if self.hangs:
                    now += 1.5
                    await hang()
                return await TwoTurns._initial_observation(env)

            return [TwoTurns(0.0, {"step": last_step}), TwoTurns(1.0, {"initial_observation": wait})]

    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()
    limits = RolloutLimits(max_retries=0, env_seconds=1e-3, max_failed_fraction=1.0)
    (fair,), (lost,) = (
        asyncio.run(do_rollouts([Game(hangs)], SlowPolicy(client, 3), (0,), limits)) for hangs in (False, True)
    )
    assert len(fair.trajectories_G) == 2 and not lost.trajectories_G and "more than 0.001 s" in str(lost.errors[0])


@pytest.mark.parametrize(
    ("never_comes", "message"),
    [(hang, "turn 0 took more than 5 s"), (await_what_was_cancelled, "turn 0 was cancelled")],
)
def test_a_sampled_turn_that_never_comes_costs_one_rollout(never_comes: Any, message: str, torch_service: Any) -> None:
    class LosesSamples(Policy):
        async def __call__(self, ob: Observation, stop: StopCondition, seed: tuple[int, ...], *others: Any) -> Any:
            if seed[2] == HOSTILE:
                await never_comes()
            return await super().__call__(ob, stop, seed, *others)

    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()
    # the first sample takes longest
    asyncio.run(do_rollouts([HostileGroup("prints and warns")], Policy(client, 3), (0,)))
    limits = RolloutLimits(max_retries=0, sampling_seconds=5.0)
    (group,) = asyncio.run(do_rollouts([HostileGroup("prints and warns")], LosesSamples(client, 3), (0,), limits))
    assert group.get_total_rewards() == [0.0, 0.5, 0.75] and message in str(group.errors[0])


def train_on(dataset: RLDataset, folder: Path) -> None:
    @chz.chz
    class Builder(RLDatasetBuilder):
        async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
            return dataset, None

    backend = BackendConfig(engine="torch")
    asyncio.run(train.main(train.Config(env=Builder(), max_tokens=3, log_path=str(folder / "run"), backend=backend)))


def test_a_second_ctrl_c_stops_at_once_also_inside_an_environment(tmp_path: Path) -> None:
    async def interrupt_twice(env: TwoTurns, action: list[int]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    class Dataset(HostileDataset):
        def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
            group = HostileGroup("None")
            group.member = {"step": interrupt_twice}
            return [group]

    with pytest.raises(KeyboardInterrupt):
        train_on(Dataset(), tmp_path)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda: None, "returned None"),
        (list, "returned no group"),
        (lambda: [HostileGroup], "not an EnvGroupBuilder"),
        (lambda: [][0], r"raised IndexError: .*test_hostile_environments.py:\d+"),
    ],
)
def test_a_dataset_without_groups_is_named_before_anything_is_sampled(
    batch: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    class OddDataset(HostileDataset):
        def get_batch(self, index: int) -> Any:
            return batch()

    with pytest.raises(DataError, match=rf"OddDataset.get_batch\(0\) {message}|not an EnvGroupBuilder"):
        train_on(OddDataset(), tmp_path)


def test_the_passes_of_a_failed_batch_are_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []
    monkeypatch.setattr("rl.train_step._Passes.forward_backward", lambda self, data_D, *_: submitted.append(data_D))

    class Dataset(HostileDataset):
        def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
            return [HostileGroup("prints and warns"), HostileGroup("group rewards raise"), HostileGroup("tags raise")]

    with pytest.raises(ValueError, match="mine"):
        train_on(Dataset(), tmp_path)
    assert not submitted
