"""Read every row of the data before training, and name file:line for each fault. Imports no
torch.
"""

import hashlib
import itertools
import json
import random
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_recipes.core import hub, yamlfile
from lora_recipes.core.errors import Problem, raise_if
from lora_recipes.data import overlap
from lora_recipes.data.row import FIELDS, Fault, Row, control, off, used
from lora_recipes.data.row import faults as row_faults
from lora_recipes.recipe.recipe import Recipe

SHOWN = 20  # faults listed one by one; the rest are counted

# Bytes of one line, and so of one row: ten million tokens and more. A file without line breaks would be read
# whole before anything is known of it.
LINE = 32 * 2**20


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
    sources, text_field = getattr(recipe.data, which) or [], recipe.train.dataset_text_field
    split, first = Split(), None
    faults: list[Problem] = []
    for number, source in enumerate([sources] if isinstance(sources, str) else sources):
        at = recipe.at("data", which, *([] if isinstance(sources, str) else [number]))
        entry: dict[str, Any] = {"path": source} if isinstance(source, str) else source
        rows, unused, before = [], set(), len(faults)
        for where, raw in _records(entry, at, faults, recipe):
            row = Row(where, used(raw, text_field))
            found = row_faults(raw, text_field) or _mixed(row, first or row) or _unwanted(row, recipe)
            faults += [Problem(where, *fault) for fault in found]
            unused |= {k for k, v in raw.items() if v is not None} - {*FIELDS, text_field}
            if not found:
                rows.append(row)
                first = first or row
        if unused:
            split.notes.append(f"{which}: fields not used for training: {', '.join(sorted(unused))}")
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


def _records(
    source: dict[str, Any], at: str, faults: list[Problem], recipe: Recipe
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a source with its file:line. What cannot be read as a row is added to `faults`."""
    path = recipe.file(source["path"])
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source["path"]) and path.suffix not in (
        ".jsonl",
        ".json",
        ".csv",
        ".parquet",
        ".txt",
    )
    if hub_name and not path.exists():
        yield from _hub(source, at, faults)
        return
    name = yamlfile.shown(path)
    if options := [k for k in ("name", "split", "revision") if k in source]:
        faults.append(
            Problem(
                at,
                f"{' and '.join(options)} would be ignored",
                f"{name} is a file, not a data set on the hub",
            )
        )
    if wrong := _no_file(path):
        faults.append(
            Problem(at, f"{name} is {wrong}", "rows are read more than once: write them into a file")
        )
        return
    try:
        yield from _lines(path, name, faults)
    except OSError as error:
        do = "give a JSONL file, or owner/name of a data set on the hub"
        looked = "" if path.exists() else recipe.looked(source["path"])
        which = source["path"] if looked else name
        faults.append(
            Problem(at, f"{which} cannot be read ({error.strerror})", f"{looked}; {do}" if looked else do)
        )


def _no_file(path: Path) -> str:
    """What `path` is, when reading it would wait for a writer or never end; empty for a file, for a folder
    and where nothing is.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    kinds = {
        stat.S_ISFIFO: "a pipe",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISSOCK: "a socket",
    }
    passing = path.is_absolute() and path.parts[1] in ("dev", "proc") and not stat.S_ISDIR(mode)
    return next((what for kind, what in kinds.items() if kind(mode)), "no file that stays" if passing else "")


def _lines(path: Path, name: str, faults: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL file, a line at a time."""
    with path.open("rb") as file:
        begun = False  # blank lines first are no content
        for number in itertools.count(1):
            if not (line := file.readline(LINE + 1)):
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            where = f"{name}:{number}"
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                faults.append(Problem(where, "UTF-16, not UTF-8", "save the file as UTF-8"))
                return
            if not begun and line.lstrip()[:1] == b"[":
                do = "write one row a line (JSONL): jq -c '.[]' in.json > out.jsonl"
                faults.append(Problem(f"{name}:1", "a JSON list", do))
                return
            if len(line) > LINE:
                found = f"a line of more than {LINE // 2**20} MiB"
                faults.append(
                    Problem(where, found, "one row a line (JSONL); cut what is longer than a context")
                )
                return
            begun = begun or bool(line.strip())
            found_row = _parsed(line.removesuffix(b"\n")) if line.strip() else None
            if isinstance(found_row, dict):
                yield where, found_row
            elif found_row:
                faults.append(Problem(where, *found_row))


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


class _Twice(ValueError):
    """A key that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Twice(next(key for key, times in Counter(k for k, _ in pairs).items() if times > 1))
    return value


def _parsed(line: bytes) -> dict[str, Any] | Fault:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be made into tokens
    except UnicodeDecodeError as error:
        return (
            f"not UTF-8 (byte {line[error.start]:#x} at column {error.start + 1})",
            "save the file as UTF-8",
        )
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800..\\udfff)", "repair the text that was cut there"
    except _Twice as error:
        return (
            f"the key {str(error)!r} stands twice in one object",
            "keep one: JSON takes the last in silence",
        )
    except json.JSONDecodeError as error:
        return f"broken JSON: {error.msg} at column {error.colno}", "one whole JSON object a line"
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of more than 4,300 digits; brackets a thousand deep
        return f"JSON that Python cannot read: {error}", ""
    return (
        value
        if isinstance(value, dict)
        else (f"a {type(value).__name__}, not an object", 'write {"messages": [...]}')
    )


def _hub(source: dict[str, Any], at: str, faults: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import config, load_dataset  # 1 s to import, and only hub data needs it

    options, split = (
        {k: v for k, v in source.items() if k in ("name", "revision")},
        source.get("split", "train"),
    )
    unreachable, offline = hub.silent(), config.HF_HUB_OFFLINE
    # Then it comes from the cache or fails, without the retries.
    config.HF_HUB_OFFLINE = offline or bool(unreachable)
    try:
        loaded = load_dataset(source["path"], split=split, **options)
    except Exception as error:  # every kind of network, hub and format error; its first line says which
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = (
            f"the hub does not give it ({unreachable}), and it is not in the cache" if unreachable else first
        )
        do = "a local file ends in .jsonl; a data set on the hub is owner/name"
        faults.append(Problem(at, f"the data set {source['path']} cannot be loaded: {why}", do))
        return
    finally:
        config.HF_HUB_OFFLINE = offline
    for number, value in enumerate(loaded):
        yield f"{source['path']}[{split}] row {number}", dict(value)


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
