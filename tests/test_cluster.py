"""Ray started, asked, killed: what a process raises arrives as it was, and nothing stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from posttrain.backend.cluster import FOLDER, Cluster, ProcessLost, answer, future_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, NonFiniteError
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed: pip install 'posttrain-cookbook[cluster]'"
    ),
]

BACKEND = BackendConfig(engine="torch", sampler_replicas=2)


class Actor:
    async def process(self) -> tuple[int, str | None]:
        return os.getpid(), os.environ.get("OMP_NUM_THREADS")

    async def fail(self) -> None:
        raise NonFiniteError("a loss is not finite", [3])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(BACKEND, tmp_path_factory.mktemp("run"))
    yield cluster
    cluster.close()


def wait_until(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_errors_arrive_with_their_attributes_and_a_killed_process_as_lost(cluster: Cluster) -> None:
    actor = cluster.start(Actor)
    pid, threads = answer(actor.process.remote(), "the actor", 60)
    assert pid != os.getpid() and threads == "1"
    with pytest.raises(NonFiniteError) as raised:
        answer(actor.fail.remote(), "the actor", 60)
    assert raised.value.datum_indices == [3] and str(raised.value) == "a loss is not finite"
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessLost):
        future_of(actor.process.remote()).result(60)


def test_another_client_of_this_process_shares_ray_and_has_a_folder_of_its_own(
    cluster: Cluster, tmp_path: Path
) -> None:
    other = Cluster(BACKEND, tmp_path)
    assert other.folder.is_dir() and other.folder != cluster.folder
    other.close()
    assert not other.folder.exists() and cluster.folder.is_dir()
    assert answer(cluster.start(Actor).process.remote(), "the actor", 60)


DRIVER = """
import os, sys
from pathlib import Path
from posttrain.backend.cluster import Cluster, answer
from tests.test_cluster import BACKEND, Actor
cluster = Cluster(BACKEND, Path(sys.argv[1]))
pid, _ = answer(cluster.start(Actor).process.remote(), "the actor", 60)
print(pid, cluster.folder, flush=True)
sys.stdin.read()
"""


def test_a_killed_driver_leaves_no_process_and_no_segment(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert driver.stdout
    pid, folder = driver.stdout.readline().split()
    family = [int(child) for child in _descendants(driver.pid)]
    assert int(pid) in family and Path(folder).is_dir() and FOLDER in folder
    driver.kill()
    driver.communicate()
    wait_until(lambda: not Path(folder).exists() and not any(_runs(child) for child in family))


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [below for child in children for below in _descendants(child)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def test_an_address_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other tests have a cluster on this machine, which `auto` would find."""
    import ray

    def finds_none(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", finds_none)
    with pytest.raises(ConfigError, match="there is no Ray cluster at backend.cluster=auto"):
        Cluster(BackendConfig(sampler_replicas=1, cluster="auto"), tmp_path)
