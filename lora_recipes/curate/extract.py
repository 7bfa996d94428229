"""Functions and classes with docstrings -> rows of an instruction and the code that answers it."""

import ast
import json
import re
import textwrap
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_recipes.core.errors import Exit, Problem, RecipeError
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import python_files, work
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.python_files import STDLIB, PythonFile, Walk
from lora_recipes.curate.work import Outcome, Work

TOLD = """Write functions and classes with docstrings as rows: what is asked for, and the code.

The question is the signature and the docstring, the answer the source as it stands. Each row says where it
is from: path, lines, commit or version, licence. Every definition and file that is left out is named with
the reason."""
WORDS = 3  # of a docstring that asks for something: "Close it." does not say what
HELD_OUT = "held_out"
FORMS = ("messages", "prompt")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def options(parser: ArgumentParser) -> None:
    """Its options."""
    python_files.option(parser)
    work.options(parser)
    parser.add_argument("--tests", action="store_true", help="take test files and folders, too")
    parser.add_argument(
        "--min-lines",
        type=int,
        default=5,
        metavar="N",
        help="drop what has fewer lines of code, docstring, comments and blank lines aside (default: 5)",
    )
    parser.add_argument(
        "--max-lines", type=int, default=200, metavar="N", help="drop what has more of them (default: 200)"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default=FORMS[0],
        help="messages, or prompt and completion (messages too): the answer alone is trained then",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="put whole modules with this share of the rows into x.held_out.jsonl, e.g. 0.1",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        metavar="FILE",
        help="of them first those that the tasks of this file are of (lora-recipes tasks)",
    )


def run(given: Namespace) -> str:
    """Read every file, write the rows."""
    if not 0 <= given.held_out < 1:
        raise RecipeError(Problem("--held-out", f"{given.held_out:g} is no share", "0 to below 1, e.g. 0.1"))
    walk = Walk([python_files.source(word) for word in given.sources or [STDLIB]], given.tests)
    hashes, asked = walk.sha256(), (given.min_lines, given.max_lines)
    first = _of_tasks(given.tasks) if given.tasks else set()
    held = _held_out(walk, asked, given.held_out, first) if given.held_out or first else set()
    settings = {
        k: getattr(given, k) for k in ("sources", "tests", "min_lines", "max_lines", "held_out", "form")
    }
    settings["of_tasks"] = sorted("/".join(file) for file in first)
    parts = ("", HELD_OUT) if held else ("",)

    def write(item: Item) -> Outcome:
        found = item.raw
        if "reason" in found:
            return Outcome(reason=found["reason"], example=found["found"], raw=found["of"])
        to = HELD_OUT if (found["source"], found["path"]) in held else ""
        notes = [f"rows of the licence {found['licence']}"]
        row = found if given.form == "messages" else _parted(found)
        return Outcome([row], notes=notes, example=found["name"], to=to)

    with Work("extract", given.out, settings, hashes, parts, overwrite=given.overwrite) as job:
        job.run(_items(walk, *asked), write)
        return job.finish(modules_held_out=sorted("/".join(one) for one in held))


def _of_tasks(file: Path) -> set[tuple[str, str]]:
    """The files (source, path) that tasks for pass@k are of."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {(row["source"], row["path"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        do = "a .jsonl that lora-recipes tasks wrote"
        raise RecipeError(Problem(f"--tasks {shown(file)}", f"names no files ({error})", do)) from None


def _held_out(
    walk: Walk, asked: tuple[int, int], share: float, first: set[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Files (source, path) that together have `share` of the rows, or a little more: those in `first`, then
    others in an order that only the path decides. A file is taken or left whole.
    """
    rows = Counter((i.raw["source"], i.raw["path"]) for i in _items(walk, *asked) if "reason" not in i.raw)
    if not rows:
        found = f"no definition has a docstring and {asked[0]} lines of code"
        said = ", ".join(source.name for source in walk.sources)
        raise RecipeError(Problem(said, found, "rows are asked for by docstrings"), Exit.NO_DOCSTRINGS)
    if len(rows) < 2:
        do = "a module is held out whole: more modules, or leave the option out"
        raise RecipeError(Problem("--held-out", "1 module with rows", do), Exit.ONE_MODULE)
    ranked = sorted(rows, key=lambda f: (f not in first, sha256("/".join(f).encode()).digest()))
    held, count = set[tuple[str, str]](), 0
    for file in ranked[:-1]:
        if count >= share * rows.total() and file not in first:
            break
        held.add(file)
        count += rows[file]
    return held


def _items(walk: Walk, least: int, most: int) -> Iterator[Item]:
    """A row, or a reason, for every definition; a reason for every file that is left out."""
    for file in walk:
        if file.tree is None:
            yield Item(file.where, {"reason": file.reason, "found": file.found, "of": {"path": file.path}})
            continue
        lines = file.text.split("\n")
        for names, node in definitions(file.tree):
            yield _item(file, lines, names, node, least, most)


def definitions(tree: ast.AST) -> Iterator[tuple[tuple[str, ...], Definition]]:
    """Every class, function and method in order, with its names from the outermost: not what is inside a
    function, which is part of it.
    """
    left: list[tuple[ast.AST, tuple[str, ...]]] = [(tree, ())]
    while left:  # no recursion: an elif is inside the one before, a thousand deep in some files
        node, names = left.pop()
        if isinstance(node, Definition):
            names = (*names, node.name)
            yield names, node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = ast.iter_child_nodes(node)
            block = [n for n in inside if isinstance(n, ast.stmt | ast.ExceptHandler | ast.match_case)]
            left += [(n, names) for n in reversed(block)]


def _item(
    file: PythonFile, lines: list[str], names: tuple[str, ...], node: Definition, least: int, most: int
) -> Item:
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    last = node.end_lineno or node.lineno
    where, name = f"{file.where}:{first}", ".".join(names)
    code = textwrap.dedent("\n".join(lines[first - 1 : last]))

    def out(reason: str, found: str = "") -> Item:
        return Item(
            where, {"reason": reason, "found": found or name, "of": {"path": file.path, "name": name}}
        )

    doc = ast.get_docstring(node) or ""
    if not doc.strip():
        return out("no docstring")
    if len(doc.split()) < WORDS:
        return out(f"a docstring of fewer than {WORDS} words", f"{name}: {doc.strip()}")
    count = _lines_of_code(lines, first, node)
    if count < least:
        return out(f"fewer than {least} lines of code", f"{name}: {count}")
    if count > most:
        return out(f"more than {most} lines of code", f"{name}: {count}")
    if re.search("[\ud800-\udfff]", doc):
        return out("half of a surrogate pair in the docstring", name)
    if python_files.parsed(code)[0] is None:  # a text over several lines that begins further left
        return out("cannot be moved to the left", name)
    return Item(where, _row(file, name, node, doc, code, (first, last)))


def _lines_of_code(lines: list[str], first: int, node: Definition) -> int:
    """Lines of a definition, without its docstring, comments and blank lines."""
    doc = node.body[0]
    inside = range(doc.lineno, (doc.end_lineno or doc.lineno) + 1)
    return sum(
        bool(text) and not text.startswith("#")
        for number in range(first, (node.end_lineno or first) + 1)
        if number not in inside and (text := lines[number - 1].strip()) is not None
    )


def _row(
    file: PythonFile, name: str, node: Definition, doc: str, code: str, lines: tuple[int, int]
) -> dict[str, Any]:
    kind = "class" if isinstance(node, ast.ClassDef) else "method" if "." in name else "function"
    asked = (
        f"Write the Python {kind} `{name}` of the module `{file.module}`.\n\n"
        f"{_signature(node)}\n\n{textwrap.indent(doc, '    ', lambda line: bool(line.strip()))}"
    )
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": code}]
    about = {"name": name, "kind": kind, "module": file.module, "lines": list(lines)}
    return {"messages": messages} | about | file.provenance


def _parted(row: dict[str, Any]) -> dict[str, Any]:
    """A row of messages as prompt and completion."""
    *asked, answer = row["messages"]
    return {"prompt": asked, "completion": [answer]} | {k: v for k, v in row.items() if k != "messages"}


def _signature(node: Definition) -> str:
    """`def name(arguments) -> result:`, without decorators and body."""
    bare = type(node)(**{k: getattr(node, k) for k in node._fields})
    bare.decorator_list, bare.body = [], []
    return ast.unparse(ast.fix_missing_locations(bare)).strip()
