"""From what a person names (a recipe, a folder, a hub id) to a folder that is there. Imports no torch."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_recipes.core import cli
from lora_recipes.core.adapter_folder import Adapter
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown


def local(name_or_path: str, revision: str | None = None) -> Path | None:
    """The folder of a model that is on this machine: a path, or a hub id in the cache. None where it would
    have to be fetched.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.count("/") != 1:
        return None
    try:
        return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


BASE = "base"  # the name under which the base model answers


def named(words: list[str], outputs: Path) -> dict[str, Path]:
    """`name=folder`, a folder, or a recipe's name, each -> a name on the server and a folder that must
    exist.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or "/" in name:
            name, equals, place = "", "", word
        run = RunFolder(outputs / place)
        trained = run.result("full") if run.result("full").is_dir() else run.result("lora")
        here = any((Path(place) / name).is_file() for name in ("adapter_config.json", "config.json"))
        folder = Path(place) if "/" in place or here else trained
        if not equals:
            own = folder.absolute()
            name = own.parent.name if own.name in ("adapter", "model", "serving", "merged") else own.name
        if not re.fullmatch(r"[\w.-]+", name) or name == BASE:
            found_, do = (
                f"{name!r} is no name for an adapter",
                f"letters, digits, . _ - and not {BASE!r}: name=folder",
            )
            raise RecipeError(Problem(word, found_, do))
        if name in found:
            raise RecipeError(
                Problem(word, f"a second adapter named {name!r}", "give each its own name: name=folder")
            )
        if not folder.is_dir():
            do = f"{cli.command('train', RECIPE='...')}, or give the adapter's folder"
            raise RecipeError(Problem(word, f"{shown(folder)} is not there", do))
        found[name] = folder.absolute()
    return found


def is_model(folder: Path) -> bool:
    """A whole model, such as a merge leaves, rather than an adapter?"""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def base_of(read: dict[str, Adapter], given: Path | None) -> Path:
    """The one base of all these adapters, as a folder on this machine."""
    wanted = {
        name: (a.config.get("base_model_name_or_path") or "", a.config.get("revision"))
        for name, a in read.items()
    }
    if given is None and len(set(wanted.values())) > 1:
        listed = "; ".join(
            f"{name}: {base}{f' at {revision}' if revision else ''}"
            for name, (base, revision) in wanted.items()
        )
        raise RecipeError(
            Problem(
                "adapters",
                f"they have different bases: {listed}",
                f"one server has one base; {cli.command(BASE='folder')} overrides",
            )
        )
    name, revision = next(iter(wanted.values()))
    folder = given or local(name, revision)
    if folder is None or not (folder / "config.json").is_file():
        at = shown(next(iter(read.values())).path)
        do = f"give its folder: {cli.command(BASE='path')}" + (
            f", or fetch it: hf download {name}" if name.count("/") == 1 else ""
        )
        raise RecipeError(Problem(at, f"its base {given or name} is not on this machine", do))
    return folder.absolute()


def adapter(word: str, outputs: Path) -> Path:
    """The adapter folder that `word` means: a folder itself, or that of a recipe's finished run."""
    if "/" in word or (Path(word) / "adapter_config.json").is_file():
        return Path(word).absolute()
    return run_folder(word, outputs).result("lora")


def run_folder(recipe: str, outputs: Path) -> RunFolder:
    """The run folder of a recipe, which must hold a finished adapter."""
    folder = RunFolder(outputs / recipe)
    if folder.result("full").is_dir():
        raise RecipeError(
            Problem(shown(folder.path), "holds a whole model, no adapter", "name a recipe with lora:")
        )
    folder.outcome()
    return folder
