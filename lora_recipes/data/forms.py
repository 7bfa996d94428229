"""The forms a row may have where it comes from, and the one it is trained in: ShareGPT and Alpaca become
messages, columns get their own names. Imports no torch.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lora_recipes.core.errors import Problem, listed
from lora_recipes.data.row import DECODER, ROLES, Fault

# data.format -> the fields that make a row one of its kind; `text` is what train.dataset_text_field names
FIELDS_OF = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
MAY = {"alpaca": ("input", "history")}  # what a row of that form may have besides
BESIDE = ("system", "tools", "chat_template_kwargs")  # what any conversation may have besides
FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
TURN = '{"from": "human", "value": ...}'
SETS = "set data.format, or format of the source: messages, sharegpt, alpaca, completion or text"


@dataclass
class Form:
    """How the rows of one source are read. `seen` are the columns that any row had, `unused` those that were
    not read, `found` counts the rows of each form, `systems` those whose system turn is a column.
    """

    format: str | None
    columns: dict[str, str]  # our name -> the source's
    text_field: str
    found: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    systems: int = 0

    def read(self, raw: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
        """A row by our names, as messages, prompt/completion or text; or what keeps it from being one."""
        self.seen |= raw.keys()
        theirs = {name: ours for ours, name in self.columns.items() if ours != "text"}
        row = {k: v for k, v in raw.items() if k not in theirs and k not in theirs.values()}
        self.unused |= {k for k in theirs.values() if raw.get(k) is not None and k not in theirs}
        row |= {ours: raw[name] for name, ours in theirs.items() if name in raw}
        kind, faults = self._kind(row)
        if faults or kind is None:
            return row, faults
        if self.format:  # what another form would read is not read
            others = {name for form in FIELDS_OF if form != kind for name in self._fields(form)}
            others -= {*self._fields(kind), *MAY.get(kind, ())}
            self.unused |= {k for k in others if row.get(k) is not None}
            row = {k: v for k, v in row.items() if k not in others}
        self.found[kind] += 1
        if kind in ("sharegpt", "alpaca"):
            return _sharegpt(row) if kind == "sharegpt" else _alpaca(row)
        return row, []

    def _fields(self, form: str) -> tuple[str, ...]:
        return (self.text_field,) if form == "text" else FIELDS_OF[form]

    def _kind(self, row: dict[str, Any]) -> tuple[str | None, list[Fault]]:
        """The form of a row; None where it has none (`row.faults` says why), a fault where it is in doubt."""
        has = {k for k, v in row.items() if v is not None}
        if self.format:
            if missing := [k for k in self._fields(self.format) if k not in has]:
                found = f"no {' and '.join(missing)} (format: {self.format}), but {listed(map(repr, row))}"
                return None, [(found, "name the column in data.columns, or in columns of the source")]
            return self.format, []
        kinds = [form for form in FIELDS_OF if has >= set(self._fields(form))]
        if len(kinds) > 1 and {"sharegpt", "alpaca"} & set(kinds):
            names = " and ".join("/".join(self._fields(form)) for form in kinds)
            return None, [(f"both {names}: {' or '.join(kinds)}", SETS)]
        return (kinds[0] if kinds else None), []

    def missing(self, at: str) -> list[Problem]:
        """The columns that are named and that no row has."""
        return [
            Problem(
                at,
                f"no row has the column {name!r} (columns.{ours})",
                f"there are {listed(sorted(self.seen))}",
            )
            for ours, name in self.columns.items()
            if name not in self.seen
        ]

    def notes(self) -> list[str]:
        """What was found by itself, and what became of it."""
        said = [
            f"{count:,} rows read as {kind} (data.format){': ' + how if how else ''}"
            for kind, count in self.found.items()
            if (how := _HOW.get(kind)) and (not self.format or kind == "alpaca")
        ]
        return said + (
            [f"the system column of {self.systems:,} rows is their system turn"] if self.systems else []
        )


_HOW = {
    "sharegpt": "from/value are messages",
    "alpaca": "instruction, a line break and input are the user's turn, output is the reply",
}


def _sharegpt(row: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """`conversations` as messages; other keys of a turn (weight, train) stay."""
    turns, rest = _decoded(row["conversations"]), {k: v for k, v in row.items() if k != "conversations"}
    if not isinstance(turns, list):
        return row, [("conversations is not a list", f"write [{TURN}, ...]")]
    messages, faults = [], []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            is_chat = isinstance(turn, dict) and "role" in turn
            do = (
                "these are messages: data.columns: {messages: conversations}"
                if is_chat
                else f"a turn is {TURN}"
            )
            faults.append((f"conversations[{i}] has no from and value", do))
        elif not isinstance(turn["from"], str) or turn["from"] not in FROM:
            do = f"one of {', '.join(FROM)}"
            faults.append((f"conversations[{i}] has the unknown from {turn['from']!r}", do))
        else:
            others = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
            messages.append({"role": FROM[turn["from"]], "content": turn["value"]} | others)
    return (row, faults) if faults else (rest | {"messages": messages}, [])


def _alpaca(row: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The turns of `history`, then `instruction` and, on the next line, `input` as the user, `output` as the
    assistant, as LLaMA-Factory joins them.
    """
    names = ("instruction", "input", "output", "history")
    rest = {k: v for k, v in row.items() if k not in names}
    history = _decoded(row.get("history") or [])
    faults = [
        (f"{k} is not a text", "it is trained as one turn")
        for k in names[:3]
        if row.get(k) is not None and not isinstance(row[k], str)
    ]
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        faults.append(("history is not a list of pairs", 'write [["question", "answer"], ...]'))
    if faults:
        return row, faults
    asked = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    pairs = [*history, (asked, row["output"])]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return rest | {"messages": turns}, []


def _decoded(value: Any) -> Any:
    """`value`, out of its JSON text where it is one (CSV)."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return DECODER.decode(value)
    return value


def with_system(value: dict[str, Any], system: Any) -> tuple[dict[str, Any], list[Fault]]:
    """`value` of a sound row with the text of its system column as its first turn; rows of text have none
    (`row.faults` refuses the column there).
    """
    name = "prompt" if "prompt" in value else "messages"
    if system in (None, "") or not isinstance(value.get(name), list):
        return value, []
    first = value[name][0]
    if not isinstance(system, str):
        return value, [("system is not a text", "it is put first as the system turn")]
    if first["role"] == ROLES[0]:
        same = first.get("content") == system
        do = "keep one of the two"
        return value, [] if same else [("system, beside a system turn that says something else", do)]
    return value | {name: [{"role": ROLES[0], "content": system}, *value[name]]}, []
