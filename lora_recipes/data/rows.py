"""Checked rows as they lie on the disk: Arrow files, memory-mapped, so that memory hardly grows with their
number (166 MiB for a million); read as `Example`s, and handed to the trainer as they are.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from lora_recipes.data import mix, read
from lora_recipes.data.render import Counts, Example
from lora_recipes.data.row import Row

# What is kept of an example, in two files: what is trained, and what is counted, so that counting does not
# touch the larger one. `input_ids` and `labels` are as trained, `kept` of the `length` tokens; `last`: the
# largest id; `plain`, `content` and `tokens`: what stands for its text as compared, its row as given, and
# its ids with labels; the counts: those of `render.Measured`.
TRAINED = Features(
    {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "where": Value("string")}
)
NUMBERS = (
    "source",
    "row",
    "length",
    "kept",
    "supervised",
    "dropped",
    "turns",
    "faithful",
    "open_turns",
    "last",
)
COUNTED = Features(
    {name: Value("int32") for name in NUMBERS}
    | {"plain": Value("uint64"), "content": Value("binary"), "tokens": Value("binary")}
)
FILES = {".arrow": TRAINED, ".counts.arrow": COUNTED}  # what follows the split's name -> what is in the file
ROWS = 4096  # that are written, or hashed, at once
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Told:
    """What is known of a split besides its examples: the `entries` of its sources and how many sound rows
    each has, its first rows (`head`), what to note. `counted`: are the tokens those of a tokenizer?
    """

    entries: list[dict[str, Any]]
    rows: list[int]
    head: list[Row]
    notes: list[str]
    counted: bool
    by: str


class Rows(Sequence[Example]):
    """The examples of a split in the order of one epoch, as its sources' weights and shares say. `data` and
    `counted`: its files in `folder`, in the order that they were read.
    """

    def __init__(self, folder: Path, which: str, told: Told):
        self.told = told
        self.data, self.counted = (Dataset.from_file(str(folder / f"{which}{end}")) for end in FILES)
        places = self._column("source"), self._column("row")
        self.order = mix.order(told.entries, told.rows, *places, self._column("kept"), told.by)

    def part(self, indices: Array) -> "Rows":
        """Some of them, in that order."""
        made = copy.copy(self)
        for known in ("dataset", "counts"):
            made.__dict__.pop(known, None)
        made.order = self.order[indices]
        return made

    def _column(self, name: str) -> Array:
        found: Array = self.counted.data.column(name).to_numpy()
        return found

    def __len__(self) -> int:
        """How many examples an epoch has."""
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """One as trained, its replies left out; or a list of them."""
        if isinstance(index, slice):
            return [self._example(int(i)) for i in self.order[index]]
        return self._example(int(self.order[index]))

    def _example(self, i: int) -> Example:
        row = self.data[i]
        return Example(row["where"], row["input_ids"], row["labels"])

    def __getattr__(self, name: str) -> Any:
        """A column of numbers (`length`, `supervised`, `last`, ...) in the order of the epoch."""
        if name not in NUMBERS:
            raise AttributeError(name)
        return self._column(name)[self.order]

    @property
    def lengths(self) -> Array:
        """Tokens of each example as trained."""
        return self._column("kept")[self.order]

    @property
    def plain(self) -> Array:
        """64 bits for the text of each (`overlap.digest`)."""
        return self._column("plain")[self.order]

    def where(self, index: int) -> str:
        """The place of one: file:line."""
        return str(self.data.data.column("where")[int(self.order[index])])

    @property
    def sha256(self) -> str:
        """As `read.Split.sha256`."""
        return read.sha256(self._bytes("content"))

    @property
    def tokens_sha256(self) -> str:
        """Hash of all tokens and labels in order."""
        return read.sha256(self._bytes("tokens"))

    def _bytes(self, name: str) -> Iterator[bytes]:
        fixed = [chunk.cast(pa.binary(16)) for chunk in self.counted.data.column(name).chunks]
        parts = [np.frombuffer(c.buffers()[1], "V16")[c.offset : c.offset + len(c)] for c in fixed if len(c)]
        flat = np.concatenate([*parts, np.empty(0, "V16")])
        return (flat[self.order[i : i + ROWS]].tobytes() for i in range(0, len(self.order), ROWS))

    @cached_property
    def dataset(self) -> Dataset:
        """`input_ids` and `labels` of all that has a trained token, or is to be packed: what SFTTrainer
        gets.
        """
        chosen = self.order[self.dropped == 0]
        columns = self.data.select_columns(["input_ids", "labels"])
        whole = len(chosen) == len(self.data) and bool((chosen == np.arange(len(self.data))).all())
        return columns if whole else columns.select(chosen)

    @cached_property
    def counts(self) -> Counts:
        """What the split looks like after truncation."""
        result = Counts(
            rows=len(self),
            truncated=int((self.lengths < self.length).sum()),
            **{k: int(getattr(self, k).sum()) for k in ("dropped", "turns", "faithful", "open_turns")},
        )
        if self.told.counted:
            result.tokens, result.supervised = int(self.lengths.sum()), int(self.supervised.sum())
            result.longest = int(self.lengths.max(initial=0))
        return result
