"""Imitation before reinforcement: the supervised run that recipes on a preset, whose weights are random, begin with."""

import asyncio
from pathlib import Path
from typing import Any, TypeVar

import chz

from rl import train as rl_train
from supervised import train as supervised_train
from supervised.types import SupervisedDatasetBuilder

RLConfig = TypeVar("RLConfig", bound=rl_train.Config)


def warm_started(config: RLConfig, dataset: SupervisedDatasetBuilder, **settings: Any) -> RLConfig:
    """`config`, to begin at the end of a supervised run on `dataset`, which is carried out here, in LOG_PATH_warm_start.

    A config that names a checkpoint stays as it is. `settings` are those of supervised.train.Config, e.g. stop_at_nll=0.3.
    """
    if config.load_checkpoint_path is not None:
        return config
    common = ("model_name", "renderer_name", "seed", "behavior_if_log_dir_exists", "backend")
    defaults = {
        "learning_rate": 2e-3,
        "lr_schedule": "constant",
        "save_every": 0,
        **{name: getattr(config, name) for name in common},
    }
    run = supervised_train.Config(dataset=dataset, log_path=f"{config.log_path}_warm_start", **(defaults | settings))
    asyncio.run(supervised_train.main(run))
    return chz.replace(config, load_checkpoint_path=str(Path(run.log_path) / "checkpoints" / "final"))
