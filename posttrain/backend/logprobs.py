"""Logprobs of target tokens without all logits: lm_head and logsumexp in chunks of rows, in fp32. The
backward pass recomputes a chunk's logits, unless there is only one or a GPU has room to keep them.
Peak memory is a few chunks of floats, not N * V.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Rows times vocabulary held at once: 256 MiB of fp32; on a GPU 2 GiB, as smaller chunks leave it
# idle.
CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**29, "mps": 2**26}
SPARE_BYTES = 4 * 2**30  # of a GPU, that kept logits leave free


@dataclass(frozen=True)
class LogitTransform:
    """A model's last operation on its logits: z becomes c tanh(s z / c), with `scale` s and
    `softcap` c (None = no cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.scale != 1:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad: torch.Tensor, transformed: torch.Tensor) -> torch.Tensor:
        """Gradient at the input, from the transformed logits; overwrites both arguments."""
        if self.softcap is not None:
            grad *= transformed.div_(self.softcap).square_().neg_().add_(1)
        return grad if self.scale == 1 else grad.mul_(self.scale)


PLAIN = LogitTransform()


def target_logprobs(
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    targets_NK: torch.Tensor,
    temperature_N: torch.Tensor | None = None,
    transform: LogitTransform = PLAIN,
    compiled: bool = False,
) -> torch.Tensor:
    """(N, K) log softmax(transform(hidden @ head.T) / temperature) at `targets`, fp32,
    differentiable in `hidden` and `head`. `compiled`: the element-wise work of a chunk is one
    kernel each way, the same up to rounding."""
    return _TargetLogprobs.apply(hidden_NH, head_VH, targets_NK, temperature_N, transform, compiled)  # type: ignore[no-any-return]


def fp32_logits(hidden_NH: torch.Tensor, head_VH: torch.Tensor, transform: LogitTransform = PLAIN) -> torch.Tensor:
    """(N, V), not differentiable. bf16 factors give fp32 logits on CUDA: bf16 would be off by up to
    0.06 at 16."""
    if hidden_NH.is_cuda and hidden_NH.dtype == torch.bfloat16:
        return transform(torch.mm(hidden_NH, head_VH.T, out_dtype=torch.float32))
    return transform((hidden_NH @ head_VH.T).float())


def _chunks(num_rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS[device.type] // vocabulary)
    if device.type == "cuda" and num_rows > rows:
        # as many chunks, of one size: less memory, and fewer shapes to compile
        rows = -(-num_rows // -(-num_rows // rows))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _kept(chunks: int, chunk_bytes: int, device: torch.device) -> int:
    """The last chunks whose logits stay for the backward pass: an only one, which the pass would hold
    anyway, and as many as a GPU has room for."""
    if chunks < 2 or device.type != "cuda":
        return int(chunks == 1)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = torch.cuda.mem_get_info(device)[0] + cached - SPARE_BYTES - 3 * chunk_bytes
    return min(chunks, max(room // chunk_bytes, 0))


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor | None,
        transform: LogitTransform,
        compiled: bool,
    ) -> torch.Tensor:
        head_used = head.to(hidden.dtype)
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        chunks = _chunks(hidden.shape[0], head.shape[0], hidden.device)
        chunk_bytes = 4 * chunks[0].stop * head.shape[0] if chunks else 0
        keep = _kept(len(chunks), chunk_bytes, hidden.device) if any(ctx.needs_input_grad) else 0
        kept = {}
        for number, rows in enumerate(chunks):
            temperature_N1 = None if temperature is None else temperature[rows, None]
            run = _compiled(_normalised) if compiled else _normalised
            logits = fp32_logits(hidden[rows], head_used, transform)
            normaliser[rows], out[rows] = run(logits, targets[rows], temperature_N1)
            if number >= len(chunks) - keep:
                kept[number] = logits
            del logits  # before the next chunk's
        ctx.save_for_backward(hidden, head, targets, temperature, normaliser)
        ctx.transform, ctx.compiled, ctx.kept = transform, compiled, kept
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_NK,) = grad_outputs
        if not grad_NK.any():  # positions without loss
            return None, None, None, None, None, None
        hidden, head, targets, temperature, normaliser = ctx.saved_tensors
        head_used = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for number, rows in enumerate(_chunks(hidden.shape[0], head.shape[0], hidden.device)):
            transformed = ctx.kept.pop(number, None)
            if transformed is None:
                transformed = fp32_logits(hidden[rows], head_used, ctx.transform)
            temperature_N1 = None if temperature is None else temperature[rows, None]
            run = _compiled(_gradient) if ctx.compiled and ctx.transform == PLAIN else _gradient
            grad_logits = run(
                transformed,
                normaliser[rows, None],
                targets[rows],
                grad_NK[rows].float(),
                temperature_N1,
                ctx.transform,
                hidden.dtype,
            )
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head_used
            if grad_head is not None:
                grad_head += grad_logits.T @ hidden[rows]
            del transformed, grad_logits  # before the next chunk's
        return grad_hidden, grad_head, None, None, None, None


def _normalised(
    logits: torch.Tensor, targets_NK: torch.Tensor, temperature_N1: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) logsumexp and (N, K) logprobs of a chunk."""
    if temperature_N1 is not None:
        logits = logits / temperature_N1
    normaliser = logits.logsumexp(-1)
    return normaliser, logits.gather(-1, targets_NK) - normaliser[:, None]


def _gradient(
    transformed: torch.Tensor,
    normaliser_N1: torch.Tensor,
    targets_NK: torch.Tensor,
    grad_NK: torch.Tensor,
    temperature_N1: torch.Tensor | None,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(N, V) at a chunk's logits: d logp_k / d logits = onehot(target_k) - softmax. Overwrites `transformed`,
    unless compiled: a kernel would write it beside its result."""
    logits = transformed if temperature_N1 is None else transformed / temperature_N1
    needed_again = logits is transformed and transform.softcap is not None
    logits = logits - normaliser_N1 if needed_again or torch.compiler.is_compiling() else logits.sub_(normaliser_N1)
    grad_logits = logits.exp_().mul_(-grad_NK.sum(-1, keepdim=True))
    if torch.compiler.is_compiling() and targets_NK.shape[-1] == 1:
        # to scatter would be a kernel of its own, between one that writes these numbers and one that reads them
        column_V = torch.arange(logits.shape[-1], device=logits.device)
        grad_logits = torch.where(column_V == targets_NK, grad_logits + grad_NK, grad_logits)
    else:
        grad_logits.scatter_add_(-1, targets_NK, grad_NK)
    if temperature_N1 is not None:
        grad_logits /= temperature_N1
    return transform.backward(grad_logits, transformed).to(dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rows vary with the last chunk of a pass, so their number is dynamic."""
    return torch.compile(function, dynamic=None)
