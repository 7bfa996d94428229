"""A recipe: find it, read it, override it, check it. Imports no torch; loading one takes well under half a
second.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_recipes.core import files, yamlfile
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.run_folder import WHOLE
from lora_recipes.recipe import check

RECIPES = files.ROOT / "configs" / "recipes"
METHODS = ("lora", "peft", "freeze", "full")
# section.key -> the endings of a file that it may name; empty: a file or folder of any name
PATHS: dict[tuple[str, str], tuple[str, ...]] = {
    ("data", "train"): (),
    ("data", "eval"): (),
    ("data", "kept"): (),
    ("model", "name_or_path"): (),
    ("model", "tokenizer"): (),
    ("model", "chat_template"): (".jinja", ".j2"),  # other words are names of TRL's own
    ("model", "from_recipe"): (".yaml", ".yml"),  # of shipped recipes
    ("warm_start", "from_recipe"): (".yaml", ".yml"),
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. The sections are plain dictionaries with the owners' own keys; `at` tells where a key
    was written.
    """

    name: str
    path: Path
    sections: dict[str, dict[str, Any]]
    lines: yamlfile.Lines = field(default_factory=dict, repr=False)
    overrides: dict[str, str] = field(default_factory=dict)  # section.key -> the override's own text

    def __getattr__(self, section: str) -> dict[str, Any]:
        """`recipe.train`, `recipe.lora`...: the section, empty when it is not in the file."""
        if section in check.schema()["properties"]:
            return self.sections.get(section, {})
        raise AttributeError(section)

    @property
    def method(self) -> str:
        """`lora`, `peft`, `freeze` or `full`: the one method section that stands in the recipe."""
        return next(m for m in METHODS if m in self.sections)

    @property
    def whole(self) -> bool:
        """Does the run leave a whole model (`full:`, `freeze:`), not an adapter?"""
        return self.method in WHOLE

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own section."""
        return self.sections[self.method]

    def at(self, *key: str | int) -> str:
        """Where `key` was written: `configs/recipes/x.yaml:12 lora.r`, or the override that set it."""
        place = self.written(key)
        place = f"override {place!r}" if isinstance(place, str) else f"{yamlfile.shown(self.path)}:{place}"
        return f"{place} {yamlfile.dotted(key)}".rstrip()

    def written(self, key: yamlfile.Key) -> int | str:
        """The line of `key`, or of the innermost thing around it that has one; or the text of the override
        that set it.
        """
        if by := self.overrides.get(yamlfile.dotted(key[:2])):
            return by
        if key and key[:1] not in self.lines:  # a section that only overrides made
            return next((text for name, text in self.overrides.items() if name.startswith(f"{key[0]}.")), 1)
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def to_yaml(self) -> str:
        """The recipe as resolved, overrides applied."""
        return yamlfile.dump(self.sections)

    def file(self, path: str) -> Path:
        """The file or folder that `path` in this recipe means, there or not (files.find)."""
        return files.find(path, self.path.parent)

    def looked(self, path: str) -> str:
        """Where `file` looked for a path that is nowhere, in words."""
        return files.looked(path, self.path.parent)

    def anywhere(self) -> dict[str, dict[str, Any]]:
        """The sections with every path written so that it means the same file wherever they are read
        (files.anywhere).
        """
        return {
            section: {
                key: _anywhere(value, self.path.parent) if _names_file(section, key, value) else value
                for key, value in its.items()
            }
            for section, its in self.sections.items()
        }


def _names_file(section: str, key: str, value: Any) -> bool:
    endings = PATHS.get((section, key))
    return endings == () or (endings is not None and str(value).endswith(endings))


def _anywhere(value: Any, beside: Path) -> Any:
    """A path, a data source with its `path`, or a list of them."""
    if isinstance(value, list):
        return [_anywhere(item, beside) for item in value]
    if isinstance(value, dict):
        return value | {"path": _anywhere(value["path"], beside)} if "path" in value else value
    return files.anywhere(value, beside) if isinstance(value, str) else value


def names() -> list[str]:
    """The names of the recipes in configs/recipes/ and its folders."""
    return sorted(p.stem for p in RECIPES.rglob("*.yaml"))


def find(name: str, beside: Path | None = None) -> Path:
    """The file of the recipe `name`: a name in configs/recipes/ or a folder there, or a path to a .yaml
    file, tried as files.find tells (`beside`: the folder of the file that names it; default: here).
    """
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    if is_path and (found := files.find(name, beside or Path())).is_file():
        return Path(name) if Path(name).absolute() == found else found
    if name in names():
        return next(RECIPES.rglob(f"{name}.yaml"))
    known = (
        f"The recipes are {listed(sorted(p.stem for p in RECIPES.glob('*.yaml')))}, and those in"
        " configs/recipes/methods/"
    )
    do = f"did you mean {nearest(Path(name).stem, names())}? {known}"
    if "=" in name:
        do = f"the recipe's name comes first, then {name}. {known}"
    raise RecipeError(
        Problem(
            f"RECIPE={name}",
            _nowhere(name, beside or Path()) if is_path else "no recipe of that name in configs/recipes/",
            do,
        )
    )


def _nowhere(name: str, beside: Path) -> str:
    return ", ".join(filter(None, ["no such file", files.looked(name, beside)]))


def load(name: str, overrides: Sequence[str] = (), beside: Path | None = None) -> Recipe:
    """The recipe `name` (a name or a path, as `find` takes it) with `section.key=value` overrides applied,
    checked.

    Raises RecipeError with every problem: unknown keys (with the nearest real one), wrong types, values out
    of range, missing keys, sections that exclude each other.
    """
    path = find(name, beside)
    content, lines, problems = yamlfile.read(path)
    # `full:` and `full: {}` are the same; a section that should hold something is then told what it lacks.
    sections = {key: {} if value is None else value for key, value in content.items()}
    set_by, refused = _override(sections, overrides)
    recipe = Recipe(path.stem, path, sections, lines, set_by)
    faults = check.faults(sections)
    faults.sort(key=lambda fault: _line(recipe.written(fault[0])))
    problems += [Problem(recipe.at(*key), found, do) for key, found, do in faults] + refused
    raise_if(problems + _conflicts(recipe, {key[0] if key else "" for key, _, _ in faults}))
    return recipe


def _line(place: int | str) -> int:
    return place if isinstance(place, int) else sys.maxsize  # overrides come after the file


def _override(sections: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Apply the overrides in place; returns `section.key` -> the override's own text, and what is wrong with
    the others.
    """
    set_by: dict[str, str] = {}
    problems: list[Problem] = []
    for text in overrides:
        where = f"override {text!r}"
        key, _, written = text.partition("=")
        key = key.strip()
        section, _, name = key.partition(".")
        if do := _malformed(text):
            problems.append(Problem(where, "not section.key=value", do))
        elif key in set_by:
            problems.append(Problem(where, f"given twice, first as {set_by[key]!r}", "keep one"))
        elif not written.strip():
            problems.append(Problem(where, "has no value", f"{key}=null, if that is what is meant"))
        else:
            value, faults = _value(where, written)
            problems += faults
            if not faults and isinstance(
                sections.setdefault(section, {}), dict
            ):  # if not, the file's own error is told with its line
                sections[section][name] = value
                if value is None and section in ("model", "data"):  # ours know no null: it takes the key out
                    del sections[section][name]
                set_by[key] = text
    return set_by, problems


def _malformed(text: str) -> str:
    """What to write instead, where the override `text` is not section.key=value; empty where it is."""
    key, equals, value = text.partition("=")
    section, *names = key.strip().split(".")
    if not names and (known := check.elsewhere(section)):
        return known[1]
    if len(names) > 1 and equals:
        return f"an override sets a whole key: {section}.{names[0]}={{{'.'.join(names[1:])}: {value}}}"
    if equals and section and names and names[0]:
        return ""
    return "e.g. lora.r=16 (several: SET='lora.r=16 lora.lora_alpha=32')"


def _value(where: str, written: str) -> tuple[Any, list[Problem]]:
    try:
        value, _, problems = yamlfile.parse(written, where)
    except RecipeError as error:
        do = "put the value in quotation marks if it holds spaces, or is a text that begins with a mark"
        return None, [Problem(where, p.found, do) for p in error.problems]
    return value, [Problem(where, p.found, p.do) for p in problems]


def _conflicts(recipe: Recipe, doubtful: set[str | int]) -> list[Problem]:
    """What the schema cannot say: keys that need or exclude each other.

    `doubtful` are the sections with a fault already told, "" being the file as a whole: what seems to be
    missing there may be misspelled.
    """
    problems = _method(recipe, bool(doubtful - set(check.schema()["properties"])))
    if not doubtful & {"", "model"}:
        problems += _base(recipe)
    if not doubtful & {"", "data", "train", "early_stopping"}:
        problems += _evaluation(recipe)
    return problems


def _method(recipe: Recipe, misspelled: bool) -> list[Problem]:
    methods = [m for m in METHODS if m in recipe.sections]
    if len(methods) == 1 or (misspelled and not methods):
        return []
    found = f"both {' and '.join(f'{m}:' for m in methods)} are given" if methods else "no method section"
    return [
        Problem(
            recipe.at(*methods[-1:]),
            found,
            "exactly one of lora:, peft: (other adapters), freeze: (the last blocks), full: (every weight)",
        )
    ]


def _base(recipe: Recipe) -> list[Problem]:
    model = recipe.model
    if model.get("weights") == "random":
        problems = []
        if not model.get("contract"):
            problems.append(
                Problem(
                    recipe.at("model", "weights"),
                    "random weights need model.contract",
                    "name one of configs/models/",
                )
            )
        if model.get("from_recipe"):
            problems.append(
                Problem(
                    recipe.at("model", "from_recipe"),
                    "random weights and from_recipe exclude each other",
                    "keep one",
                )
            )
        return problems
    sources = [k for k in ("name_or_path", "from_recipe") if model.get(k)]
    if len(sources) == 1:
        return []
    found = "name_or_path and from_recipe exclude each other" if sources else "no base model"
    return [
        Problem(
            recipe.at("model"), found, "one of name_or_path, from_recipe, or weights: random with a contract"
        )
    ]


def _evaluation(recipe: Recipe) -> list[Problem]:
    problems, train = [], recipe.train
    has_rows, evaluates = bool(recipe.data.get("eval")), train.get("eval_strategy", "no") != "no"
    if evaluates and not has_rows:
        do = "set data.eval, or eval_strategy: 'no'"
        problems.append(Problem(recipe.at("train", "eval_strategy"), "there is nothing to evaluate on", do))
    if recipe.early_stopping and not has_rows:
        do = "name an eval file or remove the section"
        problems.append(Problem(recipe.at("early_stopping"), "early stopping needs data.eval", do))
    if recipe.early_stopping and not evaluates:
        problems.append(
            Problem(
                recipe.at("train", "eval_strategy"), "early stopping needs eval_strategy", "steps or epoch"
            )
        )
    if recipe.early_stopping and train.get("save_strategy") == "no":
        problems.append(
            Problem(
                recipe.at("train", "save_strategy"),
                "early stopping needs save_strategy",
                "steps, epoch or best",
            )
        )
    return problems
