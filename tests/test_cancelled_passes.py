"""Any pass or step may be cancelled or fail, at any moment: no step follows a pass that did."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.backend.errors import ConfigError, NonFiniteError, OutOfMemoryError, PassCancelledError
from posttrain.backend.futures import APIFuture
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams
from tests.calls_in_flight import PASSES, STEP, sum_of_logprobs
from tests.conftest import policy_data, trainer_of
from tests.processes import PATIENCE


def weights(client: TrainingClient) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer_of(client).sampled.sampler_weights()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class Blocked:
    """Holds the client's thread, so that what is submitted meanwhile waits in the queue."""

    def __init__(self, client: TrainingClient):
        self.gate, self.client = threading.Event(), client

    def __enter__(self) -> None:
        self.client._thread.submit(self.gate.wait, PATIENCE)

    def __exit__(self, *exc: object) -> None:
        self.gate.set()


@pytest.mark.parametrize("name", PASSES)
def test_no_step_follows_a_pass_that_was_cancelled_in_the_queue(torch_service: ServiceClient, name: str) -> None:
    client, undisturbed = (torch_service.create_training_client("micro") for _ in range(2))
    before = weights(client)
    with Blocked(client):
        whole, half = PASSES["forward_backward"](client, 0), PASSES[name](client, 1)
        step = client.optim_step(STEP)
        assert half.cancel() and half.cancelled()
    whole.result(PATIENCE)
    with pytest.raises(PassCancelledError):
        step.result(PATIENCE)
    assert same(weights(client), before)
    for one in (client, undisturbed):
        PASSES[name](one, 2)
        one.optim_step(STEP).result(PATIENCE)
    assert same(weights(client), weights(undisturbed)), "nothing is left of the first gradient"


def test_a_cancelled_step_drops_its_gradient_and_a_running_call_is_carried_through(
    torch_service: ServiceClient,
) -> None:
    client, undisturbed = (torch_service.create_training_client("micro") for _ in range(2))
    began = threading.Event()

    def slow(data, logprobs_D):  # noqa: ANN001, ANN202
        began.set()
        time.sleep(0.05)
        return sum_of_logprobs(data, logprobs_D)

    running = client.forward_backward_custom(policy_data(3), slow)
    assert began.wait(PATIENCE) and not running.cancel()
    with Blocked(client):
        assert client.optim_step(STEP).cancel()
    for one in (client, undisturbed):
        PASSES["forward_backward"](one, 2)
        one.optim_step(STEP).result(PATIENCE)
    assert same(weights(client), weights(undisturbed))


class Broken(BaseException):
    """Neither an Exception nor of this project."""


ERRORS = [
    torch.OutOfMemoryError("no memory"),
    ValueError("in the user's loss"),
    RuntimeError("CUDA error"),
    KeyboardInterrupt(),
    StopIteration(),
    asyncio.CancelledError(),
    NonFiniteError("nan"),
    Broken(),
]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_no_step_follows_a_pass_that_failed(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    """The error comes in the middle of a pass that has left half of its gradient."""
    client = torch_service.create_training_client("micro")
    before, trainer = weights(client), trainer_of(client)
    logprobs = trainer._logprobs

    def fails_once(batch):  # noqa: ANN001, ANN202
        for p in trainer.named_trainable.values():
            p.grad = torch.ones_like(p)
        monkeypatch.setattr(trainer, "_logprobs", logprobs)
        raise error

    monkeypatch.setattr(trainer, "_logprobs", fails_once)
    with Blocked(client):
        failed, second, step = PASSES[name](client, 0), PASSES[name](client, 1), client.optim_step(STEP)
    expected = RuntimeError if isinstance(error, asyncio.CancelledError | StopIteration) else type(error)
    if isinstance(error, torch.OutOfMemoryError):
        expected = OutOfMemoryError  # with the data's sizes and the setting to lower
    for future in (failed, step):
        outcome = future.exception(PATIENCE)
        assert outcome is not None and type(outcome) is expected and (outcome is error or outcome.__cause__ is error)
    assert second.exception(PATIENCE) is None
    assert same(weights(client), before) and all(p.grad is None for p in trainer.named_trainable.values())
    PASSES[name](client, 2)
    client.optim_step(STEP).result(PATIENCE)
    assert not same(weights(client), before)

    async def awaited() -> None:
        with pytest.raises(expected):
            await failed

    if not isinstance(error, KeyboardInterrupt | SystemExit):  # these end the event loop itself
        asyncio.run(awaited())


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda p_T: p_T.sum(), "must return the loss, and a dict of metrics"),
        (lambda p_T: (p_T.sum(), None), "must return the loss, and a dict of metrics"),
        (lambda p_T: None, "returned None"),
        (lambda p_T: (1.0, {}), "the loss 1.0, not a tensor of one number"),
        (lambda p_T: (p_T, {}), "not a tensor of one number: is it summed?"),
    ],
)
def test_what_a_custom_loss_may_return(torch_service: ServiceClient, returned: Any, says: str) -> None:
    client = torch_service.create_training_client("micro")
    data = policy_data(2)
    failed = client.forward_backward_custom(data, lambda data_D, logprobs_D: returned(logprobs_D[0]))
    error = client.optim_step(STEP).exception(PATIENCE)
    assert isinstance(error, ConfigError) and says in str(error) and isinstance(failed.exception(PATIENCE), ConfigError)
    # Trap: a metric that keeps the activations of its pass
    passed = client.forward_backward_custom(data, lambda data_D, p_D: (p_D[0].sum(), {"mean": p_D[0].mean()}))
    assert isinstance(passed.result(PATIENCE).metrics["mean"], float)


def test_what_failed_in_optim_step_leaves_no_gradient_and_no_stale_sampler(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = torch_service.create_training_client("micro")
    monkeypatch.setattr(trainer_of(client), "optim_step", lambda adam: (_ for _ in ()).throw(ArithmeticError()))
    PASSES["forward_backward"](client, 0)
    version = client._weights_version
    assert isinstance(client.optim_step(STEP).exception(PATIENCE), ArithmeticError)
    assert client._weights_version > version, "a part may have moved: the next sync must not be skipped"
    assert all(p.grad is None for p in trainer_of(client).named_trainable.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_calls_cancelled_at_random_leave_the_weights_that_the_others_make(
    torch_service: ServiceClient, seed: int
) -> None:
    """Every method of the training client. Afterwards the calls that were carried out are made
    again on a fresh client.
    """
    rng = np.random.default_rng(seed)
    client = torch_service.create_training_client("micro")
    start = client.save_state("start").result(PATIENCE).path
    calls: dict[str, Callable[[TrainingClient, int], APIFuture]] = PASSES | {
        "forward": lambda client, i: client.forward(policy_data(3, i), "cispo"),
        "forward_terms": lambda client, i: client.forward_terms([LossTerm(policy_data(2, i), "ppo", None)], keep=True),
        "optim_step": lambda client, i: client.optim_step(STEP),
        "save_state": lambda client, i: client.save_state(f"{i}"),
        "save_weights_for_sampler": lambda client, i: client.save_weights_for_sampler(f"{i}"),
        "load_state": lambda client, i: client.load_state(start),
        "load_state_with_optimizer": lambda client, i: client.load_state_with_optimizer(start),
        "sync": lambda client, i: client._submit_sync(None, None, False, "snapshot", True),
    }
    probability = np.array([8 if name in PASSES else 16 if name == "optim_step" else 1 for name in calls], dtype=float)
    names = rng.choice(list(calls), 60, p=probability / probability.sum()).tolist()
    doomed = rng.permutation(len(names))[:25]
    with Blocked(client):
        futures = [calls[name](client, i) for i, name in enumerate(names)]
        for i in doomed[:6]:
            futures[i].cancel()
    for i in doomed[6:]:
        time.sleep(rng.exponential(0.004))
        futures[i].cancel()
    concurrent.futures.wait(futures, PATIENCE)
    replayed, complete = torch_service.create_training_client("micro"), True
    for i, (name, future) in enumerate(zip(names, futures, strict=True)):
        carried_out = not future.cancelled()
        if name in PASSES:
            complete &= carried_out
        elif name == "optim_step":
            if carried_out and not complete:
                assert isinstance(future.exception(), PassCancelledError)
            if not (carried_out and complete):
                replayed._trainer.zero_grad()
            carried_out, complete = carried_out and complete, True
        elif carried_out and name.startswith("load_state"):
            complete = True
        elif name in ("save_state", "save_weights_for_sampler"):
            folder = Path(start).parent / ("" if name == "save_state" else "sampler_weights") / str(i)
            assert folder.exists() == carried_out
        if carried_out and name not in ("sync", "save_state", "save_weights_for_sampler"):
            assert future.exception() is None
            calls[name](replayed, i).result(PATIENCE)
    assert sum(future.cancelled() for future in futures) > 5
    assert same(weights(client), weights(replayed))


# Trap: infinite weights in a checkpoint.
@pytest.mark.parametrize("where", ["weight", "optimizer"])
def test_what_is_not_finite_is_never_saved(torch_service: ServiceClient, where: str) -> None:
    client = torch_service.create_training_client("micro")
    PASSES["forward_backward"](client, 0)
    client.optim_step(STEP).result(PATIENCE)
    kept = client.save_state("kept").result(PATIENCE).path
    parameter = list(trainer_of(client).named_trainable.values())[-1]
    tensor = (
        parameter.data if where == "weight" else trainer_of(client).trained.optimizer.state[parameter]["exp_avg_sq"]
    )
    for value in (torch.nan, torch.inf, -torch.inf):
        tensor.view(-1)[-1] = value
        client._weights_version += 1
        for save in (client.save_state, client.save_weights_for_sampler):
            with pytest.raises(NonFiniteError, match="not finite"):
                save("kept").result(PATIENCE)
        # a sampler has no moments
        with pytest.raises(NonFiniteError) if where == "weight" else nullcontext():
            client.save_weights_and_get_sampling_client()
    assert [path.name for path in Path(kept).parent.iterdir()] == ["kept"], "and nothing is left beside it"
    client.load_state_with_optimizer(kept).result(PATIENCE)
    client.save_state("kept").result(PATIENCE)
    tensor = 1e30 * torch.ones(())  # large is not infinite, though its square is
    trainer_of(client).named_trainable["model.norm.weight"].data[0] = tensor
    client.save_state("large").result(PATIENCE)


def test_an_infinite_step_ends_in_an_error_and_not_in_a_checkpoint(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    PASSES["forward_backward"](client, 0).result(PATIENCE)
    trainer_of(client).named_trainable["model.norm.weight"].data.fill_(1e30)
    client.optim_step(AdamParams(learning_rate=1.0, weight_decay=1e9)).result(PATIENCE)
    with pytest.raises(NonFiniteError):
        client.save_state("final").result(PATIENCE)
