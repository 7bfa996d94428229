"""Do rows of two splits say the same, or nearly? What is compared is what a person reads, not how it is
written: texts in order without system turns, NFKC, case folded, no invisible characters, white space as one
space. Imports no torch.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from hashlib import blake2b

from lora_recipes.data.row import Row

NEAR = 0.5  # shared word 3-grams as a share of all that either row has (Jaccard)
BOILERPLATE = (0.2, 4, 50)  # a 3-gram in more rows of eval (this share, within these bounds) tells nothing
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # scripts without spaces: each character


def plain(row: Row) -> str:
    """The row's text for comparison: messages, pairs and texts of the same content give the same."""
    return normal("\n".join(row.said))


def normal(text: str) -> str:
    """A text for comparison: NFKC, case folded, no invisible characters, white space as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return " ".join(text.casefold().split())


def digest(row: Row) -> bytes:
    """16 bytes of `plain`: kept in place of the texts."""
    return blake2b(plain(row).encode(), digest_size=16).digest()


def near(train: Iterable[Row], other: list[Row]) -> list[tuple[Row, Row]]:
    """Rows of `other`, each with a row of `train` that it shares at least `NEAR` of its word 3-grams with.

    Exact, not sampled. Memory grows with `other` alone, time with the words of both (20 us a row of 100
    words).
    """
    shingles = [_shingles(row) for row in other]
    holders: dict[int, list[int]] = defaultdict(list)
    for i, own in enumerate(shingles):
        for shingle in own:
            holders[shingle].append(i)
    share, least, most = BOILERPLATE
    many = min(max(share * len(other), least), most)
    common = {shingle for shingle, rows in holders.items() if len(rows) > many}
    shingles = [own - common for own in shingles]
    found: dict[int, Row] = {}
    for row in train if shingles else ():
        own = _shingles(row) - common
        shared = Counter(i for shingle in own for i in holders.get(shingle, ()) if i not in found)
        for i, count in shared.items():
            if count >= NEAR * (len(own) + len(shingles[i]) - count):
                found[i] = row
    return [(other[i], row) for i, row in sorted(found.items())]


def _shingles(row: Row) -> set[int]:
    words = WORD.findall(plain(row))
    return {hash(tuple(words[i : i + 3])) for i in range(max(len(words) - 2, 1))}
