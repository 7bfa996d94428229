"""Read every row of the data before training, and name file:line for each fault. Imports no
torch.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_recipes.core.errors import Problem, raise_if
from lora_recipes.data import mix, overlap, sources
from lora_recipes.data.forms import Form, with_system
from lora_recipes.data.row import FIELDS, Fault, Row, control, off, used
from lora_recipes.data.row import faults as row_faults
from lora_recipes.recipe.recipe import Recipe

SHOWN = 20  # faults listed one by one; the rest are counted
MANY = 1000  # faults after which nothing more is read


class TooMany(Exception):
    """There are MANY faults: a reader stops."""


class Faults(list[Problem]):
    """What is wrong with rows. TooMany where that is more than a person wants to know."""

    def append(self, problem: Problem) -> None:
        """As list.append."""
        super().append(problem)
        if len(self) >= MANY:
            raise TooMany


@dataclass
class Source:
    """An entry of data.train or data.eval, the place in the recipe where it stands, how its rows are read,
    and how many sound ones were.
    """

    entry: dict[str, Any]
    at: str
    form: Form
    rows: int = 0


class Reader:
    """The rows of `data.train`, `data.eval` or `data.kept` (`which`), checked, one after another: iterate
    once. What is wrong is in `faults`, what is worth a note in `notes`.

    `sample`: read that many rows of each source at most.
    """

    def __init__(self, recipe: Recipe, which: str, sample: int | None = None):
        given = getattr(recipe.data, which) or []
        self.recipe, self.which, self.sample = recipe, which, sample
        self.faults, self.notes = Faults(), list[str]()
        self.first: Row | None = None
        self.sources = []
        for number, source in enumerate([given] if isinstance(given, str) else given):
            at = recipe.at("data", which, *([] if isinstance(given, str) else [number]))
            entry: dict[str, Any] = {"path": source} if isinstance(source, str) else source
            self.sources.append(Source(entry, at, _form(entry, recipe)))

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Sound rows, each with the number of its source."""
        try:
            for number, source in enumerate(self.sources):
                for row, _ in self._source(source):
                    yield number, row
        except TooMany:
            pass

    def with_raw(self, number: int) -> Iterator[tuple[Row, dict[str, Any]]]:
        """The sound rows of one source, each with what stands there."""
        with contextlib.suppress(TooMany):
            yield from self._source(self.sources[number])

    def _source(self, source: Source) -> Iterator[tuple[Row, dict[str, Any]]]:
        before, notes, form = len(self.faults), list[str](), source.form
        raws = sources.rows(source.entry, source.at, self.faults, notes, self.recipe)
        for where, raw in itertools.islice(raws, self.sample):
            row, found = _row(where, raw, form)
            found = found or _mixed(row, self.first or row) or _unwanted(row, self.recipe)
            for fault in found:
                self.faults.append(Problem(where, *fault))
            if not found:
                source.rows += 1
                self.first = self.first or row
                yield row, raw
        if form.seen and (missing := form.missing(source.at)):
            self.faults[before:] = missing  # each row says it too
        notes += form.notes()
        if form.unused:
            notes.append(f"fields not used for training: {', '.join(sorted(form.unused))}")
        if source.rows == self.sample:
            notes.append(f"the first {source.rows:,} rows of {source.entry['path']} alone were read")
        self.notes += [f"{self.which}: {note}" for note in notes]
        if not mix.taken(source.rows, source.entry.get("weight", 1)) and len(self.faults) == before:
            none = (
                f"weight {source.entry['weight']:g} of {source.rows} rows is no row"
                if source.rows
                else f"{source.entry['path']} has no rows"
            )
            self.faults.append(Problem(source.at, none, "take more of it, or remove it"))


@dataclass
class Split:
    """Some rows in memory, in the order they are trained, and what was noticed while reading them."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Hash of the content of all rows in order: two runs with one hash trained on the same data."""
        return sha256(content(row) for row in self.rows)


def content(row: Row) -> bytes:
    """16 bytes that stand for all that is in a row."""
    return hashlib.blake2b(row.key.encode(), digest_size=16).digest()


def sha256(contents: Iterable[bytes]) -> str:
    """One hash of the `content` of rows, in their order."""
    digest = hashlib.sha256()
    for one in contents:
        digest.update(one)
    return digest.hexdigest()


def read(recipe: Recipe, which: str) -> Split:
    """The rows of `data.train`, `data.eval` or `data.kept` in memory; RecipeError lists the first 20 faults
    and counts the rest.
    """
    reader = Reader(recipe, which)
    rows: dict[int, list[Row]] = {}
    for number, row in reader:
        rows.setdefault(number, []).append(row)
    raise_first(reader.faults, f"data.{which}")
    weights = {number: reader.sources[number].entry.get("weight", 1) for number in rows}
    chosen = [own[i] for n, own in rows.items() for i in mix.repeated(len(own), weights[n])]
    return Split(chosen, reader.notes)


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
    """Raise one RecipeError with the `shown` ones of `faults`, if there are any."""
    raise_if(shown(faults, where))


def shown(faults: list[Problem], where: str) -> list[Problem]:
    """The first 20 of `faults`, each once, and a count of the rest."""
    stopped = len(faults) >= MANY
    faults = list(dict.fromkeys(faults))  # a file that is named by two sources is read twice
    more = len(faults) - SHOWN
    said = f"and {more:,} more {'fault' if more == 1 else 'faults'}"
    if stopped:
        said += ", after which nothing more was read"
    return faults[:SHOWN] + ([Problem(where, said)] if more > 0 else [])


def turns(row: Row) -> list[Row]:
    """`data.rows: assistant_turn`: for each trained assistant turn of `row` a row of its own, its history as
    the prompt, itself as completion. A turn that says `weight: 0` or `train: false` stays in the history
    alone.
    """
    single = row.history and len(row.value["completion"]) == 1 and not off(row.value["completion"][0])
    if not row.conversational or single:
        return [row]
    return [
        Row(f"{row.where}#{i + 1}", {"prompt": row.messages[:i], "completion": [message]} | row.options)
        for i, message in enumerate(row.messages)
        if i >= len(row.history) and message["role"] == "assistant" and not off(message)
    ]


def by_assistant_turn(split: Split) -> Split:
    """All `turns` of the rows of `split`."""
    return Split([turn for row in split.rows for turn in turns(row)], split.notes)


def in_both(train: Iterable[Row], other: Iterable[Row]) -> list[Row]:
    """Rows of `other` whose content (`overlap.plain`) also stands in `train`, which may be read from disk."""
    wanted = [(overlap.digest(overlap.plain(row)), row) for row in other]
    keys = {digest for digest, _ in wanted}
    seen = {digest for row in train if (digest := overlap.digest(overlap.plain(row))) in keys}
    return [row for digest, row in wanted if digest in seen]


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


def _mixed(row: Row, first: Row) -> list[Fault]:
    """The trainer decides by the first row how all are read; a row of another kind would be read wrongly, in
    silence.
    """
    if row.kind == first.kind:
        return []
    do = "one schema for all rows; convert these or make them a recipe of their own"
    return [(f"{row.kind}, but {first.where} is {first.kind}: mixed schemas", do)]
