"""The objects of a configuration: which class each gets from `env=NAME` or `env=module:Class`, and the options
that these classes have. Blueprint._make_lazy lists them, private in chz 0.4.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, get_args

import chz
from chz.blueprint import Blueprint, Castable
from chz.blueprint._wildcard import wildcard_key_to_regex
from chz.factories import MetaFromString
from chz.tiepin import type_repr

from posttrain.backend.errors import ConfigError, one_line
from posttrain.tracking.option_hints import class_meant, unknown_name

# option -> short name -> "module:Class field=value ...". A short name may be a pattern ("*.jsonl"),
# with {} for the given value.
ShortNames = Mapping[str, Mapping[str, str]]


def choose_classes(
    config_class: type, given: dict[str, str], short_names: dict[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Settings of a blueprint: the default objects, and the classes named in `given`, which loses
    those options; adds their short names. For `env.field=value` alone chz would build the annotated base class: the
    default's class and fields are set first."""
    settings = _object_settings(config_class)
    # the outer class determines the inner options
    for key in sorted(given, key=lambda key: key.count(".")):
        parameters = parameters_of(config_class, settings)
        if element := _element(key, parameters):
            parameters = parameters_of(config_class, settings | {key: element})
        objects = [path for path in matches(key, parameters) if _is_object(path, parameters[path].type, short_names)]
        for path in objects:
            settings = {name: value for name, value in settings.items() if not name.startswith(f"{path}.")}
            if given[key] == "None" and type(None) in get_args(parameters[path].type):
                settings[path] = None
                continue
            target, fields = _resolve(path, given[key], names_at(path, short_names))
            settings[path] = _load_class(path, target, parameters[path])
            # a class may have short names of its own for its fields
            of_class: ShortNames = getattr(settings[path], "short_names", {})
            short_names |= {f"{path}.{name}": names for name, names in of_class.items()}
            settings |= _object_settings(settings[path], f"{path}.")
            settings |= {f"{path}.{name}": Castable(value) for name, value in fields.items()}
        if objects:
            del given[key]
    return settings


def parameters_of(config_class: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of the configuration with these classes, by dotted path."""
    parameters = Blueprint(config_class).apply(settings)._make_lazy().all_params
    return {path: parameter for path, parameter in parameters.items() if path}


def _object_settings(of: Any, prefix: str = "") -> dict[str, Any]:
    """Blueprint values that rebuild the chz objects among the defaults of a class or an instance."""
    settings = {}
    for name, field in (chz.chz_fields(of) if chz.is_chz(of) else {}).items():
        if not isinstance(of, type):
            value = getattr(of, field.x_name)
        elif callable(field._default_factory) and _is_object(name, field.x_type, {}):
            value = field._default_factory()
        else:
            value = field._default
        if chz.is_chz(value) and not isinstance(value, type):
            settings |= {prefix + name: type(value)} | _object_settings(value, f"{prefix}{name}.")
        elif not isinstance(of, type) and value != field._default and value != {}:  # {} takes keys as it is
            settings[prefix + name] = value
    return settings


def _element(key: str, parameters: Mapping[str, Any]) -> type | None:
    """The class of a list's objects, for the key of one that is to be made: `evaluators.0`."""
    parent, _, index = key.rpartition(".")
    if not index.isdigit() or key in parameters or parent not in parameters:
        return None
    return next((kind for kind in get_args(parameters[parent].type) if chz.is_chz(kind)), None)


def names_at(path: str, short_names: ShortNames) -> Mapping[str, str]:
    """Those of `evaluators.*` at `evaluators.0`."""
    patterns = (p for p in short_names if p.count(".") == path.count(".") and fnmatch(path, p))
    return short_names.get(path) or short_names.get(next(patterns, ""), {})


def _is_object(path: str, kind: Any, short_names: ShortNames) -> bool:
    named = bool(names_at(path, short_names))
    return named or any(isinstance(part, type) and chz.is_chz(part) for part in (kind, *get_args(kind)))


def matches(key: str, parameters: Mapping[str, Any]) -> list[str]:
    """The options that a key sets; `a...b` is any b below a."""
    pattern = wildcard_key_to_regex(key) if "..." in key and not key.endswith("...") else None
    return [path for path in parameters if (pattern.fullmatch(path) if pattern else path == key)]


def _resolve(path: str, value: str, names: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The "module:Class" of a short name, and the fields the name sets."""
    ending = value.lower()  # Windows writes .JSONL
    name = value if value in names else next((name for name in names if "*" in name and fnmatch(ending, name)), None)
    if name is not None:
        target, *fields = (part.replace("{}", value) for part in names[name].split())
        return target, dict(field.split("=", 1) for field in fields)
    if ":" in value or not names:
        return value, {}
    raise ConfigError(unknown_name(path, value, names))


def _load_class(path: str, target: str, parameter: Any) -> type:
    find_modules_here()
    try:
        loaded_class = parameter.meta_factory.from_string(target)
    except (MetaFromString, ValueError) as error:
        raise ConfigError(f"{path}={target}: {one_line(error)}{class_meant(target, error)}") from None
    if not isinstance(loaded_class, type):
        raise ConfigError(
            f"{path}={target}: not a class; give module:Class of a subclass of {type_repr(parameter.type)}"
        )
    _check_annotations(f"{path}={target}", loaded_class, set())
    return loaded_class


def _check_annotations(option: str, kind: type, seen: set[type]) -> None:
    """ConfigError for a field whose annotation names what is imported for type checkers alone: chz evaluates it."""
    seen.add(kind)
    for name, field in (chz.chz_fields(kind) if chz.is_chz(kind) else {}).items():
        try:
            of_field = field.x_type
        except (NameError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{option}: the annotation of {kind.__name__}.{name} cannot be read ({error}): import what it names "
                "outside `if TYPE_CHECKING`"
            ) from error
        for part in (of_field, *get_args(of_field)):
            if isinstance(part, type) and part not in seen:
                _check_annotations(option, part, seen)


def check_chosen(chosen: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """ConfigError for required objects without a class: chz would build the annotated class, whose
    methods raise NotImplementedError."""
    missing = [
        path
        for path, parameter in parameters.items()
        if parameter.default is None and path not in chosen and _is_abstract(parameter.type)
    ]
    if missing:
        wanted = [f"{path}=module:Class ({_known_subclasses(parameters[path].type)})" for path in missing]
        raise ConfigError(f"{', '.join(missing)}: not given; give {' and '.join(wanted)}")


def _is_abstract(kind: Any) -> bool:
    if not (isinstance(kind, type) and chz.is_chz(kind)):
        return False
    codes = (getattr(getattr(kind, name, None), "__code__", None) for name in dir(kind))
    return any(code is not None and "NotImplementedError" in code.co_names for code in codes)


def _known_subclasses(kind: type) -> str:
    """Imported, concrete subclasses."""
    names = [f"{child.__module__}:{child.__name__}" for child in _descendants(kind) if not _is_abstract(child)]
    if not names:
        return f"a subclass of {kind.__module__}:{kind.__name__}"
    return f"such as {', '.join(sorted(set(names))[:4])}"


def _descendants(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)


def find_modules_here() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a user's module in the current folder
