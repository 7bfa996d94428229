"""Hold the sections of a recipe against its JSON Schema, and say in words what is wrong. Knows nothing of
files and lines.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from lora_recipes.core.errors import MOST, nearest
from lora_recipes.core.yamlfile import Key, dotted
from lora_recipes.recipe.other_tools import OTHER_NAMES, OWNED, Environment

Fault = tuple[Key, str, str]  # where, what was found, what to do
_KINDS = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false"}
_KINDS |= {"array": "a list", "object": "a mapping", "null": "null"}

# schema keyword -> what was found, what to do
_BOUNDS = {
    "minimum": ("out of range", "at least {}"),
    "exclusiveMinimum": ("out of range", "more than {}"),
    "maximum": ("out of range", "at most {}"),
    "exclusiveMaximum": ("out of range", "less than {}"),
    "minLength": ("too short", "at least {} character"),
    "minItems": ("too short", "at least {} in the list"),
    "maxItems": ("too long", "at most {} in the list"),
}
_WHY = {
    "target_modules": "say which modules get an adapter; PEFT's own choice differs by model and is silent",
    "learning_rate": (
        "say it; TRL's default of 2e-5 is meant for full fine-tuning, LoRA wants about ten times more"
    ),
    "dtype": "float32, bfloat16 or float16: the dtype of the base weights is never left to chance",
    "early_stopping_patience": "say after how many evaluations without improvement to stop",
}


@cache
def schema() -> dict[str, Any]:
    """The checked-in JSON Schema of a recipe (made by `make schema`)."""
    made: dict[str, Any] = json.loads(
        (Path(__file__).parent / "recipe.schema.json").read_text(encoding="ascii")
    )
    return made


@cache
def _validator() -> Any:
    # JSON Schema takes 8.0 for a whole number; torch does not, where it makes a matrix of that size.
    whole = Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, v: isinstance(v, int) and not isinstance(v, bool)
    )
    return extend(Draft202012Validator, type_checker=whole)(schema())


def faults(sections: dict[str, Any]) -> list[Fault]:
    """Everything that the schema refuses in `sections`, and every number that is none."""
    endless = [
        key for key, value in _leaves(sections) if isinstance(value, float) and not math.isfinite(value)
    ]
    found = [
        (key, "not a finite number", "it would pass every limit; write a plain number") for key in endless
    ]
    refused = (
        fault
        for error in _validator().iter_errors(sections)
        for one in _meant(error)
        for fault in _explained(one)
    )
    told = list(dict.fromkeys(f for f in islice(refused, MOST) if f[0] not in endless))
    return found + told + _code(sections, {key for key, _, _ in told})


def _code(sections: dict[str, Any], told: set[Key]) -> list[Fault]:
    """trust_remote_code inside a mapping that is handed on as it is, where the schema does not look."""
    name = "trust_remote_code"
    inside = [key[: key.index(name) + 1] for key, _ in _leaves(sections) if name in key[2:]]
    found = "cannot be set in a recipe", str(OWNED[f"train.{name}"])
    return [(key, *found) for key in dict.fromkeys(inside) if key not in told]


def elsewhere(word: str) -> tuple[str, str] | None:
    """What was found and what to do, for a key that has its place elsewhere in a recipe, or goes by another
    name here.
    """
    homes = [
        f"{section}.{word}"
        for section, its in schema()["properties"].items()
        if word in its.get("properties", ())
    ]
    owned = [advice for name, advice in OWNED.items() if name.endswith(f".{word}")]
    if homes:
        return "stands in the wrong place", f"write it as {' or '.join(homes)}"
    if owned:
        return "cannot be set in a recipe", str(owned[0])
    if word in OTHER_NAMES:
        return "another tool's name", str(OTHER_NAMES[word])
    return None


def secret(word: str) -> bool:
    """Does the key `word`, here or in another tool, hold a token?"""
    answers = (OTHER_NAMES.get(word), OWNED.get(f"train.{word}"))
    return any(isinstance(answer, Environment) and answer.variable.endswith("TOKEN") for answer in answers)


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    if not isinstance(value, dict | list):
        yield key, value
        return
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(child, (*key, name))


def _meant(error: Any) -> Iterator[Any]:
    """The errors inside an `anyOf` that are worth telling: those of the one alternative that is of the
    value's own kind.
    """
    if error.validator != "anyOf":
        yield error
        return
    branches: dict[int, list[Any]] = {}
    for inner in error.context:
        branches.setdefault(inner.schema_path[0], []).append(inner)
    kind = ("type", "enum", "const", "pattern")
    fitting = [
        errors for errors in branches.values() if all(e.path or e.validator not in kind for e in errors)
    ]
    if not fitting:
        yield error
    for inner in min(fitting, key=len, default=[]):
        yield from _meant(inner)


def _explained(error: Any) -> list[Fault]:
    """One schema error in words that say what to do."""
    key, value, limits = tuple(error.absolute_path), error.instance, error.schema
    if error.validator == "additionalProperties":
        return [
            ((*key, word), *_unknown(word, key, limits["properties"]))
            for word in islice((word for word in value if word not in limits["properties"]), MOST)
        ]
    if error.validator == "required":
        # Without its peft_type nothing says which other keys `peft:` takes: then any type's are right.
        fields = {field for part in limits.get("allOf", []) for field in part["then"]["properties"]}
        unknown = [word for word in value if fields and word not in fields]
        strange = [
            ((*key, word), "unknown key", f"did you mean {nearest(word, fields)}?") for word in unknown
        ]
        return strange + [_missing(key, name) for name in limits["required"] if name not in value]
    if error.validator in _BOUNDS:
        found, do = _BOUNDS[error.validator]
        return [(key, f"{_said(value)} is {found}", do.format(error.validator_value))]
    options = alternatives(limits)
    return [(key, f"{_said(value)} is not {_expected(options)}", _hint(value, options))]


def _unknown(word: str, section: Key, allowed: dict[str, Any]) -> tuple[str, str]:
    if advice := OWNED.get(dotted((*section, word))):
        return "cannot be set in a recipe", str(advice)
    if known := elsewhere(word):
        return known
    if not allowed:
        return "unknown key", f"{dotted(section)}: takes no keys"
    return "unknown key" if section else "unknown section", f"did you mean {nearest(word, allowed)}?"


def _missing(section: Key, name: str) -> Fault:
    if not section:
        return section, f"the section `{name}:` is missing", "see configs/recipes/ for an example"
    return section, f"{name!r} is missing", _WHY.get(name, f"add `{name}:`")


def _said(value: Any) -> str:
    """`value` as it is quoted in a message: with its kind, and not at length."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= 80 else f"{text[:76]} ..."
    kind = {"str": "the text ", "list": "the list ", "dict": "the mapping "}.get(type(value).__name__, "")
    return kind + text


def alternatives(limits: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a schema, however deep its `anyOf`s."""
    return [o for option in limits["anyOf"] for o in alternatives(option)] if "anyOf" in limits else [limits]


def _expected(options: list[dict[str, Any]]) -> str:
    return " or ".join(dict.fromkeys(_kind(o) for o in options))


def _kind(option: dict[str, Any]) -> str:
    if "enum" in option:
        return f"one of {', '.join(map(str, option['enum']))}"
    if "const" in option:
        return json.dumps(option["const"])
    return option["description"] if "pattern" in option else _KINDS[option["type"]]


def _hint(value: Any, options: list[dict[str, Any]]) -> str:
    """What to write instead of `value`, where that can be told."""
    types = {o.get("type") for o in options}
    words = [str(v) for o in options for v in o.get("enum", [])]
    if isinstance(value, str):
        return _hint_for_text(value, types, words)
    if value is None:
        return "a key without a value: write one, or remove the line"
    if value is False and "no" in words:
        return "write 'no'"
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return f"write {int(value)}"
    if isinstance(value, bool | int | float) and "string" in types and not words:
        return f"a text that looks otherwise stands in quotation marks: '{json.dumps(value)}'"
    return ""


def _hint_for_text(value: str, types: set[str | None], words: list[str]) -> str:
    switch = {
        "yes": "true",
        "on": "true",
        "true": "true",
        "no": "false",
        "off": "false",
        "false": "false",
    }.get(value.lower())
    if switch and "boolean" in types:
        return f"write {switch}"
    if types & {"integer", "number"} and (number := _number(value)):
        return f"a number stands without quotation marks and underscores: {number}"
    if words:
        return f"did you mean {nearest(value, words)}?"
    if "array" in types:
        return f"write a list: [{value}]"
    if "object" in types and ":" in value:
        return f"a space after the colon: `{value.replace(':', ': ', 1)}`"
    return ""


def _number(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return ""
    return text.replace("_", "")
