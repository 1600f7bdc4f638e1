"""JSONL files of the tests' own."""

import json
from pathlib import Path
from typing import Any


def write(path: Path, *rows: Any) -> str:
    """The path. A text is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)
