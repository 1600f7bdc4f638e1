"""Any future may be cancelled and any caller may go away, at any moment: nobody else notices, and
no step follows a pass that failed.
"""

# Trap: a cancelled request that kills the engine or keeps its place; a cancelled or failed pass
# followed by a step; engines that stay.

import asyncio
import concurrent.futures
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs.twenty_questions import TwentyQuestionsBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.engine import EngineThread
from posttrain.backend.errors import ClosedError, EngineError, NonFiniteError, OutOfMemoryError, PassCancelledError
from posttrain.backend.futures import APIFuture, InOrder
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, ModelInput, SampleResponse, SamplingParams
from rl import train
from rl.frozen_policy import FrozenPolicy
from rl.rollouts import RolloutLimits
from tests.conftest import ROOT, policy_data, random_tokens, trainer_of

PATIENCE = 600.0  # seconds until a wait is taken for a hang
STEP = AdamParams(1e-3)


def weights(client: TrainingClient) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer_of(client).sampler_weights()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def sum_of_logprobs(data, logprobs_D):  # noqa: ANN001, ANN201
    return -torch.cat(list(logprobs_D)).sum() * 1e-2, {}


# --- training -----------------------------------------------------------------------------------


class Blocked:
    """Holds the client's thread, so that what is submitted meanwhile waits in the queue."""

    def __init__(self, client: TrainingClient):
        self.gate, self.client = threading.Event(), client

    def __enter__(self) -> None:
        self.client._thread.submit(self.gate.wait, PATIENCE)

    def __exit__(self, *exc: object) -> None:
        self.gate.set()


PASSES: dict[str, Callable[[TrainingClient, int], APIFuture]] = {
    "forward_backward": lambda client, seed: client.forward_backward(policy_data(3, seed), "importance_sampling"),
    "forward_backward_custom": lambda client, seed: client.forward_backward_custom(
        policy_data(3, seed), sum_of_logprobs
    ),
    "forward_backward_terms": lambda client, seed: client.forward_backward_terms(
        [LossTerm(policy_data(3, seed), "ppo", None)]
    ),
}


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
    AssertionError(),
    KeyboardInterrupt(),
    SystemExit(1),
    ArithmeticError(),
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
    futures = [calls[name](client, i) for i, name in enumerate(names)]
    for i in rng.permutation(len(names))[:25]:
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
    tensor = parameter.data if where == "weight" else trainer_of(client).optimizer.state[parameter]["exp_avg_sq"]
    for value in (torch.nan, torch.inf, -torch.inf):
        tensor.view(-1)[-1] = value
        client._weights_version += 1
        for save in (client.save_state, client.save_weights_for_sampler):
            with pytest.raises(NonFiniteError, match="not finite"):
                save("kept").result(PATIENCE)
        with pytest.raises(NonFiniteError):
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


# --- sampling -----------------------------------------------------------------------------------

LONG = SamplingParams(max_tokens=100, seed=1, stop=[])


def prompt_of(length: int, seed: int = 0) -> ModelInput:
    return ModelInput.from_ints(random_tokens(np.random.default_rng([seed, length]), length))


@pytest.fixture(scope="module", params=["torch", "vllm"])
def sampler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SamplingClient]:
    if request.param == "vllm":
        with request.getfixturevalue("vllm_service").create_sampling_client(base_model="micro") as client:
            yield client
    else:
        with ServiceClient(BackendConfig(engine="torch"), tmp_path_factory.mktemp("torch")) as service:
            yield service.create_sampling_client(base_model="micro")


def assert_all_places_are_free(client: SamplingClient) -> None:
    thread: Any = client._engine
    # what was submitted before has been accepted
    client.sample(prompt_of(3), 1, SamplingParams(max_tokens=1)).result(PATIENCE)
    wait_until(lambda: thread.num_in_flight == 0)
    engine = thread._engine
    assert not getattr(engine, "_unfinished", None) and not getattr(engine, "_waiting", None)
    if hasattr(engine, "_unfinished"):
        assert not engine._engine.has_unfinished_requests()  # type: ignore[attr-defined]


def assert_close(a: SampleResponse, b: SampleResponse) -> None:
    assert [s.tokens for s in a.sequences] == [s.tokens for s in b.sequences]
    for ours, theirs in zip(a.sequences, b.sequences, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_requests_cancelled_at_random_trouble_nobody_else(sampler: SamplingClient) -> None:
    """Tasks that are cancelled, time-outs, futures cancelled by a thread; the witnesses get what
    they get alone.
    """
    rng = np.random.default_rng(0)
    witnesses = [(prompt_of(20, i), SamplingParams(max_tokens=40, seed=i, stop=[])) for i in range(8)]
    alone = [sampler.sample(prompt, 2, params).result(PATIENCE) for prompt, params in witnesses]
    scored = sampler.compute_logprobs(witnesses[0][0]).result(PATIENCE)

    async def timed_out(i: int) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(rng.exponential(0.05)):
                await sampler.sample_async(prompt_of(10, i), 4, LONG)
                await asyncio.sleep(PATIENCE)

    async def witness(i: int) -> None:
        await asyncio.sleep(rng.exponential(0.05))
        assert_close(await sampler.sample_async(witnesses[i][0], 2, witnesses[i][1]), alone[i])
        assert await sampler.compute_logprobs_async(witnesses[0][0]) == pytest.approx(scored, abs=1e-4)

    async def everything() -> None:
        async with asyncio.TaskGroup() as tasks:
            for i in range(12):
                tasks.create_task(timed_out(i))
            for i in range(len(witnesses)):
                tasks.create_task(witness(i))
            for i in range(12):
                doomed = tasks.create_task(sampler.compute_logprobs_async(prompt_of(50, i)))
                asyncio.get_running_loop().call_later(rng.exponential(0.02), doomed.cancel)

    def from_a_thread() -> None:
        futures = [sampler.sample(prompt_of(5, i), 3, LONG) for i in range(12)]
        for future in rng.permutation(np.array(futures, dtype=object)):
            time.sleep(rng.exponential(0.01))
            future.cancel()

    thread = threading.Thread(target=from_a_thread)
    thread.start()
    asyncio.run(everything())
    thread.join(PATIENCE)
    assert_all_places_are_free(sampler)


def test_a_cancelled_request_leaves_the_engine_at_the_next_token(
    sampler: SamplingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread: Any = sampler._engine
    engine = thread._engine
    decode = "_forward" if hasattr(engine, "_forward") else "step"
    one_token, reached, cancelled, calls = getattr(engine, decode), threading.Event(), threading.Event(), []

    def counted(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            reached.set()
            cancelled.wait(PATIENCE)
        return one_token(*args)

    monkeypatch.setattr(engine, decode, counted)
    futures = [sampler.sample(prompt_of(5, i), 4, LONG) for i in range(3)]
    assert reached.wait(PATIENCE) and all(future.cancel() for future in futures)
    cancelled.set()
    assert_all_places_are_free(sampler)
    assert len(calls) < 20, "of the 100 tokens of each"


def test_time_outs_waiters_and_loops_that_are_gone(sampler: SamplingClient) -> None:
    future = sampler.sample(prompt_of(5), 1, LONG)
    with pytest.raises(TimeoutError):
        future.result(timeout=1e-4)
    assert len(future.result(PATIENCE).sequences[0].tokens) == 100, (
        "who stops waiting by result(timeout) withdraws nothing"
    )

    async def gives_up(future: APIFuture[SampleResponse]) -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=1e-3)

    async def two_waiters() -> None:
        future = sampler.sample(prompt_of(6), 1, LONG)
        patient = asyncio.create_task(future.coroutine())
        await asyncio.sleep(0)
        await gives_up(future)
        assert len((await patient).sequences[0].tokens) == 100, "one waiter's time-out is not the other's"

    asyncio.run(two_waiters())
    shared = sampler.sample(prompt_of(7), 1, LONG)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(asyncio.run, shared.coroutine()) for _ in range(2)]
    assert outcomes[0].result(PATIENCE) is outcomes[1].result(PATIENCE), "awaited in two event loops"
    loop = asyncio.new_event_loop()
    task = loop.create_task(sampler.sample_async(prompt_of(8), 1, LONG))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()  # with a request in flight, and nobody to hear of it
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    assert_all_places_are_free(sampler)


# Trap: an engine that waits for the reaction of a loop whose thread waits for the engine.
def test_a_call_that_blocks_its_loop_is_answered_at_once(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.backend.engine.SETTLE_LOOP_SECONDS", 10 * PATIENCE)
    sampler = torch_service.create_sampling_client(base_model="micro")

    async def main() -> list[int]:
        futures = [sampler.sample(prompt_of(5, i), 1, SamplingParams(max_tokens=2, seed=0)) for i in range(2)]
        lengths = [len(future.result(PATIENCE).sequences[0].tokens) for future in futures]
        torch_service.close()
        return lengths

    assert asyncio.run(main()) == [2, 2]


def test_a_future_is_one_of_concurrent_futures(sampler: SamplingClient, caplog: pytest.LogCaptureFixture) -> None:
    futures = [sampler.sample(prompt_of(5, i), 1, SamplingParams(max_tokens=3, seed=i, stop=[])) for i in range(6)]
    assert isinstance(futures[0].future(), concurrent.futures.Future)
    assert {*concurrent.futures.as_completed(futures, PATIENCE)} == {*futures}
    assert all(future.done() and future.exception() is None and not future.cancel() for future in futures)
    cancelled = sampler.sample(prompt_of(5), 1, LONG)
    assert cancelled.cancel() and cancelled.cancel() and cancelled.cancelled()
    assert concurrent.futures.wait([cancelled], PATIENCE).done == {cancelled}
    with pytest.raises(concurrent.futures.CancelledError):
        cancelled.result()

    async def awaits_it() -> None:
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert len((await asyncio.wrap_future(sampler.sample(prompt_of(4), 1, LONG))).sequences) == 1

    asyncio.run(awaits_it())
    called = []

    def raises(error: BaseException) -> Callable[[object], None]:
        def callback(future: object) -> None:
            called.append(future)
            raise error

        return callback

    future = sampler.sample(prompt_of(9), 1, LONG)
    for error in (ValueError(), SystemExit(), asyncio.CancelledError(), KeyboardInterrupt()):
        future.add_done_callback(raises(error))
    future.add_done_callback(called.append)
    future.result(PATIENCE)
    wait_until(lambda: called == [future] * 5)
    for wait in (lambda future: future.result(), lambda future: future.exception()):
        waits_for_itself = sampler.sample(prompt_of(9), 1, LONG)
        waits_for_itself.add_done_callback(lambda _, wait=wait: wait(sampler.sample(prompt_of(4), 1, LONG)))
        waits_for_itself.result(PATIENCE)
    assert_all_places_are_free(sampler)


# --- clients and engines that go ----------------------------------------------------------------


def engines() -> set[threading.Thread]:
    gc.collect()
    return {thread for thread in threading.enumerate() if thread.name == "sampling-engine"}


@pytest.fixture
def new_engines() -> Callable[[], int]:
    """The number of engines opened since the test began and still there; engines of earlier tests
    may be ending meanwhile.
    """
    before = engines()
    return lambda: len(engines() - before)


def test_an_engine_goes_with_its_last_client(torch_service: ServiceClient, new_engines: Callable[[], int]) -> None:
    frozen = torch_service.create_sampling_client(base_model="micro")
    with torch_service.create_sampling_client(base_model="micro") as closed:
        running = closed.sample(prompt_of(5), 40, LONG)
    assert isinstance(running.exception(PATIENCE), EngineError) and new_engines() == 1
    with pytest.raises(ClosedError):
        closed.sample(prompt_of(5), 1, LONG)
    training = torch_service.create_training_client("micro")
    live = training.save_weights_and_get_sampling_client()
    del training
    assert len(live.sample(prompt_of(5), 1, LONG).result(PATIENCE).sequences) == 1 and new_engines() == 2
    last = live.sample(prompt_of(5), 1, LONG)
    del live, frozen
    assert len(last.result(PATIENCE).sequences[0].tokens) == 100, "a call in flight holds its engine"
    wait_until(lambda: new_engines() == 0)
    for _ in range(3):
        service = ServiceClient(BackendConfig(engine="torch"))
        assert service.create_sampling_client(base_model="micro").sample(prompt_of(5), 1, LONG).result(PATIENCE)
    wait_until(lambda: new_engines() == 0)


def test_the_engine_of_a_frozen_policy_goes_with_the_run_that_asked_it(
    tmp_path: Path, new_engines: Callable[[], int]
) -> None:
    answerer = FrozenPolicy(
        base_model="micro", renderer_name="plain", max_tokens=3, backend=BackendConfig(engine="torch")
    )
    completer = answerer.open_completer()
    assert new_engines() == 1
    del completer
    wait_until(lambda: new_engines() == 0)
    env = TwentyQuestionsBuilder(answerer=answerer, batch_size=1, group_size=2, n_batches=1)
    config = train.Config(
        env=env,
        model_name="micro",
        renderer_name="plain",
        max_tokens=2,
        eval_every=0,
        log_path=str(tmp_path / "run"),
        limits=RolloutLimits(max_failed_fraction=1.0),
        backend=BackendConfig(engine="torch"),
    )
    asyncio.run(train.main(config))
    del config, env
    wait_until(lambda: new_engines() == 0)


def test_opening_a_client_that_is_cancelled_or_fails_leaves_no_engine(
    torch_service: ServiceClient, new_engines: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e-3):
                await torch_service.create_sampling_client_async(base_model="micro")

    asyncio.run(cancelled())
    wait_until(lambda: new_engines() == 0)
    monkeypatch.setattr(
        "posttrain.backend.torch_sampler.TorchSampler.load_weights", lambda self, weights: {}["missing"]
    )
    with pytest.raises(KeyError):
        torch_service.create_sampling_client(base_model="micro")
    wait_until(lambda: new_engines() == 0)


def test_closing_fails_what_waits_and_refuses_what_comes(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    began, gate = threading.Event(), threading.Event()
    client._thread.submit(lambda: (began.set(), gate.wait(PATIENCE)))
    waiting = [PASSES["forward_backward"](client, 0), client.save_state("never")]
    assert began.wait(PATIENCE)
    threading.Timer(0.05, gate.set).start()
    client.close()
    for future in waiting:
        assert isinstance(future.exception(PATIENCE), ClosedError)
    with pytest.raises(ClosedError):
        client.optim_step(STEP)

    thread = InOrder("test")
    inner: list[BaseException | None] = []

    def waits_for_its_own_thread() -> None:
        inner.append(pytest.raises(RuntimeError, thread.submit(int).result).value)
        thread.close()

    thread.submit(waits_for_its_own_thread).result(PATIENCE)
    assert isinstance(inner[0], RuntimeError)


def test_an_interrupted_start_leaves_no_engine(new_engines: Callable[[], int]) -> None:
    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EngineThread(fails, deterministic=True)  # type: ignore[arg-type]
    wait_until(lambda: new_engines() == 0)


SCRIPT = """
import asyncio
import posttrain.backend as tinker
from posttrain.backend.config import BackendConfig
service = tinker.ServiceClient(BackendConfig(engine="torch"))
client = service.create_training_client("micro")
sampler = client.save_weights_and_get_sampling_client()
prompt, params = tinker.ModelInput.from_ints([5, 6, 7]), tinker.SamplingParams(max_tokens=400, stop=[])
async def main():
    async with asyncio.timeout(0.2):
        await asyncio.gather(*(sampler.sample_async(prompt, 8, params) for _ in range(50)))
try:
    asyncio.run(main())
except TimeoutError:
    print("gave up")
left = [sampler.sample(prompt, 8, params) for _ in range(50)]
frozen = service.create_sampling_client(base_model="micro")
left.append(frozen.sample(prompt, 8, params))
left.append(client.save_state("left"))
"""


def test_a_process_ends_cleanly_with_calls_in_flight(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "gave up\n", "")
    assert (tmp_path / "checkpoints" / "left").is_dir(), "a call that was accepted is carried out"
