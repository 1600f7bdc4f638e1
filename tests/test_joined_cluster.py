"""A running Ray cluster of two nodes, joined: what differs between nodes is found before a run starts.
The nodes are of this machine; the second has a file system of its own where the test says so. In a
process of its own: one that has started a Ray, which has a token, refuses the calls of this cluster.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from posttrain.backend import cluster
from posttrain.backend.cluster import PACKAGE, Cluster
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams
from tests.conftest import policy_data
from tests.processes import descendants, runs, wait_until
from tests.test_replicas import gap

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2", "--disable-usage-stats"]
# Ray would ask for a token, and give it to this user alone
ENVIRONMENT = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The cluster's address."""
    options = ["--head", "--port=0", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    node, said = started([*START, *options], tmp_path_factory.mktemp("head") / "log")
    try:
        port = re.search(r"--address='[\d.]+:(\d+)'", said)
        assert port, said
        yield f"127.0.0.1:{port[1]}"
    finally:
        end(node)


def started(command: list[str], log: Path) -> "tuple[subprocess.Popen[bytes], str]":
    """A node, and what it has said. Ray gives one 30 seconds to start, too few on a busy machine: up to three times."""
    for _ in range(3):
        with log.open("w") as out:
            node = subprocess.Popen(command, stdout=out, stderr=out, env=ENVIRONMENT)
        wait_until(lambda node=node: "will now block" in log.read_text() or node.poll() is not None)
        if node.poll() is None:
            break
    assert node.poll() is None, log.read_text()
    return node, log.read_text()


def end(node: "subprocess.Popen[bytes]") -> None:
    family = descendants(node.pid)
    node.terminate()
    node.wait(60)
    wait_until(lambda: not any(runs(pid) for pid in family))


@pytest.fixture
def second(head: str, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Starts the second node after a command of a shell, in a mount namespace of its own."""
    nodes = []

    def start(shell: str) -> None:
        if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            pytest.skip("mount namespaces need root")
        node = [*START, f"--address={head}", "--node-ip-address=127.0.0.1"]
        command = ["unshare", "-m", "sh", "-c", f'{shell}\nexec "$@"', "sh", *node]
        nodes.append(started(command, tmp_path / "second.log")[0])

    yield start
    for node in nodes:
        end(node)


def joined(head: str, **options: Any) -> BackendConfig:
    return BackendConfig(engine="torch", trainer_processes=2, cluster=head, **options)


def test_a_node_that_does_not_see_the_run_folder(head: str, second: Callable[[str], None], tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    second(f"mount -t tmpfs none {hidden}")
    with pytest.raises(ConfigError, match=rf"node [\d.]+ does not see {hidden}/run \(log_path\): take a folder that"):
        Cluster(joined(head), hidden / "run")
    with pytest.raises(ConfigError, match=rf"does not see {hidden} \(backend.sync_dir\)"):
        Cluster(joined(head, sync_dir=str(hidden)), tmp_path)
    with pytest.raises(ConfigError, match="the cluster has 2 nodes: new weights reach.*Set backend.sync_dir"):
        Cluster(BackendConfig(sampler_replicas=1, trainer_processes=2, cluster=head), tmp_path)


def test_a_node_with_another_version_of_this_project(head: str, second: Callable[[str], None], tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other/backend/types.py").open("a") as file:
        file.write("# newer\n")
    second(f"mount --bind {tmp_path}/other {PACKAGE}")
    with pytest.raises(ConfigError, match=r"node [\d.]+ has another version of this project \(\w{8}, here \w{8}\)"):
        Cluster(joined(head), tmp_path)


def test_a_node_with_another_version_of_a_package(head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "_version_of", lambda package: "0.1")  # here
    with pytest.raises(ConfigError, match=r"node [\d.]+ has another version of torch \(2[\d.]+, here 0.1\): install"):
        Cluster(joined(head), tmp_path)


def test_a_cluster_of_another_python(head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray._private.utils

    monkeypatch.setattr(ray._private.utils, "compute_version_info", lambda: (ray.__version__, "3.8.1"))
    with pytest.raises(ConfigError, match=r"cannot be joined: .*[Vv]ersion mismatch.* Python: 3.8.1") as raised:
        Cluster(joined(head), tmp_path)
    assert "\n" not in str(raised.value)


# Trap: the nodes' processes start in another folder than this one: a relative path is another's there.
def test_two_nodes_train_and_sample(
    head: str, second: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second("true")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/loss_of_a_user.py").write_text(
        "def loss(p, inputs):\n    return -p * inputs['advantages'], {}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, "modules"])
    config = joined(head, sampler_replicas=1, sync_dir="weights")
    with ServiceClient(config, "run") as service:
        client = service.create_training_client("micro")
        client.forward_backward(policy_data(4), importlib.import_module("loss_of_a_user").loss)
        client.optim_step(AdamParams(1e-2)).result()
        assert gap(client, client.save_weights_and_get_sampling_client()) < 1e-5
    assert not any((tmp_path / "weights").iterdir())
