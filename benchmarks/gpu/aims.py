"""What one card should reach, and what a first light measured of it. Aims are of one H200.

    python -m benchmarks.gpu.aims FOLDER  # with the blocks' JSON files, which first_light.py wrote

A missed aim does not fail its block, which would then run again.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Aim:
    """The figure `key` of `block` is at least or at most so much; without either it is wanted as it is."""

    what: str
    block: str
    key: str
    least: float | None = None
    most: float | None = None

    def bound(self) -> str:
        if self.least is not None:
            return f"at least {self.least:,.6g}"
        return "measured" if self.most is None else f"at most {self.most:,.6g}"

    def verdict(self, found: object) -> str:
        if not isinstance(found, int | float):
            return "not measured"
        if self.least is None and self.most is None:
            return "measured"
        return "reached" if (self.least or 0) <= found <= (self.most or float("inf")) else "missed"


AIMS = (
    Aim("training, 0.5B, 16 x 1,024 tokens", "train_step", "tokens/s within 30 GiB", least=120_000),
    Aim("the same in less memory", "train_step", "tokens/s within 20 GiB", least=160_000),
    Aim("raw sampling, 1,024 sequences", "sampling", "tokens/s, one engine", least=30_000),
    Aim("the same by several engines", "sampling", "tokens/s, several engines", least=60_000),
    Aim("through environments, of raw", "sampling", "rollouts / raw", least=0.95),
    Aim("sync of 0.5B weights", "half_b_engine", "sync: in all, ms", most=10),
    Aim("sampler against trainer, 0.5B", "half_b_engine", "largest mean gap at temperature 1, nats", most=0.01),
    Aim("LoRA of 8B in 80 GB (74.5 GiB)", "large_models", "8B, LoRA: GiB of the card", most=74.5),
    Aim("speed of LoRA of 8B", "large_models", "8B, LoRA: tokens/s"),
    Aim("all weights of 8B in 141 GB (131.3 GiB)", "large_models", "8B, all weights: GiB of the card", most=131.3),
    Aim("speed of all weights of 8B", "large_models", "8B, all weights: tokens/s"),
    Aim("Belief State Transformer, G(5,5)", "belief_state", "steps/s", least=5),
    Aim("accuracy of the Belief State Transformer", "star_graph_run", "paths right"),
    Aim("an RL run that learns, 85M weights", "learning", "accuracy above supervised training alone", least=0.05),
)


def table(records: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each aim: what, block, key, bound, the figure, the verdict; figures of a CPU are not judged."""
    rows = []
    for aim in AIMS:
        record = records.get(aim.block, {})
        found = record.get(aim.key)
        verdict = "of a CPU" if record.get("device") == "cpu" and found is not None else aim.verdict(found)
        shown = "" if found is None else f"{found:,.6g}" if isinstance(found, int | float) else str(found)
        rows.append([aim.what, aim.block, aim.key, aim.bound(), shown, verdict])
    return rows


def read_records(folder: Path, blocks: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of those blocks that have run."""
    files = {block: folder / f"{block}.json" for block in blocks}
    return {block: json.loads(file.read_text()) for block, file in files.items() if file.exists()}


def main() -> None:
    for row in table(read_records(Path(sys.argv[1]), {aim.block for aim in AIMS})):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
