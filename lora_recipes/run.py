"""The run folder `outputs/<name>/`: its files, what a run records of itself, and which checkpoints are whole. Imports no torch."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lora_recipes import weights
from lora_recipes.messages import Problem, RecipeError
from lora_recipes.recipe import ROOT, Recipe
from lora_recipes.yamlfile import shown

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "safetensors", "tokenizers")
# Keys of train: that change what is shown or kept, not what is trained.
HARMLESS = {
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "save_total_limit",
    "report_to",
    "run_name",
    "disable_tqdm",
    "log_level",
}


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
        """What the run leaves: `adapter/`, or `model/` of a full fine-tuning."""
        return self.path / ("model" if method == "full" else "adapter")

    @property
    def record(self) -> dict[str, Any]:
        """run.json, empty when there is none."""
        try:
            return json.loads((self.path / "run.json").read_text())
        except OSError:
            return {}
        except json.JSONDecodeError as error:
            raise RecipeError(Problem(shown(self.path / "run.json"), f"broken JSON: {error}", "FORCE=1 trains anew")) from None

    @property
    def finished(self) -> bool:
        """Did a run end well here?"""
        return self.record.get("status") == "finished"

    def write_record(self, record: dict[str, Any]) -> None:
        """Write run.json in one move."""
        write(self.path / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


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


def steps_of(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def fault(checkpoint: Path, ranks: int = 1) -> str | None:
    """Why `checkpoint` cannot be resumed from, or None when it is whole: weights, optimizer, schedule, random state and trainer state."""
    files = [*checkpoint.glob("adapter_model*.safetensors"), *checkpoint.glob("model*.safetensors")]
    states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{i}.pth" for i in range(ranks)]
    if not files:
        return "no weights (*.safetensors)"
    for name in ("optimizer.pt", "scheduler.pt", *states, "trainer_state.json"):
        if not (checkpoint / name).is_file():
            return f"{name} is missing (the save was cut off)"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except ValueError:
        return "trainer_state.json is broken"
    for path in files:
        try:
            weights.header(path)
        except ValueError as error:
            return f"{path.name} {error}"
    for name in ("optimizer.pt", "scheduler.pt", *states):
        try:
            with zipfile.ZipFile(checkpoint / name) as archive:
                if bad := archive.testzip():
                    return f"{name} is corrupt (at {bad})"
        except zipfile.BadZipFile:
            return f"{name} is truncated or corrupt"
    return None


def newest_whole(folder: Path, ranks: int = 1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed from, and a sentence for each newer one that was skipped."""
    skipped: list[str] = []
    for checkpoint in steps_of(folder):
        reason = fault(checkpoint, ranks)
        if reason is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} skipped: {reason}")
    return None, skipped


def may_start(folder: RunFolder, resume: bool, force: bool) -> None:
    """Refuse to overwrite a run, or to continue one, unless that was asked for."""
    where, saved = shown(folder.path), [p.name for p in steps_of(folder.checkpoints)]
    if resume and force:
        raise RecipeError(Problem(where, "RESUME and FORCE exclude each other", "continue the run, or begin it anew"))
    if folder.finished and not force:
        do = "FORCE=1 trains anew and replaces it; OUTPUTS=dir keeps it and trains elsewhere; or copy the recipe to a new name"
        raise RecipeError(Problem(where, "holds a finished run", do))
    if saved and not (resume or force):
        raise RecipeError(Problem(where, f"holds an unfinished run ({saved[0]})", "RESUME=1 continues it, FORCE=1 begins anew"))
    if resume and not saved:
        raise RecipeError(Problem(where, "there is no checkpoint to resume from", "run without RESUME=1"))


def differences(folder: RunFolder, recipe: Recipe, facts: dict[str, Any]) -> list[str]:
    """What a resumed run would silently ignore or mix: each value that differs from the run that is to be continued."""
    before = yaml.safe_load((folder.path / "recipe.yaml").read_text()) or {}
    found = []
    for section in sorted(set(before) | set(recipe.sections) - {"probes"}):
        old, new = before.get(section) or {}, recipe.sections.get(section) or {}
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key) and not (section == "train" and key in HARMLESS) and section != "probes":
                found.append(f"{section}.{key}: the run began with {old.get(key)!r}, now it is {new.get(key)!r}")
    for key, value in facts.items():
        if (old := folder.record.get("resume_facts", {}).get(key)) != value:
            found.append(f"{key}: the run began with {old}, now it is {value}")
    return found
