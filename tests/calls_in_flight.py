"""What the tests of cancelled calls and of closing share: calls that take a while."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.backend.futures import APIFuture
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, SamplingParams
from tests.conftest import policy_data
from tests.processes import PATIENCE

STEP = AdamParams(1e-3)
LONG = SamplingParams(max_tokens=100, seed=1, stop=[])


@contextmanager
def held(sampler: SamplingClient) -> Iterator[None]:
    """Nothing is decoded before the block ends: what is asked for in it is in flight, however long the caller waits
    for a core."""
    thread: Any = sampler._engine
    engine, ended = thread._engine, threading.Event()
    step = engine.step
    engine.step = lambda: (ended.wait(PATIENCE), step())[1]
    try:
        yield
    finally:
        ended.set()
        del engine.step


def sum_of_logprobs(data, logprobs_D):  # noqa: ANN001, ANN201
    return -torch.cat(list(logprobs_D)).sum() * 1e-2, {}


PASSES: dict[str, Callable[[TrainingClient, int], APIFuture]] = {
    "forward_backward": lambda client, seed: client.forward_backward(policy_data(3, seed), "importance_sampling"),
    "forward_backward_custom": lambda client, seed: client.forward_backward_custom(
        policy_data(3, seed), sum_of_logprobs
    ),
    "forward_backward_terms": lambda client, seed: client.forward_backward_terms(
        [LossTerm(policy_data(3, seed), "ppo", None)]
    ),
}
