"""What a run leaves, to compare it with another run."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from posttrain.tracking.metrics_log import read_metrics


def steps_logged(folder: Path) -> int:
    """Of a run that may be under way."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "final" / "model.safetensors").read_bytes()


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Final weights and optimizer, and all metrics but the times."""
    final = folder / "checkpoints" / "final"
    tensors = load_file(final / "model.safetensors") | load_file(final / "training_state" / "optimizer.safetensors")
    metrics = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in read_metrics(folder)]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, metrics
