"""Environments that raise, return and do what they should not, in a real asynchronous run: each costs its own rollout and nothing else."""

import asyncio
import json
import math
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import torch

from backend.config import BackendConfig
from backend.errors import ContextLengthError, CookbookError, DataError, EngineError
from backend.types import ModelInput
from renderers.types import Renderer
from rl import env_calls, train
from rl.rollout_state import group_from_json, group_to_json
from rl.rollouts import Policy, RolloutLimits, do_rollouts
from rl.types import (
    Env,
    EnvGroupBuilder,
    EpisodeEnd,
    Metrics,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    RolloutError,
    StepResult,
    StopCondition,
    Trajectory,
    TrajectoryGroup,
)
from tracking.metrics_log import read_metrics

PROMPT = [10, 11]
SECONDS = 3.0  # that a call of an environment may take here
GROUP_SIZE, HOSTILE = 4, 1  # members of a group, and the one that misbehaves


class TwoTurns(Env):
    """Two turns, then reward `reward`. `does` replaces methods by name: a function of this object and the method's arguments."""

    def __init__(self, reward: float, does: dict[str, Callable[..., Any]]):
        self.reward, self.does, self.tokens, self.turn = reward, does, [*PROMPT], 0

    def initial_observation(self) -> Any:
        return self.does.get("initial_observation", TwoTurns._initial_observation)(self)

    def step(self, action: list[int]) -> Any:
        return self.does.get("step", TwoTurns._step)(self, action)

    def cut_short(self, reason: EpisodeEnd) -> Any:
        return self.does.get("cut_short", TwoTurns._cut_short)(self, reason)

    def close(self) -> Any:
        return self.does.get("close", TwoTurns._close)(self)

    async def _initial_observation(self) -> tuple[Observation, StopCondition]:
        return ModelInput.from_ints(PROMPT), []

    async def _step(self, action: list[int]) -> StepResult:
        self.turn += 1
        self.tokens += [*action, 12]
        done = self.turn == 2
        return StepResult(self.reward if done else 0.0, done, ModelInput.from_ints(self.tokens), [], {"turn": self.turn})

    async def _cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        return 0.0, {}

    async def _close(self) -> None:
        return


def returns(value: Any) -> Callable[..., Any]:
    async def method(*_: Any) -> Any:
        return value

    return method


def raises(error: BaseException) -> Callable[..., Any]:
    async def method(*_: Any) -> Any:
        raise error

    return method


def at_once(error: BaseException) -> Callable[..., Any]:
    """No coroutine: it raises when it is called."""

    def method(*_: Any) -> Any:
        raise error

    return method


def changed(**fields: Any) -> dict[str, Callable[..., Any]]:
    """A proper first step but for these fields."""

    async def step(env: TwoTurns, action: list[int]) -> StepResult:
        result = await TwoTurns._step(env, action)
        if env.turn == 1:
            for name, value in fields.items():
                setattr(result, name, value)
        return result

    return {"step": step}


def ended(**fields: Any) -> dict[str, Callable[..., Any]]:
    """The episode is done after one step, with these fields."""
    return {"step": returns(StepResult(**{"reward": 0.5, "episode_done": True, "next_observation": ModelInput.empty()} | fields))}


async def hang(*_: Any) -> None:
    await asyncio.sleep(3600)


async def hang_whatever_comes(*_: Any) -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except BaseException:
            continue


async def await_what_was_cancelled(*_: Any) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def cancel_itself_and_go_on(env: TwoTurns, action: list[int]) -> StepResult:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    return await TwoTurns._step(env, action)


async def cancel_itself_and_wait(env: TwoTurns, action: list[int]) -> StepResult:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0.01)
    return await TwoTurns._step(env, action)


async def time_out_inside(env: TwoTurns, action: list[int]) -> StepResult:
    """Legal: its own time-outs and task groups cancel the task of the rollout, and take it back."""
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)
    except TimeoutError:
        pass
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(raises(ValueError("in a child"))())
            await asyncio.sleep(60)
    except* ValueError:
        pass
    return await TwoTurns._step(env, action)


async def change_the_action(env: TwoTurns, action: list[int]) -> StepResult:
    result = await TwoTurns._step(env, action)
    action.clear()
    return result


async def change_what_was_returned(env: TwoTurns, action: list[int]) -> StepResult:
    """One list of tokens, one of stops, one dict of metrics and one of logs for all turns, changed in each."""
    if env.turn == 0:
        env.shared = (ModelInput.from_ints(env.tokens), ["a"], {"turn": 0.0}, {"turn": "0"})  # type: ignore[attr-defined]
    result = await TwoTurns._step(env, action)
    observation, stops, metrics, logs = env.shared  # type: ignore[attr-defined]
    tokens = observation.chunks[0].tokens
    assert isinstance(tokens, list)
    tokens += [*action, 12]
    stops.append("b")
    metrics["turn"], logs["turn"] = float(env.turn), str(env.turn)
    return StepResult(result.reward, result.episode_done, observation, stops, metrics, logs)


async def shout(env: TwoTurns, action: list[int]) -> StepResult:
    for _ in range(20):
        print("noise", end=" ")
        warnings.warn("noise", stacklevel=1)
    return await TwoTurns._step(env, action)


async def close_the_executor(env: TwoTurns, action: list[int]) -> StepResult:
    await asyncio.get_running_loop().shutdown_default_executor()
    return await TwoTurns._step(env, action)


async def steps_as_generator(env: TwoTurns, action: list[int]) -> Any:
    yield await TwoTurns._step(env, action)


def recurse(*_: Any) -> Any:
    return recurse()


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no message")


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no text")


class FailingFields(StepResult):
    def __getattribute__(self, name: str) -> Any:
        if name == "metrics":
            raise OSError("no metrics")
        return super().__getattribute__(name)


MALFORMED, RAISED, TIMEOUT, CUT = "MalformedStep", "EnvError", "EnvTimeout", "RolloutError"
never_done = {"step": returns(StepResult(0.5, False, ModelInput.from_ints([5]), []))}

# name: (what the member does, the class of the error it is lost with); None: it is kept, and its step rewards are 0.5
MEMBERS: dict[str, tuple[dict[str, Callable[..., Any]], str | None]] = {
    # --- raises
    "ValueError": ({"step": raises(ValueError("mine"))}, RAISED),
    "SystemExit(0)": ({"step": raises(SystemExit(0))}, RAISED),
    "SystemExit before the first turn": ({"initial_observation": raises(SystemExit("bye"))}, RAISED),
    "KeyboardInterrupt": ({"step": raises(KeyboardInterrupt())}, RAISED),
    "GeneratorExit": ({"step": raises(GeneratorExit())}, RAISED),
    "CancelledError": ({"step": raises(asyncio.CancelledError())}, RAISED),
    "a cancelled future": ({"step": await_what_was_cancelled}, RAISED),
    "StopIteration": ({"step": raises(StopIteration(3))}, RAISED),
    "StopIteration at once": ({"step": at_once(StopIteration(3))}, RAISED),
    "SystemExit at once": ({"step": at_once(SystemExit(0))}, RAISED),
    "StopAsyncIteration": ({"step": raises(StopAsyncIteration())}, RAISED),
    "BaseExceptionGroup": ({"step": raises(BaseExceptionGroup("two", [SystemExit(0), ValueError("x")]))}, RAISED),
    "MemoryError": ({"step": raises(MemoryError())}, RAISED),
    "RecursionError": ({"step": recurse}, RAISED),
    "TimeoutError of its own": ({"step": raises(TimeoutError("the tool's"))}, RAISED),
    "errors of the backend": ({"step": raises(EngineError("another engine"))}, RAISED),
    "ContextLengthError of another model": ({"step": raises(ContextLengthError("too long"))}, RAISED),
    "an error without a message": ({"step": raises(Mute())}, RAISED),
    "an error that is no text": ({"step": raises(ValueError("\udc80"))}, RAISED),
    "RolloutError that is no text": ({"step": raises(RolloutError("\udc80"))}, RAISED),
    "RolloutError": ({"step": raises(RolloutError("grader down"))}, "RolloutError"),
    "initial_observation raises": ({"initial_observation": raises(OSError("no disk"))}, RAISED),
    "cut_short raises": (never_done | {"cut_short": raises(OSError("no disk"))}, RAISED),
    "close raises": ({"close": raises(OSError("no disk"))}, RAISED),
    "close exits": ({"close": raises(SystemExit(0))}, RAISED),
    # --- hangs, cancels
    "hangs": ({"step": hang}, TIMEOUT),
    "hangs before the first turn": ({"initial_observation": hang}, TIMEOUT),
    "cannot be cancelled": ({"step": hang_whatever_comes}, TIMEOUT),
    "close hangs": ({"close": hang}, TIMEOUT),
    "close cannot be cancelled": ({"close": hang_whatever_comes}, TIMEOUT),
    "cut_short hangs": (never_done | {"cut_short": hang}, TIMEOUT),
    "cancels its own task": ({"step": cancel_itself_and_go_on}, RAISED),
    "cancels its own task and waits": ({"step": cancel_itself_and_wait}, RAISED),
    # --- returns what is no step
    "None": ({"step": returns(None)}, MALFORMED),
    "a tuple": ({"step": returns((0.5, True))}, MALFORMED),
    "no coroutine": ({"step": lambda env, action: StepResult(0.5, True, ModelInput.empty())}, MALFORMED),
    "an asynchronous generator": ({"step": steps_as_generator}, MALFORMED),
    "fields that raise": ({"step": returns(FailingFields(0.5, True, ModelInput.empty()))}, RAISED),
    "done: text": (ended(episode_done="no"), MALFORMED),
    "done: None": (ended(episode_done=None), MALFORMED),
    # --- rewards
    "reward nan": (ended(reward=math.nan), MALFORMED),
    "reward inf": (ended(reward=-math.inf), MALFORMED),
    "reward float32 nan": (ended(reward=np.float32("nan")), MALFORMED),
    "reward beyond all floats": (ended(reward=10**400), MALFORMED),
    "reward beyond fp32": (ended(reward=1e300), MALFORMED),
    "reward text": (ended(reward="0.5"), MALFORMED),
    "reward None": (ended(reward=None), MALFORMED),
    "reward list": (ended(reward=[0.5]), MALFORMED),
    "reward array": (ended(reward=np.array([0.5, 0.5])), MALFORMED),
    "reward text array": (ended(reward=np.array("0.5")), MALFORMED),
    "reward complex": (ended(reward=np.complex64(0.5)), MALFORMED),
    "cut_short None": (never_done | {"cut_short": returns(None)}, MALFORMED),
    "cut_short nan": (never_done | {"cut_short": returns((math.nan, {}))}, MALFORMED),
    "cut_short text": (never_done | {"cut_short": returns("ab")}, MALFORMED),
    # --- metrics and logs
    "metrics None": (ended(metrics=None), MALFORMED),
    "metrics list": (ended(metrics=[1.0]), MALFORMED),
    "metrics text": (ended(metrics={"a": "b"}), MALFORMED),
    "metrics of None": (ended(metrics={"a": None}), MALFORMED),
    "metrics beyond all floats": (ended(metrics={"a": 10**400}), MALFORMED),
    "logs None": (ended(logs=None), MALFORMED),
    "logs text": (ended(logs="text"), MALFORMED),
    "logs without text": (ended(logs={"a": Unprintable()}), RAISED),
    # --- observations and stop conditions
    "first observation None": ({"initial_observation": returns(None)}, MALFORMED),
    "first observation alone": ({"initial_observation": returns(ModelInput.from_ints(PROMPT))}, MALFORMED),
    "first observation of three parts": ({"initial_observation": returns((ModelInput.from_ints(PROMPT), [], 1))}, MALFORMED),
    "first observation text": ({"initial_observation": returns(("a question", []))}, MALFORMED),
    "first observation empty": ({"initial_observation": returns((ModelInput.empty(), []))}, MALFORMED),
    "first observation too long": ({"initial_observation": returns((ModelInput.from_ints([5] * 600), []))}, CUT),
    "observation None": (changed(next_observation=None), MALFORMED),
    "observation list": (changed(next_observation=[5, 6]), MALFORMED),
    "observation empty": (changed(next_observation=ModelInput.empty()), MALFORMED),
    "observation of texts": (changed(next_observation=ModelInput.from_ints(["a"])), MALFORMED),  # type: ignore[list-item]
    "observation of floats": (changed(next_observation=ModelInput.from_ints([5.5])), MALFORMED),  # type: ignore[list-item]
    "observation negative": (changed(next_observation=ModelInput.from_ints([-1])), MALFORMED),
    "observation outside the vocabulary": (changed(next_observation=ModelInput.from_ints([100_000])), MALFORMED),
    "observation beyond int64": (changed(next_observation=ModelInput.from_ints([2**70])), MALFORMED),
    "stop 7": (changed(next_stop_condition=7), MALFORMED),
    "stop empty text": (changed(next_stop_condition=""), MALFORMED),
    "stop with an empty text": (changed(next_stop_condition=["a", ""]), MALFORMED),
    "stop with None": (changed(next_stop_condition=[None]), MALFORMED),
    "stop with a surrogate": (changed(next_stop_condition=["\udc80"]), MALFORMED),
    "stop negative": (changed(next_stop_condition=[-1]), MALFORMED),
    "first stop 7": ({"initial_observation": returns((ModelInput.from_ints(PROMPT), 7))}, MALFORMED),
    # --- all of this is fine
    "reward true": (changed(reward=np.bool_(False)), None),
    "reward float32": (ended(reward=np.float32(0.5)), None),
    "reward array of no dimension": (ended(reward=np.array(0.5)), None),
    "reward tensor": (ended(reward=torch.tensor(0.5, requires_grad=True)), None),
    "reward fraction": (ended(reward=Fraction(1, 2)), None),
    "done: bool_": (ended(episode_done=np.bool_(True)), None),
    "metrics not finite": (ended(metrics={"wild": math.nan, "wilder": np.inf}), None),
    "metrics of other kinds": (ended(metrics={"np": np.float16(1), "bool": True, 3: torch.tensor(2), "\udc80": 1}), None),
    "logs of other kinds": (ended(logs={"n": 3, "o": object(), "none": None, "surrogate": "\udc80", 4: "four"}), None),
    "stop text": (changed(next_stop_condition="x"), None),
    "stop of other kinds": (changed(next_stop_condition=(np.int64(5), "y")), None),
    "observation of NumPy's": (changed(next_observation=ModelInput.from_ints(np.array([5, 6]))), None),  # type: ignore[arg-type]
    "an awaitable": ({"step": lambda env, action: asyncio.ensure_future(TwoTurns._step(env, action))}, None),
    "time-outs inside": ({"step": time_out_inside}, None),
    "clears the action": ({"step": change_the_action}, None),
    "changes what it returned": ({"step": change_what_was_returned}, None),
    "prints and warns": ({"step": shout}, None),
    "closes the executor": ({"step": close_the_executor}, None),
    "tokens without end": (never_done, None),
}


def rewarding(value: Any) -> Callable[..., Any]:
    async def compute_group_rewards(trajectories_G: list[Trajectory], envs_G: Sequence[Env]) -> Any:
        return [value for _ in trajectories_G]

    return compute_group_rewards


async def mutate(trajectories_G: list[Trajectory], envs_G: list[Env]) -> list[tuple[float, Metrics]]:
    size = len(trajectories_G)
    for trajectory in trajectories_G:
        for turn in trajectory.transitions:
            turn.ac.tokens.clear()
            turn.reward, turn.metrics = math.nan, None  # type: ignore[assignment]
    trajectories_G.clear()
    envs_G.clear()
    return [(0.0, {}) for _ in range(size)]


async def take_out_all_turns(trajectories_G: list[Trajectory], envs_G: Sequence[Env]) -> list[tuple[float, Metrics]]:
    for trajectory in trajectories_G:
        trajectory.transitions.clear()
    return [(0.5 * g, {"g": g}) for g in range(len(trajectories_G))]


async def lose_the_turns(trajectories_G: list[Trajectory], envs_G: Sequence[Env]) -> list[tuple[float, Metrics]]:
    trajectories_G[0].transitions = None  # type: ignore[assignment]
    return [(0.0, {}) for _ in trajectories_G]


# name: (methods of the group's builder, the class of the error that all its members are lost with, or None)
GROUPS: dict[str, tuple[dict[str, Callable[..., Any]], str | None]] = {
    "group rewards raise": ({"compute_group_rewards": raises(ValueError("mine"))}, RAISED),
    "group rewards exit": ({"compute_group_rewards": raises(SystemExit(0))}, RAISED),
    "group rewards hang": ({"compute_group_rewards": hang}, TIMEOUT),
    "group rewards None": ({"compute_group_rewards": returns(None)}, MALFORMED),
    "group rewards too few": ({"compute_group_rewards": returns([(0.0, {})])}, MALFORMED),
    "group rewards alone": ({"compute_group_rewards": rewarding(1.0)}, MALFORMED),
    "group rewards nan": ({"compute_group_rewards": rewarding((math.nan, {}))}, MALFORMED),
    "group metrics None": ({"compute_group_rewards": rewarding((0.0, None))}, MALFORMED),
    "group rewards are no coroutine": ({"compute_group_rewards": lambda trajectories_G, envs_G: []}, MALFORMED),
    "group rewards destroy trajectories": ({"compute_group_rewards": lose_the_turns}, RAISED),
    "group rewards of other kinds": ({"compute_group_rewards": rewarding([np.float32(0), {"a": np.bool_(True)}])}, None),
    "group rewards change trajectories": ({"compute_group_rewards": mutate}, None),
    "trajectories without a turn": ({"compute_group_rewards": take_out_all_turns}, None),
    "tags raise": ({"logging_tags": at_once(KeyError("tag"))}, RAISED),
    "tags exit": ({"logging_tags": at_once(SystemExit(0))}, RAISED),
    "tags text": ({"logging_tags": lambda: "tag"}, MALFORMED),
    "tags of numbers": ({"logging_tags": lambda: [3]}, MALFORMED),
    "cleanup raises": ({"cleanup": raises(OSError("no disk"))}, RAISED),
    "cleanup hangs": ({"cleanup": hang}, TIMEOUT),
}
KINDS = {**MEMBERS, **GROUPS}


class HostileGroup(EnvGroupBuilder):
    """One member, or the builder itself, misbehaves in the way `kind`; the other members' rewards are 0, 0.5 and 0.75."""

    def __init__(self, kind: str):
        self.kind, self.member = kind, MEMBERS[kind][0] if kind in MEMBERS else {}
        for name, method in GROUPS[kind][0].items() if kind in GROUPS else ():
            setattr(self, name, method)

    async def make_envs(self) -> Sequence[Env]:
        return [TwoTurns(g / 4 if g != HOSTILE else 0.5, self.member if g == HOSTILE else {}) for g in range(GROUP_SIZE)]

    def logging_tags(self) -> list[str]:
        return [self.kind]


class HostileDataset(RLDataset):
    groups_per_batch = 16

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [HostileGroup(kind) for kind in self.kinds(index)]

    def kinds(self, index: int) -> list[str]:
        """First those that hang, together; the others dealt out, so that no batch has only groups that are lost as a whole."""
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


@pytest.mark.parametrize("later", [None, [], [ENV]])
def test_a_retry_that_gets_fewer_environments_is_the_members_failure(later: Any, torch_service: Any) -> None:
    class Group(EnvGroupBuilder):
        calls = 0

        async def make_envs(self) -> Any:
            self.calls += 1
            return [TwoTurns(g, {"step": raises(OSError())} if g == 3 else {}) for g in range(4)] if self.calls == 1 else later

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

    rollouts(torch_service, Group("None"), Group("prints and warns"), Group("group rewards raise"), max_failed_fraction=1.0)
    assert sorted(calls) == ["None", "group rewards raise", "prints and warns"]
    with pytest.raises(ZeroDivisionError, match="mine"):
        rollouts(torch_service, Broken("None"))
    assert len(calls) == 4


def test_a_seat_is_not_billed_for_what_the_others_sample(torch_service: Any) -> None:
    """Seat 1 waits for seat 0's turns for longer than a call may take; a seat that waits for nobody is timed out."""

    class SlowPolicy(Policy):
        async def __call__(self, *arguments: Any) -> Any:
            await asyncio.sleep(1.5)
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
                await over.wait()
                if self.hangs:
                    await hang()
                return await TwoTurns._initial_observation(env)

            return [TwoTurns(0.0, {"step": last_step}), TwoTurns(1.0, {"initial_observation": wait})]

    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()
    limits = RolloutLimits(max_retries=0, env_seconds=2.0, max_failed_fraction=1.0)
    games = asyncio.run(do_rollouts([Game(False), Game(True)], SlowPolicy(client, 3), (0,), limits))
    assert [len(game.trajectories_G) for game in games] == [2, 1] and "more than 2 s" in str(games[1].errors[0])


@pytest.mark.parametrize(
    ("never_comes", "message"), [(hang, "turn 0 took more than 5 s"), (await_what_was_cancelled, "turn 0 was cancelled")]
)
def test_a_sampled_turn_that_never_comes_costs_one_rollout(never_comes: Any, message: str, torch_service: Any) -> None:
    class LosesSamples(Policy):
        async def __call__(self, ob: Observation, stop: StopCondition, seed: tuple[int, ...], *others: Any) -> Any:
            if seed[2] == HOSTILE:
                await never_comes()
            return await super().__call__(ob, stop, seed, *others)

    client = torch_service.create_training_client("tiny").save_weights_and_get_sampling_client()
    limits = RolloutLimits(max_retries=0, sampling_seconds=5.0)
    (group,) = asyncio.run(do_rollouts([HostileGroup("prints and warns")], LosesSamples(client, 3), (0,), limits))
    assert group.get_total_rewards() == [0.0, 0.5, 0.75] and message in str(group.errors[0])


def test_a_second_ctrl_c_stops_at_once_also_inside_an_environment(tmp_path: Path) -> None:
    async def interrupt_twice(env: TwoTurns, action: list[int]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    class Dataset(HostileDataset):
        def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
            group = HostileGroup("None")
            group.member = {"step": interrupt_twice}
            return [group]

    @chz.chz
    class Builder(RLDatasetBuilder):
        async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
            return Dataset(), None

    settings = train.Config(env=Builder(), max_tokens=3, log_path=str(tmp_path / "run"), backend=BackendConfig(engine="torch"))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(train.main(settings))


@pytest.mark.parametrize("built", [None, HostileDataset(), (None, None), (HostileDataset(), [1])])
def test_a_builder_without_datasets_is_named(built: Any, tmp_path: Path) -> None:
    @chz.chz
    class OddBuilder(RLDatasetBuilder):
        async def __call__(self, renderer: Renderer) -> Any:
            return built

    settings = train.Config(env=OddBuilder(), log_path=str(tmp_path / "run"))
    with pytest.raises(DataError, match="OddBuilder returned"):
        asyncio.run(train.main(settings))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda: None, "returned None"),
        (list, "returned no group"),
        (lambda: [HostileGroup], "no EnvGroupBuilder"),
        (lambda: [][0], r"raised IndexError: .*test_hostile_environments.py:\d+"),
    ],
)
def test_a_dataset_without_groups_is_named_before_anything_is_sampled(
    batch: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    class OddDataset(HostileDataset):
        def get_batch(self, index: int) -> Any:
            return batch()

    @chz.chz
    class Builder(RLDatasetBuilder):
        async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
            return OddDataset(), None

    settings = train.Config(env=Builder(), max_tokens=3, log_path=str(tmp_path / "run"), backend=BackendConfig(engine="torch"))
    with pytest.raises(DataError, match=rf"OddDataset.get_batch\(0\) {message}|no EnvGroupBuilder"):
        asyncio.run(train.main(settings))


def test_the_passes_of_a_failed_batch_are_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []
    monkeypatch.setattr("rl.train_step._Passes.forward_backward", lambda self, data_D, *_: submitted.append(data_D))

    class Dataset(HostileDataset):
        def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
            return [HostileGroup("prints and warns"), HostileGroup("group rewards raise"), HostileGroup("tags raise")]

    @chz.chz
    class Builder(RLDatasetBuilder):
        async def __call__(self, renderer: Renderer) -> tuple[RLDataset, None]:
            return Dataset(), None

    settings = train.Config(env=Builder(), max_tokens=3, log_path=str(tmp_path / "run"), backend=BackendConfig(engine="torch"))
    with pytest.raises(ValueError, match="mine"):
        asyncio.run(train.main(settings))
    assert not submitted
