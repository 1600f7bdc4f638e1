"""Long operations: a request is accepted at once and its answer is asked for later. A request that is
repeated, after a lost answer, is the same request. Answers are kept until they were fetched and some
minutes beyond, within a number of bytes.
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from posttrain.backend.errors import CookbookError, EngineError, one_line

log = logging.getLogger("posttrain.serve")

JSON, PROTOBUF = "application/json", "application/x-protobuf"
# Seconds that an answer is kept: after it was fetched, and when nobody fetches it.
FETCHED_SECONDS, UNFETCHED_SECONDS = 300.0, 3600.0
MOST_ANSWER_BYTES = 2**30
SWEEP_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    body: bytes
    media_type: str = JSON
    failed: bool = False


def json_answer(content: object) -> Answer:
    return Answer(json.dumps(content, allow_nan=False).encode())


def failure(error: BaseException, clean: Callable[[str], str] = str) -> Answer:
    """The SDK raises RequestFailedError with this text, and does not try again."""
    if isinstance(error, CookbookError) and not isinstance(error, EngineError):
        category: Literal["user", "server"] = "user"
        text = str(error)
    elif isinstance(error, asyncio.CancelledError):
        category, text = "server", "the request was cancelled: its session has ended, or the server is stopping"
    else:
        log.error("a request failed", exc_info=error)
        category, text = "server", f"{type(error).__name__}: {error}"
    return Answer(json.dumps({"error": clean(one_line(text)), "category": category}).encode(), failed=True)


@dataclass(eq=False)
class Request:
    key: Hashable
    owner: str  # the sampler whose completions are listed together, or ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    answer: Answer | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    drop_at: float = 0.0
    completion: int = 0  # its number in the owner's list
    task: asyncio.Task[Answer] | None = None


class Requests:
    """All requests of the server, by id and by what identifies a repetition."""

    def __init__(self, clean: Callable[[str], str] = str, most_bytes: int = MOST_ANSWER_BYTES) -> None:
        """`clean` takes from an error what clients should not read."""
        self._clean = clean
        self._by_id: dict[str, Request] = {}
        self._by_key: dict[Hashable, Request] = {}
        self._most_bytes, self._bytes = most_bytes, 0
        self._unanswered = 0  # kept, as it is asked for with each request, and there are many
        self._next_sweep = 0.0
        self.completions = Completions()

    def __len__(self) -> int:
        """Requests without an answer."""
        return self._unanswered

    def repeated(self, key: Hashable) -> Request | None:
        return self._by_key.get(key)

    def accept(self, key: Hashable, work: Coroutine[Any, Any, Answer], owner: str = "") -> Request:
        """Starts `work`; its error becomes the answer."""
        self._sweep()
        request = Request(key, owner)
        self._by_id[request.id] = self._by_key[key] = request
        self._unanswered += 1
        request.task = asyncio.create_task(work)
        request.task.add_done_callback(partial(self._finished, request))
        return request

    def _finished(self, request: Request, task: asyncio.Task[Answer]) -> None:
        """Also where it was cancelled before it began."""
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        answer = failure(error, self._clean) if error else task.result()
        self._unanswered -= 1
        request.task = None  # a failed one's traceback keeps its client, and so the weights of a session that has ended
        request.answer, request.drop_at = answer, time.monotonic() + UNFETCHED_SECONDS
        self._bytes += len(answer.body)
        request.done.set()
        if request.owner:
            self.completions.add(request)

    async def wait(self, request_id: str, seconds: float) -> Answer | None:
        """The answer, or None if there is none within `seconds`. KeyError if the request is unknown
        or its answer was dropped."""
        request = self._by_id[request_id]
        if request.answer is None:
            try:
                async with asyncio.timeout(seconds):
                    await request.done.wait()
            except TimeoutError:
                return None
        assert request.answer
        request.drop_at = min(request.drop_at, time.monotonic() + FETCHED_SECONDS)
        return request.answer

    def cancel(self, request_id: str) -> None:
        request = self._by_id.get(request_id)
        if request and request.task:
            request.task.cancel()

    def end(self, sampler_ids: Collection[str]) -> None:
        """Samplers and their clones have gone: nobody waits for what they still sample."""
        for request in self._by_id.values():
            if request.task and not request.answer and request.owner.split("#")[0] in sampler_ids:
                request.task.cancel()
                request.owner = ""  # no list for it
        self.completions.forget(sampler_ids)

    def _sweep(self) -> None:
        """Drops answers whose time is over, and beyond the number of bytes those next in time: a tenth, so
        that not each request afterwards sorts all of them."""
        now, most_bytes = time.monotonic(), self._most_bytes
        if self._bytes > most_bytes:
            most_bytes = 0.9 * most_bytes
        elif now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_SECONDS
        finished = sorted((r for r in self._by_id.values() if r.answer), key=lambda request: request.drop_at)
        for request in finished:
            if request.drop_at > now and self._bytes <= most_bytes:
                break
            assert request.answer
            self._bytes -= len(request.answer.body)
            del self._by_id[request.id], self._by_key[request.key]
            self.completions.drop(request)

    async def close(self) -> None:
        tasks = [request.task for request in self._by_id.values() if request.task and not request.answer]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Completions:
    """The finished requests of each sampler, numbered, for a client that polls once for all."""

    def __init__(self) -> None:
        self._finished: dict[str, dict[int, Request]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._number = 0

    def add(self, request: Request) -> None:
        self._number += 1
        request.completion = self._number
        self._finished.setdefault(request.owner, {})[self._number] = request
        if event := self._changed.get(request.owner):
            event.set()

    def drop(self, request: Request) -> None:
        self._finished.get(request.owner, {}).pop(request.completion, None)

    async def after(self, owner: str, cursor: int, seconds: float) -> tuple[list[dict[str, object]], int]:
        """Completions after `cursor`, and the new cursor; earlier ones are forgotten. Waits up to
        `seconds` for the first."""
        finished = self._finished.setdefault(owner, {})
        for number in [number for number in finished if number <= cursor]:
            del finished[number]
        if not finished and seconds > 0:
            event = self._changed.setdefault(owner, asyncio.Event())
            event.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await event.wait()
        return [_completion(request) for request in finished.values()], max(finished, default=cursor)

    def forget(self, sampler_ids: Collection[str]) -> None:
        """Samplers and their clones have gone."""
        for owner in [owner for owner in self._finished if owner.split("#")[0] in sampler_ids]:
            del self._finished[owner]
            self._changed.pop(owner, None)


def _completion(request: Request) -> dict[str, object]:
    assert request.answer
    if request.answer.failed:
        return {"state": "failed", "request_id": request.id}
    return {
        "state": "finished",
        "request_id": request.id,
        "response_payload_uncompressed_size": len(request.answer.body),
    }
