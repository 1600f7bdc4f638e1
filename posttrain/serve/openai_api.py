"""An OpenAI-compatible endpoint for sampling: /v1/models, /v1/completions, /v1/chat/completions, as
Starlette routes over `Models`, which says what a name stands for; what an answer says is in
openai_answers.py. Left out: embeddings, images, sound, files, the responses API. The server around
it guards it (keys, hosts).
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from posttrain.backend.errors import ContextLengthError, CookbookError, EngineError, one_line
from posttrain.backend.ranges import RangeError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import ModelInput, SampledSequence, SampleResponse, SamplingParams
from posttrain.renderers import with_tools_as_json
from posttrain.renderers.turns import encode_text
from posttrain.renderers.types import Message, Renderer, Tokenizer
from posttrain.serve.openai_answers import Answer, ChatAnswer, OnTokens, Served
from posttrain.serve.openai_requests import MAX_BODY_BYTES, Refusal, chat_request, completion_request, read_fields

OFFERED = "GET /v1/models, POST /v1/completions and POST /v1/chat/completions"
MOST_OPEN, MOST_OPEN_BYTES = 20_000, 2**30
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A policy and its renderer."""

    client: SamplingClient
    renderer: Renderer

    @property
    def max_length(self) -> int:
        return self.client.max_length

    def prompt(self, renderer: Renderer, messages: Sequence[Message]) -> list[int]:
        return renderer.build_generation_prompt(messages).to_ints()

    async def sample(self, prompt: list[int], n: int, params: SamplingParams, on_tokens: OnTokens) -> SampleResponse:
        return await self.client.sample(ModelInput.from_ints(prompt), n, params, on_tokens=on_tokens)

    async def score(self, tokens: list[int], k: int) -> SampleResponse:
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        return await self.client.sample(ModelInput.from_ints(tokens), 1, params, True, k)


class Models(Protocol):
    """What the endpoint serves. `open` also sees the request, e.g. for its key."""

    def names(self) -> Sequence[str]: ...

    async def open(self, name: str, request: Request) -> Served | None:
        """None for a name that does not exist."""
        ...


def openai_routes(models: Models) -> list[Route]:
    """OFFERED, and GET /v1/models/NAME."""

    async def listing(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(name) for name in models.names()]})

    async def card(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in models.names():
            await _open(models, name, request)
        return JSONResponse(_card(name))

    async def completions(request: Request) -> Response:
        completion = completion_request(await read_fields(request))
        options = completion.options
        model = await _open(models, options.model, request)
        prompts = [_tokens(model.renderer.tokenizer, prompt) for prompt in completion.prompts]
        return await _answer(request, Answer(model, options, prompts, [*options.stop] or None, completion.echo))

    async def chat(request: Request) -> Response:
        conversation = chat_request(await read_fields(request))
        options = conversation.options
        model = await _open(models, options.model, request)
        renderer = model.renderer
        if conversation.tools:
            renderer = with_tools_as_json(renderer, json.dumps(conversation.tools))
        prompt, stop = model.prompt(renderer, conversation.messages), [*renderer.get_stop_sequences(), *options.stop]
        return await _answer(request, ChatAnswer(model, options, [prompt], stop, renderer=renderer))

    at_once = [Middleware(AtOnce, AtOnce.Load())]
    return [
        Route("/v1/models", _guarded(listing), methods=["GET"]),
        Route("/v1/models/{name:path}", _guarded(card), methods=["GET"]),
        Route("/v1/completions", _guarded(completions), methods=["POST"], middleware=at_once),
        Route("/v1/chat/completions", _guarded(chat), methods=["POST"], middleware=at_once),
    ]


class AtOnce:
    """Refuses a request, for a client to repeat it later, while MOST_OPEN others have no whole answer, or
    their bodies and its own are more than MOST_OPEN_BYTES. A client that reads nothing counts until it goes."""

    @dataclass
    class Load:
        requests: int = 0
        num_bytes: int = 0

    def __init__(self, app: ASGIApp, load: Load):
        self._app, self._load = app, load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        load, length = self._load, Headers(scope=scope).get("content-length", "")
        # no more is read of one
        num_bytes = min(int(length), MAX_BODY_BYTES) if length.isdecimal() else MAX_BODY_BYTES
        if load.requests >= MOST_OPEN or load.num_bytes + num_bytes > MOST_OPEN_BYTES:
            text = "the server has no room for more requests at once; ask again later"
            await error_response(429, text, code="rate_limit_exceeded")(scope, receive, send)
            return
        load.requests, load.num_bytes = load.requests + 1, load.num_bytes + num_bytes
        try:
            await self._app(scope, receive, send)
        finally:
            load.requests, load.num_bytes = load.requests - 1, load.num_bytes - num_bytes


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


async def no_endpoint(request: Request, error: Exception) -> JSONResponse:
    """For a Starlette application's HTTPException: what there is, in OpenAI's shape."""
    status, asked = getattr(error, "status_code", 404), f"{request.method} {request.url.path:.200}"
    return error_response(status, f"this server has no {asked}; its OpenAI endpoints are {OFFERED}")


def _refused(error: Exception) -> JSONResponse:
    text = one_line(error)
    match error:
        case Refusal():
            return error_response(error.status, text, error.param, error.code)
        case ContextLengthError():
            return error_response(400, text, "prompt", "context_length_exceeded")
        case RangeError():
            return error_response(400, text, error.name)
        case EngineError():
            return error_response(503, text)
        case CookbookError():
            return error_response(400, text)
    log.error("a request failed", exc_info=error)
    return error_response(500, f"the server failed with {type(error).__name__}; its log has the traceback")


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """`handler`, with its exceptions as answers."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:  # while its body arrived
            return _refused(Refusal("the client hung up", status=499))
        except Exception as error:
            return _refused(error)

    return guarded


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "posttrain"}


async def _open(models: Models, name: str, request: Request) -> Served:
    if not name:
        raise Refusal(f"model is missing; this server has {', '.join(models.names()) or 'none'}", "model")
    if (model := await models.open(name, request)) is None:
        text = f"there is no model {name!r:.100} here; this server has {', '.join(models.names()) or 'none'}"
        raise Refusal(text, "model", 404, "model_not_found")
    return model


def _tokens(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    return encode_text(tokenizer, prompt) if isinstance(prompt, str) else prompt


# --- answers ------------------------------------------------------------------------------------


async def _answer(request: Request, answer: Answer) -> Response:
    if answer.options.stream:
        return await _streamed(request, answer)
    sequences = await _while_connected(request, answer.sequences(lambda i, tokens: None))
    choosing = [answer.choice(i, sequence) for i, sequence in enumerate(sequences)]
    choices = await _while_connected(request, _gathered(choosing))
    return JSONResponse(answer.envelope(choices) | {"usage": answer.usage(sequences)})


async def _gathered(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    return await asyncio.gather(*coroutines)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal("the client hung up", status=499)
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(request: Request, answer: Answer) -> Response:
    """Server-sent events. What fails before the first token is an error of the whole request."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    latest: dict[int, list[int]] = {}

    def on_tokens(index: int, tokens: list[int]) -> None:
        latest[index] = tokens
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(news.set)

    work = asyncio.create_task(answer.sequences(on_tokens))
    work.add_done_callback(lambda _: news.set())
    try:
        await _while_connected(request, news.wait())
        if work.done():
            work.result()
    except BaseException:
        work.cancel()
        raise
    events = _events(answer, work, latest, news)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(
    answer: Answer, work: "asyncio.Task[list[SampledSequence]]", latest: dict[int, list[int]], news: asyncio.Event
) -> AsyncIterator[str]:
    feeds = [answer.feed() for _ in range(len(answer.prompts) * answer.options.n)]

    def chunks(index: int, parts: list[dict[str, Any]]) -> str:
        return "".join(_event(answer.envelope([{"index": index} | part], chunk=True)) for part in parts)

    try:
        while not work.done():
            await news.wait()
            news.clear()
            while latest:
                index, tokens = latest.popitem()
                if events := chunks(index, feeds[index].feed(tokens)):
                    yield events
        sequences = await work
        for index, sequence in enumerate(sequences):
            yield chunks(index, feeds[index].close(sequence))
        if answer.options.include_usage:
            yield _event(answer.envelope([], chunk=True) | {"usage": answer.usage(sequences)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {bytes(_refused(error).body).decode()}\n\n"
    finally:
        work.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
