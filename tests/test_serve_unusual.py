"""Unusual and hostile clients of the Tinker protocol's server: what they get wrong is theirs alone."""

import asyncio
import logging
from typing import Any
from unittest.mock import patch

import pytest

from posttrain.backend import extras
from posttrain.serve import guard
from posttrain.serve.app import create_app
from posttrain.serve.state import Limits, State
from tests.test_serve import Http, app_test, base_sampler, loss, sample_of, until
from tests.test_serve import service as service  # the fixture
from tests.tinker_messages import datum, pass_body


async def error_of(http: Http, response: Any) -> str:
    """Of a request that is refused at once, or later."""
    if response.status_code == 400:
        return response.json()["detail"]
    return (await http.result(response)).json()["error"]


@app_test
async def test_options_that_no_engine_can_read_trouble_nobody(http: Http, state: State) -> None:
    # Trap: an exception in the engine's thread ends it, for all clients
    sampler = await base_sampler(http)
    bad: list[dict[str, Any]] = [{"stop": stop} for stop in ("", [""], 5, [[5]], [1.5])]
    bad += [{"temperature": [1.0]}, {"top_p": [0.5]}, {"min_p": 0.1}]
    for number, params in enumerate(bad):
        (name,) = params
        asked = await http.call("asample", **sample_of(sampler, number, sampling_params={"max_tokens": 1, **params}))
        assert name in await error_of(http, asked)
    targets = {"data": [1.5] * 5, "dtype": "float32", "shape": [5, 1]}
    asked = await http.call("asample", **sample_of(sampler, 98, target_prompt_logprobs=targets))
    assert "whole numbers" in await error_of(http, asked)
    good = await http.result(await http.call("asample", **sample_of(sampler, 99)))
    assert good.headers["content-type"] == "application/x-protobuf"


@app_test
async def test_fields_that_would_be_ignored_are_refused_by_name(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    session = model_id.split(":")[0]
    lora = {"rank": 4, "alpha": 64}
    made = await http.call("create_model", session_id=session, model_seq_id=1, base_model="m", lora_config=lora)
    assert "alpha" in await error_of(http, made)
    await http.send(pass_body(model_id, 1, [datum()]))
    step = await http.call("optim_step", model_id=model_id, seq_id=2, adam_params={"lr": 0.1, "beta1": None})
    assert "lr" in await error_of(http, step)


# As the service does it: the cookbook's proxy and its litellm provider tell agents to shorten their
# history if a sample is refused with status 400, and not if it fails later.
@app_test
async def test_a_prompt_without_room_for_an_answer_is_refused_at_once(http: Http, state: State) -> None:
    sampler, context = await base_sampler(http), state.base("m").max_length
    for number, (length, status) in enumerate([(context, 400), (context - 1, 200), (10 * context, 400)]):
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [70] * length}]}
        answer = await http.call("asample", **sample_of(sampler, number, prompt=prompt))
        assert answer.status_code == status
        if status == 200:
            assert (await http.result(answer)).headers["content-type"] == "application/x-protobuf"
        else:
            assert "prompt is too long" in answer.json()["detail"]


# Trap: the requests after a refused one wait a minute for its number, and fail.
@app_test
async def test_a_refused_request_uses_its_number_up(http: Http, state: State) -> None:
    state.limits = Limits(gap_seconds=0.3)
    model_id = await http.model(rank=4)
    refused: list[tuple[str, str, dict[str, Any]]] = [
        ("save_weights", "overwrite", {"path": "a", "overwrite": "yes"}),
        ("save_weights_for_sampler", "sampling_session_seq_id", {"sampling_session_seq_id": "x"}),
        ("save_weights_external", "age-keygen", {"path": "b", "age_encryption_recipients": ["age1"]}),
        ("load_weights", "path", {"path": 5}),
        ("load_weights", "optimizer", {"path": "tinker://x/weights/a", "optimizer": "no"}),
        ("optim_step", "lr", {"adam_params": {"lr": 1}}),
    ]
    for seq_id, (endpoint, says, fields) in enumerate(refused, start=1):
        answer = await http.call(endpoint, model_id=model_id, seq_id=seq_id, **fields)
        assert says in await error_of(http, answer)
    export = {"model_id": model_id, "path": "b", "age_encryption_recipients": ["age1"]}
    with patch.object(extras, "is_installed", return_value=False):
        answer = await http.call("save_weights_external", seq_id=len(refused) + 1, **export)
    assert "needs pyrage" in await error_of(http, answer)
    good = await http.send(pass_body(model_id, len(refused) + 2, [datum()]))
    assert loss(await http.result(good)) > 0


@app_test
async def test_the_end_of_a_session_ends_its_samples(http: Http, state: State) -> None:
    # Trap: a client that was killed keeps the engine busy for those that came after it
    sampler, others = await base_sampler(http), await base_sampler(http)
    await http.result(await http.call("asample", **sample_of(sampler, 0)))
    engine = state.samplers[sampler].opened.result()._engine
    long = {"max_tokens": 400, "seed": 1, "stop": []}
    begun = [await http.call("asample", **sample_of(sampler, i, num_samples=64, sampling_params=long)) for i in (1, 2)]
    kept = await http.call("asample", **sample_of(others, 0))
    await until(lambda: engine.num_in_flight)
    await http.call(f"sessions/{sampler.split(':')[0]}/finish")
    for answer in begun:
        assert "session has ended" in (await http.result(answer)).json()["error"]
    assert (await http.result(kept)).headers["content-type"] == "application/x-protobuf"
    await until(lambda: not engine.num_in_flight)


@app_test
async def test_a_sampler_whose_engine_has_stopped_is_not_handed_on(http: Http, state: State) -> None:
    first = await base_sampler(http)
    await http.result(await http.call("asample", **sample_of(first, 0)))
    state.samplers[first].opened.result()._engine.close()
    assert "stopped" in await error_of(http, await http.call("asample", **sample_of(first, 1)))
    second = await http.result(await http.call("asample", **sample_of(await base_sampler(http), 0)))
    assert second.headers["content-type"] == "application/x-protobuf"


@app_test
async def test_a_number_stands_for_one_model_and_one_sampler(http: Http, state: State) -> None:
    # Trap: two processes that count alike in one session, of which one gets the other's weights
    model_id = await http.model(rank=4)
    session = model_id.split(":")[0]
    path = (await http.result(await http.call("save_weights", model_id=model_id, seq_id=1, path="a"))).json()["path"]
    asked = {"session_id": session, "sampling_session_seq_id": 0}
    assert (await http.call("create_sampling_session", **asked, base_model="m")).status_code == 200
    assert "another sampler" in await error_of(
        http, await http.call("create_sampling_session", **asked, model_path=path)
    )
    snapshot = await http.call("save_weights_for_sampler", model_id=model_id, seq_id=2, sampling_session_seq_id=0)
    assert "another sampler" in await error_of(http, snapshot)
    state.requests._by_key.pop(("model", model_id, 0))  # as when the answer is no longer kept
    again = await http.call("create_model", session_id=session, model_seq_id=0, base_model="m")
    assert "model_seq_id=0 is in use" in await error_of(http, again)
    assert loss(await http.result(await http.send(pass_body(model_id, 3, [datum()])))) > 0


@app_test
async def test_requests_of_a_model_that_could_not_be_opened_say_why(http: Http, state: State) -> None:
    session = (await http.call("create_session")).json()["session_id"]
    lora = {"rank": 10**6}
    made = await http.call("create_model", session_id=session, model_seq_id=0, base_model="m", lora_config=lora)
    assert "lora_rank" in await error_of(http, made)
    later = await http.send(pass_body(f"{session}:train:0", 1, [datum()]))
    assert "lora_rank" in await error_of(http, later)


@app_test
async def test_records_that_could_not_be_read_again_are_not_written(http: Http, state: State) -> None:
    """A checkpoint named as another's record, and metadata of other than texts, would stop the next server."""
    model_id = await http.model(rank=4)
    await http.result(await http.call("save_weights", model_id=model_id, seq_id=1, path="a"))
    for name in ("a.json", "b.JSON"):
        saved = await http.call("save_weights", model_id=model_id, seq_id=2 + (name == "b.JSON"), path=name)
        assert "checkpoint name" in await error_of(http, saved)
    for metadata in ({"a": 1}, [1], "x"):
        saved = await http.call("save_weights", model_id=model_id, seq_id=4, path="c", user_metadata=metadata)
        assert "user_metadata" in await error_of(http, saved)
    state.store.__post_init__()  # as the next server reads it
    assert [checkpoint.name for checkpoint in state.store.all()] == ["a"]


@app_test
async def test_a_checkpoint_of_a_model_that_is_no_longer_served_is_refused(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    path = (await http.result(await http.call("save_weights", model_id=model_id, seq_id=1, path="a"))).json()["path"]
    state.bases = {}
    session = model_id.split(":")[0]
    loaded = await http.call("load_weights", session_id=session, model_seq_id=1, path=path)
    assert "'m' is not served here" in await error_of(http, loaded)


@app_test
async def test_targets_and_weights_of_other_shapes_are_the_clients_error(http: Http, state: State) -> None:
    model_id = await http.model(rank=4)
    column = [[1.0]] * 5
    for number, (fields, text) in enumerate(
        [
            ({"weights": column}, "weights has shape"),
            ({"target_tokens": [1.0] * 5}, "target_tokens is float32"),
            ({"target_tokens": [[[1]]] * 5}, "target_tokens is int64 of shape"),
        ]
    ):
        sent = await http.send(pass_body(model_id, number + 1, [{**datum(), **fields}], forward_only=True))
        answer = (await http.result(sent)).json()
        assert text in answer["error"] and answer["category"] == "user"


# Trap: a traceback in the log for each client that goes while it sends; one that sleeps in the middle keeps the room
# of its body from all others.
@pytest.mark.parametrize(("then", "status"), [("goes", 499), ("sleeps", 408)])
@pytest.mark.parametrize("path", ["/api/v1/asample", "/api/v1/forward_backward", "/v1/chat/completions"])
def test_a_client_that_goes_or_sleeps_while_it_sends_is_no_fault(
    path: str, then: str, status: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    monkeypatch.setattr(guard, "STALLED_SECONDS", 0.2)

    @app_test
    async def sends_half(http: Http, state: State) -> None:
        media_type = b"application/x-protobuf" if path.endswith("backward") else b"application/json"
        headers = [(b"host", b"localhost"), (b"content-type", media_type), (b"content-length", b"100")]
        asked = {"path": path, "raw_path": path.encode(), "headers": headers, "method": "POST", "query_string": b""}
        arriving: list[Any] = [{"type": "http.request", "body": b'{"a"', "more_body": True}]
        answers: list[Any] = []

        async def receive() -> Any:
            if not arriving and then == "sleeps":
                await asyncio.Event().wait()
            return arriving.pop() if arriving else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {"type": "http", "http_version": "1.1", "scheme": "http", "server": ("localhost", 80), **asked}
        with caplog.at_level(logging.WARNING):
            await create_app(state)(scope, receive, send)
        assert [a["status"] for a in answers if "status" in a] == [status] and not caplog.records

    sends_half(request.getfixturevalue("service"), request.getfixturevalue("tmp_path"))


@pytest.mark.parametrize("name", ["weights", "A.b-c_1", "json"])
def test_checkpoint_names_that_are_taken(name: str) -> None:
    from posttrain.serve.store import check_name

    assert check_name(name) == name
