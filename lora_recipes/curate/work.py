"""One run of a data verb: rows go in one by one, what becomes of each is written and counted, and a run that
was killed goes on where it was. Imports no torch.

Beside the output `x.jsonl`, `x.jsonl.gz` or `x.parquet` stand `x.report.json` and `x.dropped.jsonl`; until
the end all is in the folder `.x.work`, from which it is moved into place.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import platform
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from datetime import time as clock
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from lora_recipes.core import files
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import written
from lora_recipes.curate.inputs import Inputs, Item

EXAMPLES = 3  # of each reason in the report, each of at most EXAMPLE characters
EXAMPLE = 160
SAVED = 1.0  # seconds of work that a killed run does again at most
UNREADABLE = "cannot be read"
GOES_ON = "the same command goes on from there"


@dataclass(frozen=True)
class Outcome:
    """What becomes of an item: the `rows` that take its place; where there are none, the `reason`.

    `notes`: what was changed or found in it, counted in the report. `example`: words for the report, None for
    the beginning of the row. `raw`: what the side file holds of a dropped row, None for the row itself. `to`:
    which output, of a verb that has several.
    """

    rows: Sequence[Mapping[str, Any]] = ()
    reason: str = ""
    notes: Sequence[str] = ()
    example: str | None = None
    raw: Mapping[str, Any] | None = None
    to: str = ""


def kept(*rows: Mapping[str, Any], notes: Sequence[str] = ()) -> Outcome:
    """These rows in place of the item."""
    return Outcome(rows, notes=notes)


def dropped(reason: str, example: str | None = None) -> Outcome:
    """No row in place of the item. Reasons are counted: what differs from row to row is the example."""
    return Outcome(reason=reason, example=example)


@dataclass
class Counted:
    """How often something was said, and of which rows first."""

    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class State:
    """How far a run is, as state.json has it. `key`: of what is worked on, and how. `bytes` of each file."""

    key: str
    read: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, Counted] = field(default_factory=dict)
    noted: dict[str, Counted] = field(default_factory=dict)
    seconds: float = 0.0
    continued: int = 0
    done: bool = False  # all is made and named in `moves`: it is being moved into place
    moves: dict[str, str] = field(default_factory=dict)


def options(parser: ArgumentParser) -> None:
    """OUT and what may stand there already."""
    parser.add_argument("out", type=Path, metavar="OUT", help="x.jsonl, x.jsonl.gz or x.parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


class Work:
    """One run of `verb` that writes `out`. As a context it holds the folder of its unfinished files, alone;
    `run`, once, works through the items, `finish` moves all into place.

    `options`: what else decides on the result, JSON. `inputs`: what is read, with its SHA-256. `parts`: names
    of several outputs (`x.train.jsonl`), or one without a name. `packages`: whose versions the report names.
    """

    def __init__(
        self,
        verb: str,
        out: Path,
        options: Mapping[str, Any],
        inputs: Mapping[str, str],
        parts: Sequence[str] = ("",),
        packages: Sequence[str] = (),
        overwrite: bool = False,
    ):
        self.verb, self.out, self.options, self.inputs = verb, out, dict(options), dict(inputs)
        self.overwrite, self.parts = overwrite, parts
        self.stem, self.ending = written.named(out)
        self.folder = self.stem.with_name(f".{self.stem.name}.work")
        self.outputs = {part: self._beside(f"{part and '.'}{part}{self.ending}") for part in parts}
        self.side, self.report = self._beside(".dropped.jsonl"), self._beside(".report.json")
        self.versions = {"python": platform.python_version()}
        self.versions |= {name: version(name) for name in ("lora-recipes", *packages)}
        what = [verb, self.options, list(self.inputs.items()), self.versions, list(parts), self.ending]
        self.state = State(hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest())
        self.resumed, self.saved = False, 0  # the last row that is saved

    def _beside(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)

    # ---- the folder of the unfinished run

    def __enter__(self) -> "Work":
        """Lock the folder; take up what a killed run left there, if it is of the same work."""
        read = {Path(name).resolve() for name in self.inputs}
        made = [*self.outputs.values(), self.side, self.report]
        raise_if(
            [Problem(shown(f), "is an input, too", "give another OUT") for f in made if f.resolve() in read]
        )
        self.exit = contextlib.ExitStack()
        with files.writing(self.folder, f"while {self.verb} began"):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self.exit.enter_context((self.folder / "lock").open("ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.exit.close()
            found = "is written by another process now"
            raise RecipeError(Problem(shown(self.out), found, "wait for it, or give another OUT")) from None
        except OSError:  # a file system without locks
            pass
        try:
            self._take_up(made)
        except BaseException:
            self._leave()
            raise
        return self

    def _take_up(self, made: list[Path]) -> None:
        if before := self._before():
            self.state, self.resumed = before, True
            self.state.continued += 1
            after = f" after row {before.read:,}" if before.read else ""
            _say(f"goes on{after}, where a run of the same work ended")
            self.saved = before.read
        if not self.overwrite:
            there = [f for f in made if f.exists() and str(f) not in self.state.moves.values()]
            do = "--overwrite replaces it; or give another OUT"
            raise_if([Problem(shown(f), "is already there", do) for f in there])
        if not self.resumed:
            for left in self.folder.iterdir():
                if left.name != "lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Free the folder; what is in it stays where the run did not end, for the same command to go on."""
        self._leave()
        if kind and self.saved and not self.state.done:
            _say(f"the same command goes on after row {self.saved:,}")

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            if [f.name for f in self.folder.iterdir()] == ["lock"]:
                self._remove()
        self.exit.close()

    def _before(self) -> State | None:
        """The state that a run of the same work left; None where there is none that can be gone on from."""
        file = self.folder / "state.json"
        if not file.is_file():
            return None
        try:
            found = State(**json.loads(file.read_text(encoding="utf-8")))
            found.dropped = {k: Counted(**v) for k, v in _plain(found.dropped)}
            found.noted = {k: Counted(**v) for k, v in _plain(found.noted)}
        except (ValueError, TypeError):
            found = State("")
        if found.key != self.state.key:
            _say("begins anew: what a killed run left is of other inputs, options or versions")
            return None
        short = [name for name, size in found.bytes.items() if _size(self.folder / name) < size]
        if short and not found.done:
            _say(f"begins anew: {short[0]} of a killed run is shorter than it was")
            return None
        return found

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self) -> None:
        """What stands in the folder now is of use to a run that goes on."""
        self._save_state()

    # ---- the work

    def again(self) -> None:
        """Begin with the first row, for a verb that has kept what is dear in a file of its own."""
        if not self.state.done:
            self.state = State(self.state.key, continued=self.state.continued)

    def run(
        self, items: Inputs | Iterable[Item], act: Callable[[Item], Outcome], total: int | None = None
    ) -> None:
        """`act` on each item in its order, but for those that are done already."""
        self.run_batches(items, lambda batch: map(act, batch), 1, total)

    def run_batches(
        self,
        items: Inputs | Iterable[Item],
        act: Callable[[Sequence[Item]], Iterable[Outcome]],
        size: int,
        total: int | None = None,
    ) -> None:
        """The same with `size` items at once. Items with a fault are dropped and not acted on."""
        if self.state.done:
            return
        total = sum(items.rows) if isinstance(items, Inputs) else total
        began, state, last = time.monotonic() - self.state.seconds, self.state, time.monotonic()
        told = f"while {self.verb} wrote what is done"
        with files.writing(self.folder, told, lambda: GOES_ON), contextlib.ExitStack() as stack:
            opened = {name: stack.enter_context(self._opened(name)) for name in self._names()}
            left = itertools.islice(iter(items), state.read, total)
            while batch := list(itertools.islice(left, size)):
                sound = [item for item in batch if not item.fault]
                outcomes = iter(act(sound)) if sound else iter(())
                for item in batch:
                    faulty = dropped(UNREADABLE, item.fault) if item.fault else None
                    self._write(item, faulty or next(outcomes), opened)
                if time.monotonic() - last > SAVED:
                    last = time.monotonic()
                    state.seconds = last - began
                    self._save(opened)
                    progress(self.verb, state.read, total)
            state.seconds = time.monotonic() - began
            self._save(opened)
            progress(self.verb, state.read, total, True)
        if total is not None and state.read != total:
            found = f"{state.read:,} rows were read, but there were {total:,} before"
            raise RecipeError(Problem(self.verb, found, "the inputs changed while they were read"))

    def _names(self) -> list[str]:
        return [*(f"{part}.kept" for part in self.parts), "dropped"]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """A file of the folder, cut to what the state knows of it, to be written on."""
        file = (self.folder / name).open("ab")
        try:
            file.truncate(self.state.bytes.get(name, 0))
            yield file
        finally:
            with contextlib.suppress(OSError):  # a full disk, which has been told
                file.close()

    def _write(self, item: Item, outcome: Outcome, opened: dict[str, BinaryIO]) -> None:
        state, texts = self.state, set[str]()
        state.read += 1
        try:
            lines = [_line(row, texts) for row in outcome.rows]
        except TypeError as error:
            outcome, lines = dropped("holds a value that JSON has not", str(error)), []
        for line in lines:
            opened[f"{outcome.to}.kept"].write(line)
            state.written[outcome.to] = state.written.get(outcome.to, 0) + 1
        example = item.raw if outcome.example is None else outcome.example
        for note in (*outcome.notes, *(f"{kind} is written as text" for kind in sorted(texts))):
            _count(state.noted, note, item.where, example)
        if not outcome.rows:
            assert outcome.reason, "a dropped row has a reason"
            _count(state.dropped, outcome.reason, item.where, example)
            why = {"where": item.where, "reason": outcome.reason}
            if outcome.example:
                why["found"] = outcome.example
            row = item.raw if outcome.raw is None else outcome.raw
            opened["dropped"].write(json.dumps(why | {"row": row}, ensure_ascii=False, default=repr).encode())
            opened["dropped"].write(b"\n")

    def _save(self, opened: dict[str, BinaryIO]) -> None:
        for name, file in opened.items():
            file.flush()
            self.state.bytes[name] = os.fstat(file.fileno()).st_size
        self._save_state()

    def _save_state(self) -> None:
        files.write(self.folder / "state.json", json.dumps(self.state, default=vars))
        self.saved = self.state.read

    # ---- the end

    def finish(self, **more: Any) -> str:
        """Write outputs and report, move all into place, say what came of it. `more` is for the report."""
        with files.writing(self.folder, f"while {self.verb} ended", lambda: GOES_ON):
            if not self.state.done:
                self._make(more)
            for name, target in self.state.moves.items():
                if (self.folder / name).exists():  # else a run that was killed here has moved it
                    (self.folder / name).replace(target)
        text = self._said()
        self._remove()
        return text

    def _make(self, more: dict[str, Any]) -> None:
        state, made = self.state, {}
        for part, out in self.outputs.items():
            name = written.pack(self.folder / f"{part}.kept", self.ending)
            made[name] = out
        report = {
            "verb": self.verb,
            "options": self.options,
            "inputs": self.inputs,
            "outputs": {
                out.name: {"rows": state.written.get(part, 0), "sha256": files.sha256(self.folder / name)}
                for (part, out), name in zip(self.outputs.items(), made, strict=True)
            },
            "read": state.read,
            "written": sum(state.written.values()),
            "dropped": {k: vars(v) for k, v in state.dropped.items()},
            "noted": {k: vars(v) for k, v in state.noted.items()},
            **more,
            "versions": self.versions,
            "seconds": round(state.seconds, 1),
            "continued": state.continued,
        }
        files.write(self.folder / "report", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        made |= {"dropped": self.side, "report": self.report}
        state.moves, state.done = {name: str(target) for name, target in made.items()}, True
        self._save_state()

    def _said(self) -> str:
        """What came of the run, for a person."""
        state = self.state
        counted = sum(c.count for c in state.dropped.values())
        lines = [("read", f"{state.read:,} of {len(self.inputs)} input{'s' * (len(self.inputs) != 1)}")]
        lines += [("noted", f"{c.count:,} {note}") for note, c in _most(state.noted)]
        lines += [("dropped", f"{c.count:,} {reason}") for reason, c in _most(state.dropped)]
        if counted:
            lines.append(("", f"each with its reason in {shown(self.side)}"))
        lines += [
            ("wrote", f"{shown(out)}  {state.written.get(part, 0):,} rows")
            for part, out in self.outputs.items()
        ]
        lines.append(("report", shown(self.report)))
        if not sum(state.written.values()):
            lines.append(("WARNING", "no row is left"))
        return "\n".join(f"{label:12}{text}" for label, text in lines)


def _most(counted: dict[str, Counted]) -> list[tuple[str, Counted]]:
    return sorted(counted.items(), key=lambda pair: -pair[1].count)


def _count(counted: dict[str, Counted], what: str, where: str, example: str | Mapping[str, Any]) -> None:
    found = counted.setdefault(what, Counted())
    found.count += 1
    if len(found.examples) < EXAMPLES:
        text = example if isinstance(example, str) else json.dumps(example, ensure_ascii=False, default=str)
        cut = text if len(text) <= EXAMPLE else text[:EXAMPLE] + "..."
        found.examples.append({"where": where} | ({"text": cut} if cut else {}))


def _line(row: Mapping[str, Any], texts: set[str]) -> bytes:
    """As JSONL. Dates, times and decimals of Parquet are texts in it: their kinds are added to `texts`.
    TypeError names what is neither (bytes).
    """

    def as_text(value: Any) -> str:
        if not isinstance(value, date | clock | timedelta | Decimal | UUID):
            raise TypeError(f"{type(value).__name__}")
        texts.add(f"a {type(value).__name__}")
        return str(value)

    return json.dumps(row, ensure_ascii=False, default=as_text).encode() + b"\n"


def _plain(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _say(text: str) -> None:
    print(f"{text}", file=sys.stderr, flush=True)


_told = [0.0]  # when progress was shown last


def progress(verb: str, read: int, total: int | None, last: bool = False, of_what: str = "rows") -> None:
    """On a terminal a line that is written over; elsewhere one each 30 seconds."""
    terminal, now = sys.stderr.isatty(), time.monotonic()
    if not terminal and (last or now - _told[0] < 30):
        return
    _told[0] = now
    of = f" of {total:,} ({read / total:.0%})" if total else ""
    end = "\n" if last or not terminal else ""
    print(f"{chr(13) * terminal}{verb}: {read:,} {of_what}{of}", end=end, file=sys.stderr, flush=True)


def beside(out: Path, ending: str) -> Path:
    """The file of that ending beside an output."""
    stem, _ = written.named(out)
    return stem.with_name(stem.name + ending)


def begun(given: Namespace, inputs: Inputs, **more: Any) -> Work:
    """The work that the options of a verb ask for: each that is not about places is part of what is done."""
    places = ("out", "outputs", "overwrite", "traceback", "verb")
    asked = {k: v for k, v in vars(given).items() if k not in places}
    return Work(given.verb, given.out, asked, inputs.sha256, overwrite=given.overwrite, **more)
