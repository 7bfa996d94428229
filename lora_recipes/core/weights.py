"""The weights of a model folder, in the format and order in which transformers takes them: safetensors, else
PyTorch's own (`pytorch_model.bin`); one file, or several with an index. Imports torch only to read values, or
the latter.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes.core import safetensors
from lora_recipes.core.errors import listed

NAMES = ("model.safetensors", "pytorch_model.bin")
# The dtypes of torch in the words of safetensors; others keep their own.
_WORDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
}
_STEP = 2**22  # bytes read at once
_PART = 2**25  # bytes compared at once


@dataclass(frozen=True)
class Stored:
    """A tensor in its file: `dtype` (in safetensors' words: `F32`, `BF16`...), `shape`, `size` in bytes."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int = 0  # in a safetensors file
    held: Any = None  # of a PyTorch file: the torch.Tensor, read from the file when its values are used

    def tensor(self) -> Any:
        """The torch.Tensor, on the CPU."""
        if self.held is not None:
            return self.held
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)

    def parts(self, rows: int) -> Iterator[Any]:
        """The torch.Tensor, `rows` of its first dimension at a time."""
        if self.held is not None or not self.shape:
            yield from self.tensor().reshape(self.shape or (1,)).split(rows)
            return
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            tensor = file.get_slice(self.name)
            for first in range(0, self.shape[0], rows):
                yield tensor[first : first + rows]

    def rounds(self, other: "Stored") -> bool:
        """Are its numbers those of `other`, which has its shape, rounded to its dtype? Both files are mapped
        anew for each part: what was looked at is no longer in memory.
        """
        import torch

        rows = max(1, _PART // max(1, self.size // max([1, *self.shape[:1]])))
        for first in range(0, [*self.shape, 1][0], rows):
            one, two = (each._rows(first, first + rows) for each in (self, other))
            if not torch.equal(one, two.to(one.dtype)):
                return False
        return True

    def _rows(self, first: int, last: int) -> Any:
        """The torch.Tensor of these rows, or all of it where it has none."""
        if self.held is not None or not self.shape:
            return self.tensor()[first:last] if self.shape else self.tensor()
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_slice(self.name)[first:last]

    def raw(self, first: int, last: int) -> Iterator[Any]:
        """Its bytes from `first` to `last`, in buffers."""
        if self.held is not None:
            import torch

            yield self.held.detach().contiguous().flatten().view(torch.uint8)[first:last].numpy()
            return
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + first)
            left = last - first
            while left > 0 and (part := file.read(min(left, _STEP))):
                yield part
                left -= len(part)


def files(folder: Path) -> list[Path]:
    """The weight files of a model folder, which need not be there; where there are none, the first that is
    looked for. ValueError says what is wrong with an index.
    """
    for name in NAMES:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / shard for shard in _shards(index)]
    return [folder / NAMES[0]]


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index.name} is broken JSON: {error}") from None
    said = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(said, dict) or not said or not all(isinstance(v, str) and v for v in said.values()):
        raise ValueError(f"{index.name} names no files (weight_map)")
    names = sorted(set(said.values()))
    if away := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{index.name} names files outside its folder: {listed(away, 3)}")
    if not isinstance(found.get("metadata"), dict):
        raise ValueError(f'{index.name} has no "metadata": {{}}, without which transformers loads nothing')
    return names


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder by name. OSError where files are missing, ValueError where one is
    broken."""
    found = files(folder)
    if gone := [path.name for path in found if not path.is_file()]:
        raise FileNotFoundError(f"{listed(gone, 3)}: not there")
    return {name: tensor for path in found for name, tensor in read(path).items()}


def read(path: Path) -> dict[str, Stored]:
    """The tensors of one file by name. ValueError says what is wrong with it, without its name."""
    if path.suffix == ".safetensors":
        return {
            name: Stored(path, name, t.dtype, t.shape, t.end - t.start, t.start)
            for name, t in safetensors.header(path).items()
        }
    import torch

    try:  # what is not a zip was written before torch 1.6, and cannot be mapped
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        said = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"cannot be read by torch.load(weights_only=True): {said}") from None
    if not isinstance(held, dict):
        raise ValueError(f"holds a {type(held).__name__}, no tensors by name")
    if other := [str(name) for name, value in held.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"holds what is no tensor: {listed(other, 3)}")
    return {n: Stored(path, n, word(t.dtype), tuple(t.shape), t.nbytes, held=t) for n, t in held.items()}


def word(dtype: Any) -> str:
    """A dtype of torch in the words of safetensors."""
    name = str(dtype).removeprefix("torch.")
    return _WORDS.get(name, name.upper())


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model folder. Errors as `tensors`."""
    return {name: tensor.shape for name, tensor in tensors(folder).items()}


def alike(one: Stored, two: Stored, pieces: int = 64) -> bool:
    """Do two tensors hold the same bytes? Compared are `pieces` of 4,096 bytes, evenly apart, the first and
    the last among them."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    steps = {max(one.size - 4096, 0) * i // (pieces - 1) for i in range(pieces)}
    return all(
        [bytes(part) for part in one.raw(step, min(step + 4096, one.size))]
        == [bytes(part) for part in two.raw(step, min(step + 4096, two.size))]
        for step in sorted(steps)
    )


WHOLE = "sha256:"  # begins a fingerprint of every byte; those of earlier versions are of the ends alone


def whole(known: str | None) -> bool:
    """Is `known` a fingerprint of every byte?"""
    return known is not None and known.startswith(WHOLE)


def fingerprint(folder: Path, like: str | None = None) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes: which weights these are.

    It is the same however the tensors are spread over files, and in either format. Every byte is read, by up
    to eight threads: 0.95 GB a second of one core's time with SHA instructions, where loading alone takes 1.4
    (measured). Within a process a file is read again only when its size, its time of change or its inode
    differ. `like`: a fingerprint to compare with; one of an earlier version, which read 4,096 bytes at each
    tensor's ends, is answered by its own kind. OSError when there are no weights, ValueError when they are
    broken.
    """
    ends = like is not None and not whole(like)
    found = [entry for path in files(folder) for entry in _digests(*state(path), ends)]
    digest = hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()
    return digest if ends else WHOLE + digest


def state(path: Path) -> tuple[Path, int, int, int]:
    """Which state of a file it is: what a cache goes by."""
    found = path.stat()
    return path.absolute(), found.st_size, found.st_mtime_ns, found.st_ino


@functools.lru_cache(maxsize=1024)
def _digests(path: Path, size: int, changed: int, inode: int, ends: bool) -> list[Any]:
    """(name, dtype, shape, hash of the content) of each tensor."""
    tensors = read(path)

    def digest(tensor: Stored) -> str:
        parts = [(0, min(4096, tensor.size)), (max(0, tensor.size - 4096), tensor.size)]
        found = hashlib.sha256()
        for first, last in parts if ends else [(0, tensor.size)]:
            for part in tensor.raw(first, last):
                found.update(part)
        return found.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(digest, tensors.values())
        return [(n, t.dtype, t.shape, h) for (n, t), h in zip(tensors.items(), hashes, strict=True)]


def trim() -> None:
    """Give freed memory back to the system, between one tensor and the next. glibc keeps what small objects
    stand between: a merge of 200 MB so grew by 330 MB (measured). Another libc does as it does.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
