"""`task: classify`: rows of a text and its class, read, checked, counted and made into tokens before any
weight is loaded.

The gate of rows that are written (data/gate.py) asks what is trained of a row, and where a reply ends. Here a
row is trained whole, and what can be wrong is its class.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.record import ClassFacts, DataFacts, EvalFacts, TrainFacts
from lora_recipes.data import gate as gates
from lora_recipes.data import mix, overlap, read, sources
from lora_recipes.data.gate import Gate
from lora_recipes.data.render import Characters, Counts, Example
from lora_recipes.data.row import Row, control
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import Recipe

WRITTEN = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
)  # fields of rows of other tasks
MEANT = "task: classify takes a text and its class: data.columns: {text: ..., label: ...} names other fields"
ASKED = ("truncated", "duplicates", "train_in_eval", "near_in_eval")  # of data.limits


class Texts(Sequence[Example]):
    """The rows of a split as they are trained, in the order of one epoch; what data/rows.py is for rows that
    are written. Here they are in memory: a text and its class are small.
    """

    def __init__(self, examples: list[Example], whole: list[int], sha256: str):
        self.examples, self.sha256 = examples, sha256
        self.lengths = np.array([len(e.input_ids) for e in examples], dtype=np.int64)  # tokens as trained
        self.length = np.array(whole, dtype=np.int64)  # tokens before they were cut
        self.last = np.array([max(e.input_ids) for e in examples], dtype=np.int64)  # largest token id

    def __len__(self) -> int:
        """How many."""
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        """One, or a list of them."""
        return self.examples[index]

    def where(self, index: int) -> str:
        """The place of one: file:line."""
        return self.examples[int(index)].where

    @property
    def tokens_sha256(self) -> str:
        """Hash of all tokens and classes in order."""
        return read.sha256(str((e.input_ids, e.labels)).encode() for e in self.examples)


@dataclass
class LabelGate(Gate):
    """Both splits as they go to the trainer: each Example's `labels` is the place of its class among `names`.

    `weights`: the factor of each class in the loss. `classes`: what the plan says of them.
    """

    train: Any
    evaluation: Any
    names: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    classes: list[ClassFacts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # of evaluation, or of train where there is none

    @property
    def majority(self) -> str:
        """The class of most rows to train on."""
        return max(self.classes, key=lambda c: c.train).name


@dataclass
class Labelled:
    """The rows of a split; the class of each is `row.value["label"]`."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """The class of each row."""
        return [row.value["label"] for row in self.rows]

    @property
    def sha256(self) -> str:
        """Hash of the content of all rows in order."""
        return read.sha256(read.content(row) for row in self.rows)


def gate(resolved: Resolved, network: bool, sample: int | None = None) -> Gate:
    """The recipe's data through the gate of its task."""
    through = gates.pass_through if resolved.recipe.classify is None else pass_through
    return through(resolved, network, sample)


def pass_through(resolved: Resolved, network: bool, sample: int | None = None) -> LabelGate:
    """Take the recipe's rows through the gate. RecipeError lists faulty rows, or the limits that are
    exceeded.

    `network`: may the tokenizer be fetched? Without one at hand tokens are not counted. `sample`: look at
    that many rows of each source alone.
    """
    recipe = resolved.recipe
    train, held = splits(recipe, sample)
    names = classes(recipe, train)
    known(train, names)
    known(held, names)
    train, held = validation(recipe, train, held)
    raise_if(_few(recipe, train, names))
    tokenizer = padded(gates.tokenizer_of(resolved, network))
    made = [_examples(split, tokenizer, names, recipe) for split in (train, held)]
    (rows, counted), (evaluation, counted_held) = made
    digests = np.array([digest(row) for row in train.rows], dtype=np.uint64)
    repeated = overlap.repeated(digests, lambda i: train.rows[i].where)
    twice = [train.rows[i] for i in np.flatnonzero(repeated)]
    both, near = read.in_both(train.rows, held.rows), _near(train, held)
    facts = DataFacts(
        train=TrainFacts(
            **vars(counted), format="text and label", duplicates=len(twice), sha256=train.sha256
        ),
        eval=EvalFacts(**vars(counted_held), train_in_eval=len(both), sha256=held.sha256),
    )
    weights = _weights(recipe, train, names)
    in_train, in_eval = Counter(train.labels), Counter(held.labels)
    said = [
        ClassFacts(name=name, train=in_train[name], eval=in_eval[name], weight=weight)
        for name, weight in zip(names, weights, strict=True)
    ]
    found = LabelGate(tokenizer, rows, evaluation, counted, facts, names=names, weights=weights, classes=said)
    found.notes = train.notes + held.notes
    found.texts = [row.value["text"] for row in held.rows or train.rows]
    seen = {"duplicates": twice, "train_in_eval": both, "near_in_eval": near}
    firsts = {name: rows_of[0].where for name, rows_of in seen.items() if rows_of}
    shares = {
        "truncated": counted.share("truncated"),
        "duplicates": len(twice) / counted.rows,
        "train_in_eval": len(both) / max(len(held.rows), 1),
        "near_in_eval": len(near) / max(len(held.rows), 1),
    }
    raise_if(_unasked(recipe))
    found.warnings += gates.limits(recipe, shares, firsts)
    found.warnings += _doubts(train, held, said)
    if counted_held.truncated:
        found.warnings.append(f"{counted_held.truncated} rows of eval are cut at train.max_length")
    return found


def splits(recipe: Recipe, sample: int | None = None) -> tuple[Labelled, Labelled]:
    """The rows of data.train and data.eval as they are; the faults of both in one error."""
    found, problems = [], []
    for which in ("train", "eval"):
        try:
            found.append(_read(recipe, which, sample))
        except RecipeError as error:
            problems += error.problems
    raise_if(problems)
    return found[0], found[1]


def classes(recipe: Recipe, train: Labelled) -> list[str]:
    """The names of the classes in the head's order. RecipeError where there are fewer than two, or where two
    differ in case and spaces alone.
    """
    given = recipe.classify.labels if recipe.classify else None
    at = recipe.at("classify", "labels") if given else recipe.at("data", "train")
    if isinstance(given, str):
        names = label_file(recipe.file(given), at)
    else:
        names = list(given) if given else sorted(set(train.labels))
    if len(names) < 2:
        found = f"there is one class only, {names[0]!r}" if names else "there is no class"
        raise RecipeError(Problem(at, found, "a classifier chooses among two or more"))
    alike: dict[str, str] = {}
    for name in names:
        first = alike.setdefault(" ".join(name.casefold().split()), name)
        if first != name:
            do = "write one of the two in all rows"
            raise RecipeError(Problem(at, f"the classes {first!r} and {name!r} are one, written twice", do))
    return names


def label_file(path: Path, at: str) -> list[str]:
    """The names in a text file, one a line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "not UTF-8"
        raise RecipeError(
            Problem(at, f"{path} cannot be read ({said})", "a text file, a name a line")
        ) from None
    names = [line for line in lines if line]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise RecipeError(Problem(at, f"{path.name} names {listed(twice)} twice", "each class has one place"))
    return names


def _read(recipe: Recipe, which: str, sample: int | None) -> Labelled:
    given, split, faults = getattr(recipe.data, which) or [], Labelled(), list[Problem]()
    entries, every = list[dict[str, Any]](), list[list[Row]]()
    for number, source in enumerate([given] if isinstance(given, str) else given):
        at = recipe.at("data", which, *([] if isinstance(given, str) else [number]))
        entry: dict[str, Any] = {"path": source} if isinstance(source, str) else source
        columns = {"text": "text", "label": "label"} | recipe.data.columns | entry.get("columns", {})
        rows, notes, before = list[Row](), list[str](), len(faults)
        others: set[str] = set()
        raws = sources.rows(entry, at, faults, notes, recipe)
        for where, raw in itertools.islice(raws, sample):
            if wrong := _fault(raw, columns):
                faults.append(Problem(where, *wrong))
                continue
            row = Row(where, {"text": raw[columns["text"]], "label": raw[columns["label"]]})
            strange = [] if "control_characters" in recipe.data.permit else control(row)
            faults += [Problem(where, *wrong) for wrong in strange]
            others |= {k for k, v in raw.items() if v is not None} - set(columns.values())
            rows.append(row)
        split.notes += [f"{which}: {note}" for note in notes]
        if others:
            split.notes.append(f"{which}: fields not used: {', '.join(sorted(others))}")
        if not rows and len(faults) == before:
            faults.append(Problem(at, f"{entry['path']} has no rows", "take more of it, or remove it"))
        entries.append(entry)
        every.append(rows)
    read.raise_first(faults, f"data.{which}")
    chosen = mix.picks(entries, [len(rows) for rows in every])
    split.rows = [rows[i] for rows, own in zip(every, chosen, strict=True) for i in own]
    return split


def _fault(raw: dict[str, Any], columns: dict[str, str]) -> tuple[str, str] | None:
    """What is wrong with a row, and what to do."""
    text, label = raw.get(columns["text"]), raw.get(columns["label"])
    if text is None:
        written = [name for name in WRITTEN if raw.get(name) is not None]
        found = f"no {columns['text']!r}, but {listed(map(repr, raw)) or 'nothing'}"
        if written:
            found = f"a row of {written[0]}, to be written: no {columns['text']!r}"
        return found, MEANT
    if not isinstance(text, str) or not text.strip():
        return (
            f"{columns['text']} is {'empty' if isinstance(text, str) else 'no text'}",
            "write one, or drop it",
        )
    if label is None:
        return f"no {columns['label']!r}, but {listed(map(repr, raw))}", MEANT
    if isinstance(label, list):
        do = "task: classify gives one class to a text: a row for each, or the names joined as a class"
        return f"{columns['label']} is a list: several classes of one text are not offered", do
    if not isinstance(label, str):
        kind = "true or false" if isinstance(label, bool) else f"{label!r}, no text"
        return f"{columns['label']} is {kind}", "a class has a name: write it as text"
    return None if label.strip() else (f"{columns['label']} is empty", "name the class, or drop the row")


def known(split: Labelled, names: list[str]) -> None:
    """RecipeError with the first row of each class that is none of `names`."""
    known, found = set(names), dict[str, Problem]()
    for row in split.rows:
        label = row.value["label"]
        if label not in known and label not in found:
            do = f"did you mean {nearest(label, names)}? The classes are {listed(names, 12)}"
            found[label] = Problem(row.where, f"the class {label!r} is none of the {len(names)}", do)
    raise_if(list(found.values())[: read.SHOWN])


def validation(recipe: Recipe, train: Labelled, held: Labelled) -> tuple[Labelled, Labelled]:
    """Both splits, the second made of the first where the recipe says so: of each class alike."""
    classify = recipe.classify
    if classify is None or classify.validation is None:
        return train, held
    from sklearn.model_selection import train_test_split

    at = recipe.at("classify", "validation")
    alone = [name for name, count in Counter(train.labels).items() if count == 1]
    if alone:
        do = "more rows of it, or data.eval with rows of its own"
        found = f"the class {listed(map(repr, alone))} has one row only: none can be held out"
        raise RecipeError(Problem(recipe.at("data", "train"), found, do))
    try:
        kept, out = train_test_split(
            train.rows,
            test_size=classify.validation,
            random_state=classify.validation_seed,
            stratify=train.labels,
        )
    except ValueError as error:
        do = "another share, more rows, or data.eval"
        raise RecipeError(Problem(at, f"scikit-learn cannot hold that share out: {error}", do)) from None
    note = f"eval: {len(out):,} of the {len(train.rows):,} rows of train, of each class alike"
    note += f" (validation_seed {classify.validation_seed})"
    return Labelled(kept, train.notes), Labelled(out, [*held.notes, note])


def _few(recipe: Recipe, train: Labelled, names: list[str]) -> list[Problem]:
    """Classes without a row to learn from, or with one."""
    counts, at = Counter(train.labels), recipe.at("data", "train")
    if len(counts) == 1:
        only = f"all {len(train.rows):,} rows are of one class, {train.labels[0]!r}"
        return [Problem(at, only, "rows of each class")]
    none, one = ([n for n in names if counts[n] == k] for k in (0, 1))
    found = [(f"no row is of the class {listed(map(repr, none))}", "add rows, or take the name out")] * bool(
        none
    )
    if one:
        found.append((f"one row alone is of the class {listed(map(repr, one))}", "a class needs two or more"))
    return [Problem(at, *each) for each in found]


def _examples(split: Labelled, tokenizer: Any, names: list[str], recipe: Recipe) -> tuple[Any, Counts]:
    """The rows as tokens, cut at train.max_length, and the place of their class; and what was counted."""
    places, limit = {name: i for i, name in enumerate(names)}, recipe.train.max_length
    at_end = recipe.train.truncation_mode == "keep_end"
    made, whole, cut, tokens, longest = [], list[int](), 0, 0, 0
    for row in split.rows:
        ids = list(tokenizer(row.value["text"])["input_ids"])
        if not ids:
            do = "the tokenizer makes no token of it: drop the row"
            raise RecipeError(Problem(row.where, "the text has no tokens", do))
        whole.append(len(ids))
        if limit is not None and len(ids) > limit and not isinstance(tokenizer, Characters):
            ids, cut = (ids[-limit:] if at_end else ids[:limit]), cut + 1
        tokens, longest = tokens + len(ids), max(longest, len(ids))
        made.append(Example(row.where, ids, [places[row.value["label"]]]))
    texts = Texts(made, whole, split.sha256)
    if isinstance(tokenizer, Characters):
        return texts, Counts(len(made))
    return texts, Counts(len(made), tokens, 0, longest, cut)


def digest(row: Row) -> int:
    """What stands for the text of a row, as it is compared."""
    return overlap.digest(overlap.plain(row))


def padded(tokenizer: Any) -> Any:
    """`tokenizer` with a padding token: where it has none its end of text, or any, as the mask tells it."""
    if getattr(tokenizer, "pad_token", "") is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _near(train: Labelled, held: Labelled) -> list[Row]:
    same = {row.where for row in read.in_both(train.rows, held.rows)}
    return [row for row in overlap.near(train.rows, held.rows) if row.where not in same]


def _weights(recipe: Recipe, train: Labelled, names: list[str]) -> list[float]:
    """The factor of each class: rows / (classes x rows of the class) where it is `balanced`, as
    scikit-learn's compute_class_weight.
    """
    given = recipe.classify.class_weight if recipe.classify else None
    if given == "balanced":
        from sklearn.utils.class_weight import compute_class_weight

        found = compute_class_weight("balanced", classes=np.array(names), y=train.labels)
        return [float(weight) for weight in found]
    if not isinstance(given, dict):
        return [1.0] * len(names)
    at = recipe.at("classify", "class_weight")
    if odd := [name for name in given if name not in names]:
        raise RecipeError(Problem(at, f"{odd[0]!r} is no class", f"did you mean {nearest(odd[0], names)}?"))
    return [float(given.get(name, 1)) for name in names]


def _unasked(recipe: Recipe) -> list[Problem]:
    """Limits of the recipe that say nothing of texts and classes."""
    return [
        Problem(recipe.at("data", "limits", name), "is of rows that are written", "remove it")
        for name in recipe.data.limits
        if name not in ASKED
    ]


def _doubts(train: Labelled, held: Labelled, said: list[ClassFacts]) -> list[str]:
    """Classes that the held-out rows cannot tell of, and texts that stand there with two classes."""
    found = []
    if held.rows and (lacks := [c.name for c in said if not c.eval]):
        found.append(f"no eval row is of the class {listed(lacks)}: nothing is measured of it")
    first: dict[int, Row] = {}
    apart = []
    for row in (*train.rows, *held.rows):
        other = first.setdefault(digest(row), row)
        if other.value["label"] != row.value["label"]:
            apart.append((other, row))
    if apart:
        one, two = apart[0]
        named = f"{one.where} is {one.value['label']!r}, {two.where} {two.value['label']!r}"
        found.append(f"{len(apart)} rows have the text of another row and another class: {named}")
    most, least = max(said, key=lambda c: c.train), min(said, key=lambda c: c.train)
    if most.train >= 10 * least.train and all(c.weight == 1 for c in said):
        found.append(
            f"{most.name} has {most.train:,} rows, {least.name} {least.train:,}: a loss that says"
            f" {most.name} for all is low; classify.class_weight: balanced weighs them"
        )
    return found


def lines(gate: Gate, recipe: Recipe) -> list[tuple[str, str]]:
    """What a person reads of it: (label, text) pairs."""
    if not isinstance(gate, LabelGate):
        return gates.lines(gate, recipe)
    counts = gate.counts
    said = [("data", f"train {counts.rows:,} rows (text and label), eval {len(gate.evaluation):,} rows")]
    if counts.tokens is None:
        name = recipe.model.tokenizer or recipe.model.name_or_path or recipe.model.contract
        told = f"not counted: the tokenizer of {name} is not in the cache and a plan fetches nothing"
        said.append(("tokens", f"{told} (training counts them)"))
    else:
        cut = (
            f"; {counts.truncated:,} rows are cut at {recipe.train.max_length:,}" if counts.truncated else ""
        )
        said.append(("tokens", f"{counts.tokens:,} in train; longest row {counts.longest:,}{cut}"))
    weighed = any(c.weight != 1 for c in gate.classes)
    balance = [
        f"{c.name} {c.train:,} ({100 * c.train / counts.rows:.1f} %), eval {c.eval:,}"
        + f", weight {c.weight:.3g}" * weighed
        for c in gate.classes
    ]
    said.append(("classes", "\n".join(balance)))
    return said + [("note", note) for note in gate.notes]


def example(gate: Gate, recipe: Recipe) -> str:
    """The shortest of the first 50 rows."""
    if not isinstance(gate, LabelGate):
        return gates.example(gate, recipe)
    first = min(gate.train[:50], key=lambda e: len(e.input_ids))
    text = gate.tokenizer.decode(first.input_ids)
    return f"{first.where} (class {gate.names[first.labels[0]]})\n{text.strip()}"
