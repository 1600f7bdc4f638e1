"""The endpoints of training runs and checkpoints: lists, deletion, expiry, publication, and
addresses that need no key.
"""

import secrets
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response

from posttrain.serve.body import body_of, page
from posttrain.serve.state import State, UnknownError
from posttrain.serve.store import Checkpoint, Run

EXTERNAL_SECONDS = 3600.0


def _run_record(run: Run, checkpoints: Iterable[Checkpoint]) -> dict[str, Any]:
    """`checkpoints`: the run's, oldest first."""
    record = {
        "training_run_id": run.training_run_id,
        "base_model": run.base_model,
        "model_owner": "local",
        "is_lora": run.is_lora,
        "lora_rank": run.lora_rank,
        "corrupted": False,
        "last_request_time": run.last_request_time,
        "user_metadata": run.user_metadata,
    }
    for checkpoint in checkpoints:
        if checkpoint.kind != "external_weights":  # SDKs before 0.30 do not know them
            key = "last_sampler_checkpoint" if checkpoint.kind == "sampler_weights" else "last_checkpoint"
            record[key] = checkpoint.record()
    return record


async def training_runs(state: State, request: HttpRequest) -> Response:
    limit, offset = page(request, 20)
    newest = sorted(state.store.runs.values(), key=lambda run: run.last_request_time, reverse=True)
    of_runs: dict[str, list[Checkpoint]] = {}
    for checkpoint in state.store.all():  # once: the page may have as many runs as there are checkpoints
        of_runs.setdefault(checkpoint.run.training_run_id, []).append(checkpoint)
    records = [_run_record(run, of_runs.get(run.training_run_id, ())) for run in newest[offset : offset + limit]]
    return JSONResponse({"training_runs": records, "cursor": _cursor(limit, offset, len(newest))})


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"limit": limit, "offset": offset, "total_count": total}


async def training_run(state: State, request: HttpRequest) -> Response:
    run = state.store.run(request.path_params["run_id"])
    return JSONResponse(_run_record(run, state.store.of_run(run.training_run_id)))


async def checkpoints_of_run(state: State, request: HttpRequest) -> Response:
    run = state.store.run(request.path_params["run_id"])
    return JSONResponse({"checkpoints": [c.record() for c in state.store.of_run(run.training_run_id)]})


async def checkpoints(state: State, request: HttpRequest) -> Response:
    limit, offset = page(request, 100)
    newest = state.store.all()[::-1]
    records = [checkpoint.record() for checkpoint in newest[offset : offset + limit]]
    return JSONResponse({"checkpoints": records, "cursor": _cursor(limit, offset, len(newest))})


def _checkpoint(state: State, request: HttpRequest) -> Checkpoint:
    named = request.path_params
    return state.store.find(f"tinker://{named['run_id']}/{named['kind']}/{named['name']}")


async def delete_checkpoint(state: State, request: HttpRequest) -> Response:
    state.store.delete(_checkpoint(state, request))
    return Response(status_code=204)


async def set_ttl(state: State, request: HttpRequest) -> Response:
    state.store.set_expiry(_checkpoint(state, request), (await body_of(request)).fields.get("ttl_seconds"))
    return Response(status_code=204)


async def set_public(public: bool, state: State, request: HttpRequest) -> Response:
    state.store.set_public(_checkpoint(state, request), public)
    return Response(status_code=204)


async def weights_info(state: State, request: HttpRequest) -> Response:
    run = state.store.find((await body_of(request)).text("tinker_path")).run
    shape = {"lora_rank": run.lora_rank, "train_mlp": run.train_mlp, "train_attn": run.train_attn}
    shape = {**shape, "train_unembed": False} if run.is_lora else {}
    return JSONResponse({"base_model": run.base_model, "is_lora": run.is_lora, **shape})


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Those that clients may fetch, by their name in its folder."""
    files = [file for file in sorted(checkpoint.folder.rglob("*")) if file.is_file() and not file.is_symlink()]
    return {file.relative_to(checkpoint.folder).as_posix(): file for file in files}


async def external_urls(state: State, request: HttpRequest) -> Response:
    """Addresses of a checkpoint's files that need no key, for an hour."""
    checkpoint = _checkpoint(state, request)
    secret = secrets.token_urlsafe(32)
    state.offered[secret] = (checkpoint, time.monotonic() + EXTERNAL_SECONDS)
    urls = {name: f"{request.base_url}api/v1/external/{secret}/{name}" for name in _files(checkpoint)}
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + EXTERNAL_SECONDS))
    return JSONResponse({"urls": urls, "expires": expires})


async def external_file(state: State, request: HttpRequest) -> Response:
    checkpoint, until = state.offered.get(request.path_params["secret"], (None, 0.0))
    if checkpoint is None or time.monotonic() > until:
        raise UnknownError("this address has expired: ask for a new one")
    file = _files(checkpoint).get(request.path_params["name"])
    if file is None:
        raise UnknownError("the checkpoint has no such file, or was deleted")
    return FileResponse(file)


CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
CHECKPOINT_ENDPOINTS = [
    ("GET", "/training_runs", training_runs),
    ("GET", "/training_runs/{run_id}", training_run),
    ("GET", "/training_runs/{run_id}/checkpoints", checkpoints_of_run),
    ("GET", "/checkpoints", checkpoints),
    ("DELETE", CHECKPOINT, delete_checkpoint),
    ("PUT", f"{CHECKPOINT}/ttl", set_ttl),
    ("POST", f"{CHECKPOINT}/publish", partial(set_public, True)),
    ("DELETE", f"{CHECKPOINT}/publish", partial(set_public, False)),
    ("GET", f"{CHECKPOINT}/external_weights_urls", external_urls),
    ("POST", "/weights_info", weights_info),
    ("GET", "/external/{secret}/{name:path}", external_file),
]
