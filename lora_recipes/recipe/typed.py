"""Make `sections.py` from the schema: one typed, frozen class a section, with its keys and their defaults.
`make schema` writes it; type checkers read it, so that `recipe.train.max_lenght` fails in mypy.
"""

from collections.abc import Iterator
from typing import Any

HEAD = '''"""The sections of a recipe as typed values. `make schema` writes this file from the schema.

Defaults are those of the owner's class, before it looks at the machine. `given` holds what the recipe says.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Required, Self, TypedDict


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a recipe; `given` are the keys that stand in it."""

    given: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """The section that says `given`, which was held against the schema before."""
        return cls(given=given, **given)


class Source(TypedDict, total=False):
    """One source of rows."""

    path: Required[str]
    name: str
    split: str
    revision: str
    streaming: bool
    weight: float
    share: float
    format: str
    columns: dict[str, str]


class Probe(TypedDict):
    """A next-token question, and the word that should follow."""

    prompt: str
    answer: str


'''
SIMPLE = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
NAMED = {
    frozenset(
        {"path", "name", "split", "revision", "streaming", "weight", "share", "format", "columns"}
    ): "Source"
}
NAMED |= {frozenset({"prompt", "answer"}): "Probe"}
MOST = 8  # words in a Literal; longer lists (optimizers, schedules) are texts


def source(schema: dict[str, Any]) -> str:
    """The text of sections.py, for `ruff format`."""
    sections = {
        name: its for name, its in schema["properties"].items() if its.get("properties") or "allOf" in its
    }  # task: is one word, and full: {} has no key
    return HEAD + "\n\n".join(_section(name, its) for name, its in sections.items())


def _section(name: str, schema: dict[str, Any]) -> str:
    head = f"class {_camel(name)}(Section):"
    lines = ["@dataclass(frozen=True, kw_only=True)", head, f'    """The `{name}:` section."""', ""]
    keys: dict[str, dict[str, Any]] = dict(schema["properties"])
    for kind in schema.get("allOf", []):  # peft: each peft_type has keys of its own; here all of them stand
        keys |= {k: its | {"default": None} for k, its in kind["then"]["properties"].items() if k not in keys}
    required = schema.get("required", [])
    for key, its in keys.items():
        hint = _hint(its)
        if key in required:
            lines.append(f"    {key}: {hint}")
            continue
        value = its.get("default")
        if value is None and "None" not in hint.split(" | ") and hint != "Any":
            hint += " | None"
        shown = repr(value)
        if isinstance(value, list | dict):
            made = type(value).__name__ if not value else f"lambda: {value!r}"
            shown = f"field(default_factory={made})"
        lines.append(f"    {key}: {hint} = {shown}")
    return "\n".join([*lines, ""])


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _hint(schema: dict[str, Any]) -> str:
    """The Python type of a value that the schema takes."""
    found = set(_kinds(schema))
    if "str" in found:
        found = {h for h in found if not h.startswith("Literal")}
    if "float" in found:
        found -= {"int"}
    return "Any" if "Any" in found else " | ".join(sorted(found, key=lambda hint: (hint == "None", hint)))


def _kinds(schema: dict[str, Any]) -> Iterator[str]:
    """The members of that type."""
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from _kinds(option)
    elif "enum" in schema:
        texts = all(isinstance(word, str) for word in schema["enum"]) and len(schema["enum"]) <= MOST
        yield f"Literal[{', '.join(map(repr, schema['enum']))}]" if texts else "str"
    elif schema.get("type") == "array":
        yield f"list[{_hint(schema['items']) if 'items' in schema else 'Any'}]"
    elif schema.get("type") == "object":
        yield NAMED.get(frozenset(schema.get("properties", {})), "dict[str, Any]")
    else:
        yield SIMPLE.get(str(schema.get("type")), "Any")
