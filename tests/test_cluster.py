"""Ray started, asked, killed: what a process raises arrives as it was, and nothing stays."""

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

import posttrain.backend.ray_process
from posttrain.backend.cluster import Cluster, ProcessLost, answer, future_of
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, NonFiniteError
from posttrain.backend.left_behind import FOLDER
from tests.commands import Command, run
from tests.processes import Actor, descendants, runs, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[cluster]'"),
]


def test_errors_arrive_with_their_attributes_and_a_killed_process_as_lost(cluster: Cluster) -> None:
    actor = cluster.start(Actor)
    pid, threads = answer(actor.process.remote(), "the actor", 300)
    assert pid != os.getpid() and threads == "1"
    with pytest.raises(NonFiniteError) as raised:
        answer(actor.fail.remote(), "the actor", 300)
    assert raised.value.datum_indices == [3] and str(raised.value) == "a loss is not finite"
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessLost):
        future_of(actor.process.remote()).result(300)


def test_another_client_of_this_process_shares_ray_and_has_a_folder_of_its_own(
    cluster: Cluster, tmp_path: Path
) -> None:
    other = Cluster(cluster.config, tmp_path)
    assert other.folder.is_dir() and other.folder != cluster.folder
    other.close()
    assert not other.folder.exists() and cluster.folder.is_dir()
    actor = cluster.start(Actor)  # Ray ends an actor that nobody holds
    assert answer(actor.process.remote(), "the actor", 300)


DRIVER = """
import sys, time
from pathlib import Path
from posttrain.backend.cluster import Cluster, answer
from posttrain.backend.config import BackendConfig
from tests.processes import Actor
cluster = Cluster(BackendConfig(engine="torch", sampler_replicas=2), Path(sys.argv[1]))
actor = cluster.start(Actor)  # Ray ends an actor that nobody holds
pid, _ = answer(actor.process.remote(), "the actor", 300)
print("started", pid, cluster.folder, flush=True)
time.sleep(600)
"""


def test_a_killed_driver_leaves_no_process_and_no_segment(tmp_path: Path) -> None:
    driver = Command("-c", DRIVER, tmp_path)
    started = re.compile(rf"started (\d+) (\S*{FOLDER}\S*)\n")  # a busy machine is told what is waited for
    wait_until(lambda: started.search(driver.output()) or driver.poll() is not None, 300)
    assert (found := started.search(driver.output())), driver.output()
    pid, folder = found.groups()
    family = descendants(driver.pid)
    assert int(pid) in family and Path(folder).is_dir()
    driver.kill()
    wait_until(lambda: not Path(folder).exists() and not any(runs(child) for child in family))
    assert "ERROR the main process was killed" in driver.output()


ANOTHER_THREAD = """
import os, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
from posttrain.backend.cluster import Cluster, answer
from posttrain.backend.config import BackendConfig
from tests.processes import Actor
os.setpgrp()  # as a shell does for a command
asked_to_stop = []
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: asked_to_stop.append(number))
clusters, backend = [], BackendConfig(engine="torch", sampler_replicas=2)
thread = threading.Thread(target=lambda: clusters.append(Cluster(backend, Path(sys.argv[1]))))
thread.start()
thread.join()
for number in (signal.SIGTERM, signal.SIGHUP):
    os.killpg(0, number)  # as a closed terminal does
# Ray notices within a second that its processes are gone, and ends this program; its handler aborts after three
time.sleep(4)
answer((actor := clusters[0].start(Actor)).process.remote(), "the actor", 300)
clusters[0].close()
import ray
for late in (clusters[0].kill, ray.kill, lambda _: clusters[0].start(Actor)):
    with suppress(Exception):
        late(actor)  # as of a replacement that was starting: Ray would start anew
print(len(asked_to_stop), ray.is_initialized())
"""


def test_ray_outlives_the_thread_that_started_it_and_signals_to_the_command(tmp_path: Path) -> None:
    """Clients open engines in threads of their own, which end with them."""
    done = run("-c", ANOTHER_THREAD, tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["2 False"]), done.stderr[-2000:]


def test_a_start_that_fails_is_repeated_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._common.utils

    monkeypatch.setattr(ray._common.utils, "get_default_ray_temp_dir", lambda: str(tmp_path))
    attempts: list[int] = []

    def init() -> None:
        attempts.append(1)
        (tmp_path / f"session_of_{len(attempts)}_{os.getpid()}").mkdir()
        if len(attempts) < 2:
            raise TimeoutError

    posttrain.backend.ray_process._start_here(init).set()
    assert [path.name[:12] for path in tmp_path.iterdir()] == ["session_of_2"]


# Trap: Ray's agents outlive a start that is left halfway, and its threads may end the command by SIGSEGV.
def test_a_start_that_is_interrupted_ends_when_it_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    did: list[str] = []
    may_end = threading.Event()

    def init() -> None:
        may_end.wait()
        did.append("started")

    def interrupted(*_: object) -> None:
        threading.Timer(0.1, may_end.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(posttrain.backend.ray_process, "wait_saying", interrupted)
    monkeypatch.setattr(ray, "shutdown", lambda: did.append("ended"))
    with pytest.raises(KeyboardInterrupt):
        posttrain.backend.ray_process._start_here(init)
    assert did == ["started", "ended"]


@contextmanager
def server(says: bytes | None) -> Iterator[str]:
    """The address of a server that answers with these bytes; b"" = not at all; None = nobody listens there, nor can
    while the socket has the port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if says is not None:
            listening.listen()

        def answer_one() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                connection.sendall(says or b"")
                connection.recv(100)

        if says:
            threading.Thread(target=answer_one, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("says", "reason"),
    [(b"", ""), (b"HTTP/1.1 400 Bad Request\r\n\r\n", ""), (None, r"\[Errno 111\] Connection refused")],
    ids=["silent", "http", "gone"],
)
def test_an_address_without_a_cluster_is_refused_at_once(
    says: bytes | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(posttrain.backend.ray_process, "REACH_SECONDS", 1.0)
    with server(says) as address:
        expected = rf"no Ray cluster at backend.cluster={address} \({reason}.*`ray start --head`"
        with pytest.raises(ConfigError, match=expected):
            Cluster(BackendConfig(sampler_replicas=1, cluster=address), tmp_path)


@pytest.mark.parametrize("cluster", ["nonsense", "ray://127.0.0.1:10001", "local", "127.0.0.1:x"])
def test_an_address_that_is_none_is_refused(cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=f"backend.cluster={cluster}"):
        Cluster(BackendConfig(sampler_replicas=1, cluster=cluster), tmp_path)
