"""The Engine protocol, and the thread that drives an engine. Callers submit requests from any
thread or event loop and get futures. The thread adds arrivals, decodes one step, delivers finished
sequences, and syncs weights between steps. Weight versions take turns. Left out: settling
(`_settle`) for environments that wait for something outside the event loop.
"""

import asyncio
import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from posttrain.backend.errors import EngineError
from posttrain.backend.futures import APIFuture, is_blocked, woken_together, work_for
from posttrain.backend.openmp import release_workers
from posttrain.backend.prompt_scores import PromptScores, ScoredPrompt
from posttrain.backend.types import SampledSequence, SampleResponse, SamplingParams
from posttrain.backend.weight_versions import Policy, Weights, WeightVersion, refusal, stale

T = TypeVar("T")

# Event-loop turns for callers between an answer and the next step; a caller needs three or four to
# submit its next request.
SETTLE_TURNS = 12
# Seconds to wait for a busy event loop (a slow grader inside `step`), and for a caller without one.
SETTLE_LOOP_SECONDS, SETTLE_THREAD_SECONDS = 2.0, 0.002
# The longest that an engine without requests waits for an event loop to submit all that it is about to.
GATHER_SECONDS = 0.05
# A version's turn while calls wait for another: sequences, and seconds where the clock may decide.
TURN_SEQUENCES, TURN_SECONDS = 64, 1.0


@dataclass(eq=False)
class SequenceRequest:
    """One sequence to sample. `topk_prompt`: None = no prompt logprobs, 0 = of the prompt's tokens,
    k = also of the k most likely. `topk_sample`: 0 = of the sampled tokens alone."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    topk_prompt: int | None = None
    # called in the engine's thread with the tokens so far; must not wait
    on_tokens: Callable[[list[int]], object] | None = None
    topk_sample: int = 0
    scores: PromptScores | None = None
    abandoned: bool = False  # no caller waits for it; set by any thread


@dataclass
class Sampled:
    """A finished sequence, and prompt logprobs if requested."""

    sequence: SampledSequence
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    scored: ScoredPrompt = field(default_factory=ScoredPrompt)
    failure: str | None = None  # why the engine gave up; the call fails


class Engine(Protocol):
    """Not thread-safe; one thread calls it."""

    def add(self, request: SequenceRequest) -> None: ...

    def step(self) -> list[tuple[SequenceRequest, Sampled]]:
        """Decodes for a while; returns the finished sequences."""
        ...

    def drop(self, requests: Sequence[SequenceRequest]) -> None:
        """Removes these requests and frees their places. Finished or unknown requests are ignored."""
        ...

    def load_weights(self, weights: Weights) -> None:
        """Replaces all weights and drops every cache that depends on them."""
        ...

    def sleep(self) -> None:
        """Frees memory until the next `add` or `load_weights`."""
        ...

    def close(self) -> None: ...


@dataclass(eq=False)
class _Call:
    """A client's call: one response to `requests`, all of one prompt. `client` keeps the engine
    and the version alive."""

    client: object
    requests: list[SequenceRequest]
    policy: Policy
    version: WeightVersion | None  # None = the policy's newest
    keep: bool  # whether to wait for `version`'s turn once it is no longer the newest
    answer: Callable[[SampleResponse], Any]
    future: APIFuture[Any]
    loop: asyncio.AbstractEventLoop | None
    done: dict[SequenceRequest, Sampled] = field(default_factory=dict)

    @property
    def needs(self) -> WeightVersion:
        assert self.policy.newest
        return self.version or self.policy.newest


@dataclass(eq=False)
class _Sync:
    policy: Policy
    version: WeightVersion
    future: "Future[None]"


@dataclass(eq=False)
class _Withdrawn:
    call: _Call


@dataclass(eq=False)
class _Sleep:
    future: "Future[None]"


_LookUp = None  # a message without content: check whether the engine is held
_Message = _Call | _Sync | _Sleep | _Withdrawn | None

_running: set["EngineThread"] = set()


@atexit.register
def _close_running_engines() -> None:
    for engine in list(_running):
        engine.close()


class EngineThread:
    """Drives an engine. `deterministic` enables settling. Clients `hold` it; it ends after the last
    release and the last call in flight, or at once by `close`.

    Calls of the loaded version go to the engine, up to the end of its turn if other versions are
    waited for. Once none is in flight, the version that was loaded longest ago is next. A sync does
    not wait for a turn, only for calls in flight that keep their version.
    """

    def __init__(self, make_engine: Callable[[], Engine], deterministic: bool):
        self._deterministic = deterministic
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._calls: dict[SequenceRequest, _Call] = {}  # in the engine
        self._waiting: dict[_Call, None] = {}
        self._syncs: list[_Sync] = []
        self._loaded: WeightVersion | None = None
        self._turns = self._sequences_in_turn = 0
        self._turn_began = 0.0
        self._unsettled: set[asyncio.AbstractEventLoop | None] = set()
        self._holders: set[object] = set()
        self._let_go = self._closing = False
        self._error: BaseException | None = None
        self._stopped = False
        # no message may enter the inbox after the thread has drained it for the last time
        self._put_lock = threading.Lock()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_engine, started), name="sampling-engine", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:  # an interrupted wait would leave the engine starting
            self._closing = True
            self._inbox.put(_LookUp)
            raise

    # --- called from anywhere --------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        """Sequences that are decoded or queued."""
        return len(self._calls) + sum(len(call.requests) for call in [*self._waiting])

    @property
    def has_stopped(self) -> bool:
        return self._stopped

    def submit(
        self,
        client: object,
        requests: list[SequenceRequest],
        policy: Policy,
        version: WeightVersion | None,
        keep: bool,
        answer: Callable[[SampleResponse], T],
    ) -> APIFuture[T]:
        """The future of `answer(response)`. Cancelling it frees the places of its requests."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        future: APIFuture[T] = APIFuture(self)
        call = _Call(client, requests, policy, version, keep, answer, future, loop)
        future.when_cancelled = partial(self._withdraw, call)
        self._put(call)
        return future

    def sync(self, policy: Policy, version: WeightVersion) -> None:
        """Blocks until the engine runs on `version`, the policy's newest. Calls in flight that keep
        an older version finish first; those that do not fail with StaleSamplerError."""
        sync = _Sync(policy, version, Future())
        self._put(sync)
        sync.future.result()

    def sleep(self) -> None:
        """Blocks until the engine's memory is free; it stays awake if there is something to sample."""
        sleep = _Sleep(Future())
        self._put(sleep)
        sleep.future.result()

    def hold(self, client: object) -> Callable[[], object]:
        """Keeps the engine until the returned function is called or `client` is garbage-collected."""
        holder = object()
        self._holders.add(holder)
        return weakref.finalize(client, self._release, holder)

    def close_if_unheld(self) -> None:
        if not self._holders:
            self.close()

    def close(self) -> None:
        """Ends the engine; calls in flight fail with EngineError."""
        self._closing = True
        self._inbox.put(_LookUp)
        for request in list(self._calls):
            request.abandoned = True  # an engine that decodes to the end within one step leaves it
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _release(self, holder: object) -> None:
        """Also called by the garbage collector, in any thread: takes no lock and never waits."""
        self._holders.discard(holder)
        self._let_go = True
        self._inbox.put(_LookUp)

    def _withdraw(self, call: _Call) -> None:
        # first: abandoned sequences must not be waited for
        self._inbox.put(_Withdrawn(call))
        for request in call.requests:
            request.abandoned = True

    def _put(self, item: _Message) -> None:
        with self._put_lock:
            if self._stopped:
                raise self._stop_reason()
            self._inbox.put(item)

    def _stop_reason(self) -> EngineError:
        reason = EngineError("the sampling engine has stopped" + (f": {self._error!r}" if self._error else ""))
        reason.__cause__ = self._error
        return reason

    # --- the thread ------------------------------------------------------------------------------

    def _run(self, make_engine: Callable[[], Engine], started: "Future[None]") -> None:
        work_for(self)
        try:
            self._engine = make_engine()
        except BaseException as error:
            self._error, self._stopped = error, True
            started.set_exception(error)
            return
        _running.add(self)
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
            for call in [*self._calls.values(), *self._waiting]:
                call.future.fail(self._stop_reason())
            self._calls.clear()
            self._waiting.clear()
            for sync in self._syncs:
                if not sync.future.done():
                    sync.future.set_exception(self._stop_reason())
            for item in self._drain():
                if isinstance(item, _Call):
                    item.future.fail(self._stop_reason())
                elif isinstance(item, _Sync | _Sleep):
                    item.future.set_exception(self._stop_reason())
            try:
                self._engine.close()
            finally:  # not before: the exit of the program waits for those that run
                _running.discard(self)

    def _is_wanted(self) -> bool:
        return not self._closing and (bool(self._holders or self._calls or self._waiting) or not self._let_go)

    def _take_inbox(self) -> bool:
        """Adds arrivals; waits if there is nothing to decode. False means close."""
        if not (self._calls or self._waiting or self._syncs) and self._is_wanted():
            release_workers()
            self._accept(first := self._inbox.get())
            if isinstance(first, _Call) and not self._deterministic and first.loop and first.loop.is_running():
                # rollouts that begin together share a step, which reads all their prompts
                self._wait_for_loop(first.loop, 0, GATHER_SECONDS)
        while self._is_wanted():
            for item in self._drain():
                self._accept(item)
            if not self._unsettled:
                break
            self._settle()
        if wanted := self._is_wanted():
            self._take_turns()
        return wanted

    def _drain(self) -> Iterator[_Message]:
        while not self._inbox.empty():
            yield self._inbox.get()

    def _accept(self, item: _Message) -> None:
        if isinstance(item, _Sync):
            self._syncs.append(item)
            self._load_synced()
        elif isinstance(item, _Sleep):
            if not (self._calls or self._waiting or self._syncs):
                self._engine.sleep()
            item.future.set_result(None)
        elif isinstance(item, _Withdrawn):
            self._remove(item.call)
        elif isinstance(item, _Call) and not item.future.done():  # else it was cancelled in the inbox
            if refused := refusal(item.policy, item.version, item.keep, self._loaded):
                item.future.fail(refused)
            else:
                self._note_unsettled(item)
                self._waiting[item] = None

    def _take_turns(self) -> None:
        """Adds waiting calls of the loaded version. Once its turn is over and nothing is in flight,
        loads the version that was loaded longest ago."""
        self._load_synced()
        while self._waiting and not self._syncs:
            calls: dict[WeightVersion, list[_Call]] = {}
            for call in [*self._waiting]:
                if refused := refusal(call.policy, call.version, call.keep, self._loaded):
                    del self._waiting[call]
                    call.future.fail(refused)
                else:
                    calls.setdefault(call.needs, []).append(call)
            others = [version for version in calls if version is not self._loaded]
            for call in calls.get(self._loaded, []) if self._loaded else []:
                if others and self._turn_is_over():
                    break
                del self._waiting[call]
                self._sequences_in_turn += len(call.requests)
                self._add(call)
            if self._calls or not others:
                return
            self._load(min(others, key=lambda version: version.last_turn))

    def _turn_is_over(self) -> bool:
        late = not self._deterministic and time.monotonic() - self._turn_began > TURN_SECONDS
        return late or self._sequences_in_turn >= TURN_SEQUENCES

    def _add(self, call: _Call) -> None:
        try:
            for request in call.requests:
                self._engine.add(request)
        except Exception as error:  # refuses this request only
            self._engine.drop(call.requests)
            refused = EngineError(f"the engine refused the request: {error}")
            refused.__cause__ = error
            call.future.fail(refused)
            return
        self._calls |= dict.fromkeys(call.requests, call)

    def _remove(self, call: _Call) -> None:
        """Removes a call's unfinished requests."""
        self._waiting.pop(call, None)
        unfinished = [request for request in call.requests if self._calls.pop(request, None)]
        if unfinished:
            self._engine.drop(unfinished)

    def _load_synced(self) -> None:
        """Loads what was synced, unless a call in flight keeps the loaded version. Followers in
        flight continue under the new weights."""
        while self._syncs:
            sync = self._syncs[0]
            for call in [*dict.fromkeys(self._calls.values()), *self._waiting]:
                if call.policy is sync.policy and call.version is not None and not call.keep:
                    self._remove(call)
                    call.future.fail(stale(call.version, sync.version))
            if any(call.policy is not sync.policy or call.version is not None for call in self._calls.values()):
                return
            try:
                self._load(sync.version)
            except BaseException as error:
                sync.future.set_exception(error)
                raise
            sync.policy.publish(sync.version)
            del self._syncs[0]
            sync.future.set_result(None)

    def _load(self, version: WeightVersion) -> None:
        if not version.load(self._engine.load_weights):
            return  # its calls will be refused
        self._loaded = version
        self._turns += 1
        version.last_turn = self._turns
        self._sequences_in_turn, self._turn_began = 0, time.monotonic()

    @woken_together()
    def _deliver(self, finished: list[tuple[SequenceRequest, Sampled]]) -> None:
        for request, sampled in finished:
            call = self._calls.pop(request)
            call.done[request] = sampled
            if len(call.done) == len(call.requests):
                self._note_unsettled(call)
                if failures := [done.failure for done in call.done.values() if done.failure]:
                    call.future.fail(EngineError(f"the engine gave a sequence up: {failures[0]}"))
                else:
                    call.future.succeed(call.answer(_response(call)))

    def _note_unsettled(self, call: _Call) -> None:
        """The next step waits for its caller, unless the clock may decide."""
        if self._deterministic:
            self._unsettled.add(call.loop)

    def _settle(self) -> None:
        """Returns when every caller answered in the last step has had time to submit again.

        The last digits of logprobs depend on the sequences decoded together. With settling, these
        depend on the program and not on the clock: a run on a CPU is reproducible bit for bit.
        """
        waiting, self._unsettled = self._unsettled, set()
        for loop in waiting:
            if loop is None or not loop.is_running():
                self._wait_for_quiet()
            else:
                self._wait_for_loop(loop, SETTLE_TURNS, SETTLE_LOOP_SECONDS)

    def _wait_for_loop(self, loop: asyncio.AbstractEventLoop, turns: int, seconds: float) -> None:
        """Until it has done what it is at, and `turns` more turns."""
        reacted, deadline = threading.Event(), time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_after_turns, loop, turns, reacted)
            while not reacted.wait(SETTLE_THREAD_SECONDS) and time.monotonic() < deadline:
                if self._closing or is_blocked(loop):  # it submits nothing before this engine answers, or ends
                    break

    def _wait_for_quiet(self) -> None:
        with contextlib.suppress(queue.Empty):
            while self._is_wanted():
                self._accept(self._inbox.get(timeout=SETTLE_THREAD_SECONDS))


def _after_turns(loop: asyncio.AbstractEventLoop, turns: int, reacted: threading.Event) -> None:
    if turns:
        loop.call_soon(_after_turns, loop, turns - 1, reacted)
    else:
        reacted.set()


def _response(call: _Call) -> SampleResponse:
    first = call.done[call.requests[0]]
    sequences = [call.done[request].sequence for request in call.requests]
    return SampleResponse(
        sequences,
        first.prompt_logprobs,
        first.topk_prompt_logprobs,
        first.scored.target_logprobs,
        first.scored.alt_tokens,
    )
