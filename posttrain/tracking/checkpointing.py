"""Resuming a run, its checkpoints, and stopping without the loss of a step."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from posttrain.backend.checkpoint_files import REMEDY, read_state
from posttrain.backend.errors import CheckpointError
from posttrain.tracking.disk_space import check_disk_space
from posttrain.tracking.how_to_resume import how_to_resume
from posttrain.tracking.run_folder import CheckpointRecord, RunFolder


class Checkpointed(Protocol):
    """A TrainingClient, or another client with checkpoints
    (recipes/libraries/belief_state/trainer.py)."""

    def save_state(self, name: str, *, extra: dict[str, Any]) -> "Future[Any]": ...

    def load_state(self, path: str) -> "Future[Any]": ...

    def load_state_with_optimizer(self, path: str) -> "Future[Any]": ...

    def checkpoint_bytes(self) -> int: ...


class Checkpointer:
    """Saves `training_client` into the run folder. Checkpoint i holds the state before step i."""

    def __init__(
        self,
        run: RunFolder,
        training_client: Checkpointed,
        save_every: int,
        keep: int | None,
        save_minutes: float | None = None,
        save_tokens: int | None = None,
    ):
        self._run, self._client, self._save_every, self._keep = run, training_client, save_every, keep
        self._save_minutes, self._saved_at = save_minutes, time.monotonic()
        self._save_tokens, self._tokens = save_tokens, 0.0  # of the steps since the last checkpoint
        self._saved_step = -1
        self.finished = False  # whether the resumed run had ended
        self.nothing_left = False  # and has no steps left
        self.resumed_extra: dict[str, Any] = {}  # `extra` of the resumed checkpoint

    def start(self, load_checkpoint_path: str | None, num_steps: int | None = None, may_end_early: bool = False) -> int:
        """Loads the folder's last checkpoint, else the weights of another; returns the first step.

        A run that ended after `num_steps` steps or more keeps its metrics: there is nothing left to
        do. With `may_end_early`, a run may have ended after fewer.
        """
        record, records = self._run.last_checkpoint(), self._run.list_checkpoints()
        step = 0
        if record is not None:
            step = self._resume(record, before=records[-2] if len(records) > 1 else None)
        elif load_checkpoint_path:
            self._client.load_state(load_checkpoint_path).result()
        past_the_end = num_steps is not None and step > num_steps
        self.nothing_left = past_the_end or (self.finished and (may_end_early or step == num_steps))
        if self.nothing_left:
            print(f"{self._run.path} has finished at step {step}: there is nothing to train")
            return step
        size = self._client.checkpoint_bytes()
        every = {"steps": self._save_every, "minutes": self._save_minutes, "tokens": self._save_tokens}
        check_disk_space(self._run.path, size, every, self._keep, existing=len(records))
        self._run.truncate_metrics(step)
        if self._run.resumed:
            print(f"resuming {self._run.path} at step {step}" + ("" if record else ": it has no checkpoint yet"))
        return step

    def _resume(self, record: CheckpointRecord, before: CheckpointRecord | None) -> int:
        try:
            self._client.load_state_with_optimizer(str(record.path)).result()
            self.resumed_extra = read_state(record.path)["extra"]
            # The checkpoint knows its step: a kill between a replaced folder and its record leaves an
            # older record.
            step = self.resumed_extra.get("next_step", record.step)
            if type(step) is not int or step < 0:
                raise CheckpointError(f"{record.path}: its next_step is {step!r}, no number of steps: {REMEDY}")
        except CheckpointError as error:
            earlier = f"; without {record.path} the run goes on from {before.path.name}" if before else ""
            raise CheckpointError(f"{self._run.path} cannot be resumed: {error}{earlier}") from error
        self._saved_step, self.finished = step, record.name == "final"
        return step

    def after_step(self, next_step: int, extra: Callable[[], dict[str, Any]], tokens: float = 0) -> None:
        """`extra` is called only if a checkpoint is written; `tokens` are those of the step."""
        self._tokens += tokens
        late = self._save_minutes is not None and time.monotonic() - self._saved_at >= 60 * self._save_minutes
        late |= self._save_tokens is not None and self._tokens >= self._save_tokens
        if late or (self._save_every and next_step % self._save_every == 0):
            self.save(f"{next_step:06d}", next_step, extra())

    def save(self, name: str, next_step: int, extra: dict[str, Any] | None = None) -> None:
        path = self._run.checkpoints / name
        self._client.save_state(str(path.resolve()), extra={"next_step": next_step, **(extra or {})}).result()
        self._run.record_checkpoint(name, next_step, path)
        self._saved_step, self._saved_at, self._tokens = next_step, time.monotonic(), 0.0
        if self._keep:
            self._run.prune_checkpoints(self._keep)

    def save_once(self, next_step: int, extra: Callable[[], dict[str, Any]]) -> None:
        """Saves, unless this step is saved."""
        if self._saved_step != next_step:
            self.save(f"{next_step:06d}", next_step, extra())

    def interrupted(self, next_step: int, extra: Callable[[], dict[str, Any]]) -> None:
        """Saves, unless this step is saved, and ends the command as Ctrl-C does."""
        self.save_once(next_step, extra)
        print(f"stopped before step {next_step}; its state is saved; {how_to_resume()}")
        raise KeyboardInterrupt
