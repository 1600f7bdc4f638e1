"""Block `head`: ways to get the logprobs of targets and their gradients: 16,384 tokens, hidden 896,
vocabulary 151,936.

"ours" is posttrain/backend/logprobs.py; "mock" are Functions of this file. The bound of all is the
time of their matrix products.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import attempt, milliseconds, peak_gib, relative
from posttrain.backend import logprobs
from posttrain.backend.config import compute_dtype, training_device
from posttrain.backend.logprobs import fp32_logits, target_logprobs

CHECKED_ROWS = 256
LOGIT_DEVIATION = 5.0  # as trained models have
Logprobs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def normaliser_and_logprob(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    normaliser = logits.logsumexp(-1)
    return normaliser, logits.gather(-1, targets[:, None])[:, 0] - normaliser


def grad_logits(
    logits: torch.Tensor, normaliser: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    onehot = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    return (grad[:, None] * (onehot.float() - (logits.float() - normaliser[:, None]).exp())).to(dtype)


class Chunked(torch.autograd.Function):
    """Logprobs in chunks of `rows`. `compiled`: element-wise work in one kernel each way; `keep`:
    bf16 logits instead of recomputation.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, rows: int, compiled: bool, keep: bool
    ) -> torch.Tensor:
        used, kept, out = head.to(hidden.dtype), [], []
        both = torch.compile(normaliser_and_logprob, dynamic=False) if compiled else normaliser_and_logprob
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = h @ used.T if keep else fp32_logits(h, used)
            kept += [logits] if keep else []
            out.append(both(logits, t))
        normaliser, logprob = (torch.cat(parts) for parts in zip(*out, strict=True))
        ctx.save_for_backward(hidden, head, targets, normaliser, *kept)
        ctx.options = rows, compiled, keep
        return logprob

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden, head, targets, normaliser, *kept), (rows, compiled, keep) = ctx.saved_tensors, ctx.options
        used, grad_head, grad_hidden = head.to(hidden.dtype), torch.zeros_like(head), []
        of_logits = torch.compile(grad_logits, dynamic=False) if compiled else grad_logits
        split = (x.split(rows) for x in (hidden, targets, normaliser, gradients[0]))
        for index, (h, t, n, g) in enumerate(zip(*split, strict=True)):
            logits = kept[index] if keep else fp32_logits(h, used)
            d = of_logits(logits, n, t, g, hidden.dtype)
            grad_hidden.append(d @ used)
            grad_head += d.T @ h
        return torch.cat(grad_hidden), grad_head, None, None, None, None


def ours(elements: int) -> Logprobs:
    """The size of the chunks is read in both passes."""

    def run(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs.CHUNK_ELEMENTS = dict.fromkeys(("cpu", "cuda"), elements)
        return target_logprobs(hidden, head, targets[:, None])[:, 0]

    return run


def mock(elements: int, compiled: bool, keep: bool) -> Logprobs:
    def run(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return Chunked.apply(hidden, head, targets, max(1, elements // len(head)), compiled, keep)  # type: ignore[no-any-return]

    return run


def inputs(rows: int, hidden: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = training_device()
    generator = torch.Generator(device).manual_seed(0)
    hidden_NH = torch.randn(rows, hidden, generator=generator, device=device).to(compute_dtype(device))
    head_VH = torch.randn(vocabulary, hidden, generator=generator, device=device) * LOGIT_DEVIATION * hidden**-0.5
    targets_N = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    return hidden_NH.requires_grad_(), head_VH.requires_grad_(), targets_N


def both_passes(run: Logprobs, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    logprob_N = run(hidden, head, targets)
    return [logprob_N, *torch.autograd.grad(logprob_N.sum() / 100, [hidden, head])]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    return {
        "mean |dlogp|": float((found[0].detach() - exact[0]).abs().mean()),
        "gradient of hidden": relative(found[1], exact[1]),
        "gradient of head": relative(found[2], exact[2]),
    }


def products(hidden: torch.Tensor, head: torch.Tensor, rows: int) -> Callable[[], None]:
    """Logits, and both gradients from as many numbers: nothing recomputed."""
    used = head.detach().to(hidden.dtype)

    def run() -> None:
        for h in hidden.detach().split(rows):
            logits = h @ used.T
            logits @ used
            logits.T @ h

    return run


def main() -> None:
    record = Record()
    # a compiled graph for each size of chunk; beyond the limit all would be eager
    torch._dynamo.config.recompile_limit = 64
    sizes = (16384, 896, 151936) if training_device().type == "cuda" else (512, 64, 1000)
    present = logprobs.CHUNK_ELEMENTS["cpu"] if training_device().type == "cuda" else 2**16
    hidden, head, targets = inputs(*sizes)
    few = (hidden[:CHECKED_ROWS].detach().requires_grad_(), head, targets[:CHECKED_ROWS])
    rounded = [few[0].detach().double().requires_grad_(), head.detach().to(hidden.dtype).double().requires_grad_()]
    logprob_N = (rounded[0] @ rounded[1].T).log_softmax(-1).gather(-1, few[2][:, None])[:, 0]
    exact = [x.detach().float() for x in (logprob_N, *torch.autograd.grad(logprob_N.sum() / 100, rounded))]
    del logprob_N, rounded
    ways = {f"ours, {n} elements": ours(n) for n in (present, 4 * present, 8 * present)}
    if training_device().type == "cuda":  # on a CPU to compile takes minutes
        ways |= {f"mock: compiled, {n} elements": mock(n, True, False) for n in (present, 4 * present, 8 * present)}
        ways |= {"mock: compiled, bf16 logits kept": mock(8 * present, True, True)}
    ways |= {"mock: eager, bf16 logits kept": mock(4 * present, False, True)}
    attempt(
        record,
        "matrix products alone, ms",
        lambda: milliseconds(products(hidden, head, max(1, 8 * present // sizes[2])), 3),
    )
    for name, run in ways.items():

        def measure(run: Logprobs = run) -> dict[str, float]:
            before = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
            found = {
                "ms": milliseconds(lambda: both_passes(run, hidden, head, targets), 3),
                "GiB above inputs": peak_gib() - before,
            }
            return found | errors(both_passes(run, *few), exact)

        with patch.object(logprobs, "CHUNK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), present)):
            attempt(record, name, measure)
    record.print()


if __name__ == "__main__":
    main()
