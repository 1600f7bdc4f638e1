"""Ray starts, places and watches the processes of a ServiceClient: trainer ranks and sampler
replicas. Only this file and ray_process.py import ray.
"""

import contextlib
import hashlib
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, EngineError
from posttrain.backend.futures import wait_saying
from posttrain.backend.left_behind import remove_own, start_keeper, weight_folder
from posttrain.backend.placement import check_gpus, check_placement, gpus_needed
from posttrain.backend.ray_process import own_processes, own_sessions, ray_running, stop_ray, visible_gpus

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parents[1]
# Settings that children get from this process. Ray gives each its CUDA_VISIBLE_DEVICES.
INHERITED = (
    *("HF_", "TRANSFORMERS_", "VLLM_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "TRITON_", "CUBLAS_", "CUDA_LAUNCH_"),
    *("TOKENIZERS_", "OMP_", "XDG_", "POSTTRAIN_", "TMPDIR"),
)
COMPUTES = ("torch", "transformers", "peft", "safetensors", "vllm")  # packages whose versions must be those here
CHECK_SECONDS = 120.0  # for a node's answer at the start
POSITION = "position"  # the thread of an actor that says where it is, also while another call computes

_open: set["Cluster"] = set()
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
            self._ray = ray_running(config)
            try:
                nodes = [node for node in self._ray.nodes() if node["Alive"]]
                gpus_of_nodes = [int(node["Resources"].get("GPU", 0)) for node in nodes]
                if config.cluster is not None:
                    check_gpus(config, gpus_of_nodes)
                    _check_driver(config, sum(gpus_of_nodes))
                    self._check_nodes(nodes, run_folder)
                self._gpus = bool(sum(gpus_of_nodes))
                self._group = self._reserve() if self._gpus else None
                self.folder = weight_folder(config)
            except BaseException:
                _stop_ray_if_unused()
                raise
            self._keeper = start_keeper([str(self.folder)], own_processes(), own_sessions())
            _open.add(self)

    def start(
        self, actor: type, *args: Any, bundle: int | None = None, gpus: int = 1, concurrency: int = 10_000
    ) -> Any:
        """The handle of a new actor, which may not have started yet. `bundle`: its place among the
        reserved GPUs, ranks first. An actor of `concurrency` 1 has a thread more, for `position`."""
        if self.closed:
            raise EngineError("the processes of this service were ended")
        options: dict[str, Any] = {"num_gpus": gpus if self._gpus else 0, "max_concurrency": concurrency}
        if self._group is not None and bundle is not None:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            )
        elif self._gpus and (free := self._ray.available_resources().get("GPU", 0)) < gpus:
            raise ConfigError(
                f"another process needs {gpus} GPUs, and the cluster has {free:g} free: end what uses the others"
            )
        options["runtime_env"] = {"env_vars": self._environment()}
        groups: dict[str, Any] = {"concurrency_groups": {POSITION: 1}} if concurrency == 1 else {}
        return self._ray.remote(num_cpus=0, **groups)(actor).options(**options).remote(*args)

    def position(self, handle: Any) -> "Future[Any]":
        """Done when the actor has answered where it is: its process runs, and is reached."""
        return future_of(handle.position.options(concurrency_group=POSITION).remote())

    def put(self, item: Any) -> Any:
        """A reference to `item`, which is serialised once however many processes read it."""
        return self._ray.put(item)

    def kill(self, handle: Any) -> None:
        if self._ray.is_initialized():  # else its process is gone
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
            remove_own(self.folder)
            _stop_ray_if_unused()
            with contextlib.suppress(OSError):
                self._keeper.communicate(b"closed")

    def _environment(self) -> dict[str, str]:
        """For a child: this process's settings, packages and share of the cores."""
        processes = self.config.trainer_processes + self.config.sampler_replicas * self.config.tensor_parallel
        threads = max(1, (os.cpu_count() or 1) // processes)
        env = {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}
        env["OMP_NUM_THREADS"] = str(min(threads, int(os.environ.get("OMP_NUM_THREADS") or threads)))
        if self.config.replicas_share_gpu and (gpus := visible_gpus()):
            env["CUDA_VISIBLE_DEVICES"] = gpus[0]
        paths = [str(PACKAGE.parent), *map(os.path.abspath, sys.path)]
        return env | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}

    def _reserve(self) -> Any:
        """GPUs for all ranks and replicas, so that a node's GPUs are not scattered."""
        from ray.util import placement_group, remove_placement_group

        config = self.config
        ranks = config.trainer_processes if config.trainer_processes > 1 else 0
        bundles = [{"GPU": 1.0}] * ranks + [{"GPU": float(config.tensor_parallel)}] * config.sampler_replicas
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(timeout_seconds=CHECK_SECONDS):
            free = self._ray.available_resources().get("GPU", 0)
            remove_placement_group(group)
            raise ConfigError(
                f"the run needs {gpus_needed(config)} GPUs, those of each replica on one node, and {free:g} of this "
                "cluster are free: end what uses the others, or take fewer processes"
            )
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

        given = {"log_path": run_folder} | ({"backend.sync_dir": Path(d)} if (d := self.config.sync_dir) else {})
        # a node's processes start where `ray start` was given
        folders = {name: folder.expanduser().absolute() for name, folder in given.items()}
        with contextlib.ExitStack() as stack:
            tokens = {name: str(stack.enter_context(_token(folder))) for name, folder in folders.items()}
            here = node_report({})
            reports = [
                self._ray.remote(node_report).options(
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                    runtime_env={"env_vars": self._environment()},
                ).remote(tokens)
                for node in nodes
            ]  # fmt: skip
            for node, reference in zip(nodes, reports, strict=True):
                address = node["NodeManagerAddress"]
                try:
                    report = answer(reference, f"node {address}", CHECK_SECONDS)
                except (ImportError, ProcessLost) as error:
                    raise ConfigError(
                        f"node {address} cannot run this project ({error}): install the same version on all nodes"
                    ) from error
                for what, ours in here["versions"].items():
                    if (there := report["versions"][what]) != ours:
                        raise ConfigError(
                            f"node {address} has another version of {what} ({there}, here {ours}): install the same "
                            "on all nodes"
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
    return answers([reference], what, seconds)[0]


def answers(references: Sequence[Any], what: str, seconds: float) -> list[Any]:
    """As `answer`, of actors that may wait for each other: the first error of any is raised at once."""
    futures = [future_of(reference) for reference in references]
    try:
        wait_saying(futures, seconds, what)
    except TimeoutError:
        raise EngineError(f"{what} did not answer within {seconds:g} seconds") from None
    for future in filter(Future.done, futures):  # an error is not kept waiting by those that are not
        future.result()
    return [future.result() for future in futures]


def node_report(tokens: dict[str, str]) -> dict[str, Any]:
    """Of the node that runs this: the versions of the project and its packages there, and which files
    it sees."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    versions = {"this project": digest.hexdigest()[:8]} | {name: _version_of(name) for name in COMPUTES}
    return {"versions": versions, "sees": {name: os.path.exists(path) for name, path in tokens.items()}}


def _version_of(package: str) -> str:
    """Without what it was built for: a node may have no GPU."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "none"


def node_address() -> str:
    """Of the node that runs this, as the others reach it."""
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def _check_driver(config: BackendConfig, gpus: int) -> None:
    if gpus and config.trainer_processes == 1:
        raise ConfigError(
            "backend.trainer_processes=1 trains in this process, on a GPU that the Ray cluster may give to a replica: "
            "set backend.trainer_processes, or leave backend.cluster out"
        )


def _stop_ray_if_unused() -> None:
    if not _open:
        stop_ray()


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
