"""What a sampling engine is, and the one thread that drives it.

Callers, from any thread or event loop, submit requests and get futures. The thread adds what has arrived, lets the engine decode one step,
hands out what finished, and carries out weight syncs between two steps.

On a CPU a run must be reproducible bit for bit, and a sequence's logprobs depend in their last digits on what is decoded beside it. So
before a step the thread lets everyone who was just answered react (`_settle`): which requests share a step then depends on the program
and not on the clock. Environments that wait for something outside the event loop are, by nature, not covered.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch

from backend.errors import EngineError, StaleSamplerError
from backend.openmp import release_workers
from backend.types import SampledSequence, SampleResponse, SamplingParams

Weights = Iterable[tuple[str, torch.Tensor]]

# Event-loop turns granted to callers between an answer and the next step; an answer reaches the next request in three or four.
SETTLE_TURNS = 12
# Seconds to wait for a busy event loop (a slow grader inside `step`), and for the next request of a caller that has no event loop.
SETTLE_LOOP_SECONDS, SETTLE_THREAD_SECONDS = 2.0, 0.002


@dataclass(eq=False)
class SequenceRequest:
    """One sequence to sample. `topk_prompt`: None = no prompt logprobs, 0 = those of the prompt's tokens, k = the k most likely too."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    topk_prompt: int | None = None


@dataclass
class Sampled:
    """A finished sequence, and the prompt's logprobs where they were asked for."""

    sequence: SampledSequence
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    failure: str | None = None  # why the engine gave the sequence up; the call it belongs to fails


class Engine(Protocol):
    """Not thread-safe; one thread calls it."""

    def add(self, request: SequenceRequest) -> None: ...

    def step(self) -> list[tuple[SequenceRequest, Sampled]]:
        """Decodes a while; returns the sequences that finished."""
        ...

    def drop_all(self) -> None:
        """Forgets every unfinished request."""
        ...

    def load_weights(self, weights: Weights) -> None:
        """Replaces all weights and forgets everything cached that depends on them."""
        ...

    def close(self) -> None: ...


@dataclass(eq=False)
class _Call:
    """A client's call: one response for `len(requests)` sequences of one prompt."""

    requests: list[SequenceRequest]
    version: int | None  # the weights it insists on; None = whatever is live
    future: "Future[SampleResponse]"
    loop: asyncio.AbstractEventLoop | None
    done: dict[SequenceRequest, Sampled] = field(default_factory=dict)


@dataclass(eq=False)
class _Sync:
    weights: Callable[[], Weights]
    version: int
    future: "Future[None]"


class EngineThread:
    """Drives one engine. `version` counts the weights it has been given; `deterministic` turns settling on."""

    def __init__(self, make_engine: Callable[[], Engine], deterministic: bool):
        self.version = -1
        self.unseeded_calls = itertools.count()  # seeds of calls that bring none: reproducible, and never the same twice
        self._deterministic = deterministic
        self._inbox: queue.SimpleQueue[_Call | _Sync | None] = queue.SimpleQueue()
        self._calls: dict[SequenceRequest, _Call] = {}
        self._unsettled: set[asyncio.AbstractEventLoop | None] = set()
        self._error: BaseException | None = None
        self._stopped = False
        self._put_lock = threading.Lock()  # nothing may enter the inbox once the thread has emptied it for the last time
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_engine, started), name="sampling-engine", daemon=True)
        self._thread.start()
        started.result()

    # --- called from anywhere ---------------------------------------------------------------------------------------------------

    def submit(self, requests: list[SequenceRequest], version: int | None) -> "Future[SampleResponse]":
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        call = _Call(requests, version, Future(), loop)
        self._put(call)
        return call.future

    def sync(self, weights: Callable[[], Weights], version: int) -> None:
        """Blocks until the engine runs on `weights`. Unfinished calls that insist on older weights fail with StaleSamplerError."""
        sync = _Sync(weights, version, Future())
        self._put(sync)
        sync.future.result()

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _put(self, item: _Call | _Sync) -> None:
        with self._put_lock:
            if self._stopped:
                raise self._stop_reason()
            self._inbox.put(item)

    def _stop_reason(self) -> EngineError:
        reason = EngineError("the sampling engine has stopped" + (f": {self._error!r}" if self._error else ""))
        reason.__cause__ = self._error
        return reason

    # --- the thread -------------------------------------------------------------------------------------------------------------

    def _run(self, make_engine: Callable[[], Engine], started: "Future[None]") -> None:
        try:
            self._engine = make_engine()
        except BaseException as error:
            self._error = error
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while self._take_inbox():
                if self._calls:
                    self._deliver(self._engine.step())
        except BaseException as error:
            self._error = error
        finally:
            with self._put_lock:
                self._stopped = True
            self._fail(lambda call: True, self._stop_reason())
            for item in self._drain():
                if item is not None:
                    item.future.set_exception(self._stop_reason())
            self._engine.close()

    def _take_inbox(self) -> bool:
        """Adds what has arrived; waits if there is nothing to decode. False means close."""
        if not self._calls:
            release_workers()
            if not self._accept(self._inbox.get()):
                return False
        while True:
            if not all(self._accept(item) for item in self._drain()):
                return False
            if not (self._deterministic and self._unsettled):
                return True
            self._settle()

    def _drain(self) -> Iterator[_Call | _Sync | None]:
        while not self._inbox.empty():
            yield self._inbox.get()

    def _accept(self, item: _Call | _Sync | None) -> bool:
        if item is None:
            return False
        if isinstance(item, _Sync):
            self._load(item)
        elif item.version is not None and item.version != self.version:
            item.future.set_exception(_stale(item.version, self.version))
        else:
            self._unsettled.add(item.loop)
            self._add(item)
        return True

    def _add(self, call: _Call) -> None:
        try:
            for request in call.requests:
                self._engine.add(request)
        except ValueError as error:  # the engine refuses this request; the others go on
            call.future.set_exception(EngineError(f"the engine refused the request: {error}"))
            self._restart_unfinished()
            return
        self._calls |= dict.fromkeys(call.requests, call)

    def _load(self, sync: _Sync) -> None:
        try:
            if any(call.version is not None for call in self._calls.values()):
                self._fail(lambda call: call.version is not None, _stale(self.version, sync.version))
                self._restart_unfinished()
            self._engine.load_weights(sync.weights())
        except BaseException as error:
            sync.future.set_exception(error)
            raise
        self.version = sync.version
        sync.future.set_result(None)

    def _restart_unfinished(self) -> None:
        """Starts over what is still wanted, after something else had to be withdrawn."""
        self._engine.drop_all()
        for request in self._calls:
            self._engine.add(request)

    def _deliver(self, finished: list[tuple[SequenceRequest, Sampled]]) -> None:
        for request, sampled in finished:
            call = self._calls.pop(request)
            call.done[request] = sampled
            if len(call.done) == len(call.requests):
                self._unsettled.add(call.loop)
                if failures := [done.failure for done in call.done.values() if done.failure]:
                    call.future.set_exception(EngineError(f"the engine gave a sequence up: {failures[0]}"))
                else:
                    call.future.set_result(_response(call))

    def _fail(self, which: Callable[[_Call], bool], error: Exception) -> None:
        for request, call in list(self._calls.items()):
            if which(call):
                del self._calls[request]
                if not call.future.done():
                    call.future.set_exception(error)

    def _settle(self) -> None:
        """Returns once everyone answered since the last step has had the time to ask again."""
        waiting, self._unsettled = self._unsettled, set()
        for loop in waiting:
            if loop is None:
                self._wait_for_quiet()
            elif not loop.is_closed():
                reacted = threading.Event()
                loop.call_soon_threadsafe(_after_turns, loop, SETTLE_TURNS, reacted)
                reacted.wait(SETTLE_LOOP_SECONDS)

    def _wait_for_quiet(self) -> None:
        while True:
            try:
                item = self._inbox.get(timeout=SETTLE_THREAD_SECONDS)
            except queue.Empty:
                return
            if not self._accept(item):
                self._inbox.put(None)  # a request to close: let _take_inbox see it
                return


def _after_turns(loop: asyncio.AbstractEventLoop, turns: int, reacted: threading.Event) -> None:
    if turns:
        loop.call_soon(_after_turns, loop, turns - 1, reacted)
    else:
        reacted.set()


def _response(call: _Call) -> SampleResponse:
    first = call.done[call.requests[0]]
    sequences = [call.done[request].sequence for request in call.requests]
    return SampleResponse(sequences, first.prompt_logprobs, first.topk_prompt_logprobs)


def _stale(asked: int, live: int) -> StaleSamplerError:
    return StaleSamplerError(
        f"this sampling client is of policy version {asked}, and the sampler now holds version {live}: take a new client from "
        "save_weights_and_get_sampling_client, or make one that follows the live policy with follow=True"
    )
