"""The supervised run that most recipes start with, and how they set the runs that follow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import chz

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import SEED
from posttrain.tracking.command_line import parse
from posttrain.tracking.run_folder import BehaviorIfExists, delete_run
from posttrain.tracking.stages import Stage, run_stages, training_stage
from rl import train as rl_train
from rl.names import ADVANTAGES
from supervised import train as supervised_train
from supervised.types import SupervisedDatasetBuilder

RLConfig = TypeVar("RLConfig", bound=rl_train.Config)


def torch_backend(doc: str = "how this machine trains and samples") -> Any:
    """The field `backend` of a recipe with a small model, which torch itself samples."""
    return chz.field(default_factory=lambda: BackendConfig(engine="torch"), doc=doc)


def shared_settings(config: Any) -> dict[str, Any]:
    """The model, renderer, seed and backend of a recipe's `config`, where it has these fields."""
    return {n: getattr(config, n) for n in ("model_name", "renderer_name", "seed", "backend") if hasattr(config, n)}


def preset(settings: Mapping[str, str]) -> rl_train.Config:
    """RL with the settings of a preset (rl/algorithms.py), on an environment that is to be replaced."""
    options = [f"{option}={value}" for option, value in settings.items()]
    return parse(rl_train.Config, ["env=envs.arithmetic:ArithmeticBuilder", *options], {"advantage": ADVANTAGES})


def seeds_of(written: str) -> list[int]:
    """ConfigError unless the option `seeds` has different whole numbers by comma."""
    try:
        seeds = [int(seed) for seed in written.split(",")]
    except ValueError:
        raise ConfigError(f"seeds={written}: whole numbers by comma are needed, e.g. seeds=0,1,2") from None
    check_seeds(seeds)
    return seeds


def check_seeds(seeds: Sequence[int]) -> None:
    """ConfigError unless there is one, and each is given once: a run that counts twice narrows every interval."""
    if not seeds or len(set(seeds)) < len(seeds) or any(SEED.needs(seed) for seed in seeds):
        raise ConfigError(f"seeds={','.join(map(str, seeds))}: give different whole numbers from 0 up, e.g. 0,1,2")


def warm_start(
    config: Any,
    dataset: SupervisedDatasetBuilder,
    log_path: str | Path,
    name: str = "warm_start",
    needs: Sequence[Stage] = (),
    **settings: Any,
) -> Stage:
    """A supervised run in `log_path` with the shared settings of a recipe's `config`.

    `settings` are other fields of supervised.train.Config, e.g. stop_at_nll=0.3. The first stage of
    `needs`, if any, gives the initial weights.
    """
    defaults = {"learning_rate": 2e-3, "lr_schedule": "constant", "save_every": 0, **shared_settings(config)}
    defaults |= {"load_checkpoint_path": str(needs[0].result)} if needs else {}
    run = supervised_train.Config(dataset=dataset, log_path=str(log_path), **(defaults | settings))
    behavior: BehaviorIfExists = getattr(config, "behavior_if_log_dir_exists", "resume")
    return training_stage(name, supervised_train.main, run, needs, behavior)


async def warm_started(config: RLConfig, dataset: SupervisedDatasetBuilder, **settings: Any) -> RLConfig:
    """`config` with the checkpoint of a warm start, which runs here, in LOG_PATH_warm_start.

    A config with load_checkpoint_path is returned unchanged.
    """
    if config.load_checkpoint_path is not None:
        return config
    if config.behavior_if_log_dir_exists == "delete":
        # At once: after a stop in the warm start, a resume would find the last run at its end, and show its result.
        delete_run(config.log_path)
    stage = warm_start(config, dataset, f"{config.log_path}_warm_start", **settings)
    await run_stages([stage])
    return chz.replace(config, load_checkpoint_path=str(stage.result))
