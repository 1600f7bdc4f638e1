"""The checkpoints of a service's folder, as the SDK's RestClient lists and deletes them. Left out:
runs, sessions, projects and TTLs, which a folder does not have; posttrain.serve has them.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from posttrain.backend.adapters import read_base, read_lora
from posttrain.backend.checkpoint_files import (
    STATE_FILE,
    check_is_checkpoint,
    checkpoints_in,
    is_adapter,
    read_state,
    state_file,
)
from posttrain.backend.errors import CheckpointError, ConfigError
from posttrain.backend.futures import APIFuture, answered
from posttrain.backend.sdk_keywords import ignore
from posttrain.backend.training_client import SAMPLER_FOLDER

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """`tinker_path` is its folder."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler"]
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool = False
    expires_at: datetime | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class CheckpointsListResponse:
    checkpoints: list[Checkpoint]


@dataclass(frozen=True)
class WeightsInfoResponse:
    """`base_model` of a whole model that was saved for sampling is its folder."""

    base_model: str
    is_lora: bool
    lora_rank: int | None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    train_unembed: bool | None = None


class RestClient:
    def __init__(self, folder: Path):
        self._folder = folder

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """Newest first."""

        def listed() -> CheckpointsListResponse:
            folders = [*checkpoints_in(self._folder), *checkpoints_in(self._folder / SAMPLER_FOLDER)]
            found = [_checkpoint(self._folder, folder) for folder in folders]
            found.sort(key=lambda checkpoint: checkpoint.time, reverse=True)
            return CheckpointsListResponse(found[offset : offset + limit])

        return _done(listed)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        return _done(lambda: _weights_info(self._find(tinker_path)))

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Only of the service's own folder."""

        def delete() -> None:
            folder = self._find(tinker_path)
            if self._folder.resolve() not in folder.parents:
                raise CheckpointError(f"{tinker_path} is not in {self._folder}, so it is not deleted here")
            shutil.rmtree(folder)

        return _done(delete)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        ignore(ttl_seconds=ttl_seconds)
        return _done(lambda: None if self._find(tinker_path) else None)

    def _find(self, tinker_path: str) -> Path:
        folder = Path(tinker_path).expanduser().resolve()
        check_is_checkpoint(folder)
        return folder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ConfigError(f"RestClient.{name}: runs, sessions and accounts are a server's; posttrain-serve has them")

    list_user_checkpoints_async = answered(list_user_checkpoints)
    get_weights_info_by_tinker_path_async = answered(get_weights_info_by_tinker_path)
    delete_checkpoint_from_tinker_path_async = answered(delete_checkpoint_from_tinker_path)
    set_checkpoint_ttl_from_tinker_path_async = answered(set_checkpoint_ttl_from_tinker_path)


def _done(work: Callable[[], T]) -> APIFuture[T]:
    future: APIFuture[T] = APIFuture()
    try:
        future.succeed(work())
    except OSError as error:
        future.fail(CheckpointError(f"the checkpoint folder: {error}"))
    except CheckpointError as error:
        future.fail(error)
    return future


def _checkpoint(root: Path, folder: Path) -> Checkpoint:
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    time = datetime.fromtimestamp(max((file.st_mtime for file in files), default=0.0), UTC)
    kind: Literal["training", "sampler"] = "training" if state_file(folder, STATE_FILE).exists() else "sampler"
    return Checkpoint(folder.relative_to(root).as_posix(), kind, time, str(folder), sum(file.st_size for file in files))


def _weights_info(folder: Path) -> WeightsInfoResponse:
    if is_adapter(folder):
        lora = read_lora(folder)
        shape = (lora.rank, lora.train_mlp, lora.train_attn, lora.train_unembed)
        return WeightsInfoResponse(read_base(folder).name, True, *shape)
    has_state = state_file(folder, STATE_FILE).exists()
    return WeightsInfoResponse(str(read_state(folder)["model_name"]) if has_state else str(folder), False, None)
