"""A recipe's stages: each a named result, the settings that made it, and the stages it needs.
Concurrent stages: recipes/star_graph/side_by_side.py.

  answers = Stage("answers", folder / "answers.jsonl", {"number": 50}, partial(sample, ...), needs=[policy])
  await run_stages([answers])  # makes the missing results, the policy first
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import chz

from posttrain.backend.errors import ConfigError
from posttrain.tracking.run_folder import BehaviorIfExists
from posttrain.tracking.settings import (
    changes,
    changes_text,
    config_to_json,
    read_settings,
    with_later_options,
    write_settings,
)


@dataclass(frozen=True, eq=False)
class Stage:
    """`make` fills `path`, a file or a folder, and continues after a kill. It may be async.

    `settings` (a config or a dictionary) are everything the result depends on, except the settings
    of `needs`. A stage is finished when `path` exists, or `last` in the folder `path`; it must be
    written whole or not at all. With `always`, `make` is always called and handles an existing
    result itself.
    """

    name: str
    path: Path
    settings: Any
    make: Callable[[], Any]
    needs: Sequence["Stage"] = ()
    last: str = "."
    always: bool = False

    @property
    def result(self) -> Path:
        return self.path / self.last

    @property
    def unfinished(self) -> Path:
        """For a `make` that writes a file gradually."""
        return self.path.with_name(f"{self.path.stem}.unfinished{self.path.suffix}")

    @property
    def record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.made_with.json")

    def made_with(self) -> dict[str, Any]:
        """The settings of this stage and all it depends on, by stage name. Paths are relative to
        the record's folder."""
        return {stage.name: _relative(config_to_json(stage.settings), f"{self.path.parent}/") for stage in self._all()}

    def _all(self) -> list["Stage"]:
        """All that it depends on, and itself."""
        return [stage for need in self.needs for stage in need._all()] + [self]

    def begun(self) -> list[Path]:
        """Existing files of the stage."""
        return [
            path for path in (self.path, self.unfinished) if path.is_file() or (path.is_dir() and any(path.iterdir()))
        ]

    def is_finished(self) -> bool:
        """ConfigError if existing files, finished or not, were made with other settings."""
        begun = self.begun()
        if self.always or not begun:
            return False
        remedy = "delete it to make it anew, or choose another log_path"
        if not self.record.exists():
            raise ConfigError(f"{begun[0]} is there, but not {self.record}, the record of its settings: {remedy}")
        settings = {stage.name: stage.settings for stage in self._all()}
        if different := changes(with_later_options(read_settings(self.record), settings), self.made_with()):
            raise ConfigError(f"{begun[0]} was made with {changes_text(different)}: {remedy}")
        return self.result.exists()

    async def run(self) -> None:
        """Makes the result. Its settings are recorded first."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        if not self.begun():
            write_settings(self.record, self.made_with())
        if inspect.isawaitable(outcome := self.make()):
            await outcome
        if not self.result.exists():
            raise ConfigError(f"the stage {self.name} has ended without making {self.result}")
        write_settings(self.record, self.made_with())  # `make` may have replaced the folder


def training_stage(
    name: str,
    main: Callable[[Any], Any],
    config: Any,
    needs: Sequence[Stage] = (),
    behavior: BehaviorIfExists = "resume",
) -> Stage:
    """`main(config)` is a training run in config.log_path; the result is its last checkpoint. A
    killed run is resumed. Another `behavior` works as the run's option behavior_if_log_dir_exists.
    """
    config = chz.replace(config, behavior_if_log_dir_exists=behavior)
    always = behavior != "resume"
    return Stage(name, Path(config.log_path), config, partial(main, config), needs, "checkpoints/final", always)


def plan(stages: Sequence[Stage]) -> dict[str, tuple[Stage, bool]]:
    """By name, in order: `stages` and the needs of unfinished ones, each with whether it is
    finished. ConfigError, before any is made, if one was made with other settings."""
    planned: dict[str, tuple[Stage, bool]] = {}

    def visit(stage: Stage) -> None:
        if stage.name not in planned:
            finished = stage.is_finished()
            for need in () if finished else stage.needs:
                visit(need)
            planned[stage.name] = stage, finished

    for stage in stages:
        visit(stage)
    return planned


async def run_stages(stages: Sequence[Stage]) -> None:
    """Makes the missing results of `stages` and their needs, in order; prints those that exist."""
    for stage, finished in plan(stages).values():
        print(f"--- {stage.name}" + (f" is there: {stage.result}" if finished else ""), flush=True)
        if not finished:
            await stage.run()


def chosen(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages of these names, in the order of `stages`. ConfigError for an unknown name."""
    known = [stage.name for stage in stages]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"stages={','.join(unknown)}: the stages are {', '.join(known)}")
    return [stage for stage in stages if stage.name in names]


def _relative(value: Any, folder: str) -> Any:
    """Relative paths, so that a folder of results can be moved or renamed."""
    if isinstance(value, dict):
        return {key: _relative(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    return value.removeprefix(folder) if isinstance(value, str) else value
