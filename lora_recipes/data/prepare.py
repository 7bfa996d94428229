"""From sources to checked rows on the disk: read one after another, made into tokens by several processes,
counted, compared and written as they come, so that memory hardly grows with their number.
"""

import itertools
import json
import multiprocessing
import os
import tempfile
import time
import weakref
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from lora_recipes.core import cli, files
from lora_recipes.core.errors import Problem, RecipeError, nearest, raise_if
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import cache, mix, new_tokens, overlap, read, render, stops
from lora_recipes.data.overlap import Near
from lora_recipes.data.read import MANY, Reader
from lora_recipes.data.render import Example, Renderer, Unread
from lora_recipes.data.row import Row
from lora_recipes.data.rows import COUNTED, FILES, ROWS, TRAINED, Rows, Told
from lora_recipes.data.stand_in import Characters
from lora_recipes.data.stops import NextTurn, Stops
from lora_recipes.recipe.base import Resolved
from lora_recipes.recipe.recipe import Recipe

BATCH = 256  # rows that go to a process at once
HEAD = 50  # first rows that are kept as they were given: examples, probes
PROCESS = 400 * 2**20  # bytes that a process takes: what it changes of what it was forked with, and rows
SPLITS = ("train", "eval")
Numbered = tuple[int, int, Row]  # source, row of the source, the row


@dataclass
class Prepared:
    """Both splits, what ends a reply, the held-out rows that nearly stand in train (`near`, by their index),
    the new tokens that no row of train has (`unseen`), and how they were come by, in words.
    """

    train: Rows
    evaluation: Rows
    stops: Stops
    near: list[int]
    unseen: list[int]
    said: str


@dataclass
class Job:
    """What a process needs to make rows of a split into examples. `near`: the held-out rows, to compare with
    while those of train pass; None while they are read themselves.
    """

    renderer: Renderer
    following: NextTurn
    ends: tuple[int, ...]
    new: list[int]
    near: Near | None = None


@dataclass
class Made:
    """A batch as examples, and what was noticed. `shingles` of the held-out rows, `near` the held-out rows
    that are nearly here, `seen` the new tokens that are here.
    """

    tables: list[pa.Table]
    faults: list[Problem]
    system: dict[str, tuple[str, int]]
    shingles: list[Any] = field(default_factory=list)
    near: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)


def prepared(
    resolved: Resolved, tokenizer: Any, known: set[str] | None, sample: int | None = None
) -> Prepared:
    """The rows of `resolved`: kept ones, or read anew and kept. RecipeError lists faulty rows. `known`: the
    arguments that the chat template looks at (None: not to be told).

    One process at a time makes them, the others wait and take what it made. Where nothing can be kept, they
    lie in a temporary folder that goes with this process.
    """
    first = Reader(resolved.recipe, "train")
    list(itertools.islice(first, BATCH))
    # What is wrong at the beginning is said before all bytes are read to find the rows among those kept.
    content = None if first.faults else cache.content(resolved)
    if content is None:
        return _apart(resolved, tokenizer, known, sample, "a source cannot be named by its content")
    final = cache.place() / cache.key(content, resolved, tokenizer, sample)

    def anew(folder: Path) -> dict[str, Any]:
        facts = build(resolved, tokenizer, folder, known, sample)
        if cache.content(resolved) != content:
            found, do = "a source changed while it was read", "begin again when it is written"
            raise RecipeError(Problem(resolved.recipe.at("data"), found, do))
        return facts

    with files.writing(final.parent, "while rows were kept", _elsewhere):
        taken = cache.taken(final, "prepares the rows", anew)
    if taken is None:
        return _apart(resolved, tokenizer, known, sample, f"{shown(final.parent)} cannot be written to")
    facts, before = taken
    return _opened(final, facts, resolved, _again(facts) if before else _took(facts))


def _elsewhere() -> str:
    return "HF_DATASETS_CACHE names another place for them"


def _apart(
    resolved: Resolved, tokenizer: Any, known: set[str] | None, sample: int | None, why: str
) -> Prepared:
    folder = tempfile.TemporaryDirectory(prefix="lora_recipes.")
    place = Path(folder.name) / "rows"
    facts = build(resolved, tokenizer, place, known, sample)
    made = _opened(place, facts, resolved, f"{_took(facts)}; not kept, {why}")
    weakref.finalize(made.train, folder.cleanup)
    return made


def _took(facts: dict[str, Any]) -> str:
    many = facts["processes"]
    return f"read and checked in {facts['seconds']:.1f} s by {many} process{'es' * (many > 1)}"


def _again(facts: dict[str, Any]) -> str:
    return f"as read and checked at {facts['made']}"


def _opened(folder: Path, facts: dict[str, Any], resolved: Resolved, said: str) -> Prepared:
    both = {}
    for which in SPLITS:
        head = [Row(where, value) for where, value in facts[which]["head"]]
        told = Told(**facts[which] | {"head": head}, by=resolved.recipe.data.mix)
        both[which] = Rows(folder, which, told)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["stops"].items()}
    ends = Stops(**fields)
    size = files.size(cache.size(folder))
    clear = f" ({cli.command('cache')})" if folder.parent == cache.place() else ""
    return Prepared(
        both["train"],
        both["eval"],
        ends,
        facts["near"],
        facts["unseen"],
        f"{said}; {size} on the disk{clear}",
    )


def build(
    resolved: Resolved,
    tokenizer: Any,
    folder: Path,
    known: set[str] | None,
    sample: int | None = None,
) -> dict[str, Any]:
    """Read, check and write both splits into `folder` (two Arrow files each, facts.json); the facts."""
    began, recipe = time.monotonic(), resolved.recipe
    folder.mkdir()
    readers = {which: Reader(recipe, which, sample) for which in SPLITS}
    splits = {which: _Split(folder, readers[which], tokenizer, known) for which in SPLITS}
    numbered = {which: split.numbered(recipe) for which, split in splits.items()}
    following = stops.next_turn(tokenizer, resolved)
    new = new_tokens.ids(tokenizer, recipe, 0) if hasattr(tokenizer, "get_vocab") else []
    head = list(itertools.islice(numbered["train"], stops.LOOKED))
    renderer = Renderer(head[0][2], tokenizer, recipe) if head else None
    rendered = [renderer.example(row) for _, _, row in head] if renderer else []
    sound = [(row, e) for (_, _, row), e in zip(head, rendered, strict=True) if e]
    rows = [row for row, _ in sound]
    done = stops.closed(rows, [e for _, e in sound], following)
    ends = stops.decide(rows, done, tokenizer, resolved, following)
    first = next(numbered["eval"], None)
    if first:
        job = Job(Renderer(first[2], tokenizer, recipe), following, ends.trained, new)
        splits["eval"].take(job, [], itertools.chain([first], numbered["eval"]))
    near = Near(splits["eval"].shingles)
    if renderer:
        job = Job(renderer, following, ends.trained, new, near)
        splits["train"].take(job, list(zip(head, rendered, strict=True)), numbered["train"])
    problems = [problem for which in SPLITS for problem in splits[which].problems()]
    if not (problems or splits["train"].examples):
        do = "rows whose assistant turns all say weight: 0 or train: false teach nothing"
        problems = [Problem(recipe.at("data", "train"), "no turn is to be trained", do)]
    raise_if(problems)
    facts: dict[str, Any] = {which: split.close() for which, split in splits.items()}
    facts |= {
        "stops": asdict(ends),
        "near": sorted(splits["train"].near),
        "unseen": sorted(set(new) - splits["train"].seen),
        "processes": splits["train"].processes,
        "seconds": time.monotonic() - began,
        "made": files.now(),
        "files": {file.name: file.stat().st_size for file in sorted(folder.glob("*.arrow"))},
    }
    files.write(folder / cache.FACTS, json.dumps(facts, ensure_ascii=False))
    return facts


class _Split:
    """A split on its way to the disk."""

    def __init__(self, folder: Path, reader: Reader, tokenizer: Any, known: set[str] | None):
        self.reader, self.tokenizer, self.known = reader, tokenizer, known
        self.faults, self.system = list[Problem](), dict[str, tuple[str, int]]()
        self.unread, self.kwargs = Unread(), dict[str, str]()
        self.shingles, self.near, self.seen = list[Any](), set[int](), set[int]()
        self.head = list[tuple[str, Any]]()
        self.examples, self.processes, self.waiting = 0, 1, list[list[pa.Table]]()
        self.writers = [
            ArrowWriter(features=features, path=str(folder / f"{reader.which}{end}"))
            for end, features in FILES.items()
        ]

    def numbered(self, recipe: Recipe) -> Iterator[Numbered]:
        """The rows as they are to be trained, each with its source and its number there; those that the
        weights leave out are not made into tokens.
        """
        entries, taken = [source.entry for source in self.reader.sources], None
        if not mix.takes_all(entries) and recipe.data.mix == "rows":
            counted = Reader(recipe, self.reader.which, self.reader.sample)
            deque(counted, maxlen=0)
            taken = [set(p) for p in mix.picks(entries, [source.rows for source in counted.sources])]
        for number, read_row in self.reader:
            place = self.reader.sources[number].rows - 1
            if taken and place not in taken[number]:
                continue
            self.unread.look(read_row)
            for key in read_row.value.get("chat_template_kwargs", {}):
                if self.known is not None and key not in self.known:
                    self.kwargs.setdefault(key, f"{read_row.where} chat_template_kwargs.{key}")
            of_turns = recipe.data.rows == "assistant_turn"
            for row in read.turns(read_row) if of_turns else [read_row]:
                if len(self.head) < HEAD:
                    self.head.append((row.where, row.value))
                yield number, place, row

    def take(self, job: Job, begun: list[tuple[Numbered, Example | None]], rest: Iterator[Numbered]) -> None:
        """Make all rows into examples and write them: those that were `begun` before, and the `rest`."""
        if begun:
            self._add(_examples(job, [rows for rows, _ in begun], [example for _, example in begun]))
        with tqdm(
            desc=f"rows of {self.reader.which}", unit=" rows", disable=None, delay=2, leave=False
        ) as bar:
            for count, made in self._made(job, rest):
                self._add(made)
                bar.update(count)
                if len(self.faults) >= MANY:
                    break

    def _made(self, job: Job, rest: Iterator[Numbered]) -> Iterator[tuple[int, Made]]:
        """Batch after batch, in order. The first two are made here: other processes are begun for more."""
        batches = iter(lambda: list(itertools.islice(rest, BATCH)), [])
        for batch in itertools.islice(batches, 2):
            yield len(batch), _examples(job, batch)
        third = next(batches, None)
        if third is None:
            return
        batches = itertools.chain([third], batches)
        self.processes = processes(self.reader.recipe)
        if self.processes == 1:
            for batch in batches:
                yield len(batch), _examples(job, batch)
            return
        global _job
        _job = job  # before the processes are forked, which then have it
        waiting: deque[tuple[int, Future[Made]]] = deque()
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(self.processes, context, initializer=_begin) as pool:
            try:
                for batch in itertools.chain(batches, itertools.repeat(list[Numbered]())):
                    if batch:
                        waiting.append((len(batch), pool.submit(_work, batch)))
                    elif not waiting:
                        return
                    if not batch or len(waiting) > 2 * self.processes:
                        count, future = waiting.popleft()
                        yield count, future.result()
            except BrokenProcessPool:
                found = "a process that made tokens was ended from outside, perhaps for want of memory"
                do = f"set {self.reader.recipe.at('train', 'dataset_num_proc')}: 1"
                raise RecipeError(Problem(f"data.{self.reader.which}", found, do)) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _add(self, made: Made) -> None:
        self.faults += made.faults
        for error, (where, count) in made.system.items():
            first, before = self.system.get(error, (where, 0))
            self.system[error] = first, before + count
        self.shingles += made.shingles
        self.near |= made.near
        self.seen |= made.seen
        self.examples += len(made.tables[0])
        self.waiting.append(made.tables)
        if sum(len(tables[0]) for tables in self.waiting) >= ROWS:
            self._write()

    def _write(self) -> None:
        """Put what waits on the disk, as one batch: each costs whoever maps the file some kB of memory."""
        for writer, tables in zip(self.writers, zip(*self.waiting, strict=True), strict=False):
            if len(whole := pa.concat_tables(tables).combine_chunks()):
                writer.write_table(whole, writer_batch_size=len(whole))
        self.waiting.clear()

    def problems(self) -> list[Problem]:
        """What is wrong with the rows, the first of it."""
        unknown = unused(self.kwargs, self.known or set())
        found = [*self.reader.faults, *unknown, *self.faults, *render.refused(self.system)]
        return read.shown(found, f"data.{self.reader.which}")

    def close(self) -> dict[str, Any]:
        """The file is whole; what `Told` says of it."""
        self._write()
        for writer, features in zip(self.writers, FILES.values(), strict=True):
            if not self.examples:
                writer.write_table(features.arrow_schema.empty_table())
            writer.finalize()
        notes = list(self.reader.notes)
        if note := self.unread.said(self.tokenizer, self.reader.recipe):
            notes.append(f"{self.reader.which}: {note}")
        return {
            "entries": [source.entry for source in self.reader.sources],
            "rows": [source.rows for source in self.reader.sources],
            "head": self.head,
            "notes": notes,
            "counted": not isinstance(self.tokenizer, Characters),
        }


def unused(given: dict[str, str], known: set[str]) -> list[Problem]:
    """Template arguments (name: where it stands) that are not among the `known` ones."""
    return [
        Problem(where, "the chat template does not use it", f"did you mean {nearest(key, known)}?")
        for key, where in given.items()
        if key not in known
    ]


_job: Job | None = None


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallel ones


def _work(batch: list[Numbered]) -> Made:
    assert _job, "it was set before this process was forked"
    return _examples(_job, batch)


def processes(recipe: Recipe) -> int:
    """How many processes make tokens: train.dataset_num_proc, else as many as there are cores and memory for.
    One where processes cannot be forked.
    """
    forks = "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon
    if not forks:
        return 1
    if recipe.train.dataset_num_proc:
        return recipe.train.dataset_num_proc
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // PROCESS))


def _examples(job: Job, batch: list[Numbered], begun: list[Example | None] | None = None) -> Made:
    """A batch as it is written."""
    flat = {name: array("i") for name in ("input_ids", "labels")}
    renderer, columns = job.renderer, {name: list[Any]() for name in ("where", *COUNTED)}
    ends = [0]
    recipe, tokenizer = renderer.recipe, renderer.tokenizer
    made = Made([], [], {})
    examples = begun or [None] * len(batch)
    for (source, number, row), done in zip(batch, examples, strict=True):
        example = done if begun else renderer.example(row)
        if example is None:
            continue
        text = overlap.plain(row)
        if job.near is None:
            made.shingles.append(overlap.shingles(text))
        elif len(job.near.sizes):
            job.near.look(overlap.shingles(text))
        (example,) = stops.closed([row], [example], job.following)
        found = render.measured(example, tokenizer, recipe, job.ends)
        kept = slice(found.kept.start, found.kept.stop)
        ids, labels = array("i", example.input_ids[kept]), array("i", example.labels[kept])
        flat["input_ids"].extend(ids)
        flat["labels"].extend(labels)
        ends.append(len(flat["labels"]))
        values = {
            "where": row.where,
            "source": source,
            "row": number,
            "length": len(example.input_ids),
            "kept": len(ids),
            "supervised": found.supervised,
            "dropped": int(found.dropped),
            "turns": found.turns,
            "faithful": found.faithful,
            "open_turns": found.open_turns,
            "last": max(ids, default=0),
            "plain": overlap.digest(text),
            "content": read.content(row),
            "tokens": blake2b(ids.tobytes() + labels.tobytes(), digest_size=16).digest(),
        }
        for name, value in values.items():
            columns[name].append(value)
        if job.new:
            made.seen |= set(job.new).intersection(ids)
    tokens = {
        name: pa.ListArray.from_arrays(pa.array(ends, pa.int32()), np.frombuffer(part, dtype=np.int32))
        for name, part in flat.items()
    }
    made.tables = [
        pa.table({name: (tokens | columns)[name] for name in features}, schema=features.arrow_schema)
        for features in (TRAINED, COUNTED)
    ]
    made.faults, renderer.faults = renderer.faults, []
    made.system, renderer.system = renderer.system, {}
    if job.near is not None:
        made.near = set(job.near.found)
    return made
