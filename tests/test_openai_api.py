"""The OpenAI-compatible endpoint, asked by the `openai` package and by hand."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import ModelInput, SampledSequence, SampleResponse, SamplingParams
from posttrain.renderers import get_renderer
from posttrain.renderers.turns import decode
from posttrain.serve import openai_api, openai_requests
from posttrain.serve.guard import Guard
from posttrain.serve.local_server import LocalServer
from posttrain.serve.openai_answers import ChatAnswer, ChatFeed
from posttrain.serve.openai_api import OnTokens, ServedModel, no_endpoint, openai_routes
from posttrain.serve.openai_requests import Options
from tests.conftest import rounded
from tests.processes import PATIENCE, wait_until

CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hällo 🙂"}]


class Table(dict[str, ServedModel]):
    def names(self) -> list[str]:
        return list(self)

    async def open(self, name: str, request: object) -> ServedModel | None:
        return self.get(name)


@pytest.fixture(scope="module")
def models() -> Iterator[Table]:
    with ServiceClient(BackendConfig(engine="torch")) as service:
        client = service.create_sampling_client(base_model="tiny")
        tokenizer = client.get_tokenizer()
        names = {"tiny": None, "tiny-colon": "role_colon"}
        yield Table({name: ServedModel(client, get_renderer(kind, tokenizer)) for name, kind in names.items()})


@pytest.fixture(scope="module")
def server(models: Table) -> Iterator[str]:
    with LocalServer(Starlette(routes=openai_routes(models))) as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server, api_key="none", max_retries=0)


def post(url: str, fields: dict[str, Any]) -> httpx.Response:
    return httpx.post(url, json={"model": "tiny"} | fields, timeout=PATIENCE)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-colon"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("name", ["tiny", "tiny-colon"])
def test_chat_is_what_the_sampling_client_samples(client: openai.OpenAI, models: Table, name: str) -> None:
    model = models[name]
    answer = client.chat.completions.create(model=name, messages=CHAT, n=2, seed=7, max_tokens=12)
    prompt = model.renderer.build_generation_prompt([{"role": m["role"], "content": m["content"]} for m in CHAT])
    params = SamplingParams(max_tokens=12, seed=7, stop=model.renderer.get_stop_sequences())
    expected = model.client.sample(prompt, 2, params).result().sequences
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, sequence in zip(answer.choices, expected, strict=True):
        assert choice.message.content == model.renderer.parse_response(sequence.tokens)[0]["content"]
        assert choice.finish_reason == sequence.stop_reason
    tokens = sum(len(sequence.tokens) for sequence in expected)
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt.length, tokens)


def test_a_stream_says_what_an_answer_says(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {
        "model": "tiny",
        "messages": CHAT,
        "n": 2,
        "seed": 3,
        "max_tokens": 60,
        "stop": ["e", "Q"],
    }
    whole = client.chat.completions.create(**wanted)
    chunks = list(client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    for i, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == i]
        assert "".join(chunk.delta.content or "" for chunk in mine) == choice.message.content
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert mine[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    texts = client.completions.create(model="tiny", prompt="abc", seed=3, max_tokens=30, stream=True)
    together = client.completions.create(model="tiny", prompt="abc", seed=3, max_tokens=30)
    assert "".join(chunk.choices[0].text for chunk in texts) == together.choices[0].text


class Halting(ServedModel):
    """Goes on after its first tokens when these have been read."""

    read: ClassVar[threading.Event] = threading.Event()

    async def sample(self, prompt: list[int], n: int, params: SamplingParams, on_tokens: OnTokens) -> SampleResponse:
        on_tokens(0, [65, 66])
        assert await asyncio.to_thread(self.read.wait, PATIENCE)
        return SampleResponse([SampledSequence([65, 66, 67], [0.0] * 3, "length")])


def test_a_stream_comes_while_it_is_sampled(models: Table) -> None:
    halting = Halting(models["tiny"].client, models["tiny"].renderer)
    with LocalServer(Starlette(routes=openai_routes(Table(halting=halting)))) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        texts = []
        for chunk in client.completions.create(model="halting", prompt="abc", stream=True):
            texts.append(chunk.choices[0].text)
            halting.read.set()
    assert len(texts) > 1 and "".join(texts) == decode(models["tiny"].renderer.tokenizer, [65, 66, 67])


def test_stops_end_the_text_and_are_not_in_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="abc", seed=1, max_tokens=40).choices[0].text
    stop = free[6:8]
    cut = client.completions.create(model="tiny", prompt="abc", seed=1, max_tokens=40, stop=stop).choices[0]
    assert cut.text == free[: free.index(stop)] and cut.finish_reason == "stop"


CALL = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
ADD: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


class Scripted(ServedModel):
    """Writes CALL, in pieces, and keeps the prompt."""

    prompts: ClassVar[list[str]] = []

    async def sample(self, prompt: list[int], n: int, params: SamplingParams, on_tokens: OnTokens) -> SampleResponse:
        self.prompts.append(decode(self.renderer.tokenizer, prompt))
        tokens = self.renderer.tokenizer.encode(CALL + "<|im_end|>")
        for length in range(5, len(tokens), 5):
            on_tokens(0, tokens[:length])
            for _ in range(20):  # turns of the loop, in which the tokens are sent
                await asyncio.sleep(0)
        return SampleResponse([SampledSequence(tokens, [0.0] * len(tokens), "stop")])


def test_tool_calls_whole_and_in_a_stream(models: Table) -> None:
    script = Scripted(models["tiny"].client, models["tiny"].renderer)
    with LocalServer(Starlette(routes=openai_routes(Table(script=script)))) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        conversation = [*CHAT]
        choice = client.chat.completions.create(model="script", messages=conversation, tools=[ADD]).choices[0]
        chunks = list(client.chat.completions.create(model="script", messages=CHAT, tools=[ADD], stream=True))
        conversation += [choice.message.model_dump(), {"role": "tool", "tool_call_id": "call00001", "content": "3"}]
        client.chat.completions.create(model="script", messages=conversation, tools=[ADD])
        untooled = client.chat.completions.create(model="script", messages=CHAT, tools=[ADD], tool_choice="none")
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 1, "b": 2}
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert len(deltas) > 3 and "".join(delta.content or "" for delta in deltas) == "Let me see."
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert streamed.function and streamed.function.model_dump() == call.function.model_dump() and streamed.id == call.id
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert '"name": "add"' in script.prompts[0] and '"name": "add"' not in script.prompts[-1]
    assert CALL in script.prompts[2] and "<tool_response>\n3" in script.prompts[2]  # the call as the model writes it
    assert untooled.choices[0].message.content


@pytest.mark.parametrize("stop", [[], ["Stop", "bad"]])
@pytest.mark.parametrize(
    "text",
    [
        "Let me see.\n<tool_call>\n{bad\n</tool_call>",
        "<tool_call>\n{bad\n</tool_call>\nand <tool_call>\nworse\n</tool_call> then",
        f"{CALL}\n<tool_call>\n[1]\n</tool_call>Stop it. And",
        "Let me see.\n\n<tool_call>\n{Sto",
        "text\n",
        "",
    ],
)
def test_a_stream_tells_what_a_whole_answer_tells(models: Table, text: str, stop: list[str]) -> None:
    model = models["tiny"]
    options = Options("m", 1, stop, 1.0, 1.0, -1, 64, None, True, False, None)
    answer = ChatAnswer(model, options, [[1]], None, renderer=model.renderer)
    tokens = model.renderer.tokenizer.encode(text + "<|im_end|>")
    sequence = SampledSequence(tokens, [0.0] * len(tokens), "stop")
    whole = asyncio.run(answer.choice(0, sequence))
    feed = ChatFeed(answer)
    chunks = [chunk for n in range(len(tokens)) for chunk in feed.feed(tokens[:n])] + feed.close(sequence)
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == (whole["message"]["content"] or "")
    assert [call["function"] for delta in deltas for call in delta.get("tool_calls", ())] == [
        call["function"] for call in whole["message"].get("tool_calls", ())
    ]


def test_prompts_in_all_their_forms(client: openai.OpenAI, models: Table) -> None:
    tokens = models["tiny"].renderer.tokenizer.encode("abc")
    wanted: dict[str, Any] = {"model": "tiny", "seed": 1, "max_tokens": 5}
    texts = [
        [choice.text for choice in client.completions.create(prompt=prompt, **wanted).choices]
        for prompt in ("abc", ["abc"], tokens, [tokens, tokens], ["abc", "abc"])
    ]
    assert {text for choices in texts for text in choices} == {texts[0][0]} and len(texts[3]) == 2
    numbered = client.completions.create(prompt=["abc", "x"], n=2, **wanted).choices
    assert [choice.index for choice in numbered] == [0, 1, 2, 3] and numbered[0].text == texts[0][0]


def test_logprobs_are_the_models(client: openai.OpenAI, models: Table) -> None:
    """Also of the prompt (echo), which is how evaluation harnesses score given answers."""
    policy, tokenizer = models["tiny"].client, models["tiny"].renderer.tokenizer
    answer = client.completions.create(
        model="tiny", prompt="2+2=4", echo=True, max_tokens=1, logprobs=3, temperature=0.5, seed=0
    ).choices[0]
    assert answer.logprobs and answer.logprobs.token_logprobs and answer.logprobs.top_logprobs
    prompt = tokenizer.encode("2+2=4")
    params = SamplingParams(max_tokens=1, seed=0, temperature=0.5)
    tokens = prompt + policy.sample(ModelInput.from_ints(prompt), 1, params).result().sequences[0].tokens
    expected: Any = policy.compute_logprobs(ModelInput.from_ints(tokens)).result()
    assert answer.logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(answer.logprobs.token_logprobs[1:], expected[1:], atol=rounded(1e-4))
    assert answer.logprobs.text_offset == list(range(6))
    for t in range(1, 6):
        top = answer.logprobs.top_logprobs[t]
        assert len(top) == 3 and max(top.values()) >= expected[t] - 1e-4  # type: ignore[operator]
    only_scored = client.completions.create(model="tiny", prompt="2+2=4", echo=True, max_tokens=0, logprobs=0)
    scores = only_scored.choices[0].logprobs
    assert scores and scores.token_logprobs and len(scores.token_logprobs) == 5 and scores.top_logprobs is None
    chat = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
        temperature=0,
    ).choices[0]
    assert chat.logprobs and chat.logprobs.content and len(chat.logprobs.content) == 4
    for entry in chat.logprobs.content:  # greedy: the most likely token
        assert len(entry.top_logprobs) == 2 and math.isclose(entry.logprob, entry.top_logprobs[0].logprob, abs_tol=1e-4)
        assert entry.token == entry.top_logprobs[0].token


# Trap: lm-evaluation-harness, whose greedy tokens are those with the logprob of the largest, to the bit (0 of
# LAMBADA's words were), and whose full windows leave room for one token.
def test_a_harness_scores_a_prompt_that_fills_the_context(client: openai.OpenAI, models: Table) -> None:
    policy, length, complete = models["tiny"].client, models["tiny"].max_length, cast(Any, client.completions.create)
    start = ModelInput.from_ints([65, 66, 67])
    greedy = policy.sample(start, 1, SamplingParams(max_tokens=length, temperature=0.0, stop=[])).result().sequences[0]
    prompt = [65, 66, 67, *greedy.tokens][: length - 1]
    for tokens in (prompt[:40], prompt):
        asked = {"prompt": [tokens], "logprobs": 1, "max_tokens": 1, "echo": True, "temperature": 0, "seed": 1234}
        scored = complete(model="tiny", **asked).choices[0].logprobs
        assert len(scored.token_logprobs) == len(scored.top_logprobs) == len(tokens) + 1
        expected: Any = policy.compute_logprobs(ModelInput.from_ints(tokens)).result()
        np.testing.assert_allclose(scored.token_logprobs[1:-1], expected[1:], atol=rounded(1e-4))
        pairs = [*zip(scored.token_logprobs, scored.top_logprobs, strict=True)][3:]
        assert all(logprob == max(top.values()) for logprob, top in pairs)
    assert scored.token_logprobs[-1] == pytest.approx(greedy.logprobs[length - 4], abs=rounded(1e-4))
    for more in ({"temperature": 1}, {"logprobs": 2}):
        with pytest.raises(openai.BadRequestError, match="logprobs take one more"):
            complete(model="tiny", **asked | more)


def test_an_answer_with_logprobs_may_fill_the_context(client: openai.OpenAI, models: Table) -> None:
    prompt = [65] * (models["tiny"].max_length - 3)
    answer = client.completions.create(model="tiny", prompt=prompt, logprobs=0, max_tokens=2, seed=0).choices[0]
    assert answer.logprobs and answer.logprobs.token_logprobs and len(answer.logprobs.token_logprobs) <= 2


LONG = {"messages": [{"role": "user", "content": "x" * 600}]}
BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-4"}, 404, "model", "there is no model 'gpt-4' here; this server has tiny"),
    ({"model": None}, 400, "model", "model is missing"),
    ({"messages": []}, 400, "messages", "at least one"),
    ({"messages": "hi"}, 400, "messages", "must be a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "'image_url'"),
    ({"messages": [{"content": "x"}]}, 400, "messages", "a role"),
    ({"n": 0}, 400, "n", "from 1 to 128"),
    ({"n": 1.5}, 400, "n", "a whole number"),
    ({"temperature": "hot"}, 400, "temperature", "a number"),
    ({"temperature": 3}, 400, "temperature", "from 0 to 2"),
    ({"top_p": 0}, 400, "top_p", "from 1e-06 to 1"),
    ({"max_tokens": True}, 400, "max_tokens", "a whole number"),
    ({"max_tokens": 10**6}, 400, "prompt", "this model's maximum context length is 512 tokens"),
    (LONG, 400, "prompt", "the prompt is too long: this model's maximum context length is 512 tokens"),
    ({"stop": [""]}, 400, "stop", "none of them empty"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not offered"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "needs a 'name'"),
    ({"tools": [ADD], "tool_choice": "required"}, 400, "tool_choice", "free to choose"),
    ({"tools": [ADD], "model": "tiny-colon"}, 400, None, "cannot write tools"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages", "tool_calls[0]"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "not offered"),
    ({"max_tokens": -1}, 400, "max_tokens", "must be at least 1"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort", "not offered"),
    ({"tools": [ADD], "parallel_tool_calls": False}, 400, "parallel_tool_calls", "not offered"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages", "{'role': 'user', 'content': 5}"),
    ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'?"),
    ({"stream": True, "max_tokens": 10**6}, 400, "prompt", "this model's maximum context length is 512 tokens"),
]


@pytest.mark.parametrize(("fields", "status", "param", "says"), BAD, ids=[str(case[0])[:40] for case in BAD])
def test_bad_requests_are_refused_with_the_field(
    server: str, fields: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    answer = post(f"{server}/chat/completions", {"messages": CHAT} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and says in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(server: str) -> None:
    nothing = {
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "tools": [],
        "user": "me",
        "response_format": {"type": "text"},
        "parallel_tool_calls": False,  # of no tools
        "prompt_cache_retention": "24h",
        "repetition_penalty": 1.0,
    }
    assert post(f"{server}/chat/completions", {"messages": CHAT, "max_tokens": 1} | nothing).status_code == 200


def test_bodies_that_are_no_json(server: str) -> None:
    url, json_type = f"{server}/chat/completions", {"content-type": "application/json"}
    half = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'  # of a surrogate pair
    for body in (b"", b"[1]", b"{", b'{"temperature": NaN}', b"[" * 100_000, half):
        assert httpx.post(url, content=body, headers=json_type).json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(url, content=b" " * (17 * 2**20), headers=json_type).status_code == 413
    tokens = post(f"{server}/completions", {"prompt": [1, 10**9], "max_tokens": 1})
    assert tokens.status_code == 400 and "vocabulary" in tokens.json()["error"]["message"]


def test_many_at_once_and_a_client_that_hangs_up(server: str, models: Table) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server, api_key="none", max_retries=0) as client:
            impatient = client.with_options(timeout=0.05)
            with pytest.raises(openai.APITimeoutError):
                await impatient.completions.create(model="tiny", prompt="abc", n=64, max_tokens=500)
            answers = await asyncio.gather(
                *(client.completions.create(model="tiny", prompt="abc", seed=i, max_tokens=8) for i in range(50))
            )
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(ask())
    policy = models["tiny"].client
    prompt = ModelInput.from_ints(policy.get_tokenizer().encode("abc"))
    for i in (0, 17, 49):
        tokens = policy.sample(prompt, 1, SamplingParams(max_tokens=8, seed=i)).result().sequences[0].tokens
        assert texts[i].startswith(decode(policy.get_tokenizer(), tokens).split("<|")[0])
    wait_until(lambda: policy._engine.num_in_flight == 0)


class Waiting(ServedModel):
    """Waits for its turn before the first token."""

    began: ClassVar[threading.Event] = threading.Event()
    cancelled: ClassVar[threading.Event] = threading.Event()

    async def sample(self, prompt: list[int], n: int, params: SamplingParams, on_tokens: OnTokens) -> SampleResponse:
        self.began.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.cancelled.set()
        raise AssertionError


def test_a_stream_that_is_given_up_before_its_first_token_frees_its_place(models: Table) -> None:
    waiting = Waiting(models["tiny"].client, models["tiny"].renderer)
    with LocalServer(Starlette(routes=openai_routes(Table(waiting=waiting)))) as running:
        address = urlsplit(running.url)
        connection = HTTPConnection(str(address.hostname), address.port)
        ask = json.dumps({"model": "waiting", "prompt": "a", "stream": True})
        connection.request("POST", "/v1/completions", ask, {"content-type": "application/json"})
        assert waiting.began.wait(PATIENCE)
        connection.close()
        assert waiting.cancelled.wait(PATIENCE)


# Trap: requests beyond counting, or a body of 16 MiB in each.
def test_a_request_that_finds_no_room_is_told_to_come_again(models: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "MOST_OPEN", 2)
    go, fields = threading.Event(), {"model": "held", "prompt": "1+1=", "max_tokens": 1}

    class Held(ServedModel):
        async def sample(
            self, prompt: list[int], n: int, params: SamplingParams, on_tokens: OnTokens
        ) -> SampleResponse:
            await asyncio.to_thread(go.wait, PATIENCE)
            return SampleResponse([SampledSequence([97], [0.0], "stop")])

    held = Table(held=Held(models["tiny"].client, models["tiny"].renderer))
    with LocalServer(Starlette(routes=openai_routes(held))) as running, ThreadPoolExecutor(2) as two:
        url = f"{running.url}/v1/completions"
        asked = [two.submit(post, url, fields | {"stream": stream}) for stream in (False, True)]
        refused: list[httpx.Response] = []
        wait_until(lambda: (refused.append(post(url, {})) or refused[-1].status_code) == 429)
        assert refused[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert httpx.get(f"{running.url}/v1/models", timeout=PATIENCE).status_code == 200
        go.set()
        assert [answer.result().status_code for answer in asked] == [200, 200]
        wait_until(lambda: post(url, fields).status_code == 200)  # both places are free
        monkeypatch.setattr(openai_api, "MOST_OPEN_BYTES", 10)
        assert post(url, fields).status_code == 429
        # Trap: a length that nobody reads takes the room of many
        monkeypatch.setattr(openai_api, "MOST_OPEN_BYTES", 1000)
        for module in (openai_api, openai_requests):
            monkeypatch.setattr(module, "MAX_BODY_BYTES", 999)
        assert post(url, fields | {"prompt": "1" * 2000}).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/chat/completions", 404),  # a base URL without /v1
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
    ],
)
def test_what_is_not_offered_is_told_in_openais_shape(models: Table, method: str, path: str, status: int) -> None:
    routes = openai_routes(models)

    async def body() -> httpx.Response:
        app = Starlette(routes=routes, exception_handlers={HTTPException: no_endpoint})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path)

    response = asyncio.run(body())
    error = response.json()["error"]
    assert response.status_code == status and error["type"] == "invalid_request_error"
    assert f"no {method} {path}; its OpenAI endpoints are" in error["message"]


def test_a_server_with_a_key_answers_in_openais_shape(models: Table) -> None:
    app = Guard(Starlette(routes=openai_routes(models)), api_key="tml-secret")
    with LocalServer(app) as running:
        right, wrong = (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) for key in ("tml-secret", "tml-x")
        )
        assert right.models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError, match="wrong or missing API key") as caught:
            wrong.models.list()
        assert caught.value.type == "invalid_request_error"


def test_a_request_that_the_servers_end_cuts_off_is_no_fault_of_it() -> None:
    # Trap: programs show the kind of an error; this one was "invalid_request_error"
    async def cut_off(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(cut_off))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/v1/completions", json={})

    response = asyncio.run(ask())
    assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"
