"""Any sample may be cancelled and any caller may go away, at any moment: nobody else notices, and no place is kept."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.futures import APIFuture
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import SampleResponse, SamplingParams
from tests.calls_in_flight import LONG, held
from tests.conftest import SAMPLER_GAP, prompt_of
from tests.processes import PATIENCE, wait_until


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
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=SAMPLER_GAP)


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
        assert await sampler.compute_logprobs_async(witnesses[0][0]) == pytest.approx(scored, abs=SAMPLER_GAP)

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
    with held(sampler), pytest.raises(TimeoutError):
        future = sampler.sample(prompt_of(5), 1, LONG)
        future.result(timeout=1e-4)
    assert len(future.result(PATIENCE).sequences[0].tokens) == 100, (
        "who stops waiting by result(timeout) withdraws nothing"
    )

    async def gives_up(future: APIFuture[SampleResponse]) -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=1e-3)

    async def two_waiters() -> None:
        with held(sampler):
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


def test_a_future_is_one_of_concurrent_futures(sampler: SamplingClient) -> None:
    futures = [sampler.sample(prompt_of(5, i), 1, SamplingParams(max_tokens=3, seed=i, stop=[])) for i in range(6)]
    assert isinstance(futures[0].future(), concurrent.futures.Future)
    assert {*concurrent.futures.as_completed(futures, PATIENCE)} == {*futures}
    assert all(future.done() and future.exception() is None and not future.cancel() for future in futures)
    with held(sampler):
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

    with held(sampler):
        future = sampler.sample(prompt_of(9), 1, LONG)
        for error in (ValueError(), SystemExit(), asyncio.CancelledError(), KeyboardInterrupt()):
            future.add_done_callback(raises(error))
        future.add_done_callback(called.append)
    future.result(PATIENCE)
    wait_until(lambda: called == [future] * 5)
    for wait in (lambda future: future.result(), lambda future: future.exception()):
        with held(sampler):
            waits_for_itself = sampler.sample(prompt_of(9), 1, LONG)
            waits_for_itself.add_done_callback(lambda _, wait=wait: wait(sampler.sample(prompt_of(4), 1, LONG)))
        waits_for_itself.result(PATIENCE)
    assert_all_places_are_free(sampler)
