"""Which checkpoints are whole: every file of a save, by checksum. Imports no torch."""

import hashlib
import json
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_recipes.core import safetensors
from lora_recipes.core.files import sha256, write

SUMS = "SHA256SUMS"  # of every file of the checkpoint, in the format of sha256sum
STATE = "trainer_state.json"
SEAL = "# whole, "  # begins the last line: the hash of all lines before it; earlier versions wrote none


def steps_of(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def _weights(checkpoint: Path) -> list[Path]:
    return sorted([*checkpoint.glob("adapter_model*.safetensors"), *checkpoint.glob("model*.safetensors")])


def seal(checkpoint: Path) -> None:
    """Write the hash of every file beside them: the last file of a checkpoint."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p != checkpoint / SUMS)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter to others
        hashes = list(pool.map(sha256, files))
    lines = "".join(f"{h}  {p.relative_to(checkpoint)}\n" for h, p in zip(hashes, files, strict=True))
    write(checkpoint / SUMS, f"{lines}{SEAL}{hashlib.sha256(lines.encode()).hexdigest()}\n")


def fault(checkpoint: Path, ranks: int = 1) -> str | None:
    """Why `checkpoint` cannot be resumed from, or None when it is whole: every file is what was saved, and
    weights, optimizer, schedule, random state and trainer state are among them.
    """
    states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{i}.pth" for i in range(ranks)]
    if not _weights(checkpoint):
        return "no weights (*.safetensors)"
    try:
        pickled = [*_optimizer(checkpoint, ranks), "scheduler.pt", *states]
    except (OSError, ValueError) as error:
        return f"latest cannot be read: {error}"
    for name in (*pickled, STATE, SUMS):
        if not (checkpoint / name).is_file():
            return f"{name} is missing (the save was cut off)"
    try:
        sums, sealed = _sums(checkpoint)
    except ValueError:
        return f"{SUMS} is corrupt"
    if sealed:
        wrong = _differing(checkpoint, sums, [*(p.name for p in _weights(checkpoint)), *pickled, STATE])
    else:
        wrong = _readable(checkpoint, pickled) or _weights_fault(checkpoint, sums)
    return wrong or _step_fault(checkpoint)


def proven(checkpoint: Path) -> bool:
    """Has each file of a whole checkpoint its hash? Those of earlier versions have that of the weights alone:
    their other files are checked as far as their form goes.
    """
    return _sums(checkpoint)[1]


def _sums(checkpoint: Path) -> tuple[dict[str, str], bool]:
    """The hash of each file by its name, and whether the seal stands. ValueError when it is broken."""
    text = (checkpoint / SUMS).read_bytes().decode("ascii")
    lines, seal_, digest = text.rpartition(SEAL)
    if seal_ and digest != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        raise ValueError("not what was written")
    found = {}
    for line in (lines if seal_ else text).splitlines():
        digest, between, name = line.partition("  ")
        if not between or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("not what was written")
        found[name] = digest
    if not seal_ and any(not name.endswith(".safetensors") for name in found):
        raise ValueError("its last line is gone")
    return found, bool(seal_)


def _differing(checkpoint: Path, sums: dict[str, str], needed: list[str]) -> str | None:
    """The first file that is not what was saved."""
    for name in sums:
        if not (checkpoint / name).is_file():
            return f"{name} is missing (it was there when the checkpoint was saved)"
    for name in needed:
        if name not in sums:
            return f"{name} was not there when the checkpoint was saved"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda name: _hash(checkpoint / name), sums))
    for name, digest in zip(sums, found, strict=True):
        if sums[name] != digest:
            cut = "" if name.endswith(".safetensors") and _headed(checkpoint / name) else "truncated or "
            return f"{name} is {cut}corrupt (not the content that was saved)"
    return None


def _headed(file: Path) -> bool:
    """Has a safetensors file the length that its header says?"""
    try:
        return bool(safetensors.header(file))
    except (OSError, ValueError):
        return False


def _hash(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:  # a bad sector
        return f"cannot be read: {error}"


def _readable(checkpoint: Path, pickled: list[str]) -> str | None:
    """The first file that does not have the form it must have: for checkpoints of earlier versions."""
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except ValueError:
        return f"{STATE} is broken"
    for name in pickled:
        try:
            with zipfile.ZipFile(checkpoint / name) as archive:
                if bad := archive.testzip():
                    return f"{name} is corrupt (at {bad})"
        except Exception:  # BadZipFile, and whatever a broken number in it leads to
            return f"{name} is truncated or corrupt"
    return None


def _step_fault(checkpoint: Path) -> str | None:
    """The step stands in two places; the trainer believes the second."""
    try:
        step = state(checkpoint)["global_step"]
    except (ValueError, KeyError, TypeError):
        return f"{STATE} is broken"
    named = int(checkpoint.name.split("-")[1])
    return None if step == named else f"{STATE} says step {step!r}, and the folder is {checkpoint.name}"


def state(checkpoint: Path) -> dict[str, Any]:
    """What the trainer says of itself: trainer_state.json."""
    found: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return found


def is_last(checkpoint: Path) -> bool:
    """Did the run end with this step: its last one, or the one at which early stopping stopped it?"""
    control = (state(checkpoint).get("stateful_callbacks") or {}).get("TrainerControl") or {}
    return bool((control.get("args") or {}).get("should_training_stop"))


def _optimizer(checkpoint: Path, ranks: int) -> list[str]:
    """The files of the optimiser's state: one, or one of each process that DeepSpeed divided it over (0.19,
    engine._get_zero_ckpt_name).
    """
    if not (checkpoint / "latest").is_file():
        return ["optimizer.pt"]
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    half = "bf16_" if any(folder.glob("bf16_zero_pp_rank_*")) else ""
    return [f"{folder.name}/{half}zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(ranks)]


def _weights_fault(checkpoint: Path, sums: dict[str, str]) -> str | None:
    for path in _weights(checkpoint):
        try:
            safetensors.header(path)
        except ValueError as error:
            return f"{path.name} {error}"
        if sums.get(path.name) != _hash(path):
            return f"{path.name} is corrupt (not the content that was saved)"
    return None


def newest_whole(folder: Path, ranks: int = 1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed from, and what to know of it: a sentence for each newer one
    that was skipped, and one when it is not proven.
    """
    said: list[str] = []
    for checkpoint in steps_of(folder):
        reason = fault(checkpoint, ranks)
        if reason is None:
            if not proven(checkpoint):
                unproven = "is unproven: an earlier version saved it, with the hashes of its weights alone"
                said.append(f"{checkpoint.name} {unproven}; the other files have the right form")
            return checkpoint, said
        said.append(f"{checkpoint.name} skipped: {reason}")
    return None, said
