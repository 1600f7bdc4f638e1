"""The code of a run as one text: the commit, the uncommitted changes, and the user's modules, as
diffs for patch. A user's module is named by the configuration (env=my_task:Builder) and lies
outside this repository, or is not in git; loaded modules of its folder are included. Left out: data
files, installed packages.
"""

import difflib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_BYTES = 1_000_000  # of a module, and MOST_MODULES of a run
MOST_MODULES = 200


def append_code_diff(file: Path, config_json: Any) -> None:
    """Appends the current code after that of earlier starts; nothing without git and modules."""
    text = _repository_diff() + "".join(_module_diff(module) for module in user_modules(config_json))
    if text:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(text)


def user_modules(config_json: Any) -> list[Path]:
    named = {name for name in _module_names(config_json) if name in sys.modules}
    untracked = set((_git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py") or "").split("\0"))
    modules = {file for name in named if (file := _file_of(name)) is not None and _is_users(file, untracked)}
    folders = {file.parent for file in modules if not file.is_relative_to(REPOSITORY)}
    for name in list(sys.modules) if folders else ():
        if (file := _file_of(name)) is not None and folders & set(file.parents) and _is_users(file, untracked):
            modules.add(file)
    return sorted(modules)[:MOST_MODULES]


def _module_names(value: Any) -> Iterator[str]:
    """Module names of "module:name" strings, which stand for classes and functions in JSON."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _module_names(item)
    elif isinstance(value, str) and ":" in value:
        yield value.partition(":")[0]


def _file_of(module_name: str) -> Path | None:
    file = getattr(sys.modules.get(module_name), "__file__", None)
    return Path(file).resolve() if isinstance(file, str) and file.endswith(".py") else None


def _is_users(file: Path, untracked: set[str]) -> bool:
    if file.is_relative_to(REPOSITORY):
        return str(file.relative_to(REPOSITORY)) in untracked
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    roots = {Path(root).resolve() for root in (sys.prefix, sys.base_prefix)}
    return not installed and not roots & set(file.parents)


def _module_diff(file: Path) -> str:
    try:
        content = file.read_bytes()[:MOST_BYTES].decode("utf-8", "replace")
    except OSError:
        return ""  # deleted since its import
    lines = difflib.unified_diff([], content.splitlines(), "/dev/null", str(file), lineterm="")
    return "\n".join(lines) + "\n"


def _repository_diff() -> str:
    if not (REPOSITORY / ".git").exists():
        return ""
    commit, diff = _git("rev-parse", "HEAD"), _git("diff", "--no-ext-diff", "--no-color", "HEAD")
    return "" if commit is None or diff is None else f"commit {commit}{diff}\n"


def _git(*arguments: str) -> str | None:
    """None without git or a commit, or on a slow disk: the run has priority."""
    try:
        command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, timeout=5, check=True).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return None
