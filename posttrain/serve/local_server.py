"""An ASGI application on a loopback port of this machine, in a thread of this process."""

import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import uvicorn

from posttrain.backend.errors import EngineError

# An idle connection is closed by the client first (httpx: after 5 s, reqwest: after 90 s): a request sent at the
# moment when the server closes it is lost.
KEEP_ALIVE_SECONDS = 120


class LocalServer:
    """Serves from its construction until `close`, at a free port."""

    def __init__(self, app: Callable[..., Awaitable[Any]]):
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="local-server", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise EngineError(f"the server at {self.url} did not start")
            time.sleep(0.005)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
