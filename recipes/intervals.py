"""The mean over a few seeds, and half the width of its 95% interval by Student's t."""

import math
import statistics
from collections.abc import Sequence

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom; the last serves for more
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_and_margin(values_S: Sequence[float]) -> tuple[float, float]:
    """The 95% interval is mean - margin to mean + margin. The margin is NaN for one value."""
    mean = statistics.mean(values_S)
    if len(values_S) < 2:
        return mean, math.nan
    quantile = T_975[min(len(values_S) - 1, len(T_975)) - 1]
    return mean, quantile * statistics.stdev(values_S) / math.sqrt(len(values_S))
