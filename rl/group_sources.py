"""The finished groups of a training step, and how far ahead they may be sampled. Batch b is sampled
once step b - max_steps_off_policy has its weights, and trained on whole in step b. Groups are at
most K steps stale; no prompt is skipped or doubled, and short episodes are not favoured. The cost
is waiting for stragglers, which K hides.

  synchronous   max_steps_off_policy 0, one minibatch: sample, train, sample, ...
  streaming     several minibatches: training starts on the first finished groups of the batch
  asynchronous  max_steps_off_policy K >= 1: batches b+1 ... b+K are in flight while step b trains
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from copy import copy
from typing import Any

from posttrain.backend.errors import ConfigError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.tracking.seeds import TRAINING
from rl.rollout_state import group_from_json, group_to_json
from rl.rollouts import NO_LIMIT, Policy, RolloutLimits, check_failures, do_group_rollout, raise_first
from rl.step_checks import batch as groups_of_batch
from rl.types import EnvGroupBuilder, RLDataset, TrajectoryGroup

REFILL = 1 << 20  # batches further on; more than a run has
REPORT_SECONDS = 60.0  # without a finished group, after which the wait is printed


class GroupSource:
    """Samples ahead in its tasks; use it as `async with source:`. A crashed task cancels the block
    and is raised from it. `concurrent_rollouts`: most rollouts in flight, in batch order; None = no
    limit. `max_refills`: how often a group of equal rewards is replaced."""

    def __init__(
        self,
        dataset: RLDataset,
        num_steps: int,
        max_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        limits: RolloutLimits | None = None,
        max_steps_off_policy: int = 0,
        num_minibatches: int = 1,
        concurrent_rollouts: int | None = None,
        max_refills: int = 0,
    ):
        self._dataset, self._num_steps = dataset, num_steps
        self._max_tokens, self._temperature = max_tokens, temperature
        self._seed, self._limits = seed, limits or RolloutLimits()
        self.max_steps_off_policy, self.num_minibatches = max_steps_off_policy, num_minibatches
        self.max_refills = max_refills
        self._slots = asyncio.Semaphore(concurrent_rollouts or NO_LIMIT)
        # batch -> index in it -> its rollouts
        self._groups: dict[int, dict[int, asyncio.Future[TrajectoryGroup]]] = {}
        self._read: dict[int, Sequence[EnvGroupBuilder]] = {}  # batch -> its builders, while it is needed
        self._policy: Policy | None = None
        self._step = self._unstarted = 0

    async def __aenter__(self) -> "GroupSource":
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        try:
            await self._tasks.__aexit__(*exc)
        except BaseExceptionGroup as errors:
            raise_first(errors)

    def set_policy(self, step: int, client: SamplingClient) -> None:
        """`client` now has the weights of `step`: starts every group that may begin."""
        self._step, self._policy = step, Policy(client, self._max_tokens, self._temperature)
        first, self._unstarted = max(step, self._unstarted), min(step + self.max_steps_off_policy + 1, self._num_steps)
        for batch in range(first, self._unstarted):
            groups = self._groups.setdefault(batch, {})
            for p, builder in enumerate(self._builders(batch)):
                if p not in groups:
                    groups[p] = self._tasks.create_task(self._sample(batch, p, builder))

    async def _sample(self, batch: int, p: int, builder: EnvGroupBuilder) -> TrajectoryGroup:
        """With `max_refills`, dynamic sampling (DAPO, Yu et al. 2025, eq. 11): a group of equal rewards is
        replaced by the group at its place in batch b + REFILL, then b + 2 REFILL, ... No group is
        used twice, and each is a function of (batch, place) and the weights, as without."""
        assert self._policy
        discarded: list[TrajectoryGroup] = []
        while True:
            refills = len(discarded)
            step, seed = self._step, (self._seed, TRAINING, batch + refills * REFILL, p)
            builder = self._builder(batch, p, refills) if refills else builder
            group = await do_group_rollout(builder, self._policy, seed, self._limits, self._slots)
            group.sampled_at_step = step
            if refills == self.max_refills or len(set(group.get_total_rewards())) != 1:
                break
            discarded.append(group)
        group.refills = refills
        group.refill_tokens = sum(t.num_sampled_tokens for other in discarded for t in other.trajectories_G)
        group.refill_rollouts = sum(len(other.trajectories_G) for other in discarded)
        group.errors = [error for other in discarded for error in other.errors] + group.errors
        return group

    def _builders(self, batch: int) -> Sequence[EnvGroupBuilder]:
        """Read once: for each of thousands of groups it would take time with the square of the batch."""
        if batch not in self._read:
            self._read[batch] = groups_of_batch(self._dataset, batch)
        return self._read[batch]

    def _builder(self, batch: int, p: int, refills: int) -> EnvGroupBuilder:
        """The builder at a place after `refills` replacements; the last batch of an epoch may be short."""
        builders_P = self._builders(batch + refills * REFILL)
        return builders_P[p] if p < len(builders_P) else copy(builders_P[p % len(builders_P)])

    async def minibatches(self, step: int) -> AsyncIterator[list[TrajectoryGroup]]:
        """The groups of batch `step` in `num_minibatches` equal parts, in dataset order, each part
        when its groups are finished. Raises before the last part if too many rollouts of the batch
        failed."""
        groups = self._groups[step]
        size = -(-len(groups) // self.num_minibatches)
        waiting, finished, began = dict(groups), [], time.monotonic()
        one_more = asyncio.Event()  # asyncio.wait would look at every group again for each that finishes
        for group in groups.values():
            group.add_done_callback(lambda _: one_more.set())
        while waiting:
            try:
                async with asyncio.timeout(REPORT_SECONDS):
                    await one_more.wait()
            except TimeoutError:
                print(
                    f"step {step}: {len(waiting)} of {len(groups)} groups unfinished after "
                    f"{time.monotonic() - began:.0f} s",
                    flush=True,
                )
            one_more.clear()
            finished += [(p, waiting.pop(p).result()) for p in [p for p, group in waiting.items() if group.done()]]
            if not waiting:
                check_failures([group.result() for group in groups.values()], self._limits)
            while len(finished) >= size or (finished and not waiting):
                part, finished = sorted(finished[:size], key=lambda pair: pair[0]), finished[size:]
                yield [group for _, group in part]
        del self._groups[step]
        self._read = {batch: builders_P for batch, builders_P in self._read.items() if batch % REFILL != step}

    def state(self) -> list[dict[str, Any]]:
        """The finished groups of future batches, for a checkpoint. A resume restarts the rest."""
        return [
            {"batch": batch, "place": p, "group": group_to_json(group.result())}
            for batch, groups in self._groups.items()
            for p, group in groups.items()
            if group.done()
        ]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Restores the groups, before the first `set_policy`."""
        for saved in state:
            future: asyncio.Future[TrajectoryGroup] = asyncio.get_running_loop().create_future()
            batch, place = saved["batch"], saved["place"]
            builders_P = self._builders(batch)
            if place >= len(builders_P):
                raise ConfigError(
                    f"the checkpoint holds finished group {place} of batch {batch}, and "
                    f"{type(self._dataset).__name__}.get_batch({batch}) now has only {len(builders_P)} groups: resume "
                    "with the env.batch_size (groups_per_batch) the run began with"
                )
            refills = saved["group"].get("refills", 0)
            builder = self._builder(batch, place, refills) if refills else builders_P[place]
            future.set_result(group_from_json(saved["group"], builder))
            self._groups.setdefault(batch, {})[place] = future
