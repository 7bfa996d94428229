"""Measures a training where it happens, whoever starts it: with this folder on PYTHONPATH and BENCH_CLOCK
naming a file, each call of transformers' Trainer.train, and the end of each process, appends a line of JSON
to that file.

Every contender of benchmarks/train.py is measured by this one code: it is Python's own hook, read at the
start of each interpreter, and needs nothing but the standard library. A loop without a Trainer calls
`measured` itself. BENCH_WITHOUT names packages that count as not installed.
"""

import atexit
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

BEGAN = float(os.environ.get("BENCH_BEGAN") or time.monotonic())  # of the command, where it starts others


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process: bytes. 0 where there is no /proc."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return 0


@contextlib.contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Measures what is inside, and appends it to the file; the caller may add to the yielded line.

    `start_s`: since the command began, `start_cpu_s`: of this process so far; `seconds`, `cpu_s`:
    inside, all threads; `rss_before`, `rss_peak`: bytes; `positions`: computed, padding included; `tokens`:
    without padding.
    """
    found: dict[str, Any] = {"start_s": time.monotonic() - BEGAN, "start_cpu_s": time.process_time()}
    found |= {"rss_before": memory("VmRSS"), "positions": 0, "tokens": 0}
    began, spent = time.monotonic(), time.process_time()
    yield found
    began, spent = found.pop("since", (began, spent))
    found["seconds"], found["cpu_s"] = time.monotonic() - began, time.process_time() - spent
    for package in ("torch", "transformers", "trl", "peft", "accelerate"):
        found[package] = getattr(sys.modules.get(package), "__version__", None)
    torch: Any = sys.modules["torch"]
    if torch.cuda.is_available():
        found["device"], found["gpu_peak"] = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    _told(found)


def _told(found: dict[str, Any]) -> None:
    with Path(os.environ["BENCH_CLOCK"]).open("a") as file:
        file.write(json.dumps(found | {"rss_peak": memory("VmHWM")}) + "\n")


def clocked(trainer: Any) -> Callable[[], None]:
    """Put the clock around the training of the class `trainer`; call what is returned to take it off.

    BENCH_WARM: so many batches at the start are not measured: there a GPU compiles its kernels.
    """
    train: Callable[..., Any] = trainer.train
    step: Callable[..., Any] = trainer.training_step
    now: dict[str, Any] = {}
    warm = int(os.environ.get("BENCH_WARM", "0"))

    def clocked_train(self: Any, *arguments: Any, **options: Any) -> Any:
        with measured() as found:
            now.clear()
            now.update(positions=0, tokens=0, batches=0)
            done = train(self, *arguments, **options)
            found.update(now, steps=self.state.global_step, loss=done.training_loss)
        return done

    def clocked_step(self: Any, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        if now and now["batches"] == warm and warm:
            torch: Any = sys.modules["torch"]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now.update(positions=0, tokens=0, since=(time.monotonic(), time.process_time()))
        if now and "input_ids" in inputs:
            now["batches"] += 1
            mask = inputs.get("attention_mask")
            count = inputs["input_ids"].numel()
            now["positions"] += count
            now["tokens"] += int((mask != 0).sum()) if mask is not None and mask.dim() == 2 else count
        return step(self, model, inputs, *arguments, **options)

    def off() -> None:
        trainer.train, trainer.training_step = train, step

    trainer.train, trainer.training_step = clocked_train, clocked_step
    return off


class _Finder(importlib.abc.MetaPathFinder):
    """Clocks the Trainer when somebody imports it; nothing is imported for that."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As the import system asks: only transformers.trainer is ours."""
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and (loader := spec.loader):
            execute: Any = loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                clocked(vars(module)["Trainer"])

            setattr(loader, "exec_module", executed)  # noqa: B010
        return spec


for package in filter(None, os.environ.get("BENCH_WITHOUT", "").split(",")):
    sys.modules[package] = None  # type: ignore[assignment]  # is not there, for whoever looks
if os.environ.get("BENCH_CLOCK"):
    sys.meta_path.insert(0, _Finder())
    atexit.register(_told, {})
