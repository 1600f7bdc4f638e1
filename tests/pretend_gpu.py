"""A GPU for machines without one: tensors whose device is cuda:0, and whose numbers lie in the CPU's memory. Code takes
its branches for a GPU, and what a GPU refuses is refused: an operation on tensors of two devices, numbers read where
they lie, a generator of another device. Left out: kernels (attention and compiled code have stand-ins), streams,
speed, the memory's size.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten: Any = torch.ops.aten
GPU = torch.device("cuda", 0)
GIB = 2**30
MOVES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
# whose indices may lie on the CPU
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXED |= {aten._index_put_impl_.default, aten._unsafe_index_put.default}
FUSED = {aten._fused_adamw_.default, aten._fused_adam_.default, aten._fused_adamw_.tensor_lr}
# of CUDA's autocast, as far as decoders have them
IN_BF16 = {F.linear, F.conv1d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm}
IN_BF16 |= {torch.baddbmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__}
IN_BF16 |= {torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.addmm, torch.conv1d}
IN_FP32 = {F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.exp, torch.pow}
IN_FP32 |= {torch.Tensor.exp, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.sum, torch.sum, torch.Tensor.cumsum}
IN_FP32 |= {torch.log_softmax, F.log_softmax, torch.rsqrt, torch.Tensor.rsqrt, F.rms_norm, torch.rms_norm}


class OnGpu(torch.Tensor):
    """A tensor of the GPU; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGpu":
        new = torch.Tensor._make_subclass(cls, held.detach(), False, device_for_backend_keys=GPU)  # type: ignore[call-arg]
        new.held = held.detach()
        return new

    def __init__(self, held: torch.Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _to(self, *args, **kwargs)

    def cpu(self, **_: Any) -> torch.Tensor:
        return _to(self, "cpu")

    def cuda(self, *_: Any, **__: Any) -> torch.Tensor:
        return self

    def get_device(self) -> int:
        return 0

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first"
        )

    __array__ = numpy  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            new: Any = OnGpu(self.held.clone()).requires_grad_(self.requires_grad)
            new.__dict__ |= {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "held"}
            memo[id(self)] = new
        return memo[id(self)]

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: "OnGpu") -> None:
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        self.held = new.held


class _Moved(torch.autograd.Function):
    """To the CPU; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: OnGpu, dtype: torch.dtype | None) -> torch.Tensor:
        return x.held.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return OnGpu(gradients[0]), None


def _to(x: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    kwargs.pop("non_blocking", None)
    like = next((a for a in args if isinstance(a, torch.Tensor)), kwargs.pop("other", None))
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    for a in args:
        dtype = a if isinstance(a, torch.dtype) else dtype
        device = a if isinstance(a, torch.device | str | int) and not isinstance(a, bool) else device
    if like is not None:
        device, dtype = like.device, like.dtype
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or x.device)
    if device.type == "cpu" and isinstance(x, OnGpu):
        return _Moved.apply(x, dtype)  # type: ignore[return-value]
    if device.type == "cuda" and not isinstance(x, OnGpu):
        return torch.Tensor.to(x, GPU, dtype or x.dtype)
    return torch.Tensor.to(x, dtype or x.dtype, copy=copy, **kwargs)


def held(x: Any) -> Any:
    return x.held if isinstance(x, OnGpu) else x


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation as a GPU would take it. Its `device`, where it has one, is that of what it makes."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGpu)]
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    on_gpu = asked == "cuda" or (bool(ours) and asked != "meta")
    _check_devices(func, args, tensors)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in _NewGenerator.of_gpu) != on_gpu:
        raise RuntimeError(f"Expected a '{'cuda' if on_gpu else 'cpu'}' device type for generator")
    if func is aten._fused_sdp_choice.default:
        return 0  # the definition
    if func is aten.mm.dtype:
        a, b, dtype = args
        if not ours or dtype != torch.float32 or {a.dtype, b.dtype} != {torch.bfloat16}:
            raise NotImplementedError("mm with out_dtype: of bf16 on CUDA")
        return OnGpu(a.held.float() @ b.held.float())
    if func is aten.histc.default and on_gpu:  # a CPU's has no integers
        return OnGpu(func(args[0].held.float(), *args[1:]).to(args[0].dtype))
    if asked == "cuda":
        kwargs = kwargs | {"device": torch.device("cpu")}
    if kwargs.pop("pin_memory", None) and on_gpu:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    out = func(*tree_map(held, args), **tree_map(held, kwargs))
    if not on_gpu or func is aten._local_scalar_dense.default:
        return out
    wrappers = {id(x.held): x for x in ours}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return wrappers[id(x)] if id(x) in wrappers else OnGpu(x)

    return tree_map(wrapped, out)


def _check_devices(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    if func in INDEXED:
        tensors = [args[0], *(x for x in args[2:3] if isinstance(x, torch.Tensor))] + [
            x for x in args[1] if isinstance(x, OnGpu)
        ]
    # a number that lies on the CPU is taken by value, but by fused kernels: the count of an optimizer's steps
    others = [x for x in tensors if not isinstance(x, OnGpu) and (x.ndim or func in FUSED)]
    if others and len(others) < len(tensors) and any(isinstance(x, OnGpu) for x in tensors) and func not in MOVES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")


class _NewGenerator(torch.Generator):
    """In place of torch.Generator. One of the GPU, known by its address, has a CPU's numbers."""

    of_gpu: ClassVar[dict[int, torch.Generator]] = {}

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        made: Any = _GENERATOR()
        if torch.device(device).type == "cuda":
            cls.of_gpu[made._cdata] = made  # kept: its address stays its own
        return made


_GENERATOR = torch.Generator


class _Gpu(TorchDispatchMode):
    """Of one thread: tensors that are made on the GPU, or moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Autocast(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and any(isinstance(x, OnGpu) for x in args):
            return _to(*args, **(kwargs or {}))
        if func is torch.Tensor.to and (kwargs or {}).get("non_blocking") and not hasattr(args[0], "pinned"):
            raise RuntimeError("a copy that nobody waits for, of memory that Python may free before it")
        if func is F.scaled_dot_product_attention:
            kwargs = _with_mask(*args, **(kwargs or {}))
            args = args[:3]
        dtype = torch.float32 if func in IN_FP32 else torch.bfloat16 if func in IN_BF16 else None
        if dtype is not None and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map(lambda x: _cast(x, dtype), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _with_mask(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
               **rest: Any) -> dict[str, Any]:  # fmt: skip
    """For values of another size than keys torch makes a causal mask in C++, where this GPU's tensors lie on the CPU."""
    if is_causal and isinstance(query, OnGpu) and query.shape[-1] != value.shape[-1]:
        attn_mask, is_causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=GPU).tril(), False
    return {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal} | rest


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, OnGpu) and x.dtype in (torch.bfloat16, torch.float32) else x


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    copied: Any = tensor.clone()
    copied.pinned = True
    return copied


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's: tied parameters stay tied, and those on the GPU stay the same objects."""
    new: dict[int, Any] = {}
    with torch.no_grad():
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in new:
                        moved = fn(tensor)
                        if isinstance(tensor, nn.Parameter):
                            if isinstance(tensor, OnGpu) == isinstance(moved, OnGpu):
                                tensor.data = moved
                                moved = tensor
                            else:
                                moved = nn.Parameter(moved, tensor.requires_grad)
                        new[id(tensor)] = tensor, moved  # the old one is kept: its id stays its own
                    tensors[name] = new[id(tensor)][1]
    return self


@torch.autocast("cuda", enabled=False)
def _varlen(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None,
            scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:  # fmt: skip
    """torch 2.11's varlen_attn, without grouped heads: (tokens, heads, D)."""
    if not query.dtype == key.dtype == value.dtype == torch.bfloat16 or cu_seq_q.dtype != torch.int32:
        raise RuntimeError("flash attention is of bf16, and its starts of int32")
    if query.shape != key.shape or not all(isinstance(x, OnGpu) for x in (query, key, value, cu_seq_q)):
        raise RuntimeError("flash attention: shapes or devices differ")
    assert window_size[1] == 0 and int(cu_seq_q[-1]) == len(query) and max_q >= int(cu_seq_q.diff().max())
    place = torch.arange(len(query), device=query.device)
    sequence = torch.bucketize(place, cu_seq_q, right=True)
    seen = (sequence[:, None] == sequence) & (place[:, None] >= place)
    if window_size[0] >= 0:
        seen &= place[:, None] - place <= window_size[0]
    q, k, v = (x.transpose(0, 1).float() for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1).to(query.dtype)


@torch.autocast("cuda", enabled=False)
def _flex(query: Any, key: Any, value: Any, *, score_mod: Any, block_mask: Any, scale: float | None, enable_gqa: bool,
          return_aux: Any) -> Any:  # fmt: skip
    """FlexAttention by its definition."""
    assert query.dtype == key.dtype == value.dtype and (enable_gqa or query.shape[1] == key.shape[1])
    group = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).float() for x in (key, value))
    scores = query.float() @ k.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    rows, columns = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
    b = torch.arange(len(query), device=query.device)[:, None, None]
    seen = block_mask.mask_mod(b, 0, rows[:, None], columns)[:, None]
    scores = score_mod(scores) if score_mod else scores
    scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).to(query.dtype), SimpleNamespace(lse=scores.logsumexp(-1))


def _by_device_and_dtype(lists: Sequence[Sequence[torch.Tensor]], with_indices: bool = False) -> dict[Any, Any]:
    """torch's for optimizers and norms; its own, in C++, would find all tensors on the CPU."""
    groups: dict[Any, Any] = {}
    for index, first in enumerate(lists[0]):
        group = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for tensors, of_group in zip(lists, group[0], strict=True):
            of_group += tensors[index : index + 1]
        group[1].append(index)
    return groups


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """torch has a GPU, in this thread and in those that it starts."""
    run = threading.Thread.run
    properties = SimpleNamespace(total_memory=139 * GIB, major=9, minor=0, multi_processor_count=132, is_integrated=0)
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "NVIDIA H200",
        "get_device_capability": (9, 0), "get_device_properties": properties, "mem_get_info": (137 * GIB, 139 * GIB),
        "is_bf16_supported": True, "synchronize": None, "empty_cache": None, "memory_allocated": 0, "_lazy_init": None,
        "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0, "reset_peak_memory_stats": None,
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)], "set_rng_state_all": None, "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "manual_seed_all": None,
        "current_stream": stream, "default_stream": stream, "is_initialized": True, "is_current_stream_capturing": False,
    }  # fmt: skip

    def in_thread(thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes it on the CPU, and moves it
        with _Gpu(), _Autocast():
            run(thread)

    with ExitStack() as stack:
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(patch.object(threading.Thread, "run", in_thread))
        stack.enter_context(patch.object(torch, "Generator", _NewGenerator))
        stack.enter_context(patch("torch._C._group_tensors_by_device_and_dtype", _by_device_and_dtype))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(nn.Module, "compile", lambda *_, **__: None))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", _pinned))
        # inside which Python runs again, that of checkpointed layers: the modes below are to see it
        stack.enter_context(patch("torch.autograd.has_torch_function", lambda *_: False))
        stack.enter_context(patch.object(torch.Tensor, "backward", torch.autograd.backward))
        stack.enter_context(patch.object(torch.amp, "is_autocast_available", lambda device: True))
        stack.enter_context(
            patch.object(torch, "compile", lambda function=None, **_: function or (lambda other: other))
        )
        stack.enter_context(patch("posttrain.backend.attention._flex", lambda query: _flex))
        stack.enter_context(patch("torch.nn.attention.varlen.varlen_attn", _varlen))
        stack.enter_context(_Gpu())
        stack.enter_context(_Autocast())
        yield
