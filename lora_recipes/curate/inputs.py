"""The rows that a data verb works on, read as recipes read them (data/sources.py), and the text in them.
Imports no torch.
"""

import hashlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes.core import files
from lora_recipes.core.errors import Problem, raise_if
from lora_recipes.core.yamlfile import shown
from lora_recipes.data import sources
from lora_recipes.data.forms import Form
from lora_recipes.data.read import SHOWN, raise_first
from lora_recipes.data.row import Fault, used
from lora_recipes.data.row import faults as row_faults


@dataclass(frozen=True)
class Item:
    """One thing to work on: a row as it stands in its source, or why it could not be read (`fault`).
    `source`: which input it comes from, from 0. `said`: the texts in it, where they were asked for.
    """

    where: str  # file:line
    raw: dict[str, Any]
    source: int = 0
    fault: str = ""
    said: Sequence[str] = ()


@dataclass
class Inputs:
    """Rows of several sources in their order; iterating reads them anew, row by row.

    `columns`: our name of a field -> the sources'. `hub`: name, split and revision of data sets on the hub.
    `texts`: a row without a text that is trained is a fault. `skip_faulty`: faults are items; else they stop
    `survey`. It sets `rows` (of each source, faulty ones included) and `sha256` (of each file).
    """

    paths: Sequence[str]
    columns: dict[str, str]
    hub: dict[str, str]
    texts: bool = False
    skip_faulty: bool = False

    def __post_init__(self) -> None:
        """Nothing is known before `survey`."""
        self.rows: list[int] = []
        self.sha256: dict[str, str] = {}

    def survey(self) -> "Inputs":
        """Read all once, before anything is done with it. RecipeError names the first 20 faults."""
        faults: list[Problem] = []
        self.rows = [0] * len(self.paths)
        for item in self._items(faults):
            self.rows[item.source] += 1
            if len(faults) > 10 * SHOWN and not self.skip_faulty:
                break
        if not self.skip_faulty:
            raise_first(faults, "mend them, or drop them by --skip-faulty")
        empty = [p for p, rows in zip(self.paths, self.rows, strict=True) if not rows]
        raise_if([Problem(path, "has no rows", "leave it out") for path in empty])
        for path in self.paths:
            self.sha256 |= self._hashes(path)
        return self

    def __iter__(self) -> Iterator[Item]:
        """Every row, and every fault in its place."""
        return self._items([])

    def of(self, source: int) -> Iterator[Item]:
        """Those of one source."""
        return self._items([], source)

    def _items(self, faults: list[Problem], only: int | None = None) -> Iterator[Item]:
        """Every row and every fault; faults are added to `faults`, too."""
        for source, path in enumerate(self.paths):
            if only not in (None, source):
                continue
            form, told = Form(None, self.columns, self.columns.get("text", "text")), len(faults)
            for where, raw in sources.rows({"path": path} | self.hub, path, faults, [], _Here()):
                yield from self._faulty(faults[told:], source)
                form.seen |= raw.keys()
                texts = _said(raw, form) if self.texts else []
                lacks = _silent(raw, form) if self.texts and not texts else None
                if lacks:
                    faults.append(Problem(where, *lacks))
                told = len(faults)
                yield Item(where, raw, source, lacks[0] if lacks else "", texts)
            yield from self._faulty(faults[told:], source)
            if form.seen and (missing := form.missing(path)):
                raise_if(missing)

    def _faulty(self, faults: list[Problem], source: int) -> Iterator[Item]:
        for fault in faults:
            if isinstance(fault, sources.Ended) and self.skip_faulty:
                raise_if([fault])  # what follows it would be lost without being counted
            yield Item(fault.where, {}, source, fault.found)

    def _hashes(self, path: str) -> dict[str, str]:
        """SHA-256 of each file that `path` means; of the rows of a data set on the hub."""
        found = files.find(path, Path.cwd())
        members = sources.named(found)
        if members:
            return {shown(file): files.sha256(file) for file in members}
        digest = hashlib.sha256()
        for _, raw in sources.rows({"path": path} | self.hub, path, [], [], _Here()):
            digest.update(json.dumps(raw, default=str).encode())
        return {path: digest.hexdigest()}


class _Here:
    """Where a path of the command line is looked for: in the working folder, then in the repository."""

    def file(self, path: str) -> Path:
        return files.find(path, Path.cwd())

    def looked(self, path: str) -> str:
        return files.looked(path, Path.cwd())


def options(parser: ArgumentParser, shares: bool = False) -> None:
    """IN... and how its rows are read. With `shares` each is IN=SHARE, and faulty rows are not offered to be
    dropped: they would change the shares.
    """
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN=SHARE" if shares else "IN",
        help="a file (JSONL, a JSON array, CSV, TSV, Parquet; .gz, .zst), a folder, a glob, or owner/name on"
        " the hub",
    )
    group = parser.add_argument_group("reading")
    if not shares:
        group.add_argument(
            "--column",
            action="append",
            default=[],
            metavar="OURS=THEIRS",
            help="a field of another name, e.g. prompt=question (data.columns of a recipe)",
        )
        group.add_argument(
            "--skip-faulty",
            action="store_true",
            help="drop what cannot be read or has no text, with the reason (default: nothing is begun)",
        )
    for name in ("name", "split", "revision"):
        group.add_argument(f"--{name}", help=f"{name} of a data set on the hub, as load_dataset takes it")


def of(given: Namespace, texts: bool = False, paths: Sequence[str] = ()) -> Inputs:
    """The inputs that the options name (or `paths`), surveyed."""
    said = getattr(given, "column", [])
    pairs = [word.partition("=") for word in said]
    raise_if([Problem("--column", f"{a!r} names no column", "OURS=THEIRS") for a, _, b in pairs if not b])
    hub = {k: getattr(given, k) for k in ("name", "split", "revision") if getattr(given, k)}
    columns = {ours: theirs for ours, _, theirs in pairs}
    skip = getattr(given, "skip_faulty", False)
    return Inputs(paths or given.inputs, columns, hub, texts, skip).survey()


def _said(raw: dict[str, Any], form: Form) -> list[str]:
    """The texts of a row that are trained, in order, without system turns, whatever form it has; a tool call
    as JSON. Of preference data both answers. Empty where there is none.
    """
    named, _ = form.read(raw)
    value = used(named, form.text_field)
    value |= {k: named[k] for k in ("chosen", "rejected") if named.get(k) is not None}
    fields = (value.get(k) for k in ("prompt", "messages", "text", "completion", "chosen", "rejected"))
    return [text for field in fields for text in _strings(field) if text.strip()]


def _strings(field: Any) -> Iterator[str]:
    """A text, or what the messages of a list say."""
    for message in field if isinstance(field, list) else [field]:
        if isinstance(message, str):
            yield message
        elif isinstance(message, dict) and message.get("role") != "system":
            content = message.get("content")
            for part in content if isinstance(content, list) else [content]:
                text = part.get("text") if isinstance(part, dict) else part
                if isinstance(text, str):
                    yield text
            if message.get("tool_calls"):
                yield json.dumps(message["tool_calls"], ensure_ascii=False)


def _silent(raw: dict[str, Any], form: Form) -> Fault:
    """Why a row has no text that is trained."""
    named, found = form.read(raw)
    found = found or row_faults(named, form.text_field)
    return found[0] if found else ("no text that is trained", "remove the row")
