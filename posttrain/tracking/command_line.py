"""The command lines on chz's `key=value` arguments, with short names (`env=arithmetic`), default
objects that keep their class when a field is set, the nearest names for a misspelt option, and a
readable --help. Left out: options from files, chz's references (`a@=b`).
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import chz
from chz.blueprint import Blueprint, Castable
from chz.blueprint._entrypoint import EntrypointException
from chz.tiepin import CastError

from posttrain.backend.errors import ConfigError, CookbookError, one_line
from posttrain.backend.ranges import RangeError
from posttrain.tracking.command_help import help_text, presets_text, type_text
from posttrain.tracking.how_to_resume import remember_options
from posttrain.tracking.one_line_errors import one_line_errors
from posttrain.tracking.open_files import allow_open_files
from posttrain.tracking.option_classes import (
    ShortNames,
    check_chosen,
    choose_classes,
    find_modules_here,
    matches,
    parameters_of,
)
from posttrain.tracking.option_hints import did_you_mean, option_meant
from posttrain.tracking.stop_request import ctrl_c_at_once

Config = TypeVar("Config")
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
    find_modules_here()
    module, _, name = target.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{option}={target}: {error}; give module:NAME of {what}") from error


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
    settings = choose_classes(config_class, given, short_names)
    parameters = parameters_of(config_class, settings)
    if wants_help:
        values = settings | {path: Castable(given[key]) for key in given for path in matches(key, parameters)}
        title = (config_class.__doc__ or config_class.__name__).strip().split("\n")[0]
        page = help_text(title, parameters, {"": config_class, **values}, short_names)
        print(page + presets_text(presets or {}))
        sys.exit(0)
    for key, value in given.items():
        _check_option(key, value, parameters)
    check_chosen(settings, parameters)
    blueprint = Blueprint(config_class).apply(settings)
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


def _check_option(key: str, value: str, parameters: Mapping[str, Any]) -> None:
    """ConfigError for an unknown option, or a value of the wrong type."""
    paths = matches(key, parameters)
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
