"""AdamW with less memory: moments in 8 bits, and weights without an fp32 copy. Rounding is
stochastic, so small changes count on average; its random numbers depend on (seed, step, parameter)
only, so a resumed run draws the same.
"""

from functools import cache
from typing import Any

import torch

from posttrain.backend.random_state import seed_of

MOMENTS = ("exp_avg", "exp_avg_sq")
Slots = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor of a state
STEP_BYTES = 24  # of each value of the weight that is stepped, beside its state
BLOCK = 256  # values with a common scale, their largest magnitude
PIECE, PIECE_BYTES = 2**24, 64  # values that are rounded at once, a multiple of BLOCK, and what each takes
# Levels of |value| / scale, evenly spaced in the logarithm: 5 decades for means, 7 for squares.
MEAN_LEVELS = torch.logspace(-5, 0, 127, dtype=torch.float64).float()
SQUARE_LEVELS = torch.logspace(-7, 0, 255, dtype=torch.float64).float()


class LeanAdamW(torch.optim.Optimizer):
    """torch's AdamW, a parameter at a time in fp32. bf16 parameters are rounded stochastically.
    `eight_bits`: `exp_avg` and `exp_avg_sq` are uint8 codes, and `..._scale` their blocks' scales."""

    def __init__(self, parameters: Any, seed: int, eight_bits: bool):
        super().__init__(parameters, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self.seed, self.eight_bits = seed, eight_bits

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    self._step(p, index, group)

    def _step(self, p: torch.nn.Parameter, index: int, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            for name, (shape, dtype) in self.slots(p).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        state["step"] += 1
        count = int(state["step"])
        generator = torch.Generator(p.device).manual_seed(seed_of(self.seed, index, count))
        gradient, weight = p.grad.float(), p.float()  # type: ignore[union-attr]
        mean, square = self._read(state, "exp_avg", p), self._read(state, "exp_avg_sq", p)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**count))
        del gradient, denominator
        if self.eight_bits:
            for slot, values in zip(MOMENTS, (mean, square), strict=True):
                state[slot], state[f"{slot}_scale"] = quantized(values, _levels(p.device)[slot], generator)
        p.copy_(to_bf16(weight, generator) if p.dtype == torch.bfloat16 else weight)

    def slots(self, p: torch.Tensor) -> Slots:
        """Of a parameter's moments."""
        if not self.eight_bits:
            return dict.fromkeys(MOMENTS, (tuple(p.shape), torch.float32))
        codes, scales = (tuple(p.shape), torch.uint8), ((-(-p.numel() // BLOCK),), torch.float32)
        return {name: of for slot in MOMENTS for name, of in ((slot, codes), (f"{slot}_scale", scales))}

    def _read(self, state: dict[str, Any], slot: str, p: torch.Tensor) -> torch.Tensor:
        if not self.eight_bits:
            return state[slot]
        return dequantized(state[slot], state[f"{slot}_scale"], _levels(p.device)[slot])


@cache
def _levels(device: torch.device) -> dict[str, torch.Tensor]:
    """Of each moment. Once: to copy them to a GPU is to wait for all it computes."""
    return dict(zip(MOMENTS, (MEAN_LEVELS.to(device), SQUARE_LEVELS.to(device)), strict=True))


def quantized(
    values: torch.Tensor, levels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes like `values`, scale of each block). A code is 0, or the number of a level, from 1;
    with 127 levels those of negative values are from 128. The expected level is the value; only
    squares below the lowest level are raised to it, as a square of 0 would divide by 0."""
    flat = values.flatten()
    code_N = torch.empty(len(flat), dtype=torch.uint8, device=flat.device)
    scale_B = torch.empty(-(-len(flat) // BLOCK), device=flat.device)
    for piece in _pieces(len(flat)):
        blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        code_N[piece], scale_B[blocks] = _quantized(flat[piece], levels.to(flat.device), generator)
    return code_N.view(values.shape), scale_B


def _quantized(
    flat: torch.Tensor, levels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    signed = len(levels) < 128
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(-1)
    share = (blocks.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).clamp_(max=1)
    ladder = torch.cat([levels.new_zeros(1), levels])
    above = torch.bucketize(share, ladder).clamp_(min=1)  # ladder[above - 1] < share <= ladder[above]
    low, high = ladder[above - 1], ladder[above]
    noise = torch.rand(share.shape, generator=generator, device=share.device)
    code = torch.where((share - low) > noise * (high - low), above, above - 1)
    negative = torch.where((blocks < 0) & (code > 0), code + 127, code)
    code = negative if signed else torch.where(blocks > 0, code.clamp(min=1), code)
    return code.to(torch.uint8).flatten()[: len(flat)], scale


def dequantized(code: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    levels = levels.to(code.device)
    zero, signs = levels.new_zeros(1), [levels, -levels] if len(levels) < 128 else [levels]
    ladder, flat = torch.cat([zero, *signs]), code.flatten()
    value_N = torch.empty(len(flat), device=flat.device)
    for piece in _pieces(len(flat)):
        value = ladder[flat[piece].long()]
        blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        padded = torch.nn.functional.pad(value, (0, -len(value) % BLOCK)).view(-1, BLOCK) * scale[blocks, None]
        value_N[piece] = padded.flatten()[: len(value)]
    return value_N.view(code.shape)


def to_bf16(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounded up with the probability of the 16 bits that bf16 drops, so exact on average."""
    flat = values.contiguous().flatten()
    rounded_N = torch.empty(len(flat), dtype=torch.bfloat16, device=flat.device)
    for piece in _pieces(len(flat)):
        part = flat[piece]
        noise = torch.randint(0, 2**16, part.shape, generator=generator, device=part.device, dtype=torch.int32)
        rounded_N[piece] = ((part.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return rounded_N.view(values.shape)


def _pieces(count: int) -> list[slice]:
    """Of a tensor's values: what rounding them takes is needed for a piece at a time."""
    return [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
