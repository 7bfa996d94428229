"""Credentials and personal data of the usual shapes (curate/shapes.py), out of every text of every row."""

from argparse import ArgumentParser, Namespace
from typing import Any

from lora_recipes.curate import inputs, work
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.shapes import KINDS, SHAPES, Shape, find
from lora_recipes.curate.work import Outcome

TOLD = f"""Replace credentials and personal data in every text of a row, or drop the row.

Each is replaced by its kind: [EMAIL]. What was found is never printed, nor is it in the report or the side
file. Kinds: {", ".join(KINDS[:8])},
{", ".join(KINDS[8:])}."""


def options(parser: ArgumentParser) -> None:
    """Its options."""
    inputs.options(parser)
    work.options(parser)
    parser.add_argument("--drop", action="store_true", help="drop rows with any (default: replace it)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--only", action="append", choices=KINDS, metavar="KIND", help="look for this kind")
    either.add_argument(
        "--allow", action="append", default=[], choices=KINDS, metavar="KIND", help="leave this kind"
    )


def run(given: Namespace) -> str:
    """Clean each row."""
    read = inputs.of(given)
    shapes = [s for s in SHAPES if s.kind in (given.only or KINDS) and s.kind not in given.allow]

    def clean(item: Item) -> Outcome:
        found: list[str] = []
        row = cleaned(item.raw, shapes, found)
        if found and given.drop:
            return Outcome(reason=f"holds: {found[0]}", example="", raw=row)
        return Outcome([row], notes=[f"replaced: {kind}" for kind in found], example="")

    with work.begun(given, read) as job:
        job.run(read, clean)
        return job.finish()


def cleaned(value: Any, shapes: list[Shape], found: list[str]) -> Any:
    """`value` with every text in it cleaned, names of fields too; the kinds are added to `found`."""
    if isinstance(value, str):
        return clean(value, shapes, found)
    if isinstance(value, dict):
        return {clean(k, shapes, found): cleaned(v, shapes, found) for k, v in value.items()}
    return [cleaned(v, shapes, found) for v in value] if isinstance(value, list) else value


def clean(text: str, shapes: list[Shape], found: list[str]) -> str:
    """`text` with [KIND] in place of each thing that was found; the kinds are added to `found`."""
    spans = sorted(find(text, shapes))
    for start, end, kind in reversed(spans):
        text = f"{text[:start]}[{kind.upper()}]{text[end:]}"
    found += [kind for *_, kind in spans]
    return text
