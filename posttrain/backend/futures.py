"""Futures in Tinker's shape, a wait that says what it waits for, and a worker thread that executes calls in order."""

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Generator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from posttrain.backend.errors import ClosedError
from posttrain.backend.openmp import release_workers

C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")

SAY_AFTER_SECONDS = 60.0  # a wait says what it waits for

_lock = threading.Lock()  # of the counters below; held for a line at a time
# .owner: stands for the InOrder or the engine that runs in this thread
_working_for = threading.local()
# .waiters: of each event loop, those that this thread wakes together
_waking = threading.local()
# event loops whose thread waits in `result` or `exception`, and for which future
_blocked: dict[asyncio.AbstractEventLoop, Future[Any]] = {}


def wait_saying(futures: Collection["Future[Any]"], seconds: float, what: str) -> None:
    """Until all are done, or one has failed. TimeoutError after `seconds`; after a minute it says what it waits
    for."""
    began = time.monotonic()
    while True:
        left = seconds - (time.monotonic() - began)
        done, pending = wait(futures, min(max(left, 0.0), SAY_AFTER_SECONDS), FIRST_EXCEPTION)
        if not pending or any(future.exception() for future in done):
            return
        if left <= SAY_AFTER_SECONDS:
            raise TimeoutError(f"{what}: no answer in {seconds:g} seconds")
        print(f"still waiting for {what} after {time.monotonic() - began:.0f} s", flush=True)


class APIFuture(Future[T]):
    """The outcome of a submitted call: a `concurrent.futures.Future` that any event loop can also
    await.

    Failures are raised in the caller. `cancel`, or cancelling a task that awaits, withdraws a call
    that has not begun, unless another waiter is left; a call that has begun completes. A
    `result(timeout)` that times out withdraws nothing.
    """

    def __init__(self, owner: object = None):
        super().__init__()
        self._owner = owner  # its thread sets the outcome
        # called when `cancel` succeeds, in the canceller's thread
        self.when_cancelled: Callable[[], object] | None = None
        self._claimed = False
        self._num_waiting = 0

    # --- for the caller --------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> T:
        with self._waiting(), _blocking(self):
            return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        with self._waiting(), _blocking(self):
            return super().exception(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """As `await`; TimeoutError after `timeout` seconds, which cancels this waiter."""
        async with asyncio.timeout(timeout):
            return await self._wait()

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def coroutine(self) -> T:
        """For functions that take only coroutines, such as `asyncio.create_task`."""
        return await self._wait()

    def future(self) -> Self:
        """This future: it is a `concurrent.futures.Future` itself."""
        return self

    def cancel(self) -> bool:
        withdraw = self.when_cancelled
        cancelled = super().cancel()
        if cancelled:
            self.start()  # tells concurrent.futures.wait and as_completed
            if withdraw is not None:
                withdraw()
        return cancelled

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """An exception of `fn` is logged; it stops neither other callbacks nor the worker's thread."""
        super().add_done_callback(partial(_call_back, fn))

    async def _wait(self) -> T:
        if not self.done():
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            self.add_done_callback(partial(_wake, loop, waiter))
            try:
                with self._waiting():
                    await waiter
            except asyncio.CancelledError:
                if not self._num_waiting:
                    self.cancel()
                raise
        if self.cancelled():
            raise asyncio.CancelledError
        return super().result()

    @contextlib.contextmanager
    def _waiting(self) -> Generator[None, None, None]:
        if not self.done() and self._owner is not None and getattr(_working_for, "owner", None) is self._owner:
            raise RuntimeError(
                "this call waits for the thread that makes it: do not wait for a client inside its own callback or loss"
            )
        with _lock:
            self._num_waiting += 1
        try:
            yield
        finally:
            with _lock:
                self._num_waiting -= 1

    # --- for the worker --------------------------------------------------------------------------

    def start(self) -> bool:
        """True if the call is still wanted; then it can no longer be cancelled. True at most once."""
        with _lock:
            first, self._claimed = not self._claimed, True
        self.when_cancelled = None
        return first and self.set_running_or_notify_cancel()

    def succeed(self, result: T) -> None:
        if self.start():
            self.set_result(result)

    def fail(self, error: BaseException) -> None:
        if self.start():
            self.set_exception(error)


@contextlib.contextmanager
def _blocking(future: Future[Any]) -> Generator[None, None, None]:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        yield
        return
    _blocked[loop] = future
    try:
        yield
    finally:
        del _blocked[loop]


def is_blocked(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop's thread waits for an APIFuture, so that nothing in the loop can go on."""
    future = _blocked.get(loop)
    return future is not None and not future.done()


@contextlib.contextmanager
def woken_together() -> Generator[None, None, None]:
    """Tasks that await a future whose outcome this thread sets inside are woken at the end, in the same order: each
    waking of a loop is a system call, at which Python may go on with the loop's thread."""
    waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    _waking.waiters = waiters
    try:
        yield
    finally:
        _waking.waiters = None
        for loop, of_loop in waiters.items():
            _wake_all(loop, of_loop)


def _wake(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None], _: Future[Any]) -> None:
    if (waiters := getattr(_waking, "waiters", None)) is None:
        _wake_all(loop, [waiter])
    else:
        waiters.setdefault(loop, []).append(waiter)


def _wake_all(loop: asyncio.AbstractEventLoop, waiters: list[asyncio.Future[None]]) -> None:
    def wake() -> None:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    with contextlib.suppress(RuntimeError):  # the loop is closed, without waiters
        loop.call_soon_threadsafe(wake)


def _call_back(fn: Callable[[Future[T]], object], future: Future[T]) -> None:
    try:
        fn(future)
    except Exception:
        raise  # Future logs these
    except BaseException as error:
        raise RuntimeError(f"a callback of a future raised {error!r}") from error


def work_for(owner: object) -> None:
    """Marks this thread as the one that sets the outcome of `owner`'s futures: it must not wait."""
    _working_for.owner = owner


class Ready:
    """A client that is its own future, ready at once: the SDK's methods return futures of clients."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()


def accepted(method: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """The `_async` twin of a method that returns at once. Awaiting it means the call is queued."""

    @wraps(method)
    async def twin(self: C, *args: P.args, **kwargs: P.kwargs) -> T:
        return method(self, *args, **kwargs)

    return twin


def answered(method: Callable[Concatenate[C, P], APIFuture[T]]) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """The `_async` twin of a method that returns a future: awaits the answer."""

    @wraps(method)
    async def twin(self: C, *args: P.args, **kwargs: P.kwargs) -> T:
        return await method(self, *args, **kwargs)

    return twin


def in_thread(method: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """The `_async` twin of a slow method: runs it in a thread."""

    @wraps(method)
    async def twin(self: C, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(method, self, *args, **kwargs)

    return twin


class InOrder:
    """One thread; calls run one at a time in submission order, from any thread."""

    def __init__(self, name: str):
        self._name, self._closed = name, False
        self._owner = object()  # not self: the thread would keep the executor, and so itself
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(
        self, fn: Callable[..., T], *args: Any, if_cancelled: Callable[[], object] | None = None, **kwargs: Any
    ) -> APIFuture[T]:
        """`if_cancelled` replaces a call cancelled before its turn. ClosedError after `close`."""
        future: APIFuture[T] = APIFuture(self._owner)
        call = partial(fn, *args, **kwargs)
        try:
            self._executor.submit(self._run, future, call, if_cancelled)
        except RuntimeError as error:
            raise self._closed_error() from error
        return future

    def _run(self, future: APIFuture[T], call: Callable[[], T], if_cancelled: Callable[[], object] | None) -> None:
        work_for(self._owner)
        try:
            if self._closed:
                future.fail(self._closed_error())
            elif future.start():
                future.set_result(call())
            elif if_cancelled is not None:
                if_cancelled()
        except BaseException as error:
            future.set_exception(_as_outcome(error))
        finally:
            release_workers()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the {self._name} thread was closed before this call")

    def close(self) -> None:
        """Waits for the running call; later calls fail with ClosedError. A call itself may call it."""
        self._closed = True
        self._executor.shutdown(wait=getattr(_working_for, "owner", None) is not self._owner)


def _as_outcome(error: BaseException) -> BaseException:
    """Wraps errors with a meaning for the waiter: a CancelledError would read as the waiter's
    cancellation, and an asyncio future takes no StopIteration."""
    if not isinstance(error, asyncio.CancelledError | concurrent.futures.CancelledError | StopIteration):
        return error
    wrapped = RuntimeError(f"the call was ended by {error!r} from inside it")
    wrapped.__cause__ = error
    return wrapped
