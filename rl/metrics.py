"""RL metrics, named as in tinker_semantics 2.3: environments, and the gap between sampler and
trainer.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from posttrain.backend.types import Datum, TensorData
from rl.types import Metrics, Trajectory, TrajectoryGroup

PERCENTS = (1, 50, 99)
GOOD_REWARD = 0.5  # a constant group at or above it counts as all good


class TokenMean(float):
    """A mean over sampled tokens, with their number, by which the minibatches of a step are joined."""

    tokens: int

    def __new__(cls, mean: float, tokens: int) -> "TokenMean":
        self = super().__new__(cls, mean)
        self.tokens = tokens
        return self


def compute_sampling_metrics(data_D: Sequence[Datum], trainer_logprobs_D: Sequence[TensorData]) -> Metrics:
    """Sampler against trainer on the sampled tokens: KL estimates v1 = mean(q - p) and v2 = mean((q
    - p)^2) / 2, the gap, quantiles of the ratio p / q, and the entropy (the mean of -q, which
    estimates it without bias)."""
    pairs = list(zip(data_D, trainer_logprobs_D, strict=True))
    mask = np.concatenate([datum.loss_fn_inputs["mask"].array for datum, _ in pairs]) > 0
    sampled = np.concatenate([datum.loss_fn_inputs["logprobs"].array for datum, _ in pairs])[mask].astype(np.float64)
    trained = np.concatenate([logprobs.array for _, logprobs in pairs])[mask].astype(np.float64)
    gap = sampled - trained
    quantiles, tokens = np.percentile(np.exp(-gap), PERCENTS), len(gap)
    return {
        "optim/kl_sample_train_v1": TokenMean(gap.mean(), tokens),
        "optim/kl_sample_train_v2": TokenMean(0.5 * np.square(gap).mean(), tokens),
        "optim/logprob_gap_mean": TokenMean(np.abs(gap).mean(), tokens),
        "optim/logprob_gap_max": float(np.abs(gap).max()),
        "optim/entropy": TokenMean(-sampled.mean(), tokens),
        **{f"optim/ratio_p{percent:02d}": float(value) for percent, value in zip(PERCENTS, quantiles, strict=True)},
    }


def compute_trajectory_metrics(groups_P: Sequence[TrajectoryGroup], prefix: str = "env") -> Metrics:
    """`env/all/...`, and `env/<tag>/...` for tags that only some of the groups have."""
    metrics = {f"{prefix}/all/{name}": value for name, value in _group_metrics(groups_P).items()}
    for tag in sorted({tag for group in groups_P for tag in group.tags}):
        tagged = [group for group in groups_P if tag in group.tags]
        if len(tagged) < len(groups_P):
            metrics |= {f"{prefix}/{tag}/{name}": value for name, value in _group_metrics(tagged).items()}
    return metrics | _error_metrics(groups_P, prefix)


def _error_metrics(groups_P: Sequence[TrajectoryGroup], prefix: str) -> Metrics:
    """Retried rollouts, and lost rollouts by error class; empty without errors."""
    lost = Counter(type(error).__name__ for group in groups_P for error in group.errors)
    counts = {**lost, "total": lost.total(), "retries": sum(group.num_retries for group in groups_P)}
    return {
        f"{prefix.removesuffix('env')}rollout_errors/{name}": float(count) for name, count in counts.items() if count
    }


def _group_metrics(groups_P: Sequence[TrajectoryGroup]) -> Metrics:
    trajectories = [trajectory for group in groups_P for trajectory in group.trajectories_G]
    turns = [transition for trajectory in trajectories for transition in trajectory.transitions]
    if not turns:
        return {"total_episodes": float(len(trajectories))}
    ac_tokens, ob_tokens = sum(len(turn.ac.tokens) for turn in turns), sum(turn.ob.length for turn in turns)
    group_metrics = (metrics for group in groups_P for metrics in group.metrics_G)
    return {
        "ac_tokens_per_turn": ac_tokens / len(turns),
        "ob_tokens_per_turn": ob_tokens / len(turns),
        "turns_per_episode": len(turns) / len(trajectories),
        "total_episodes": float(len(trajectories)),
        "total_turns": float(len(turns)),
        "total_ac_tokens": float(ac_tokens),
        "total_ob_tokens": float(ob_tokens),
        "frac_truncated": float(np.mean([turn.ac.stop_reason == "length" for turn in turns])),
        **_limit_metrics(trajectories),
        "reward/total": float(np.mean([reward for group in groups_P for reward in group.get_total_rewards()])),
        **mean_by_key(turn.metrics for turn in turns),
        **mean_by_key(group_metrics),
        **_by_group(groups_P),
    }


def _limit_metrics(trajectories: Sequence[Trajectory]) -> Metrics:
    """Share of the episodes ended by each limit, for limits that ended any."""
    ends = Counter(trajectory.stop_reason for trajectory in trajectories)
    return {
        f"ended_by/{reason}": count / len(trajectories) for reason, count in sorted(ends.items()) if reason != "done"
    }


def mean_by_key(dicts: Iterable[Metrics]) -> Metrics:
    """Each key averaged over the dicts that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for metrics in dicts:
        for key, value in metrics.items():
            values[key].append(float(value))
    return {key: float(np.mean(value)) for key, value in values.items()}


def _by_group(groups_P: Sequence[TrajectoryGroup]) -> Metrics:
    rewards_P_G = [group.get_total_rewards() for group in groups_P if group.trajectories_G]
    mixed = [len(set(rewards_G)) > 1 for rewards_G in rewards_P_G]
    good = [
        not is_mixed and rewards_G[0] >= GOOD_REWARD for is_mixed, rewards_G in zip(mixed, rewards_P_G, strict=True)
    ]
    bad = [not is_mixed and rewards_G[0] < GOOD_REWARD for is_mixed, rewards_G in zip(mixed, rewards_P_G, strict=True)]
    return {
        "by_group/frac_mixed": float(np.mean(mixed)),
        "by_group/frac_all_good": float(np.mean(good)),
        "by_group/frac_all_bad": float(np.mean(bad)),
    }
