"""Several sources as one data set, each with its share of the rows, exact to the row."""

import itertools
import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence

import numpy as np

from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.curate import inputs, shares, work
from lora_recipes.curate.inputs import Inputs, Item
from lora_recipes.curate.work import kept
from lora_recipes.data.mix import apportion

TOLD = """Mix sources by shares of the rows: general.jsonl=0.3 own.jsonl=0.7.

The result has as many rows as can be had without taking one twice, or --rows. Which rows of a source are
taken is drawn by --seed, always the same; each begins in its own order, and the sources alternate so that
every stretch of the result has the shares, too."""


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser, shares=True)
    work.options(parser)
    parser.add_argument(
        "--rows", type=int, metavar="N", help="how many rows (default: the most there can be)"
    )
    parser.add_argument("--repeat", action="store_true", help="take rows of a small source more than once")
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn (default: 0)")


def run(given: Namespace) -> str:
    """Count, draw, write."""
    wanted = shares.read(given.inputs, "IN")
    read = inputs.of(given, paths=list(wanted))
    most = min(int(n / share) for n, share in zip(read.rows, wanted.values(), strict=True))
    total = most if given.rows is None else given.rows
    counts = apportion(total, list(wanted.values()))
    _enough(given, read, counts)
    drawn = [
        _times(n, count, f"{given.seed} {i}")
        for i, (n, count) in enumerate(zip(read.rows, counts, strict=True))
    ]
    rows = (_taken(read, i, times) for i, times in enumerate(drawn))
    figures = {
        path: {"share": round(float(share), 6), "rows": n, "taken": count, "got": round(count / total, 6)}
        for (path, share), n, count in zip(wanted.items(), read.rows, counts, strict=True)
    }
    with work.begun(given, read, packages=["numpy"]) as job:
        job.run(alternating(list(rows), counts), lambda item: kept(item.raw), total)
        told = [
            f"mixed       {f['taken']:,} of {f['rows']:,}  {f['got']:.2%}  {path}"
            for path, f in figures.items()
        ]
        return "\n".join([*told, job.finish(mix=figures)])


def _enough(given: Namespace, read: Inputs, counts: Sequence[int]) -> None:
    """RecipeError where a source has too few rows, or gives none."""
    if sum(counts) < 1:
        raise RecipeError(Problem("--rows", f"{sum(counts)} rows are none", "at least 1"))
    problems = []
    for path, n, count in zip(read.paths, read.rows, counts, strict=True):
        if count > n and not given.repeat:
            do = "fewer --rows, a smaller share, or --repeat takes rows more than once"
            problems.append(Problem(path, f"has {n:,} rows, but {count:,} are its share", do))
        if not count:
            problems.append(Problem(path, "has a share of less than one row", "more rows, or leave it out"))
    raise_if(problems)


def _times(rows: int, count: int, seed: str) -> np.ndarray:
    """How often each row of a source is taken: all as often as the others, but for those that are drawn."""
    times = np.full(rows, count // rows)
    times[random.Random(seed).sample(range(rows), count % rows)] += 1
    return times


def _taken(read: Inputs, source: int, times: np.ndarray) -> Iterator[Item]:
    """The rows of one source, as often as each is taken: once through all, then again."""
    for turn in range(int(times.max(initial=0))):
        for item, count in zip(read.of(source), times, strict=False):
            if count > turn:
                yield item


def alternating(sources: Sequence[Iterator[Item]], counts: Sequence[int]) -> Iterator[Item]:
    """One of the source that is furthest behind its share, again and again."""
    total, done = sum(counts), [0] * len(counts)
    for number in itertools.count(1):
        if number > total:
            return
        behind = [count * number - total * d for count, d in zip(counts, done, strict=True)]
        source = behind.index(max(behind))
        done[source] += 1
        if (item := next(sources[source], None)) is None:
            return  # the source has changed since it was counted, and the run says so
        yield item
