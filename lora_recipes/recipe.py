"""A recipe: find it, read it, override it, check it. Imports no torch; loading one takes well under half a second."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from lora_recipes import yamlfile
from lora_recipes.messages import OTHER_NAMES, OWNED, Problem, RecipeError, listed, nearest, raise_if

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "recipes"
METHODS = ("lora", "full")


@cache
def schema() -> dict[str, Any]:
    """The checked-in JSON Schema of a recipe (made by `make schema`)."""
    return json.loads((Path(__file__).parent / "recipe.schema.json").read_text())


def rooted(path: str | Path) -> Path:
    """`path` as given when absolute, else taken from the repository's root, wherever the command is run."""
    return ROOT / path


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. The sections are plain dictionaries with the owners' own keys; `at` tells where a key was written."""

    name: str
    path: Path
    sections: dict[str, dict[str, Any]]
    lines: yamlfile.Lines = field(default_factory=dict, repr=False)
    overrides: dict[str, str] = field(default_factory=dict)

    def __getattr__(self, section: str) -> dict[str, Any]:
        """`recipe.train`, `recipe.lora`...: the section, empty when it is not in the file."""
        if section in schema()["properties"]:
            return self.sections.get(section) or {}
        raise AttributeError(section)

    @property
    def method(self) -> str:
        """`lora` or `full`: the one method section that stands in the recipe."""
        return next(m for m in METHODS if m in self.sections)

    def at(self, *key: str | int) -> str:
        """Where `key` was written: `configs/recipes/x.yaml:12 lora.r`, or the override that set it."""
        return _where(self.path, self.lines, self.overrides, key)

    def to_yaml(self) -> str:
        """The recipe as resolved, overrides applied."""
        return yaml.safe_dump(self.sections, sort_keys=False, allow_unicode=True, width=120)


def names() -> list[str]:
    """The names of the recipes in configs/recipes/."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of the recipe `name`: a name in configs/recipes/, or a path to a .yaml file."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise RecipeError(Problem(name, "no such file", f"the recipes here are {listed(names())}"))
    if name in names():
        return RECIPES / f"{name}.yaml"
    suggestion = f"did you mean {nearest(name, names())}? The recipes are {listed(names())}"
    raise RecipeError(Problem(f"RECIPE={name}", "no recipe of that name in configs/recipes/", suggestion))


def load(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe `name` (a name or a path) with `section.key=value` overrides applied, checked.

    Raises RecipeError with every problem: unknown keys (with the nearest real one), wrong types, values out of range, missing keys,
    sections that exclude each other.
    """
    path = find(name)
    sections, lines = yamlfile.load(path)
    set_by = _override(sections, lines, overrides)
    problems = [p for error in _errors(sections) for p in _explain(error, path, lines, set_by)]
    if not problems:
        problems = _check(Recipe(path.stem, path, sections, lines, set_by))
    raise_if(problems)
    return Recipe(path.stem, path, {k: v for k, v in sections.items() if v is not None}, lines, set_by)


def _override(sections: dict[str, Any], lines: yamlfile.Lines, overrides: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Apply the overrides in place; returns `section.key` -> the override's own text."""
    problems, set_by = [], {}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name and "." not in name):
            do = "write section.key=value, e.g. lora.r=16 (several: SET='lora.r=16 lora.lora_alpha=32')"
            problems.append(Problem(f"override {text!r}", "not section.key=value", do))
            continue
        if not isinstance(sections.get(section), dict | None):
            continue  # the file's own error is reported with its line
        parsed, _, found = yamlfile.parse(value, f"override {text!r}")
        problems += found
        sections[section] = (sections.get(section) or {}) | {name: parsed}
        set_by[f"{section}.{name}"] = text
    raise_if(problems)
    return set_by


def _errors(sections: dict[str, Any]) -> list[ValidationError]:
    sections = {name: section for name, section in sections.items() if section is not None or name == "model"}
    return sorted(Draft202012Validator(schema()).iter_errors(sections), key=lambda e: [str(k) for k in e.absolute_path])


def _where(path: Path, lines: yamlfile.Lines, set_by: dict[str, str], key: tuple[str | int, ...]) -> str:
    dotted = ".".join(map(str, key[:1])) + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in key[1:])
    if override := set_by.get(".".join(map(str, key[:2]))):
        return f"override {override!r} {dotted}"
    known: tuple[str | int, ...] = key
    while known and known not in lines:
        known = known[:-1]
    return f"{yamlfile.shown(path)}:{lines.get(known, 1)} {dotted}".rstrip()


def _explain(error: ValidationError, path: Path, lines: yamlfile.Lines, set_by: dict[str, str]) -> list[Problem]:
    """One schema error in words that say what to do."""
    key = tuple(error.absolute_path)
    if error.validator == "additionalProperties":
        allowed = error.schema["properties"]
        unknown = [k for k in error.instance if k not in allowed]
        return [Problem(_where(path, lines, set_by, (*key, k)), *_unknown(str(k), key, allowed)) for k in unknown]
    if error.validator == "required":
        missing = [k for k in error.validator_value if k not in error.instance]
        return (
            [Problem(_where(path, lines, set_by, key), f"{k!r} is missing", _missing(k)) for k in missing[:1]]
            if key
            else [
                Problem(f"{yamlfile.shown(path)}:1", f"the section `{k}:` is missing", "see configs/recipes/ for an example")
                for k in missing
                if f"'{k}'" in error.message
            ]
        )
    value, limits = error.instance, error.schema
    if error.validator in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        words = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
        return [Problem(_where(path, lines, set_by, key), f"{value} is out of range", f"{words[error.validator]} {error.validator_value}")]
    return [Problem(_where(path, lines, set_by, key), f"{_quoted(value)} is not {_expected(limits)}", _hint(value, limits))]


def _unknown(word: str, section: tuple[str | int, ...], allowed: dict[str, Any]) -> tuple[str, str]:
    dotted = ".".join([*map(str, section), word])
    if dotted in OWNED:
        return "cannot be set in a recipe", OWNED[dotted]
    homes = [f"{s}.{word}" for s, v in schema()["properties"].items() if word in v.get("properties", {})]
    if homes:
        return "stands in the wrong section", f"write it as {' or '.join(homes)}"
    if word in OTHER_NAMES:
        return "another tool's name", f"here it is {OTHER_NAMES[word]}"
    kind = "section" if not section else "key"
    return f"unknown {kind}", f"did you mean {nearest(word, allowed)}?"


def _missing(key: str) -> str:
    return {
        "target_modules": "say which modules get an adapter; PEFT's own choice differs by model and is silent",
        "learning_rate": "say it; TRL's default of 2e-5 is meant for full fine-tuning, LoRA wants about ten times more",
        "dtype": "float32, bfloat16 or float16: the dtype of the base weights is never left to chance",
    }.get(key, "a recipe states it")


def _quoted(value: Any) -> str:
    return f"the text {value!r}" if isinstance(value, str) else json.dumps(value, default=str)


def _options(limits: dict[str, Any]) -> list[dict[str, Any]]:
    return [o for option in limits["anyOf"] for o in _options(option)] if "anyOf" in limits else [limits]


def _expected(limits: dict[str, Any]) -> str:
    words = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false"}
    words |= {"array": "a list", "object": "a mapping", "null": "null"}
    kinds = [
        f"one of {', '.join(map(str, o['enum']))}" if "enum" in o else words.get(o.get("type", ""), "what is expected")
        for o in _options(limits)
    ]
    return " or ".join(dict.fromkeys(kinds))


def _hint(value: Any, limits: dict[str, Any]) -> str:
    options = _options(limits)
    enums = [str(v) for o in options for v in o.get("enum", [])]
    if enums and isinstance(value, str):
        return f"did you mean {nearest(value, enums)}?"
    types = {o.get("type") for o in options}
    if isinstance(value, str) and "boolean" in types and value.lower() in ("no", "off", "yes", "on"):
        return f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if isinstance(value, str) and types & {"integer", "number"}:
        return "a number stands without quotation marks"
    return ""


def _check(recipe: Recipe) -> list[Problem]:
    """What the schema cannot say."""
    problems = []
    methods = [m for m in METHODS if m in recipe.sections]
    if len(methods) != 1:
        found = f"both {' and '.join(m + ':' for m in methods)} are given" if methods else "no method section"
        problems.append(Problem(f"{yamlfile.shown(recipe.path)}:1", found, "exactly one of lora: (an adapter) or full: (every weight)"))
    model = recipe.model
    sources = [k for k in ("name_or_path", "from_recipe") if model.get(k)]
    if model.get("weights") == "random":
        if not model.get("contract"):
            problems.append(Problem(recipe.at("model", "weights"), "random weights need model.contract", "name one of configs/models/"))
        if model.get("from_recipe"):
            problems.append(Problem(recipe.at("model", "from_recipe"), "random weights and from_recipe exclude each other", "keep one"))
    elif len(sources) != 1:
        found = "no base model" if not sources else "name_or_path and from_recipe exclude each other"
        do = "one of name_or_path, from_recipe, or weights: random with a contract"
        problems.append(Problem(recipe.at("model"), found, do))
    if recipe.early_stopping and not recipe.data.get("eval"):
        problems.append(Problem(recipe.at("early_stopping"), "early stopping needs data.eval", "name an eval file or remove the section"))
    if recipe.train.get("eval_strategy", "no") != "no" and not recipe.data.get("eval"):
        problems.append(
            Problem(recipe.at("train", "eval_strategy"), "there is nothing to evaluate on", "set data.eval, or eval_strategy: 'no'")
        )
    for section in ("eval_strategy", "save_strategy"):
        if recipe.early_stopping and recipe.train.get(section, "no" if section == "eval_strategy" else "steps") == "no":
            problems.append(Problem(recipe.at("train", section), f"early stopping needs {section}", "steps or epoch"))
    return problems
