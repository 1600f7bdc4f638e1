"""Rollouts: environments stepped with sampled tokens, many at once, until every episode of a group is done.

What can go wrong with an episode is of three kinds. A limit of the run is met: the episode ends there, with a reason, and counts. It
cannot be scored (the environment raised, hung, or returned nonsense): it is retried, then leaves its group as a RolloutError and is
counted; it never gets a reward. Anything else (the engine died, a builder crashed): the exception propagates and ends the run.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import chz
import numpy as np

from backend.errors import ContextLengthError, CookbookError
from backend.sampling_client import SamplingClient
from backend.types import ModelInput, SamplingParams
from rl.types import (
    Env,
    EnvError,
    EnvGroupBuilder,
    EnvTimeout,
    EpisodeEnd,
    MalformedStep,
    Observation,
    RolloutError,
    StepResult,
    StopCondition,
    TokensWithLogprobs,
    Trajectory,
    TrajectoryGroup,
    Transition,
)
from tracking.timeline import span

T = TypeVar("T")
Seed = tuple[int, ...]  # e.g. (run seed, step, group); a rollout's sampling is a pure function of it
NO_LIMIT = 2**31
RETRY = 1 << 16  # in a seed: keeps the attempts of a member apart from the members


@chz.chz
class RolloutLimits:
    """When an episode is ended, retried or given up."""

    max_turns: int | None = chz.field(default=None, doc="ends the episode after this many turns")
    max_trajectory_tokens: int | None = chz.field(default=None, doc="ends it when prompt and turns together reach this")
    max_sampled_tokens: int | None = chz.field(default=None, doc="ends it when the sampled tokens of all its turns reach this")
    rollout_seconds: float | None = chz.field(default=None, doc="ends it after the turn in which this time is reached")
    env_seconds: float = chz.field(default=300.0, doc="one call of an environment that takes longer is a failure")
    sampling_seconds: float = chz.field(default=1800.0, doc="one sampled turn that takes longer is a failure")
    max_retries: int = chz.field(default=1, doc="times a failed rollout is tried again, before it leaves its group")
    min_group_size: int = chz.field(default=1, doc="a group with fewer members left is not trained on")
    max_failed_fraction: float = chz.field(
        default=0.5,
        doc="a step that loses a larger part of its rollouts stops the run with the first error: the fault is not chance",
    )


@dataclass(frozen=True)
class Policy:
    """A sampling client and how to sample from it."""

    client: SamplingClient
    max_tokens: int
    temperature: float = 1.0

    async def __call__(
        self, ob: Observation, stop: StopCondition, seed: Seed, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """`max_tokens` lowers the policy's own."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        params = SamplingParams(max_tokens=limit, seed=_seed_number(seed), stop=stop, temperature=self.temperature)
        response = await self.client.sample_async(ob, 1, params)
        sequence = response.sequences[0]
        return TokensWithLogprobs(sequence.tokens, sequence.logprobs, sequence.stop_reason, self.temperature)


def _seed_number(seed: Seed) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)


# --- one episode ----------------------------------------------------------------------------------------------------------------


async def do_single_rollout(policy: Policy, env: Env, seed: Seed, limits: RolloutLimits | None = None) -> Trajectory:
    """One episode. Raises RolloutError where it cannot be scored. The environment is closed in any case."""
    limits = limits or RolloutLimits()
    started, transitions = time.monotonic(), []
    try:
        ob, stop = _checked_observation(await _call_env(env.initial_observation(), limits))
        for turn in count():
            if reason := _limit_met(limits, transitions, ob, started):
                return await _cut_short(env, transitions, reason, limits)
            try:
                ac = await _sample(policy, ob, stop, (*seed, turn), limits, transitions)
            except ContextLengthError as error:
                if not transitions:
                    raise RolloutError(f"the first observation cannot be answered: {error}") from error
                return await _cut_short(env, transitions, "context_length", limits)
            result = _checked_step(await _call_env(env.step(ac.tokens), limits))
            metrics = {name: float(value) for name, value in result.metrics.items()}
            transitions.append(Transition(ob, ac, float(result.reward), result.episode_done, metrics, result.logs))
            if result.episode_done:
                return Trajectory(transitions)
            ob, stop = result.next_observation, result.next_stop_condition
        raise AssertionError("unreachable")
    finally:
        await _call_env(env.close(), limits)


async def _sample(
    policy: Policy, ob: Observation, stop: StopCondition, seed: Seed, limits: RolloutLimits, transitions: list[Transition]
) -> TokensWithLogprobs:
    room = [limits.max_sampled_tokens - _sampled(transitions)] if limits.max_sampled_tokens else []
    room += [limits.max_trajectory_tokens - ob.length] if limits.max_trajectory_tokens else []
    try:
        with span("sampling"):
            async with asyncio.timeout(limits.sampling_seconds):
                return await policy(ob, stop, seed, min(room, default=None))
    except TimeoutError as error:
        raise EnvTimeout(f"sampling turn {len(transitions)} took more than {limits.sampling_seconds:g} s") from error


def _limit_met(limits: RolloutLimits, transitions: list[Transition], ob: Observation, started: float) -> EpisodeEnd | None:
    if not transitions:
        if limits.max_trajectory_tokens and ob.length >= limits.max_trajectory_tokens:
            raise RolloutError(
                f"the first observation has {ob.length} tokens, max_trajectory_tokens={limits.max_trajectory_tokens}"
            )
        return None
    if limits.max_turns and len(transitions) >= limits.max_turns:
        return "max_turns"
    if limits.max_trajectory_tokens and ob.length >= limits.max_trajectory_tokens:
        return "max_trajectory_tokens"
    if limits.max_sampled_tokens and _sampled(transitions) >= limits.max_sampled_tokens:
        return "max_sampled_tokens"
    if limits.rollout_seconds and time.monotonic() - started >= limits.rollout_seconds:
        return "timeout"
    return None


def _sampled(transitions: list[Transition]) -> int:
    return sum(len(transition.ac.tokens) for transition in transitions)


async def _cut_short(env: Env, transitions: list[Transition], reason: EpisodeEnd, limits: RolloutLimits) -> Trajectory:
    reward, metrics = await _call_env(env.cut_short(reason), limits)
    last = transitions[-1]
    last.reward, last.metrics = last.reward + _checked_reward(reward), last.metrics | metrics
    return Trajectory(transitions, reason)


async def _call_env(call: Awaitable[T], limits: RolloutLimits) -> T:
    """What an environment's own code raises becomes an EnvError; errors that already say what they are pass."""
    try:
        with span("env"):
            async with asyncio.timeout(limits.env_seconds):
                return await call
    except CookbookError:
        raise
    except TimeoutError as error:
        raise EnvTimeout(f"the environment took more than {limits.env_seconds:g} s, or met a time-out of its own") from error
    except Exception as error:
        raise EnvError(f"the environment raised {type(error).__name__}: {error}") from error


def _checked_observation(observation: object) -> tuple[Observation, StopCondition]:
    match observation:
        case (ModelInput() as ob, stop) if ob.length:
            return ob, stop
    raise MalformedStep(f"initial_observation returned {observation!r:.100}, not a prompt and a stop condition")


def _checked_step(result: object) -> StepResult:
    if not isinstance(result, StepResult):
        raise MalformedStep(f"step returned {result!r:.100}, not a StepResult")
    _checked_reward(result.reward)
    if not result.episode_done and not (isinstance(result.next_observation, ModelInput) and result.next_observation.length):
        raise MalformedStep(f"next_observation is {result.next_observation!r:.100}, not a prompt")
    if bad := [name for name, value in result.metrics.items() if not isinstance(value, int | float | np.number)]:
        raise MalformedStep(f"the metrics {bad} are not numbers")
    return result


def _checked_reward(reward: object) -> float:
    if not isinstance(reward, int | float | np.number) or not math.isfinite(reward):
        raise MalformedStep(f"the reward is {reward!r:.100}, not a finite number")
    return float(reward)


# --- a group --------------------------------------------------------------------------------------------------------------------


async def do_group_rollout(
    builder: EnvGroupBuilder,
    policy: Policy,
    seed: Seed,
    limits: RolloutLimits | None = None,
    slots: asyncio.Semaphore | None = None,
) -> TrajectoryGroup:
    """Rolls out one group. Members that fail are retried, then leave it; where they play one game, all of it is retried.

    Every member takes a slot while it is under way; a game takes one for all its seats, which must run together.
    """
    limits, slots = limits or RolloutLimits(), slots or asyncio.Semaphore(NO_LIMIT)
    if not builder.members_are_independent:
        async with slots:
            return await _roll_out(builder, policy, seed, limits, asyncio.Semaphore(NO_LIMIT))
    return await _roll_out(builder, policy, seed, limits, slots)


async def _roll_out(
    builder: EnvGroupBuilder, policy: Policy, seed: Seed, limits: RolloutLimits, slots: asyncio.Semaphore
) -> TrajectoryGroup:
    attempts = 1 if builder.members_are_independent else limits.max_retries + 1
    for attempt in range(attempts):
        envs_G = await _make_envs(builder, limits)
        seeds_G = [(*seed, g) if attempt == 0 else (*seed, g, RETRY + attempt) for g in range(len(envs_G))]
        async with asyncio.TaskGroup() as tasks:
            members = [tasks.create_task(_member(builder, policy, e, g, seeds_G[g], limits, slots)) for g, e in enumerate(envs_G)]
        finished = [member.result() for member in members]
        if not any(isinstance(member.outcome, RolloutError) for member in finished):
            break
    group = await _score(builder, finished, limits)
    group.num_retries = sum(member.retries for member in finished) + attempt * len(finished)
    return group


@dataclass
class _Member:
    env: Env
    outcome: Trajectory | RolloutError
    retries: int


async def _member(
    builder: EnvGroupBuilder, policy: Policy, env: Env, g: int, seed: Seed, limits: RolloutLimits, slots: asyncio.Semaphore
) -> _Member:
    async with slots:
        for attempt in count():
            try:
                return _Member(env, await do_single_rollout(policy, env, seed, limits), attempt)
            except RolloutError as error:
                if attempt == limits.max_retries or not builder.members_are_independent:
                    return _Member(env, error, attempt)
                seed = (*seed, RETRY + attempt)
                env, *others = _rotated(await _make_envs(builder, limits), g)
                for other in others:
                    await _call_env(other.close(), limits)
    raise AssertionError("unreachable")


async def _make_envs(builder: EnvGroupBuilder, limits: RolloutLimits) -> Sequence[Env]:
    """A builder that raises or hangs is no chance failure of one rollout: it ends the run."""
    try:
        with span("env"):
            async with asyncio.timeout(limits.env_seconds):
                return await builder.make_envs()
    except TimeoutError as error:
        raise EnvTimeout(f"{type(builder).__name__}.make_envs took more than {limits.env_seconds:g} s") from error


def _rotated(envs_G: Sequence[Env], g: int) -> list[Env]:
    return [*envs_G[g:], *envs_G[:g]]


async def _score(builder: EnvGroupBuilder, members_G: Sequence[_Member], limits: RolloutLimits) -> TrajectoryGroup:
    """The group of those that finished, with the rewards that the builder gives; if it cannot, none is left."""
    alive = [(member.env, member.outcome) for member in members_G if isinstance(member.outcome, Trajectory)]
    errors = [member.outcome for member in members_G if isinstance(member.outcome, RolloutError)]
    trajectories_G = [trajectory for _, trajectory in alive]
    try:
        async with asyncio.timeout(limits.env_seconds):
            rewards_and_metrics_G = await builder.compute_group_rewards(trajectories_G, [env for env, _ in alive])
        rewards_G = [_checked_reward(reward) for reward, _ in rewards_and_metrics_G]
    except (RolloutError, TimeoutError) as error:
        typed = (
            error if isinstance(error, RolloutError) else EnvTimeout(f"the group's rewards took over {limits.env_seconds:g} s")
        )
        trajectories_G, rewards_G, rewards_and_metrics_G = [], [], []
        errors += [typed] * len(alive)
    return TrajectoryGroup(
        trajectories_G=trajectories_G,
        final_rewards_G=rewards_G,
        metrics_G=[{name: float(value) for name, value in metrics.items()} for _, metrics in rewards_and_metrics_G],
        tags=builder.logging_tags(),
        errors=errors,
        builder=builder,
    )


# --- many groups ----------------------------------------------------------------------------------------------------------------


async def do_rollouts(
    builders_P: Sequence[EnvGroupBuilder], policy: Policy, seed: Seed, limits: RolloutLimits | None = None
) -> list[TrajectoryGroup]:
    """All groups of a batch at once. The first error is raised as itself, without its ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as tasks:
            groups = [tasks.create_task(do_group_rollout(b, policy, (*seed, p), limits)) for p, b in enumerate(builders_P)]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors
    finished = [group.result() for group in groups]
    check_failures(finished, limits or RolloutLimits())
    return finished


def check_failures(groups_P: Sequence[TrajectoryGroup], limits: RolloutLimits) -> None:
    """Raises where too many rollouts failed: the exception of the environment's own code, if that is what it was, with its traceback."""
    errors = [error for group in groups_P for error in group.errors]
    total = len(errors) + sum(len(group.trajectories_G) for group in groups_P)
    if errors and len(errors) > limits.max_failed_fraction * total:
        first = errors[0].__cause__ if isinstance(errors[0], EnvError) and errors[0].__cause__ else errors[0]
        first.add_note(
            f"{len(errors)} of {total} rollouts failed, retries included (limits.max_failed_fraction); this is the first"
        )
        raise first


def first_error(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
