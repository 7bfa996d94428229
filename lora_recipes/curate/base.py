"""The base that `--base` names: that of a recipe, a folder, or a model on the hub."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_recipes.core import cli, hub
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.files import OUTPUTS

if TYPE_CHECKING:  # the hub's client alone takes 0.3 s to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_recipes.recipe.base import Resolved


def option(parser: Any, required: bool = False) -> None:
    """`--base`, and where recipes put what they make."""
    parser.add_argument(
        "--base",
        required=required,
        metavar="BASE",
        help="a recipe (name or file: its base), a checkpoint's folder, or its hub id",
    )
    parser.add_argument(
        "--outputs",
        type=Path,
        default=OUTPUTS,
        metavar="DIR",
        help="where a recipe's base is made (default: outputs/)",
    )


def resolved(word: str, outputs: Path) -> "Resolved":
    """The base that `word` names, resolved."""
    from lora_recipes.recipe import load
    from lora_recipes.recipe.base import resolve
    from lora_recipes.recipe.recipe import Recipe

    if word in load.names() or word.endswith((".yaml", ".yml")):
        return resolve(load.load(word), outputs)
    if not Path(word).is_dir() and not hub.is_id(word):
        do = "a recipe's name or .yaml file, a folder with a checkpoint, or owner/name on the hub"
        raise RecipeError(Problem(f"--base {word}", "no recipe of that name, and no folder", do))
    sections: dict[str, dict[str, Any]] = {"model": {"name_or_path": word, "dtype": "float32"}}
    # What a recipe must have besides, and nothing here reads.
    sections |= {"data": {"train": ""}, "train": {"learning_rate": 0.0, "max_length": 1}, "full": {}}
    said = {"model.name_or_path": f"--base {word}"}
    return resolve(Recipe("base", Path.cwd() / "--base", sections, overrides=said), outputs)


def tokenizer(base: "Resolved") -> "PreTrainedTokenizerBase":
    """Its tokenizer."""
    from lora_recipes.data import tokenizer as tokenizing

    _make(base)
    return tokenizing.load(base)


def model(base: "Resolved") -> "PreTrainedModel":
    """The base with its weights, on the GPU where there is one."""
    import torch

    from lora_recipes.model import checkpoint

    _make(base)
    loaded: PreTrainedModel = checkpoint.load(base.base, dtype=getattr(torch, base.recipe.model.dtype))
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def fingerprint(base: "Resolved") -> str:
    """SHA-256 of the names, sizes and times of its files: another one where they were written anew. Empty
    where they are not here.
    """
    folder = base.base.folder
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir())] if folder else []
    listed = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest() if listed else ""


def _make(base: "Resolved") -> None:
    """Make the checkpoint of a base that comes from a contract or a package, unless it is there."""
    weights = base.recipe.model.weights
    if base.base.maker and not Path(base.base.weights).is_dir():
        name = base.base.maker.recipe.name
        do = cli.command("train", RECIPE=name)
        raise RecipeError(Problem(base.base.at, f"the base {name} is not trained yet", do))
    if weights not in ("random", "package"):
        return
    with cli.importing():
        from lora_recipes.core import lock
        from lora_recipes.model import build, package

    with lock.held(Path(base.base.weights), "makes this base", wait=True):
        (build.random_base if weights == "random" else package.base)(base)
