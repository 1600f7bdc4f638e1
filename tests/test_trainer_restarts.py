"""A run whose training processes die is opened again as often as it may be, and no other error is."""

import asyncio

import chz
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import EngineError, TrainerLostError
from posttrain.tracking.trainer_restarts import with_restarts


@chz.chz
class Config:
    behavior_if_log_dir_exists: str = "delete"
    backend: BackendConfig = chz.field(default_factory=BackendConfig)


@pytest.mark.parametrize(("restarts", "deaths"), [(0, 0), (2, 2), (1, 2)])
def test_restarts(restarts: int, deaths: int) -> None:
    opened: list[str] = []

    @with_restarts
    async def main(config: Config) -> str:
        opened.append(config.behavior_if_log_dir_exists)
        if len(opened) <= deaths:
            raise TrainerLostError("a training process has died")
        return "trained"

    run = main(Config(backend=BackendConfig(trainer_restarts=restarts)))
    if deaths > restarts:
        with pytest.raises(TrainerLostError):
            asyncio.run(run)
    else:
        assert asyncio.run(run) == "trained"
    assert opened == ["delete", "resume", "resume"][: min(deaths, restarts) + 1]


def test_another_error_ends_the_run() -> None:
    @with_restarts
    async def main(config: Config) -> None:
        raise EngineError("no replica is left")

    with pytest.raises(EngineError):
        asyncio.run(main(Config(backend=BackendConfig(trainer_restarts=3))))
