"""Versions, commit and machine, as a run records them."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_recipes.core.files import INSTALLED, ROOT

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


def environment() -> dict[str, Any]:
    """Versions, git commit and whether the tree differs from it, and the machine (no host name, no paths)."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
    }


def _git(*arguments: str) -> str | None:
    if INSTALLED:  # a repository around the package is somebody else's
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
