"""Weights written by several ranks are read whole, and stay as long as the process that published them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.left_behind import remove_own, weight_folder
from posttrain.backend.ranks import Processes, local_rows
from posttrain.backend.weight_files import FileWeights, read_joined, write_shard
from tests.processes import runs, wait_until


def test_what_ranks_write_is_joined(tmp_path: Path) -> None:
    """With fewer rows than ranks, a tensor of no dimension, a tied head."""
    folder, embedding = tmp_path / "weights", torch.randn(7, 3)
    whole = {"embedding": embedding, "bias": torch.randn(2), "scale": torch.tensor(2.0), "lm_head": embedding}
    for rank in (2, 0, 1):
        with pytest.raises(FileNotFoundError, match="lacks the weights of some ranks"):
            list(read_joined(folder))
        parts = {name: tensor[local_rows(len(tensor), Processes(rank, 3))] if tensor.ndim else tensor
                 for name, tensor in whole.items() if tensor.ndim or rank == 0}  # fmt: skip
        write_shard(folder, rank, 3, parts.items())
    weights = FileWeights(folder)
    for _ in range(2):
        assert {name: torch.equal(tensor, whole[name]) for name, tensor in weights} == dict.fromkeys(whole, True)
    del weights
    assert not folder.exists()


MAKES_A_FOLDER = """
import sys
from posttrain.backend.config import BackendConfig
from posttrain.backend.left_behind import weight_folder
print(weight_folder(BackendConfig(sync_dir=sys.argv[1])))
"""


def test_folders_of_dead_processes_are_removed_and_those_of_other_containers_are_not(tmp_path: Path) -> None:
    """Containers may share the host's name and its shared memory, and do not see each other's processes."""
    config = BackendConfig(sync_dir=str(tmp_path))
    command = [sys.executable, "-c", MAKES_A_FOLDER, tmp_path]
    left = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert left.is_dir()
    ours = weight_folder(config)
    assert ours.is_dir() and not left.exists()
    *start, _, end = ours.name.split("-")
    elsewhere = ours.rename(tmp_path / "-".join([*start, "999999999", end]))  # no process of this container
    another = weight_folder(config)
    assert elsewhere.is_dir() and another.is_dir()
    remove_own(another)
    assert not another.exists()
    remove_own(ours)  # gives the lock back
    remove_own(weight_folder(config))
    assert not any(tmp_path.iterdir())


FORKS = """
import os, sys, time
from posttrain.backend.left_behind import start_keeper
keeper = start_keeper([sys.argv[1]], [])
if not (child := os.fork()):
    time.sleep(600)
print(child, flush=True)
if sys.argv[2] == "closes":
    keeper.communicate(b"closed")
else:
    os.kill(os.getpid(), 9)
"""


STARTS = """
import os, subprocess, sys
from posttrain.backend.left_behind import start_keeper
start_keeper([], [], f"{sys.argv[1]}/session_*_7")
agent = ["python", "-c", "import time; time.sleep(600)", f"{sys.argv[1]}/session_1_7/logs"]
print(subprocess.Popen(agent, executable=sys.executable, start_new_session=True).pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_ray_that_was_starting_ends_with_the_process(tmp_path: Path) -> None:
    """Its agents, which nobody knows yet, name its folder."""
    for name in ("session_1_7", "session_1_77"):
        (tmp_path / name / "logs").mkdir(parents=True)
    with (tmp_path / "said").open("w") as out:
        subprocess.run([sys.executable, "-c", STARTS, tmp_path], stdout=out, stderr=out, timeout=300)
    agent = int((tmp_path / "said").read_text().split()[0])
    wait_until(lambda: not runs(agent) and sorted(path.name for path in tmp_path.iterdir()) == ["said", "session_1_77"])


@pytest.mark.parametrize(("ends", "stays"), [("closes", True), ("is killed", False)])
def test_what_a_process_has_forked_does_not_keep_its_keeper_waiting(ends: str, stays: bool, tmp_path: Path) -> None:
    """Of multiprocessing's processes each has the pipe, at whose end the keeper would be."""
    folder, said = tmp_path / "weights", tmp_path / "said"
    folder.mkdir()
    with said.open("w") as out:
        subprocess.run([sys.executable, "-c", FORKS, folder, ends], stdout=out, stderr=out, timeout=300)
    child = int(said.read_text().split()[0])
    wait_until(lambda: folder.exists() == stays)
    assert runs(child)
    os.kill(child, signal.SIGKILL)
