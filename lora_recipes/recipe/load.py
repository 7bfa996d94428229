"""Find a recipe, read it, override it, check it. Imports no torch; loading one takes well under half a
second."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, files, yamlfile
from lora_recipes.core.errors import Problem, RecipeError, listed, nearest, raise_if
from lora_recipes.core.record import Run
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.recipe import check, rules
from lora_recipes.recipe.recipe import Recipe, sections_of

RECIPES = files.ROOT / "configs" / "recipes"


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
        f"The recipes are {listed(sorted(p.stem for p in RECIPES.glob('*.yaml')), 60)}, and those in"
        " configs/recipes/methods/"
    )
    do = f"did you mean {nearest(Path(name).stem, names())}? {known}"
    if "=" in name:
        do = f"the recipe's name comes first, then {name}. {known}"
    raise RecipeError(
        Problem(
            cli.command(RECIPE=name),
            _nowhere(name, beside or Path()) if is_path else "no recipe of that name in configs/recipes/",
            do,
        )
    )


def run_of(word: str, outputs: Path) -> str:
    """The name of the run that `word` means to the verbs that use what was trained: of a .yaml file its own,
    anything else is as it was given. RecipeError when there is no such file.

    Says so where the run of that name began from a recipe that the file does not hold (another file of the
    same name, or changed since): the run is taken as it was trained.
    """
    if not word.endswith((".yaml", ".yml")):
        return word
    run = RunFolder(outputs / Path(word).stem)
    try:
        file = find(word)
    except RecipeError:
        if not run.path.is_dir():
            raise
        do = f"the run {yamlfile.shown(run.path)} is there: name it {run.path.name}, without .yaml"
        raise RecipeError(Problem(cli.command(RECIPE=word), _nowhere(word, Path()), do)) from None
    kept = run.path / "recipe.yaml"
    if isinstance(record := run.record, Run) and kept.is_file():
        began = Recipe(run.path.name, kept, sections_of(yamlfile.read(kept)[0])).anywhere()
        now = load(str(file), record.plan.overrides).anywhere()
        keys = {(section, key) for said in (began, now) for section, its in said.items() for key in its}
        other = sorted(
            f"{section}.{key}"
            for section, key in keys
            if began.get(section, {}).get(key) != now.get(section, {}).get(key)
        )
        if other or set(began) != set(now):
            of = f" of {listed(other or sorted(set(began) ^ set(now)))}"
            print(
                f"WARNING     {yamlfile.shown(run.path)} was trained from another recipe: {word} says"
                f" otherwise{of}; what was trained is taken ({yamlfile.shown(kept)})",
                file=sys.stderr,
            )
    return run.path.name


def runs_of(words: Sequence[str], outputs: Path) -> list[str]:
    """`run_of` for words that may be `name=place`."""
    found = []
    for word in words:
        name, equals, place = word.partition("=")
        named = equals and "/" not in name
        found.append(f"{name}={run_of(place, outputs)}" if named else run_of(word, outputs))
    return found


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
    sections, task = sections_of(content), {k: v for k, v in content.items() if k == "task"}
    set_by, refused = _override(sections, overrides)
    recipe = Recipe(path.stem, path, sections, lines, set_by)
    faults = check.faults(task | sections)
    if "classify" in sections and not task:
        faults.append((("classify",), "is read only with task: classify", "write that too, or remove it"))
    faults.sort(key=lambda fault: _line(recipe.written(fault[0])))
    problems += [Problem(recipe.at(*key), found, do) for key, found, do in faults] + refused
    raise_if(problems + rules.at_load(recipe, {key[0] if key else "" for key, _, _ in faults}))
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
        key, _, written = text.partition("=")
        key = key.strip()
        section, _, name = key.partition(".")
        text = _discreet(text)
        where = f"override {text!r}"
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


def _discreet(text: str) -> str:
    """The override `text` as messages repeat it: without a token of the hub."""
    key, equals, _ = text.partition("=")
    if equals and any(check.secret(word) for word in key.strip().lower().split(".")):
        return f"{key}=..."
    return re.sub(r"\bhf_[A-Za-z0-9]{30,}", "hf_...", text)


def _malformed(text: str) -> str:
    """What to write instead, where the override `text` is not section.key=value; empty where it is."""
    key, equals, value = text.partition("=")
    if strange := yamlfile.invisible(key):
        return f"{strange} stands in it, which cannot be seen: type it anew"
    section, *names = key.strip().split(".")
    if not names and (known := check.elsewhere(section)):
        return known[1]
    if len(names) > 1 and equals:
        return f"an override sets a whole key: {section}.{names[0]}={{{'.'.join(names[1:])}: {value}}}"
    if equals and section and names and names[0]:
        return ""
    return f"e.g. lora.r=16 (several: {cli.command(SET=['lora.r=16', 'lora.lora_alpha=32'])})"


def _value(where: str, written: str) -> tuple[Any, list[Problem]]:
    try:
        value, _, problems = yamlfile.parse(written, where)
    except RecipeError as error:
        do = "put the value in quotation marks if it holds spaces, or is a text that begins with a mark"
        return None, [Problem(where, p.found, do) for p in error.problems]
    return value, [Problem(where, p.found, p.do) for p in problems]
