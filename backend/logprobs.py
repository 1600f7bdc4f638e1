"""Logprobs of target tokens without ever holding the logits: lm_head and logsumexp a chunk of rows at a time, in fp32.

The backward pass recomputes each chunk. For N rows and a vocabulary V the peak is CHUNK_ELEMENTS floats instead of N * V.
"""

from typing import Any

import torch

CHUNK_ELEMENTS = 2**26  # rows times vocabulary held at once: 256 MiB of fp32


def target_logprobs(
    hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_NK: torch.Tensor, temperature_N: torch.Tensor | None = None
) -> torch.Tensor:
    """log softmax(hidden @ head.T / temperature) at `targets`, shape (N, K), fp32, differentiable in `hidden` and `head`."""
    return _TargetLogprobs.apply(hidden_NH, head_VH, targets_NK, temperature_N)  # type: ignore[no-any-return]


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _logits(hidden: torch.Tensor, head: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    logits = (hidden @ head.T).float()
    return logits if temperature is None else logits / temperature[:, None]


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | None
    ) -> torch.Tensor:
        head_used = head.to(hidden.dtype)
        out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for rows in _chunks(hidden.shape[0], head.shape[0]):
            logits = _logits(hidden[rows], head_used, None if temperature is None else temperature[rows])
            normaliser[rows] = logits.logsumexp(-1)
            out[rows] = logits.gather(-1, targets[rows]) - normaliser[rows, None]
        ctx.save_for_backward(hidden, head, targets, temperature, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_NK,) = grad_outputs
        hidden, head, targets, temperature, normaliser = ctx.saved_tensors
        head_used = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for rows in _chunks(hidden.shape[0], head.shape[0]):
            chunk_temperature = None if temperature is None else temperature[rows]
            logits = _logits(hidden[rows], head_used, chunk_temperature)
            # d logp_k / d logits = onehot(target_k) - softmax
            grad_logits = (logits - normaliser[rows, None]).exp_().mul_(-grad_NK[rows].sum(-1, keepdim=True))
            grad_logits.scatter_add_(-1, targets[rows], grad_NK[rows].float())
            if chunk_temperature is not None:
                grad_logits /= chunk_temperature[:, None]
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ head_used
            if grad_head is not None:
                grad_head += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_head, None, None
