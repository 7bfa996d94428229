"""Read every row of the data before training, and name file:line for each fault. Imports no
torch.
"""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from lora_recipes.core.errors import Problem, raise_if
from lora_recipes.data import overlap, sources
from lora_recipes.data.forms import Form, with_system
from lora_recipes.data.row import FIELDS, Fault, Row, control, off, used
from lora_recipes.data.row import faults as row_faults
from lora_recipes.recipe.recipe import Recipe

SHOWN = 20  # faults listed one by one; the rest are counted


@dataclass
class Split:
    """The rows of data.train or data.eval, in the order they are trained, and what was noticed while reading
    them.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Hash of the content of all rows in order: two runs with one hash trained on the same data."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.key.encode())
        return digest.hexdigest()

    @property
    def duplicates(self) -> list[Row]:
        """Rows whose content (`overlap.plain`) already stood in an earlier row (a source's weight above 1
        does not count).
        """
        seen: dict[bytes, str] = {}
        return [row for row in self.rows if seen.setdefault(overlap.digest(row), row.where) != row.where]


def read(recipe: Recipe, which: str) -> Split:
    """The rows of `data.train` or `data.eval` (`which`), checked; RecipeError lists the first 20 faults and
    counts the rest.
    """
    given = getattr(recipe.data, which) or []
    split, first = Split(), None
    faults: list[Problem] = []
    for number, source in enumerate([given] if isinstance(given, str) else given):
        at = recipe.at("data", which, *([] if isinstance(given, str) else [number]))
        entry: dict[str, Any] = {"path": source} if isinstance(source, str) else source
        form = _form(entry, recipe)
        rows, notes, before = list[Row](), list[str](), len(faults)
        for where, raw in sources.rows(entry, at, faults, notes, recipe):
            row, found = _row(where, raw, form)
            found = found or _mixed(row, first or row) or _unwanted(row, recipe)
            faults += [Problem(where, *fault) for fault in found]
            if not found:
                rows.append(row)
                first = first or row
        if form.seen and (missing := form.missing(at)):
            faults[before:] = missing  # each row says it too
        split.notes += [f"{which}: {note}" for note in notes + form.notes()]
        if form.unused:
            split.notes.append(f"{which}: fields not used for training: {', '.join(sorted(form.unused))}")
        weighted = _weighted(rows, entry.get("weight", 1))
        if not weighted and len(faults) == before:
            none = (
                f"weight {entry['weight']:g} of {len(rows)} rows is no row"
                if rows
                else f"{entry['path']} has no rows"
            )
            faults.append(Problem(at, none, "take more of it, or remove it"))
        split.rows += weighted
    raise_first(faults, f"data.{which}")
    return split


def _form(entry: dict[str, Any], recipe: Recipe) -> Form:
    """How the rows of a source are read: by its own keys, else by those of data."""
    columns = recipe.data.columns | entry.get("columns", {})
    text = columns.get("text", recipe.train.dataset_text_field)
    return Form(entry.get("format", recipe.data.format), columns, text)


def _row(where: str, raw: dict[str, Any], form: Form) -> tuple[Row, list[Fault]]:
    """A row in the form it is trained in, and what is wrong with it."""
    named, found = form.read(raw)
    row = Row(where, used(named, form.text_field))
    if found := found or row_faults(named, form.text_field) or _no_json(row):
        return row, found
    form.unused |= {k for k, v in named.items() if v is not None} - {*FIELDS, form.text_field, "system"}
    value, found = with_system(row.value, named.get("system"))
    form.systems += value is not row.value
    return Row(where, value), found


def raise_first(faults: list[Problem], where: str) -> None:
    """Raise one RecipeError with the first 20 of `faults`, each once, and a count of the rest, if there are
    any.
    """
    faults = list(dict.fromkeys(faults))  # a file that is named by two sources is read twice
    more = len(faults) - SHOWN
    raise_if(
        faults[:SHOWN]
        + ([Problem(where, f"and {more} more {'fault' if more == 1 else 'faults'}")] if more > 0 else [])
    )


def by_assistant_turn(split: Split) -> Split:
    """`data.rows: assistant_turn`: for each trained assistant turn a row of its own, its history as the
    prompt, itself as completion. A turn that says `weight: 0` or `train: false` stays in the history alone.
    """
    rows = []
    for row in split.rows:
        single = row.history and len(row.value["completion"]) == 1 and not off(row.value["completion"][0])
        if not row.conversational or single:
            rows.append(row)
            continue
        for i, message in enumerate(row.messages):
            if i >= len(row.history) and message["role"] == "assistant" and not off(message):
                rows.append(
                    Row(
                        f"{row.where}#{i + 1}",
                        {"prompt": row.messages[:i], "completion": [message]} | row.options,
                    )
                )
    return Split(rows, split.notes)


def in_both(train: Split, other: Split) -> list[Row]:
    """Rows of `other` (eval) whose content (`overlap.plain`) also stands in `train`."""
    wanted = {overlap.digest(row) for row in other.rows}
    keys = {digest for row in train.rows if (digest := overlap.digest(row)) in wanted}
    return [row for row in other.rows if overlap.digest(row) in keys]


def near(train: Split, other: Split) -> list[Row]:
    """Rows of `other` that nearly stand in `train` (`overlap.near`), those of `in_both` included."""
    return [row for row, _ in overlap.near(train.rows, other.rows)]


def _no_json(row: Row) -> list[Fault]:
    """A value of Parquet or the hub that no text of JSON has: bytes, a date."""
    try:
        row.key.encode()
    except (TypeError, ValueError) as error:
        return [(f"a value that JSON has not: {error}", "write it as text, or remove it")]
    return []


def _unwanted(row: Row, recipe: Recipe) -> list[Fault]:
    """What a row holds that must not be trained, and would be."""
    found = [] if "control_characters" in recipe.data.permit else control(row)
    if not row.conversational or recipe.data.rows == "assistant_turn":
        return found
    train = recipe.train
    begins = 0 if train.completion_only_loss is False else len(row.history)
    for i, message in enumerate(row.messages):
        trained = i >= begins and (message["role"] == "assistant" or not train.assistant_only_loss)
        if trained and (said := off(message)):
            at = i - len(row.history)
            where = f"prompt[{i}]" if at < 0 else f"{'completion' if row.history else 'messages'}[{at}]"
            do = "set data.rows: assistant_turn, which leaves such turns out; or remove them"
            found.append((f"{where} says {said}, and would be trained", do))
    return found


def _weighted(rows: list[Row], weight: float) -> list[Row]:
    """`weight` copies of all rows; a fraction takes that share of them, in their order.

    Always the same rows: `train.seed` changes the order of training, not the data.
    """
    whole, part = int(weight), weight - int(weight)
    chosen = sorted(random.Random(0).sample(range(len(rows)), round(part * len(rows))))
    return rows * whole + [rows[i] for i in chosen]


def _mixed(row: Row, first: Row) -> list[Fault]:
    """The trainer decides by the first row how all are read; a row of another kind would be read wrongly, in
    silence.
    """
    if row.kind == first.kind:
        return []
    do = "one schema for all rows; convert these or make them a recipe of their own"
    return [(f"{row.kind}, but {first.where} is {first.kind}: mixed schemas", do)]
