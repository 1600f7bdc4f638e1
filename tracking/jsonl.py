"""Append-only JSON lines that survive a kill: a line is there whole or, if it was the last one being written, not at all."""

import json
import os
from pathlib import Path
from typing import Any

from backend.errors import DataError


def parse_json(text: str | bytes, where: str, remedy: str = "repair or delete it") -> Any:
    """DataError for anything that is not JSON in UTF-8, is nested too deep, or has half of a surrogate pair, which is no text."""
    try:
        value = json.loads(text)
        if b"\\u" in text if isinstance(text, bytes) else "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise DataError(f"{where}: nested too deep; {remedy}") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff), which is no text; {remedy}") from None
    except ValueError as error:  # not JSON, or bytes that are not UTF-8
        raise DataError(f"{where}: not JSON ({error}); {remedy}") from None


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file, [] where there is none. A torn last line is left out; any other bad line is a DataError."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() or number == len(lines):  # what follows the last newline is empty or torn
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON record ({error}); repair or delete that line") from None
    return records


def append_jsonl(path: Path, record: dict[str, Any], *, sync: bool = False) -> None:
    """Adds one line. With `sync` it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def drop_torn_line(path: Path) -> None:
    """Cuts what follows the last newline, so that the next append starts a line of its own."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file by `text`: a reader, or a run that is killed here, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
