"""Safetensors files without torch: names, shapes and values; a copy under other names; and one written tensor
by tensor. Format: huggingface/safetensors, README.
"""

import json
from collections.abc import Callable, Iterable
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


def write(
    target: Path,
    tensors: dict[str, tuple[str, tuple[int, ...], int]],
    content: Callable[[str], Iterable[Any]],
) -> None:
    """Write `tensors` (dtype, shape, bytes of each) as one file, one after the other: `content` yields the
    bytes of the named one in buffers, and no more than one buffer is held.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (_, _, size) in tensors.items():
            wrote = sum(file.write(part) for part in content(name))
            assert wrote == size, f"{name}: {wrote} bytes, {size} were said"
