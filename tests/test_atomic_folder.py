"""A folder is replaced in one operation: whatever moment a kill comes at, the old content or the
new one is there, whole.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from posttrain.backend.atomic_folder import atomic_folder, recover_folders
from posttrain.backend.errors import CheckpointError
from tests.conftest import ROOT

# Writes version 2 over version 1 in a forked child that dies before its n-th change of the file
# system, for n = 1, 2, ... until it lives. Prints what a reader finds after each kill: before
# anything is recovered, and after.
KILLER = textwrap.dedent(
    """
    import ctypes, os, signal, sys
    from pathlib import Path
    from posttrain.backend import atomic_folder as module

    folder, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
    if not exchange:
        module._exchange = lambda a, b: False
    else:
        swap = module._exchange
        module._exchange = lambda a, b: (sys.audit("exchange"), swap(a, b))[1]

    def write(version):
        with module.atomic_folder(folder / "final") as temporary:
            (temporary / "inner").mkdir()
            for name in ("a", "inner/b"):
                (temporary / name).write_text(version)

    def content():
        final = folder / "final"
        return "".join(file.read_text() for file in (final / "a", final / "inner" / "b")) if final.exists() else "none"

    def kill_before(number):
        changes = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "exchange", "open")
        left = [number]
        def hook(event, arguments):
            if event in changes and str(folder) in str(arguments) + (str(folder) if event == "exchange" else ""):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)

    number, status = 0, 1
    while status:
        number += 1
        write("1")
        child = os.fork()
        if not child:
            kill_before(number)
            write("2")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        seen = content()
        module.recover_folders(folder)
        print(seen, content(), *sorted(path.name for path in folder.iterdir()))
    """
)


# Trap: a kill while a checkpoint is replaced.
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_a_kill_at_any_moment_leaves_a_whole_folder(how: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), how], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) > 12, "a kill before every change of the file system"
    for seen, recovered, *names in lines:
        assert recovered in ("11", "22") and names == ["final"], (seen, recovered, names)
        assert seen in ("11", "22") or how == "renames"
    assert lines[0][0] == "11" and lines[-1][0] == "22"


def test_a_failed_block_changes_nothing_and_a_file_in_the_place_is_named(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "final") as folder:
        (folder / "a").write_text("2")
        raise KeyError
    assert (tmp_path / "final" / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file in the folder's place"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(CheckpointError, match="could not write"), atomic_folder(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_link_keeps_pointing_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    """A user may have moved a checkpoint to another disk and linked it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "run" / "notes.old").mkdir()
    with atomic_folder(tmp_path / "run" / "final") as folder:
        (folder / "a").write_text("2")
    recover_folders(tmp_path / "run")
    assert (tmp_path / "disk" / "real" / "a").read_text() == "2" and (tmp_path / "run" / "final").is_symlink()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["final", "notes.old"]


# Trap: save_state("a") after save_state("a/b"), or with the name of a folder of something else, deletes what is there.
def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with atomic_folder(path) as folder:
            (folder / "state").mkdir()
            (folder / "weights").write_text("new")

    write(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    write(tmp_path / "empty")  # an older version of itself
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for path, held in [(tmp_path / "a", "b"), (tmp_path, "a|empty|papers"), (tmp_path / "papers", "thesis")]:
        with pytest.raises(CheckpointError, match=f"it holds ({held}).* choose another name"):
            write(path)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "papers" / "thesis").read_text() == "mine"


# Trap: weights that a colleague, or a server of another user, could not read beside a config that they could.
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_has_the_permissions_of_a_new_one(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "inner").mkdir()
            save_file({"weight": torch.zeros(2)}, folder / "inner" / "model.safetensors")
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert [path.stat().st_mode & 0o777 for path in files] == [mode, mode]
