"""The command lines on chz's `key=value` arguments, with short names (`env=arithmetic`), default
objects that keep their class when a field is set, the nearest names for a misspelt option, and a
readable --help. The options come from Blueprint._parameters, private in chz 0.4. Left out: options
from files, chz's references (`a@=b`).
"""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import chz
from chz.blueprint import Blueprint, Castable
from chz.blueprint._entrypoint import EntrypointException
from chz.blueprint._wildcard import wildcard_key_to_regex
from chz.factories import MetaFromString
from chz.tiepin import CastError, type_repr

from posttrain.backend.errors import ConfigError, CookbookError, one_line
from posttrain.backend.ranges import RangeError
from posttrain.tracking.command_help import help_text, presets_text, type_text
from posttrain.tracking.how_to_resume import remember_options
from posttrain.tracking.one_line_errors import one_line_errors
from posttrain.tracking.open_files import allow_open_files
from posttrain.tracking.option_hints import class_meant, did_you_mean, option_meant, unknown_name
from posttrain.tracking.stop_request import ctrl_c_at_once

Config = TypeVar("Config")
# option -> short name -> "module:Class field=value ...". A short name may be a pattern ("*.jsonl"),
# with {} for the given value.
ShortNames = Mapping[str, Mapping[str, str]]
# option -> its value -> the options this value sets, unless they are given ("algorithm=grpo")
Presets = Mapping[str, Mapping[str, Mapping[str, str]]]


def by_name(target: str) -> Callable[[], Any]:
    """A default_factory for "module:Class", imported when called: so a package can offer a class of
    a higher layer."""

    def make() -> Any:
        module, _, name = target.partition(":")
        return getattr(import_module(module), name)()

    return make


def load_named(option: str, target: str, what: str) -> Any:
    """What "module:NAME" names, `what`; the module may be in the current folder. ConfigError if there is none."""
    _find_modules_here()
    module, _, name = target.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{option}={target}: {error}; give module:NAME of {what}") from error


def _find_modules_here() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a user's module in the current folder


def run_command(
    main: Callable[[Config], object],  # or an async function
    config_class: type[Config],
    short_names: ShortNames | None = None,
    presets: Presets | None = None,
) -> None:
    """The entry point of a command: parses sys.argv and runs `main`, under `one_line_errors`."""
    allow_open_files()
    try:
        with one_line_errors() as command:
            config = parse(config_class, None, short_names, presets)
            command.log_path = getattr(config, "log_path", None)
            remember_options(chz.chz_fields(config))
            outcome = main(config)
            if isinstance(outcome, Coroutine):
                asyncio.run(ctrl_c_at_once(outcome))
    finally:
        remember_options(None)


def run_on_folders(main: Callable[..., object], **options: str) -> None:
    """The entry point of `python -m MODULE RUN [RUN ...] [option=value ...]`: prints main(folders,
    **options), or the module's docstring without folders. `options` are the defaults."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    if not folders or folders[0] in ("-h", "--help", "help"):
        print(sys.modules[main.__module__].__doc__)
        return
    with one_line_errors():
        if unknown := sorted(given.keys() - options):
            raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(options) or 'none'}")
        print(main([Path(folder) for folder in folders], **options | given))


def parse(
    config_class: type[Config],
    argv: list[str] | None = None,
    short_names: ShortNames | None = None,
    presets: Presets | None = None,
) -> Config:
    """Builds the configuration from `key=value` arguments (default: sys.argv[1:]); the last of
    equal keys counts. ConfigError with one line; `--help`, `-h` and `help` print the options and
    exit 0."""
    argv = sys.argv[1:] if argv is None else argv
    short_names = dict(short_names or {})
    wants_help = any(argument in ("--help", "-h", "help") for argument in argv)
    given = _key_values([argument for argument in argv if argument not in ("--help", "-h", "help")])
    given = _preset_values(given, presets or {}) | given
    blueprint = _choose_classes(config_class, given, short_names)
    if wants_help:
        print(_help(config_class, blueprint, given, short_names) + presets_text(presets or {}))
        sys.exit(0)
    parameters = _parameters(blueprint)
    for key, value in given.items():
        _check_option(key, value, parameters)
    _check_chosen(blueprint, parameters)
    blueprint.apply({key: Castable(value) for key, value in given.items()})
    if missing := blueprint._make_lazy().missing_params:
        raise ConfigError(
            f"{', '.join(missing)}: not given; write {' '.join(f'{path}=...' for path in missing)} (--help says what)"
        )
    try:
        return blueprint.make()
    except RangeError as error:
        option = next((key for key in given if key.rpartition(".")[2] == error.name), error.name)
        raise ConfigError(f"{option}={error.value!r} must be {error.needs}") from None
    except CookbookError:
        raise
    except (EntrypointException, TypeError, ValueError) as error:  # a missing option, or a validator of the config
        raise ConfigError(one_line(error)) from error


def _key_values(argv: list[str]) -> dict[str, str]:
    """`key=value`, `--key=value` and `--key value`, in order."""
    given = {}
    arguments = iter(argv)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        dashes = key.startswith("--")
        if dashes and not equals:
            value = next(arguments, "--")
            if value.startswith("--") or "=" in value:
                raise ConfigError(f"{key} has no value; write {key.lstrip('-').replace('-', '_')}=VALUE")
        elif not equals or not key or (key.startswith("-") and not dashes):
            spaced = ", without spaces around the =" if "=" in argv else ""
            raise ConfigError(f"cannot read {argument!r}; options are written key=value{spaced} (--help lists them)")
        given[key.removeprefix("--").replace("-", "_") if dashes else key] = value
    return given


def _preset_values(given: dict[str, str], presets: Presets) -> dict[str, str]:
    values: dict[str, str] = {}
    for option, choices in presets.items():
        if (name := given.get(option, "None")) in choices:
            values |= choices[name]
        elif name != "None":
            raise ConfigError(
                f"{option}={name}: no such name; {did_you_mean(name, choices)}known: {', '.join(choices)}"
            )
    return values


def _choose_classes(
    config_class: type[Config], given: dict[str, str], short_names: dict[str, Mapping[str, str]]
) -> Blueprint[Config]:
    """A blueprint with the default objects, and with the classes named in `given`, which loses
    those options; adds their short names. For `env.field=value` alone chz would build the annotated base class: the
    default's class and fields are set first."""
    settings = _object_settings(config_class)
    # the outer class determines the inner options
    for key in sorted(given, key=lambda key: key.count(".")):
        parameters = _parameters(Blueprint(config_class).apply(settings))
        if element := _element(key, parameters):
            parameters = _parameters(Blueprint(config_class).apply(settings | {key: element}))
        objects = [path for path in _matches(key, parameters) if _is_object(path, parameters[path].type, short_names)]
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
    return Blueprint(config_class).apply(settings)


def _parameters(blueprint: Blueprint[Any]) -> dict[str, Any]:
    """Every option of the blueprint with its chosen classes, by dotted path."""
    return {path: parameter for path, parameter in blueprint._make_lazy().all_params.items() if path}


def _help(config_class: type, blueprint: Blueprint[Any], given: Mapping[str, str], short_names: ShortNames) -> str:
    parameters = _parameters(blueprint)
    values = dict(blueprint._arg_map._layers[0]._args)
    values |= {path: Castable(value) for key, value in given.items() for path in _matches(key, parameters)}
    title = (config_class.__doc__ or config_class.__name__).strip().split("\n")[0]
    return help_text(title, parameters, {"": config_class, **values}, short_names)


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


def _matches(key: str, parameters: Mapping[str, Any]) -> list[str]:
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
    _find_modules_here()
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


def _check_chosen(blueprint: Blueprint[Any], parameters: Mapping[str, Any]) -> None:
    """ConfigError for required objects without a class: chz would build the annotated class, whose
    methods raise NotImplementedError."""
    chosen = blueprint._arg_map._layers[0]._args
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


def _check_option(key: str, value: str, parameters: Mapping[str, Any]) -> None:
    """ConfigError for an unknown option, or a value of the wrong type."""
    paths = _matches(key, parameters)
    ancestors = [key.rsplit(".", count)[0] for count in range(1, key.count(".") + 1)]
    ancestor = next((path for path in ancestors if path in parameters), None)
    if not paths and (ancestor is None or not _takes_any_key(parameters[ancestor].type)):
        raise ConfigError(f"unknown option {key!r}; {option_meant(key, parameters)}--help lists the options")
    for path in paths:
        if not value and type(None) in get_args(parameters[path].type):  # a shell's $CHECKPOINT that is not set
            raise ConfigError(f"{path}= is empty: give a value, or {path}=None, or leave it out")
        try:
            parameters[path].cast(value)
        except CastError:
            if ":" not in value:  # else it may name a factory, which chz tries when it builds
                raise ConfigError(f"{path}={value}: expected {type_text(parameters[path].type)}") from None


def _takes_any_key(kind: Any) -> bool:
    return any(get_origin(part) in (dict, list, tuple) for part in (kind, *get_args(kind)))
