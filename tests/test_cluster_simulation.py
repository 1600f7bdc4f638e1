"""The simulation of a cluster, by hand where it can be."""

import pytest

from benchmarks import cluster_simulation as simulation
from benchmarks.cluster_simulation import MODELS, Rollout, sample, step_seconds
from posttrain.backend.routing import Router, SamplingGroup

MODEL = MODELS[0]


def prefill(tokens: float) -> float:
    return 2 * MODEL.weights * tokens / (simulation.FLOPS * simulation.PREFILL_SHARE)


def test_a_lone_rollout_by_hand() -> None:
    """Two turns; the second's prompt is cached up to what it gains."""
    done = sample(MODEL, 1, [[Rollout(SamplingGroup(0), [(100.0, 50.0), (20.0, 10.0)])]], Router(1, False))
    decoded = 50 * step_seconds(MODEL, 1, 150.0) + 10 * step_seconds(MODEL, 1, 180.0)
    assert done.seconds == pytest.approx(prefill(120) + decoded + simulation.TURN_SECONDS)
    assert done.cache_hits == pytest.approx(150 / 270)


def test_members_of_a_group_share_the_prompt_and_the_steps() -> None:
    group = SamplingGroup(0)
    done = sample(MODEL, 2, [[Rollout(group, [(100.0, 50.0)]), Rollout(group, [(100.0, 50.0)])]], Router(2, True))
    assert done.seconds == pytest.approx(prefill(100) + 50 * step_seconds(MODEL, 2, 300.0))
    assert done.cache_hits == 0.5


def test_the_rank_with_most_tokens_is_waited_for() -> None:
    tokens, passes = simulation.cut(2, [20000.0, 9000.0, 9000.0, 1000.0])
    assert (tokens, passes) == (20000, 2)
    assert simulation.train_seconds(MODEL, 2, tokens, passes) == 6 * MODEL.weights * tokens / (
        simulation.FLOPS * simulation.TRAIN_SHARE
    )
