"""Calls of an environment's own code: whatever it raises, returns or does becomes a RolloutError of
its member, within a deadline.

The coroutine is driven here, in the task of its rollout, so that it can be left where it does not
let itself be cancelled. Left out, since a process cannot defend itself against its own code:
environments that block the event loop, stop it or cancel every task of it, and those that raise
SystemExit or KeyboardInterrupt in a task they have started themselves.
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

CLEANUP_SECONDS = 5.0  # for what a cancelled coroutine does before it ends; after that it is left
MESSAGE_CHARS = 2000  # of an environment's exception


class SamplingClock:
    """The seconds in which some seat of a game was at the sampler. An environment that waits for
    another seat is not billed for them.

    Entered, as a context manager, for each sampled turn.
    """

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
    """`check(await owner.method(*arguments, **keywords))`.

    What is raised is a RolloutError, unless the run itself is cancelled or interrupted.
    """
    watch = _Watch(seconds, clock)
    try:
        with span("env"):
            result = check(await _driven(partial(_started, owner, method, arguments, keywords), watch))
        if not watch.disturbed:
            return result
        failure = None
    except BaseException as error:
        if watch.ends_the_task(error) or _is_ctrl_c(error):
            raise
        failure = error
    what = f"{type(owner).__name__}.{method}"
    if watch.expired:
        also = ", and did not let itself be cancelled" if watch.left else ""
        raise EnvTimeout(f"{what} took more than {seconds:g} s{also}") from failure
    if watch.cancelled_itself:
        await _take_cancellation()
        raise EnvError(f"{what} cancelled the task of its rollout") from failure
    assert failure is not None
    raise _rollout_error(what, failure)


def call_now(check: Callable[[Any], T], owner: object, method: str) -> T:
    """`check(owner.method())`, of a method that is no coroutine. Raises RolloutErrors only."""
    try:
        return check(getattr(owner, method)())
    except BaseException as error:
        if _is_ctrl_c(error):
            raise
        failure = error
    raise _rollout_error(f"{type(owner).__name__}.{method}", failure)


def _rollout_error(what: str, failure: BaseException) -> RolloutError:
    """An error that already says what it is stays; of all others the message is made plain text."""
    try:
        message = str(failure)
    except BaseException as error:  # its own __str__ raises
        message = f"(its message raised {type(error).__name__})"
    if isinstance(failure, RolloutError) and message == plain_text(message):
        return failure
    error = EnvError(f"{what} raised {type(failure).__name__}: {plain_text(message[:MESSAGE_CHARS])}")
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
    raise MalformedStep(
        f"{type(owner).__name__}.{method} returned {result!r:.100} and is no `async def`: it cannot be awaited"
    )


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


@types.coroutine
def _driven(start: Callable[[], Coroutine[Any, Any, Any]], watch: "_Watch") -> Generator[Any, Any, Any]:
    """`await start()`. A coroutine that still waits for something CLEANUP_SECONDS after its
    deadline is left.
    """
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
            except GeneratorExit:  # the rollout's own coroutine is thrown away
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
    """The last request to end. A coroutine that goes on even so must never be collected: that would
    run it once more, in any thread, without an event loop, where `while True: try ... except:
    continue` never ends."""
    try:
        coroutine.close()
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(coroutine))


@types.coroutine
def _take_cancellation() -> Generator[None, None, None]:
    """Receives the cancellation that the environment has asked of this very task, if it is still to
    come.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise


class _Watch:
    """Who cancels the task during a call: its deadline, the call itself, or the run."""

    def __init__(self, seconds: float, clock: SamplingClock):
        task = asyncio.current_task()
        assert task is not None, "environments are called from an asyncio task"
        self._task, self._seconds, self._clock = task, seconds, clock
        self._was, self._own = task.cancelling(), 0
        self._timer: asyncio.TimerHandle | None = None
        self.expired = self.left = self.cancelled_itself = self.closed = False

    @property
    def disturbed(self) -> bool:
        return self.expired or self.cancelled_itself

    def ends_the_task(self, error: BaseException) -> bool:
        """Whether the run has cancelled the rollout. What inner timeouts and task groups asked for
        they have taken back by now.
        """
        return self.closed or (isinstance(error, asyncio.CancelledError) and self._task.cancelling() > self._was)

    def run(self, code: Callable[[], T]) -> T:
        """Runs code of the environment up to its next wait. Cancellations that it asks of its own
        task are taken back.
        """
        before = self._task.cancelling()
        try:
            return code()
        finally:
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
    """Whether a KeyboardInterrupt came from a signal's handler, as that of a person does, and not
    from a `raise` of the environment's.
    """
    if not isinstance(error, KeyboardInterrupt):
        return False
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if signal.default_int_handler in handlers:  # leaves no trace: it may have been a person
        return True
    codes = [getattr(getattr(handler, "func", handler), "__code__", None) for handler in handlers]
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))
