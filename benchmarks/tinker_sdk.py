"""Pythons with an unmodified Tinker SDK, for its tests, serve.py and math_rl_recipe.py."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from posttrain.backend.errors import ConfigError

# The environments are kept between runs. They see the packages of this one, for torch.
ENVIRONMENTS = Path(os.environ.get("TINKER_SDK_VENVS", "~/.cache/posttrain/tinker-sdk")).expanduser()


def sdk_python(version: str, name: str = "", also: Sequence[str] = ()) -> str:
    """A Python with this version of the SDK, and what pip installs with the arguments `also`, one call each,
    in the environment `name`. ConfigError where it cannot be installed."""
    folder = ENVIRONMENTS / (name or version)
    python, is_complete = folder / "bin" / "python", (folder / "complete").exists()
    if not is_complete:
        venv.create(folder, with_pip=True, clear=True)
    # anew each time: the checkout that made the environment may have gone
    site = next(folder.glob("lib/python*/site-packages"))
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "packages_of_the_project.pth").write_text(f"{Path(here).resolve()}\n")
    if not is_complete:
        for packages in (f"tinker=={version}", *also):
            install = [str(python), "-m", "pip", "install", "-q", *packages.split()]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode:
                raise ConfigError(f"{packages} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return str(python)
