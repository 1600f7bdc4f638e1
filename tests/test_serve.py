"""The endpoints of the Tinker protocol's server, through an ASGI client. The SDK itself is in test_serve_sdk.py."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.serve import app as app_module
from posttrain.serve import guard, wire
from posttrain.serve.app import create_app
from posttrain.serve.bases import open_bases
from posttrain.serve.state import Limits, State
from posttrain.serve.store import Store
from tests.conftest import rounded
from tests.tinker_messages import TOKENS, datum, pass_body


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient(BackendConfig(engine="torch"), tmp_path_factory.mktemp("unused")) as opened:
        yield opened


class Http:
    """An HTTP client of an application in this process."""

    def __init__(self, app: Any, **headers: str):
        transport = httpx.ASGITransport(app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)

    async def call(self, path: str, method: str = "POST", /, **body: Any) -> httpx.Response:
        content = json.dumps(body) if method in ("POST", "PUT") else None
        headers = {"content-type": "application/json"} if content else {}
        return await self._client.request(method, f"/api/v1/{path}", content=content, headers=headers)

    async def send(self, content: bytes) -> httpx.Response:
        headers = {"content-type": "application/x-protobuf"}
        return await self._client.post("/api/v1/forward_backward", content=content, headers=headers)

    async def result(self, response: httpx.Response) -> httpx.Response:
        """What retrieve_future answers for an accepted request."""
        assert response.status_code == 200, response.text
        number = response.json()["request_id"]
        # 408 is to try again, as clients do: a loaded machine takes longer than one poll
        while (answer := await self.call("retrieve_future", request_id=number)).status_code == 408:
            pass
        assert answer.status_code == 200, answer.text
        return answer

    async def model(self, **lora: Any) -> str:
        """A new session's model 0."""
        session = (await self.call("create_session", sdk_version="0.38.0")).json()["session_id"]
        created = await self.call("create_model", session_id=session, model_seq_id=0, base_model="m", lora_config=lora)
        return (await self.result(created)).json()["model_id"]


async def until(holds: Callable[[], object]) -> None:
    """For what happens in another thread, or in a task of the application."""
    while not holds():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)


def app_test(test: Callable[[Http, State], Awaitable[None]]) -> Callable[..., None]:
    """Runs a test with an application that serves `micro` as "m"."""

    def run(service: ServiceClient, tmp_path: Path) -> None:
        async def body() -> None:
            bases = open_bases(["m=micro"], None)
            state = State(service, bases, Store(tmp_path))
            await test(Http(create_app(state)), state)
            for session_id in [*state.sessions]:
                state.end_session(session_id)
            await state.requests.close()

        asyncio.run(body())

    run.__name__, run.__doc__ = test.__name__, test.__doc__  # type: ignore[attr-defined]
    return run


def pass_output(response: httpx.Response) -> Any:
    assert response.headers["content-type"] == "application/x-protobuf", response.text
    return wire.MESSAGES["ForwardBackwardOutput"].FromString(response.content)


def loss(response: httpx.Response) -> float:
    return pass_output(response).metrics["loss:sum"]


@app_test
async def test_a_model_trains_and_its_requests_run_in_the_order_of_their_numbers(http: Http, state: State) -> None:
    # Trap: the SDK sends chunks in parallel and the first one last, after the others were answered
    model_id = await http.model(rank=4, seed=1)
    step = {"adam_params": {"learning_rate": 0.01}}
    third = await http.send(pass_body(model_id, 3, [datum()], forward_only=True))
    second = await http.call("optim_step", model_id=model_id, seq_id=2, **step)
    first = await http.send(pass_body(model_id, 1, [datum()]))
    before, metrics, after = [await http.result(response) for response in (first, second, third)]
    assert loss(after) < loss(before)
    assert metrics.json()["metrics"]["grad_norm"] > 0
    again = await http.send(pass_body(model_id, 1, [datum()]))
    assert again.json() == first.json()  # the same request, which acts once


@app_test
async def test_a_refused_pass_is_the_error_of_its_step_and_of_no_other(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    bad = await http.send(pass_body(model_id, 1, [{**datum(), "target_tokens": [999] * 5}]))
    step = await http.call("optim_step", model_id=model_id, seq_id=2)
    image = wire.MESSAGES["ForwardBackwardRequest"].FromString(pass_body(model_id, 3, [datum()]))
    image.data[0].model_input.add().image = b"png"
    unreadable = await http.send(image.SerializeToString())
    step_after = await http.call("optim_step", model_id=model_id, seq_id=4)
    texts = [(await http.result(response)).json() for response in (bad, step, unreadable, step_after)]
    assert [text["category"] for text in texts] == ["user"] * 4
    assert "vocabulary" in texts[0]["error"] and texts[1]["error"] == texts[0]["error"]
    assert "image" in texts[2]["error"] and texts[3]["error"] == texts[2]["error"]
    good = await http.send(pass_body(model_id, 5, [datum()]))
    assert loss(await http.result(good)) > 0
    adam = await http.call("optim_step", model_id=model_id, seq_id=6, adam_params={"learning_rate": -1})
    assert "learning_rate" in (await http.result(adam)).json()["error"]


@app_test
async def test_a_number_that_never_comes_blocks_for_a_while_only(http: Http, state: State) -> None:
    state.limits = Limits(gap_seconds=0.3)
    model_id = await http.model(rank=4)
    lost = await http.result(await http.call("optim_step", model_id=model_id, seq_id=2))
    assert "request 1 of this model did not arrive" in lost.json()["error"]
    good = await http.send(pass_body(model_id, 3, [datum()]))
    assert loss(await http.result(good)) > 0


@app_test
async def test_a_loss_without_a_formula_is_refused_or_substituted_by_name(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    rl = {**datum(), "logprobs": [-1.0] * 5, "advantages": [1.0] * 5}
    refused = await http.result(await http.send(pass_body(model_id, 1, [rl], "stable_reinforce")))
    assert "loss_fn=importance_sampling" in refused.json()["error"]
    state.substitutes["stable_reinforce"] = "importance_sampling"
    wanted = await http.result(await http.send(pass_body(model_id, 2, [rl], "importance_sampling", True)))
    given = await http.result(await http.send(pass_body(model_id, 3, [rl], "stable_reinforce", True)))
    assert loss(given) == loss(wanted)


@app_test
async def test_checkpoints_are_listed_continued_and_deleted(http: Http, state: State) -> None:
    model_id = await http.model(rank=4, seed=1)
    await http.result(await http.send(pass_body(model_id, 1, [datum()])))
    await http.result(await http.call("optim_step", model_id=model_id, seq_id=2))
    saved = await http.call("save_weights", model_id=model_id, seq_id=3, path="a", user_metadata={"k": "v"})
    path = (await http.result(saved)).json()["path"]
    assert path == f"tinker://{model_id}/weights/a"
    taken = await http.call("save_weights", model_id=model_id, seq_id=4, path="a")
    assert "exists" in (await http.result(taken)).json()["error"]
    session = model_id.split(":")[0]
    loaded = await http.call("load_weights", session_id=session, model_seq_id=1, path=path, optimizer=True)
    other = (await http.result(loaded)).json()["model_id"]
    assert other == f"{session}:train:1"
    losses = []
    for model, seq_id in ((model_id, 5), (other, 1)):
        losses.append(loss(await http.result(await http.send(pass_body(model, seq_id, [datum()], forward_only=True)))))
    assert losses[0] == losses[1]

    record = (await http.call("checkpoints", "GET")).json()["checkpoints"][0]
    assert (record["checkpoint_id"], record["tinker_path"], record["user_metadata"]) == ("weights/a", path, {"k": "v"})
    place = f"training_runs/{model_id}/checkpoints/weights/a"
    assert (await http.call(f"{place}/ttl", "PUT", ttl_seconds=60)).status_code == 204
    assert (await http.call(f"{place}/ttl", "PUT", ttl_seconds=-1)).status_code == 400
    assert (await http.call(f"{place}/publish")).status_code == 204
    restarted = Store(state.store.root).find(path)
    assert restarted.public and restarted.expires_at is not None and restarted.run.base_model == "m"
    info = (await http.call("weights_info", tinker_path=path)).json()
    assert (info["base_model"], info["lora_rank"], info["train_unembed"]) == ("m", 4, False)
    urls = (await http.call(f"{place}/external_weights_urls", "GET")).json()["urls"]
    fetched = await http._client.get(urls["adapter_model.safetensors"])
    assert fetched.status_code == 200 and len(fetched.content) > 1000
    assert (await http.call(place, "DELETE")).status_code == 204
    assert (await http.call(place, "DELETE")).status_code == 404
    gone = await http.call("load_weights", session_id=session, model_seq_id=2, path=path)
    assert gone.status_code == 404 and "there is no checkpoint" in gone.json()["detail"]


@app_test
async def test_a_snapshot_answers_with_its_own_weights(http: Http, state: State) -> None:
    model_id = await http.model(rank=4, seed=1)
    session = model_id.split(":")[0]
    made = await http.call("save_weights_for_sampler", model_id=model_id, seq_id=1, sampling_session_seq_id=7)
    sampler = (await http.result(made)).json()["sampling_session_id"]
    assert sampler == f"{session}:sample:7"
    again = await http.call("save_weights_for_sampler", model_id=model_id, seq_id=1, sampling_session_seq_id=8)
    assert again.json() == made.json()  # Trap: the SDK counts that number up at every attempt
    prompt = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
    options = {"prompt": prompt, "sampling_params": {"max_tokens": 3, "seed": 1}, "prompt_logprobs": True}
    asked = await http.call("asample", sampling_session_id=sampler, seq_id=1, num_samples=2, **options)
    assert len(set(asked.json()["sample_sequence_ids"])) == 2
    repeated = await http.call("asample", sampling_session_id=sampler, seq_id=1, num_samples=2, **options)
    assert repeated.json() == asked.json()
    response = wire.MESSAGES["SampleResponse"].FromString((await http.result(asked)).content)
    assert [len(sequence.tokens) // 4 for sequence in response.sequences] == [3, 3]
    sampled = np.frombuffer(response.prompt_logprobs, "<f4")[1:]
    trained = pass_output(await http.result(await http.send(pass_body(model_id, 2, [datum()], forward_only=True))))
    logprobs = np.frombuffer(trained.loss_fn_outputs[0].fields["logprobs"].data, "<f4")
    np.testing.assert_allclose(sampled, logprobs, atol=rounded(1e-4))
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    polled = (await http.call("retrieve_futures", target=target, timeout=0)).json()
    assert [(c["state"], c["request_id"]) for c in polled["completions"]] == [("finished", asked.json()["request_id"])]
    later = (await http.call("retrieve_futures", target=target, timeout=0, prev_cursor=polled["cursor"])).json()
    assert later == {"completions": [], "cursor": polled["cursor"]}
    await http.call(f"sessions/{session}/finish", reason={"type": "success"})
    gone = await http.call("asample", sampling_session_id=sampler, seq_id=2, **options)
    assert gone.status_code == 404 and "ended" in gone.json()["detail"]


@app_test
async def test_a_session_without_heartbeats_frees_its_models(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    state.sessions[model_id.split(":")[0]].last_seen -= 1000
    waiting = await http.call("optim_step", model_id=model_id, seq_id=2)
    state.sweep()
    assert not state.models and not state.sessions
    assert "session" in (await http.result(waiting)).json()["error"]
    assert (await http.call("get_info", model_id=model_id)).status_code == 404


@app_test
async def test_more_requests_than_the_server_keeps_are_for_later(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    state.limits = Limits(pending_bytes=10)
    assert (await http.send(pass_body(model_id, 1, [datum()]))).status_code == 429
    state.limits = Limits()
    assert loss(await http.result(await http.send(pass_body(model_id, 1, [datum()])))) > 0


@app_test
async def test_a_compressed_pass_is_read_within_a_number_of_bytes(http: Http, state: State) -> None:
    # Trap: a bomb, which is small until it is decompressed
    model_id = await http.model(rank=4)
    body, compress = pass_body(model_id, 1, [datum()]), pyarrow.Codec("zstd").compress
    answers = []
    bomb = compress(b"0" * (guard.MOST_BODY_BYTES + 1), asbytes=True)
    for content, encoding in ((bomb, "zstd"), (body, "zstd"), (body, "gzip"), (compress(body, asbytes=True), "zstd")):
        headers = {"content-type": "application/x-protobuf", "content-encoding": encoding}
        answers.append(await http._client.post("/api/v1/forward_backward", content=content, headers=headers))
    texts = ["64 MiB once", "not zstd", "content-encoding 'gzip'"]
    assert [a.status_code for a in answers] == [400, 400, 400, 200]
    assert all(text in answer.json()["detail"] for text, answer in zip(texts, answers, strict=False))
    assert loss(await http.result(answers[3])) > 0


def sample_of(sampler: str, seq_id: int, **options: Any) -> dict[str, Any]:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
    params = {"max_tokens": 3, "seed": 1, "stop": []}
    body = {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt, "sampling_params": params}
    return {**body, **options}


async def base_sampler(http: Http) -> str:
    session = (await http.call("create_session")).json()["session_id"]
    asked = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "m"}
    return (await http.call("create_sampling_session", **asked)).json()["sampling_session_id"]


@app_test
async def test_other_tokens_of_a_prompt_come_back_in_the_form_they_were_asked_for_in(http: Http, state: State) -> None:
    sampler = await base_sampler(http)
    dense = {"data": [*range(10, 15), *[-1] * 5], "dtype": "int64", "shape": [5, 2]}
    sparse = {
        "data": [10, 11],
        "dtype": "int64",
        "shape": [5, 2],
        "sparse_crow_indices": [0, 1, 1, 2, 2, 2],
        "sparse_col_indices": [0, 1],
    }
    tensors = []
    for number, target in enumerate((dense, sparse)):
        body = sample_of(sampler, number, target_prompt_logprobs=target, prompt_alt_tokens_k=3)
        answer = await http.result(await http.call("asample", **body))
        message = wire.MESSAGES["SampleResponse"].FromString(answer.content)
        assert [*message.target_prompt_logprobs.shape] == [5, 2]
        assert [*message.prompt_alt_tokens.tokens.shape] == [*message.prompt_alt_tokens.logprobs.shape] == [5, 3]
        tensors.append(message.target_prompt_logprobs)
    whole = np.frombuffer(tensors[0].dense, "<f4").reshape(5, 2)
    assert (whole.flat[:5] < 0).all() and (whole.flat[5:] == 0).all()  # 0.0 where the request has -1
    csr = tensors[1].sparse_csr
    assert np.frombuffer(csr.values, "<f4")[0] == whole[0, 0] and len(csr.values) == 8
    assert np.frombuffer(csr.crow_indices, "<i8").tolist() == sparse["sparse_crow_indices"]
    for target, text in (
        ({**dense, "shape": [2, 5]}, "target_prompt_logprobs"),
        ({**dense, "data": ["x"]}, "whole numbers"),
        ({**dense, "shape": [3, 3]}, "whole numbers"),
        ({**sparse, "sparse_col_indices": [0, 2]}, "outside its shape"),
        ({**dense, "data": [5000] * 10}, "vocabulary"),
    ):
        number += 1
        response = await http.call("asample", **sample_of(sampler, number, target_prompt_logprobs=target))
        text_found = response.text if response.status_code == 400 else (await http.result(response)).text
        assert text in text_found, (target, text_found)


@app_test
async def test_copies_of_a_sampling_client_are_numbered(http: Http, state: State) -> None:
    sampler = await base_sampler(http)
    joined = [await http.call("join_sampling_session", sampling_session_id=sampler) for _ in range(2)]
    assert [answer.json()["client_counter"] for answer in joined] == [1, 2]
    assert (await http.call("join_sampling_session", sampling_session_id="x")).status_code == 404
    # Trap: numbers of copies need 64 bits
    asked = await http.call("asample", **sample_of(sampler, 7_000_000_002))
    await http.result(asked)
    target = {"type": "sampling_session", "sampling_session_id": sampler}
    for clone, count in ((7, 1), (0, 0)):
        polled = await http.call("retrieve_futures", target={**target, "cloned_sampler_id": clone}, timeout=0)
        assert len(polled.json()["completions"]) == count


@app_test
async def test_a_cancelled_sample_gives_its_place_back(http: Http, state: State) -> None:
    sampler = await base_sampler(http)
    await http.result(await http.call("asample", **sample_of(sampler, 0)))
    engine = state.samplers[sampler].opened.result()._engine
    long = {"max_tokens": 400, "seed": 1, "stop": []}
    begun = [await http.call("asample", **sample_of(sampler, i, num_samples=64, sampling_params=long)) for i in (1, 2)]
    await until(lambda: engine.num_in_flight)
    ids = [answer.json()["request_id"] for answer in begun]
    for request_id in (*ids, "unknown"):
        assert (await http.call("cancel_future", request_id=request_id)).status_code == 204
    for answer in begun:
        assert "cancelled" in (await http.result(answer)).json()["error"]
    await until(lambda: not engine.num_in_flight)
    assert len(state.requests) == 0
    assert (await http.result(await http.call("asample", **sample_of(sampler, 3)))).status_code == 200


@app_test
async def test_what_is_asked_twice_is_done_once(http: Http, state: State) -> None:
    # Trap: a lost answer leads to the same request again
    key = {"x-idempotency-key": "k", "content-type": "application/json"}
    made = [(await http._client.post("/api/v1/create_session", content="{}", headers=key)).json() for _ in range(2)]
    session = made[0]["session_id"]
    assert made[1]["session_id"] == session
    model = {"session_id": session, "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": 4}}
    created = [(await http.call("create_model", **model)).json() for _ in range(2)]
    assert created[0] == created[1] and len(state.models) == 1
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "m"}
    samplers = [(await http.call("create_sampling_session", **sampler)).json() for _ in range(2)]
    assert samplers[0] == samplers[1] and len(state.samplers) == 1
    save = {"model_id": f"{session}:train:0", "seq_id": 1, "path": "a"}
    saved = [await http.call("save_weights", **save) for _ in range(2)]
    path = (await http.result(saved[1])).json()["path"]  # no "exists"
    load = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
    loaded = [await http.call("load_weights", **load) for _ in range(2)]
    assert loaded[0].json() == loaded[1].json() and len(state.models) == 2
    await http.result(loaded[0])


@app_test
async def test_an_answer_that_is_not_there_is_asked_for_again(http: Http, state: State) -> None:
    # Trap: an immediate 408 makes a busy loop of the client; 409 and 5xx are tried for five minutes
    model_id = await http.model(rank=4)
    waiting = (await http.call("optim_step", model_id=model_id, seq_id=2)).json()["request_id"]  # 1 never comes
    started = asyncio.get_running_loop().time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "POLL_SECONDS", 0.1)
        answer = await http.call("retrieve_future", request_id=waiting)
    assert (answer.status_code, answer.json()["queue_state"]) == (408, "active")
    assert asyncio.get_running_loop().time() - started >= 0.1
    state.end_session(model_id.split(":")[0])
    kept = [await http.call("retrieve_future", request_id=waiting) for _ in range(2)]
    assert kept[0].json() == kept[1].json() and "error" in kept[0].json()  # failed ones are kept, too


@app_test
async def test_external_weights_are_saved_fetched_and_deleted(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    saved = await http.call("save_weights_external", model_id=model_id, seq_id=1, path="out")
    path = (await http.result(saved)).json()["path"]
    assert path == f"tinker://{model_id}/external_weights/out"
    place = f"training_runs/{model_id}/checkpoints/external_weights/out"
    offered = (await http.call(f"{place}/external_weights_urls", "GET")).json()
    assert "adapter_model.safetensors" in offered["urls"] and not any("optimizer" in name for name in offered["urls"])
    url = offered["urls"]["adapter_model.safetensors"]
    assert (await http._client.get(url)).status_code == 200
    for other in ("training_state/optimizer.safetensors", "%2e%2e/out.json", ".."):
        assert (await http._client.get(url.replace("adapter_model.safetensors", other))).status_code in (307, 404)
    assert (await http.call("checkpoints", "GET")).json()["checkpoints"][0]["checkpoint_type"] == "external"
    assert (
        await http.call("load_weights", session_id=model_id.split(":")[0], model_seq_id=1, path=path)
    ).status_code == 400
    assert (await http.call(place, "DELETE")).status_code == 204
    assert (await http._client.get(url)).status_code == 404


@app_test
async def test_openai_clients_sample_from_names_and_paths(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    saved = await http.call("save_weights_for_sampler", model_id=model_id, seq_id=1, path="a")
    path = (await http.result(saved)).json()["path"]
    for name, status in (("m", 200), (path, 200), ("micro", 404), ("tinker://a/weights/b", 404)):
        body = {"model": name, "prompt": "abc", "max_tokens": 2, "seed": 1}
        response = await http._client.post("/v1/completions", json=body)
        assert response.status_code == status, response.text
    assert [card["id"] for card in (await http._client.get("/v1/models")).json()["data"]] == ["m"]


@app_test
async def test_bad_input_is_refused_at_once(http: Http, state: State) -> None:
    session = (await http.call("create_session")).json()["session_id"]
    expected = [
        ("create_model", {"session_id": session, "model_seq_id": 0, "base_model": "/etc"}, 400, "has m"),
        ("create_model", {"session_id": "x", "model_seq_id": 0, "base_model": "m"}, 404, "no session"),
        ("create_model", {"session_id": session, "model_seq_id": "0", "base_model": "m"}, 400, "whole number"),
        ("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0}, 400, "model_path"),
        ("get_info", {"model_id": "x"}, 404, "no model"),
        ("session_heartbeat", {"session_id": "x"}, 410, "ended"),
        ("retrieve_future", {"request_id": "x"}, 410, "no such request"),
        ("optim_step", {"model_id": "x", "seq_id": 0}, 400, "seq_id"),
        ("billing/usage", {}, 404, "no endpoint"),
        ("create_session", {"sdk_version": "0.18.2"}, 400, "0.22.7 to 0.38"),
    ]
    for path, body, status, text in expected:
        response = await http.call(path, **body)
        assert (response.status_code, text in response.json()["detail"]) == (status, True), (path, response.text)
    for path in ("tinker://a/weights/b", "tinker://../weights/b", "/etc/passwd", "file:///etc", "tinker://a/b/c/d"):
        body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        assert (await http.call("create_sampling_session", **body)).status_code in (400, 404), path
    for place in ("x/checkpoints/weights/..%2f..%2fa", "..%2f..%2fetc/checkpoints/weights/passwd"):
        assert (await http.call(f"training_runs/{place}", "DELETE")).status_code == 404
    for content in (b"{", b"[]", b'{"a": NaN}', b'{"display_name": "\\ud800"}', b"[" * 100_000):
        headers = {"content-type": "application/json"}
        response = await http._client.post("/api/v1/create_session", content=content, headers=headers)
        assert response.status_code == 400, content[:20]
