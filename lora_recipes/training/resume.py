"""May a run begin here, or go on? And what may not change in between. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from lora_recipes.core import cli
from lora_recipes.core.checkpoints import newest_whole, steps_of
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.run_folder import FILES, RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.recipe.recipe import Recipe, sections_of

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


def may_start(folder: RunFolder, resume: bool, force: bool) -> None:
    """Refuse to overwrite a run, or to continue one, unless that was asked for."""
    where, saved = shown(folder.path), [p.name for p in steps_of(folder.checkpoints)]
    if resume and force:
        both = f"{cli.command(RESUME=True)} and {cli.command(FORCE=True)}"
        raise RecipeError(Problem(where, f"{both} exclude each other", "continue the run, or begin it anew"))
    if resume and not saved:
        raise RecipeError(
            Problem(where, "there is no checkpoint to resume from", f"run without {cli.command(RESUME=True)}")
        )
    if force:
        if own := folder.foreign():
            do = f"move it away: {cli.command(FORCE=True)} replaces these folders whole"
            raise RecipeError(
                [Problem(shown(path), "was written by no run and no merge", do) for path in own]
            )
        return
    if folder.finished:
        do = (
            f"{cli.command(FORCE=True)} trains anew and replaces it; {cli.command(OUTPUTS='dir')} keeps it"
            " and trains elsewhere; or copy the recipe to a new name"
        )
        raise RecipeError(Problem(where, "holds a finished run", do))
    if saved and not resume:
        raise RecipeError(
            Problem(
                where,
                f"holds an unfinished run ({saved[0]})",
                f"{cli.command(RESUME=True)} continues it, {cli.command(FORCE=True)} begins anew",
            )
        )
    found = [name for name in FILES if _holds(folder.path / name)]
    if found and not folder.record:
        raise RecipeError(
            Problem(
                where,
                f"holds {', '.join(found)}, but no run.json",
                f"move them away, or {cli.command(FORCE=True)} replaces them",
            )
        )


def _holds(path: Path) -> bool:
    """Is there anything? The folder that a trainer makes before it begins, or is killed, is nothing."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def left(folder: RunFolder, ranks: int = 1) -> str:
    """What is there after a run of `ranks` processes that could not write, and how to go on."""
    try:
        if folder.finished:
            return "the finished run there is as it was"
    except RecipeError:
        pass
    whole, _ = newest_whole(folder.checkpoints, ranks)
    if whole:
        return f"{whole.name} is whole: {cli.command(RESUME=True)}"
    kept = f"; the run that it was to replace is kept in {shown(folder.replaced)}/"
    anew = f"no checkpoint is whole yet: {cli.command(FORCE=True)}"
    again = anew if steps_of(folder.checkpoints) else "then begin again"
    return again + (kept if folder.replaced.exists() else "")


def differences(folder: RunFolder, recipe: Recipe, facts: Mapping[str, str | None]) -> list[str]:
    """What a resumed run would silently ignore or mix: each value that differs from the run that is to be
    continued. `facts`: fields of ResumeFacts by name, as they are now.
    """
    try:
        before = yaml.safe_load((folder.path / "recipe.yaml").read_text(encoding="utf-8")) or {}
        began = sections_of(before)
        before = Recipe(recipe.name, folder.path / "recipe.yaml", began).anywhere()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        do = f"without it nobody knows what the run began with: {cli.command(FORCE=True)} begins anew"
        raise RecipeError(
            Problem(shown(folder.path / "recipe.yaml"), f"cannot be read: {error}", do)
        ) from None
    found, now = [], recipe.anywhere()
    for section in sorted((set(before) | set(now)) - {"probes"}):
        old, new = before.get(section) or {}, now.get(section) or {}
        for key in sorted(set(old) | set(new)):
            if (
                old.get(key) != new.get(key)
                and not (section == "train" and key in HARMLESS)
                and (section, key) != ("data", "kept")
            ):
                found.append(
                    f"{section}.{key}: the run began with {old.get(key)!r}, now it is {new.get(key)!r}"
                )
    run = folder.run if facts else None
    for name, value in facts.items():
        began_with = getattr(run.resume_facts, name) if run else None
        if began_with != value:
            found.append(f"{name.replace('_', ' ')}: the run began with {began_with}, now it is {value}")
    return found
