"""The mean over a few seeds, and half the width of its 95% interval by Student's t."""

import math
import statistics
from collections.abc import Sequence

from rl.sample_metrics import t_975


def mean_and_margin(values_S: Sequence[float]) -> tuple[float, float]:
    """The 95% interval is mean - margin to mean + margin. The margin is NaN for one value."""
    mean = statistics.mean(values_S)
    if len(values_S) < 2:
        return mean, math.nan
    return mean, t_975(len(values_S)) * statistics.stdev(values_S) / math.sqrt(len(values_S))
