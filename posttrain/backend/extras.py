"""Packages that only some runs need: where one is missing, that is said before a model or a folder is opened."""

import sys
from importlib.util import find_spec

from posttrain.backend.errors import ConfigError

# package -> the extra of pyproject.toml that installs it
EXTRAS = {
    **dict.fromkeys(("matplotlib", "datasets", "math_verify"), "train"),
    **dict.fromkeys(("textarena", "bm25s"), "games"),
    **dict.fromkeys(("starlette", "uvicorn", "google.protobuf", "pyarrow", "pyrage"), "serve"),
    "ray": "cluster",
    **{name: name for name in ("wandb", "tensorboard", "trackio", "verifiers")},
}
_found: set[str] = set()


def need(package: str, option: str) -> None:
    """ConfigError, with the command that installs it, where `option` needs a package that is missing."""
    if not is_installed(package):
        raise missing(package, option)


def missing(package: str, option: str) -> ConfigError:
    return ConfigError(f"{option} needs {package}, which is not installed: {how_to_install(package)}")


def is_installed(package: str) -> bool:
    """Does not import it, which takes seconds. What was found stays found: each problem of a set may ask."""
    if package in _found or sys.modules.get(package) is not None:
        return True
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:  # its parent
        return False
    if spec is None or spec.origin is None:  # a folder of this name ("datasets") has none
        return False
    _found.add(package)
    return True


def how_to_install(package: str) -> str:
    return f"pip install -e '.[{EXTRAS[package]}]' in the project's folder"
