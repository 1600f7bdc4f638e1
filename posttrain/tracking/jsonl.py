"""JSON files, and append-only JSON lines that survive a kill: a line is whole or absent. An
unreadable file is a DataError of one line with file, place and remedy.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from posttrain.backend.errors import DataError

T = TypeVar("T")
EXAMPLE_CHARS = 80  # of a bad value in a message


def read_bytes(path: str | os.PathLike[str], remedy: str = "choose another file") -> bytes:
    """The file's content. DataError if it is missing, a folder or unreadable."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}") from error


def parse_json(text: str | bytes, where: str, remedy: str = "repair or delete it") -> Any:
    """DataError for text that is not JSON in UTF-8, is nested too deep, or has a lone surrogate."""
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


def read_json(path: str | os.PathLike[str], remedy: str = "repair or delete it") -> Any:
    return parse_json(read_bytes(path, remedy), str(path), remedy)


def read_jsonl(path: str | os.PathLike[str], fields: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The records of a file, [] without one. A torn last line is dropped; any other bad line is a
    DataError. `fields` are required names with their types."""
    path = Path(path)
    if not os.path.lexists(path):
        return []
    records = []
    lines = read_bytes(path, "put it back, or delete it").split(b"\n")
    for number, line in enumerate(lines, start=1):
        # what follows the last newline is empty or torn
        if not line.strip() or number == len(lines):
            continue
        where = f"{path}:{number}"
        record = parse_json(line, where, "repair or delete that line")
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON record but {str(record)[:EXAMPLE_CHARS]}; repair or delete that line")
        for name, kind in (fields or {}).items():
            if not isinstance(record.get(name), kind):
                raise DataError(f"{where}: no {name!r}, or one of another type; repair or delete that line")
        records.append(record)
    return records


def read_dataclasses(path: str | os.PathLike[str], kind: type[T]) -> list[T]:
    """The records of a file as objects of a dataclass."""
    return [as_dataclass(record, kind, f"{path}:{n}") for n, record in enumerate(read_jsonl(path), start=1)]


def as_dataclass(record: Any, kind: type[T], where: str) -> T:
    """DataError if the record has other fields."""
    try:
        return kind(**record)
    except TypeError as error:
        reason = str(error).replace(f"{kind.__name__}.__init__()", f"{kind.__name__}:")
        raise DataError(f"{where}: {reason}; it is of another version, or damaged: delete it") from None


def append_jsonl(path: Path, record: dict[str, Any], *, sync: bool = False) -> None:
    """Appends one line; with `sync` it is on the disk on return."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def drop_torn_line(path: Path) -> None:
    """Cuts the text after the last newline, so that the next append starts a line."""
    if os.path.lexists(path) and (content := read_bytes(path)) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Replaces the file, atomically, by a line for each record, a dict or a dataclass."""
    fields = (asdict(record) if is_dataclass(record) and not isinstance(record, type) else record for record in records)
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in fields))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file's content: readers, and a killed run, see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # the disk is full: remove the partial file
        temporary.unlink(missing_ok=True)
        raise
