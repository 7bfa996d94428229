"""May a run begin here, or go on? Which checkpoints are whole, and what may not change in between. Imports no torch."""

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import yaml

from lora_recipes import weights
from lora_recipes.messages import Problem, RecipeError
from lora_recipes.recipe import Recipe
from lora_recipes.run import FILES, RunFolder, write
from lora_recipes.yamlfile import shown

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
SUMS = "SHA256SUMS"  # of the weights, which have no checksum of their own; in the format of sha256sum


def may_start(folder: RunFolder, resume: bool, force: bool) -> None:
    """Refuse to overwrite a run, or to continue one, unless that was asked for."""
    where, saved = shown(folder.path), [p.name for p in steps_of(folder.checkpoints)]
    if resume and force:
        raise RecipeError(Problem(where, "RESUME and FORCE exclude each other", "continue the run, or begin it anew"))
    if resume and not saved:
        raise RecipeError(Problem(where, "there is no checkpoint to resume from", "run without RESUME=1"))
    if force:
        return
    if folder.finished:
        do = "FORCE=1 trains anew and replaces it; OUTPUTS=dir keeps it and trains elsewhere; or copy the recipe to a new name"
        raise RecipeError(Problem(where, "holds a finished run", do))
    if saved and not resume:
        raise RecipeError(Problem(where, f"holds an unfinished run ({saved[0]})", "RESUME=1 continues it, FORCE=1 begins anew"))
    found = [name for name in FILES if (folder.path / name).exists()]
    if found and not folder.record:
        raise RecipeError(Problem(where, f"holds {', '.join(found)}, but no run.json", "move them away, or FORCE=1 replaces them"))


def steps_of(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def _weights(checkpoint: Path) -> list[Path]:
    return sorted([*checkpoint.glob("adapter_model*.safetensors"), *checkpoint.glob("model*.safetensors")])


def sha256(file: Path) -> str:
    """Hash of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def seal(checkpoint: Path) -> None:
    """Write the hashes of the weights beside them: the last file of a checkpoint."""
    write(checkpoint / SUMS, "".join(f"{sha256(p)}  {p.name}\n" for p in _weights(checkpoint)))


def fault(checkpoint: Path, ranks: int = 1) -> str | None:
    """Why `checkpoint` cannot be resumed from, or None when it is whole: weights, optimizer, schedule, random state and trainer state."""
    states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{i}.pth" for i in range(ranks)]
    pickled = [*_optimizer(checkpoint, ranks), "scheduler.pt", *states]
    if not _weights(checkpoint):
        return "no weights (*.safetensors)"
    for name in (*pickled, "trainer_state.json", SUMS):
        if not (checkpoint / name).is_file():
            return f"{name} is missing (the save was cut off)"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return "trainer_state.json is broken"
    for name in pickled:
        try:
            with zipfile.ZipFile(checkpoint / name) as archive:
                if bad := archive.testzip():
                    return f"{name} is corrupt (at {bad})"
        except zipfile.BadZipFile:
            return f"{name} is truncated or corrupt"
    return _weights_fault(checkpoint)


def _optimizer(checkpoint: Path, ranks: int) -> list[str]:
    """The files of the optimiser's state: one, or one of each process that DeepSpeed divided it over (0.19, engine._get_zero_ckpt_name)."""
    if not (checkpoint / "latest").is_file():
        return ["optimizer.pt"]
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    half = "bf16_" if any(folder.glob("bf16_zero_pp_rank_*")) else ""
    return [f"{folder.name}/{half}zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(ranks)]


def _weights_fault(checkpoint: Path) -> str | None:
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in (checkpoint / SUMS).read_text().splitlines())}
    for path in _weights(checkpoint):
        try:
            weights.header(path)
        except ValueError as error:
            return f"{path.name} {error}"
        if sums.get(path.name) != sha256(path):
            return f"{path.name} is corrupt (not the content that was saved)"
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


def differences(folder: RunFolder, recipe: Recipe, facts: dict[str, Any]) -> list[str]:
    """What a resumed run would silently ignore or mix: each value that differs from the run that is to be continued."""
    try:
        before = yaml.safe_load((folder.path / "recipe.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        do = "without it nobody knows what the run began with: FORCE=1 begins anew"
        raise RecipeError(Problem(shown(folder.path / "recipe.yaml"), f"cannot be read: {error}", do)) from None
    found = []
    for section in sorted((set(before) | set(recipe.sections)) - {"probes"}):
        old, new = before.get(section) or {}, recipe.sections.get(section) or {}
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key) and not (section == "train" and key in HARMLESS) and (section, key) != ("data", "kept"):
                found.append(f"{section}.{key}: the run began with {old.get(key)!r}, now it is {new.get(key)!r}")
    for key, value in facts.items():
        if (old := folder.record.get("resume_facts", {}).get(key)) != value:
            found.append(f"{key}: the run began with {old}, now it is {value}")
    return found
