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
    """ConfigError for such an option of a chz object, or of one in it, that has another value."""
    for path, kind, value in _options(config):
        if needs := _needs(kind, value):
            raise ConfigError(f"{path}={value!r:.80} must be {needs}")


def option_type(field: Field) -> Any:
    """The type of a field's values; Any where its module does not know it (TYPE_CHECKING, a class in a function)."""
    try:
        return field.x_type
    except (NameError, AttributeError):
        return Any


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, type and value of each option that has another value than its default."""
    for name, field in chz.chz_fields(config).items():
        value, path = getattr(config, name), prefix + name
        given = getattr(config, field.x_name)  # before its munger, which may make another type of it
        if given is not field._default:
            yield path, option_type(field), given
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
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    allowed = [_allowed(part, value) for part in parts]
    if any(each is None or each[1] for each in allowed):
        return None
    return " or ".join(each[0] for each in allowed if each)


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
