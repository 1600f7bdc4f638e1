"""Checks, before the first step, that a run's checkpoints fit on the disk. Left out: quotas, other
writers.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from posttrain.backend.errors import CheckpointError


def check_disk_space(
    folder: Path, checkpoint_bytes: int, every: Mapping[str, float | None], keep: int | None, existing: int
) -> None:
    """Prints the size and number of future checkpoints, which come `every` so many steps, minutes and
    tokens; `existing` are on the disk. CheckpointError if not even one more fits; a warning if the
    kept ones do not."""
    free = shutil.disk_usage(folder).free
    periods = " or ".join(f"{count:,}".removesuffix(".0") + f" {noun}" for noun, count in every.items() if count)
    when = f"every {periods} and at the end" if periods else "at the end"
    kept = f"the last {keep} and `final` are kept" if keep else "all are kept"
    print(f"checkpoints: {size_text(checkpoint_bytes)} each, {when}; {kept}; {size_text(free)} free at {folder}")
    remedy = "free some space, choose another log_path, or train an adapter (lora_rank), whose checkpoints are small"
    if free < checkpoint_bytes:
        raise CheckpointError(
            f"a checkpoint takes {size_text(checkpoint_bytes)}, and {folder} has {size_text(free)} free: {remedy}"
        )
    together = 1 + (keep or 1) if periods else 1  # `final` and the last ones
    at_once = together + 1 - min(existing, together)  # an old one is deleted after the new one is written
    if free < at_once * checkpoint_bytes:
        total = size_text(at_once * checkpoint_bytes)
        print(
            f"warning: up to {total} more will be needed, and {size_text(free)} are free: {remedy}, or lower "
            "keep_checkpoints"
        )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def size_text(count: float) -> str:
    """Decimal units: 5.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
