"""The JSON body of a request, read field by field with its type. A field that is absent or null has
its default.
"""

import json
from typing import Any

from starlette.requests import Request as HttpRequest

from posttrain.backend.errors import DataError
from posttrain.backend.extras import need

NEEDED: Any = object()


class BodyError(DataError):
    """The body cannot be used; nothing was done."""


def read_json(content: bytes | bytearray) -> Any:
    """BodyError for what is not JSON, such as NaN, and for half of a surrogate pair: it is no text, and
    an answer or a file could not repeat it."""
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BodyError(f"the body is not JSON: {error}") from error
    return value


def decompressed(content: bytes, encoding: str, most_bytes: int) -> bytes:
    """A body of this content-encoding. BodyError for others than zstd, damaged ones, and ones that
    become more than `most_bytes`."""
    if encoding == "identity":
        return content
    if encoding != "zstd":
        raise BodyError(f"content-encoding {encoding[:40]!r}: the server reads zstd, or bodies as they are")
    need("pyarrow", "a body compressed by zstd")
    import pyarrow  # takes a tenth of a second, and the SDK compresses only when it is told to

    try:
        with pyarrow.input_stream(pyarrow.BufferReader(content), compression="zstd") as stream:
            read = stream.read(most_bytes + 1)
    except OSError as error:
        raise BodyError(f"the body is not zstd: {error}") from error
    if len(read) > most_bytes:
        raise BodyError(f"the body is larger than {most_bytes // 2**20} MiB once it is decompressed")
    return read


class Body:
    def __init__(self, fields: dict[str, Any]):
        self.fields = fields

    def _get(self, name: str, kind: type | tuple[type, ...], what: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            if default is NEEDED:
                raise BodyError(f"{name} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BodyError(f"{name}={str(value)[:80]!r}: {what} is needed")
        return value

    def text(self, name: str, default: Any = NEEDED) -> Any:
        return self._get(name, str, "a text", default)

    def integer(self, name: str, default: Any = NEEDED, least: int = 0, most: int = 2**63 - 1) -> Any:
        value = self._get(name, int, "a whole number", default)
        if value is not None and value is not default and not least <= value <= most:
            raise BodyError(f"{name}={value}: a whole number from {least} to {most} is needed")
        return value

    def number(self, name: str, default: Any = NEEDED) -> Any:
        return self._get(name, (int, float), "a number", default)

    def flag(self, name: str, default: Any = NEEDED) -> Any:
        return self._get(name, bool, "true or false", default)

    def listing(self, name: str, default: Any = NEEDED) -> Any:
        return self._get(name, list, "a list", default)

    def record(self, name: str, default: Any = NEEDED) -> "Body | Any":
        value = self._get(name, dict, "an object", default)
        return value if value is default else Body(value)

    def only(self, *names: str) -> dict[str, Any]:
        """The fields that are not null. BodyError for others than these, which the answer would lack."""
        fields = {name: value for name, value in self.fields.items() if value is not None}
        if unknown := sorted(fields.keys() - {*names}):
            raise BodyError(f"{', '.join(unknown)[:200]}: this server knows only {', '.join(names)} here")
        return fields

    def texts(self, name: str) -> dict[str, str] | None:
        """A mapping of texts, such as user_metadata."""
        value = self._get(name, dict, "an object of texts", None)
        if value is not None and not all(isinstance(text, str) for text in value.values()):
            raise BodyError(f"{name}: an object of texts is needed")
        return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


async def body_of(request: HttpRequest) -> Body:
    """BodyError unless it is a JSON object; no content is an empty one."""
    fields = read_json(await request.body() or b"{}")
    if not isinstance(fields, dict):
        raise BodyError("the body is not a JSON object")
    return Body(fields)


def page(request: HttpRequest, default: int) -> tuple[int, int]:
    try:
        limit = int(request.query_params.get("limit", default))
        offset = int(request.query_params.get("offset", 0))
    except ValueError as error:
        raise BodyError(f"limit or offset: {error}") from error
    return max(0, min(limit, 1000)), max(0, offset)
