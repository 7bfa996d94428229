"""Read a YAML file into plain values, remembering on which line each stands.

Scalars are those of YAML 1.2: `2e-4` is a number, `no` and `on` are words. Duplicate keys, tabs, a BOM, other encodings, an empty file
and a list where a mapping is meant are answered here, once, for recipes and contracts alike.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from lora_recipes.messages import Problem, RecipeError, raise_if

Key = tuple[str | int, ...]
Lines = dict[Key, int]  # ("lora", "target_modules", 1) -> line, counted from 1


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """SafeLoader with the scalars of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2)."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


def shown(path: Path) -> str:
    """`path` as a person would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../..") else relative


def load(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in the YAML file `path`, and the line of each of its keys. RecipeError lists everything wrong with the file."""
    name = shown(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError(Problem(f"{name}:{line}", "not UTF-8 text", "save the file as UTF-8")) from None
    except OSError as error:
        raise RecipeError(Problem(name, f"cannot be read ({error.strerror})")) from None
    value, lines, problems = parse(text, name)
    raise_if(problems)
    if not isinstance(value, dict):
        found = "the file is empty" if value is None else f"a {_kind(value)} stands where sections are expected"
        raise RecipeError(Problem(f"{name}:1", found, "begin with a section, e.g. `model:`"))
    return value, lines


def parse(text: str, name: str) -> tuple[Any, Lines, list[Problem]]:
    """The value of the YAML `text`, the line of each key path in it, and the problems found (duplicate keys; syntax raises at once)."""
    loader = _Loader(text)
    lines: Lines = {}
    problems: list[Problem] = []

    def build(node: yaml.Node, path: Key) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = build(key_node, (*path, f"<key {len(result)}>"))
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int):
                problems.append(Problem(f"{name}:{line}", f"{key!r} cannot be a key", "write a plain name"))
                continue
            if key in result:
                where = ".".join(map(str, (*path, key)))
                first = lines[(*path, key)]
                problems.append(Problem(f"{name}:{line} {where}", f"given twice, first on line {first}", "keep one"))
            lines[(*path, key)] = line
            result[key] = build(value_node, (*path, key))
        return result

    try:
        node = loader.get_single_node()
        return (build(node, ()) if node else None), lines, problems
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax(error, text, name)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(Problem(name, f"not YAML: {error}")) from None
    finally:
        loader.dispose()


def _syntax(error: yaml.MarkedYAMLError, text: str, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    for number, content in enumerate(text.splitlines(), 1):
        if number >= line - 1 and "\t" in content[: len(content) - len(content.lstrip())]:
            return Problem(f"{name}:{number}", "indented with a tab", "YAML indents with spaces only")
    return Problem(f"{name}:{line}", f"not YAML: {error.problem or error.context}", "compare with configs/recipes/")


def _kind(value: Any) -> str:
    return {list: "list", str: "text", bool: "true/false", int: "number", float: "number"}.get(type(value), "value")
