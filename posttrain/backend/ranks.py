"""Processes that train together (ranks): their group, what they agree on, and tensors sharded over
them by FSDP2 along their first dimension. Without a group, one process, and nothing here changes a
tensor.
"""

import os
import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from posttrain.backend.config import training_device
from posttrain.backend.errors import ConfigError, CookbookError

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
MEET = timedelta(minutes=5)  # nodes start one after the other
TIMEOUT = timedelta(minutes=30)  # processes wait for the first process's evaluations and checkpoints


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """The rows of this process."""
        return range(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def any(self, flag: object) -> bool:
        """Whether `flag` is true in any process. A collective call: a signal that reaches the
        processes in different steps stops them in the same step.
        """
        if self.count == 1:
            return bool(flag)
        num_true = torch.tensor(float(bool(flag)), device=training_device())
        dist.all_reduce(num_true)
        return bool(num_true)

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def gathered(self, item: T) -> list[T]:
        """`item` of every process, by rank. A collective call."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        dist.all_gather_object(items, item)
        return items

    @contextmanager
    def same_outcome(self) -> Iterator[None]:
        """The block's error in any process is raised in all of them, the lowest rank's first. The
        block makes no collective call after it may have failed. A collective call."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        self.raise_first(failed)

    def raise_first(self, failed: Exception | None) -> None:
        """Raises in all what failed in the lowest rank that failed. A collective call."""
        sent = failed and self._sent(failed)
        for rank, error in enumerate(self.gathered(sent)):
            if error is not None:
                raise sent if sent is not None and rank == self.rank else error

    def _sent(self, failed: Exception) -> Exception:
        """As the other processes can read it, and the same here: an error that pickle cannot make again, as of a
        class in the user's script, becomes a RuntimeError. A bug's traceback, which would stay here, is a note."""
        if self.count == 1:
            return failed
        try:
            pickle.loads(pickle.dumps(failed))
            sent = failed
        except Exception:
            sent = RuntimeError(f"{type(failed).__name__}: {failed}")
        if not isinstance(sent, CookbookError) and not getattr(sent, "__notes__", None):
            sent.add_note(f"In training process {self.rank}:\n{''.join(traceback.format_exception(failed))}")
        return sent


ALONE = Processes()


def join(rank: int, count: int, store: Any) -> Processes:
    """The default group: NCCL for tensors on GPUs, gloo for those on the CPU and for objects.
    `store`: a torch.distributed.Store in which they meet."""
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, rank=rank, world_size=count, store=store)
    processes = Processes(rank, count)
    if device.type == "cuda":
        check_own_gpus(processes.gathered(str(torch.cuda.get_device_properties(device).uuid)))
    return processes


def check_own_gpus(uuid_R: Sequence[str]) -> None:
    """ConfigError where two ranks are on one GPU: NCCL would fail in their first exchange."""
    if (found := len(set(uuid_R))) < len(uuid_R):
        raise ConfigError(
            f"{len(uuid_R)} training processes were started on {found} GPU{'s' if found > 1 else ''}, and each needs one "
            f"of its own: start {found} (torchrun --nproc-per-node), or one without torchrun"
        )


def _met(count: int) -> tuple[int, Any]:
    """This process's rank, and the store of torchrun's variables. ConfigError where processes are missing."""
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={count} is set, and {missing[0]} is not: start the processes by torchrun, or unset WORLD_SIZE"
        )
    rank, address = os.environ["RANK"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, number, _ = next(rendezvous("env://", timeout=MEET))
    except (dist.DistError, TimeoutError) as error:
        raise ConfigError(
            f"process {rank} of WORLD_SIZE={count} did not meet the others at {address} (MASTER_ADDR, MASTER_PORT) within "
            f"{MEET.total_seconds():g} s: {str(error).splitlines()[0]}"
        ) from error
    store.set_timeout(TIMEOUT)
    return number, PrefixStore("default_pg", store)


def check_no_copies() -> None:
    """ConfigError where torchrun has started several processes of a command that does not join them: each would
    be a whole run."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1" and not dist.is_initialized():
        raise ConfigError(
            f"torchrun has started this command {count} times, and each would be a run of its own: start it without "
            f"torchrun, with backend.trainer_processes={count}"
        )


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The process group of torchrun's variables; without them, one process. Only the first
    prints.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    rank, store = _met(count)
    processes = join(rank, count, store)
    try:
        with open(os.devnull, "w") as devnull, nullcontext() if processes.is_first else redirect_stdout(devnull):
            yield processes
    finally:
        dist.destroy_process_group()


# --- sharded modules and tensors -----------------------------------------------------------------


def mesh() -> Any:
    """Of all processes."""
    return dist.device_mesh.init_device_mesh(training_device().type, (dist.get_world_size(),))


def sharded(module: M, mesh: Any, dtype: torch.dtype | None = None, keep_gathered: bool = False) -> M:
    """The module as an FSDP unit whose gradients are summed over the ranks: losses are sums, or
    already divided by the rows of the whole batch. `dtype`: of the copies that passes read, None =
    the weights' own. Gradients are added up in fp32. `keep_gathered`: from the forward to the
    backward pass."""
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    unit: Any = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    if hasattr(unit, "set_reduce_scatter_unused_params"):  # since torch 2.13
        # Whether a weight has a gradient may depend on a rank's rows: the compressed tokens of DeepSeek V4, experts.
        unit.set_reduce_scatter_unused_params(True)
    return unit


def reshard(model: nn.Module) -> None:
    """After a forward pass some modules hold gathered weights, not the optimizer's parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its gradient, gathered where it is sharded: then a collective call."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(tensor: torch.Tensor, keep: bool) -> torch.Tensor:
    """As `whole`; a gathered tensor goes to the CPU, or is dropped without `keep`."""
    gathered = whole(tensor)
    if not isinstance(tensor, DTensor):
        return gathered
    return gathered.cpu() if keep else gathered.new_empty(0)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole`, which every rank has, sharded as `like` is; a scalar (the optimizer's step count) is
    not sharded."""
    if not isinstance(like, DTensor) or not whole.ndim:
        return whole
    device = like.to_local().device
    return distribute_tensor(whole.detach().to(device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(live: torch.Tensor, whole: torch.Tensor | None) -> None:
    """Copies `whole` into `live`. Into a sharded one, the first rank's: a collective call, and the
    other ranks give None. With None a tensor that is not sharded, a buffer, stays as it is."""
    if not isinstance(live, DTensor):
        if whole is not None:
            live.copy_(whole)
        return
    device = live.to_local().device
    sent = torch.empty(live.shape, dtype=live.dtype, device=device) if whole is None else whole.to(device, live.dtype)
    dist.broadcast(sent, 0)
    live.copy_(shard_like(sent, live))


def local_rows(count: int, processes: Processes) -> slice:
    """The rows of a tensor of `count` rows that FSDP gives to this rank."""
    size = -(-count // processes.count)
    return slice(min(size * processes.rank, count), min(size * (processes.rank + 1), count))
