"""A repository's own tasks for pass@k: its functions whose docstrings have examples, and those as their
tests. `lora-recipes tasks SOURCE OUT.jsonl`.

A task's prompt is what the function needs of its module, and its head and docstring; the body is to be
written. Only those are kept whose own body passes in the sandbox, and whose examples fail without it. Imports
no torch.
"""

import ast
import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_recipes.curate import extract, python_files
from lora_recipes.curate.inputs import Item
from lora_recipes.curate.python_files import STDLIB, PythonFile, Walk
from lora_recipes.curate.work import Outcome, Work, dropped, kept
from lora_recipes.evaluation import sandbox
from lora_recipes.evaluation.sandbox import Limits, Sandbox
from lora_recipes.evaluation.tasks import Task

LONGEST = 4000  # characters of a prompt, by default
NOTHING = "    raise NotImplementedError\n"
TEST = """import doctest


def check(candidate):
    names = {{**globals(), {name!r}: candidate}}
    examples = doctest.DocTestParser().get_doctest({text!r}, names, {name!r}, None, 0)
    said = []
    found = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert not found.failed, "".join(said)
"""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def write(words: list[str], out: Path, longest: int, unsafe: bool, overwrite: bool) -> str:
    """Write the tasks of the sources `words`; what to print. `longest`: characters of a prompt. `unsafe`: run
    the functions also where no sandbox holds.
    """
    walk = Walk([python_files.source(word) for word in words or [STDLIB]])
    hashes, box = walk.sha256(), sandbox.find(Limits(), unsafe)

    def act(item: Item) -> Outcome:
        if "reason" in item.raw:
            return dropped(item.raw["reason"], item.raw["found"])
        return _judged(item.raw, box)

    with Work("tasks", out, {"sources": words, "longest": longest}, hashes, overwrite=overwrite) as job:
        job.run(_items(walk, longest), act)
        return job.finish(sandbox=box.level)


def _items(walk: Walk, longest: int) -> Iterator[Item]:
    """Each function with examples, as a task or with the reason why it makes none."""
    for file in walk:
        for node in file.tree.body if file.tree else ():
            if isinstance(node, Function):
                where = f"{file.where}:{node.lineno}"
                doc = ast.get_docstring(node, clean=False) or ""
                try:
                    if examples := doctest.DocTestParser().get_examples(doc):
                        yield Item(where, _task(file, node, doc, examples, longest))
                except ValueError as error:  # of the examples' form
                    yield Item(where, {"reason": "examples that doctest does not read", "found": str(error)})


def _task(
    file: PythonFile, node: Function, doc: str, examples: list[doctest.Example], longest: int
) -> dict[str, Any]:
    """A task, with its where about; or a reason."""
    said = node.body[0]
    name, lines = node.name, file.text.split("\n")
    assert file.tree and said.end_lineno and node.end_lineno, "it was parsed, and has a docstring"
    if isinstance(node, ast.AsyncFunctionDef):
        return {"reason": "an async function", "found": name}
    if len(node.body) < 2 or node.body[1].lineno <= said.end_lineno:
        return {"reason": "no body below its docstring", "found": name}
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    head = "\n".join(lines[first - 1 : said.end_lineno]) + "\n"
    body = "\n".join(lines[said.end_lineno : node.end_lineno]) + "\n"
    prompt = "".join(_needed(file.tree, lines, node, examples)) + head
    if len(prompt) > longest:
        return {
            "reason": f"a prompt of more than {longest:,} characters",
            "found": f"{name}: {len(prompt):,}",
        }
    task = {"task_id": f"{file.module}.{name}", "prompt": prompt, "entry_point": name}
    task |= {"test": TEST.format(name=name, text=doc), "canonical_solution": body}
    return task | {"examples": len(examples)} | file.provenance


def _needed(
    tree: ast.Module, lines: list[str], node: Function, examples: list[doctest.Example]
) -> Iterator[str]:
    """What `node` and its examples need of their module, as it stands there: the statements that give the
    names that are used, those that these use, and so on.
    """
    binds: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in _bound(statement):
            binds.setdefault(name, []).append(statement)
    taken = {id(statement): statement for statement in binds.get("*", [])}
    parsed = [python_files.parsed(example.source)[0] for example in examples]
    left = [node, *filter(None, parsed), *taken.values()]
    while left:
        for used in {n.id for n in ast.walk(left.pop()) if isinstance(n, ast.Name)}:
            for statement in binds.get(used, []):
                if statement is not node and id(statement) not in taken:
                    taken[id(statement)] = statement
                    left.append(statement)
    for statement in tree.body:
        if id(statement) in taken:
            first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
            gap = "\n\n" if isinstance(statement, extract.Definition) else ""
            yield gap + "\n".join(lines[first - 1 : statement.end_lineno]) + "\n"
    if taken:
        yield "\n\n"


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a module gives; `*` for all of another module, or of Python to
    come.
    """
    left: list[ast.AST] = [statement]
    while left:
        node = left.pop()
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield "*"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, extract.Definition):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if not isinstance(node, extract.Definition | ast.Lambda):
            left += ast.iter_child_nodes(node)


def _judged(found: dict[str, Any], box: Sandbox) -> Outcome:
    """The task, where its own body passes and none does not."""
    task = Task(*(found[key] for key in ("task_id", "prompt", "entry_point", "test", "canonical_solution")))
    verdicts = []
    for body in (task.canonical_solution or "", NOTHING):
        verdicts.append(box.judge(task.prompt + body, task.entry_point, task.test, task.helpers))
    if not verdicts[0].passed:
        return dropped(
            "its own body does not pass", f"{task.task_id}: {verdicts[0].verdict}: {verdicts[0].said}"
        )
    if verdicts[1].passed:
        return dropped("its examples pass without its body", task.task_id)
    return kept(found)
