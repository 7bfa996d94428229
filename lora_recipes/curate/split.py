"""A data set in parts (train and eval) that share no group: no row of a group is on both sides."""

import json
from argparse import ArgumentParser, Namespace
from hashlib import blake2b
from typing import Any

import numpy as np

from lora_recipes.core.errors import Problem, raise_if
from lora_recipes.curate import inputs, shares, sketch, work
from lora_recipes.curate.inputs import Inputs, Item
from lora_recipes.curate.work import Outcome
from lora_recipes.data.mix import apportion
from lora_recipes.data.read import raise_first

TOLD = """Split rows into parts so that no group of rows stands on both sides.

OUT x.jsonl gives x.train.jsonl and x.eval.jsonl. A group is what has the same value in --group (a file, an
author, a question); without it, rows that say the same. Shares are exact to the row where the groups allow
it; the report has what was asked for and what came of it."""
PARTS = ["train=0.9", "eval=0.1"]


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    work.options(parser)
    parser.add_argument(
        "--part",
        action="append",
        metavar="SOURCE=SHARE",
        help=f"may be given more than once (default: {' '.join(PARTS)})",
    )
    parser.add_argument(
        "--group", metavar="FIELD", help="rows with the same value stay together; meta.file: within an object"
    )
    parser.add_argument("--seed", type=int, default=0, help="which groups go where (default: 0)")


def run(given: Namespace) -> str:
    """Count the groups, deal them out, write."""
    wanted = shares.read(given.part or PARTS, "--part")
    bad = [name for name in wanted if not name.replace("_", "").replace("-", "").isalnum()]
    raise_if([Problem(f"--part {name}", "is no name of a file", "letters and digits") for name in bad])
    read = inputs.of(given, texts=not given.group)
    which, sizes, names = _groups(read, given.group, given.seed)
    dealt = deal(sizes, apportion(sum(sizes), list(wanted.values())), names)
    parts = list(wanted)
    figures = {
        part: {
            "share": round(float(share), 6),
            "got": round(sum(s for s, d in zip(sizes, dealt, strict=True) if d == i) / sum(sizes), 6),
            "groups": dealt.count(i),
        }
        for i, (part, share) in enumerate(wanted.items())
    }
    empty = [part for part, f in figures.items() if not f["groups"]]
    do = f"there are {len(sizes):,} groups: fewer parts, or a finer --group"
    raise_if([Problem(f"--part {part}", "gets no group", do) for part in empty])
    with work.begun(given, read, parts=parts, packages=["numpy"]) as job:

        def act(item: Item) -> Outcome:
            return Outcome([item.raw], to=parts[dealt[which[job.state.read]]])

        job.run(read, act)
        told = [
            f"part        {f['got']:.2%} of the rows, {f['groups']:,} groups  {p}" for p, f in figures.items()
        ]
        return "\n".join([*told, job.finish(split=figures)])


def _groups(read: Inputs, field: str | None, seed: int) -> tuple[np.ndarray, list[int], list[bytes]]:
    """The group of each row (by number), and of each group its size and a name to draw by. Memory: 4 bytes a
    row, about 100 a group.
    """
    found: dict[bytes, int] = {}
    which, sizes, problems = np.full(sum(read.rows), -1, np.int32), list[int](), list[Problem]()
    for row, item in enumerate(read):
        if item.fault:
            continue
        value = _value(item.raw, field) if field else None
        if field and value is None:
            do = f"there are {', '.join(item.raw)}"
            problems.append(Problem(item.where, f"no {field}, by which rows are grouped", do))
            continue
        key = _key(value) if field else sketch.digest(item.said)
        group = found.setdefault(key, len(found))
        sizes += [0] * (group == len(sizes))
        sizes[group] += 1
        which[row] = group
    raise_first(problems, "--group")
    return which, sizes, [blake2b(key, digest_size=8, salt=str(seed).encode()[:16]).digest() for key in found]


def _value(raw: dict[str, Any], field: str) -> Any:
    """A field by its name, or by the names that lead to it."""
    if field in raw:
        return raw[field]
    head, _, rest = field.partition(".")
    inner = raw.get(head)
    return _value(inner, rest) if rest and isinstance(inner, dict) else None


def _key(value: Any) -> bytes:
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()


def deal(sizes: list[int], quotas: list[int], names: list[bytes]) -> list[int]:
    """The part of each group: in the order of their names, each to the part that lacks most rows. Where no
    group is larger than a part the last ones fill what is left.
    """
    left, dealt = list(quotas), [0] * len(sizes)
    for group in sorted(range(len(sizes)), key=names.__getitem__):
        part = left.index(max(left))
        left[part] -= sizes[group]
        dealt[group] = part
    return dealt
