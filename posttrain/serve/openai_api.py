"""An OpenAI-compatible endpoint for sampling: /v1/models, /v1/completions, /v1/chat/completions, as
Starlette routes over `Models`, which says what a name stands for. Logprobs are the model's own, at
temperature 1. Left out: embeddings, images, sound, files, the responses API. The server around it
guards it (keys, hosts).
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from posttrain.backend.errors import ContextLengthError, CookbookError, EngineError
from posttrain.backend.ranges import RangeError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import ModelInput, SampledSequence, SampleResponse, SamplingParams
from posttrain.renderers import ResponseStream, to_openai, with_tools
from posttrain.renderers.parts import openai_call
from posttrain.renderers.stream import held_back
from posttrain.renderers.turns import bos, decode, encode
from posttrain.renderers.types import Message, Part, Renderer, Tokenizer
from posttrain.serve.openai_requests import (
    Options,
    Refusal,
    chat_request,
    completion_request,
    read_body,
)

T = TypeVar("T")
OnTokens = Callable[[int, list[int]], object]
log = logging.getLogger(__name__)


class Served(Protocol):
    """What answers under a name."""

    @property
    def renderer(self) -> Renderer: ...

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        ...

    def prompt(self, renderer: Renderer, messages: Sequence[Message]) -> list[int]:
        """`renderer` is this model's, with the request's tools."""
        ...

    async def sample(self, prompt: list[int], n: int, params: SamplingParams, on_tokens: OnTokens) -> SampleResponse:
        """May call `on_tokens`, from any thread, with the index and the tokens so far of a sample."""
        ...

    async def score(self, tokens: list[int], k: int) -> SampleResponse:
        """Prompt logprobs of `tokens`, and of the k most likely ones."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """A policy and its renderer."""

    client: SamplingClient
    renderer: Renderer
    created: int = field(default_factory=lambda: int(time.time()))

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
    """GET /v1/models and /v1/models/NAME, POST /v1/completions and /v1/chat/completions."""

    async def listing(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(name) for name in models.names()]})

    async def card(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in models.names():
            await _open(models, name, request)
        return JSONResponse(_card(name))

    async def completions(request: Request) -> Response:
        completion = completion_request(await read_body(request))
        options = completion.options
        model = await _open(models, options.model, request)
        prompts = [_tokens(model.renderer.tokenizer, prompt) for prompt in completion.prompts]
        return await _answer(request, Answer(model, options, prompts, [*options.stop] or None, completion.echo))

    async def chat(request: Request) -> Response:
        conversation = chat_request(await read_body(request))
        options = conversation.options
        model = await _open(models, options.model, request)
        renderer = _with_tools(model.renderer, json.dumps(conversation.tools)) if conversation.tools else model.renderer
        prompt, stop = model.prompt(renderer, conversation.messages), [*renderer.get_stop_sequences(), *options.stop]
        return await _answer(request, ChatAnswer(model, options, [prompt], stop, renderer=renderer))

    return [
        Route("/v1/models", _guarded(listing), methods=["GET"]),
        Route("/v1/models/{name:path}", _guarded(card), methods=["GET"]),
        Route("/v1/completions", _guarded(completions), methods=["POST"]),
        Route("/v1/chat/completions", _guarded(chat), methods=["POST"]),
    ]


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def _refused(error: Exception) -> JSONResponse:
    text = " ".join(str(error).split())
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
        except Exception as error:
            return _refused(error)

    return guarded


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "posttrain"}


async def _open(models: Models, name: str, request: Request) -> Served:
    if not name:
        raise Refusal(f"model is missing; there is {', '.join(models.names()) or 'none'}", "model")
    if (model := await models.open(name, request)) is None:
        text = f"there is no model {name!r:.100} here; there is {', '.join(models.names()) or 'none'}"
        raise Refusal(text, "model", 404, "model_not_found")
    return model


@lru_cache(maxsize=64)  # an agent offers the same tools in every request
def _with_tools(renderer: Renderer, tools: str) -> Renderer:
    return with_tools(renderer, json.loads(tools))


def _tokens(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    return bos(tokenizer) + encode(tokenizer, prompt) if isinstance(prompt, str) else prompt


# --- answers ------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A request being answered: choice i * n + j is sample j of prompt i."""

    model: Served
    options: Options
    prompts: list[list[int]]
    stop: list[str | int] | None
    echo: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    async def sequences(self, on_tokens: OnTokens) -> list[SampledSequence]:
        """The sampled sequences of all choices."""
        n = self.options.n
        answers = await asyncio.gather(
            *(
                self._sample(prompt, lambda j, tokens, i=i: on_tokens(i * n + j, tokens))
                for i, prompt in enumerate(self.prompts)
            )
        )
        return [sequence for response in answers for sequence in response.sequences]

    async def _sample(self, prompt: list[int], on_tokens: OnTokens) -> SampleResponse:
        options = self.options
        if options.max_tokens == 0:
            return SampleResponse([SampledSequence([], [], "length")] * options.n)
        # a sequence that fills the context could not be scored
        room = self.model.max_length - len(prompt) - (options.logprobs is not None)
        if room < (options.max_tokens or 1):
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, max_tokens is {options.max_tokens or 'not given'}, and the "
                f"context {self.model.max_length}"
            )
        # the backend's seeds are not negative
        seed = None if options.seed is None else options.seed % 2**63
        limit, stop = options.max_tokens or room, self.stop
        params = SamplingParams(limit, seed, stop, options.temperature, options.top_k, options.top_p)  # type: ignore[arg-type]
        return await self.model.sample(prompt, options.n, params, on_tokens)

    def text(self, tokens: list[int]) -> str:
        """The text of a choice, without what stopped it."""
        tokenizer = self.model.renderer.tokenizer
        if tokens and tokens[-1] in tokenizer.all_special_ids:
            tokens = tokens[:-1]
        return self._cut(decode(tokenizer, tokens))

    def _cut(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.options.stop]
        return text[: min((end for end in ends if end >= 0), default=len(text))]

    async def choice(self, index: int, sequence: SampledSequence) -> dict[str, Any]:
        prompt = self.prompts[index // self.options.n]
        text = self.text(sequence.tokens)
        shown = prompt if self.echo else []
        logprobs = await self._logprobs(prompt, [*shown, *sequence.tokens])
        text = decode(self.model.renderer.tokenizer, shown) + text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": sequence.stop_reason}

    async def _scored(self, prompt: list[int], tokens: list[int]) -> list[tuple[int, float | None, list]]:
        """Token, logprob and the most likely tokens with theirs, for the last tokens of a sequence."""
        assert self.options.logprobs is not None
        whole = tokens if self.echo else prompt + tokens
        if not tokens:
            return []
        scores = await self.model.score(whole, self.options.logprobs)
        logprobs = (scores.prompt_logprobs or [])[-len(tokens) :]
        top = (scores.topk_prompt_logprobs or [None] * len(whole))[-len(tokens) :]
        k = self.options.logprobs
        return [(t, logprob, (best or [])[:k]) for t, logprob, best in zip(tokens, logprobs, top, strict=True)]

    async def _logprobs(self, prompt: list[int], tokens: list[int]) -> dict[str, Any] | None:
        if self.options.logprobs is None:
            return None
        scored = await self._scored(prompt, tokens)
        names = [self._name(token) for token, _, _ in scored]
        tops = [{self._name(token): logprob for token, logprob in best} for _, _, best in scored]
        return {
            "tokens": names,
            "token_logprobs": [logprob for _, logprob, _ in scored],
            "top_logprobs": [top or None for top in tops] if self.options.logprobs else None,
            "text_offset": [0, *accumulate(map(len, names))][: len(names)],
        }

    def _name(self, token: int) -> str:
        """A token's text; of a part of a character, its own name in the vocabulary."""
        text = decode(self.model.renderer.tokenizer, [token])
        return f"bytes:{self.model.renderer.tokenizer.convert_ids_to_tokens(token)}" if "\ufffd" in text else text

    def feed(self) -> "TextFeed | ChatFeed":
        return TextFeed(self)

    def envelope(self, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        return {
            "id": self.prefix + self.id,
            "object": self.chunk_kind if chunk else self.kind,
            "created": self.created,
            "model": self.options.model,
            "choices": choices,
        }

    def usage(self, sequences: Sequence[SampledSequence]) -> dict[str, int]:
        """Stop tokens count."""
        prompt, completion = sum(map(len, self.prompts)), sum(len(sequence.tokens) for sequence in sequences)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(kw_only=True)
class ChatAnswer(Answer):
    renderer: Renderer  # with the request's tools

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    async def choice(self, index: int, sequence: SampledSequence) -> dict[str, Any]:
        message, _ = self.renderer.parse_response(sequence.tokens)
        fields: dict[str, Any] = to_openai(message) | {"refusal": None}
        for name in ("content", "reasoning_content"):
            fields |= {name: self._cut(fields[name])} if name in fields else {}
        fields["content"] = fields["content"] or ("" if "tool_calls" not in fields else None)
        logprobs = await self._logprobs(self.prompts[0], sequence.tokens)
        finish = "tool_calls" if "tool_calls" in fields else sequence.stop_reason
        return {"index": index, "message": fields, "logprobs": logprobs, "finish_reason": finish}

    async def _logprobs(self, prompt: list[int], tokens: list[int]) -> dict[str, Any] | None:
        if self.options.logprobs is None:
            return None
        entries = []
        for token, logprob, best in await self._scored(prompt, tokens):
            top = [self._entry(other, value) for other, value in best]
            entries.append({**self._entry(token, logprob), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = decode(self.model.renderer.tokenizer, [token])
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": self._name(token), "logprob": logprob, "bytes": known}

    def feed(self) -> "ChatFeed":
        return ChatFeed(self)


class TextFeed:
    """The chunks of one choice, from its tokens so far. What a later token may change (half a
    character, half a stop) waits."""

    def __init__(self, answer: Answer):
        self.answer, self.sent = answer, ""

    def feed(self, tokens: list[int]) -> list[dict[str, Any]]:
        text = self.answer.text(tokens).rstrip("\ufffd")
        return self._piece(text[: len(text) - held_back(text, self.answer.options.stop)])

    def close(self, sequence: SampledSequence) -> list[dict[str, Any]]:
        (last,) = self._piece(self.answer.text(sequence.tokens)) or [{"text": "", "logprobs": None}]
        return [last | {"finish_reason": sequence.stop_reason}]

    def _piece(self, text: str) -> list[dict[str, Any]]:
        piece = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += piece
        return [{"text": piece, "logprobs": None, "finish_reason": None}] if piece else []


class ChatFeed:
    """The chunks of one choice: text and thinking in pieces, calls whole."""

    def __init__(self, answer: ChatAnswer):
        self.stream, self.stops = ResponseStream(answer.renderer), answer.options.stop
        self.fed = self.calls = 0
        self.field, self.waiting, self.is_cut = "content", "", False
        self.delta: dict[str, Any] = {"role": "assistant", "content": ""}  # what every stream begins with

    def feed(self, tokens: list[int]) -> list[dict[str, Any]]:
        parts, self.fed = self.stream.feed(tokens[self.fed :]), len(tokens)
        return [_delta(delta) for part in parts for delta in self._deltas(part)]

    def close(self, sequence: SampledSequence) -> list[dict[str, Any]]:
        chunks = self.feed(sequence.tokens)
        chunks += [_delta(delta) for part in self.stream.close() for delta in self._deltas(part)]
        chunks += [_delta(delta) for delta in self._rest()]
        finish = "tool_calls" if self.calls else sequence.stop_reason
        return [*chunks, _delta(self._with_role({})) | {"finish_reason": finish}]

    def _deltas(self, part: Part) -> list[dict[str, Any]]:
        if part["type"] == "thinking":
            return self._pieces("reasoning_content", part["thinking"])
        if part["type"] != "tool_call":
            return self._pieces("content", part["text"])
        call = {"index": self.calls} | openai_call(part)
        self.calls += 1
        return [*self._rest(), self._with_role({"tool_calls": [call]})]

    def _pieces(self, field: str, text: str) -> list[dict[str, Any]]:
        rest = self._rest() if field != self.field else []
        self.field = field
        self.waiting += text
        ends = [end for stop in self.stops if (end := self.waiting.find(stop)) >= 0]
        held = len(self.waiting) - min(ends) if ends else held_back(self.waiting, self.stops)
        piece, self.waiting = self.waiting[: len(self.waiting) - held], self.waiting[len(self.waiting) - held :]
        deltas = [self._with_role({field: piece})] if piece and not self.is_cut else []
        if ends:
            self.is_cut, self.waiting = True, ""
        return rest + deltas

    def _rest(self) -> list[dict[str, Any]]:
        text, self.waiting = self.waiting, ""
        return [self._with_role({self.field: text})] if text and not self.is_cut else []

    def _with_role(self, delta: dict[str, Any]) -> dict[str, Any]:
        first, self.delta = self.delta, {}
        return first | delta


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"delta": delta, "logprobs": None, "finish_reason": None}


async def _answer(request: Request, answer: Answer) -> Response:
    if answer.options.stream:
        return await _streamed(answer)
    sequences = await _while_connected(request, answer.sequences(lambda i, tokens: None))
    choices = await _while_connected(
        request, _gathered([answer.choice(i, sequence) for i, sequence in enumerate(sequences)])
    )
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


async def _streamed(answer: Answer) -> Response:
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
        await news.wait()
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
