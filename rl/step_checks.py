"""Checks on the values that environments, builders and datasets return: copied into plain types.
Any real number becomes a float, NumPy's included; logs become text. A value that rl/types.py does
not allow raises MalformedStep (environment) or DataError (dataset, its builder).
"""

import inspect
import numbers
import traceback
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from posttrain.backend.errors import ConfigError, CookbookError, DataError
from posttrain.backend.types import EncodedTextChunk, ModelInput
from posttrain.renderers.types import Renderer, Tokenizer
from posttrain.tracking.datasets import ListDataset, train_and_test
from rl.types import (
    Env,
    EnvGroupBuilder,
    Logs,
    MalformedStep,
    Metrics,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    RolloutError,
    StepResult,
    StopCondition,
    Trajectory,
    TrajectoryGroup,
    Transition,
)

# a larger reward overflows fp32 in the norm of a gradient, which would end the run there
MAX_REWARD = 1e9

# Metrics of the run itself (metrics.py), of samples (evaluators.py) and of posttrain-eval
# (evaluation_results.py): an environment's own of that name would replace them, or be replaced.
# `turns`, which several games count in their own way, is no such name.
RESERVED_METRICS = {
    *("ac_tokens_per_turn", "ob_tokens_per_turn", "turns_per_episode", "total_episodes", "total_turns"),
    *("total_ac_tokens", "total_ob_tokens", "frac_truncated", "reward/total"),
    *("samples_lost", "reward", "tokens"),
}
RESERVED_PREFIXES = ("ended_by/", "by_group/", "pass@", "maj@", "best@")
RESERVED_TAG = "all"  # of env/all/...

_made: WeakValueDictionary[int, Env] = WeakValueDictionary()  # by id, what `make_envs` has returned


def is_reserved(metric: str) -> bool:
    return metric in RESERVED_METRICS or metric.startswith(RESERVED_PREFIXES)


# --- of an environment ---------------------------------------------------------------------------


def first_observation(result: object) -> tuple[Observation, StopCondition]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise MalformedStep(f"initial_observation returned {result!r:.100}, not a prompt and a stop condition")
    return _prompt(result[0], "the first observation"), _stop_condition(result[1])


def step_result(result: object) -> StepResult:
    """A copy. `next_observation` is empty if the episode is done."""
    if not isinstance(result, StepResult):
        raise MalformedStep(f"step returned {result!r:.100}, not a StepResult")
    done = _truth(result.episode_done)
    return StepResult(
        reward=reward(result.reward),
        episode_done=done,
        next_observation=ModelInput.empty() if done else _prompt(result.next_observation, "next_observation"),
        next_stop_condition=None if done else _stop_condition(result.next_stop_condition),
        metrics=_metrics(result.metrics),
        logs=_logs(result.logs),
    )


def reward_and_metrics(result: object) -> tuple[float, Metrics]:
    """Result of `cut_short`, and of each member of `compute_group_rewards`."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise MalformedStep(f"{result!r:.100} is not a reward and a dict of metrics")
    return reward(result[0]), _metrics(result[1])


def nothing(result: object) -> None:
    """Result of `close` and `cleanup`, which is ignored."""


def reward(value: object) -> float:
    number = _number(value, "the reward")
    if not -MAX_REWARD <= number <= MAX_REWARD:  # refuses NaN, too
        raise MalformedStep(
            f"the reward is {number}: it must be finite, and between -{MAX_REWARD:g} and {MAX_REWARD:g}"
        )
    return number


def _number(value: object, name: str) -> float:
    if type(value) is float:
        return value
    plain: Any = value.item() if getattr(value, "shape", None) == () else value  # type: ignore[attr-defined]
    if isinstance(plain, numbers.Real | np.bool_):
        try:
            return float(plain)
        except OverflowError:
            pass
    hint = ": an `await` is missing" if inspect.isawaitable(value) else ""
    raise MalformedStep(f"{name} is {value!r:.100}, not a number{hint}")


def _truth(value: object) -> bool:
    if type(value) is bool:
        return value
    number = _number(value, "episode_done")
    if number not in (0.0, 1.0):
        raise MalformedStep(f"episode_done is {value!r:.100}, neither true nor false")
    return number == 1.0


def _metrics(metrics: object) -> Metrics:
    if not isinstance(metrics, Mapping):
        raise MalformedStep(f"the metrics are {metrics!r:.100}, not a dict of numbers")
    plain = {plain_text(name): _number(value, f"metric {name!r:.100}") for name, value in metrics.items()}
    if taken := [name for name in plain if is_reserved(name)]:
        raise MalformedStep(f"a metric is called {taken[0]!r:.100}, like one of the run's own: give it another name")
    return plain


def _logs(logs: object) -> Logs:
    if not isinstance(logs, Mapping):
        raise MalformedStep(f"the logs are {logs!r:.100}, not a dict of texts")
    return {plain_text(name): plain_text(value) for name, value in logs.items()}


def plain_text(value: object) -> str:
    """`str(value)` with lone surrogates, which no file can hold, escaped."""
    text = value if type(value) is str else str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _prompt(observation: object, name: str) -> ModelInput:
    """The sampling client checks that the tokens are in the vocabulary."""
    if not isinstance(observation, ModelInput):
        raise MalformedStep(f"{name} is {observation!r:.100}, not a ModelInput")
    try:
        tokens = array("q", observation.to_ints()).tolist()
    except (TypeError, OverflowError, AttributeError) as error:
        raise MalformedStep(f"{name} holds something that is not a token id: {error}") from error
    if not tokens:
        raise MalformedStep(f"{name} is empty")
    return ModelInput([EncodedTextChunk(tokens)])


def _stop_condition(stop: object) -> StopCondition:
    if stop is None:
        return None
    if isinstance(stop, str):
        return [_stop(stop)]
    if not isinstance(stop, Sequence | set | frozenset):
        raise MalformedStep(f"the stop condition is {stop!r:.100}, not texts or token ids, nor None")
    return [_stop(item) for item in stop]


def _stop(item: object) -> Any:
    if isinstance(item, str):
        if item and item == plain_text(item):
            return str(item)
    elif isinstance(item, int | np.integer) and not isinstance(item, bool) and 0 <= int(item) < 2**31:
        return int(item)
    raise MalformedStep(f"the stop condition holds {item!r:.100}, which is neither a token id nor a text")


# --- of a group's builder -----------------------------------------------------------------------


@cache
def takes_extra(env_class: type) -> bool:
    """Whether `step` has the keyword `extra`, as the Tinker cookbook's environments have."""
    try:
        return "extra" in inspect.signature(env_class.step).parameters  # type: ignore[attr-defined]
    except Exception:  # no `step`, or no signature: the call will fail
        return False


def check_step(env: Env) -> None:
    """`step` must take the arguments that rollouts pass."""
    try:
        signature = inspect.signature(env.step)
    except Exception:  # no signature: the call will fail
        return
    try:
        signature.bind([], **({"extra": {}} if takes_extra(type(env)) else {}))
    except TypeError as error:
        raise MalformedStep(
            f"{type(env).__name__}.step cannot be called: {error}; rollouts call step(action), or step(action, "
            "extra=...) where it has that keyword"
        ) from error


def environments(builder: EnvGroupBuilder, result: object) -> list[Env]:
    name = f"{type(builder).__name__}.make_envs"
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise MalformedStep(f"{name} returned {result!r:.100}, not a list of environments")
    envs_G = list(result)
    if not envs_G:
        raise MalformedStep(f"{name} returned no environment")
    if bad := [env for env in envs_G if not isinstance(env, Env)]:
        raise MalformedStep(f"{name} returned {bad[0]!r:.100}, which is not an Env")
    for env in {type(env): env for env in envs_G}.values():
        check_step(env)
    if len({id(env) for env in envs_G}) < len(envs_G):
        raise MalformedStep(f"{name} returned one environment several times: each member of a group needs its own")
    if any(_made.get(id(env)) is env for env in envs_G):
        raise MalformedStep(
            f"{name} returned an environment that an earlier call returned: an Env is one episode, make new ones at each call"
        )
    _made.update({id(env): env for env in envs_G})
    return envs_G


def group_rewards(
    builder: EnvGroupBuilder, turns_G: Sequence[Sequence[Transition]], seen_G: Sequence[Trajectory], result: object
) -> tuple[list[float], list[Metrics], list[list[bool]], dict[int, RolloutError]]:
    """Rewards, metrics, the turns of `turns_G` left in the trajectories (`seen_G`), and the errors of members
    without a reward."""
    name = f"{type(builder).__name__}.compute_group_rewards"
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise MalformedStep(f"{name} returned {result!r:.100}, not a list of rewards and metrics")
    if len(result) != len(seen_G):
        raise MalformedStep(f"{name} returned {len(result)} rewards for {len(seen_G)} trajectories")
    lost = {g: item for g, item in enumerate(result) if isinstance(item, RolloutError)}
    try:
        pairs_G = [(0.0, {}) if g in lost else reward_and_metrics(item) for g, item in enumerate(result)]
    except MalformedStep as error:
        raise MalformedStep(f"{name}: {error}") from error
    left_G = [{id(turn) for turn in seen.transitions} for seen in seen_G]
    kept_G = [[id(turn) in left for turn in turns] for turns, left in zip(turns_G, left_G, strict=True)]
    return [reward for reward, _ in pairs_G], [metrics for _, metrics in pairs_G], kept_G, lost


def tags(builder: EnvGroupBuilder, result: object) -> list[str]:
    if not isinstance(result, Sequence) or isinstance(result, str) or not all(isinstance(tag, str) for tag in result):
        raise MalformedStep(f"{type(builder).__name__}.logging_tags returned {result!r:.100}, not a list of texts")
    if RESERVED_TAG in result:
        raise MalformedStep(
            f"{type(builder).__name__}.logging_tags returned {RESERVED_TAG!r}, under which the metrics of all groups "
            "are logged: give the tag another name"
        )
    return [plain_text(tag) for tag in result]


# --- of a dataset and its builder ---------------------------------------------------------------


async def datasets(builder: RLDatasetBuilder, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
    """Those that the builder returns."""
    name, result = type(builder).__name__, builder(renderer)
    if not inspect.isawaitable(result):
        raise DataError(f"{name}.__call__ must be an `async def`")
    train, test = train_and_test(builder, await result)
    for dataset in (train, *(() if test is None else (test,))):
        if not isinstance(dataset, RLDataset):
            raise DataError(f"{name} returned {dataset!r:.100}, which is not an RLDataset")
    return train, test


async def held_out(builder: RLDatasetBuilder, renderer: Renderer) -> RLDataset:
    """The builder's held-out set. ConfigError if there is none."""
    if type(builder).test_set is RLDatasetBuilder.test_set:
        _, test = await datasets(builder, renderer)
    else:
        test = await builder.test_set(renderer)
    if test is None:
        raise ConfigError(f"{type(builder).__name__} has no held-out problems with these settings")
    return test


def batch(dataset: RLDataset, index: int) -> list[EnvGroupBuilder]:
    """The groups of a batch. DataError, with the dataset's class, for an invalid batch."""
    name = f"{type(dataset).__name__}.get_batch({index})"
    try:
        result: object = dataset.get_batch(index)
    except CookbookError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(f"{name} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})") from error
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise DataError(f"{name} returned {result!r:.100}, not a list of EnvGroupBuilders")
    builders_P = list(result)
    if not builders_P:
        raise DataError(f"{name} returned no group: there is nothing to train on")
    if bad := [builder for builder in builders_P if not isinstance(builder, EnvGroupBuilder)]:
        raise DataError(f"{name} returned {bad[0]!r:.100}, which is not an EnvGroupBuilder")
    return builders_P


def short_batches(builder: RLDatasetBuilder, dataset: RLDataset) -> str | None:
    """A printed line for a data set smaller than a batch. None for a ListDataset, which prints its own."""
    wanted = getattr(builder, "batch_size", None)
    if isinstance(dataset, ListDataset) or not isinstance(wanted, int) or len(dataset) > 1:
        return None
    available = len(batch(dataset, 0))
    if available >= wanted:
        return None
    return f"env.batch_size={wanted} is more than the {available:,} problems: every batch holds all of them"


def beyond_context(max_tokens: int, tokenizer: Tokenizer) -> str | None:
    """What is printed where no answer can have `max_tokens` tokens, since a prompt comes before it."""
    if max_tokens < (context := tokenizer.model_max_length):
        return None
    return (
        f"max_tokens={max_tokens:,}, but the context is {context:,} tokens, prompt included: answers are cut off "
        "there. backend.max_length sets it, up to the model's own"
    )


def without_signal(
    groups_P: Sequence[TrajectoryGroup],
    token_advantages_P: Sequence[Mapping[int, np.ndarray]],
    of_rewards_P: Sequence[np.ndarray | None] | None = None,
) -> str | None:
    """What is printed of a step that teaches nothing: every advantage is 0, and nothing else is trained on. None
    if there is a signal. `of_rewards_P`: the members' advantages, where all that is added to them is a KL penalty."""
    rewards_P = [group.get_total_rewards() for group in groups_P if group.trajectories_G]
    learnt = any(advantages_N.any() for advantages in token_advantages_P for advantages_N in advantages.values())
    penalized = learnt and of_rewards_P is not None
    if of_rewards_P is not None:
        learnt = any(advantages_G is not None and advantages_G.any() for advantages_G in of_rewards_P)
    if learnt or not rewards_P or any(t.supervised for group in groups_P for t in group.trajectories_G):
        return None
    rewards = [reward for rewards_G in rewards_P for reward in rewards_G]
    if min(rewards) == max(rewards):
        what = f"all {len(rewards)} rollouts have the reward {rewards[0]:.4g}"
    else:
        what = "in every group all rollouts have the same reward"
    last = [t.transitions[-1] for group in groups_P for t in group.trajectories_G if t.transitions]
    cut = sum(turn.ac.stop_reason == "length" for turn in last)
    advice = f"max_tokens cut off {cut} of {len(last)} answers: is it too small? " if 2 * cut > len(last) else ""
    penalty = ", but for the KL penalty" if penalized else ""
    return (
        f"nothing to learn: {what}, so every advantage is 0{penalty}. {advice}Read a transcript: too hard, too easy, or "
        "does the prompt not say what to answer, and in which form?"
    )
