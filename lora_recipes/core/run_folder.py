"""The run folder `outputs/<name>/` and its files. Imports no torch."""

import contextlib
import errno
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, record
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import write
from lora_recipes.core.record import Record, Run
from lora_recipes.core.yamlfile import shown

PLAN = "plan.txt"  # the whole plan, as it was before the first step
EXPORTS = "exports"  # the merged model in fewer bits, a folder for each format
# All that a run writes into its folder. Anything else there is somebody's own, and stays.
FILES = (
    "recipe.yaml",
    PLAN,
    "run.json",
    "metrics.jsonl",
    "loss.png",
    "confusion.png",
    "tensorboard",
    "adapter",
    "model",
    "checkpoints",
    "serving",
    "merged",
    "pass_at_k",
    "style",
    "ab",
    EXPORTS,
)


@dataclass(frozen=True)
class RunFolder:
    """`outputs/<name>/`. The files: recipe.yaml, run.json, metrics.jsonl, loss.png, adapter/ (or model/),
    checkpoints/.
    """

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

    def unfinished(self, method: str) -> Path:
        """The result while it is written."""
        return self.path / f".{self.result(method).name}.tmp"

    @property
    def record(self) -> Record | None:
        """run.json; None when there is none. RecipeError when it is not as this version, or the one before,
        writes it.
        """
        file = self.path / "run.json"
        try:
            return record.loads(file.read_text(encoding="utf-8"), shown(file))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(Problem(shown(file), f"cannot be read: {error}", record.ANEW)) from None

    @property
    def run(self) -> Run | None:
        """The record of the training run here; None when there is none. RecipeError for a combination."""
        found = self.record
        if found is not None and not isinstance(found, Run):
            do = f"name a recipe that was trained, or another {cli.command(OUTPUTS='dir')}"
            raise RecipeError(Problem(shown(self.path), "holds a combination, which was not trained", do))
        return found

    def outcome(self) -> Record:
        """The record of what ended well here, a run or a combination. RecipeError when nothing did."""
        found = self.record
        if found is None or found.status != "finished":
            do = cli.command("train", RECIPE=self.path.name)
            raise RecipeError(Problem(shown(self.path), "holds no finished run", do))
        return found

    @property
    def finished(self) -> bool:
        """Did a run end well here?"""
        found = self.record
        return found is not None and found.status == "finished"

    @property
    def replaced(self) -> Path:
        """Where the finished run that FORCE=1 replaces is kept until the new one has finished too."""
        return self.path / ".replaced"

    @property
    def reserved(self) -> Path:
        """Space that is kept for the result while training runs, as an empty file of its size."""
        return self.path / ".reserved"

    def reserve(self, size: int) -> None:
        """Take `size` bytes of the disk now, so that a full disk stops the run before its first step or at a
        checkpoint, but never at its end. OSError when there is less; nothing where a disk promises nothing.
        """
        self.release()
        try:
            with self.reserved.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            self.release()
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                error.filename = str(self.path)
                raise

    def release(self) -> None:
        """Give back what `reserve` took."""
        self.reserved.unlink(missing_ok=True)

    def foreign(self) -> list[Path]:
        """What lies in the folders of the result and of the merged model, and no run and no merge wrote."""
        try:
            files = known.result_files if isinstance(known := self.record, Run) else None
        except RecipeError:  # FORCE=1 is what its message asks for
            files = None
        return [
            folder / name
            for folder, wrote in [
                (self.path / "adapter", files),
                (self.path / "model", files),
                (self.path / "merged", merged_files(self.path / "merged")),
            ]
            for name in foreign(folder, wrote)
        ]

    def clear(self) -> None:
        """Make room for a new run: a finished run moves to `.replaced/`, an unfinished one goes; other
        people's files stay.
        """
        try:
            keep = self.finished
        except RecipeError:
            keep = False
        self.release()
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

    def unbegun(self) -> None:
        """Take away what is left of a run that was refused before it began: nothing that holds anything."""
        self.release()
        for path in (self.checkpoints, self.path):
            with contextlib.suppress(OSError):  # not there, or not empty
                path.rmdir()

    def write_record(self, new: Record) -> None:
        """Write run.json in one move."""
        write(self.path / "run.json", record.dumps(new))


def noted(result: Path, **found: Any) -> None:
    """Write these fields into run.json of the run that left `result`; nothing where it is of no run. What was
    found holds all the same where that cannot be written: it says so.
    """
    run = RunFolder(result.absolute().parent)
    try:
        if result.name == "adapter" and (known := run.record):
            run.write_record(replace(known, **found))
    except (OSError, RecipeError) as error:
        said = error.problems[0].found if isinstance(error, RecipeError) else error.strerror
        print(f"NOTE        {shown(run.path / 'run.json')} does not record it: {said}", file=sys.stderr)


def merged_files(folder: Path) -> list[str] | None:
    """The names that merge.json lists in a merged model's folder; None where an earlier version kept no
    list.
    """
    try:
        return [*json.loads((folder / "merge.json").read_text(encoding="utf-8"))["files"], "merge.json"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def foreign(folder: Path, wrote: list[str] | None) -> list[str]:
    """The names in `folder` that are none of those that the program `wrote` there; None: unknown, and what
    has the name of a model's file passes.
    """
    if not folder.is_dir():
        return []
    names = {p.name for p in folder.iterdir()}
    if wrote is None:
        wrote = [n for n in names if Path(n).suffix in (".json", ".jinja", ".safetensors", ".model", ".md")]
    return sorted(names - set(wrote))


def make_folder(outputs: Path) -> None:
    """Make the folder of all runs, if it is not there."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            Problem(
                shown(outputs),
                f"cannot be made: {error.strerror}",
                f"give another {cli.command(OUTPUTS='dir')}",
            )
        ) from None


def logged(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. One that cannot be read is left out: the last one was cut off when the
    process was killed; any other is damaged, and is said.
    """
    logs, broken = [], []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            log = json.loads(line)
        except json.JSONDecodeError:
            log = None
        if isinstance(log, dict) and type(log.get("step")) is int and "\ufffd" not in line:
            logs.append(log)
        elif number < len(lines):
            broken.append(str(number))
    if broken:
        print(f"WARNING     {shown(file)}: damaged lines are left out: {', '.join(broken)}")
    return logs


WHOLE = ("full", "freeze")  # train the model itself; the others train an adapter beside it
