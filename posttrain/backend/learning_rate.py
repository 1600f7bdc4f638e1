"""Learning-rate schedules: a multiplier at step t of N (specs: tinker_semantics 2.5). No warm-up."""

import math
from typing import Literal

LRSchedule = Literal["linear", "cosine", "constant"]


def lr_multiplier(schedule: LRSchedule, step: int, num_steps: int) -> float:
    """1 at step 0; linear 1 - t / N, cosine (1 + cos(pi t / N)) / 2."""
    if schedule == "linear":
        return 1 - step / num_steps
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return 1.0
