"""A client of any endpoint that speaks the OpenAI chat protocol: text in, text out, for judges. A
time-out, an HTTP error or a reply without text is a JudgeError. Left out: logprobs, streaming,
prices.
"""

import asyncio
import json
import os
import ssl
from functools import cache
from itertools import count
from typing import Any

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, POSITIVE, WHOLE
from preference.reward_types import JudgeError

MOST_BYTES = 1 << 20


@chz.chz
class ChatEndpoint:
    """A model at BASE_URL/chat/completions."""

    base_url: str = chz.field(doc="as http://localhost:8000/v1")
    model: str = chz.field(doc="the model's name at the endpoint")
    api_key_variable: str | None = chz.field(
        default=None, doc="environment variable that holds the key, if one is needed"
    )
    max_tokens: int = chz.field(default=512, validator=COUNT, doc="most tokens of its answer")
    timeout: float = chz.field(default=60.0, validator=POSITIVE, doc="seconds for one judgement")
    retries: int = chz.field(
        default=2, validator=WHOLE, doc="times a request that failed is sent again, after 1, 2, 4 ... seconds"
    )
    max_concurrent: int = chz.field(default=16, validator=COUNT, doc="most requests in flight")

    @chz.init_property
    def client(self) -> "EndpointClient":
        return EndpointClient(self)


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: a client of httpx would read them for each request, in 17 ms."""
    import httpx

    return httpx.create_ssl_context()


class EndpointClient:
    """At most `max_concurrent` requests of a client are in flight."""

    def __init__(self, config: ChatEndpoint):
        self.config, self.url = config, config.base_url.rstrip("/") + "/chat/completions"
        self.name = f"judge {config.model} at {self.url}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._headers = {}
        if variable := config.api_key_variable:
            if not os.environ.get(variable):
                raise ConfigError(f"api_key_variable={variable}: the environment has no such variable; export it")
            self._headers["Authorization"] = f"Bearer {os.environ[variable]}"

    async def complete(self, text: str) -> str:
        """The answer to `text` as a user message. `timeout` covers the whole request. No thread
        waits for it, so an endpoint that sends a byte now and then holds none."""
        import httpx  # a third of a second to import

        slots = self._slots()
        for attempt in count():
            try:
                async with (
                    slots,
                    asyncio.timeout(self.config.timeout),
                    httpx.AsyncClient(timeout=None, verify=_certificates()) as client,
                ):
                    answer = await self._ask(client, text)
                return self._text(answer)
            except (TimeoutError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
                if attempt == self.config.retries:
                    timed_out = isinstance(error, TimeoutError)
                    failure = f"no answer in {self.config.timeout:g} s" if timed_out else str(error) or repr(error)
                    raise JudgeError(f"{self.name}: {failure} (attempt {attempt + 1})") from error
            await asyncio.sleep(2**attempt)
        raise AssertionError("unreachable")

    def _slots(self) -> asyncio.Semaphore:
        """Of the running event loop: a configuration, and its client, may be used in several."""
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._semaphore = loop, asyncio.Semaphore(self.config.max_concurrent)
        return self._semaphore

    async def _ask(self, client: Any, text: str) -> bytes:
        """The first MOST_BYTES of the endpoint's reply to `client`, an httpx.AsyncClient."""
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
        }
        received = b""
        async with client.stream("POST", self.url, json=body, headers=self._headers) as response:
            response.raise_for_status()
            async for piece in response.aiter_bytes():
                received += piece
                if len(received) > MOST_BYTES:
                    break
        return received[:MOST_BYTES]

    def _text(self, answer: bytes) -> str:
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"].strip()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise JudgeError(f"{self.name} sent no completion: {answer[:100]!r}") from error
        if not text:
            raise JudgeError(f"{self.name} sent no completion: {answer[:100]!r}")
        return text
