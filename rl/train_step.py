"""One training step: finished groups -> advantages -> gradients -> weights.

groups -> rewards that need a model -> KL and length in the reward -> advantages, of a group or a critic
-> KL, entropy and distillation per token -> normalisation -> reduction -> mismatch weights -> Datums
    -> forward_backward, as minibatches of groups arrive -> optim_step, once per substep
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from posttrain.backend.alarms import Gap
from posttrain.backend.errors import NonFiniteError
from posttrain.backend.futures import APIFuture
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ForwardBackwardOutput, OptimStepResponse, TensorData
from posttrain.tracking.metrics_log import timed
from posttrain.tracking.nonfinite import write_offending_data
from posttrain.tracking.progress import reported
from posttrain.tracking.run_folder import RunFolder
from posttrain.tracking.timeline import span
from rl.config import Config
from rl.critic import Critic
from rl.data_processing import (
    Row,
    compute_advantages,
    normalized,
    reduced,
    rows_of,
    sampled_advantages,
    split_substeps,
    trainable_groups,
    with_advantages,
    without_truncated,
)
from rl.distill import Teachers
from rl.group_sources import GroupSource
from rl.kl import Reference, kl_metrics, penalized_advantages, penalized_rewards, sampled_minus_reference
from rl.length import length_penalized
from rl.metrics import TokenMean, compute_sampling_metrics, mean_by_key
from rl.mismatch import corrected
from rl.rollouts import check_failures, lose_game
from rl.types import BatchReward, Metrics, TrajectoryGroup

T = TypeVar("T")


@dataclass
class Learner:
    """The policy in training and the parts of its step."""

    config: Config
    client: TrainingClient
    folder: RunFolder
    reference: Reference | None = None
    batch_reward: BatchReward | None = None
    teachers: Teachers | None = None
    critic: Critic | None = None


@dataclass
class StepOutcome:
    """Groups and data of a step. `advantages_P` is None for a group that was left out.
    `token_advantages_P`: member -> final advantages of its sampled tokens, before reduction and
    mismatch weights. `on_policy_gap` is between sampler and trainer with the same weights, None
    without such data."""

    groups_P: list[TrajectoryGroup] = field(default_factory=list)
    advantages_P: list[np.ndarray | None] = field(default_factory=list)
    token_advantages_P: list[dict[int, np.ndarray]] = field(default_factory=list)
    data_D: list[Datum] = field(default_factory=list)
    on_policy_gap: Gap | None = None


async def train_step(
    learner: Learner, source: GroupSource, step: int, adam: AdamParams, metrics: Metrics
) -> StepOutcome:
    """Trains on batch `step` and adds to `metrics`. A batch without a row to train on changes nothing;
    one whose advantages are all 0 is a step with a gradient of 0, in which AdamW follows its
    momentum. Passes are only submitted here: the next groups are awaited while the last ones are
    trained on."""
    config, outcome = learner.config, StepOutcome()
    of_minibatches: list[Metrics] = []
    steps_per_minibatch = max(1, config.num_substeps // source.num_minibatches)
    minibatches_per_step = max(1, source.num_minibatches // config.num_substeps)
    passes = _Passes(learner, adam, minibatches_per_step)
    minibatches = source.minibatches(step)
    while True:
        with timed(metrics, "sampling"):
            groups = await anext(minibatches, None)
        if groups is None:
            break
        rows, sampled_D = await _prepare(learner, groups, step, outcome, minibatch_metrics := {})
        of_minibatches.append(minibatch_metrics)
        for part in split_substeps(list(zip(rows, sampled_D, strict=True)), steps_per_minibatch):
            passes.forward_backward([row for row, _ in part], [sampled_T for _, sampled_T in part])
            if minibatches_per_step == 1:
                passes.optim_step()
        if len(of_minibatches) % minibatches_per_step == 0:
            passes.optim_step()
    passes.optim_step()
    with timed(metrics, "train"):
        metrics |= await passes.metrics(step, outcome) | metrics_of_step(of_minibatches)
    if learner.batch_reward:  # it may have dropped members
        check_failures(outcome.groups_P, config.limits)
    metrics |= _group_counts(outcome, source)
    return outcome


async def _prepare(
    learner: Learner, groups_P: list[TrajectoryGroup], step: int, outcome: StepOutcome, metrics: Metrics
) -> tuple[list[Row], list[np.ndarray | None]]:
    """The rows of a minibatch of groups with final advantages; and the sampler's (T,) logprobs of
    each row sampled under this step's starting weights, else None."""
    config = learner.config
    if learner.batch_reward:
        sizes_P = [len(group.trajectories_G) for group in groups_P]
        with timed(metrics, "batch_reward"), span("score"):
            metrics |= await learner.batch_reward(groups_P)
        for group, size in zip(groups_P, sizes_P, strict=True):
            if len(group.trajectories_G) < size:
                lose_game(group)
    places = trainable_groups(
        groups_P, config.advantage, config.remove_constant_reward_groups, config.limits.min_group_size
    )
    kept_P = [groups_P[p] for p in places]
    rows, advantages_P_G = await _with_advantages(learner, kept_P, metrics)
    of_place = dict(zip(places, advantages_P_G, strict=True))
    token_advantages_P: list[dict[int, np.ndarray]] = [{} for _ in groups_P]
    for (p, g), advantages_N in sampled_advantages(rows).items():
        token_advantages_P[places[p]][g] = advantages_N
    outcome.groups_P += groups_P
    outcome.advantages_P += [of_place.get(p) for p in range(len(groups_P))]
    outcome.token_advantages_P += token_advantages_P
    if not config.train_on_truncated:
        rows = without_truncated(rows, kept_P)
    num_rollouts = sum(len(group.trajectories_G) for group in groups_P)
    rows = reduced(rows, config.loss_reduction, config.max_tokens or 0, num_rollouts)
    sampled_D = [row.logprobs_T if kept_P[row.origin[0]].sampled_at_step == step else None for row in rows]
    if config.mismatch.mode != "none" and rows:
        with span("score"):
            rows, mismatch_metrics = await corrected(learner.client, rows, config.mismatch)
        metrics |= mismatch_metrics
    return rows, sampled_D


async def _with_advantages(
    learner: Learner, groups_P: list[TrajectoryGroup], metrics: Metrics
) -> tuple[list[Row], list[np.ndarray]]:
    """The rows of the groups with an advantage for each token, normalised; and the members'
    advantages, which the critic and the penalties are not in."""
    config, rows, rewarded_P, difference_D = learner.config, rows_of(groups_P), groups_P, []
    if learner.reference and rows:
        with timed(metrics, "reference"), span("score"):
            reference_D = await learner.reference.logprobs([row.datum() for row in rows])
        difference_D = sampled_minus_reference(rows, reference_D)
        metrics |= kl_metrics(rows, difference_D)
        if config.kl.where == "reward":
            rewarded_P = penalized_rewards(groups_P, rows, difference_D, config.kl.coef)
    if config.length.kind != "none":
        rewarded_P, length_metrics = length_penalized(rewarded_P, config.length.checked(config.max_tokens or 0))
        metrics |= length_metrics
    advantages_P_G = compute_advantages(rewarded_P, config.advantage)
    rows = with_advantages(rows, advantages_P_G)
    if learner.critic and rows:
        with timed(metrics, "critic"), span("score"):
            rows, value_metrics = await learner.critic.with_advantages(rewarded_P, rows)
        metrics |= value_metrics
    if difference_D and config.kl.where == "advantage":
        rows = penalized_advantages(rows, difference_D, config.kl.coef, config.kl.discount)
    if config.entropy_coef and rows:
        rows = penalized_advantages(rows, [row.logprobs_T for row in rows], config.entropy_coef, 0.0)
    if learner.teachers and rows:
        with timed(metrics, "teacher"), span("score"):
            teacher_difference_D, teacher_metrics = await learner.teachers.difference(groups_P, rows)
        metrics |= teacher_metrics
        distill = config.distill
        rows = penalized_advantages(rows, teacher_difference_D, distill.coef, distill.discount, distill.centre)
    if config.normalize_advantages and rows:
        rows = normalized(rows)
    return rows, advantages_P_G


class _Passes:
    """Submits the passes of a step in order and collects what they return."""

    def __init__(self, learner: Learner, adam: AdamParams, per_step: int):
        """`per_step`: passes before an optimizer step."""
        self._learner, self._adam, self._per_step = learner, adam, per_step
        # of each pass: the policy's, followed by the supervised pass if there is one
        self._terms: list[list[LossTerm]] = []
        # one for each entry of _terms
        self._outputs: list[asyncio.Task[list[ForwardBackwardOutput]]] = []
        # of each Datum, the sampler's logprobs if its pass has the sampler's weights
        self._sampled_D: list[np.ndarray | None] = []
        self._steps: list[asyncio.Task[OptimStepResponse]] = []
        self._pending = False  # gradients wait for an optim_step

    def forward_backward(self, rows: Sequence[Row], sampled_D: Sequence[np.ndarray | None]) -> None:
        if not rows:
            return
        config = self._learner.config
        data_D, kept_D = [row.datum() for row in rows], [row.kept for row in rows]
        terms = [LossTerm(data_D, config.loss_fn, config.loss_fn_config, kept_D, all_logprobs=False)]
        if supervised := [extra for row in rows for extra in row.supervised]:
            data, kept = zip(*supervised, strict=True)
            terms.append(LossTerm(data, "cross_entropy", None, kept, all_logprobs=False))
        self._terms.append(terms)
        self._sampled_D += [None] * len(data_D) if self._steps else sampled_D
        self._outputs.append(_spanned(self._learner.client.forward_backward_terms(terms)))
        if self._learner.critic:
            self._learner.critic.forward_backward(rows, self._per_step)
        self._pending = True

    def optim_step(self) -> None:
        if self._pending:
            self._steps.append(_spanned(self._learner.client.optim_step(self._adam)))
            if self._learner.critic:
                self._learner.critic.optim_step(self._adam)
            self._pending = False

    async def metrics(self, step: int, outcome: StepOutcome) -> Metrics:
        """Waits for all passes. A non-finite number ends the run, with its data on disk."""
        await reported(_finished([*self._outputs, *self._steps]), f"training on step {step}")
        for terms, output in zip(self._terms, self._outputs, strict=True):
            if isinstance(error := output.exception(), NonFiniteError):
                data_D = [datum for term in terms for datum in term.data_D]
                raise write_offending_data(self._learner.folder, step, data_D, error) from error
        critic_metrics = await self._learner.critic.metrics() if self._learner.critic else {}
        outputs = [task.result()[0] for task in self._outputs]
        supervised = [out for task in self._outputs for out in task.result()[1:]]
        steps = [task.result() for task in self._steps]
        outcome.data_D = [datum for terms in self._terms for datum in terms[0].data_D]
        logprobs_D = [out["logprobs"] for output in outputs for out in output.loss_fn_outputs]
        outcome.on_policy_gap = _on_policy_gap(outcome.data_D, self._sampled_D, logprobs_D)
        metrics = {f"optim/{name}": value for name, value in _reduced([output.metrics for output in outputs]).items()}
        if supervised:
            metrics["optim/supervised_loss"] = sum(output.metrics["loss:sum"] for output in supervised)
        of_steps = mean_by_key(response.metrics for response in steps)
        metrics |= {f"optim/{name}": value for name, value in of_steps.items()} | critic_metrics
        return metrics | (compute_sampling_metrics(outcome.data_D, logprobs_D) if logprobs_D else {})


def _on_policy_gap(
    data_D: Sequence[Datum], sampled_D: Sequence[np.ndarray | None], trained_D: Sequence[TensorData]
) -> Gap | None:
    """Over the sampled tokens of the data with `sampled_D`."""
    masked = [
        (sampled_T[mask_T], trained_T.array[mask_T])
        for datum, sampled_T, trained_T in zip(data_D, sampled_D, trained_D, strict=True)
        if sampled_T is not None and (mask_T := datum.loss_fn_inputs["mask"].array > 0).any()
    ]
    return Gap.between([sampled for sampled, _ in masked], [trained for _, trained in masked]) if masked else None


async def _finished(passes: Sequence[asyncio.Task[Any]]) -> None:
    """Waits for all; exceptions stay in the tasks. asyncio prints those that nobody has asked for."""
    if passes:
        await asyncio.wait(passes)
        _ = [task.cancelled() or task.exception() for task in passes]


def _spanned(future: APIFuture[T]) -> asyncio.Task[T]:
    async def wait() -> T:
        with span("train"):
            return await future

    return asyncio.create_task(wait())


def metrics_of_step(of_minibatches: Sequence[Metrics]) -> Metrics:
    """Seconds are added, a maximum is the largest, a TokenMean that of all tokens. Anything else is the
    mean of the minibatches that have it."""
    out = mean_by_key(of_minibatches)
    if len(of_minibatches) == 1:  # exact as it is
        return out
    for name in out:
        having = [metrics[name] for metrics in of_minibatches if name in metrics]
        if name.startswith("time/"):
            out[name] = sum(having)
        elif name.endswith("_max"):
            out[name] = max(having)
        elif means := [value for value in having if isinstance(value, TokenMean)]:
            out[name] = sum(mean * mean.tokens for mean in means) / sum(mean.tokens for mean in means)
    return out


def _reduced(metrics: Sequence[dict[str, float]]) -> Metrics:
    """Metrics of several passes as if of one: sums added, means weighed by their tokens."""
    tokens = [output["num_loss_tokens:sum"] for output in metrics]
    out: Metrics = defaultdict(float)
    for output, count in zip(metrics, tokens, strict=True):
        for key, value in output.items():
            name, kind = key.split(":")
            out[name] += value if kind == "sum" else value * count / max(sum(tokens), 1.0)
    return dict(out)


def _group_counts(outcome: StepOutcome, source: GroupSource) -> Metrics:
    counts = {
        "train/groups_removed": float(sum(advantages_G is None for advantages_G in outcome.advantages_P)),
        "train/groups_constant": float(sum(len(set(group.get_total_rewards())) == 1 for group in outcome.groups_P)),
    }
    if source.max_refills:
        counts["train/groups_refilled"] = float(sum(group.refills for group in outcome.groups_P))
        counts["train/refill_tokens"] = float(sum(group.refill_tokens for group in outcome.groups_P))
    steps = [group.sampled_at_step for group in outcome.groups_P if group.sampled_at_step is not None]
    if not source.max_steps_off_policy or not steps:
        return counts
    return counts | {
        f"sampling_client/step_{kind}": float(fn(steps)) for kind, fn in (("min", min), ("max", max), ("mean", np.mean))
    }
