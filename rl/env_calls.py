"""Calls of an environment's code within a deadline: failures become a RolloutError of the member.
The coroutine is driven in the task of its rollout, so that it can be abandoned if it ignores
cancellation. Left out, as a process cannot defend itself: environments that block or stop the event
loop, cancel all its tasks, or raise SystemExit or KeyboardInterrupt in a task they started.
"""

import asyncio
import ctypes
import signal
import time
import traceback
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, TypeVar

from posttrain.tracking.timeline import span
from rl.step_checks import plain_text
from rl.types import EnvError, EnvTimeout, MalformedStep, RolloutError

T = TypeVar("T")

CLEANUP_SECONDS = 5.0  # for the clean-up of a cancelled coroutine; then it is abandoned
MESSAGE_CHARS = 2000  # of an environment's exception
BLOCKED_SECONDS, BLOCKED_TOTAL = 0.25, 10.0  # of a stretch without `await` that counts, and of all that are said

_blocked: dict[str, float] = {}  # seconds by method


class SamplingClock:
    """Seconds in which a seat of a game was sampled: not charged to an environment that waits for
    another seat. Entered, as a context manager, for each sampled turn."""

    def __init__(self) -> None:
        self._sampling, self._since, self._total = 0, 0.0, 0.0

    def __enter__(self) -> None:
        if not self._sampling:
            self._since = time.monotonic()
        self._sampling += 1

    def __exit__(self, *exc: object) -> None:
        self._sampling -= 1
        if not self._sampling:
            self._total += time.monotonic() - self._since

    def total(self) -> float:
        return self._total + (time.monotonic() - self._since if self._sampling else 0.0)


async def call(
    check: Callable[[Any], T],
    seconds: float,
    clock: SamplingClock,
    owner: object,
    method: str,
    *arguments: object,
    **keywords: object,
) -> T:
    """`check(await owner.method(*arguments, **keywords))`. Raises RolloutError, unless the run
    itself is cancelled or interrupted."""
    watch, call_name = _Watch(seconds, clock), f"{_name(owner)}.{_written(owner, method)}"
    try:
        with span("env"):
            result = _checked(
                check, owner, method, await _driven(partial(_started, owner, method, arguments, keywords), watch)
            )
        if not watch.disturbed:
            return result
        failure = None
    except BaseException as error:
        if watch.ends_the_task(error) or _is_ctrl_c(error):
            raise
        failure = error
    finally:
        _say_if_blocking(call_name, watch.blocked)
    if watch.expired:
        also = ", and did not let itself be cancelled" if watch.left else ""
        raise EnvTimeout(f"{call_name} took more than {seconds:g} s{also}") from failure
    if watch.cancelled_itself:
        await _take_cancellation()
        raise EnvError(f"{call_name} cancelled the task of its rollout") from failure
    assert failure is not None
    raise _rollout_error(call_name, failure)


def _name(owner: object) -> str:
    """The class that was written for the task: of messages (message_env.py) the one inside."""
    return type(getattr(owner, "message_env", owner)).__name__


def _written(owner: object, method: str) -> str:
    """The method of that class: `initial_observation` is the adapter's own."""
    return "initial_messages" if hasattr(owner, "message_env") and method == "initial_observation" else method


def _checked(check: Callable[[Any], T], owner: object, method: str, result: object) -> T:
    """`check(result)`, whose error says which class and method returned it."""
    try:
        return check(result)
    except MalformedStep as error:
        name, message = _name(owner), str(error)
        if message.startswith(f"{name}."):
            raise
        raise MalformedStep(f"{name}.{message if message.startswith(method) else f'{method}: {message}'}") from error


def _say_if_blocking(call_name: str, seconds: float) -> None:
    """A line, once, where an environment's code that does not `await` keeps all other rollouts waiting."""
    before = _blocked.get(call_name, 0.0)
    _blocked[call_name] = before + seconds
    if before < BLOCKED_TOTAL <= before + seconds:
        print(
            f"WARNING {call_name} has blocked the event loop for {before + seconds:.0f} s in all: every other rollout "
            "waits then. Run what is slow in a thread (await asyncio.to_thread(...)) or a process",
            flush=True,
        )


def call_now(check: Callable[[Any], T], owner: object, method: str) -> T:
    """`check(owner.method())` of a method that is no coroutine. Raises only RolloutError."""
    try:
        return check(getattr(owner, method)())
    except BaseException as error:
        if _is_ctrl_c(error):
            raise
        failure = error
    raise _rollout_error(f"{type(owner).__name__}.{method}", failure)


def _rollout_error(call_name: str, failure: BaseException) -> RolloutError:
    """A RolloutError stays; another exception becomes an EnvError with a plain-text message."""
    try:
        message = str(failure)
    except BaseException as error:  # its own __str__ raises
        message = f"(its message raised {type(error).__name__})"
    if isinstance(failure, RolloutError) and message == plain_text(message):
        return failure
    error = EnvError(f"{call_name} raised {type(failure).__name__}: {plain_text(message[:MESSAGE_CHARS])}")
    error.__cause__ = failure
    return error


def _started(
    owner: object, method: str, arguments: tuple[object, ...], keywords: dict[str, object]
) -> Coroutine[Any, Any, Any]:
    result = getattr(owner, method)(*arguments, **keywords)
    if type(result) is types.CoroutineType:
        return result
    if isinstance(result, Awaitable):
        return _awaited(result)
    raise MalformedStep(f"{type(owner).__name__}.{method} returned {result!r:.100} without being an `async def`")


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


@types.coroutine
def _driven(start: Callable[[], Coroutine[Any, Any, Any]], watch: "_Watch") -> Generator[Any, Any, Any]:
    """`await start()`. A coroutine still waiting CLEANUP_SECONDS after its deadline is abandoned."""
    try:
        coroutine = watch.run(start)
        proceed = partial(coroutine.send, None)
        while True:
            try:
                waits_for = watch.run(proceed)
            except StopIteration as end:
                return end.value
            watch.begin_waiting()
            try:
                yield waits_for
                proceed = partial(coroutine.send, None)
            except GeneratorExit:  # the rollout's coroutine is closed
                watch.closed = True
                _leave(coroutine)
                raise
            except BaseException as error:
                if watch.left:
                    _leave(coroutine)
                    raise
                proceed = partial(coroutine.throw, error)
    finally:
        watch.end_waiting()


def _leave(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Asks the coroutine to end. If it goes on, it must never be collected: that would run it
    again, in any thread, without an event loop, where `while True: try ... except: continue` never
    ends."""
    try:
        coroutine.close()
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(coroutine))


@types.coroutine
def _take_cancellation() -> Generator[None, None, None]:
    """Receives the cancellation that the environment requested of this task, if pending."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise


class _Watch:
    """The source of a cancellation during a call: the deadline, the call itself, or the run."""

    def __init__(self, seconds: float, clock: SamplingClock):
        task = asyncio.current_task()
        assert task is not None, "environments are called from an asyncio task"
        self._task, self._seconds, self._clock = task, seconds, clock
        self._was, self._own = task.cancelling(), 0
        self._timer: asyncio.TimerHandle | None = None
        self.expired = self.left = self.cancelled_itself = self.closed = False
        self.blocked = 0.0  # seconds of long stretches without a wait

    @property
    def disturbed(self) -> bool:
        return self.expired or self.cancelled_itself

    def ends_the_task(self, error: BaseException) -> bool:
        """Whether the run has cancelled the rollout. Inner timeouts and task groups have withdrawn
        their requests by now."""
        return self.closed or (isinstance(error, asyncio.CancelledError) and self._task.cancelling() > self._was)

    def run(self, code: Callable[[], T]) -> T:
        """Runs the environment's code up to its next wait, and withdraws cancellations it requests
        of its own task."""
        before, began = self._task.cancelling(), time.monotonic()
        try:
            return code()
        finally:
            if (stretch := time.monotonic() - began) >= BLOCKED_SECONDS:
                self.blocked += stretch
            while self._task.cancelling() > before:
                self._task.uncancel()
                self.cancelled_itself = True

    def begin_waiting(self) -> None:
        if self._timer is None:
            self._began, self._sampled = time.monotonic(), self._clock.total()
            self._arm(self._seconds)

    def end_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for _ in range(self._own):
            self._task.uncancel()

    def _arm(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        billed = time.monotonic() - self._began - (self._clock.total() - self._sampled)
        if not self.expired and billed < self._seconds:
            self._arm(self._seconds - billed)
            return
        self.left = self.expired
        self.expired = True
        self._own += 1
        self._task.cancel()
        self._arm(CLEANUP_SECONDS)


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt came from a signal, and not from the environment's `raise`."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if signal.default_int_handler in handlers:  # no trace in the error: it may have been a signal
        return True
    codes = [getattr(getattr(handler, "func", handler), "__code__", None) for handler in handlers]
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))
