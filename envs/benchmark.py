"""Benchmarks: held-out problems only, with their published prompt and scoring, from the hub's name
or a path. Each file of a benchmark says where its scoring was published and what differs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chz

from envs.problem import Problem, Split
from envs.problem_env import ProblemSetBuilder
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import WHOLE
from posttrain.renderers.types import Renderer
from rl.types import RLDataset
from supervised.rows import Fields, Row, read_rows
from supervised.table_rows import table_rows


def read_split(path: str | None, hub_name: str, subset: str | None, split: str) -> Sequence[Row]:
    """The rows of a JSONL file, of SPLIT.jsonl or another data set in a folder, or of the hub.
    DataError, with what is there, if the split is missing."""
    if path is None:
        return table_rows(hub_name, subset, split)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return read_rows(path)
    if (file := folder / f"{split}.jsonl").exists():
        return read_rows(file)
    if files := sorted(other.name for other in folder.glob("*.jsonl")):
        raise DataError(f"{path} has no {file.name}; it has {', '.join(files)}: give one of them, or its split")
    return table_rows(path, subset, split)


def list_of(where: str, row: Fields, name: str, kind: type = str) -> list[Any]:
    """The list in the field `name`, of elements of one kind."""
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; the fields are {', '.join(map(repr, row))}")
    values = row[name]
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise DataError(f"{where}: {name!r} must be a list of {kind.__name__}, not {str(values)[:80]}")
    return values


@chz.chz
class BenchmarkBuilder(ProblemSetBuilder):
    """A benchmark reads its rows and makes a Problem of each."""

    path: str | None = chz.field(
        default=None, doc="JSONL file, or folder with SPLIT.jsonl or other data files; None = hub_name"
    )
    hub_name: str = chz.field(default="", doc="Hugging Face dataset")
    subset: str | None = chz.field(default=None, doc="configuration of the Hugging Face dataset")
    split: str = chz.field(default="test", doc="split to evaluate on")
    num_test: int | None = chz.field(
        default=None, validator=WHOLE, doc="number of test problems, the first ones; None = all"
    )

    def problem(self, where: str, row: Fields) -> Problem:
        """Raises DataError, with `where`, for a row without its columns."""
        raise NotImplementedError

    def problems(self, rows: Sequence[Row]) -> list[Problem]:
        return [self.problem(where, row) for where, row in rows]

    def read(self, split: Split, limit: int | None) -> list[Problem]:
        return [] if split == "train" else self.problems(self.rows(self.split)[:limit])

    def rows(self, split: str) -> Sequence[Row]:
        return read_split(self.path, self.hub_name, self.subset, split)

    def recommended_max_tokens(self) -> int:
        return 2048

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        raise ConfigError(
            f"{type(self).__name__} is a benchmark without training problems: evaluate on it with posttrain-eval, or "
            "as an evaluator of a run"
        )
