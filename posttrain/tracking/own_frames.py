"""The exception of a user's code that the project called, such as an environment: its own frames alone
on the terminal, the whole traceback in a file. Left out: exceptions of the project itself, which keep theirs.
"""

import sysconfig
import tempfile
import traceback
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("posttrain", "rl", "supervised", "preference", "envs", "recipes", "benchmarks")
FILE = "traceback.txt"


def own_traceback(error: BaseException, folder: str | None) -> str | None:
    """The text for the terminal, with the name of the file: in `folder`, the run's, if it is there. None where
    the project called no code of the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    project = [_in_project(frame.filename) for frame in frames]
    start = next((i for i, frame in enumerate(frames) if any(project[:i]) and _is_users(frame.filename)), None)
    if start is None:
        return None
    file = _write("".join(traceback.format_exception(error)), folder)
    short = traceback.TracebackException.from_exception(error)
    short.stack = traceback.StackSummary.from_list(frames[start:])
    lines = [*short.format(chain=False)][1:]  # without "Traceback (most recent call last)"
    return f"error in your code (all frames: {file}):\n{''.join(lines)}".rstrip()


def called_by_a_loop(error: BaseException) -> bool:
    """Whether a loop of the project called the user's code that raised: not the user's own `main`, which a command
    runs."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    start = next((i for i, name in enumerate(frames) if i and _is_users(name) and not _is_users(frames[i - 1])), 0)
    return any(_in_project(name) and Path(name).parent != Path(__file__).parent for name in frames[:start])


def _write(text: str, folder: str | None) -> Path:
    file = Path(folder or "") / FILE
    if not folder or not file.parent.is_dir():
        file = Path(tempfile.mkstemp(prefix="posttrain-traceback-", suffix=".txt")[1])
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
    return file


def _in_project(filename: str) -> bool:
    return any(Path(filename).is_relative_to(PROJECT / package) for package in PACKAGES)


def _is_users(filename: str) -> bool:
    """Neither the project's, nor Python's, nor an installed package's."""
    path = Path(filename)
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    of_python = filename.startswith("<") or path.is_relative_to(sysconfig.get_paths()["stdlib"])
    return not (_in_project(filename) or installed or of_python)
