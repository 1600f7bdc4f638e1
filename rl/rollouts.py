"""Rollouts: environments stepped with sampled tokens, many at once, until every episode of a group is done."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from backend.sampling_client import SamplingClient
from backend.types import SamplingParams
from rl.types import (
    Env,
    EnvGroupBuilder,
    Observation,
    RolloutError,
    StopCondition,
    TokensWithLogprobs,
    Trajectory,
    TrajectoryGroup,
    Transition,
)

Seed = tuple[int, ...]  # e.g. (run seed, step, group); a rollout's sampling is a pure function of it


@dataclass(frozen=True)
class Policy:
    """A sampling client and how to sample from it."""

    client: SamplingClient
    max_tokens: int
    temperature: float = 1.0

    async def __call__(self, ob: Observation, stop: StopCondition, seed: Seed) -> TokensWithLogprobs:
        params = SamplingParams(max_tokens=self.max_tokens, seed=_seed_number(seed), stop=stop, temperature=self.temperature)
        response = await self.client.sample_async(ob, 1, params)
        sequence = response.sequences[0]
        return TokensWithLogprobs(sequence.tokens, sequence.logprobs, sequence.stop_reason, self.temperature)


def _seed_number(seed: Seed) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)


async def do_single_rollout(policy: Policy, env: Env, seed: Seed) -> Trajectory:
    transitions = []
    ob, stop = await env.initial_observation()
    for turn in count():
        ac = await policy(ob, stop, (*seed, turn))
        result = await env.step(ac.tokens)
        transitions.append(Transition(ob, ac, result.reward, result.episode_done, result.metrics, result.logs))
        if result.episode_done:
            return Trajectory(transitions)
        ob, stop = result.next_observation, result.next_stop_condition
    raise AssertionError("unreachable")


async def do_group_rollout(builder: EnvGroupBuilder, policy: Policy, seed: Seed) -> TrajectoryGroup:
    """Rolls out one group. Members that raise RolloutError leave it; any other error cancels the rest and propagates."""
    envs_G = await builder.make_envs()
    async with asyncio.TaskGroup() as tasks:
        members = [tasks.create_task(_member(policy, env, (*seed, g))) for g, env in enumerate(envs_G)]
    outcomes_G = [member.result() for member in members]
    alive = [(env, outcome) for env, outcome in zip(envs_G, outcomes_G, strict=True) if isinstance(outcome, Trajectory)]
    trajectories_G = [trajectory for _, trajectory in alive]
    rewards_and_metrics_G = await builder.compute_group_rewards(trajectories_G, [env for env, _ in alive])
    return TrajectoryGroup(
        trajectories_G=trajectories_G,
        final_rewards_G=[reward for reward, _ in rewards_and_metrics_G],
        metrics_G=[metrics for _, metrics in rewards_and_metrics_G],
        tags=builder.logging_tags(),
        errors=[outcome for outcome in outcomes_G if isinstance(outcome, RolloutError)],
    )


async def _member(policy: Policy, env: Env, seed: Seed) -> Trajectory | RolloutError:
    try:
        return await do_single_rollout(policy, env, seed)
    except RolloutError as error:
        return error


async def do_rollouts(builders_P: Sequence[EnvGroupBuilder], policy: Policy, seed: Seed) -> list[TrajectoryGroup]:
    """All groups of a batch at once. The first error is raised as itself, without its ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as tasks:
            groups = [tasks.create_task(do_group_rollout(builder, policy, (*seed, p))) for p, builder in enumerate(builders_P)]
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    return [group.result() for group in groups]


def _first(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
