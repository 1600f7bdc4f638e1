"""The endpoints of the Tinker protocol, under /api/v1/. Each reads its body, asks State, and answers;
what takes long is accepted at once and fetched at retrieve_future. Left out, with 404: accounts,
billing, copies, server-side custom losses.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from posttrain.backend.errors import CookbookError, DataError, one_line
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, LoraConfig, SamplingParams
from posttrain.serve.age import read_recipients
from posttrain.serve.body import Body, BodyError, body_of, decompressed, page
from posttrain.serve.checkpoint_endpoints import CHECKPOINT_ENDPOINTS
from posttrain.serve.guard import MOST_BODY_BYTES, Guard
from posttrain.serve.openai_api import no_endpoint, openai_routes
from posttrain.serve.openai_models import PublicModels
from posttrain.serve.requests import Answer, Request
from posttrain.serve.sdk_versions import check_version
from posttrain.serve.state import MOST_SAMPLES, MOST_TOPK, BusyError, SampleOptions, State, UnknownError
from posttrain.serve.store import UnknownPathError
from posttrain.serve.wire import read_pass_request, read_targets

Handler = Callable[[State, HttpRequest], Awaitable[Response]]

POLL_SECONDS = 20.0  # the SDK waits 45 s
CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "proto_write_fwdbwd": True,  # SDKs up to 0.24, 0.24 and 0.36 read these three
    "fwd_via_fwdbwd": True,
    "create_model_via_load_weights": True,
    "proto_compress_fwdbwd": False,  # pays on a network, not on loopback
    "custom_loss_server_side": False,
    "sample_use_retrieve_futures": True,  # one poll per sampler
    "sample_join_sampling_session": True,
    "sample_max_concurrent_requests": 256,
}
NO_UNEMBED = "adapters leave the output layer as it is here: train_unembed is taken as false"
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


def create_app(state: State, host: str = "127.0.0.1", api_key: str | None = None, renderer: str | None = None) -> Any:
    """The ASGI application. `api_key` None lets everyone in who reaches it. `renderer` turns the
    messages of OpenAI clients into tokens; None follows the chat template."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(state.sweep_forever())
        try:
            yield
        finally:
            sweeper.cancel()
            await state.close()

    routes = [Route(path, partial(_guarded, state, handler), methods=[method]) for method, path, handler in ENDPOINTS]
    app = Starlette(
        routes=[Mount("/api/v1", routes=routes), *openai_routes(PublicModels(state, renderer))],
        exception_handlers={HTTPException: _refused, Exception: _broken},
        lifespan=lifespan,
    )
    return Guard(app, host, api_key)


async def _guarded(state: State, handler: Handler, request: HttpRequest) -> Response:
    try:
        return await handler(state, request)
    except ClientDisconnect:  # while its body arrived
        status, text = 499, "the client hung up"
    except (UnknownError, UnknownPathError) as error:
        status, text = 404, str(error)
    except BusyError as error:
        status, text = 429, str(error)
    except CookbookError as error:
        status, text = 400, str(error)
    return JSONResponse({"detail": state.without_folders(one_line(text))}, status)


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not request.url.path.startswith("/api/"):
        return await no_endpoint(request, error)
    detail = error.detail if error.status_code != 404 else f"this server has no endpoint {request.url.path[:200]}"
    return JSONResponse({"detail": detail}, error.status_code)


async def _broken(request: HttpRequest, error: Exception) -> Response:
    # 500 would be tried again for five minutes
    return JSONResponse({"detail": f"the server failed with {type(error).__name__}; its log has the traceback"}, 400)


def _accepted(request: Request) -> Response:
    return JSONResponse({"request_id": request.id})


@contextlib.contextmanager
def _used_up(state: State, model_id: str, seq_id: int) -> Iterator[None]:
    """Around the reading of a request's fields. One that is refused there takes its number with it: its client goes
    on with the next, which would wait for this one, and fail."""
    try:
        yield
    except CookbookError as error:
        refused = error

        async def start(client: TrainingClient) -> Answer:
            raise refused

        state.submit(model_id, seq_id, start)
        raise


# --- sessions and configuration ------------------------------------------------------------------


async def healthz(state: State, request: HttpRequest) -> Response:
    return JSONResponse({"status": "ok"})


async def client_config(state: State, request: HttpRequest) -> Response:
    return JSONResponse(CLIENT_CONFIG)


async def dynamic_config(state: State, request: HttpRequest) -> Response:
    return JSONResponse(DYNAMIC_CONFIG)


async def create_session(state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    warnings = [NO_UNEMBED, *check_version(body.text("sdk_version", ""))]
    key = request.headers.get("x-idempotency-key")
    session = state.create_session(body.texts("user_metadata") or {}, body.text("display_name", None), key)
    messages = {"info_message": state.greeting(), "warning_message": "; ".join(warnings)}
    return JSONResponse({"session_id": session.id, **messages})


async def session_heartbeat(state: State, request: HttpRequest) -> Response:
    session_id = (await body_of(request)).text("session_id")
    if session_id not in state.sessions:
        return JSONResponse({"detail": "this session has ended, or the server was restarted"}, 410)
    state.sessions[session_id].last_seen = time.monotonic()
    return JSONResponse({"type": "session_heartbeat"})


async def finish_session(state: State, request: HttpRequest) -> Response:
    state.end_session(request.path_params["session_id"])
    return Response(status_code=204)


async def telemetry(state: State, request: HttpRequest) -> Response:
    """Dropped: it holds tracebacks of the user's program."""
    return JSONResponse({"status": "accepted"})


async def capabilities(state: State, request: HttpRequest) -> Response:
    models = [
        {"model_name": base.name, "max_context_length": base.max_length, "trainable": True, "sampleable": True}
        for base in state.bases.values()
    ]
    return JSONResponse({"supported_models": models})


async def sessions(state: State, request: HttpRequest) -> Response:
    limit, offset = page(request, 20)
    return JSONResponse({"sessions": [*state.sessions][offset : offset + limit]})


async def session(state: State, request: HttpRequest) -> Response:
    found = state.session(request.path_params["session_id"])
    answer = {"training_run_ids": [*found.models], "sampler_ids": [*found.samplers]}
    return JSONResponse({**answer, "user_metadata": found.user_metadata, "display_name": found.display_name})


# --- models --------------------------------------------------------------------------------------


async def create_model(state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    session = state.session(body.text("session_id"))
    number = body.integer("model_seq_id")
    if repeated := state.created(session, number):
        return _accepted(repeated)
    _check_optimizer(body)
    lora, config = body.record("lora_config", Body({})), None
    lora.only("rank", "seed", "train_unembed", "train_mlp", "train_attn")
    if rank := lora.integer("rank", 32):  # 0 trains all weights
        seed = lora.integer("seed", None)
        config = LoraConfig(rank, seed, None, lora.flag("train_mlp", True), lora.flag("train_attn", True))
    base_model = body.text("base_model")
    return _accepted(state.create_model(session, number, base_model, config, body.texts("user_metadata")))


async def load_weights(state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    if model_id := body.text("model_id", None):
        seq_id = body.integer("seq_id", least=1)
        with _used_up(state, model_id, seq_id):
            path, with_optimizer = body.text("path"), body.flag("optimizer", False)
        return _accepted(state.load(model_id, seq_id, path, with_optimizer))
    path, with_optimizer = body.text("path"), body.flag("optimizer", False)
    session, number = state.session(body.text("session_id")), body.integer("model_seq_id")
    if repeated := state.created(session, number):
        return _accepted(repeated)
    _check_optimizer(body)
    return _accepted(state.create_model_from(session, number, path, with_optimizer, body.texts("user_metadata")))


def _check_optimizer(body: Body) -> None:
    config = body.record("optimizer_config", None)
    if config is not None and (kind := config.text("type", "adamw")) != "adamw":
        raise DataError(f"optimizer {kind[:40]!r}: models are trained with AdamW here")


async def get_info(state: State, request: HttpRequest) -> Response:
    model = state.model((await body_of(request)).text("model_id"))
    run, base = model.run, state.base(model.run.base_model)
    data = {"arch": base.architecture, "model_name": run.base_model, "tokenizer_id": state.tokenizer_folder(base)}
    answer = {"type": "get_info", "model_data": data, "model_id": run.training_run_id, "model_name": run.base_model}
    return JSONResponse({**answer, "is_lora": run.is_lora, "lora_rank": run.lora_rank})


async def forward_backward(state: State, request: HttpRequest) -> Response:
    if request.headers.get("content-type", "").split(";")[0] != "application/x-protobuf":
        raise BodyError("forward and forward_backward are protobuf here: use an SDK from 0.22.7 on")
    encoding = request.headers.get("content-encoding", "identity")
    content = decompressed(await request.body(), encoding, MOST_BODY_BYTES)
    try:
        message = read_pass_request(content)
    except ValueError as error:
        raise BodyError(str(error)) from error
    if not message.model_id or message.seq_id < 1:
        raise BodyError("model_id or seq_id is missing")
    return _accepted(state.forward_backward(message, len(content)))


async def optim_step(state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    model_id, seq_id = body.text("model_id"), body.integer("seq_id", least=1)

    def adam() -> AdamParams:
        if body.fields.get("optimizer_params") is not None:
            raise DataError("optimizer_params: models are trained with AdamW here")
        params = body.record("adam_params", Body({}))
        given = params.only("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
        return AdamParams(**{name: params.number(name) for name in given})

    return _accepted(state.optim_step(model_id, seq_id, adam))


async def save_weights(kind: str, state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    model_id, seq_id = body.text("model_id"), body.integer("seq_id", least=1)
    name = body.fields.get("path")
    with _used_up(state, model_id, seq_id):
        number, follow = body.integer("sampling_session_seq_id", seq_id), body.text("kind", "snapshot") == "inflight"
        recipients = read_recipients(body.listing("age_encryption_recipients", []))
        if recipients and kind != "external_weights":
            raise BodyError("age_encryption_recipients: it is save_weights_external that encrypts")
        overwrite = kind != "weights" or body.flag("overwrite", False)
        ttl_seconds, metadata = body.fields.get("ttl_seconds"), body.texts("user_metadata")
    if kind == "sampler_weights" and name is None:
        return _accepted(state.snapshot(model_id, seq_id, number, follow))
    return _accepted(state.save(model_id, seq_id, kind, name, ttl_seconds, overwrite, metadata, recipients))


# --- sampling ------------------------------------------------------------------------------------


async def create_sampling_session(state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    path, base_model = body.text("model_path", None), body.text("base_model", None)
    if path is None and base_model is None:
        raise BodyError("base_model or model_path is needed")
    session, number = state.session(body.text("session_id")), body.integer("sampling_session_seq_id")
    sampler = state.create_sampler(session, number, base_model, path)
    return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler.id})


async def get_sampler(state: State, request: HttpRequest) -> Response:
    sampler = state.sampler(request.path_params["sampler_id"])
    answer = {"sampler_id": sampler.id, "base_model": sampler.base_model}
    return JSONResponse(answer | ({"model_path": sampler.model_path} if sampler.model_path else {}))


async def join_sampling_session(state: State, request: HttpRequest) -> Response:
    """Numbers the copies of a sampling client in other processes: their requests begin at 1e9 times
    this."""
    sampler = state.sampler((await body_of(request)).text("sampling_session_id"))
    sampler.copies += 1
    return JSONResponse({"type": "join_sampling_session", "client_counter": sampler.copies})


async def asample(state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    sampler_id, seq_id = body.text("sampling_session_id"), body.integer("seq_id")
    num_samples = body.integer("num_samples", 1, least=1, most=MOST_SAMPLES)
    accepted = state.sample(sampler_id, seq_id, _prompt(body), num_samples, _sample_options(body))
    ids = [f"{accepted.id}-{i}" for i in range(num_samples)]
    return JSONResponse({"type": "sample", "request_id": accepted.id, "sample_sequence_ids": ids})


def _prompt(body: Body) -> list[int]:
    tokens: list[int] = []
    for chunk in body.record("prompt").listing("chunks"):
        if not isinstance(chunk, dict) or chunk.get("type", "encoded_text") != "encoded_text":
            raise BodyError("prompt: this server samples from text only, not from images or audio")
        part = chunk.get("tokens")
        if not isinstance(part, list) or not all(type(token) is int for token in part):
            raise BodyError("prompt: a chunk needs a list of token ids")
        tokens += part
    return tokens


def _sample_options(body: Body) -> SampleOptions:
    fields = body.record("sampling_params", Body({}))
    others = {
        "topk_sample_logprobs": body.integer("topk_sample_logprobs", 0, most=MOST_TOPK),
        "prompt_alt_tokens_k": body.integer("prompt_alt_tokens_k", 0),
    }
    asked = body.record("target_prompt_logprobs", None)
    targets = asked and read_targets(asked.fields)
    if targets:
        others["target_prompt_logprobs"] = targets.tensor

    def params() -> SamplingParams:
        return SamplingParams(**fields.only("max_tokens", "seed", "temperature", "top_k", "top_p", "stop"))

    return SampleOptions(
        params,
        body.flag("prompt_logprobs", False),
        body.integer("topk_prompt_logprobs", 0, most=MOST_TOPK),
        body.integer("prompt_logprobs_last_n", None),
        {name: value for name, value in others.items() if value},
        targets,
    )


# --- answers -------------------------------------------------------------------------------------


async def retrieve_future(state: State, request: HttpRequest) -> Response:
    request_id = (await body_of(request)).text("request_id")
    try:
        answer = await state.requests.wait(request_id, POLL_SECONDS)
    except KeyError:
        return JSONResponse({"detail": "there is no such request, or its answer is no longer kept"}, 410)
    if answer is None:
        return JSONResponse({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
    return Response(answer.body, media_type=answer.media_type)


async def retrieve_futures(state: State, request: HttpRequest) -> Response:
    body = await body_of(request)
    target = body.record("target")
    sampler_id, clone = target.text("sampling_session_id"), target.integer("cloned_sampler_id", 0)
    state.sampler(sampler_id)
    seconds = min(max(body.number("timeout", POLL_SECONDS), 0.0), POLL_SECONDS)
    owner, cursor = f"{sampler_id}#{clone}", body.integer("prev_cursor", 0)
    completions, cursor = await state.requests.completions.after(owner, cursor, seconds)
    return JSONResponse({"completions": completions, "cursor": cursor})


async def cancel_future(state: State, request: HttpRequest) -> Response:
    state.requests.cancel((await body_of(request)).text("request_id"))
    return Response(status_code=204)


# Starlette tries them in this order: first those that are called for each sample.
ENDPOINTS: list[tuple[str, str, Handler]] = [
    ("POST", "/asample", asample),
    ("POST", "/retrieve_future", retrieve_future),
    ("POST", "/retrieve_futures", retrieve_futures),
    ("GET", "/healthz", healthz),
    ("POST", "/client/config", client_config),
    ("POST", "/client/dynamic_config", dynamic_config),
    ("POST", "/create_session", create_session),
    ("POST", "/session_heartbeat", session_heartbeat),
    ("POST", "/sessions/{session_id}/finish", finish_session),
    ("POST", "/telemetry", telemetry),
    ("GET", "/get_server_capabilities", capabilities),
    ("GET", "/sessions", sessions),
    ("GET", "/sessions/{session_id}", session),
    ("POST", "/create_model", create_model),
    ("POST", "/load_weights", load_weights),
    ("POST", "/get_info", get_info),
    ("POST", "/forward_backward", forward_backward),
    ("POST", "/optim_step", optim_step),
    ("POST", "/save_weights", partial(save_weights, "weights")),
    ("POST", "/save_weights_for_sampler", partial(save_weights, "sampler_weights")),
    ("POST", "/save_weights_external", partial(save_weights, "external_weights")),
    ("POST", "/create_sampling_session", create_sampling_session),
    ("POST", "/join_sampling_session", join_sampling_session),
    ("GET", "/samplers/{sampler_id}", get_sampler),
    ("POST", "/cancel_future", cancel_future),
    *CHECKPOINT_ENDPOINTS,
]
