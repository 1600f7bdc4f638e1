"""JSON files, and append-only JSON lines that survive a kill: a line is whole or absent. An
unreadable file is a DataError of one line with file, place and remedy.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from posttrain.backend.errors import DataError

T = TypeVar("T")
EXAMPLE_CHARS = 80  # of a bad value in a message
BLOCK = 1 << 16  # bytes that are read first from the end of a file
MISSING = "put it back, or delete it"


def read_bytes(path: str | os.PathLike[str], remedy: str = "choose another file", last: int | None = None) -> bytes:
    """The file's content, or its `last` bytes. DataError if it is missing, a folder or unreadable."""
    try:
        with Path(path).open("rb") as file:
            if last is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last))
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise _unreadable(path, error, remedy) from error


def _unreadable(path: str | os.PathLike[str], error: Exception, remedy: str) -> DataError:
    return DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}")


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
        raise DataError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff), which is not text; {remedy}"
        ) from None
    except ValueError as error:  # not JSON, or bytes that are not UTF-8
        raise DataError(f"{where}: not JSON ({error}); {remedy}") from None


def read_json(path: str | os.PathLike[str], remedy: str = "repair or delete it") -> Any:
    return parse_json(read_bytes(path, remedy), str(path), remedy)


def read_jsonl(path: str | os.PathLike[str], fields: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The records of a file, [] without one. A torn last line is dropped; any other bad line is a
    DataError. `fields` are required names with their types."""
    return [record for _, record in lines_and_records(path, fields)]


def lines_and_records(
    path: str | os.PathLike[str], fields: Mapping[str, Any] | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """As `read_jsonl`, a line at a time: a million records take gigabytes."""
    if not os.path.lexists(path):
        return
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and line.endswith(b"\n"):  # else it is torn
                    yield line, _record(line, f"{path}:{number}", fields or {})
    except OSError as error:
        raise _unreadable(path, error, MISSING) from error


def read_last_records(
    path: str | os.PathLike[str], count: int, fields: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """As `read_jsonl`, of the last `count` lines, whatever the length of the file."""
    if not os.path.lexists(path):
        return []
    size, block = BLOCK, read_bytes(path, MISSING, BLOCK)
    while len(block) == size and block.count(b"\n") <= count:
        size *= 4
        block = read_bytes(path, MISSING, size)
    lines = block.split(b"\n")[:-1][-count:]
    places = (f"{path}: line {len(lines) - i} from the end" for i in range(len(lines)))
    return [_record(line, where, fields or {}) for line, where in zip(lines, places, strict=True) if line.strip()]


def _record(line: bytes, where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    record = parse_json(line, where, "repair or delete that line")
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a JSON record but {str(record)[:EXAMPLE_CHARS]}; repair or delete that line")
    for name, kind in fields.items():
        if not isinstance(record.get(name), kind):
            raise DataError(f"{where}: no {name!r}, or one of another type; repair or delete that line")
    return record


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
    if os.path.lexists(path) and read_bytes(path, last=1) not in (b"", b"\n"):
        os.truncate(path, read_bytes(path).rfind(b"\n") + 1)


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Replaces the file, atomically, by a line for each record, a dict or a dataclass."""
    fields = (asdict(record) if is_dataclass(record) and not isinstance(record, type) else record for record in records)
    write_atomically(path, (f"{json.dumps(record, ensure_ascii=False)}\n".encode() for record in fields))


def write_atomically(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Replaces the file's content: readers, and a killed run, see the old file or the new one."""
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # the disk is full, or the content cannot be made: remove the partial file
        temporary.unlink(missing_ok=True)
        raise
