"""The mean over a few seeds, and half the width of its 95% interval by Student's t."""

import math
import statistics
from collections.abc import Sequence

from rl.sample_metrics import T_975


def mean_and_margin(values_S: Sequence[float]) -> tuple[float, float]:
    """The 95% interval is mean - margin to mean + margin. The margin is NaN for one value."""
    mean = statistics.mean(values_S)
    if len(values_S) < 2:
        return mean, math.nan
    quantile = T_975[min(len(values_S) - 1, len(T_975)) - 1]
    return mean, quantile * statistics.stdev(values_S) / math.sqrt(len(values_S))
