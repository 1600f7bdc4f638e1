"""The numbers at the end of a recipe, as a file that `make evidence` reads."""

import json
from collections.abc import Mapping
from pathlib import Path

from posttrain.tracking.jsonl import write_atomically


def write_results(folder: str | Path, results: Mapping[str, float]) -> None:
    """Replaces FOLDER/results.json."""
    write_atomically(Path(folder) / "results.json", json.dumps(results, indent=2) + "\n")
