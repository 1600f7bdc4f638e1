"""backend.trainer_restarts: a run whose training processes died is opened again, in the same command, from
its last checkpoint, as `behavior_if_log_dir_exists=resume` does. Its sampler replicas start anew, too.
"""

import gc
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, TypeVar

import chz

from posttrain.backend.errors import TrainerLostError
from posttrain.tracking.how_to_resume import how_to_resume

Config = TypeVar("Config", bound=Any)
T = TypeVar("T")


def with_restarts(main: Callable[[Config], Coroutine[Any, Any, T]]) -> Callable[[Config], Coroutine[Any, Any, T]]:
    """`main` opens the run folder of its configuration. TrainerLostError after the last restart."""

    @wraps(main)
    async def restarting(config: Config) -> T:
        left = config.backend.trainer_restarts
        while True:
            try:
                return await main(config)
            except TrainerLostError as error:
                if not left:
                    error.add_note(how_to_resume())
                    raise
                print(f"WARNING {error}: done now, {left - 1} more allowed (backend.trainer_restarts)", flush=True)
            left -= 1
            gc.collect()  # the lost run's clients
            config = chz.replace(config, behavior_if_log_dir_exists="resume")

    return restarting
