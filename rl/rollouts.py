"""Rollouts: environments stepped with sampled tokens, concurrently, until every episode of a group
is done. A limit of the run ends an episode with a reason, and it counts. An episode that cannot be
scored (env_calls.py, step_checks.py) is retried, then leaves its group as a counted RolloutError,
without a reward. Any other exception (engine, builder) propagates and ends the run.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import chz

from posttrain.backend.errors import ContextLengthError, DataError
from posttrain.backend.ranges import COUNT, POSITIVE, SHARE, WHOLE
from posttrain.backend.routing import sampling_group
from posttrain.backend.types import ModelInput, SamplingParams
from posttrain.tracking.seeds import RETRY, sampling_seed
from posttrain.tracking.timeline import span
from rl import step_checks
from rl.env_calls import SamplingClock, call, call_now
from rl.types import (
    Env,
    EnvError,
    EnvGroupBuilder,
    EnvTimeout,
    EpisodeEnd,
    MalformedStep,
    Observation,
    RolloutError,
    SeatLost,
    StopCondition,
    TokensWithLogprobs,
    Trajectory,
    TrajectoryGroup,
    Transition,
)

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.sampling_client import SamplingClient

T = TypeVar("T")
# e.g. (run seed, step, group): determines a rollout's sampling
Seed = tuple[int, ...]
NO_LIMIT = 2**31
MANY_TURNS = 1000  # of an episode, of which a line is printed


@chz.chz
class RolloutLimits:
    """Limits of an episode, retries and lost members."""

    max_turns: int | None = chz.field(
        default=None, validator=COUNT, doc="end the episode after this many turns; None = no limit"
    )
    max_trajectory_tokens: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="end it when prompt and turns together have this many tokens; None = the model's context",
    )
    max_sampled_tokens: int | None = chz.field(
        default=None,
        validator=COUNT,
        doc="end it when this many tokens have been sampled in all its turns; None = no limit",
    )
    rollout_seconds: float | None = chz.field(
        default=None,
        validator=POSITIVE,
        doc="end it after the turn in which this many seconds have passed; None = no limit",
    )
    env_seconds: float = chz.field(
        default=300.0,
        validator=POSITIVE,
        doc="seconds that one call of the environment may take; more is a failed rollout",
    )
    sampling_seconds: float = chz.field(
        default=1800.0, validator=POSITIVE, doc="seconds that one sampled turn may take; more is a failed rollout"
    )
    max_retries: int = chz.field(
        default=1, validator=WHOLE, doc="how often a failed rollout is tried again before it leaves its group"
    )
    min_group_size: int = chz.field(
        default=1, validator=COUNT, doc="train on a group only if at least this many members are left"
    )
    max_failed_fraction: float = chz.field(
        default=0.5,
        validator=SHARE,
        doc="stop the run, with the first error, if a larger share of a step's rollouts fails: the cause is not chance",
    )


@dataclass(frozen=True)
class Policy:
    """A sampling client and how to sample from it."""

    client: "SamplingClient"
    max_tokens: int
    temperature: float = 1.0

    async def __call__(
        self, ob: Observation, stop: StopCondition, seed: Seed, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """`max_tokens` lowers the policy's own limit."""
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        params = SamplingParams(max_tokens=limit, seed=sampling_seed(seed), stop=stop, temperature=self.temperature)
        response = await self.client.sample_async(ob, 1, params)
        sequence = response.sequences[0]
        return TokensWithLogprobs(sequence.tokens, sequence.logprobs, sequence.stop_reason, self.temperature)


# --- one episode --------------------------------------------------------------------------------


async def do_single_rollout(
    policy: Policy, env: Env, seed: Seed, limits: RolloutLimits | None = None, clock: SamplingClock | None = None
) -> Trajectory:
    """One episode. RolloutError if it cannot be scored. The environment is always closed. The seats
    of a game share `clock`."""
    episode = _Episode(policy, env, seed, limits or RolloutLimits(), clock or SamplingClock())
    try:
        trajectory = await episode.play()
    except BaseException:
        with suppress(RolloutError):  # keep the first error
            await episode.call(step_checks.nothing, "close")
        raise
    await episode.call(step_checks.nothing, "close")
    return trajectory


@dataclass
class _Episode:
    """An episode under way."""

    policy: Policy
    env: Env
    seed: Seed
    limits: RolloutLimits
    clock: SamplingClock
    turns: list[Transition] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    async def play(self) -> Trajectory:
        ob, stop = await self.call(step_checks.first_observation, "initial_observation")
        for turn in count():
            if reason := self.limit_met(ob):
                return await self.cut_short(reason)
            if turn == MANY_TURNS:
                _say_endless(type(self.env).__name__)
            try:
                with self.clock:
                    ac = await self.sample(ob, stop)
            except ContextLengthError as error:
                if not self.turns:
                    raise RolloutError(f"the first observation cannot be answered: {error}") from error
                return await self.cut_short("context_length")
            extra = {"extra": {"stop_reason": ac.stop_reason}} if step_checks.takes_extra(type(self.env)) else {}
            result = await self.call(step_checks.step_result, "step", list(ac.tokens), **extra)
            self.turns.append(Transition(ob, ac, result.reward, result.episode_done, result.metrics, result.logs))
            if result.episode_done:
                return Trajectory(self.turns)
            ob, stop = extending(self.turns[-1], result.next_observation), result.next_stop_condition
        raise AssertionError("unreachable")

    async def call(self, check: Callable[[Any], T], method: str, *arguments: object, **keywords: object) -> T:
        return await call(check, self.limits.env_seconds, self.clock, self.env, method, *arguments, **keywords)

    def limit_met(self, ob: Observation) -> EpisodeEnd | None:
        limits, turns = self.limits, self.turns
        is_full = limits.max_trajectory_tokens and ob.length >= limits.max_trajectory_tokens
        if not turns:
            if is_full:
                raise RolloutError(
                    f"the first observation has {ob.length} tokens, max_trajectory_tokens={limits.max_trajectory_tokens}"
                )
            return None
        if limits.max_turns and len(turns) >= limits.max_turns:
            return "max_turns"
        if is_full:
            return "max_trajectory_tokens"
        if limits.max_sampled_tokens and self.num_sampled() >= limits.max_sampled_tokens:
            return "max_sampled_tokens"
        if limits.rollout_seconds and time.monotonic() - self.started >= limits.rollout_seconds:
            return "timeout"
        return None

    def num_sampled(self) -> int:
        return sum(len(turn.ac.tokens) for turn in self.turns)

    async def sample(self, ob: Observation, stop: StopCondition) -> TokensWithLogprobs:
        limits, turn = self.limits, len(self.turns)
        room = [limits.max_sampled_tokens - self.num_sampled()] if limits.max_sampled_tokens else []
        room += [limits.max_trajectory_tokens - ob.length] if limits.max_trajectory_tokens else []
        try:
            with span("sampling"):
                async with asyncio.timeout(limits.sampling_seconds):
                    return await self.policy(ob, stop, (*self.seed, turn), min(room, default=None))
        except TimeoutError as error:
            raise EnvTimeout(f"sampling turn {turn} took more than {limits.sampling_seconds:g} s") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # by the run
                raise
            raise EnvError(f"sampling turn {turn} was cancelled, and not by the run") from error
        except DataError as error:  # e.g. a token outside the vocabulary
            raise MalformedStep(f"the observation of turn {turn} cannot be sampled from: {error}") from error

    async def cut_short(self, reason: EpisodeEnd) -> Trajectory:
        reward, metrics = await self.call(step_checks.reward_and_metrics, "cut_short", reason)
        last = self.turns[-1]
        last.reward, last.metrics = last.reward + reward, last.metrics | metrics
        return Trajectory(self.turns, reason)


@cache
def _say_endless(name: str) -> None:
    print(
        f"WARNING an episode of {name} has {MANY_TURNS} turns and goes on: does `step` return episode_done=True at its "
        "end? limits.max_turns ends it, too",
        flush=True,
    )


def extending(turn: Transition, ob: Observation) -> Observation:
    """`ob`, in little memory: where it extends the turn it has the turn's own chunks, so that an
    episode's observations take the memory of its tokens, not of its tokens times its turns."""
    seen, tokens = turn.ob.to_ints() + turn.ac.tokens, ob.to_ints()
    if tokens[: len(seen)] != seen:
        return ModelInput.kept(tokens)
    return turn.extended(tokens[len(seen) :])


# --- a group ------------------------------------------------------------------------------------


async def do_group_rollout(
    builder: EnvGroupBuilder,
    policy: Policy,
    seed: Seed,
    limits: RolloutLimits | None = None,
    slots: asyncio.Semaphore | None = None,
) -> TrajectoryGroup:
    """Rolls out one group. Failed members are retried, then leave it; a game is retried whole. Each
    member in flight takes a slot; a game takes one for all its seats, which must run together."""
    limits, slots = limits or RolloutLimits(), slots or asyncio.Semaphore(NO_LIMIT)
    try:
        with sampling_group(seed):
            if builder.members_are_independent:
                group = await _roll_out(builder, policy, seed, limits, slots)
            else:
                async with slots:
                    group = await _roll_out(builder, policy, seed, limits, asyncio.Semaphore(NO_LIMIT))
    except BaseException:
        with suppress(RolloutError):  # keep the first error
            await _call_builder(builder, step_checks.nothing, limits, "cleanup")
        raise
    try:
        await _call_builder(builder, step_checks.nothing, limits, "cleanup")
    except RolloutError as error:
        _lose_all(group, error)
    return group


async def _roll_out(
    builder: EnvGroupBuilder, policy: Policy, seed: Seed, limits: RolloutLimits, slots: asyncio.Semaphore
) -> TrajectoryGroup:
    async def play(env: Env, g: int, seed: Seed, clock: SamplingClock | None) -> _Member:
        async with slots:
            for retry in count():
                try:
                    if retry:
                        seed = (*seed, RETRY + retry - 1)
                        env = await _make_env_again(builder, g, limits)
                    return _Member(env, await do_single_rollout(policy, env, seed, limits, clock), retry)
                except RolloutError as error:
                    if retry == limits.max_retries or not builder.members_are_independent:
                        return _Member(env, error, retry)
        raise AssertionError("unreachable")

    attempts = 1 if builder.members_are_independent else limits.max_retries + 1
    for attempt in range(attempts):
        envs_G = await make_envs(builder, limits)
        seeds_G = [(*seed, g) if attempt == 0 else (*seed, g, RETRY + attempt) for g in range(len(envs_G))]
        clock = None if builder.members_are_independent else SamplingClock()
        async with asyncio.TaskGroup() as tasks:
            members = [tasks.create_task(play(env, g, seeds_G[g], clock)) for g, env in enumerate(envs_G)]
        finished = [task.result() for task in members]
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


async def _make_env_again(builder: EnvGroupBuilder, g: int, limits: RolloutLimits) -> Env:
    """A fresh environment for member `g`; the rest of the new environments are closed at once."""
    envs_G = await make_envs(builder, limits)
    for other in (*envs_G[:g], *envs_G[g + 1 :]):
        await call(step_checks.nothing, limits.env_seconds, SamplingClock(), other, "close")
    if g >= len(envs_G):
        raise MalformedStep(
            f"{type(builder).__name__}.make_envs returned {len(envs_G)} environments for a retry of member {g}"
        )
    return envs_G[g]


async def make_envs(builder: EnvGroupBuilder, limits: RolloutLimits) -> Sequence[Env]:
    """A builder that raises or hangs ends the run, with its own exception and traceback."""
    try:
        return await _call_builder(builder, partial(step_checks.environments, builder), limits, "make_envs")
    except EnvError as error:
        raise _own_exception(error) from None


async def _call_builder(
    builder: EnvGroupBuilder, check: Callable[[Any], T], limits: RolloutLimits, method: str, *arguments: object
) -> T:
    return await call(check, limits.env_seconds, SamplingClock(), builder, method, *arguments)


def _own_exception(error: RolloutError) -> Exception:
    """The environment's exception, with its traceback. SystemExit and its like stay an EnvError."""
    cause = error.__cause__ if isinstance(error, EnvError) else None
    return (
        cause if isinstance(cause, Exception) and not isinstance(cause, StopIteration | StopAsyncIteration) else error
    )


async def _score(builder: EnvGroupBuilder, members_G: Sequence[_Member], limits: RolloutLimits) -> TrajectoryGroup:
    """The group of the finished members with the builder's rewards; empty if the builder fails."""
    alive = [(member.env, member.outcome) for member in members_G if isinstance(member.outcome, Trajectory)]
    trajectories_G = [trajectory for _, trajectory in alive]
    group = TrajectoryGroup(trajectories_G, [0.0 for _ in alive], [{} for _ in alive], builder=builder)
    group.errors = [member.outcome for member in members_G if isinstance(member.outcome, RolloutError)]
    if group.errors:
        lose_game(group)
    try:
        group.tags = call_now(partial(step_checks.tags, builder), builder, "logging_tags")
        if (
            group.trajectories_G
            and getattr(builder.compute_group_rewards, "__func__", None) is not EnvGroupBuilder.compute_group_rewards
        ):
            await add_group_rewards(group, [env for env, _ in alive], limits)
    except RolloutError as error:
        _lose_all(group, error)
    return group


async def add_group_rewards(group: TrajectoryGroup, envs_G: Sequence[Env], limits: RolloutLimits) -> None:
    """The builder gets copies. Turns it removes (no moves) leave the trajectory; what they earned stays in
    the reward."""
    builder = group.builder
    assert builder is not None
    copies_G = [trajectory.copy() for trajectory in group.trajectories_G]
    turns_G = [copy.transitions.copy() for copy in copies_G]
    check = partial(step_checks.group_rewards, builder, turns_G, copies_G)
    rewards_G, metrics_G, kept_G, lost = await _call_builder(
        builder, check, limits, "compute_group_rewards", [*copies_G], envs_G
    )
    for g, kept in enumerate(kept_G):
        turns = group.trajectories_G[g].transitions
        rewards_G[g] += sum(turn.reward for turn, is_kept in zip(turns, kept, strict=True) if not is_kept)
        group.trajectories_G[g].transitions = [turn for turn, is_kept in zip(turns, kept, strict=True) if is_kept]
    group.final_rewards_G, group.metrics_G = rewards_G, metrics_G
    for g in reversed(lost):
        group.drop_member(g, lost[g])
    if lost:
        lose_game(group)


def lose_game(group: TrajectoryGroup) -> None:
    """Of a group that lost a member: where members play one game, the rest has no result and no
    baseline, and is lost too."""
    if group.builder is not None and not group.builder.members_are_independent:
        _lose_all(group, SeatLost(f"another seat of the game was lost ({group.errors[-1]})"))


def _lose_all(group: TrajectoryGroup, error: RolloutError) -> None:
    while group.trajectories_G:
        group.drop_member(0, error)


# --- many groups --------------------------------------------------------------------------------


async def do_rollouts(
    builders_P: Sequence[EnvGroupBuilder], policy: Policy, seed: Seed, limits: RolloutLimits | None = None
) -> list[TrajectoryGroup]:
    """All groups of a batch, concurrently. The first error is raised without its ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as tasks:
            groups = [
                tasks.create_task(do_group_rollout(b, policy, (*seed, p), limits)) for p, b in enumerate(builders_P)
            ]
    except BaseExceptionGroup as errors:
        raise_first(errors)
    finished = [group.result() for group in groups]
    check_failures(finished, limits or RolloutLimits())
    return finished


def check_failures(groups_P: Sequence[TrajectoryGroup], limits: RolloutLimits) -> None:
    """Raises if too many rollouts failed: the exception of the environment's code if there is one."""
    errors = [error for group in groups_P for error in group.errors]
    total = len(errors) + sum(len(group.trajectories_G) + group.refill_rollouts for group in groups_P)
    if errors and len(errors) > limits.max_failed_fraction * total:
        first = _own_exception(errors[0])
        first.add_note(
            f"{len(errors)} of {total} rollouts failed, retries included (limits.max_failed_fraction); this is the "
            "first"
        )
        raise first


def raise_first(errors: BaseExceptionGroup) -> NoReturn:
    """Raises the first error without the group, whose traceback would repeat the error's own."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise error from error.__cause__
