"""How to continue the present command's run: as a line to be copied, where the command was started by
`run_command`. A recipe without the option `behavior_if_log_dir_exists` resumes by itself.
"""

import os
import shlex
import sys
from collections.abc import Collection

OPTION = "behavior_if_log_dir_exists"
_options: Collection[str] | None = None


def remember_options(options: Collection[str]) -> None:
    """The names of the options of the command that this process is."""
    global _options
    _options = options


def how_to_resume() -> str:
    """ "to continue, run: python rl/train_cli.py env=gsm8k behavior_if_log_dir_exists=resume"."""
    if _options is None or "WORLD_SIZE" in os.environ:  # torchrun's: its own command is not known here
        return f"the same program with {OPTION}=resume continues from there"
    words = [word for word in sys.orig_argv if not word.startswith((f"{OPTION}=", f"--{OPTION}="))]
    if OPTION in _options:
        words.append(f"{OPTION}=resume")
    return f"to continue, run: {shlex.join(words)}"
