"""Does generated code keep the style of the repository that was trained on? `make style RECIPE=x` asks base
and adapter on a running server for held-out functions, and holds rules against what the training rows do.

Each rule is counted: of the answers that it applies to, how many follow it. The figures stand in run.json,
every answer with its verdicts in outputs/<name>/style/. Imports no torch.
"""

import ast
import builtins
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from lora_recipes.core import cli, files, interval, lock
from lora_recipes.core.errors import Problem, RecipeError
from lora_recipes.core.record import Followed, Share, Style, StyleRule
from lora_recipes.core.run_folder import RunFolder
from lora_recipes.core.yamlfile import shown
from lora_recipes.curate import python_files
from lora_recipes.curate.teacher import Refused, Request
from lora_recipes.data import read
from lora_recipes.data.row import Row
from lora_recipes.evaluation import generate
from lora_recipes.recipe import load as recipes
from lora_recipes.recipe.recipe import Recipe

FOLDER, REPORT = "style", "report.json"
FORMS = {  # of names; a word in small letters is of the first two, a capital of the last two
    "snake_case": re.compile(r"_*[a-z][a-z0-9]*(_[a-z0-9]+)*_*"),
    "mixedCase": re.compile(r"_*[a-z][a-z0-9]*([A-Z][a-z0-9]*)*_*"),
    "UPPER_CASE": re.compile(r"_*[A-Z][A-Z0-9]*(_[A-Z0-9]+)*_*"),
    "CamelCase": re.compile(r"_*([A-Z][a-z0-9]*)+_*"),
}
RULES = {
    "parses": "is Python",
    "functions": "names of functions",
    "variables": "names of variables",
    "classes": "names of classes",
    "imports": "imports only what there is",
    "errors": "raises known errors",
    "docstring": "has a docstring",
    "docstring_form": "its first line's form",
    "annotations": "annotations",
    "line_length": "length of lines",
}
WIDEST = 0.99  # share of the repository's lines that are no longer than the rule allows
ERRORS = {n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Verdicts = dict[str, bool]  # rule -> is it followed; without those that do not apply


@dataclass
class Profile:
    """What the code of a repository does, counted: `names` by kind and form, `modules` that it imports or is
    made of, `errors` that it raises, definitions with docstrings and their first lines by form (begins with a
    capital, ends with a full stop), functions that are annotated in full or not, lines by length.
    """

    rows: int = 0
    names: dict[str, Counter[str]] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    errors: Counter[str] = field(default_factory=Counter)
    documented: Counter[bool] = field(default_factory=Counter)
    first_lines: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    annotated: Counter[bool] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)

    def count(self, code: str, modules: Iterable[str] = ()) -> None:
        """Add a stretch of code; `modules`: which it is from."""
        self.modules.update(modules)
        self.lengths.update(len(line) for line in code.split("\n") if line.strip())
        if (tree := python_files.parsed(code)[0]) is None:
            return
        self.rows += 1
        for kind, name in names(tree):
            forms = [form for form, of in FORMS.items() if of.fullmatch(name)]
            self.names.setdefault(kind, Counter()).update(forms)
        self.modules.update(module for module, _ in imports(tree))
        self.errors.update(raised(tree))
        for node in definitions(tree):
            doc = ast.get_docstring(node)
            self.documented[bool(doc)] += 1
            if doc:
                self.first_lines[_form(doc)] += 1
            if isinstance(node, Function):
                self.annotated[_annotated(node)] += 1

    @property
    def widest(self) -> int:
        """Characters that WIDEST of the lines do not pass."""
        seen, enough = 0, math.ceil(WIDEST * self.lengths.total())
        for length in sorted(self.lengths):
            if (seen := seen + self.lengths[length]) >= enough:
                return length
        return 0

    def verdicts(self, answer: str, asked: str) -> Verdicts:
        """Which rules the code in `answer` follows, and which not. Names that stand in what was `asked` were
        not the model's choice, and are not judged.
        """
        code = "\n".join(block for _, block in python_files.in_text(answer))
        if not code.strip() or (tree := python_files.parsed(code)[0]) is None:
            return {"parses": False}
        found, given = {"parses": True}, set(re.findall(r"\w+", asked))
        for kind, rule in (("function", "functions"), ("variable", "variables"), ("class", "classes")):
            chosen = [name for of, name in names(tree) if of == kind and name not in given]
            if chosen and (usual := _usual(self.names.get(kind))):
                found[rule] = all(FORMS[usual].fullmatch(name) for name in chosen)
        if imported := list(imports(tree)):
            found["imports"] = all(self._there(*one) for one in imported)
        bound = {name for _, name in names(tree)} | given
        if own := [name for name in raised(tree) if name not in bound or name in self.errors]:
            found["errors"] = all(name in self.errors or name in ERRORS for name in own)
        if of := next(definitions(tree), None):
            doc = ast.get_docstring(of)
            if _usual(self.documented):
                found["docstring"] = bool(doc)
            if doc and self.first_lines:
                found["docstring_form"] = _form(doc) == _usual(self.first_lines)
        if (functions := [n for n in definitions(tree) if isinstance(n, Function)]) and self.annotated:
            found["annotations"] = all(_annotated(n) == _usual(self.annotated) for n in functions)
        found["line_length"] = all(len(line) <= self.widest for line in code.split("\n"))
        return found

    def _there(self, module: str, level: int) -> bool:
        """Is it a module of Python's own, of the repository, or one that it imports? Nothing is imported."""
        if level:
            return any(of.startswith(".") for of in self.modules)
        known = {".".join(of.split(".")[:n]) for of in self.modules for n in range(1, of.count(".") + 2)}
        return module in known or _stdlib(module)

    def facts(self) -> dict[str, Any]:
        """What the rules hold against, for the record."""
        capital, stop = _usual(self.first_lines) or (None, None)
        return {
            "rows": self.rows,
            "names": {kind: _usual(forms) for kind, forms in sorted(self.names.items())},
            "modules": len(self.modules),
            "errors": len(self.errors),
            "documented": _share(self.documented),
            "first_line_capital": capital,
            "first_line_full_stop": stop,
            "annotated": _share(self.annotated),
            "line_length": self.widest,
        }


def definitions(tree: ast.AST) -> Iterator[Function | ast.ClassDef]:
    """Every function and class, outer ones first."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef))


def names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that code gives, each with its kind: function, class, constant (at the top level, in
    capitals) or variable (arguments too). Names with two underscores at both ends are Python's.
    """
    top = {
        id(n) for node in ast.iter_child_nodes(tree) for n in ast.walk(node) if isinstance(node, ast.Assign)
    }
    for node in ast.walk(tree):
        kind, name = "variable", ""
        if isinstance(node, Function):
            kind, name = "function", node.name
        elif isinstance(node, ast.ClassDef):
            kind, name = "class", node.name
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.ExceptHandler):
            name = node.name or ""
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            capitals = id(node) in top and FORMS["UPPER_CASE"].fullmatch(node.id)
            kind, name = ("constant" if capitals else "variable"), node.id
        if name.strip("_") and not (name.startswith("__") and name.endswith("__")):
            yield kind, name


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The modules that code imports, each with its level: 0, or the dots of a relative one, which has them in
    its name too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.level


def raised(tree: ast.AST) -> Iterator[str]:
    """The last name of what is raised: X of `raise X`, `raise X(...)` and `raise a.X`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            of = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
            if name:
                yield name


def _annotated(node: Function) -> bool:
    """Are all arguments annotated, but for self and cls, and the result?"""
    of = node.args
    every = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
    return node.returns is not None and all(a.annotation or a.arg in ("self", "cls") for a in every)


def _form(doc: str) -> tuple[bool, bool]:
    """Of the first line: does it begin with a capital, and does its first paragraph end with a full stop?"""
    paragraph = doc.strip().split("\n\n")[0].strip()
    return paragraph[:1].isupper(), paragraph.endswith(".")


def _usual(counted: Counter[Any] | None) -> Any:
    """The most frequent; None where nothing was counted."""
    return counted.most_common(1)[0][0] if counted else None


def _share(counted: Counter[bool]) -> float | None:
    return round(counted[True] / counted.total(), 4) if counted else None


def _stdlib(module: str) -> bool:
    """Is it a module of Python's own library? Looked for as an import would, but nothing is imported."""
    names, path = module.split("."), None
    if names[0] not in sys.stdlib_module_names or module in sys.modules or len(names) == 1:
        return names[0] in sys.stdlib_module_names  # os.path is in os.py, and always there
    for name in names:
        if (spec := PathFinder.find_spec(name, path)) is None:
            return False
        path = list(spec.submodule_search_locations or [])
    return True


@dataclass(frozen=True)
class Judged:
    """An answer: of which model, to which row, its text, the verdicts, and whether it was cut off."""

    model: str
    where: str
    verdicts: Verdicts
    cut: bool
    text: str


def style(name: str, outputs: Path, url: str, most: int, max_tokens: int) -> str:
    """Ask base and adapter of the run outputs/<name>/ on the server at `url` for at most `most` held-out
    functions, judge, and report. RecipeError where there is no code to learn a style from, or to ask for.
    """
    name = recipes.run_of(name, outputs)
    run = RunFolder(outputs / name)
    record = run.outcome()
    asked = replace(recipes.load(str(run.path / "recipe.yaml")), name=name)
    profile, digest = _profile(asked)
    rows = _held_out(asked, most)
    models = generate.served(url, (), name)
    with lock.runs([], "asks for style", run.path):
        own = [Judged("repository", r.where, profile.verdicts(a, said(p)), False, a) for r, p, a in rows]
        judged = {"repository": own}
        for model in models:
            requests = [_request(prompt, row, asked, model.name, max_tokens) for row, prompt, _ in rows]
            answers = generate.answers(url, model, requests, run.path / FOLDER)
            judged[model.name] = [
                Judged(model.name, row.where, {}, False, answer.reason)
                if isinstance(answer, Refused)
                else Judged(
                    model.name,
                    row.where,
                    profile.verdicts(answer.text, said(prompt)),
                    answer.finish == "length",
                    answer.text,
                )
                for (row, prompt, _), answer in zip(rows, answers, strict=True)
            ]
        found = Style(
            at=files.now(),
            prompts=len(rows),
            train_sha256=digest,
            max_new_tokens=max_tokens,
            profile=profile.facts(),
            cut={model: sum(one.cut for one in each) for model, each in judged.items()},
            rules=figures({model: [one.verdicts for one in each] for model, each in judged.items()}),
        )
        report = run.path / FOLDER / REPORT
        whole = [asdict(one) for each in judged.values() for one in each]
        files.write(report, json.dumps(whole, indent=1) + "\n")
        run.write_record(replace(record, style=found))
    return f"{text(found)}\nevery answer with its verdicts: {shown(report)}"


def _profile(asked: Recipe) -> tuple[Profile, str]:
    """What the training rows' code does, and the hash of the rows."""
    split, profile = read.read(asked, "train"), Profile()
    for row in split.rows:
        for answer in _answers(row):
            for _, block in python_files.in_text(answer):
                profile.count(block)
        profile.modules.update(re.findall(r"module `([\w.]+)`", said(_prompt(row))))
    if not profile.rows:
        do = f"{cli.command('data', VERB='extract')} makes rows of a repository's functions"
        raise RecipeError(Problem(asked.at("data", "train"), "no answer in it is Python code", do))
    return profile, split.sha256


def _answers(row: Row) -> list[str]:
    if not row.conversational:
        return [str(row.value.get("completion", row.value.get("text", "")))]
    of = row.messages if "messages" in row.value else row.value["completion"]
    return [m["content"] for m in of if m["role"] == "assistant" and isinstance(m.get("content"), str)]


def _prompt(row: Row) -> str | list[dict[str, Any]]:
    """What stands before the last answer."""
    if not row.conversational:
        return str(row.value.get("prompt", ""))
    last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=0)
    return row.messages[:last]


def said(prompt: str | list[dict[str, Any]]) -> str:
    """The words of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content") or "") for m in prompt)


def _held_out(asked: Recipe, most: int) -> list[tuple[Row, str | list[dict[str, Any]], str]]:
    """Rows of data.eval whose last answer is code, each with its prompt and that answer: `most` of them, the
    same distance apart.
    """
    if not asked.data.eval:
        raise RecipeError(Problem(asked.at("data"), "there is no data.eval to ask", "name held-out rows"))
    rows = [
        (row, _prompt(row), answers[-1])
        for row in read.read(asked, "eval").rows
        if (answers := _answers(row))
    ]
    rows = [row for row in rows if row[1] and any(python_files.in_text(row[2]))]
    if not rows:
        found = "no row has a prompt and Python code for an answer"
        raise RecipeError(Problem(asked.at("data", "eval"), found, "name held-out rows of code"))
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _request(
    prompt: str | list[dict[str, Any]], row: Row, asked: Recipe, model: str, max_tokens: int
) -> Request:
    options: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
    if isinstance(prompt, str):
        return Request([], options, prompt)
    kwargs = asked.data.chat_template_kwargs | row.value.get("chat_template_kwargs", {})
    options |= {"chat_template_kwargs": kwargs} if kwargs else {}
    options |= {"tools": row.value["tools"]} if row.value.get("tools") else {}
    return Request(prompt, options)


def figures(judged: Mapping[str, Sequence[Verdicts]]) -> dict[str, StyleRule]:
    """Of each rule how many of the answers that it applies to follow it. `judged`: of each model the
    verdicts, in the order of the prompts; `repository` is what stands there, the next one the base, the
    others are compared with it on the prompts to whose answers of both the rule applies.
    """
    made = {}
    base = next(name for name in judged if name != "repository")
    for rule in RULES:
        models = {}
        for name, each in judged.items():
            values = [verdicts[rule] for verdicts in each if rule in verdicts]
            compared: dict[str, Any] = {}
            if name not in ("repository", base):
                both = [
                    (a[rule], b[rule])
                    for a, b in zip(judged[base], each, strict=True)
                    if rule in a and rule in b
                ]
                better, worse = (sum(b == sign and a != sign for a, b in both) for sign in (True, False))
                compared = {"both": len(both), "better": better, "worse": worse}
                compared["p"] = interval.mcnemar(better, worse)
            share = None
            if values:
                low, high = interval.share(sum(values), len(values))
                share = Share(value=sum(values) / len(values), low=low, high=high)
            models[name] = Followed(applies=len(values), share=share, **compared)
        if any(model.applies for model in models.values()):
            made[rule] = StyleRule(models=models)
    return made


def text(found: Style) -> str:
    """The figures for a person."""
    of, names = found.profile, list(next(iter(found.rules.values())).models)
    forms = ", ".join(f"{kind} {form}" for kind, form in of["names"].items())
    first = " and ".join(
        [
            "begin with a capital" if of["first_line_capital"] else "begin with no capital",
            "end with a full stop" if of["first_line_full_stop"] else "end without a full stop",
        ]
    )
    lines = [
        f"repository  {of['rows']:,} stretches of code in data.train: {forms}",
        f"            docstrings {first}; {of['annotated'] or 0:.0%} of functions annotated; 99 % of"
        f" lines have at most {of['line_length']} characters",
        f"            imports of {of['modules']:,} modules, {of['errors']:,} errors raised",
        f"asked       {found.prompts} held-out functions, greedy, at most {found.max_new_tokens:,} tokens",
        "",
        f"{'follow the rule':28}" + "".join(f"{name:>22}" for name in names) + "   better, worse: p",
    ]
    for rule, row in found.rules.items():
        cells = "".join(f"{_cell(model):>22}" for model in row.models.values())
        sides = [m for m in row.models.values() if m.p is not None]
        against = "; ".join(f"{m.better}, {m.worse}: {m.p:.2g}" for m in sides)
        lines.append(f"{RULES[rule]:28}{cells}   {against}")
    cut = {name: count for name, count in found.cut.items() if count}
    lines += [
        "answers that follow a rule, of those that it applies to (95 % interval); p: exact test of McNemar on"
        " the prompts to whose answers of both it applies"
    ]
    if cut:
        of_them = ", ".join(f"{count} of {name}" for name, count in cut.items())
        lines.append(
            f"NOTE        cut off at {found.max_new_tokens:,} tokens, so that they may not parse: {of_them}"
        )
    return "\n".join(lines)


def _cell(model: Followed) -> str:
    if model.share is None:
        return "-"
    return f"{model.share.value:.0%} of {model.applies} ({model.share.low:.0%}-{model.share.high:.0%})"
