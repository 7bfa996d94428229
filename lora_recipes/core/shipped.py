"""The files of configs/ that come with the package: listed with what each is for, and copied to begin one's
own. Imports no torch.
"""

import os
import re
from pathlib import Path

from lora_recipes.core import files
from lora_recipes.core.errors import Problem, RecipeError, nearest

CONFIGS = files.ROOT / "configs"
SCHEMA = Path(__file__).resolve().parents[1] / "recipe" / "recipe.schema.json"
_SCHEMA_LINE = re.compile(r"(?m)^# yaml-language-server: \$schema=.*$")

# folder of configs/ -> how its files are used
KINDS = {
    "recipes": "lora-recipes plan NAME, lora-recipes train NAME",
    "recipes/methods": "the same, one for each method",
    "ablations": "lora-recipes ablate NAME",
    "accelerate": "--accelerate NAME",
    "models": "model.contract: NAME",
}
COPIED = [kind for kind in KINDS if kind != "models"]  # a contract is found by its name alone


def listing() -> str:
    """Every shipped file by folder, each with the first line that it says of itself."""
    width = max(len(file.stem) for kind in KINDS for file in (CONFIGS / kind).glob("*.yaml"))
    lines = []
    for kind, use in KINDS.items():
        lines += ["", f"{kind} ({use})"]
        lines += [
            f"  {file.stem:<{width}}  {_first_line(file)}" for file in sorted((CONFIGS / kind).glob("*.yaml"))
        ]
    return "\n".join(lines[1:])


def _first_line(file: Path) -> str:
    said = (
        line.removeprefix("#").strip()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("#") and not _SCHEMA_LINE.match(line)
    )
    return next(said, "")


def copy(name: str, target: Path) -> Path:
    """Copy the shipped recipe, ablation or accelerate file `name` (or `folder/name`) to the file `target`
    (or into that folder).

    Nothing is overwritten. The copy works where it lies: the paths in it are found in the repository
    (files.find), and the line that tells editors the schema is written anew.
    """
    known = {f"{kind}/{file.stem}": file for kind in COPIED for file in (CONFIGS / kind).glob("*.yaml")}
    meant = [full for full, file in known.items() if name in (full, file.stem)]
    if not meant:
        do = f"did you mean {nearest(name, [f.stem for f in known.values()])}? lora-recipes ls lists them"
        raise RecipeError(Problem(name, "is no shipped recipe, ablation or accelerate file", do))
    if len(meant) > 1:
        raise RecipeError(Problem(name, f"is the name of {len(meant)} files", f"say {' or '.join(meant)}"))
    source = known[meant[0]]
    file = target / source.name if target.is_dir() else target
    if file.suffix not in (".yaml", ".yml"):
        raise RecipeError(
            Problem(str(file), "has no .yaml at its end: it would be taken for a name", f"{file}.yaml")
        )
    if file.exists():
        raise RecipeError(Problem(str(file), "is already there", "give another name, or remove it first"))
    near = file.resolve().is_relative_to(files.ROOT)
    schema = os.path.relpath(SCHEMA, file.resolve().parent) if near else str(SCHEMA)
    text = source.read_text(encoding="utf-8")
    files.write(file, _SCHEMA_LINE.sub(lambda _: f"# yaml-language-server: $schema={schema}", text, count=1))
    return file
