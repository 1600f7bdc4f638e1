"""Options that are one of some names, true or false, or a text: their values from Python are checked, as the command
line checks its own. A misspelt name would be taken for another choice, and "false" for true, in silence.
"""

import os
from collections.abc import Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import chz
from chz.field import Field

from posttrain.backend.errors import ConfigError


def check_choices(config: Any) -> None:
    """ConfigError for such an option of a chz object, or of one in it, that has another value. A path becomes the
    text that its option is, in place: a Path has no `split`, and is not written as JSON."""
    for path, owner, field in _options(config):
        kind, value = option_type(field), getattr(owner, field.x_name)
        if value is field._default:  # which need not be of its type
            continue
        if needs := _needs(kind, value):
            raise ConfigError(f"{path}={value!r:.80} must be {needs}")
        if (text := _as_text(kind, value)) is not value:
            vars(owner)[field.x_name] = text
            vars(owner).pop(field.logical_name, None)  # chz keeps what was read once


def option_type(field: Field) -> Any:
    """The type of a field's values; Any where its module does not know it (TYPE_CHECKING, a class in a function)."""
    try:
        return field.x_type
    except (NameError, AttributeError):
        return Any


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Each option of the object and of those in it: its path, its owner and its field, whose `x_name` holds the value
    before a munger, which may make another type of it."""
    for name, field in chz.chz_fields(config).items():
        value, path = getattr(config, name), prefix + name
        yield path, config, field
        within = {f"{path}.{i}.": item for i, item in enumerate(value)} if isinstance(value, list | tuple) else {}
        for inner, item in (within or {f"{path}.": value}).items():
            if chz.is_chz(item) and not isinstance(item, type):
                yield from _options(item, inner)


def _needs(kind: Any, value: Any) -> str | None:
    """The condition that the value of an option of this type fails. None if it is met, and for other types."""
    if get_origin(kind) in (list, tuple) and get_args(kind)[1:] in ((), (...,)):
        values = value if isinstance(value, list | tuple) else [object()]
        needs = next((needs for item in values if (needs := _needs(get_args(kind)[0], item))), None)
        return needs and f"a list, each {needs}"
    allowed = [_allowed(part, value) for part in _parts(kind)]
    if any(each is None or each[1] for each in allowed):
        return None
    return " or ".join(each[0] for each in allowed if each)


def _as_text(kind: Any, value: Any) -> Any:
    """Of a path where the type is text; lists and dictionaries entry by entry; other values as they are."""
    kinds = get_args(kind)
    if isinstance(value, os.PathLike) and str in (parts := _parts(kind)):
        return value if isinstance(value, tuple(t for t in parts if isinstance(t, type))) else os.fspath(value)
    if isinstance(value, list | tuple) and any(isinstance(item, os.PathLike) for item in value):
        return type(value)(_as_text(kinds[0], item) for item in value) if kinds else value
    if isinstance(value, dict) and any(isinstance(item, os.PathLike) for item in value.values()):
        kind = next((part for part in _parts(kind) if get_origin(part) is dict), dict)
        return {key: _as_text(get_args(kind)[1], item) for key, item in value.items()} if get_args(kind) else value
    return value


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _allowed(kind: Any, value: Any) -> tuple[str, bool] | None:
    """The values of a type in words, and whether this is one; None for other types."""
    if kind is NoneType:
        return "None", value is None
    if kind is bool:
        return "True or False", isinstance(value, bool)
    if kind is str:
        return "a text", isinstance(value, str | os.PathLike)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = tuple(kind)
    return (
        (f"one of {', '.join(map(str, choices))}", isinstance(value, str | int | Enum) and value in choices)
        if choices
        else None
    )
