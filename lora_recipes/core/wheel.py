"""A package from the package index as a file: fetched once by pip, kept, never installed or imported. Imports
no torch.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_recipes.core.errors import Problem, RecipeError


def cache() -> Path:
    """Where fetched wheels stay, for every outputs folder: LORA_RECIPES_CACHE, or the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LORA_RECIPES_CACHE") or home / "lora-recipes")


def fetched(name: str, version: str, where: str, instead: str = "") -> Path:
    """The package's wheel in the cache, fetched by pip if it is not there. RecipeError at `where`, with what
    else can be done (`instead`), when it cannot be had.
    """
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if found := sorted(cache().glob(pattern)):
        return found[0]
    wanted = f"{name}=={version}"
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", download, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (found := sorted(Path(download).glob(pattern))):
            lines = done.stderr.splitlines()
            errors = [line for line in lines if line.startswith("ERROR")]
            said = errors[-1] if errors else "pip found no wheel"
            do = (
                f"where there is a network, `pip download --no-deps {wanted}`, and put the wheel into"
                f" {cache()}{instead and '; '}{instead}"
            )
            raise RecipeError(Problem(where, f"{wanted} cannot be fetched: {said}", do))
        return found[0].replace(cache() / found[0].name)
