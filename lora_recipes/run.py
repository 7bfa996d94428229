"""The run folder `outputs/<name>/`: its files, and what a run records of itself. Imports no torch."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_recipes.messages import Problem, RecipeError
from lora_recipes.recipe import ROOT, WHOLE
from lora_recipes.yamlfile import shown

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "safetensors", "tokenizers")
# All that a run writes into its folder. Anything else there is somebody's own, and stays.
FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "adapter", "model", "checkpoints", "serving", "merged")


@dataclass(frozen=True)
class RunFolder:
    """`outputs/<name>/`. The files: recipe.yaml, run.json, metrics.jsonl, loss.png, adapter/ (or model/), checkpoints/."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the trainer saves."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a log step."""
        return self.path / "metrics.jsonl"

    def result(self, method: str) -> Path:
        """What the run leaves: `adapter/`, or `model/` where the model itself was trained."""
        return self.path / ("model" if method in WHOLE else "adapter")

    @property
    def record(self) -> dict[str, Any]:
        """run.json, empty when there is none."""
        file = self.path / "run.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecipeError(Problem(shown(file), f"cannot be read: {error}", "FORCE=1 trains anew")) from None
        if not isinstance(record, dict):
            raise RecipeError(Problem(shown(file), "is no run.json of a run", "FORCE=1 trains anew"))
        return record

    @property
    def finished(self) -> bool:
        """Did a run end well here?"""
        return self.record.get("status") == "finished"

    @property
    def replaced(self) -> Path:
        """Where the finished run that FORCE=1 replaces is kept until the new one has finished too."""
        return self.path / ".replaced"

    def clear(self) -> None:
        """Make room for a new run: a finished run moves to `.replaced/`, an unfinished one goes; other people's files stay."""
        try:
            keep = self.finished
        except RecipeError:
            keep = False
        if keep:
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.replaced.mkdir(parents=True)
        for name in FILES:
            path = self.path / name
            if keep and path.exists():
                path.rename(self.replaced / name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_record(self, record: dict[str, Any]) -> None:
        """Write run.json in one move."""
        write(self.path / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def make_folder(outputs: Path) -> None:
    """Make the folder of all runs, if it is not there."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(Problem(shown(outputs), f"cannot be made: {error.strerror}", "give another OUTPUTS=dir")) from None


def write(path: Path, text: str) -> None:
    """Write `text` to a temporary name beside `path`, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder into place; what stood there goes only now."""
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def logged(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off when the process was killed is left out."""
    logs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            logs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return logs


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
