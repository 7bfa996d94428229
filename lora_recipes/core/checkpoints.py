"""Which checkpoints are whole: every file of a save, by checksum. Imports no torch."""

import json
import re
import zipfile
from pathlib import Path

from lora_recipes.core import safetensors
from lora_recipes.core.files import sha256, write

SUMS = "SHA256SUMS"  # of the weights, which have no checksum of their own; in the format of sha256sum


def steps_of(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def _weights(checkpoint: Path) -> list[Path]:
    return sorted([*checkpoint.glob("adapter_model*.safetensors"), *checkpoint.glob("model*.safetensors")])


def seal(checkpoint: Path) -> None:
    """Write the hashes of the weights beside them: the last file of a checkpoint."""
    write(checkpoint / SUMS, "".join(f"{sha256(p)}  {p.name}\n" for p in _weights(checkpoint)))


def fault(checkpoint: Path, ranks: int = 1) -> str | None:
    """Why `checkpoint` cannot be resumed from, or None when it is whole: weights, optimizer, schedule, random
    state and trainer state.
    """
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
    """The files of the optimiser's state: one, or one of each process that DeepSpeed divided it over (0.19,
    engine._get_zero_ckpt_name).
    """
    if not (checkpoint / "latest").is_file():
        return ["optimizer.pt"]
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    half = "bf16_" if any(folder.glob("bf16_zero_pp_rank_*")) else ""
    return [f"{folder.name}/{half}zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(ranks)]


def _weights_fault(checkpoint: Path) -> str | None:
    sums = {
        name: digest
        for digest, _, name in (line.partition("  ") for line in (checkpoint / SUMS).read_text().splitlines())
    }
    for path in _weights(checkpoint):
        try:
            safetensors.header(path)
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
