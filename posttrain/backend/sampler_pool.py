"""Several sampling engines in processes of their own, with the interface of EngineThread. Requests
of a dead replica go to the others with their seeds; its replacement serves once it has weights.
Weights are published once as files, which replicas load, also late, and which snapshots keep.
"""

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from posttrain.backend.cluster import ProcessLost
from posttrain.backend.engine import SequenceRequest
from posttrain.backend.errors import EngineError
from posttrain.backend.futures import SAY_AFTER_SECONDS, APIFuture, wait_saying
from posttrain.backend.routing import Router, SamplingGroup
from posttrain.backend.spans import Span, Spans
from posttrain.backend.types import SampleResponse
from posttrain.backend.weight_files import FileWeights, write_shard
from posttrain.backend.weight_versions import Policy, Weights, WeightVersion, refusal

T = TypeVar("T")
WATCH_SECONDS = 5.0  # between questions for progress
MOST_TRIES = 3  # replicas that may die of one request


class Replica(Protocol):
    """An engine elsewhere. Futures fail with ProcessLost when it is dead."""

    def opened(self) -> "Future[None]": ...

    def sample(
        self, requests: list[SequenceRequest], number: int | None, weights: FileWeights | None, keep: bool
    ) -> "Future[SampleResponse]":
        """Of version `number`, None = its newest. `weights` of a version that may not be the replica's newest."""
        ...

    def withdraw(self, answer: "Future[SampleResponse]") -> None: ...

    def sync(self, number: int, weights: FileWeights) -> "Future[float]":
        """Done when the engine runs on these weights; the seconds in which it decoded nothing."""
        ...

    def progress(self) -> "Future[int]":
        """Counts decoded steps and loads."""
        ...

    def kill(self) -> None: ...


@dataclass(eq=False)
class _Call:
    client: object  # keeps the pool and the version alive
    requests: list[SequenceRequest]
    group: SamplingGroup
    policy: Policy
    version: WeightVersion | None
    keep: bool
    answer: Callable[[SampleResponse], Any]
    future: APIFuture[Any]
    sent: "Future[SampleResponse] | None" = None
    place: "_Place | None" = None
    tries: int = 0


@dataclass(eq=False)
class _Place:
    """A place of the pool: a replica, or none while a replacement starts."""

    index: int
    replica: Replica | None = None
    serving: bool = False
    calls: set[_Call] = field(default_factory=set)
    progress: int = 0
    moved: float = 0.0  # when it last decoded, or had nothing to decode
    said: bool = False  # that it has decoded nothing since
    asked: "Future[int] | None" = None
    span: Span | None = None  # since the last answer, while it has calls

    def heard(self, now: float) -> BaseException | None:
        """Takes in what the replica answered. Its failure, if it gave one."""
        if not self.calls:
            self.moved = now
        if self.asked is None or not self.asked.done():
            return None
        if (failure := self.asked.exception()) is None:
            if self.asked.result() != self.progress:
                self.moved = now
            self.progress = self.asked.result()
        return failure


class SamplerPool:
    """`start(index)` starts a replica. Published weights lie in `folder`. After `restarts`
    replacements the dead are no longer replaced; EngineError when the last is dead. In `spans` the
    replicas are numbered from `first`."""

    def __init__(
        self,
        start: Callable[[int], Replica],
        num_replicas: int,
        folder: Path,
        restarts: int,
        call_seconds: float,
        deterministic: bool,
        spans: Spans | None = None,
        first: int = 0,
    ):
        self._spans, self._first = spans or Spans(), first
        self._start, self._folder, self._restarts, self._call_seconds = start, folder, restarts, call_seconds
        self._router = Router(num_replicas, deterministic)
        self._places = [_Place(index) for index in range(num_replicas)]
        self._lock = threading.RLock()
        self._syncing = threading.RLock()  # taken before _lock
        self._weights: FileWeights | None = None  # of the newest version, for replicas that join late
        self._number = -1
        self._published = itertools.count()
        self._calls: set[_Call] = set()
        self._waiting: list[_Call] = []  # for a replacement
        self._holders: set[object] = set()
        self._let_go, self._error, self._stopped = False, None, False
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.deaths = self._starting = 0  # `_starting`: replacements that do not serve yet
        try:
            for place in self._places:
                place.replica = start(place.index)
            for place in self._places:
                assert place.replica
                _within(place.replica.opened(), call_seconds, f"sampler replica {place.index}")
        except BaseException as error:
            self._kill_all()
            if isinstance(error, ProcessLost):
                raise EngineError(f"a sampler replica died while it started: {error}") from error
            if isinstance(error, TimeoutError):
                raise EngineError(f"{error} (backend.call_seconds): it has not started") from error
            raise
        self._thread = threading.Thread(target=self._watch, name="sampler-pool", daemon=True)
        self._thread.start()

    # --- as EngineThread -------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        return sum(self._router.open_S) + sum(len(call.requests) for call in [*self._waiting])

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
        """As EngineThread's; `on_tokens` is called once, with all tokens."""
        future: APIFuture[T] = APIFuture(self)
        with self._lock:
            if self._stopped:
                raise self._stop_reason()
            group = self._router.group_of(requests[0].prompt)
            call = _Call(client, requests, group, policy, version, keep, answer, future)
            future.when_cancelled = partial(self._withdraw, call)
            self._calls.add(call)
            future.add_done_callback(lambda _: self._calls.discard(call))
            self._send(call)
        return future

    def sync(self, policy: Policy, version: WeightVersion) -> None:
        """Publishes the version and blocks until every serving replica runs on it. A replica that
        dies meanwhile is replaced; EngineError if none is left."""
        with self._syncing:
            if self._stopped:
                raise self._stop_reason()
            published: list[FileWeights] = []
            with self._spans.span("publish", "sync"):
                version.load(lambda weights: published.append(self._publish(version.number, weights)))
            if not published:
                raise EngineError(f"the weights of version {version.number} are gone")
            (files,) = published
            version.published_in(files)
            self._load(policy, version, files)

    def _load(self, policy: Policy, version: WeightVersion, files: FileWeights) -> None:
        """Every serving replica runs on the files."""
        with self._spans.span("load", "sync"):
            with self._lock:
                # replacements load by themselves, when they have started
                loading = [place for place in self._places if place.serving or self._number < 0]
                sent = [(place, r, self._sync(place, r, version, files)) for place in loading if (r := place.replica)]
            for place, replica_, done in sent:
                try:
                    _within(done, self._call_seconds, f"the weights in sampler replica {place.index}")
                except ProcessLost as error:
                    self._lose(place, replica_, error)
                except TimeoutError:
                    self._lose(place, replica_, ProcessLost(f"no weights loaded in {self._call_seconds:g} seconds"))
                else:
                    with self._lock:
                        place.serving = place.replica is replica_
            with self._lock:
                self._weights, self._number = files, version.number
                if self._stopped:
                    raise self._stop_reason()
                policy.publish(version)
                self._send_waiting()

    def hold(self, client: object) -> Callable[[], object]:
        """Keeps the pool until the returned function is called or `client` is garbage-collected."""
        holder = object()
        self._holders.add(holder)
        return weakref.finalize(client, self._release, holder)

    def close_if_unheld(self) -> None:
        if not self._holders:
            self.close()

    def close(self) -> None:
        """Ends the replicas; calls in flight fail with EngineError."""
        self._stop(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def num_replicas(self) -> int:
        return len(self._places)

    def _name(self, place: _Place) -> str:
        return f"replica {self._first + place.index}"

    # --- calls -----------------------------------------------------------------------------------

    def _send(self, call: _Call) -> None:
        """With the lock held."""
        if call.future.done():
            return
        if self._stopped:
            call.future.fail(self._stop_reason())
            return
        if refused := refusal(call.policy, call.version, call.keep, call.policy.newest):
            call.future.fail(refused)
            return
        if not (serving := [place.index for place in self._places if place.serving]):
            self._waiting.append(call)
            return
        place = self._places[self._router.open(call.group, len(call.requests), serving)]
        assert place.replica
        if not place.calls:
            place.moved, place.span = time.monotonic(), self._spans.begin("sampling", self._name(place))
        call.place, call.tries = place, call.tries + 1
        place.calls.add(call)
        version, weights = call.version, None
        if version is not None and version is not call.policy.newest:
            kept: list[Any] = []
            version.load(kept.append)
            weights = kept[0] if kept else None
        elif version is not None and call.keep:  # a sync that is under way may have replaced it in the replica
            weights = version.files
        requests = [replace(request, on_tokens=None) for request in call.requests]
        call.sent = place.replica.sample(requests, version.number if version else None, weights, call.keep)
        call.sent.add_done_callback(partial(self._answered, call, place, place.replica))

    def _send_waiting(self) -> None:
        """With the lock held."""
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            self._send(call)

    def _answered(self, call: _Call, place: _Place, replica_: Replica, done: "Future[SampleResponse]") -> None:
        """In a thread of Ray, which must not wait."""
        with self._lock:
            self._router.close(call.group, len(call.requests), place.index)
            place.calls.discard(call)
            place.moved = time.monotonic()
            if place.span:
                tokens = 0 if done.cancelled() or done.exception() else _num_tokens(done.result())
                self._spans.end(place.span, tokens)
                place.span = self._spans.begin("sampling", self._name(place)) if place.calls else None
        if done.cancelled() or call.future.cancelled():
            return
        if (error := done.exception()) is None:
            self._succeed(call, done.result())
        elif not isinstance(error, ProcessLost):
            call.future.fail(error)
        else:
            self._todo.put(partial(self._again, call, place, replica_, error))

    def _succeed(self, call: _Call, response: SampleResponse) -> None:
        try:
            for request, sequence in zip(call.requests, response.sequences, strict=True):
                if request.on_tokens and sequence.tokens:
                    request.on_tokens(list(sequence.tokens))
            result = call.answer(response)
        except BaseException as error:
            call.future.fail(error)
        else:
            call.future.succeed(result)

    def _again(self, call: _Call, place: _Place, replica_: Replica, error: ProcessLost) -> None:
        """Sends the call of a dead replica to another, unless replicas die of it."""
        self._lose(place, replica_, error)
        with self._lock:
            if call.tries >= MOST_TRIES:
                call.future.fail(EngineError(f"{MOST_TRIES} sampler replicas died with this request: {error}"))
            else:
                self._send(call)

    def _withdraw(self, call: _Call) -> None:
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            place, sent = call.place, call.sent
            replica_ = place.replica if place else None
        if replica_ and sent and not sent.done():
            replica_.withdraw(sent)

    # --- weights ---------------------------------------------------------------------------------

    def _publish(self, number: int, weights: Weights) -> FileWeights:
        """Files of the weights; ranks have written theirs."""
        if isinstance(weights, FileWeights):
            return weights
        folder = self._folder / f"version-{number}-{next(self._published)}-{id(self):x}"
        files = FileWeights(folder)
        write_shard(folder, 0, 1, weights)
        return files

    def _sync(self, place: _Place, replica_: Replica, version: WeightVersion, files: FileWeights) -> "Future[float]":
        span, done = self._spans.begin("load", self._name(place)), replica_.sync(version.number, files)

        def end(done: "Future[float]") -> None:
            failed = done.cancelled() or done.exception()
            self._spans.end(span, seconds=0.0 if failed else done.result())

        done.add_done_callback(end)
        return done

    # --- replicas --------------------------------------------------------------------------------

    def _lose(self, place: _Place, replica_: Replica, error: Exception) -> None:
        """Takes a dead replica out, once, and starts its replacement."""
        with self._lock:
            if place.replica is not replica_ or self._stopped:
                return
            place.replica, place.serving, place.asked = None, False, None
            self.deaths += 1
            replaced = self._restarts > 0
            self._restarts -= replaced
            left = sum(other.serving for other in self._places)
            print(
                f"WARNING sampler replica {place.index} died: {error}. {left} serve"
                + (f"; a replacement starts ({self._restarts} more allowed)" if replaced else "; it is not replaced"),
                flush=True,
            )
            self._starting += replaced
        replica_.kill()
        if replaced:
            threading.Thread(target=self._replace, args=(place,), name="sampler-replacement", daemon=True).start()
        else:
            self._stop_if_none_is_left(error)

    def _stop_if_none_is_left(self, error: Exception) -> None:
        with self._lock:
            left = self._starting or any(place.replica for place in self._places)
        if not left:
            self._stop(error)

    def _replace(self, place: _Place) -> None:
        """Until a replacement serves, or no more are allowed."""
        failure, again = EngineError("no sampler replica is left"), True
        while again:
            replica_: Replica | None = None
            try:
                replica_ = self._start(place.index)
                _within(replica_.opened(), self._call_seconds, f"the start of sampler replica {place.index}")
                self._join(place, replica_)
                again = False
            except Exception as error:
                if replica_ is not None:
                    replica_.kill()
                failure.__cause__ = error
                with self._lock:
                    again = self._restarts > 0 and not self._stopped
                    self._restarts -= again
                if not self._stopped:  # else it was ended with the others
                    print(
                        f"WARNING the replacement of sampler replica {place.index} failed: {error}"
                        + (f"; another starts ({self._restarts} more allowed)" if again else ""),
                        flush=True,
                    )
        with self._lock:
            self._starting -= 1
        self._stop_if_none_is_left(failure)

    def _join(self, place: _Place, replica_: Replica) -> None:
        """Loads the newest weights into a replacement, which then serves."""
        with self._syncing:
            if self._weights is not None:
                loaded = replica_.sync(self._number, self._weights)
                _within(loaded, self._call_seconds, f"the weights in sampler replica {place.index}")
            with self._lock:
                if self._stopped:
                    replica_.kill()
                    return
                place.replica, place.serving, place.moved = replica_, self._weights is not None, time.monotonic()
                self._send_waiting()

    def _watch(self) -> None:
        """Carries out what others leave to this thread; kills replicas that decode nothing."""
        while not self._stopped:
            try:
                if todo := self._todo.get(timeout=min(WATCH_SECONDS, self._call_seconds / 4)):
                    todo()
                    continue
            except queue.Empty:
                pass
            if self._let_go and not self._holders and not self.num_in_flight:
                self._stop(None)
            for place in self._places:
                self._look_at(place)

    def _look_at(self, place: _Place) -> None:
        now = time.monotonic()
        with self._lock:
            replica_ = place.replica
            if replica_ is None or self._stopped:
                return
            failure = place.heard(now)
            still = now - place.moved
            if not isinstance(failure, ProcessLost) and still > self._call_seconds:
                failure = ProcessLost(f"it decoded nothing in {self._call_seconds:g} seconds")
            elif still > SAY_AFTER_SECONDS and not place.said:
                print(
                    f"WARNING sampler replica {place.index} has decoded nothing for {still:.0f} s: it is ended after "
                    f"{self._call_seconds:g} s (backend.call_seconds)",
                    flush=True,
                )
            place.said = still > SAY_AFTER_SECONDS
            if place.asked is None or place.asked.done():
                place.asked = replica_.progress()
        if isinstance(failure, ProcessLost):
            self._lose(place, replica_, failure)  # its calls fail, and are sent again

    # --- the end ---------------------------------------------------------------------------------

    def _release(self, holder: object) -> None:
        """Also called by the garbage collector: takes no lock and never waits."""
        self._holders.discard(holder)
        self._let_go = True
        self._todo.put(None)

    def _stop_reason(self) -> EngineError:
        reason = EngineError("the sampler replicas have stopped" + (f": {self._error}" if self._error else ""))
        reason.__cause__ = self._error
        return reason

    def _stop(self, error: BaseException | None) -> None:
        with self._lock:
            if self._stopped:
                return
            self._stopped, self._error = True, error
            calls, self._waiting = [*self._calls], []
        self._kill_all()
        for call in calls:
            call.future.fail(self._stop_reason())
        self._weights = None
        self._todo.put(None)

    def _kill_all(self) -> None:
        for place in self._places:
            if (replica_ := place.replica) is not None:
                place.replica, place.serving = None, False
                replica_.kill()


def _num_tokens(response: SampleResponse) -> int:
    return sum(len(sequence.tokens) for sequence in response.sequences)


def _within(future: "Future[T]", seconds: float, what: str) -> T:
    """As `wait_saying`."""
    wait_saying([future], seconds, what)
    return future.result()
