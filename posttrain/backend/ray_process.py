"""Starts Ray on this machine, or joins a cluster, and stops it."""

import atexit
import contextlib
import ctypes
import glob
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, EngineError, one_line
from posttrain.backend.futures import wait_saying
from posttrain.backend.left_behind import start_keeper

RAY_ENVIRONMENT = {
    # Ray hides a process's GPU from actors that ask for none, warns about it, and reports usage.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would give ranks and replicas the processor after everything else: graders, sandboxes, this program.
    "RAY_worker_niceness": "0",
    # Idle workers, as many as the machine has cores. Ours have settings of their own, and cannot use them.
    "RAY_prestart_worker_first_driver": "0",
    # A call after the end, such as the end of a replica that was still starting, would start another Ray.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Of a Ray that is started here: it would kill our processes for the memory of others, and its own
    # node, with this program, when a busy machine lets it answer late.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_failure_threshold": "1000",
    # What its processes wait for each other on a busy machine.
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
}
START_SECONDS = 180.0  # for Ray; ten on a quiet machine
REACH_SECONDS = 10.0  # for a connection to a running cluster
# What a client of HTTP/2 says first, with empty settings, and the kind of frame that a server answers with.
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
HTTP2_SETTINGS = b"\4"

_ended: threading.Event | None = None  # of the Ray that was started or joined here


def ray_running(config: BackendConfig) -> Any:
    """Ray, initialised. ConfigError for a cluster that cannot be joined, EngineError if Ray does not
    start here."""
    global _ended
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "namespace": secrets.token_hex(4)}
    if config.cluster is None:
        with gpus_left_to_ray(config):
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
    15, too few on a busy machine: it has longer, while its processes run. They get a session of their own:
    what a terminal, or a batch system, sends to all processes of the command (SIGHUP, SIGTERM) would end Ray
    before the run has saved."""
    from ray._private import services

    keeper = start_keeper([], [], own_sessions())
    ask, popen = services.get_node, services.ConsolePopen
    for left in (2, 1, 0):
        started: list[Any] = []

        def get_node(*arguments: Any, started: list[Any] = started) -> Any:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    return ask(*arguments)
                except RuntimeError:
                    if time.monotonic() > deadline or any(process.poll() is not None for process in started):
                        raise
                    time.sleep(0.5)

        def apart(*arguments: Any, started: list[Any] = started, **options: Any) -> Any:
            started.append(popen(*arguments, start_new_session=True, **options))
            return started[-1]

        try:
            with patch.object(services, "get_node", get_node), patch.object(services, "ConsolePopen", apart):
                ended = _in_lasting_thread(init)
            keeper.communicate(b"closed")
            return ended
        except Exception as error:  # of any type
            _remove_sessions()
            if not left:
                raise EngineError(f"Ray did not start on this machine: {one_line(error)}") from error
        except KeyboardInterrupt:
            atexit.register(_remove_sessions)  # what has begun to start ends with this process
            raise
    raise AssertionError


def own_sessions() -> str:
    """A pattern for the folders of Rays that this process starts."""
    from ray._common.utils import get_default_ray_temp_dir

    return f"{get_default_ray_temp_dir()}/session_*_{os.getpid()}"


def _remove_sessions() -> None:
    """The folders of Rays whose start here has failed."""
    for folder in glob.glob(own_sessions()):
        shutil.rmtree(folder, ignore_errors=True)


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
        wait_saying([outcome], 4 * START_SECONDS, "Ray to start")
    except KeyboardInterrupt:
        _end_once_started(outcome)
        raise
    outcome.result()
    return ended


def _end_once_started(outcome: "Future[None]") -> None:
    """A Ray that is left halfway keeps processes for a minute, and its threads may end this process by SIGSEGV."""
    print("Ray is starting, and ends when it has; once more to leave it", flush=True)
    if outcome.exception() is None:
        import ray

        ray.shutdown()


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


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process sees; a single trainer has the first."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if count and visible else [str(i) for i in range(count)]


@contextlib.contextmanager
def gpus_left_to_ray(config: BackendConfig) -> Iterator[None]:
    """A single trainer is in this process, on the first GPU: Ray must not give that to a replica, nor any
    other where the replicas are on the trainer's."""
    names, before = visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if names and config.trainer_processes == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if config.replicas_share_gpu else ",".join(names[1:])
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif names:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def own_processes() -> list[int]:
    """Process ids of the Ray that was started here."""
    from ray._private import worker

    node: Any = worker._global_node
    if node is None or not node.is_head():
        return []
    return [info.process.pid for infos in node.all_processes.values() for info in infos]


def session_folders() -> list[str]:
    """The folder with logs and sockets of the Ray that was started here."""
    from ray._private import worker

    node: Any = worker._global_node
    return [node.get_session_dir_path()] if own_processes() else []


def stop_ray() -> None:
    """Unless it was neither started nor joined here."""
    global _ended
    if _ended is None:
        return
    import ray

    folders, ended, _ended = session_folders(), _ended, None
    ray.shutdown()
    ended.set()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
