"""What the OpenAI-compatible endpoint answers: prompts are sampled by a `Served` model, and its tokens
become choices, whole or in the chunks of a stream. Logprobs are the model's own, at temperature 1.
"""

import asyncio
import base64
import hashlib
import json
import time
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from posttrain.backend.errors import ContextLengthError
from posttrain.backend.types import SampledSequence, SampleResponse, SamplingParams
from posttrain.renderers import ResponseStream, to_openai
from posttrain.renderers.parts import openai_call
from posttrain.renderers.stream import TokenText, held_back, is_counted
from posttrain.renderers.turns import before_others, continuation, decode, token_text
from posttrain.renderers.types import Message, Part, Renderer, ToolCallPart
from posttrain.serve.openai_requests import Options

OnTokens = Callable[[int, list[int]], object]


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
        sampled = [
            self._sample(prompt, lambda j, tokens, i=i: on_tokens(i * n + j, tokens))
            for i, prompt in enumerate(self.prompts)
        ]
        answers = await asyncio.gather(*sampled)
        return [sequence for response in answers for sequence in response.sequences]

    async def _sample(self, prompt: list[int], on_tokens: OnTokens) -> SampleResponse:
        options = self.options
        if options.max_tokens == 0:
            return SampleResponse([SampledSequence([], [], "length")] * options.n)
        # to score a token takes room for another one after it, but for one that was the most likely
        scores_last = options.logprobs is not None and (options.temperature > 0 or options.logprobs > 1)
        room = self.model.max_length - len(prompt) - scores_last
        if room < (options.max_tokens or 1):
            # clients know the error by these words of OpenAI and others
            begins = "" if room > 0 else "the prompt is too long: "
            ends = "; logprobs take one more" if scores_last else ""
            raise ContextLengthError(
                f"{begins}this model's maximum context length is {self.model.max_length} tokens: the prompt has "
                f"{len(prompt)}, and max_tokens is {options.max_tokens or 'not given'}{ends}"
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
        return self.cut(continuation(tokenizer, tokens))

    def cut(self, text: str) -> str:
        """The text before the first of the request's stops."""
        return _before(text, self.options.stop)

    async def choice(self, index: int, sequence: SampledSequence) -> dict[str, Any]:
        prompt = self.prompts[index // self.options.n]
        text = self.text(sequence.tokens)
        shown = prompt if self.echo else []
        logprobs = await self._logprobs(prompt, shown, sequence)
        text = decode(self.model.renderer.tokenizer, shown) + text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": sequence.stop_reason}

    async def _scored(
        self, prompt: list[int], shown: list[int], sequence: SampledSequence
    ) -> list[tuple[int, float | None, list]]:
        """Token, logprob and the most likely tokens with theirs, for the prompt's tokens that are `shown` and the
        sampled ones."""
        assert self.options.logprobs is not None
        tokens = [*shown, *sequence.tokens]
        whole, k = prompt + sequence.tokens, self.options.logprobs
        if not tokens:
            return []
        # without room for another token: the last was greedy (`_sample`)
        fills = bool(sequence.tokens) and len(whole) >= self.model.max_length
        scores = await self.model.score(whole[:-1] if fills else whole, k)
        logprobs = [*(scores.prompt_logprobs or [])]
        top = [*(scores.topk_prompt_logprobs or [None] * len(logprobs))]
        if fills:
            logprobs.append(sequence.logprobs[-1])
            top.append([(whole[-1], sequence.logprobs[-1])])
        scored = zip(tokens, logprobs[-len(tokens) :], top[-len(tokens) :], strict=True)
        return [(t, logprob, (best or [])[:k]) for t, logprob, best in scored]

    async def _logprobs(self, prompt: list[int], shown: list[int], sequence: SampledSequence) -> dict[str, Any] | None:
        if self.options.logprobs is None:
            return None
        scored = await self._scored(prompt, shown, sequence)
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
        text = token_text(self.model.renderer.tokenizer, token)
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
        fields = answered(with_call_ids(message, self.prompts[0]), self.options.stop) | {"refusal": None}
        fields["content"] = fields["content"] or ("" if "tool_calls" not in fields else None)
        logprobs = await self._logprobs(self.prompts[0], [], sequence)
        finish = "tool_calls" if "tool_calls" in fields else sequence.stop_reason
        return {"index": index, "message": fields, "logprobs": logprobs, "finish_reason": finish}

    async def _logprobs(self, prompt: list[int], shown: list[int], sequence: SampledSequence) -> dict[str, Any] | None:
        if self.options.logprobs is None:
            return None
        entries = []
        for token, logprob, best in await self._scored(prompt, shown, sequence):
            top = [self._entry(other, value) for other, value in best]
            entries.append({**self._entry(token, logprob), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(self.model.renderer.tokenizer, token)
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": self._name(token), "logprob": logprob, "bytes": known}

    def feed(self) -> "ChatFeed":
        return ChatFeed(self)


def with_call_ids(message: Message, prompt: Sequence[int]) -> Message:
    """A message sampled after `prompt`, its calls with ids that no other turn's have: programs refuse one that they
    have met. The same prompt and call have the same id; one that the model wrote stays."""
    if "parts" in message:
        message = message.copy()
        message["parts"] = [
            _with_id(part, prompt) if part["type"] == "tool_call" else part for part in message["parts"]
        ]
    return message


def _with_id(call: ToolCallPart, prompt: Sequence[int]) -> ToolCallPart:
    if is_counted(call["id"]):
        what = json.dumps([call["id"], call["name"], call["arguments"]], sort_keys=True).encode()
        digest = hashlib.sha256(array("q", prompt).tobytes() + what).digest()
        call = call.copy()
        call["id"] = base64.b32encode(digest)[:9].decode().lower()  # as long as a counted one
    return call


def answered(message: Message, stops: Sequence[str]) -> dict[str, Any]:
    """A sampled message as a client is told it: text and thinking before the first of `stops`."""
    fields = to_openai(message)
    return fields | {name: _before(fields[name], stops) for name in ("content", "reasoning_content") if name in fields}


def _before(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


class TextFeed:
    """The chunks of one choice, from its tokens so far. What a later token may change (half a
    character, half a stop) waits."""

    def __init__(self, answer: Answer):
        self.answer, self.sent = answer, ""
        tokenizer = answer.model.renderer.tokenizer
        self.special_ids, self.decoder = {*tokenizer.all_special_ids}, TokenText(tokenizer, before_others(tokenizer))
        self.fed, self.text = 0, ""

    def feed(self, tokens: list[int]) -> list[dict[str, Any]]:
        end = len(tokens)
        if tokens and tokens[-1] in self.special_ids:  # it may be what stops the answer
            end -= 1
        self.text += self.decoder.feed(tokens[self.fed : end])
        self.fed = end
        text = self.answer.cut(self.text)
        return self._piece(text[: len(text) - held_back(text, self.answer.options.stop)])

    def close(self, sequence: SampledSequence) -> list[dict[str, Any]]:
        (last,) = self._piece(self.answer.text(sequence.tokens)) or [{"text": "", "logprobs": None}]
        return [last | {"finish_reason": sequence.stop_reason}]

    def _piece(self, text: str) -> list[dict[str, Any]]:
        piece = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += piece
        return [{"text": piece, "logprobs": None, "finish_reason": None}] if piece else []


class ChatFeed:
    """The chunks of one choice: text and thinking in pieces, calls whole. Calls that could not be read are
    the end of the text, as `to_openai` writes them."""

    def __init__(self, answer: ChatAnswer):
        self.stream, self.stops = ResponseStream(answer.renderer), answer.options.stop
        self.prompt = answer.prompts[0]
        self.fed = self.calls = 0
        self.field, self.waiting, self.is_cut = "content", "", False
        self.has_text, self.unread = False, list[str]()
        self.delta: dict[str, Any] = {"role": "assistant", "content": ""}  # what every stream begins with

    def feed(self, tokens: list[int]) -> list[dict[str, Any]]:
        parts, self.fed = self.stream.feed(tokens[self.fed :]), len(tokens)
        return [_delta(delta) for part in parts for delta in self._deltas(part)]

    def close(self, sequence: SampledSequence) -> list[dict[str, Any]]:
        chunks = self.feed(sequence.tokens)
        chunks += [_delta(delta) for part in self.stream.close() for delta in self._deltas(part)]
        unread = "\n".join([*([""] if self.has_text else []), *self.unread])
        chunks += [_delta(delta) for delta in [*self._pieces("content", unread), *self._rest()]]
        finish = "tool_calls" if self.calls else sequence.stop_reason
        return [*chunks, _delta(self._with_role({})) | {"finish_reason": finish}]

    def _deltas(self, part: Part) -> list[dict[str, Any]]:
        if part["type"] == "thinking":
            return self._pieces("reasoning_content", part["thinking"])
        if part["type"] == "text":
            self.has_text |= bool(part["text"])
            return self._pieces("content", part["text"])
        if part["type"] == "unparsed_tool_call":
            self.unread.append(part["text"])
            return []
        call = {"index": self.calls} | openai_call(_with_id(part, self.prompt))
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
