"""The gate: read every row of the data before training, and name file:line for each fault. Imports no torch."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_recipes import yamlfile
from lora_recipes.messages import Problem, RecipeError
from lora_recipes.recipe import Recipe, rooted

ROLES = ("system", "user", "assistant", "tool")
FORMATS = ("messages", "prompt/completion", "text")
SHOWN = 20  # faults listed one by one; the rest are counted


@dataclass(frozen=True)
class Row:
    """One example: `value` holds `messages`, or `prompt` and `completion`, or `text` (and `tools`); `where` is file:line."""

    where: str
    value: dict[str, Any]

    @property
    def format(self) -> str:
        """`messages`, `prompt/completion` or `text`."""
        return "prompt/completion" if "prompt" in self.value else "messages" if "messages" in self.value else "text"

    @property
    def key(self) -> str:
        """The row's content as text: two rows with the same key are exact duplicates."""
        return json.dumps(self.value, sort_keys=True, ensure_ascii=False)


@dataclass
class Split:
    """The rows of data.train or data.eval, in the order they are trained, and what was noticed while reading them."""

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
        """Rows whose content already stood in an earlier row (a source's weight above 1 does not count)."""
        seen: dict[str, str] = {}
        return [row for row in self.rows if seen.setdefault(row.key, row.where) != row.where]


def read(recipe: Recipe, which: str) -> Split:
    """The rows of `data.train` or `data.eval` (`which`), checked; RecipeError lists the first 20 faults and counts the rest."""
    sources = recipe.data.get(which)
    split, faults = Split(), []
    for number, source in enumerate([sources] if isinstance(sources, str) else sources or []):
        entry = {"path": source} if isinstance(source, str) else source
        at = recipe.at("data", which) if isinstance(sources, str) else recipe.at("data", which, number)
        rows, unused = [], set()
        for where, raw in _records(entry, at, faults):
            value = {k: v for k, v in raw.items() if k in ("messages", "prompt", "completion", "text", "tools")}
            unused |= set(raw) - set(value)
            found = row_faults(raw, recipe.train.get("dataset_text_field", "text"))
            faults += [Problem(where, *fault) for fault in found]
            rows.append(Row(where, value))
        if unused:
            split.notes.append(f"{which}: fields not used for training: {', '.join(sorted(unused))}")
        split.rows += _weighted(rows, entry.get("weight", 1), recipe.train.get("seed", 42))
    faults += _mixed(split.rows)
    if faults:
        rest = [Problem(f"data.{which}", f"{len(faults) - SHOWN} more faults")] if len(faults) > SHOWN else []
        raise RecipeError(faults[:SHOWN] + rest)
    if sources and not split.rows:
        raise RecipeError(Problem(recipe.at("data", which), "no rows", "the file is empty"))
    return split


def by_assistant_turn(split: Split) -> Split:
    """`data.rows: assistant_turn`: for each assistant turn a row of its own, its history as the prompt and the turn as completion."""
    rows = []
    for row in split.rows:
        if row.format != "messages":
            rows.append(row)
            continue
        tools = {"tools": row.value["tools"]} if row.value.get("tools") else {}
        for i, message in enumerate(row.value["messages"]):
            if message["role"] == "assistant":
                rows.append(Row(f"{row.where}#{i + 1}", {"prompt": row.value["messages"][:i], "completion": [message]} | tools))
    return Split(rows, split.notes)


def in_both(train: Split, other: Split) -> list[Row]:
    """Rows of `other` (eval) whose content also stands in `train`."""
    keys = {row.key for row in train.rows}
    return [row for row in other.rows if row.key in keys]


def _records(source: dict[str, Any], at: str, faults: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    path = rooted(source["path"])
    if path.suffix in (".jsonl", ".json") or path.exists():
        return _jsonl(path, at, faults)
    return _hub(source, at)


def _jsonl(path: Path, at: str, faults: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = yamlfile.shown(path)
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise RecipeError(Problem(at, f"{name} cannot be read ({error.strerror})", "give a JSONL file, or a data set on the hub")) from None
    if content.lstrip()[:1] == b"[":
        raise RecipeError(Problem(f"{name}:1", "a JSON list", "write one row a line (JSONL): jq -c '.[]' in.json > out.jsonl"))
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be tokenised
        except UnicodeDecodeError as error:
            faults.append(Problem(where, f"not UTF-8 (byte {line[error.start]:#x} at column {error.start + 1})", "save the file as UTF-8"))
        except UnicodeEncodeError:
            faults.append(Problem(where, "half of a surrogate pair (\\ud800..\\udfff)", "repair the text that was cut there"))
        except json.JSONDecodeError as error:
            faults.append(Problem(where, f"broken JSON: {error.msg} at column {error.colno}"))
        else:
            if isinstance(value, dict):
                yield where, value
            else:
                faults.append(Problem(where, f"a {type(value).__name__}, not an object", 'write {"messages": [...]}'))


def _hub(source: dict[str, Any], at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    options = {k: v for k, v in source.items() if k in ("name", "revision")}
    split = source.get("split", "train")
    try:
        rows: Iterable = load_dataset(source["path"], split=split, **options)
    except Exception as error:  # every kind of network, hub and format error; the first line says which
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        do = "a local file ends in .jsonl; a hub data set is owner/name (is there a network?)"
        raise RecipeError(Problem(at, f"the data set {source['path']} cannot be loaded: {first}", do)) from error
    for number, value in enumerate(rows):
        yield f"{source['path']}[{split}] row {number}", {k: v for k, v in value.items() if v is not None}


def _weighted(rows: list[Row], weight: float, seed: int) -> list[Row]:
    """`weight` copies of all rows; a fraction takes that share of them, drawn with the seed, in their order."""
    whole, part = int(weight), weight - int(weight)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), round(part * len(rows))))
    return rows * whole + [rows[i] for i in chosen]


def row_faults(value: dict[str, Any], text_field: str = "text") -> list[tuple[str, str]]:
    """What is wrong with one row, as (found, what to do) pairs; empty when it can be trained on."""
    if text_field != "text" and text_field in value:
        value = value | {"text": value[text_field]}
    has_pair, kinds = "prompt" in value or "completion" in value, [k for k in ("messages", "text") if k in value]
    if len(kinds) + has_pair > 1:
        return [(f"both {' and '.join([*kinds, *['prompt/completion'] * has_pair])}", "keep one; the trainer would silently choose")]
    if has_pair:
        missing = [k for k in ("prompt", "completion") if value.get(k) is None]
        return [(f"{missing[0]} is missing or null", "")] if missing else _pair_faults(value["prompt"], value["completion"])
    if "messages" in value:
        return _message_faults(value["messages"], "messages", needs_assistant=True)
    if "text" in value:
        good = isinstance(value["text"], str) and value["text"].strip()
        return [] if good else [("text is empty or not a string", "")]
    return [(f"no messages, prompt/completion or text, but {', '.join(map(repr, value)) or 'nothing'}", "rename the field")]


def _pair_faults(prompt: Any, completion: Any) -> list[tuple[str, str]]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return [] if completion.strip() else [("completion is empty", "")]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return [("prompt and completion must both be strings or both be lists of messages", "")]
    faults = _message_faults(prompt, "prompt", needs_assistant=False)
    faults += _message_faults(completion, "completion", needs_assistant=True, start=len(prompt))
    if not faults and [prompt[-1]["role"], completion[0]["role"]] == ["user", "user"]:
        faults.append(("two user turns in a row", "the completion begins with the assistant's turn"))
    if not faults and prompt[-1]["role"] == "assistant":
        faults.append(("the prompt ends with an assistant turn", "it ends with what the assistant answers"))
    return faults


def _message_faults(messages: Any, name: str, needs_assistant: bool, start: int = 0) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        return [(f"{name} is {'empty' if messages == [] else 'not a list'}", 'write [{"role": ..., "content": ...}, ...]')]
    faults, before = [], None
    for i, message in enumerate(messages):
        at = f"{name}[{i}]"
        if not isinstance(message, dict) or "role" not in message:
            faults.append((f"{at} has no role", "a message is an object with role and content"))
            continue
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            faults.append((f"{at} has the unknown role {role!r}", f"one of {', '.join(ROLES)}"))
        if role == "system" and start + i > 0:
            faults.append((f"{at} is a system turn, but not the first", "templates drop or refuse it"))
        if role == "user" and before == "user":
            faults.append((f"two user turns in a row at {at}", "join them, or add the reply that is missing"))
        if role == "assistant" and before == "assistant":
            faults.append((f"two assistant turns in a row at {at}", "join them"))
        if role == "assistant" and start + i == 0:
            faults.append((f"{at}: the conversation begins with the assistant", "begin with a user (or system) turn"))
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            kind = "missing" if "content" not in message else "null" if content is None else f"of type {type(content).__name__}"
            faults.append((f"{at} content is {kind}", "content is a string"))
        elif isinstance(content, str) and not content.strip() and not message.get("tool_calls"):
            faults.append((f"{at} content is empty", "drop the turn or the row"))
        before = role
    if needs_assistant and not faults and not any(m["role"] == "assistant" for m in messages):
        faults.append((f"{name} has no assistant turn", "there is nothing to learn in it"))
    return faults


def _mixed(rows: list[Row]) -> list[Problem]:
    """The trainer decides by the first row how all are read; a row of another kind would be read wrongly, in silence."""
    if not rows:
        return []
    kind = (rows[0].format, isinstance(rows[0].value.get("prompt"), str))
    faults = []
    for row in rows:
        if (row.format, isinstance(row.value.get("prompt"), str)) != kind:
            do = "one schema for all rows; convert these or make them a recipe of their own"
            faults.append(Problem(row.where, f"{row.format}, but {rows[0].where} is {rows[0].format}: mixed schemas", do))
    return faults
