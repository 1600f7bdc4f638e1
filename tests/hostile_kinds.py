"""What environments and builders of groups do that they should not, by name: the table of
test_hostile_environments.py.
"""

import asyncio
import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from posttrain.backend.errors import ContextLengthError, EngineError
from posttrain.backend.types import ModelInput
from rl.types import (
    Env,
    EpisodeEnd,
    Metrics,
    Observation,
    RolloutError,
    StepResult,
    StopCondition,
    Trajectory,
)

PROMPT = [10, 11]


class TwoTurns(Env):
    """Two turns, then reward `reward`. `does` replaces methods by name: a function of this object
    and the method's arguments.
    """

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
        return StepResult(
            self.reward if done else 0.0, done, ModelInput.from_ints(self.tokens), [], {"turn": self.turn}
        )

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
    return {
        "step": returns(
            StepResult(**{"reward": 0.5, "episode_done": True, "next_observation": ModelInput.empty()} | fields)
        )
    }


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
    """One list of tokens, one of stops, one dict of metrics and one of logs for all turns, changed
    in each.
    """
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

# name: (what the member does, the class of the error it is lost with); None: it is kept, and its
# step rewards are 0.5
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
    "metrics of the run's name": (ended(metrics={"reward/total": 1.0}), MALFORMED),
    "metrics beyond all floats": (ended(metrics={"a": 10**400}), MALFORMED),
    "logs None": (ended(logs=None), MALFORMED),
    "logs text": (ended(logs="text"), MALFORMED),
    "logs without text": (ended(logs={"a": Unprintable()}), RAISED),
    # --- observations and stop conditions
    "first observation None": ({"initial_observation": returns(None)}, MALFORMED),
    "first observation alone": ({"initial_observation": returns(ModelInput.from_ints(PROMPT))}, MALFORMED),
    "first observation of three parts": (
        {"initial_observation": returns((ModelInput.from_ints(PROMPT), [], 1))},
        MALFORMED,
    ),
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
    "metrics of other kinds": (
        ended(metrics={"np": np.float16(1), "bool": True, 3: torch.tensor(2), "\udc80": 1}),
        None,
    ),
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


# name: (methods of the group's builder, the class of the error that all its members are lost with,
# or None)
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
    "group rewards of other kinds": (
        {"compute_group_rewards": rewarding([np.float32(0), {"a": np.bool_(True)}])},
        None,
    ),
    "group rewards change trajectories": ({"compute_group_rewards": mutate}, None),
    "trajectories without a turn": ({"compute_group_rewards": take_out_all_turns}, None),
    "tags raise": ({"logging_tags": at_once(KeyError("tag"))}, RAISED),
    "tags exit": ({"logging_tags": at_once(SystemExit(0))}, RAISED),
    "tags text": ({"logging_tags": lambda: "tag"}, MALFORMED),
    "tags of numbers": ({"logging_tags": lambda: [3]}, MALFORMED),
    "tags of all": ({"logging_tags": lambda: ["mine", "all"]}, MALFORMED),
    "cleanup raises": ({"cleanup": raises(OSError("no disk"))}, RAISED),
    "cleanup hangs": ({"cleanup": hang}, TIMEOUT),
}
KINDS = {**MEMBERS, **GROUPS}
