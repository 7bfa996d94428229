"""Write what the docs take from the code: the tables between `<!-- table: x -->` and `<!-- end -->`, and the
picture of the rooms, rooms.svg. `make docs` runs it; `make lint` says with --check when a page is stale.
"""

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from lora_recipes.core import record
from lora_recipes.core.cli import quiet
from lora_recipes.core.errors import Exit
from lora_recipes.recipe import contract as contracts
from lora_recipes.recipe import fields as fates
from lora_recipes.recipe.check import schema
from lora_recipes.recipe.other_tools import OWNED
from lora_recipes.recipe.rules import RULES

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "lora_recipes"
PICTURE = DOCS / "rooms.svg"
TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The text of a page with each of its marked tables made anew."""
    return TABLE.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n\n{m[4]}", page)


def table(head: str, rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join([f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {row} |" for row in cells)])


def keys(section: str) -> str:
    """Every key of a section of a recipe."""
    return of_object(schema()["properties"][section])


def of_object(section: dict[str, Any]) -> str:
    """Every key of an object of the schema; the required ones say so."""
    required = section.get("required", [])
    rows = [
        (f"`{name}`" + " (required)" * (name in required), takes(value), said(value))
        for name, value in section["properties"].items()
    ]
    return table("key | takes | what it is", rows)


def said(value: dict[str, Any]) -> str:
    """What a key is, and its default."""
    default = value.get("default")
    told = f" (default: {str(default).lower() if isinstance(default, bool) else default})"
    return str(value.get("description", "")) + (told if default not in (None, [], {}) else "")


def takes(value: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "enum" in value:
        return ", ".join(f"`{word}`" for word in value["enum"])
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(takes(option) for option in value["anyOf"]))
    kind = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
    kind |= {"object": "mapping", "array": "list", "null": "`null`"}
    low, high, above = value.get("minimum"), value.get("maximum"), value.get("exclusiveMinimum")
    bounds = f" above {above}" if above is not None else f" from {low}" if low is not None else ""
    return kind[value["type"]] + bounds + (f" to {high}" if high is not None else "")


def limits() -> str:
    """The gate's limits with their defaults."""
    from lora_recipes.data.gate import LIMITS  # imports torch, which no other table needs

    rows = [
        (f"`{name}`", f"{stop:g}", f"{warn:g}", f"share {what}", do)
        for name, (stop, warn, what, do) in LIMITS.items()
    ]
    return table("limit | stops above | warns above | what is counted | what to do", rows)


def peft_types() -> str:
    """The types of a `peft:` section and the keys that each must have."""
    kinds = [part["then"] for part in schema()["properties"]["peft"]["allOf"]]
    rows = [
        (
            f"`{kind['properties']['peft_type']['const']}`",
            f"`{kind['description'].removeprefix('any field of ')}`",
            ", ".join(f"`{key}`" for key in kind["required"]),
        )
        for kind in kinds
    ]
    return table("peft_type | class | must be said", rows)


def owned() -> str:
    """Fields of the libraries that a recipe does not set."""
    return table("field | instead", [(f"`{name}`", str(advice)) for name, advice in OWNED.items()])


def docstring(path: Path) -> str:
    """The docstring of a Python file."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def first_sentence(text: str) -> str:
    """Its first sentence, on one line."""
    line = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s", line)[0].rstrip(".:")


def files() -> str:
    """Every file of every room, high rooms first, with the first sentence of its docstring."""
    rows = []
    for room in reversed(by_level(imports())):
        found = sorted(p for p in (PACKAGE / room).rglob("*.py") if p.name != "__init__.py")
        rows += [(f"`{path.relative_to(PACKAGE)}`", first_sentence(docstring(path))) for path in found]
    return table("file | what it is", rows)


def imports() -> dict[str, set[str]]:
    """Each room with the rooms that its files import, late imports too."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for room in rooms:
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                own = {n.split(".")[1] for n in names if n.startswith("lora_recipes.")}
                found[room] |= (own & rooms) - {room}
    return found


def level(room: str, graph: dict[str, set[str]]) -> int:
    """How many rooms stand below it on the longest way down."""
    return max((1 + level(below, graph) for below in graph[room]), default=0)


def by_level(graph: dict[str, set[str]]) -> list[str]:
    """The rooms, low ones first."""
    return sorted(graph, key=lambda room: (level(room, graph), room))


def below(room: str, graph: dict[str, set[str]]) -> set[str]:
    """All that is reached from it by imports."""
    return set().union(*({other} | below(other, graph) for other in graph[room]))


def shortest(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that lead where another room's arrow leads too (the transitive reduction)."""
    return {
        room: {b for b in others if not any(b in below(c, graph) for c in others - {b})}
        for room, others in graph.items()
    }


# Pixels: a box, the space between two boxes, the border of the picture.
WIDTH, HEIGHT, GAP, BORDER = 430, 92, 30, 14


def picture() -> str:
    """The rooms as an SVG: a box each with its purpose, the longest way down at the left, arrows for imports.

    Arrows that follow from others are left out: a room may import from every room it reaches.
    """
    graph = imports()
    arrows, height = shortest(graph), max(level(room, graph) for room in graph)
    chain = {room := max(by_level(graph), key=lambda r: level(r, graph))}
    while graph[room]:
        chain.add(room := max(sorted(graph[room]), key=lambda r: level(r, graph)))
    corners, taken = {}, dict.fromkeys(range(height + 1), 0)
    for room in by_level(graph):
        floor = level(room, graph)
        column = 0 if room in chain else taken[floor] + 1
        taken[floor] += room not in chain
        corners[room] = (BORDER + column * (WIDTH + 2 * GAP), BORDER + (height - floor) * (HEIGHT + GAP))
    wide = max(x for x, _ in corners.values()) + WIDTH + BORDER
    high = max(y for _, y in corners.values()) + HEIGHT + BORDER
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
        ' font-family="DejaVu Sans, Verdana, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8"'
        ' orient="auto"><path d="M0 0L10 5L0 10z" fill="#333"/></marker></defs>',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
    ]
    for room in by_level(graph):
        for other in sorted(arrows[room]):
            way = path_between(corners[room], corners[other])
            lines.append(f'<path d="{way}" fill="none" stroke="#333" marker-end="url(#tip)"/>')
    for room in by_level(graph):
        lines += box(room, *corners[room])
    return "\n".join([*lines, "</svg>"]) + "\n"


def path_between(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From a box down to another: straight in one column, else with one bend, beside the boxes between."""
    (x, y), (to_x, to_y), middle, third = start, end, WIDTH // 2, HEIGHT // 3
    if x == to_x:
        return f"M{x + middle} {y + HEIGHT}V{to_y}"
    if x < to_x:
        return f"M{x + WIDTH} {y + 2 * third}H{to_x + middle}V{to_y}"
    return f"M{x + middle} {y + HEIGHT}V{to_y + third}H{to_x + WIDTH}"


def box(room: str, x: int, y: int) -> list[str]:
    """A room: its name and what lives there, from the docstring of its `__init__.py`."""
    purpose = " ".join(docstring(PACKAGE / room / "__init__.py").split("\n\n")[0].split())
    said = textwrap.wrap(purpose, 56)
    return [
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef2fb" stroke="#3949ab"/>',
        f'<text x="{x + 12}" y="{y + 23}" font-size="17" font-weight="bold">{room}/</text>',
        *(
            f'<text x="{x + 12}" y="{y + 44 + 18 * i}" font-size="14">{escape(line)}</text>'
            for i, line in enumerate(said)
        ),
    ]


SECTIONS = ("model", "data", "classify", "freeze", "warm_start", "learning_rates", "early_stopping", "probes")
SECTIONS += ("evaluate",)


def rules() -> str:
    """Every rule between keys, methods and layouts."""
    rows = [
        (
            f"`{rule.key}`",
            rule.against,
            *map(_plain, (rule.found, rule.do)),
            "warns" if rule.warns else "refused",
        )
        for rule in RULES
    ]
    return table("key | does not go with | because | what to do | then", rows)


def fields() -> str:
    """Every field of SFTConfig and LoraConfig, and what comes of it."""
    rows = [(f"`{name}`", row.fate, _plain(row.said)) for name, row in fates.table().items()]
    return table("field | here | what it means", rows)


def _plain(text: str) -> str:
    """Without the doubled braces of a text to be filled in."""
    return text.replace("{{", "{").replace("}}", "}")


def models() -> str:
    """Every shipped contract."""
    read = [contracts.load(name) for name in contracts.names()]
    rows = [
        (
            f"`{c.name}`",
            c.name_or_path or (c.package.holds if c.package else "made here"),
            f"{c.parameters:,}",
            f"`{c.chat_template}`" if c.chat_template else "none",
        )
        for c in read
    ]
    return table("contract | base | parameters of the text model | chat template", rows)


def exits() -> str:
    """Every exit code."""
    return table("code | when", [(str(code.value), code.told) for code in Exit])


TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(keys, name) for name in SECTIONS},
    "source": lambda: of_object(
        schema()["properties"]["data"]["properties"]["train"]["anyOf"][1]["items"]["anyOf"][1]
    ),
    "probe": lambda: of_object(schema()["properties"]["probes"]["properties"]["change"]["items"]),
    "limits": limits,
    "peft types": peft_types,
    "owned": owned,
    "fields": fields,
    "exits": exits,
    "files": files,
    "rules": rules,
    "contracts": models,
}


def main() -> int:
    """Write every page that changed, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check = parser.parse_args().check
    quiet()
    made = {page: filled(page.read_text(encoding="utf-8")) for page in sorted(DOCS.glob("*.md"))}
    made |= {PICTURE: picture(), DOCS / "run_json.md": record.page()}
    stale = [p for p, text in made.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    named = ", ".join(f"docs/{path.name}" for path in stale)
    if check:
        print(f"stale: {named}: run docs/make.py" if stale else "the docs are current")
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path], encoding="utf-8")
    print(f"wrote {named}" if stale else "the docs are current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
