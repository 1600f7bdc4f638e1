"""The run folder of a run in several processes: the first process writes it, the others read where
to resume.
"""

import os
from pathlib import Path
from typing import Any

from posttrain.backend.ranks import Processes
from posttrain.tracking.run_folder import BehaviorIfExists, RunFolder, open_run_folder


class FollowedFolder(RunFolder):
    """The first process's folder for the other processes, whose records are dropped."""

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
    """The folder that the first process opens while the others wait."""
    folder = open_run_folder(path, behavior, config) if processes.is_first else None
    processes.wait()
    return folder or FollowedFolder(Path(path).expanduser())
