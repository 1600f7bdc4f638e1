"""The run folder of a run in several processes: the first one writes it, the others only read where
to go on.
"""

import os
from pathlib import Path
from typing import Any

from posttrain.tracking.run_folder import BehaviorIfExists, RunFolder, open_run_folder
from recipes.libraries.belief_state.distributed import Processes


class FollowedFolder(RunFolder):
    """The first process's folder, for the others: nothing they record reaches it."""

    @property
    def metrics_file(self) -> Path:
        return Path(os.devnull)

    def record_checkpoint(self, name: str, step: int, path: str | os.PathLike[str]) -> None:
        pass

    def prune_checkpoints(self, keep: int) -> None:
        pass

    def truncate_metrics(self, step: int) -> None:
        pass


def open_shared_folder(path: str, behavior: BehaviorIfExists, config: Any, processes: Processes) -> RunFolder:
    """The folder as the first process opens it; the others wait until it has."""
    folder = open_run_folder(path, behavior, config) if processes.is_first else None
    processes.wait()
    return folder or FollowedFolder(Path(path).expanduser())
