"""Ray starts, places and watches the processes of a ServiceClient: trainer ranks and sampler
replicas. The only importer of ray. Whatever way this process ends, a keeper process removes what
would stay: Ray's own processes, published weights in shared memory.
"""

import contextlib
import ctypes
import glob
import hashlib
import inspect
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, EngineError
from posttrain.backend.placement import check_gpus, check_placement

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parents[1]
# Settings that children get from this process. Ray gives each its CUDA_VISIBLE_DEVICES.
INHERITED = ("HF_", "VLLM_", "NCCL_", "GLOO_", "TORCH_", "TOKENIZERS_", "OMP_", "XDG_", "POSTTRAIN_", "TMPDIR")
RAY_ENVIRONMENT = {
    # Ray hides a process's GPU from actors that ask for none, warns about it, and reports usage.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Of a Ray that is started here: it would kill our processes for the memory of others, and its own
    # node, with this program, when a busy machine lets it answer late.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_failure_threshold": "1000",
    "RAY_gcs_server_port_wait_time_s": "300",
}
FOLDER = "posttrain-weights"
CHECK_SECONDS = 120.0  # for a node's answer at the start
START_SECONDS = 60.0  # for Ray; ten on a quiet machine
REACH_SECONDS = 10.0  # for a connection to a running cluster
# What a client of HTTP/2 says first, with empty settings, and the kind of frame that a server answers with.
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
HTTP2_SETTINGS = b"\4"
SAY_AFTER_SECONDS = 60.0  # a wait says what it waits for

_open: set["Cluster"] = set()
_ended: threading.Event | None = None  # of the Ray that was started or joined here
_lock = threading.RLock()


class ProcessLost(Exception):
    """A rank or a replica died, or its node."""


class Cluster:
    """Ray, started here or joined, and the folder for weights. One for each ServiceClient; the last
    that closes stops the Ray that was started here."""

    def __init__(self, config: BackendConfig, run_folder: Path):
        """ConfigError for a layout that does not fit, and for nodes that cannot take part."""
        check_placement(config)
        self.config, self.closed = config, False
        with _lock:
            if config.cluster is None:
                check_gpus(config, [torch.cuda.device_count()])
            self._ray = _ray_running(config)
            try:
                nodes = [node for node in self._ray.nodes() if node["Alive"]]
                gpus_of_nodes = [int(node["Resources"].get("GPU", 0)) for node in nodes]
                if config.cluster is not None:
                    check_gpus(config, gpus_of_nodes)
                    _check_driver(config, sum(gpus_of_nodes))
                    self._check_nodes(nodes, run_folder)
                self._gpus = bool(sum(gpus_of_nodes))
                self._group = self._reserve() if self._gpus else None
                self.folder = _weight_folder(config)
            except BaseException:
                _stop_ray_if_unused()
                raise
            self._keeper = _keeper([str(self.folder), *_session()], _own_processes())
            _open.add(self)

    def start(
        self, actor: type, *args: Any, bundle: int | None = None, gpus: int = 1, concurrency: int = 10_000, **env: str
    ) -> Any:
        """The handle of a new actor, which may not have started yet. `bundle`: its place among the
        reserved GPUs, ranks first."""
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus if self._gpus else 0, "max_concurrency": concurrency}
        if self._group is not None and bundle is not None:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            )
        elif self._gpus and (free := self._ray.available_resources().get("GPU", 0)) < gpus:
            raise ConfigError(f"one process more needs {gpus} GPUs, and {free:g} of this cluster are free")
        options["runtime_env"] = {"env_vars": self._environment() | env}
        return self._ray.remote(actor).options(**options).remote(*args)

    def put(self, item: Any) -> Any:
        """A reference to `item`, which is serialised once however many processes read it."""
        return self._ray.put(item)

    def kill(self, handle: Any) -> None:
        with contextlib.suppress(Exception):  # it is dead, or Ray is
            self._ray.kill(handle)

    def cancel(self, reference: Any) -> None:
        with contextlib.suppress(Exception):
            self._ray.cancel(reference)

    def close(self) -> None:
        with _lock:
            if self.closed:
                return
            self.closed = True
            _open.discard(self)
            if self._group is not None:
                from ray.util import remove_placement_group

                with contextlib.suppress(Exception):
                    remove_placement_group(self._group)
            remove(self.folder)
            _stop_ray_if_unused()
            with contextlib.suppress(OSError):
                self._keeper.communicate(b"closed")

    def _environment(self) -> dict[str, str]:
        """For a child: this process's settings, packages and share of the cores."""
        processes = self.config.trainer_processes + self.config.sampler_replicas * self.config.tensor_parallel
        threads = max(1, (os.cpu_count() or 1) // processes)
        env = {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}
        env["OMP_NUM_THREADS"] = str(min(threads, int(os.environ.get("OMP_NUM_THREADS") or threads)))
        paths = [str(PACKAGE.parent), *filter(None, sys.path)]
        return env | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}

    def _reserve(self) -> Any:
        """GPUs for all ranks and replicas, so that a node's GPUs are not scattered."""
        from ray.util import placement_group

        config = self.config
        ranks = config.trainer_processes if config.trainer_processes > 1 else 0
        bundles = [{"GPU": 1.0}] * ranks + [{"GPU": float(config.tensor_parallel)}] * config.sampler_replicas
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(timeout_seconds=CHECK_SECONDS):
            free = self._ray.available_resources().get("GPU", 0)
            raise ConfigError(f"GPUs of this cluster are in use: {free:g} are free, and the run needs {bundles}")
        return group

    def _check_nodes(self, nodes: list[dict[str, Any]], run_folder: Path) -> None:
        """ConfigError for a node with another version of this project, or that does not see the run
        folder or `sync_dir`."""
        if len(nodes) > 1 and self.config.sampler_replicas and self.config.sync_dir is None:
            raise ConfigError(
                f"the cluster has {len(nodes)} nodes: new weights reach the replicas through a folder that all of them "
                "see. Set backend.sync_dir"
            )
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        folders = {"log_path": run_folder} | ({"backend.sync_dir": Path(d)} if (d := self.config.sync_dir) else {})
        with contextlib.ExitStack() as stack:
            tokens = {name: str(stack.enter_context(_token(folder))) for name, folder in folders.items()}
            here = node_report({})["version"]
            for node in nodes:
                address = node["NodeManagerAddress"]
                task = self._ray.remote(node_report).options(
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                    runtime_env={"env_vars": self._environment()},
                )
                try:
                    report = answer(task.remote(tokens), f"node {address}", CHECK_SECONDS)
                except (ImportError, ProcessLost) as error:
                    raise ConfigError(
                        f"node {address} cannot run this project ({error}): install the same version on all nodes"
                    ) from error
                if report["version"] != here:
                    raise ConfigError(
                        f"node {address} has another version of this project ({report['version'][:8]}, here "
                        f"{here[:8]}): install the same on all nodes"
                    )
                for name, seen in report["sees"].items():
                    if not seen:
                        raise ConfigError(
                            f"node {address} does not see {folders[name]} ({name}): take a folder that all nodes share"
                        )


def unwrapped(error: BaseException) -> BaseException:
    """The exception that a process raised, with its attributes; ProcessLost if the process died."""
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError):
        return error.cause if isinstance(error.cause, BaseException) else EngineError(str(error).splitlines()[-1])
    if isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.TaskCancelledError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        lost = ProcessLost(" ".join(lines[:2])[:300] or type(error).__name__)
        lost.__cause__ = error
        return lost
    return error


def future_of(reference: Any) -> "Future[Any]":
    """An actor's answer as a future that raises `unwrapped` errors."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    reference.future().add_done_callback(partial(_pass_on, future))
    return future


def _pass_on(future: "Future[Any]", done: "Future[Any]") -> None:
    try:
        result = done.result()
    except BaseException as error:
        future.set_exception(unwrapped(error))
    else:
        future.set_result(result)


def answer(reference: Any, what: str, seconds: float) -> Any:
    """Waits for an actor's answer. EngineError after `seconds`; after a minute it says what it waits
    for."""
    future, began = future_of(reference), time.monotonic()
    while True:
        left = seconds - (time.monotonic() - began)
        try:
            return future.result(min(max(left, 0.0), SAY_AFTER_SECONDS))
        except TimeoutError:
            if future.done():
                raise
            if left <= SAY_AFTER_SECONDS:
                raise EngineError(f"{what} did not answer within {seconds:g} seconds") from None
            print(f"waiting for {what} since {time.monotonic() - began:.0f} s", flush=True)


def node_report(tokens: dict[str, str]) -> dict[str, Any]:
    """Of the node that runs this: the version of the project there, and which files it sees."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    return {"version": digest.hexdigest(), "sees": {name: os.path.exists(path) for name, path in tokens.items()}}


# --- Ray -----------------------------------------------------------------------------------------


def _ray_running(config: BackendConfig) -> Any:
    """Ray, initialised."""
    global _ended
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "namespace": secrets.token_hex(4)}
    if config.cluster is None:
        with _gpus_left_to_ray(config):
            _ended = _start_here(partial(ray.init, "local", object_store_memory=100 * 2**20, **options))
        return ray
    named = f"backend.cluster={config.cluster}"
    _check_reachable(config.cluster)
    try:
        _ended = _in_lasting_thread(partial(ray.init, config.cluster, **options))
    except Exception as error:  # of any type
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"the Ray cluster at {named} cannot be joined: {' '.join(lines)}") from error
    return ray


def _start_here(init: Callable[[], object]) -> threading.Event:
    """As `_in_lasting_thread`, up to three times. Ray gives its node 30 seconds to appear, and its helpers
    15, too few on a busy machine."""
    from ray._private import services

    def get_node(*arguments: Any, ask: Callable[..., Any] = services.get_node) -> Any:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    for left in (2, 1, 0):
        try:
            with patch.object(services, "get_node", get_node):
                return _in_lasting_thread(init)
        except Exception as error:  # of any type
            if not left:
                raise EngineError(f"Ray did not start on this machine: {' '.join(str(error).split())}") from error
    raise AssertionError


def _in_lasting_thread(init: Callable[[], object]) -> threading.Event:
    """Calls `init` in a thread that lasts until the returned event is set: Linux kills Ray's processes
    when the thread that started them ends. Ray's handler of SIGTERM, which aborts this program within
    three seconds, is put back to the one before: a run saves and stops."""
    outcome: Future[None] = Future()
    ended = threading.Event()

    def run() -> None:
        sigaction, before = ctypes.CDLL(None).sigaction, ctypes.create_string_buffer(256)
        sigaction(signal.SIGTERM, None, before)  # signal.signal is for the main thread
        try:
            init()
        except BaseException as error:
            outcome.set_exception(error)
            return
        finally:
            sigaction(signal.SIGTERM, before, None)
        outcome.set_result(None)
        ended.wait()

    threading.Thread(target=run, name="ray", daemon=True).start()
    try:
        outcome.result(4 * START_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"no answer of Ray in {4 * START_SECONDS:g} seconds") from None
    return ended


def _check_reachable(cluster: str) -> None:
    """ConfigError unless a server that speaks HTTP/2, as Ray's does, answers at the address: Ray itself
    tries for minutes."""
    from ray._private import services

    problem = f"there is no Ray cluster at backend.cluster={cluster}"
    remedy = "start it by `ray start --head`, or leave the option out"
    if cluster == "local" or "://" in cluster:
        raise ConfigError(f"backend.cluster={cluster}: take auto or HOST:PORT of a running Ray cluster")
    try:
        address = services.canonicalize_bootstrap_address_or_die(cluster)
        host, _, port = address.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS) as server:
            server.settimeout(REACH_SECONDS)
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                server.sendall(HTTP2_GREETING)
                if server.recv(9, socket.MSG_WAITALL)[3:4] != HTTP2_SETTINGS:
                    raise ConnectionError("what answers there is not Ray")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{problem} ({reason}): {remedy}") from error


@contextlib.contextmanager
def _gpus_left_to_ray(config: BackendConfig) -> Iterator[None]:
    """A single trainer is in this process, on the first GPU: Ray must not give that to a replica."""
    count, before = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count and config.trainer_processes == 1:
        names = before.split(",") if before else [str(i) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[1:])
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif count:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def _check_driver(config: BackendConfig, gpus: int) -> None:
    if gpus and config.trainer_processes == 1:
        raise ConfigError(
            "backend.trainer_processes=1 trains in this process, on a GPU that the Ray cluster may give to a replica: "
            "set backend.trainer_processes, or leave backend.cluster out"
        )


def _own_processes() -> list[int]:
    """Process ids of the Ray that was started here."""
    from ray._private import worker

    node: Any = worker._global_node
    if node is None or not node.is_head():
        return []
    return [info.process.pid for infos in node.all_processes.values() for info in infos]


def _session() -> list[str]:
    """The folder with logs and sockets of the Ray that was started here."""
    from ray._private import worker

    node: Any = worker._global_node
    return [node.get_session_dir_path()] if _own_processes() else []


def _stop_ray_if_unused() -> None:
    global _ended
    if _open or _ended is None:
        return
    import ray

    folders, ended, _ended = _session(), _ended, None
    ray.shutdown()
    ended.set()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


# --- what stays after a process ------------------------------------------------------------------


def _weight_folder(config: BackendConfig) -> Path:
    """A new folder, named after this process. Folders of dead processes of this node are removed."""
    shared_memory = Path("/dev/shm")
    parent = Path(config.sync_dir).expanduser() if config.sync_dir else shared_memory
    if not config.sync_dir and not shared_memory.is_dir():
        parent = Path(tempfile.gettempdir())
    prefix = f"{FOLDER}-{socket.gethostname()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in parent.glob(f"{prefix}-*-*"):
            if not Path(f"/proc/{folder.name.split('-')[-2]}").exists():
                remove(folder)
        folder = parent / f"{prefix}-{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
    except OSError as error:
        raise ConfigError(f"weights cannot be published in {parent} (backend.sync_dir): {error}") from error
    return folder


def remove(folder: "str | Path") -> None:
    """Also the shared memory that processes have noted there (`note_shared_memory`)."""
    import glob
    import os
    import shutil

    for note in glob.glob(f"{glob.escape(str(folder))}/*.segments"):
        with open(note) as lines:
            for path in [path for line in lines.read().splitlines() for path in glob.glob(line)]:
                os.remove(path)
    shutil.rmtree(folder, ignore_errors=True)


def note_semaphores(note: Path) -> None:
    """Gives the semaphores that this process and its children will make a prefix of their own, and
    writes it down. Nobody else can remove them: Ray kills Python's resource tracker as well."""
    prefix = f"mp-{secrets.token_hex(4)}"
    multiprocessing.current_process()._config["semprefix"] = f"/{prefix}"  # type: ignore[attr-defined]
    note.write_text(f"/dev/shm/sem.{prefix}-*\n")


def note_shared_memory(note: Path) -> None:
    """Adds the segments that this process and its children have mapped: nobody else can remove them
    after a SIGKILL."""
    paths = set()
    for pid in _family(os.getpid()):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            paths |= {line.split(maxsplit=5)[-1] for line in maps if "/dev/shm/" in line}
    segments = [
        path for path in paths if Path(path).name.startswith(("psm_", "vllm_"))
    ]  # of Python's and vLLM's making
    with note.open("a") as file:
        file.writelines(f"{glob.escape(path)}\n" for path in segments)


def _family(pid: int) -> list[int]:
    """The process and all below it."""
    children = [
        child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in map(int, file.read_text().split())
    ]
    return [pid, *(below for child in children for below in _family(child))]


# Reads until its pipe closes, which happens however the process that started it ends. Then it ends
# Ray's processes and their children, workers too, and removes the folders.
KEEPER = (
    f"{inspect.getsource(remove)}"
    + """
import os, signal, sys, time
folders, started = sys.argv[1].split(os.pathsep), {int(pid) for pid in sys.argv[2:]}

def status(pid):  # state, parent, process group
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[:3]
    except OSError:
        return "X", "0", "0"

def alive(pid):
    return status(pid)[0] not in "XZ"

def is_ray(pid):  # a dead process's number may belong to another by now
    try:
        return b"ray" in open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return False

def add_children(family):
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        if pid not in family and family & set(map(int, status(pid)[1:])):
            family.add(pid)
            add_children(family)

add_children(started)  # Ray's agents: a dead parent could not be asked later
if sys.stdin.buffer.read() != b"closed":
    family = set(started)
    add_children(family)
    family = {pid for pid in family if alive(pid) and (pid not in started or is_ray(pid))}
    for number, seconds in ((signal.SIGTERM, 2), (signal.SIGKILL, 5)):
        for pid in family:
            try:
                os.kill(pid, number)
            except OSError:
                pass
        deadline = time.monotonic() + seconds
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
    for folder in folders:
        remove(folder)
"""
)


def _keeper(folders: list[str], pids: list[int]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-S", "-c", KEEPER, os.pathsep.join(folders), *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[Path]:
    """A file that other nodes should see."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".seen-{secrets.token_hex(4)}"
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)
