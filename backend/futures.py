"""Futures in Tinker's shape, over one worker thread that runs what it is given in the order it was given."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from backend.openmp import release_workers

T = TypeVar("T")
U = TypeVar("U")


class APIFuture(Generic[T]):
    """The outcome of a submitted call: `result()` blocks, `await` does not. A failure is raised here, in the caller."""

    def __init__(self, future: "Future[T]"):
        self._future = future

    def result(self, timeout: float | None = None) -> T:
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        return await asyncio.wait_for(asyncio.wrap_future(self._future), timeout)

    def done(self) -> bool:
        return self._future.done()

    def then(self, fn: Callable[[T], U]) -> "APIFuture[U]":
        """The future of `fn` of the outcome; a failure passes through."""
        outcome: Future[U] = Future()

        def pass_on(future: "Future[T]") -> None:
            try:
                outcome.set_result(fn(future.result()))
            except BaseException as error:
                outcome.set_exception(error)

        self._future.add_done_callback(pass_on)
        return APIFuture(outcome)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()


class InOrder:
    """One thread; calls run one at a time in submission order, whatever thread submits them."""

    def __init__(self, name: str):
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> APIFuture[T]:
        return APIFuture(self._executor.submit(self._run, fn, *args, **kwargs))

    def _run(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        try:
            return fn(*args, **kwargs)
        finally:
            release_workers()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
