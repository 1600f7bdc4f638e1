"""What a request must be before the server reads it: for this host, with the key, of a known content
type, of bounded size; and its body must keep coming. An ASGI middleware.
"""

import asyncio
import hmac
import ipaddress
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from posttrain.serve.openai_api import error_response

MOST_BODY_BYTES = 64 * 2**20
STALLED_SECONDS = 60.0  # of a client that sleeps, or whose network has gone, in the middle of a body
MEDIA_TYPES = ("application/json", "application/x-protobuf", "application/octet-stream")
OPEN_PATHS = ("/api/v1/healthz", "/api/v1/external/")  # the latter's addresses are secrets themselves


class TooLargeError(Exception):
    """The body exceeds MOST_BODY_BYTES."""


class Guard:
    def __init__(self, app: Any, host: str = "127.0.0.1", api_key: str | None = None):
        self._app, self._host, self._api_key = app, host, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await _answer(*refusal, scope, receive, send)
            return
        received, is_whole, stalled, answered = 0, False, False, False

        async def counted() -> Message:
            nonlocal received, is_whole, stalled
            try:
                async with asyncio.timeout(None if is_whole else STALLED_SECONDS):
                    message = await receive()
            except TimeoutError:
                stalled = True
                return {"type": "http.disconnect"}
            received, is_whole = received + len(message.get("body", b"")), not message.get("more_body", False)
            if received > MOST_BODY_BYTES:
                raise TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            if not stalled:
                answered = True
                await send(message)

        try:
            await self._app(scope, counted, noted)
            if stalled:  # not as one that has gone: awake again, it repeats the request
                text = f"nothing of the body came for {STALLED_SECONDS:g} s"
                await _answer(408, text, scope, receive, send)
        except TooLargeError:
            await _answer(413, _too_large(), scope, receive, send)
        except asyncio.CancelledError:  # of long polls, when the server stops
            if not answered:
                await _answer(503, "the server is stopping", scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = _host_name(headers.get("host", ""))
        if host not in ("localhost", self._host) and not _is_address(host):
            return 403, f"this server is not {host[:80]!r}: use its address, or localhost"
        path = str(scope["path"])
        if self._api_key and not path.startswith(OPEN_PATHS):
            given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._api_key.encode()):
                wanted = "give the key the server was started with (TINKER_API_KEY, OPENAI_API_KEY)"
                return 401, f"wrong or missing API key: {wanted}"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > MOST_BODY_BYTES:
            return 413, _too_large()
        has_body = int(length) > 0 or "transfer-encoding" in headers
        media_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if has_body and media_type not in MEDIA_TYPES:
            return 415, f"content-type {media_type[:80]!r}: the server reads {MEDIA_TYPES[0]} and {MEDIA_TYPES[1]}"
        return None


def _too_large() -> str:
    return f"the body is larger than {MOST_BODY_BYTES // 2**20} MiB: send fewer data in one request"


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.rsplit(":", 1)[0] if ":" in host else host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _answer(status: int, detail: str, scope: Scope, receive: Receive, send: Send) -> None:
    is_openai = scope["path"].startswith("/v1/")
    response = error_response(status, detail) if is_openai else JSONResponse({"detail": detail}, status)
    if status in (408, 413):  # the rest of the body is not read
        response.headers["connection"] = "close"
    await response(scope, receive, send)
