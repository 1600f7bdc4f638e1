"""Metrics of a run: a JSON line per step in metrics.jsonl, other loggers, a console table, timers."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.backend.errors import ConfigError
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, lines_and_records, read_last_records
from posttrain.tracking.loggers import open_loggers
from posttrain.tracking.run_folder import RunFolder

if TYPE_CHECKING:  # commands that need no model do not import torch
    from posttrain.tracking.run_config import RunConfig

Metrics = dict[str, float]
RESERVED = {"step", "non_finite"}


class MetricsLog:
    """Appends to metrics.jsonl, and to what else `config` asks for (loggers.py)."""

    def __init__(self, run_folder: RunFolder, config: "RunConfig | None" = None):
        self.file = run_folder.metrics_file
        drop_torn_line(self.file)
        self._loggers = open_loggers(run_folder, config) if config else []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes `{"step": step, **metrics}`; non-finite values are null and named in "non_finite". ConfigError
        for a metric of such a name, as an evaluator or a batch reward may return it."""
        if taken := RESERVED & metrics.keys():
            raise ConfigError(
                f"a metric is called {min(taken)!r}, which names a field of metrics.jsonl: give it another name where "
                "it is made (an evaluator, a batch reward)"
            )
        record: dict[str, Any] = {"step": step}
        non_finite = {}
        for name, value in metrics.items():
            value = value if type(value) is int else float(value)
            record[name] = value if math.isfinite(value) else None
            if record[name] is None:
                non_finite[name] = str(value)
        if non_finite:
            record["non_finite"] = non_finite
        append_jsonl(self.file, record)
        for logger in self._loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        while self._loggers:
            self._loggers.pop().close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run folder or a metrics.jsonl, in order, without a torn last line."""
    return [*each_record(path)]


def each_record(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """As `read_metrics`, one at a time, however long the run was."""
    path = Path(path)
    lines = lines_and_records(path / "metrics.jsonl" if path.is_dir() else path, {"step": int})
    return (record for _, record in lines)


def read_latest_metrics(run: Path) -> list[dict[str, Any]]:
    """The last records of a run folder, those of its last step among them, however long the run was."""
    return read_last_records(run / "metrics.jsonl", 4, {"step": int})


def read_last_metrics(run: Path) -> dict[str, float]:
    """The result of a finished run: metrics of its last step, and those after it."""
    return last_metrics(read_latest_metrics(run))


def last_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last = records[-1]["step"] if records else 0
    merged = {name: value for record in records if record["step"] >= last - 1 for name, value in record.items()}
    return {name: math.nan if value is None else value for name, value in merged.items() if name not in RESERVED}


@contextmanager
def timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds inside to `metrics["time/<name>"]`, also if the block raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        key = f"time/{name}"
        metrics[key] = metrics.get(key, 0.0) + time.perf_counter() - start


def print_metrics_table(metrics: Mapping[str, float], title: str, names: Sequence[str] | None = None) -> None:
    """Prints `names` (default: all, sorted), with a rule between groups (prefixes)."""
    from rich import get_console
    from rich.table import Table

    table = Table(
        "metric", title=title, title_justify="left", header_style="dim", title_style="bold", min_width=len(title)
    )
    table.add_column("value", justify="right")
    shown = sorted(metrics) if names is None else names
    for name, following in zip_longest(shown, shown[1:]):
        last_of_group = names is None and following is not None and following.split("/")[0] != name.split("/")[0]
        table.add_row(name, format_number(metrics[name]), end_section=last_of_group)
    get_console().print(table)  # the progress bar's console: the bar stays below


# The most important metrics, in this order; a run has some of them.
IMPORTANT = (
    *("test/env/all/correct", "test/env/all/reward/total", "env/all/correct", "env/all/reward/total"),
    *("test/teacher_kl", "train_teacher_kl", "teacher_kl"),  # of distillation
    *("test/nll", "train_mean_nll", "test/dpo_loss", "dpo_loss", "train_loss", "test/loss_next_token"),
    *("test/accuracy", "accuracy", "train_accuracy", "test/exact", "test/first_hop", "test/margin", "margin"),
    *("optim/logprob_gap_mean", "optim/entropy", "kl_policy_base", "env/all/ac_tokens_per_turn", "env/all/turns"),
    *("optim/loss", "optim/grad_norm", "optim/lr", "learning_rate", "num_tokens"),
)
ROWS = 8


def print_last_metrics(run_folder: RunFolder, metrics: Mapping[str, float]) -> None:
    """The end of a run: its eight main metrics, all "alarm..." and the file with the rest."""
    shown = [name for name in metrics if name.startswith("alarm")]
    shown += [name for name in IMPORTANT if name in metrics][:ROWS]
    print_metrics_table(metrics, f"{run_folder.path}: last step", shown)
    if rest := len(metrics) - len(shown):
        print(f"{rest} more in {run_folder.metrics_file}")


def format_number(value: float) -> str:
    """About four significant digits, at most ten characters: 1234567, 0.7125, 3.1e-05."""
    if isinstance(value, int) or (value == int(value) if math.isfinite(value) else False):
        return f"{value:.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"
