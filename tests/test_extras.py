"""A package that a run's options need and that is missing is named before a folder or a model is opened, with the
command that installs it.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from envs.math_word import MathGrader
from envs.retrieval import Index
from posttrain.backend import extras
from posttrain.backend.errors import ConfigError
from posttrain.serve.age import read_recipients
from posttrain.serve.body import decompressed
from posttrain.serve.command import ServeConfig, serve
from posttrain.tracking import run
from posttrain.tracking.metrics_log import MetricsLog
from posttrain.tracking.run_config import RunConfig
from posttrain.tracking.run_folder import open_run_folder
from supervised.table_rows import table_rows
from tests.conftest import ROOT

# Trap: a run of hours that fails at its end, or once its model is loaded.
NEEDS: dict[str, Callable[[], object]] = {
    "wandb": lambda: RunConfig(wandb_project="p"),
    "tensorboard": lambda: RunConfig(tensorboard=True),
    "trackio": lambda: RunConfig(trackio_project="p"),
    "math_verify": MathGrader,
    "bm25s": lambda: Index(["a"], 1),
    "datasets": lambda: table_rows("owner/name", None, "train"),
    "pyarrow": lambda: decompressed(b"", "zstd", 10),
    "pyrage": lambda: read_recipients(["age1"]),
    "starlette": lambda: serve(ServeConfig(model="micro")),
}


@pytest.mark.parametrize("package", NEEDS)
def test_a_missing_package_is_named_at_once(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "is_installed", lambda name: name != package)
    command = rf"pip install -e '\.\[{extras.EXTRAS[package]}\]' in the project's folder"
    with pytest.raises(ConfigError, match=rf"needs {package}, which is not installed: {command}"):
        NEEDS[package]()


def test_every_package_is_in_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_pip = {"google.protobuf": "protobuf", "math_verify": "math-verify"}
    for package, extra in extras.EXTRAS.items():
        assert any(line.startswith(of_pip.get(package, package)) for line in project["optional-dependencies"][extra])
    assert any(line.startswith("peft") for line in project["dependencies"])  # `import posttrain.backend` needs it


def test_what_is_installed_is_found_without_an_import() -> None:
    assert extras.is_installed("json") and extras.is_installed("google.protobuf")
    assert not extras.is_installed("no_such_package") and not extras.is_installed("no_such.package")
    assert "tabnanny" not in sys.modules and extras.is_installed("tabnanny") and "tabnanny" not in sys.modules


# Trap: a folder `datasets` or `wandb` in the current one, which Python imports as an empty package.
def test_a_folder_of_a_packages_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not extras.is_installed("no_such_package")


def test_a_run_without_matplotlib_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "is_installed", lambda package: False)
    folder = open_run_folder(tmp_path / "run", "raise", RunConfig())
    MetricsLog(folder).log({"a": 1.0}, 0)
    run.finish(folder, {"a": 1.0})
    out = capsys.readouterr().out
    assert "plot: none; pip install -e '.[train]'" in out and f"checkpoint: {folder.checkpoints / 'final'}" in out


@pytest.mark.parametrize("target", ["/nowhere/python3", "fake"])
def test_an_environment_of_another_python_is_refused_and_left_alone(target: str, tmp_path: Path) -> None:
    """Of one that is gone, which `python -m venv` does not mend, or too old for the project."""
    (fake := tmp_path / "fake").write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(fake if target == "fake" else target)
    environment = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    result = subprocess.run([ROOT / "install.sh"], capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 1 and "delete it, or set VENV" in result.stderr
    assert [file.name for file in (tmp_path / "venv").rglob("*")] == ["bin", "python"]
