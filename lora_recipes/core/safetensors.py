"""Safetensors files without torch: names, shapes and values; and a copy under other names. Format:
huggingface/safetensors, README.
"""

import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor stands in a file: its dtype (`F32`, `BF16`...), shape, and the bytes from `start` to
    `end` of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Place:
    """A tensor in its file."""

    path: Path
    tensor: Tensor


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. ValueError says what is wrong with a file that is cut, empty
    or no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= size - 8:
            raise ValueError("is truncated, empty or no safetensors file")
        try:
            entries = {k: v for k, v in json.loads(file.read(length)).items() if k != "__metadata__"}
            first = 8 + length
            tensors = {
                name: Tensor(
                    e["dtype"], tuple(e["shape"]), first + e["data_offsets"][0], first + e["data_offsets"][1]
                )
                for name, e in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("has a broken header") from None
    if max((t.end for t in tensors.values()), default=8 + length) != size:
        raise ValueError("is truncated")
    return tensors


def values(path: Path, tensor: Tensor) -> np.ndarray:
    """The numbers of a floating-point tensor as float32 (float64 stays), read from the file when they are
    used.
    """
    kind = np.dtype(_NUMPY.get(tensor.dtype, "<u2"))
    raw = np.memmap(path, kind, "r", tensor.start, ((tensor.end - tensor.start) // kind.itemsize,))
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    if tensor.dtype not in _NUMPY:
        raise ValueError(f"holds a tensor of dtype {tensor.dtype}")
    return raw.reshape(tensor.shape)


def files(folder: Path) -> list[Path]:
    """The weight files of a model folder: model.safetensors where it is there (transformers looks no
    further), else those that model.safetensors.index.json names. ValueError, KeyError: it names none.
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file() or not index.is_file():
        return [whole]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model folder. OSError when there are none."""
    return {name: tensor.shape for file in files(folder) for name, tensor in header(file).items()}


WHOLE = "sha256:"  # begins a fingerprint of every byte; those of earlier versions are of the ends alone
_STEP = 2**22  # bytes read at once


def alike(one: Place, two: Place, pieces: int = 64) -> bool:
    """Do two tensors hold the same bytes? Compared are `pieces` of 4,096 bytes, evenly apart, the first and
    the last among them."""
    if (one.tensor.dtype, one.tensor.shape) != (two.tensor.dtype, two.tensor.shape):
        return False
    size = one.tensor.end - one.tensor.start
    steps = [max(size - 4096, 0) * i // (pieces - 1) for i in range(pieces)]
    with one.path.open("rb") as first, two.path.open("rb") as second:
        for step in sorted(set(steps)):
            first.seek(one.tensor.start + step)
            second.seek(two.tensor.start + step)
            length = min(4096, size - step)
            if first.read(length) != second.read(length):
                return False
    return True


def whole(known: str | None) -> bool:
    """Is `known` a fingerprint of every byte?"""
    return known is not None and known.startswith(WHOLE)


def fingerprint(folder: Path, like: str | None = None) -> str:
    """SHA-256 over each tensor's name, dtype, shape and bytes: which weights these are.

    It is the same however the tensors are spread over files. Every byte is read, by up to eight threads: 0.95
    GB a second of one core's time with SHA instructions, where loading alone takes 1.4 (measured). Within a
    process a file is read again only when its size, its time of change or its inode differ. `like`: a
    fingerprint to compare with; one of an earlier version, which read 4,096 bytes at each tensor's ends, is
    answered by its own kind. OSError when there are no weights, ValueError when they are broken.
    """
    ends = like is not None and not whole(like)
    found = [entry for path in files(folder) for entry in _digests(path, ends)]
    digest = hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()
    return digest if ends else WHOLE + digest


def _digests(path: Path, ends: bool) -> list[Any]:
    state = path.stat()
    return _read(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ino, ends)


@functools.lru_cache(maxsize=1024)
def _read(path: Path, size: int, changed: int, inode: int, ends: bool) -> list[Any]:
    """(name, dtype, shape, hash of the content) of each tensor. The arguments say which state of the file."""
    tensors = header(path)

    def digest(tensor: Tensor) -> str:
        parts = [(tensor.start, 4096), (max(tensor.start, tensor.end - 4096), 4096)]
        read = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            for start, most in parts if ends else [(tensor.start, tensor.end - tensor.start)]:
                file.seek(start)
                left = min(most, tensor.end - start)
                while left and (part := file.read(min(left, _STEP))):
                    read.update(part)
                    left -= len(part)
        return read.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(digest, tensors.values())
        return [(n, t.dtype, t.shape, h) for (n, t), h in zip(tensors.items(), hashes, strict=True)]


def copy_renamed(source: Path, target: Path, names: dict[str, str]) -> None:
    """Copy a safetensors file with its tensors renamed (`names`: old to new); the data is copied byte for
    byte.
    """
    with source.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        old = json.loads(file.read(length))
        data = file.read()
    new = json.dumps(
        {names.get(name, name): entry for name, entry in old.items()}, separators=(",", ":")
    ).encode()
    new += b" " * (-len(new) % 8)
    target.write_bytes(len(new).to_bytes(8, "little") + new + data)
