"""Means over seeds and how sure they are: Student's t. Imports no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % points of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook of Statistical
# Methods, 1.3.6.7.2).
T: tuple[float, ...] = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Mean:
    """The mean of `count` values, and half the width of its 95 % interval; None where one value leaves it
    unknown.
    """

    value: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.value - (self.half or 0)

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.value + (self.half or 0)

    def overlaps(self, other: "Mean") -> bool:
        """Have the two intervals a point in common? One value has no interval: it can always lie where the
        other does.
        """
        return self.half is None or other.half is None or (self.low <= other.high and other.low <= self.high)

    def __str__(self) -> str:
        """`1.2345 +- 0.0123`, or `1.2345 (one seed)`."""
        return f"{self.value:.4f} " + ("(one seed)" if self.half is None else f"+- {self.half:.4f}")


def mean(values: Sequence[float]) -> Mean:
    """Mean and 95 % interval of `values` (at least one): +- t * s / sqrt(n). Above 31 values t is that of 31,
    which is a little wide.
    """
    count = len(values)
    if count == 1:
        return Mean(values[0], None, 1)
    t = T[min(count - 1, len(T)) - 1]
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(count), count)
