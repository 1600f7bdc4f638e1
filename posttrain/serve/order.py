"""The requests of one model, carried out in the order of their numbers, whatever order they arrive
in. A number that never comes is given up after a while.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from posttrain.backend.errors import ClosedError, DataError
from posttrain.serve.requests import Answer

C = TypeVar("C")
Start = Callable[[C], Awaitable[Answer]]
GAP_SECONDS = 60.0


class NumberedQueue(Generic[C]):
    """`opened` gives the client that requests are made of. A request begins when all earlier numbers
    have begun: the client has a queue of its own."""

    def __init__(
        self,
        opened: Awaitable[C],
        on_gap: Callable[[C, DataError], None] = lambda client, error: None,
        gap_seconds: float = GAP_SECONDS,
    ):
        """`on_gap` is called before the requests after a gap are refused."""
        self._waiting: dict[int, tuple[Start[C], asyncio.Future[Answer]]] = {}
        self._next = 1
        self._arrived = asyncio.Event()
        self._on_gap, self._gap_seconds = on_gap, gap_seconds
        self._closed: BaseException | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._worker = asyncio.create_task(self._work(opened))

    def put(self, number: int, start: Start[C]) -> asyncio.Future[Answer]:
        """The outcome of `start(client)`, called when it is this number's turn."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(self._closed)
        elif number < self._next or number in self._waiting:
            future.set_exception(DataError(f"seq_id {number} was used before, and its answer is no longer kept"))
        else:
            self._waiting[number] = (start, future)
            self._arrived.set()
        return future

    async def _work(self, opened: Awaitable[C]) -> None:
        try:
            client = await opened
        except Exception as error:
            self._closed = error
            self._refuse(error)
            return
        loop, give_up_at = asyncio.get_running_loop(), None
        while True:
            while self._next in self._waiting:
                give_up_at = None
                start, future = self._waiting.pop(self._next)
                self._next += 1
                task = asyncio.create_task(_run(start, client, future))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                await asyncio.sleep(0)  # the task submits to the client before the next one does
            if self._waiting and give_up_at is None:
                give_up_at = loop.time() + self._gap_seconds
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(give_up_at):
                    await self._arrived.wait()
            except TimeoutError:
                self._give_up(client)
                give_up_at = None

    def _give_up(self, client: C) -> None:
        error = DataError(
            f"request {self._next} of this model did not arrive within {self._gap_seconds:.0f} s, so requests "
            f"{sorted(self._waiting)[:10]} after it were not carried out: was it refused, or lost?"
        )
        self._on_gap(client, error)
        self._next = max(self._waiting) + 1
        self._refuse(error)

    def _refuse(self, error: BaseException) -> None:
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()

    def close(self) -> None:
        self._closed = ClosedError("this model is gone: its session has ended")
        self._worker.cancel()
        self._refuse(self._closed)


async def _run(start: Start[C], client: C, future: asyncio.Future[Answer]) -> None:
    try:
        answer = await start(client)
    except asyncio.CancelledError:
        future.cancel()
    except BaseException as error:
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(answer)
