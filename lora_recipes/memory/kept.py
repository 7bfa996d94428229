"""A rehearsed step is kept (data/cache.py), under a name that all of these decide: the setup, this code, what
is installed, the machine.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import lora_recipes
from lora_recipes.core import cli, files
from lora_recipes.data import cache
from lora_recipes.memory.fits import Memory
from lora_recipes.memory.rehearsal import Setup

PACKAGE = Path(lora_recipes.__file__).parent
FOUND = "memory.json"
# Attributes, of whatever a setup holds, that change no shape: numbers in tensors, when it is saved and told,
# and where things lie. All others decide.
IDLE = {
    *(
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "learning_rate",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
    ),
    *("max_steps", "num_train_epochs", "warmup_steps", "weight_decay", "seed", "data_seed"),
    *("logging_steps", "logging_strategy", "logging_first_step", "disable_tqdm", "report_to", "run_name"),
    *("eval_steps", "save_steps", "save_strategy", "save_total_limit", "save_only_model"),
    *("output_dir", "hub_token", "_name_or_path", "base_model_name_or_path"),
    *("lora_alpha", "use_rslora"),
}
# How the variables begin by which the libraries choose another way.
VARIABLES = ("ACCELERATE_", "BNB_", "CUDA_VISIBLE", "PYTORCH_", "TORCH", "TRANSFORMERS_", "TRL_", "USE_")


def key(setup: Setup) -> str:
    """What decides the memory of `setup`, as one hash."""
    what = [code(PACKAGE), installed(), machine(), plain(setup)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=2)
def code(package: Path) -> str:
    """Hash of the names and the bytes of all Python files of a package."""
    each = [(str(file.relative_to(package)), files.sha256(file)) for file in sorted(package.rglob("*.py"))]
    return hashlib.sha256(json.dumps(each).encode()).hexdigest()


@functools.cache
def installed() -> list[str]:
    """Every distribution with its version, as its folder says it, and Python's: many a library does another
    thing where a second one is there.
    """
    folders = [Path(place) for place in sys.path]
    found = {info.name for folder in folders if folder.is_dir() for info in folder.glob("*.dist-info")}
    return [sys.version, *sorted(found)]


def machine() -> list[Any]:
    """What the libraries ask of the machine: its processor, its accelerators, its variables."""
    chosen = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    there = [torch.cuda.device_count(), torch.version.cuda, torch.backends.mps.is_available()]
    return [platform.machine(), platform.node(), *there, chosen]


def plain(value: Any) -> Any:
    """`value` and all that it holds, without what is IDLE, as JSON takes it: the same for the same, in each
    process.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        held = [(plain(k), plain(v)) for k, v in value.items() if k not in IDLE]
        return sorted(held, key=json.dumps)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=json.dumps)
    if isinstance(value, Path) or not hasattr(value, "__dict__"):
        return str(value)
    if isinstance(value, type) or callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', value)}"
    its = vars(value)
    if isinstance(value, TrainingArguments):  # it also keeps what accelerate made of its fields
        its = {field.name: getattr(value, field.name) for field in fields(value)}
    return [type(value).__qualname__, plain(its)]


def of(setup: Setup, rehearse: Callable[[], Memory]) -> Memory:
    """The memory of `setup`: as it was found before, else as `rehearse` finds it. That is kept, unless its
    peak is unknown, or the disk takes nothing.
    """
    found: list[Memory] = []
    final = cache.place() / f"{cache.STEP}{key(setup)}"

    def build(folder: Path) -> dict[str, Any]:
        found.append(rehearse())
        if found[0].unknown:
            raise LookupError(found[0].unknown)
        folder.mkdir()
        files.write(folder / FOUND, json.dumps(asdict(found[0])))
        size, sha256 = (folder / FOUND).stat().st_size, files.sha256(folder / FOUND)
        facts = {"files": {FOUND: size}, "sha256": {FOUND: sha256}, "made": files.now()}
        files.write(folder / cache.FACTS, json.dumps(facts))
        return facts

    with contextlib.suppress(OSError, LookupError):
        taken = cache.taken(final, "rehearses a step", build)
        if taken and taken[1]:
            told = json.loads((final / FOUND).read_text(encoding="utf-8"))
            given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
            said = f"at {taken[0]['made']}, and kept ({cli.command('cache')})"
            return replace(Memory(**given), rehearsed=said)
    return found[0] if found else rehearse()
