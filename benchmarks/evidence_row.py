"""A row of `make evidence`: a command, and the numbers that are read from its runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.report import RESULTS, machine
from posttrain.backend.errors import ConfigError
from posttrain.tracking.jsonl import read_json
from posttrain.tracking.metrics_log import read_metrics


@dataclass(frozen=True)
class Metric:
    """A number of a run: `key` of the metrics in `folder`, below the row's own, where {seed} is
    filled in."""

    key: str
    take: Literal["first", "last", "max", "min"] = "last"
    folder: str = ""

    def read(self, path: Path, seed: int) -> float:
        folder = path / self.folder.format(seed=seed)
        values = [record[self.key] for record in read_metrics(folder) if self.key in record]
        if not values:
            raise ConfigError(f"{folder}: no metric {self.key}")
        return {"first": values[0], "last": values[-1], "max": max(values), "min": min(values)}[self.take]


@dataclass(frozen=True)
class Row:
    """A command, and what is read from the runs that it makes. Each seed runs it once."""

    name: str
    command: str
    """Arguments of Python; {seed} and {folder} are filled in."""
    code: tuple[str, ...]
    """Files and folders of the repository that the figures depend on, as git's path specifications."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    results: str = ""
    """Instead of metrics: benchmarks/results/RESULTS-cpu.json (or -cuda), whose ratios are the figures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    picture: str = ""
    """A picture in the last seed's folder, and where in the repository it belongs: "a.png recipes/a/a.png"."""

    @property
    def is_timed(self) -> bool:
        """Its figures hold for a quiet machine; those of learning are the same beside other work."""
        return bool(self.results)

    def figures(self, folder: Path, seed: int) -> dict[str, float]:
        if self.results:
            kind = machine()["device_type"]
            return read_json(RESULTS / f"{self.results}-{kind}.json")["ratios"]
        return {label: metric.read(folder, seed) for label, metric in self.metrics.items()}
