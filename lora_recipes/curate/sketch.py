"""What texts are compared by: a digest, the set of their word n-grams, and its MinHash; in files that grow
with the rows, so that memory does not. Imports no torch.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from lora_recipes.core import cli
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.data.overlap import WORD, normal

PERMUTATIONS = 128  # numbers of 32 bits in a signature
FOUND = 0.995  # share of the pairs at the threshold that must become candidates
SEED = 1
# `grams` and `where` end there in their files; `held`: by which text of an evaluation set, -1 by none
RECORD = np.dtype(
    [
        ("digest", "V16"),
        ("signature", "<u4", PERMUTATIONS),
        ("grams", "<u8"),
        ("where", "<u8"),
        ("held", "<i8"),
        ("share", "<f4"),
    ]
)
Grams = np.ndarray  # sorted 64-bit hashes of the n-grams of a text, each once


def rensa() -> Any:
    """The library's MinHash. RecipeError says how it is installed."""
    try:
        from rensa import RMinHash
    except ImportError:
        do = f"{cli.extra('curate')}; or --exact"
        raise RecipeError(Problem("dedupe", "near duplicates need the library rensa", do)) from None
    return RMinHash


def grams(texts: Sequence[str], size: int) -> Grams:
    """The word n-grams of a row's texts; scripts without spaces: each character is a word. A text of fewer
    words is one n-gram.
    """
    plain = normal("\n".join(texts))
    words = WORD.findall(plain) or [plain]
    joined = [" ".join(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))]
    return np.unique(np.array(rensa().hash_token_sets([joined])[0], dtype=np.uint64))


def digest(texts: Sequence[str]) -> bytes:
    """16 bytes of a row's texts as they are compared."""
    return blake2b(normal("\n".join(texts)).encode(), digest_size=16).digest()


def jaccard(one: Grams, other: Grams) -> float:
    """What both have, as a share of what either has."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many numbers: the longest that make candidates of FOUND of all pairs whose
    Jaccard similarity is the threshold (a pair becomes one if the numbers of any band are equal).
    """
    fits = [r for r in range(1, 17) if found(threshold, PERMUTATIONS // r, r) >= FOUND]
    rows = max(fits, default=1)
    return PERMUTATIONS // rows, rows


def found(similarity: float, bands: int, rows: int) -> float:
    """Share of the pairs of that similarity that become candidates."""
    return 1 - (1 - similarity**rows) ** bands


class Sketches:
    """The sketches of rows, in files of a folder. What a killed run has written whole is kept: `count`
    rows.
    """

    def __init__(self, folder: Path):
        self.paths = {name: folder / f"sketch.{name}" for name in ("grams", "where", "records")}
        for path in self.paths.values():
            path.touch()
        size = {name: path.stat().st_size for name, path in self.paths.items()}
        records = self._mapped("records", RECORD)
        whole = (records["grams"] <= size["grams"]) & (records["where"] <= size["where"])
        self.count = int(whole.sum())
        self.end = {
            name: int(records[name][self.count - 1]) if self.count else 0 for name in ("grams", "where")
        }
        kept = self.end | {"records": self.count * RECORD.itemsize}
        for name, path in self.paths.items():
            os.truncate(path, kept[name])

    def _mapped(self, name: str, kind: np.dtype) -> np.ndarray:
        """A file as an array on the disk."""
        count = self.paths[name].stat().st_size // kind.itemsize
        return np.memmap(self.paths[name], kind, "r", shape=(count,)) if count else np.empty(0, kind)

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Open for `add`; after it for reading: `records`, `grams`, `where`."""
        with contextlib.ExitStack() as stack:
            self.files = {n: stack.enter_context(p.open("ab")) for n, p in self.paths.items()}
            yield
        self.records = self._mapped("records", RECORD)
        self.all_grams, self.all_where = (
            self._mapped(name, np.dtype(kind)) for name, kind in (("grams", "<u8"), ("where", "u1"))
        )

    def add(
        self,
        digests: Sequence[bytes],
        sets: Sequence[Grams],
        wheres: Sequence[str],
        held: Sequence[tuple[int, float]],
    ) -> None:
        """Some rows; of one without texts the set is empty. Records come last: they say what is whole."""
        records = np.zeros(len(sets), RECORD)
        if any(map(len, sets)):
            flat, ends = np.concatenate(sets), np.cumsum([0, *map(len, sets)])
            matrix = rensa().digest_matrix_from_flat_token_hashes(flat, ends.tolist(), PERMUTATIONS, SEED)
            records["signature"] = matrix.to_rows()
        texts = [where.encode() for where in wheres]
        for name, parts in (("grams", [own.tobytes() for own in sets]), ("where", texts)):
            records[name] = self.end[name] + np.cumsum([len(part) for part in parts])
            self.end[name] = int(records[name][-1])
            self.files[name].write(b"".join(parts))
            self.files[name].flush()
        records["digest"] = np.frombuffer(b"".join(digests), "V16")
        records["held"], records["share"] = zip(*held, strict=True)
        self.files["records"].write(records.tobytes())
        self.files["records"].flush()
        self.count += len(sets)

    def where(self, row: int) -> str:
        """`file:line` of a row."""
        start = int(self.records["where"][row - 1]) if row else 0
        return bytes(self.all_where[start : int(self.records["where"][row])]).decode()

    def grams(self, row: int) -> Grams:
        """The n-grams of a row."""
        start = int(self.records["grams"][row - 1]) if row else 0
        return self.all_grams[start // 8 : int(self.records["grams"][row]) // 8]
