"""Versions, commit and machine, as a run records them."""

import functools
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from lora_recipes.core import git as repository
from lora_recipes.core.files import INSTALLED, ROOT
from lora_recipes.core.record import Git, Hardware

PACKAGES = (
    "lora-recipes",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    return dict(_versions())


@functools.cache  # each is read from a file
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git() -> Git:
    """The commit, and whether the tree differs from it."""
    if INSTALLED:  # a repository around the package is somebody else's
        return Git(commit=None, dirty=False)
    commit, status = (repository.ask(ROOT, *words) for words in (("rev-parse", "HEAD"), repository.STATUS))
    return Git(commit=commit.said if commit.done else None, dirty=status.done and bool(status.said))


def command() -> str:
    """How this process was called."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def hardware(**more: Any) -> Hardware:
    """The machine (no host name, no paths); `more`: what the caller knows of its devices."""
    return Hardware(machine=platform.machine(), system=platform.system(), cpus=os.cpu_count(), **more)
