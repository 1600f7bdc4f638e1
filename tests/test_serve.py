"""The server of the Tinker protocol: its codec, its endpoints through an ASGI client, its order. The
SDK itself is in test_serve_sdk.py.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import CheckpointError, ConfigError, DataError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import ForwardBackwardOutput, SampledSequence, SampleResponse, TensorData
from posttrain.serve import app as app_module
from posttrain.serve import guard, wire
from posttrain.serve.app import create_app
from posttrain.serve.bases import open_bases
from posttrain.serve.command import ServeConfig, _joined_models, api_key, substitutes
from posttrain.serve.order import InOrder
from posttrain.serve.requests import Answer, Requests, json_answer
from posttrain.serve.sdk_versions import check_version
from posttrain.serve.state import Limits, State
from posttrain.serve.store import Run, Store

TOKENS = [10, 20, 30, 40, 50, 60]


# --- the codec -----------------------------------------------------------------------------------


def dense(array: Any) -> Any:
    array = np.asarray(array)
    if array.dtype.kind == "f":
        data, dtype = array.astype("<f4").tobytes(), wire.FLOAT32
    else:
        data, dtype = array.astype("<i8").tobytes(), wire.INT64
    return wire.MESSAGES["Tensor"](dense=data, dtype=dtype, shape=array.shape)


def pass_body(
    model_id: str, seq_id: int, data: list[dict[str, Any]], loss_fn: str = "cross_entropy", forward_only: bool = False
) -> bytes:
    """A ForwardBackwardRequest of data with "tokens" and tensors."""
    message = wire.MESSAGES["ForwardBackwardRequest"](
        model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=forward_only
    )
    for fields in data:
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(fields["tokens"], "<i4").tobytes()
        for name, value in fields.items():
            if name != "tokens":
                datum.loss_fn_inputs[name].CopyFrom(dense(value))
    return message.SerializeToString()


def datum(weight: float = 1.0) -> dict[str, Any]:
    return {"tokens": TOKENS[:-1], "target_tokens": TOKENS[1:], "weights": [weight] * (len(TOKENS) - 1)}


def test_a_request_is_read_as_it_was_written() -> None:
    request = wire.read_pass_request(pass_body("m", 3, [datum(0.5)], forward_only=True))
    assert (request.model_id, request.seq_id, request.forward_only, request.fault) == ("m", 3, True, None)
    assert request.data_D[0].model_input.to_ints() == TOKENS[:-1]
    assert request.data_D[0].loss_fn_inputs["target_tokens"] == TensorData(TOKENS[1:])
    assert request.data_D[0].loss_fn_inputs["weights"] == TensorData([0.5] * 5)


def test_numbers_and_texts_of_a_loss_config() -> None:
    message = wire.MESSAGES["ForwardBackwardRequest"](model_id="m", seq_id=1)
    message.loss_fn_config["beta"] = 1.0
    message.loss_fn_config_v2["beta"].number = 2.0
    message.loss_fn_config_v2["kind"].text = "token"
    assert wire.read_pass_request(message.SerializeToString()).loss_fn_config == {"beta": 2.0, "kind": "token"}


def test_sparse_targets_become_dense() -> None:
    message = wire.MESSAGES["ForwardBackwardRequest"](model_id="m", seq_id=1)
    tensor = message.data.add().loss_fn_inputs["weights"]
    dense_NK = np.array([[0.0, 0.5, 0.25], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], "<f4")
    tensor.dtype = wire.FLOAT32
    tensor.shape.extend([3, 3])
    tensor.sparse_csr.values = np.array([0.5, 0.25, 1.0], "<f4").tobytes()
    tensor.sparse_csr.crow_indices = np.array([0, 2, 2, 3], "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array([1, 2, 0], "<i8").tobytes()
    read = wire.read_pass_request(message.SerializeToString())
    assert np.array_equal(read.data_D[0].loss_fn_inputs["weights"].array, dense_NK)
    tensor.sparse_csr.col_indices = np.array([1, 3, 0], "<i8").tobytes()
    assert "outside its shape" in str(wire.read_pass_request(message.SerializeToString()).fault)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dtype", 9), "unknown dtype 9"),
        (lambda m: m.data[0].loss_fn_inputs["weights"].shape.append(3), "its shape is [5, 3]"),
        (lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dense", b"123"), "3 bytes"),
        (lambda m: setattr(m.data[0].model_input.add(), "image", b"png"), "image or audio"),
    ],
)
def test_what_cannot_be_read_is_a_fault_of_the_datum(spoil: Callable[[Any], object], text: str) -> None:
    message = wire.MESSAGES["ForwardBackwardRequest"].FromString(pass_body("m", 1, [datum()]))
    spoil(message)
    fault = wire.read_pass_request(message.SerializeToString()).fault
    assert isinstance(fault, DataError) and text in str(fault) and "datum 0" in str(fault)


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(ValueError, match="not a ForwardBackwardRequest"):
        wire.read_pass_request(b"\xff\xff\xff")


def test_outputs_of_different_widths_go_into_records_of_their_own() -> None:
    arrays = [np.arange(3.0), np.arange(2.0), np.arange(6.0).reshape(3, 2)]
    output = ForwardBackwardOutput(
        [{"logprobs": TensorData(array)} for array in arrays],
        {"loss:sum": 2.0, "loss": 1.0, "a:b:sum": 1.0, "x:odd": 1.0, "nan:mean": float("nan")},
    )
    message = wire.MESSAGES["ForwardBackwardOutput"].FromString(wire.write_pass_output(output))
    assert dict(message.metrics) == {"loss:sum": 2.0}  # Trap: the SDK fails on, or drops, all others
    records = [(record.num_datums, [*record.fields["logprobs"].trailing_shape]) for record in message.loss_fn_outputs]
    assert records == [(2, []), (1, [2])]
    first = message.loss_fn_outputs[0].fields["logprobs"]
    assert np.frombuffer(first.offsets, "<i8").tolist() == [0, 12, 20]  # bytes
    assert np.frombuffer(first.data, "<f4").tolist() == [0, 1, 2, 0, 1]


def test_prompt_logprobs_before_the_last_n_are_absent() -> None:
    response = SampleResponse(
        [SampledSequence([7, 8], [-0.5, -1.0], "length"), SampledSequence([1], [-2.0], "stop")],
        [None, -1.0, -2.0, -3.0],
        [None, [(6, -2.0), (5, -1.0), (7, -3.0)], [(5, -1.0)], [(9, -3.0)]],
    )
    message = wire.MESSAGES["SampleResponse"].FromString(wire.write_sample_response(response, 2, 2))
    assert [sequence.stop_reason for sequence in message.sequences] == [1, 0]
    assert np.frombuffer(message.sequences[0].tokens, "<i4").tolist() == [7, 8]
    assert np.isnan(np.frombuffer(message.prompt_logprobs, "<f4")).tolist() == [True, True, False, False]
    topk = message.topk_prompt_logprobs
    assert (topk.k, topk.length) == (2, 4)
    assert np.frombuffer(topk.token_ids, "<i4").tolist() == [0, 0, 5, 6, 5, 0, 9, 0]
    assert np.frombuffer(topk.logprobs, "<f4")[0] == np.float32(-99999.0)


# --- the endpoints -------------------------------------------------------------------------------


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
        answer = await self.call("retrieve_future", request_id=response.json()["request_id"])
        assert answer.status_code == 200, answer.text
        return answer

    async def model(self, **lora: Any) -> str:
        """A new session's model 0."""
        session = (await self.call("create_session", sdk_version="0.38.0")).json()["session_id"]
        created = await self.call("create_model", session_id=session, model_seq_id=0, base_model="m", lora_config=lora)
        return (await self.result(created)).json()["model_id"]


def app_test(test: Callable[[Http, State], Awaitable[None]]) -> Callable[..., None]:
    """Runs a test with an application that serves `micro` as "m"."""

    def run(service: ServiceClient, tmp_path: Path) -> None:
        async def body() -> None:
            bases = open_bases(["m=micro"], None)
            state = State(service, bases, Store(tmp_path), limits=Limits(gap_seconds=0.3))
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
    np.testing.assert_allclose(sampled, logprobs, atol=1e-4)
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
    await asyncio.sleep(0.05)
    ids = [answer.json()["request_id"] for answer in begun]
    for request_id in (*ids, "unknown"):
        assert (await http.call("cancel_future", request_id=request_id)).status_code == 204
    for answer in begun:
        assert "cancelled" in (await http.result(answer)).json()["error"]
    for _ in range(1000):
        if not engine.num_in_flight:
            break
        await asyncio.sleep(0.01)
    assert not engine.num_in_flight
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
    waiting = (await http.call("optim_step", model_id=model_id, seq_id=2)).json()["request_id"]
    started = asyncio.get_running_loop().time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "POLL_SECONDS", 0.1)
        answer = await http.call("retrieve_future", request_id=waiting)
    assert (answer.status_code, answer.json()["queue_state"]) == (408, "active")
    assert asyncio.get_running_loop().time() - started >= 0.1
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


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"training_run_id": "r", "colour": 1}'])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(content)
    with pytest.raises(DataError, match="run.json"):
        Store(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"time": "", "size_bytes": 0, "colour": 1}'])
def test_a_damaged_record_of_a_checkpoint_is_named(content: str, tmp_path: Path) -> None:
    run = asdict(Run("r", "m", False, None, True, True, ""))
    (tmp_path / "r" / "weights" / "a").mkdir(parents=True)
    (tmp_path / "r" / "run.json").write_text(json.dumps(run))
    (tmp_path / "r" / "weights" / "a.json").write_text(content)
    with pytest.raises(DataError, match="a.json"):
        Store(tmp_path)


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "a\0b", "", "x" * 4000, ".hidden", 7])
def test_checkpoint_names_that_are_refused(name: Any, tmp_path: Path) -> None:
    from posttrain.serve.store import check_name

    with pytest.raises(CheckpointError, match="checkpoint name"):
        check_name(name)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost:8000"}, 200),
        ({"x-api-key": "tml-wrong"}, 401),
        ({"content-type": "text/plain"}, 415),
        ({"content-length": "1000000000000"}, 413),
        ({"authorization": "Bearer tml-secret", "x-api-key": ""}, 200),
    ],
)
def test_the_guard(headers: dict[str, str], status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await guard._answer(send, 200, "in", scope["path"])

    async def body() -> int:
        transport = httpx.ASGITransport(guard.Guard(app, "127.0.0.1", "tml-secret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            usual = {"x-api-key": "tml-secret", "content-type": "application/json"}
            return (await client.post("/api/v1/x", content=b"{}", headers={**usual, **headers})).status_code

    assert asyncio.run(body()) == status


def test_a_body_without_a_length_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_BODY_BYTES", 1000)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async def body() -> int:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(guard.Guard(app)), base_url="http://127.0.0.1"
        ) as client:
            headers = {"content-type": "application/json"}
            return (await client.post("/api/v1/x", content=parts(), headers=headers)).status_code

    assert asyncio.run(body()) == 413


def test_a_long_poll_of_a_stopping_server_is_answered() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    async def body() -> int:
        transport = httpx.ASGITransport(guard.Guard(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.post("/api/v1/x")).status_code

    assert asyncio.run(body()) == 503


# --- the parts -----------------------------------------------------------------------------------


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_requests_in_order_whatever_order_they_arrive_in() -> None:
    async def body() -> list[int]:
        order: list[int] = []
        opened: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        queue = InOrder(opened)

        def start(number: int) -> Callable[[str], Awaitable[Answer]]:
            async def started(client: str) -> Answer:
                order.append(number)
                await asyncio.sleep(0.01 / number)
                return json_answer(number)

            return started

        futures = [queue.put(number, start(number)) for number in (3, 1)]
        opened.set_result("client")
        await asyncio.sleep(0.01)
        futures += [queue.put(number, start(number)) for number in (4, 2)]
        await asyncio.gather(*futures)
        with pytest.raises(DataError, match="used before"):
            await queue.put(2, start(2))
        queue.close()
        return order

    assert run(body()) == [1, 2, 3, 4]


def test_answers_are_dropped_beyond_the_number_of_bytes() -> None:
    async def body() -> None:
        requests = Requests(most_bytes=250)
        ids = [requests.accept(i, _answer(b"x" * 100)).id for i in range(4)]
        await asyncio.sleep(0.01)
        assert (await requests.wait(ids[3], 1)) is not None  # fetched: the first to go
        requests.accept("next", _answer(b""))
        with pytest.raises(KeyError):
            await requests.wait(ids[3], 1)
        assert len([i for i in ids if i in requests._by_id]) == 2

    async def _answer(content: bytes) -> Answer:
        return Answer(content)

    run(body())


def test_versions_of_the_sdk() -> None:
    assert check_version("0.38.0") == check_version("0.30.4") == check_version("") == []
    assert "newer than 0.38" in check_version("0.40.1")[0]
    with pytest.raises(ConfigError, match="older protocol"):
        check_version("0.18.2")


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    assert _joined_models(["--model", "a", "port=1", "--model=b=tiny"]) == ["port=1", "model=a,b=tiny"]
    assert [*open_bases(["a=micro", "org/b=tiny"], None)] == ["a", "org/b"]
    for names in (["a=micro", "a=tiny"], ["../x=tiny"], ["=tiny"]):
        with pytest.raises(ConfigError):
            open_bases(names, None)
    assert substitutes("stable_reinforce=ppo") == {"stable_reinforce": "ppo"}
    for text in ("stable_reinforce=nothing", "ppo=cispo"):
        with pytest.raises(ConfigError, match="substitute"):
            substitutes(text)
    assert api_key(ServeConfig(model="tiny")) is None
    with pytest.raises(ConfigError, match="api_key"):
        api_key(ServeConfig(model="tiny", host="0.0.0.0"))
    with pytest.raises(ConfigError, match="tml-"):
        api_key(ServeConfig(model="tiny", api_key="secret"))
