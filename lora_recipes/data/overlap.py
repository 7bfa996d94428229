"""Do rows of two splits say the same, or nearly? What is compared is what a person reads, not how it is
written: texts in order without system turns, NFKC, case folded, no invisible characters, white space as one
space. Imports no torch.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from lora_recipes.data.row import Row

NEAR = 0.5  # shared word 3-grams as a share of all that either row has (Jaccard)
BOILERPLATE = (0.2, 4, 50)  # a 3-gram in more rows of eval (this share, within these bounds) tells nothing
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # scripts without spaces: each character
Array = np.ndarray[Any, Any]


def plain(row: Row) -> str:
    """The row's text for comparison: messages, pairs and texts of the same content give the same."""
    return normal("\n".join(row.said))


def normal(text: str) -> str:
    """A text for comparison: NFKC, case folded, no invisible characters, white space as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return " ".join(text.casefold().split())


def digest(text: str) -> int:
    """64 bits of a `plain` text: kept in its place. Two texts of a million are taken for one by a chance of
    3e-8.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def repeated(digests: Array, where: Callable[[int], str]) -> Array:
    """Which rows say what an earlier one says, that stands elsewhere (a file may be read twice, and a source
    be taken more than once). `where`: the place of a row by its index.
    """
    order, found = np.argsort(digests, kind="stable"), np.zeros(len(digests), dtype=bool)
    own = digests[order]
    begins = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]])) if len(own) else order
    for place in np.setdiff1d(np.arange(len(own)), begins, assume_unique=True).tolist():
        first = order[begins[np.searchsorted(begins, place, "right") - 1]]
        found[order[place]] = where(int(order[place])) != where(int(first))
    return found


def shingles(text: str) -> Array:
    """The word 3-grams of a `plain` text, each once, as numbers: the same in this process and those that it
    forks.
    """
    words = WORD.findall(text)
    found = {hash(tuple(words[i : i + 3])) & MASK for i in range(max(len(words) - 2, 1))}
    return np.fromiter(found, dtype=np.uint64, count=len(found))


MASK = 2**64 - 1


class Near:
    """The held-out rows, by their `shingles`, to ask which of them nearly stand in train.

    Exact, not sampled. Memory grows with the held-out rows alone (16 bytes a word), time with the words of
    both.
    """

    def __init__(self, held_out: list[Array]):
        share, least, most = BOILERPLATE
        many = min(max(share * len(held_out), least), most)
        whole = np.concatenate([*held_out, np.empty(0, np.uint64)])
        grams, counts = np.unique(whole, return_counts=True)
        self.common = grams[counts > many]
        sizes = np.array([len(own) for own in held_out], dtype=np.int64)
        rows = np.repeat(np.arange(len(held_out)), sizes)
        told = ~np.isin(whole, self.common)
        whole, rows = whole[told], rows[told]
        order = np.argsort(whole, kind="stable")
        self.grams, self.rows = whole[order], rows[order]
        self.sizes = np.bincount(rows, minlength=len(held_out))
        self.found: set[int] = set()

    def look(self, own: Array) -> None:
        """Add to `found` the held-out rows that a row of train with the shingles `own` nearly is."""
        begin, end = np.searchsorted(self.grams, own, "left"), np.searchsorted(self.grams, own, "right")
        if not (end > begin).any():
            return
        size = len(own) - int(np.isin(own, self.common).sum())
        shared = Counter(int(i) for a, b in zip(begin, end, strict=True) for i in self.rows[a:b])
        for i, count in shared.items():
            if count >= NEAR * (size + int(self.sizes[i]) - count):
                self.found.add(i)


def near(train: Sequence[Row], other: Sequence[Row]) -> list[Row]:
    """Rows of `other` that share at least `NEAR` of their word 3-grams with a row of `train`."""
    found = Near([shingles(plain(row)) for row in other])
    for row in train:
        found.look(shingles(plain(row)))
    return [other[i] for i in sorted(found.found)]
