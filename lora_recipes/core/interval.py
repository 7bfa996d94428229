"""Means, shares and differences, and how sure they are: Student's t, Clopper and Pearson, and the exact test
of McNemar. Imports no torch.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
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

    @property
    def shown(self) -> bool:
        """Of a difference: does its interval leave out 0? One value has no interval, and shows none."""
        return self.half is not None and not self.low <= 0 <= self.high

    def signed(self, unit: str = "seed") -> str:
        """A difference with its sign: `-0.0123 +- 0.0045`, or `-0.0123 (one seed)`."""
        sure = f"(one {unit})" if self.half is None else f"+- {self.half:.4f}"
        return f"{self.value:+.4f} {sure}"

    def __str__(self) -> str:
        """`1.2345 +- 0.0123`, or `1.2345 (one seed)`."""
        return self.signed().removeprefix("+")


def mean(values: Sequence[float]) -> Mean:
    """Mean and 95 % interval of `values` (at least one): +- t * s / sqrt(n). Above 31 values t is that of 31,
    which is a little wide.
    """
    count = len(values)
    if count == 1:
        return Mean(values[0], None, 1)
    t = T[min(count - 1, len(T)) - 1]
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(count), count)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Mean | None:
    """The mean of `values` - `reference` over the keys (seeds, rows) that both have; None where they share
    none.

    What a key does to both alike falls out, so the interval is that of the difference. Two intervals of
    their own may overlap and the difference be plain all the same, or the other way round.
    """
    both = [values[key] - reference[key] for key in values if key in reference]
    return mean(both) if both else None


def per_unit(amounts: Sequence[float], units: Sequence[int]) -> Mean:
    """The sum of `amounts` over the sum of `units` (nats a token, of rows that have several), with its 95 %
    interval over the rows: that of the residuals, as for a ratio (Cochran, Sampling Techniques, 1977,
    chapter 6).
    """
    ratio = math.fsum(amounts) / sum(units)
    spread = mean([amount - ratio * unit for amount, unit in zip(amounts, units, strict=True)])
    half = None if spread.half is None else spread.half * len(units) / sum(units)
    return Mean(ratio, half, len(units))


def between(one: Mean, other: Mean) -> Mean:
    """`one` - `other` where both are of units of their own: the halves add up as the sides of a right angle
    do. Where one has no interval, the difference has none.
    """
    known = one.half is not None and other.half is not None
    half = math.hypot(one.half or 0, other.half or 0) if known else None
    return Mean(one.value - other.value, half, min(one.count, other.count))


def share(total: float, count: int) -> tuple[float, float]:
    """The 95 % interval of `total` / `count`, where each of the `count` values is 0 or 1: exact (Clopper and
    Pearson, Biometrika 26 (1934), 404-413), so never without width. Values between the two spread less than
    a coin of the same mean: of those it is wide.
    """
    from scipy.special import betaincinv

    low = betaincinv(total, count - total + 1, 0.025) if total > 0 else 0.0
    high = betaincinv(total + 1, count - total, 0.975) if total < count else 1.0
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p of the exact test of McNemar: of the pairs that came out differently, `better` one way and
    `worse` the other, as a fair coin would give or further from the middle. 1 where none did.

    McNemar, Psychometrika 12 (1947), 153-157, with the binomial distribution in place of chi squared.
    """
    differing = better + worse
    tail = sum(math.comb(differing, k) for k in range(min(better, worse) + 1))
    return min(1.0, tail / (1 << (differing - 1))) if differing else 1.0
