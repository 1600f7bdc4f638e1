"""Finished groups as JSON, for the checkpoint of an asynchronous run and the samples of an
evaluation. Floats are exact; a metric that is not finite, which JSON does not have, is a text
("nan"). Left out: images, and what batch rewards add (they run when a group is trained on).
"""

import math
from typing import Any

from posttrain.backend.types import ModelInput
from rl import types
from rl.types import EnvGroupBuilder, Metrics, RolloutError, TokensWithLogprobs, Trajectory, TrajectoryGroup, Transition


def group_to_json(group: TrajectoryGroup) -> dict[str, Any]:
    return {
        "trajectories": [_trajectory_to_json(trajectory) for trajectory in group.trajectories_G],
        "final_rewards": group.final_rewards_G,
        "metrics": [_metrics_to_json(metrics) for metrics in group.metrics_G],
        "tags": group.tags,
        "errors": [[type(error).__name__, str(error)] for error in group.errors],
        "num_retries": group.num_retries,
        "sampled_at_step": group.sampled_at_step,
        "refills": group.refills,
        "refill_tokens": group.refill_tokens,
        "refill_rollouts": group.refill_rollouts,
    }


def group_from_json(saved: dict[str, Any], builder: EnvGroupBuilder) -> TrajectoryGroup:
    """`builder` is the dataset's, at the same batch and index."""
    return TrajectoryGroup(
        trajectories_G=[_trajectory_from_json(trajectory) for trajectory in saved["trajectories"]],
        final_rewards_G=saved["final_rewards"],
        metrics_G=[_metrics_from_json(metrics) for metrics in saved["metrics"]],
        tags=saved["tags"],
        errors=[getattr(types, name, RolloutError)(message) for name, message in saved["errors"]],
        num_retries=saved["num_retries"],
        builder=builder,
        sampled_at_step=saved["sampled_at_step"],
        refills=saved.get("refills", 0),
        refill_tokens=saved.get("refill_tokens", 0),
        refill_rollouts=saved.get("refill_rollouts", 0),
    )


def _trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """Of an observation that `continues` the turn before, only the new tokens."""
    turns = [
        {**vars(turn), "ob": ob, "continues": continues, "ac": vars(turn.ac), "metrics": _metrics_to_json(turn.metrics)}
        for turn, (ob, continues) in zip(trajectory.transitions, trajectory.new_observations(), strict=True)
    ]
    return {"turns": turns, "stop_reason": trajectory.stop_reason}


def _trajectory_from_json(saved: dict[str, Any]) -> Trajectory:
    turns: list[Transition] = []
    for turn in saved["turns"]:
        continues = turn.get("continues")  # older versions wrote every observation whole
        ob = turns[-1].extended(turn["ob"]) if continues else ModelInput.from_ints(turn["ob"])
        ac, metrics = TokensWithLogprobs(**turn["ac"]), _metrics_from_json(turn["metrics"])
        fields = {name: value for name, value in turn.items() if name != "continues"}
        turns.append(Transition(**{**fields, "ob": ob, "ac": ac, "metrics": metrics}))
    return Trajectory(turns, saved["stop_reason"])


def _metrics_to_json(metrics: Metrics) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()}


def _metrics_from_json(saved: dict[str, float | str]) -> Metrics:
    return {name: float(value) if isinstance(value, str) else value for name, value in saved.items()}
