"""Identifier accuracy: of the names in held-out Python code, the share that a model predicts whole, every
token of it the likeliest, given all that stands before (teacher forcing).
"""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from lora_recipes.core import interval
from lora_recipes.core.record import IdentifierAccuracy
from lora_recipes.curate import python_files, tokens
from lora_recipes.data.render import IGNORED, Example

WORD = re.compile(r"\w+")
PARTS = {"all": "all", "new": "new in the row", "prompt": "in the prompt"}  # -> how it is called


@dataclass(frozen=True)
class Identifier:
    """A name in tokens `start` to `end` of a row, the last not included. `part`: new (it stands nowhere
    before it in the row), prompt (it stands there), or said (only earlier in the reply).
    """

    start: int
    end: int
    part: str


def found(example: Example, tokenizer: Any, kept: range) -> list[Identifier]:
    """The identifiers in the trained replies of `example`, as far as `kept` of it is left: positions count
    from the first token that is. None of them where the tokenizer has no Rust tokenizer behind it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    ids, special = example.input_ids, set(tokenizer.all_special_ids)
    whole = [(0, len(ids))] if not example.turns else [(turn.start, turn.end) for turn in example.turns]
    result = []
    for begin, end in whole:
        text, places = _text(ids[begin:end], backend, special)
        starts, ends = [a for a, _ in places], [b for _, b in places]
        before = _text(ids[kept.start : begin], backend, special)[0]
        asked, said, last = set(WORD.findall(before)), set[str](), 0
        for at, block in python_files.in_text(text):
            for name, offset in tokens.identifiers(block):
                said.update(WORD.findall(text[last : at + offset]))
                last = at + offset
                first, past = bisect.bisect_right(ends, last), bisect.bisect_left(starts, last + len(name))
                first, past = first + begin, past + begin
                part = "prompt" if name in asked else "said" if name in said else "new"
                # The first token that is left is predicted from nothing.
                if kept.start < first and past <= kept.stop and IGNORED not in example.labels[first:past]:
                    result.append(Identifier(first - kept.start, past - kept.start, part))
    return result


def _text(ids: Sequence[int], backend: Any, special: set[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of `ids`, and from where to where each token stands in it. Tokens that hold part of a
    character stand where it does; special ones are no text.
    """
    stream, text, places, parts = DecodeStream(skip_special_tokens=False), "", list[tuple[int, int]](), []
    for i, token in enumerate(ids):
        piece = "" if token in special else stream.step(backend, token)
        places.append((len(text), len(text) + len(piece or "")))
        text += piece or ""
        if piece is None:
            parts.append(i)
        elif piece:
            for part in parts:
                places[part] = places[i]
            parts = []
    return text, places


def accuracy(
    identifiers: Sequence[Sequence[Identifier]],
    base: Sequence[Sequence[bool]],
    trained: Sequence[Sequence[bool]],
) -> dict[str, IdentifierAccuracy] | None:
    """All, those new in the row, and those in its prompt: which share each model predicts, of the
    `identifiers` of each row and whether `base` and `trained` do. None where no row has any.
    """
    result = {}
    for part in PARTS:
        rows = []
        for names, one, other in zip(identifiers, base, trained, strict=True):
            chosen = [i for i, name in enumerate(names) if part in ("all", name.part)]
            rows.append((len(chosen), sum(one[i] for i in chosen), sum(other[i] for i in chosen)))
        rows = [row for row in rows if row[0]]
        if not rows:
            continue
        counts, before, after = (list(column) for column in zip(*rows, strict=True))
        change = interval.per_unit([b - a for a, b in zip(before, after, strict=True)], counts)
        result[part] = IdentifierAccuracy(
            rows=len(rows),
            count=sum(counts),
            base=sum(before) / sum(counts),
            trained=sum(after) / sum(counts),
            half=change.half,
        )
    return result or None


def table(sets: dict[str, dict[str, IdentifierAccuracy] | None], names: dict[str, str]) -> list[str]:
    """For a person. `names`: how a set is called."""
    lines = []
    for which, parts in sets.items():
        for part, row in (parts or {}).items():
            change = interval.Mean(100 * (row.trained - row.base), row.half and 100 * row.half, row.rows)
            sure = "(one row)" if change.half is None else f"+- {change.half:.2f}"
            none = "" if change.shown or row.half is None else "  no difference shown"
            label = f"{names[which] if part == 'all' else '':<10} {PARTS[part]:<14}"
            shares = f"{row.base:>9.1%} {row.trained:>8.1%} {f'{change.value:+.2f} {sure}':>20}"
            lines.append(f"{label} {row.rows:>6,} {row.count:>8,} {shares}{none}")
    if not lines:
        return []
    head = f"{'':<10} {'':<14} {'rows':>6} {'names':>8} {'base':>9} {'trained':>8} {'change, points':>20}"
    return ["identifiers of Python code, predicted whole", head, *lines]
