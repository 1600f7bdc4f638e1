"""Functions that are no coroutines, such as tools and agents, beside the event loop."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from rl.types import RolloutError

T = TypeVar("T")


async def in_own_thread(function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """As asyncio.to_thread, which has few threads for all: a function that never returns takes none of
    them from others, and the program ends without it. RolloutError where the system starts no more threads."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            outcome.set_result(context.run(function, *arguments, **keywords))
        except BaseException as error:
            outcome.set_exception(error)
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(ended.set)

    thread = threading.Thread(target=work, name=f"calls {getattr(function, '__name__', 'a function')}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # of the machine, and no answer to a model
        raise RolloutError(f"{error}: {threading.active_count()} run; lower concurrent_rollouts") from error
    await ended.wait()
    return outcome.result()
