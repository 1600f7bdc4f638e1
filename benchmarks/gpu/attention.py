"""Block `attention`: forward and backward of the attention kernels that training could use, at the
0.5B model's 14 heads of 64.

Tensors are (B, T, heads, 64), as a layer's projections leave them. "tree": 8 answers behind a
shared prompt of half the row, so a key at column k is seen by the queries k <= q < ends[k].
"""

import inspect
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import attempt, milliseconds, peak_gib, relative
from posttrain.backend.config import compute_dtype, training_device

HEADS, KV_HEADS, HEAD_DIM, ANSWERS = 14, 2, 64, 8
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def tree_ends(length: int, device: torch.device) -> torch.Tensor:
    """(T,): up to which query a key is seen."""
    half, own = length // 2, length // (2 * ANSWERS)
    ends = [length] * half + [half + own * (answer + 1) for answer in range(ANSWERS) for _ in range(own)]
    return torch.tensor(ends, device=device)


def tree_mask(length: int, rows: int, device: torch.device) -> torch.Tensor:
    """(B, 1, T, T) as posttrain/backend/batching.py makes it."""
    column_T, ends_T = torch.arange(length, device=device), tree_ends(length, device)
    visible_TT = (column_T[:, None] >= column_T) & (column_T[:, None] < ends_T)
    return visible_TT.expand(rows, 1, length, length).contiguous()


def heads_repeated(x_BTND: torch.Tensor) -> torch.Tensor:
    """(B, 14, T, D): with a mask, transformers repeats keys and values."""
    return x_BTND.transpose(1, 2).repeat_interleave(HEADS // KV_HEADS, dim=1)


def causal(backend: SDPBackend | None = None) -> Kernel:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def masked(mask_B1TT: torch.Tensor) -> Kernel:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = heads_repeated(k), heads_repeated(v)
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask_B1TT).transpose(1, 2)

    return run


def as_bias(mask_B1TT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask_B1TT.shape, dtype=dtype, device=mask_B1TT.device).masked_fill_(~mask_B1TT, float("-inf"))


def flex_tree(length: int, device: torch.device, repeat: bool) -> Kernel:
    ends_T = tree_ends(length, device)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < ends_T[k])

    block_mask = create_block_mask(visible, None, None, length, length, device=device)
    flex = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (heads_repeated(x) if repeat else x.transpose(1, 2) for x in (k, v))
        out = flex(q.transpose(1, 2), k, v, block_mask=block_mask, enable_gqa=not repeat)
        return out.transpose(1, 2)  # type: ignore[union-attr]

    return run


def varlen(rows: int, length: int, device: torch.device) -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known
    options |= {"enable_gqa": True} if grouped else {}
    starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not grouped:
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*flat, starts, starts, length, length, **options).view_as(q)  # type: ignore[union-attr]

    return run


def kernels(rows: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Kernel]]:
    """Each is made only when its turn comes: its mask takes memory."""
    made: dict[str, Callable[[], Kernel]] = {
        "causal sdpa": causal,
        "tree, bool mask": lambda: masked(tree_mask(length, rows, device)),
        "tree, bias mask": lambda: masked(as_bias(tree_mask(length, rows, device), dtype)),
    }
    if device.type == "cuda":  # on a CPU these have no backward
        made |= {
            "tree, flex": lambda: flex_tree(length, device, repeat=False),
            "tree, flex, repeated heads": lambda: flex_tree(length, device, repeat=True),
            "causal cudnn": lambda: causal(SDPBackend.CUDNN_ATTENTION),
            "causal flash": lambda: causal(SDPBackend.FLASH_ATTENTION),
            "causal varlen": lambda: varlen(rows, length, device),
        }
    return made


def inputs(rows: int, length: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(rows, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def both_passes(kernel: Kernel, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of its sum of squares."""
    out = kernel(*qkv)
    return [out, *torch.autograd.grad(out, qkv, out.detach())]


def worst_error(name: str, kernel: Kernel, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of the output and the three gradients, against fp64 with a mask."""
    qkv = inputs(rows, length, device, dtype)
    mask = tree_mask(length, rows, device)
    mask = mask if "tree" in name else torch.ones_like(mask).tril()
    exact = both_passes(masked(mask), [x.detach().double().requires_grad_() for x in qkv])
    return max(relative(found, true) for found, true in zip(both_passes(kernel, qkv), exact, strict=True))


def kernel_names(run: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return [f"{event.key[:60]} {event.device_time_total / 1e3:.2f}" for event in found[:3]]


def main() -> None:
    record, device = Record(), training_device()
    cuda, dtype = device.type == "cuda", compute_dtype(device)
    shapes = [(16, 1024), (4, 4096)] if cuda else [(2, 64)]
    small_rows, small_length = (2, 512) if cuda else (2, 64)
    for name, make in kernels(small_rows, small_length, device, dtype).items():
        attempt(
            record,
            f"{name}: error",
            lambda name=name, make=make: worst_error(name, make(), small_rows, small_length, device, dtype),
        )
    for rows, length in shapes:
        qkv = inputs(rows, length, device, dtype)
        for name, make in kernels(rows, length, device, dtype).items():

            def measure(
                make: Callable[[], Kernel] = make, qkv: list[torch.Tensor] = qkv
            ) -> dict[str, float | list[str]]:
                kernel = make()
                found: dict[str, float | list[str]] = {
                    "ms": milliseconds(lambda: both_passes(kernel, qkv)),
                    "GiB": peak_gib(),
                }
                return found | ({"kernels": kernel_names(lambda: both_passes(kernel, qkv))} if cuda else {})

            attempt(record, f"{name}, {rows} x {length}", measure)
    record.print()


if __name__ == "__main__":
    main()
