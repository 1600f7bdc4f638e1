"""Block `attention`: forward and backward of the backend's attention kernels, and of torch's causal
ones beside them, at the 0.5B model's 14 heads of 64.

Tensors are (B, T, heads, 64), as a layer's projections leave them. "tree": 8 answers behind a
shared prompt of half the row, so a key at column k is seen by the queries k <= q < ends[k].
"packed": all rows in one, as on a GPU.
"""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import attempt, milliseconds, peak_gib, relative
from posttrain.backend.attention import TreeMask, attend, dense_mask, tree_mask
from posttrain.backend.config import compute_dtype, training_device
from posttrain.tracking.step_profile import is_kernel

HEADS, KV_HEADS, HEAD_DIM, ANSWERS = 14, 2, 64, 8
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def tree(rows: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ends: up to which query a key is seen, and positions."""
    half, own = length // 2, length // (2 * ANSWERS)
    ends = [length] * half + [half + own * (answer + 1) for answer in range(ANSWERS) for _ in range(own)]
    positions = [*range(half), *[half + i for _ in range(ANSWERS) for i in range(own)]]
    both_2BT = torch.tensor([[ends] * rows, [positions] * rows], device=device)
    return both_2BT[0], both_2BT[1]


def packed(rows_BT: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """(1, BT), each row's numbers `offset` larger than those of the one before."""
    return (rows_BT + offset * torch.arange(len(rows_BT), device=rows_BT.device)[:, None]).flatten()[None]


def causal(backend: SDPBackend | None = None) -> Kernel:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def masked(bias_B1TT: torch.Tensor) -> Kernel:
    """By SDPA, for which transformers repeats keys and values where there is a mask."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.transpose(1, 2).repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias_B1TT).transpose(1, 2)

    return run


def by_backend(mask: TreeMask) -> Kernel:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.flatten(0, 1)[None].transpose(1, 2) for x in (q, k, v))
        return attend("sdpa", torch.nn.Module(), query, key, value, mask)[0].view_as(q)

    return run


def tree_packed(rows: int, length: int, device: torch.device) -> Kernel:
    ends_BT, positions_BT = tree(rows, length, device)
    return by_backend(tree_mask(packed(ends_BT, length), packed(positions_BT), None))


def whole_packed(rows: int, length: int, device: torch.device) -> Kernel:
    ends_BT = torch.full((rows, length), length, device=device)
    positions_BT = torch.arange(length, device=device).expand(rows, length)
    mask = tree_mask(packed(ends_BT, length), packed(positions_BT), None)
    mask.starts_N = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    mask.longest = length
    return by_backend(mask)


def kernels(rows: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Kernel]]:
    """Each is made only when its turn comes: its mask takes memory."""
    made: dict[str, Callable[[], Kernel]] = {
        "causal sdpa": causal,
        "tree, dense": lambda: masked(dense_mask(*tree(rows, length, device), None, dtype)),
    }
    if device.type == "cuda":  # on a CPU these have no backward
        made |= {
            "tree, packed, flex": lambda: tree_packed(rows, length, device),
            "causal, packed, varlen": lambda: whole_packed(rows, length, device),
            "causal flash": lambda: causal(SDPBackend.FLASH_ATTENTION),
            "causal cudnn": lambda: causal(SDPBackend.CUDNN_ATTENTION),
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
    ends_BT, positions_BT = tree(rows, length, device)
    ends_BT = ends_BT if "tree" in name else torch.full_like(ends_BT, length)
    mask = dense_mask(ends_BT, positions_BT, None, torch.float64)
    exact = both_passes(masked(mask), [x.detach().double().requires_grad_() for x in qkv])
    return max(relative(found, true) for found, true in zip(both_passes(kernel, qkv), exact, strict=True))


def kernel_names(run: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = sorted(filter(is_kernel, profile.key_averages()), key=lambda event: -event.device_time_total)
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
