"""An exception of the user's code: its own frames on the terminal, all of them in a file."""

import runpy
import sys
from pathlib import Path

import chz
import pytest

from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics
from tests.commands import run
from tests.test_renderers import BPE

CODE = """
async def main(config):
    return scored(config)

def scored(config):
    return {"a": 1}["b"]
"""


@chz.chz
class Config:
    log_path: str = "runs/x"


@pytest.mark.parametrize("opened", [True, False])
def test_the_users_own_frames_come_first_and_all_are_in_the_run_folder(
    opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = tmp_path / "run"
    if opened:
        folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["mine.py", f"log_path={folder}"])
    with pytest.raises(SystemExit) as left:
        run_command(runpy.run_path(str(tmp_path / "mine.py"))["main"], Config)
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.splitlines()[-1] == "KeyError: 'b'"
    assert 'mine.py", line 3, in main' in said and 'mine.py", line 6, in scored' in said
    assert "command_line.py" not in said and len(said.splitlines()) < 10
    (whole,) = [*folder.glob("traceback.txt"), *tmp_path.glob("posttrain-traceback-*.txt")]
    assert str(whole) in said and "command_line.py" in whole.read_text() and (whole.parent == folder) is opened


EXITS = """
import sys
import chz
from rl.types import RLDatasetBuilder

class Problems:
    def get_batch(self, index):
        sys.exit(0)

    def __len__(self):
        return 1

@chz.chz
class Builder(RLDatasetBuilder):
    async def __call__(self, renderer):
        return Problems(), None

def loss(logprobs, inputs):
    sys.exit(0)
"""


# Trap: a run that ends early, with status 0 and no word.
@pytest.mark.parametrize("options", [["env=mine:Builder"], ["env=arithmetic", "loss_fn=mine:loss", "eval_every=0"]])
def test_an_exit_from_what_a_loop_calls_is_an_error(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EXITS)
    options = [*options, "backend.engine=torch", "groups_per_batch=1", "group_size=2", "max_tokens=2"]
    done = run("-m", "rl.train_cli", *options, "log_path=run", cwd=tmp_path)
    assert done.returncode == 1 and "sys.exit(0)" in done.stderr and done.stderr.rstrip().endswith("SystemExit: 0")


def test_a_users_own_command_may_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as left:
        run_command(lambda config: sys.exit(3), Config)
    assert left.value.code == 3


def test_a_bug_of_the_project_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(TypeError):
        run_command(read_metrics, Config)  # type: ignore[arg-type]


def test_a_format_that_the_model_did_not_bring_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        get_renderer(None, BPE)
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 1  # another test may have asked first
    from posttrain.renderers import _without_template

    assert _without_template("some/base") == "role_colon"
    assert capsys.readouterr().out.startswith(
        "some/base has no chat template: conversations are written as 'User: ...'"
    )
