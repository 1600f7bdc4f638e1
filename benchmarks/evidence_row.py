"""A row of `make evidence`: a command, and the numbers that are read from its runs."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.report import RESULTS, machine
from posttrain.backend.errors import ConfigError
from posttrain.tracking.figures import over_total, read_curve
from posttrain.tracking.jsonl import read_json
from posttrain.tracking.metrics_log import read_metrics

OUTPUT = "output.txt"  # what a row's command prints, in its seed's folder
Take = Literal["first", "last", "max", "min", "sum"]
FIRST_AND_LAST: tuple[Take, Take] = ("first", "last")


@dataclass(frozen=True)
class Metric:
    """A number of a run: `key` of the metrics in `folder`, below the row's own, where {seed} is
    filled in."""

    key: str
    take: Take = "last"
    folder: str = ""
    over: int = 1
    """The first or last number is the mean of this many."""
    skip: int = 0
    """Left out at the beginning."""

    def read(self, path: Path, seed: int) -> float:
        values = read_curve(self.records(path, seed), self.key).values_K[self.skip :]
        first, last = statistics.mean(values[: self.over]), statistics.mean(values[-self.over :])
        numbers = {"first": first, "last": last, "max": max(values), "min": min(values), "sum": sum(values)}
        return numbers[self.take]

    def records(self, path: Path, seed: int) -> Sequence[Mapping[str, Any]]:
        folder = path / self.folder.format(seed=seed)
        records = read_metrics(folder)
        if not any(self.key in record for record in records):
            raise ConfigError(f"{folder}: no metric {self.key}")
        return records


@dataclass(frozen=True)
class Reached(Metric):
    """The first step at which `key` is at least `level`, or the sum of the metrics `total` until then;
    None if it never is."""

    level: float = 1.0
    total: tuple[str, ...] = ()

    def read(self, path: Path, seed: int) -> float | None:
        records = self.records(path, seed)
        curve = over_total(records, self.key, *self.total) if self.total else read_curve(records, self.key)
        return next((float(at) for at, value in zip(*curve, strict=True) if value >= self.level), None)


@dataclass(frozen=True)
class Result:
    """A number of a JSON file that a run has written: `key` of `file`, below the row's folder, in its `part`."""

    key: str
    file: str = "run/results.json"
    part: str = ""

    def read(self, path: Path, seed: int) -> float:
        results = read_json(path / self.file.format(seed=seed))
        results = results[self.part] if self.part else results
        if self.key not in results:
            raise ConfigError(f"{self.file} has no {self.key}")
        return float(results[self.key])


@dataclass(frozen=True)
class Listed:
    """A number of a player of a tournament (envs/elo.py)."""

    name: str
    key: str
    file: str = "run/results.json"

    def read(self, path: Path, seed: int) -> float:
        players = {player["name"]: player for player in read_json(path / self.file)["players"]}
        if self.name not in players:
            raise ConfigError(f"{self.file} has no player {self.name}: {', '.join(players)}")
        return float(players[self.name][self.key])


@dataclass(frozen=True)
class Printed:
    """The last number that the command has printed behind `words`, or the `first`."""

    words: str
    first: bool = False

    def read(self, path: Path, seed: int) -> float:
        numbers = re.findall(re.escape(self.words) + r"\s*(-?[\d.]+(?:e-?\d+)?)", (path / OUTPUT).read_text())
        if not numbers:
            raise ConfigError(f"{path / OUTPUT}: no number behind {self.words!r}")
        return float(numbers[0 if self.first else -1])


RESUME = "behavior_if_log_dir_exists=resume"


@dataclass(frozen=True)
class Row:
    """A command, and what is read from the runs that it makes. Each seed runs it once."""

    name: str
    command: str
    """Arguments of Python; {seed}, {folder} and {data} are filled in."""
    code: tuple[str, ...]
    """Files and folders of the repository that the figures depend on, as git's path specifications."""
    metrics: Mapping[str, Metric | Result | Listed | Printed] = field(default_factory=dict)
    results: str = ""
    """Instead of metrics: benchmarks/results/RESULTS-cpu.json (or -cuda), whose ratios are the figures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    picture: str = ""
    """A picture in the last seed's folder, and where in the repository it belongs: "a.png recipes/a/a.png"."""
    asks: bool = False
    """Its command does not go on with a folder that is there unless it is told to."""
    has_daemons: bool = False
    """Its command starts processes that are not its children, whose CPU time looks like other programs'."""

    @property
    def is_timed(self) -> bool:
        """Its figures hold for a quiet machine; those of learning are the same beside other work."""
        return bool(self.results)

    def figures(self, folder: Path, seed: int) -> dict[str, float | None]:
        if self.results:
            return self.report()["ratios"]
        return {label: metric.read(folder, seed) for label, metric in self.metrics.items()}

    def report(self) -> dict[str, Any]:
        return read_json(RESULTS / f"{self.results}-{machine()['device_type']}.json")
