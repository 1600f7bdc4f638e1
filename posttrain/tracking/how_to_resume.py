"""How to continue the present command's run: as a line to be copied, where the command was started by
`run_command`. A recipe without the option `behavior_if_log_dir_exists` resumes by itself.
"""

import os
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

OPTION = "behavior_if_log_dir_exists"
_options: Collection[str] | None = None


def remember_options(options: Collection[str] | None) -> None:
    """The names of the options of the command that this process is; None after its end."""
    global _options
    _options = options


def how_to_resume() -> str:
    """ "to continue, run: python rl/train_cli.py env=gsm8k behavior_if_log_dir_exists=resume"."""
    # WORLD_SIZE is torchrun's, whose own command is not known here
    if _options is None or "WORLD_SIZE" in os.environ or sys.argv[0] in ("", "-c"):
        return f"the same program with {OPTION}=resume continues from there"
    given = [word for word in sys.argv[1:] if word.lstrip("-").partition("=")[0] != OPTION]
    added = [f"{OPTION}=resume"] if OPTION in _options else []
    return f"to continue, run: {shlex.join([*_program(), *given, *added])}"


def _program() -> list[str]:
    if Path(sys.argv[0]).name.startswith("posttrain-"):
        return [sys.argv[0]]
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    return [sys.orig_argv[0], *(["-m", module.name] if module else [sys.argv[0]])]
