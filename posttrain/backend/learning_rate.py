"""Learning-rate schedules: linear warm-up, then constant, linear or cosine decay to a floor."""

import math
from typing import Literal

LRSchedule = Literal["linear", "cosine", "constant"]


def learning_rate_at(
    step: int, peak: float, schedule: LRSchedule, num_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> float:
    """The rate of `step`, from 0; the first warm-up step has 1 / warmup_steps of the peak.

    With t = (step - warmup_steps) / (num_steps - warmup_steps), at most 1, the rate above the floor
    is its peak times 1 - t (linear) or (1 + cos(pi t)) / 2 (cosine).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    t = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    share = 1 - t if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * t))
    return floor + (peak - floor) * share
