"""How much of each source one epoch takes: all of it, several times or a part (`weight`), or a `share` of the
whole. Always the same rows: `train.seed` changes the order of training, not the data.
"""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def taken(rows: int, weight: float) -> int:
    """How many of `rows` rows a `weight` takes."""
    return int(weight) * rows + round((weight - int(weight)) * rows)


def repeated(rows: int, weight: float) -> list[int]:
    """Which of `rows` rows a `weight` takes, in their order: each as often as the whole part says, and that
    share of them once more as the fraction says.
    """
    chosen = random.Random(0).sample(range(rows), round((weight - int(weight)) * rows))
    return list(range(rows)) * int(weight) + sorted(chosen)


def picks(entries: list[dict[str, Any]], rows: list[int]) -> list[list[int]]:
    """Which rows one epoch takes of each source, in their order, by the weights or the shares (of rows) of
    the `entries`. `rows`: how many each source has.
    """
    if any("share" in entry for entry in entries):
        return _by_rows(rows, [entry["share"] for entry in entries])
    return [repeated(n, entry.get("weight", 1)) for n, entry in zip(rows, entries, strict=True)]


def takes_all(entries: list[dict[str, Any]]) -> bool:
    """Is every row of all sources taken, whatever their number?"""
    return not any("share" in entry or entry.get("weight", 1) < 1 for entry in entries)


def order(
    entries: list[dict[str, Any]], rows: list[int], source: Array, row: Array, tokens: Array, by: str
) -> Array:
    """The examples of one epoch, as indices, source after source.

    `rows`: how many each source has. `source` and `row`: of each example, the number of its source and of the
    row there that it is made of (several where data.rows is assistant_turn); rows that are not taken may be
    left out. `tokens`: its length as trained. `by`: are the shares of the `entries` of `rows` or of `tokens`?
    Examples of one row stay together.
    """
    parts = [np.flatnonzero(source == number) for number in range(len(entries))]
    if by == "tokens" and any("share" in entry for entry in entries):
        sizes = [np.bincount(row[own], tokens[own], minlength=n) for own, n in zip(parts, rows, strict=True)]
        chosen = _by_tokens(sizes, [entry["share"] for entry in entries])
    elif all("share" not in entry and entry.get("weight", 1) == 1 for entry in entries):
        return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)
    else:
        chosen = picks(entries, rows)
    found = []
    for own, taken_rows in zip(parts, chosen, strict=True):
        begin = np.searchsorted(row[own], taken_rows, "left")
        counts = np.searchsorted(row[own], taken_rows, "right") - begin
        found.append(own[np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())])
    return np.concatenate([*found, np.empty(0, np.int64)]).astype(np.int64)


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers whose sum is `total`, each less than 1 from its share (largest remainders, the first of
    equal ones).
    """
    exact = [total * share for share in shares]
    whole = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: whole[i] - exact[i])
    for i in by_rest[: total - sum(whole)]:
        whole[i] += 1
    return whole


def _by_rows(rows: list[int], given: list[float]) -> list[list[int]]:
    """As many rows as there can be without taking one twice."""
    typed = [Fraction(repr(share)) for share in given]
    shares = [share / sum(typed) for share in typed]
    total = min(math.floor(n / share) for n, share in zip(rows, shares, strict=True))
    counts = apportion(total, shares)
    return [sorted(random.Random(0).sample(range(n), k)) for n, k in zip(rows, counts, strict=True)]


def _by_tokens(sizes: list[Array], shares: list[float]) -> list[list[int]]:
    """As many tokens as there can be without taking a row twice; each source to the row nearest its share."""
    whole = min(float(size.sum()) / share for size, share in zip(sizes, shares, strict=True))
    found = []
    for size, share in zip(sizes, shares, strict=True):
        shuffled = random.Random(0).sample(range(len(size)), len(size))
        reached = np.concatenate([[0.0], np.cumsum(size[shuffled])])
        found.append(sorted(shuffled[: int(np.abs(reached - whole * share).argmin())]))
    return found
