"""Counts the storages that live while code runs, real or fake tensors alike: the peak of each stretch of a
training step, by part.
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# bytes; CUDA's caching allocator rounds each request up to it (c10/cuda/CUDACachingAllocator.cpp,
# kMinBlockSize)
ROUNDING = 512
DEVICE = torch.ops.prim.device.default  # two thirds of what a fake tensor is asked; makes nothing
Stretch = tuple[str, int]  # a part of the step and, where it is one of several layers, which


@dataclass
class Peak:
    """The most bytes alive at once, and whose they were."""

    total: int
    parts: dict[str, int]


class Storages(TorchDispatchMode):
    """While entered, every new storage counts from its birth to its death, under the part named by `label`.

    `peaks` holds the peak of each stretch, `stretch` is set from outside. `extra` maps an operator to the
    bytes it needs beside its outputs, for kernels of another device than the one that runs; `answer` is what
    a fake tensor says when its value is asked for.
    """

    def __init__(
        self,
        extra: dict[Any, Callable[..., int]] | None = None,
        handlers: dict[Any, Callable[..., Any]] | None = None,
    ):
        super().__init__()
        self.live: dict[int, tuple[int, str]] = {}
        self.parts: dict[str, int] = {}
        self.total = 0
        self.label, self.stretch = "activations", ("", 0)
        self.peaks: dict[Stretch, Peak] = {}
        self.extra, self.handlers = extra or {}, handlers or {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else torch wraps each call against being compiled, which takes as long as the counting does."""
        return False

    def add(self, tensors: Iterable[torch.Tensor | None], label: str) -> None:
        """Count the storages of `tensors` under `label`, also those that are counted under another one
        already.
        """
        for tensor in tensors:
            if tensor is not None:
                self._count(tensor, label, rename=True)
        self._look(0)

    def _count(self, tensor: torch.Tensor, label: str, rename: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            size, before = self.live[key]
            if rename and before != label:
                self.live[key] = size, label
                self._change(before, -size)
                self._change(label, size)
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self.live[key] = size, label
        self._change(label, size)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        size, label = self.live.pop(key)
        self._change(label, -size)

    def _change(self, label: str, size: int) -> None:
        self.parts[label] = self.parts.get(label, 0) + size
        self.total += size

    def _look(self, extra: int) -> None:
        peak = self.peaks.get(self.stretch)
        if peak is None or self.total + extra > peak.total:
            self.peaks[self.stretch] = Peak(
                self.total + extra, {**self.parts, self.label: self.parts.get(self.label, 0) + extra}
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator (or what stands for it) and count what it made."""
        if func is DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        handler = self.handlers.get(func)
        result = handler(func, *args, **kwargs) if handler else func(*args, **kwargs)
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf, self.label)
        extra = self.extra.get(func)
        self._look(extra(result, *args, **kwargs) if extra else 0)
        return result


def mark(storages: Storages, layers: list[torch.nn.Module]) -> list[Any]:
    """From now on each layer's forward pass (or evaluation) and, by its output's gradient, its backward pass
    is a stretch of its own. Returns the hooks, to remove.

    A backward stretch ends where the gradient of the layer's input is there: the layers before it come next.
    The forward pass that checkpointing runs again inside the backward pass belongs to the backward stretch.
    """

    def entered(index: int, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if storages.stretch[0].startswith("backward"):
            return
        storages.stretch = (
            "forward" if storages.stretch[0] in ("embedding", "forward") else "evaluation",
            index,
        )
        given = kwargs.get("hidden_states")
        hidden = next((t for t in (given, *args) if isinstance(t, torch.Tensor)), None)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(functools.partial(left, index - 1))

    def left(index: int, gradient: torch.Tensor) -> None:
        storages.stretch = "backward", index

    return [
        layer.register_forward_pre_hook(functools.partial(entered, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]


def head(storages: Storages, backbone: torch.nn.Module, layers: int) -> Any:
    """The stretch after the last layer: its norm, the head and the loss; and the backward pass up to the last
    layer's output. Returns the hook, to remove.
    """

    def done(module: torch.nn.Module, args: Any, output: Any) -> None:
        if storages.stretch[0].startswith("backward"):
            return
        storages.stretch = "head" if storages.stretch[0] == "forward" else "evaluation head", 0
        hidden = output[0]  # of a tuple, or of a ModelOutput
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: setattr(storages, "stretch", ("backward", layers - 1)))

    return backbone.register_forward_hook(done)
